"""Whether a model can be served at all: what its config says, what a pass asks for, and the first batch, both ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MethodError
from .passes import Trunk, eval_mode
from .rows import Rows, is_by_token

WITHOUT = "Train without trunk_cache: everything else stays the same."

_SAME = 1e-4
"""How far a pass that is given the trunk's output may lie from one that computes it, relative to what they put out. On
one machine they are equal to the last bit."""
_CLOSE = 0.05
"""How far two computations of the same features may lie apart, relative to their size: the shape of a batch changes how
they are rounded, in half precision by a hundredth."""
_MOVED = {torch.float64: 1e-6, torch.float32: 1e-3}
_MOVED_IN_HALF_PRECISION = 0.01


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
    with torch.no_grad(), eval_mode(model):
        plain = forward(**few)
        try:
            with trunk.skipping(features):
                skipped = forward(**few)
        except Exception as error:
            raise _differs(trunk, f"fails ({type(error).__name__}: {error})") from error
    torch.clear_autocast_cache()  # weights that were cast without a gradient would train on nothing in this pass
    mask = few.get("attention_mask")
    real = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    for name, a, b in zip(("loss", "output"), _figures(plain, real), _figures(skipped, real), strict=True):
        if len(a) != len(b) or (len(a) and float((a - b).abs().max()) > _SAME * float(a.abs().max().clamp(min=1))):
            raise _differs(trunk, f"gives another {name}")


def _differs(trunk: Trunk, why: str) -> MethodError:
    return MethodError(
        f"With the output of block {trunk.depth} put in from outside, this {type(trunk.inner).__name__} {why}: its "
        "upper blocks use more of the lower ones than that (layers that share keys, a router's loss, a residual of "
        f"their own). {WITHOUT}"
    )


def check_alone(
    forward: Callable[..., Any], trunk: Trunk, given: Mapping[str, Any], rows: Rows, features: Tensor
) -> None:
    """A row must have the same features without its batch mates, and without the padding that they brought.

    Raises:
        MethodError: it has not, so that its features could not be found again in another batch.
    """
    spans = rows.spans or [(0, features.shape[1])] * len(features)
    row = min(range(len(spans)), key=lambda place: spans[place][1] - spans[place][0])
    first, end = spans[row]
    mask = given.get("attention_mask")
    if len(features) == 1 and end == features.shape[1]:
        return
    if isinstance(mask, Tensor) and mask.dim() > 2:  # several texts of an example
        return
    alone = trunk.features(forward, part(given, slice(row, row + 1), slice(0, end)))
    if alone.shape[0] == 1 and alone.shape[1] == end and not far(alone[:, first:], features[row : row + 1, first:end]):
        return
    raise MethodError(
        f"Block {trunk.depth} makes something else of an example when it stands in another batch, or is padded "
        f"further, so trunk_cache cannot store what it makes of it. {WITHOUT}"
    )


def far(one: Tensor, other: Tensor) -> bool:
    """Whether the features of any token differ by more than rounding. Equal shapes, (rows, tokens, …)."""
    one, other = (x.float().flatten(2) if x.dim() > 2 else x.float() for x in (one, other))
    size = other.norm(dim=-1)
    return bool(((one - other).norm(dim=-1) > _CLOSE * size.clamp(min=1e-3 * float(size.max()))).any())


def moves(forward: Callable[..., Any], trunk: Trunk, given: Mapping[str, Any], mask: Tensor) -> bool | None:
    """Whether one more padding token on the left changes what the trunk makes of the real ones.

    It does where positions are counted from the left edge (GPT-2, BERT), not where they are relative or counted by the
    mask.

    Args:
        mask: of the batch.
    Returns: None if no row of this batch can tell.
    """
    if mask.dim() != 2:
        return True  # several texts of an example: not worth a trial
    padded = [row for row in range(len(mask)) if bool(mask[row].any()) and not bool(mask[row, 0])]
    if not padded:
        return None
    row, first = padded[0], int(mask[padded[0]].nonzero()[0])
    pair = []
    for start in (first, first - 1):
        features = trunk.features(forward, part(given, slice(row, row + 1), slice(start, None)))
        pair.append(features[:, first - start :].float())
    apart = (pair[0] - pair[1]).abs() / pair[0].abs().clamp(min=1e-6)
    half = trunk.autocast != "off" or trunk.dtype not in _MOVED
    return float(apart.median()) > (_MOVED_IN_HALF_PRECISION if half else _MOVED[trunk.dtype])


def part(given: Mapping[str, Any], rows: slice, tokens: slice = slice(None)) -> dict[str, Any]:
    """A batch of some rows of another, and of these only some tokens."""
    count = max((len(value) for value in given.values() if isinstance(value, Tensor) and value.dim()), default=0)
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


def _figures(output: Any, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """A pass's losses, and all else that it put out at real tokens, as two vectors in fp32."""
    losses: list[Tensor] = []
    others: list[Tensor] = []
    items = output.items() if isinstance(output, Mapping) else enumerate(output)
    for _, value in items:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if value.dim() == 0:
            losses.append(value.float())
            continue
        at_tokens = real is not None and value.shape[:2] == real.shape
        others.append((value[real] if at_tokens else value).float().flatten())
    nothing = torch.zeros(0)
    return torch.stack(losses) if losses else nothing, torch.cat(others) if others else nothing
