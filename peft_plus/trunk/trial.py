"""Whether a model can be served at all: what its config says, what a pass asks for, and the first batch, both ways."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MethodError
from .passes import Trunk, eval_mode
from .rows import Rows, is_by_token, row_count

WITHOUT = "Train without trunk_cache: everything else stays the same."

_SAME = 1e-4
"""How far a pass that is given the trunk's output may lie from one that computes it, relative to what they put out. On
one machine they are equal to the last bit."""
_CLOSE = 0.05
"""How far two computations of the same features may lie apart, relative to their size: the shape of a batch changes how
they are rounded, in half precision by a hundredth."""


def check_model(inner: Any) -> None:
    """Refuse a model whose passes need more of the trunk than its last output.

    Raises:
        MethodError: it returns the hidden states or attentions of all blocks, or leaves blocks out by chance.
    """
    config = getattr(inner, "config", None)
    for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
        if getattr(config, name, False):
            raise MethodError(
                f"trunk_cache skips the lower blocks, and config.{name}=True asks for what they put out. Set it to "
                f"False, or train without trunk_cache."
            )
    name = "encoder_layerdrop" if getattr(config, "is_encoder_decoder", False) else "layerdrop"
    if (getattr(config, name, 0.0) or 0.0) > 0:
        raise MethodError(
            f"config.{name}={getattr(config, name)} leaves out whole blocks by chance, also frozen ones, and "
            "trunk_cache puts in the output of one of them. Set it to 0, or train without trunk_cache."
        )


def check_pass(given: Mapping[str, Any]) -> None:
    """Refuse a pass that asks for what lies inside the trunk, or brings a cache of keys for it (prefix tuning)."""
    for name in ("output_hidden_states", "output_attentions", "output_router_logits", "past_key_values"):
        if given.get(name):
            raise MethodError(f"trunk_cache skips the lower blocks, and this pass sets {name!r}, which needs them.")


def compare(model: nn.Module, forward: Callable[..., Any], trunk: Trunk, given: Mapping[str, Any]) -> None:
    """Run two rows of a batch both ways, without dropout: what comes out must agree.

    Args:
        model: which `forward` belongs to, with all that wraps it.
    Raises:
        MethodError: it does not.
    """
    few = part(given, slice(0, 2))
    features = trunk.features(forward, few)
    with trial(model):
        plain = forward(**few)
        try:
            with trunk.skipping(features):
                skipped = forward(**few)
        except Exception as error:
            raise _differs(trunk, f"fails ({type(error).__name__}: {error})") from error
    what = difference(plain, skipped)
    if what is not None:
        raise _differs(trunk, f"gives another {what}")


def _differs(trunk: Trunk, why: str) -> MethodError:
    return MethodError(
        f"With the output of block {trunk.depth} put in from outside, this {type(trunk.inner).__name__} {why}: its "
        "upper blocks use more of the lower ones than that (layers that share keys, a router's loss, a residual of "
        f"their own). {WITHOUT}"
    )


def check_mates(forward: Callable[..., Any], trunk: Trunk, given: Mapping[str, Any], features: Tensor) -> None:
    """An example must have the same features without its batch mates.

    Raises:
        MethodError: it has not, so that its features could not be found again in another batch.
    """
    alone = trunk.features(forward, part(given, slice(0, 1)))
    if alone.shape[1:] != features.shape[1:] or far(alone, features[: len(alone)]):
        raise MethodError(
            f"Block {trunk.depth} makes something else of an example when it stands in another batch, so trunk_cache "
            f"cannot store what it makes of it. {WITHOUT}"
        )


@contextmanager
def trial(model: nn.Module) -> Generator[None]:
    """For a pass in the middle of another, in eval mode and without a gradient."""
    with torch.no_grad(), eval_mode(model):
        yield
    torch.clear_autocast_cache()  # older versions of torch keep weights that were cast without a gradient


def check_stored(features: Tensor, stored: Tensor, rows: Rows, folder: Path) -> None:
    """What was found for a batch must be what is computed.

    Args:
        folder: where it was found.
    Raises:
        MethodError: it is not.
    """
    for row, (first, end) in enumerate(rows.spans_in(features)):
        if far(stored[row : row + 1, first:end], features[row : row + 1, first:end]):
            raise MethodError(
                f"The features in {folder} are not those that this model computes. Delete that folder: they are "
                "computed again."
            )


def far(one: Tensor, other: Tensor) -> bool:
    """Whether the features of any token differ by more than rounding. Equal shapes, (rows, tokens, …)."""
    one, other = (x.float().flatten(2) if x.dim() > 2 else x.float() for x in (one, other))
    size = other.norm(dim=-1)
    return bool(((one - other).norm(dim=-1) > _CLOSE * size.clamp(min=1e-3 * float(size.max()))).any())


def part(given: Mapping[str, Any], rows: slice | Tensor, tokens: slice = slice(None)) -> dict[str, Any]:
    """A batch of some rows of another, and of these only some tokens."""
    count = row_count(given)
    mask = given.get("attention_mask")
    width = mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 2 else None
    kept = {}
    for name, value in given.items():
        if isinstance(value, Tensor) and value.dim() and len(value) == count:
            value = value[rows]
        if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[1] == width and is_by_token(name, value):
            value = value[:, tokens]
        kept[name] = value
    return kept


def difference(one: Any, other: Any, counts: Tensor | None = None) -> str | None:
    """What differs between the outputs of two passes; None if nothing does.

    Args:
        counts: at which tokens they are looked at, (rows, tokens); None for all.
    """
    for what, a, b in zip(("loss", "output"), _figures(one, counts), _figures(other, counts), strict=True):
        if len(a) != len(b) or (len(a) and float((a - b).abs().max()) > _SAME * float(a.abs().max().clamp(min=1))):
            return what
    return None


def _figures(output: Any, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """A pass's losses, and all else that it put out, as two vectors in fp32."""
    losses: list[Tensor] = []
    others: list[Tensor] = []
    items = output.items() if isinstance(output, Mapping) else enumerate(output)
    for _, value in items:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if value.dim() == 0:
            losses.append(value.float())
            continue
        at_tokens = counts is not None and value.shape[:2] == counts.shape
        others.append((value[counts] if at_tokens else value).float().flatten())
    nothing = torch.zeros(0)
    return torch.stack(losses) if losses else nothing, torch.cat(others) if others else nothing
