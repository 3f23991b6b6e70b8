"""One model's training passes, served from a store: features are looked up, or computed and stored.

What is served is never wrong: the first batch is run both ways and compared, and a store is found again only by a
fingerprint of all that it was computed from.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..distributed import gather
from ..errors import MethodError
from ..layers import Layers, transformers_model
from ..random_state import rng_state, set_rng_state
from .data import TrainingData
from .identity import identity
from .passes import Trunk, eval_mode
from .rows import Rows, UnknownRows, rows_of
from .store import FeatureStore

logger = logging.getLogger(__name__)

_CLOSE = 1e-4
"""How far outputs computed with stored features may lie from those computed without, relative to their size. On one
machine and in one dtype they are equal to the last bit; a store in bf16 is not."""


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """What a plugin asks for in `trunk_cache`.

    Attributes:
        folder: where stores lie, each in a sub-folder of its own; they are kept, and found again by later runs. None:
            beside the run's checkpoints, or in a temporary folder, until the run has finished.
        dtype: `exact` keeps features as the trunk puts them out; `bf16` rounds them, for half the space of fp32.
        limit_gb: a store that would be larger is refused, or ends there.
        fill: `first_epoch` stores what the first pass over the data computes; `before` computes it all before the
            first step, in batches sorted by length.
    """

    folder: str | None = None
    dtype: Literal["exact", "bf16"] = "exact"
    limit_gb: float = 20.0
    fill: Literal["first_epoch", "before"] = "first_epoch"


class TrunkCache:
    """Serves the training passes of one stage of one model.

    Args:
        model: as built, not wrapped.
        layers: where its parameters lie.
        options: what the plugin asked for.
        scratch: where a store goes that nobody named a folder for; None: a temporary folder.
        data: what the loop knows of it.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers,
        options: CacheOptions,
        *,
        data: TrainingData,
        scratch: Path | None = None,
    ) -> None:
        self.model, self.layers, self.options = model, layers, options
        self._inner: Any = transformers_model(model)
        check_model(self._inner)
        self._data = data
        self._temporary = options.folder is None and scratch is None
        self._kept = options.folder is not None
        self._base = Path(options.folder or scratch or tempfile.mkdtemp(prefix="peft_plus_trunk_"))
        self._native: Callable[..., Any] = self._inner.forward
        self._signature = inspect.signature(self._native)
        self._encoder_only = bool(getattr(self._inner.config, "is_encoder_decoder", False))
        self._trunk: Trunk | None = None
        self._store: FeatureStore | None = None
        self._lifted = False
        self._compared = False
        self._by_place: bool | None = None  # whether padding on the left moves positions; None: not known yet
        self._served, self._computed = 0, 0  # rows since the last look
        self._install()

    # ---- when it serves --------------------------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        """The depth up to which passes are served, 0 for none."""
        return self._trunk.depth if self._trunk is not None else 0

    def serve(self, depth: int) -> None:
        """From now on store and look up the output of block `depth`; 0 for none."""
        if depth == self.depth:
            return
        self._drop()
        if depth:
            self._trunk = Trunk(self.model, self.layers, depth)
            self._compared = False

    def _drop(self) -> None:
        if self._store is not None:
            self._store.close(remove=not self._kept)
        self._trunk, self._store = None, None

    def rest(self) -> None:
        """Once the model is in train mode: what runs in the trunk stays in eval mode."""
        if self._trunk is not None:
            self._trunk.rest()

    def epoch_ends(self, finished: int) -> None:
        """Between two passes over the data. Every process must call it.

        Args:
            finished: passes.
        """
        if self._store is None:
            return
        self._store.seal()
        gather(None)  # the others have sealed theirs
        self._store.refresh()
        served, self._served, computed, self._computed = self._served, 0, self._computed, 0
        if finished >= 2 and computed > served and self._store.full is None:
            logger.warning(
                "%d of %d examples of this epoch were never seen before, so storing their features saves nothing: the "
                "data change from epoch to epoch (augmentation, masking, packing anew). Training goes on as ever, "
                "without trunk_cache's store.",
                computed,
                served + computed,
            )
            self._drop()

    def seal(self) -> None:
        """Make what was stored safe, as when a checkpoint is written: a resumed run must find the same bits."""
        if self._store is not None:
            self._store.seal()

    def close(self, *, finished: bool) -> None:
        """Give the model back. Where nobody named a folder, the store goes too once the run has `finished`."""
        if self._store is not None:
            self._store.close(remove=not self._kept and (finished or self._temporary))
        if self._temporary:
            shutil.rmtree(self._base, ignore_errors=True)
        self._trunk, self._store = None, None
        if vars(self._inner).get("forward") is self._forward_in_place:
            if self._own_forward is None:
                del self._inner.forward
            else:
                self._inner.forward = self._own_forward

    # ---- a pass ----------------------------------------------------------------------------------------------------

    def _install(self) -> None:
        """In place of the model's `forward`, which PEFT calls past all hooks."""

        @functools.wraps(self._native)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._trunk is None or self._lifted or not torch.is_grad_enabled() or not self._inner.training:
                return self._native(*args, **kwargs)
            given = self._named(args, kwargs)
            features = self._features(self._trunk, given)
            with self._trunk.skipping(features):
                return self._native(**given)

        self._own_forward = vars(self._inner).get("forward")
        self._forward_in_place = forward
        self._inner.forward = forward

    def _named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments by name."""
        given = dict(self._signature.bind_partial(*args, **kwargs).arguments)
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        return given

    def fill(self) -> None:
        """Compute and store what the data hold, before training. Every process must call it."""
        assert self._trunk is not None
        trunk, random = self._trunk, rng_state()
        for batch in self._data.batches():
            given = self._named((), {k: v for k, v in batch.items() if k in self._signature.parameters})
            rows = self._rows(trunk, given)
            if self._store is None or any(key not in self._store for key in rows.keys):
                self._compute(trunk, rows, given)
        self.epoch_ends(0)
        set_rng_state(random)  # training draws what it would have drawn

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Passes run the trunk themselves for a while, e.g. with noise in the embeddings."""
        before, self._lifted = self._lifted, True
        try:
            yield
        finally:
            self._lifted = before

    def _features(self, trunk: Trunk, given: Mapping[str, Any]) -> Tensor:
        """The trunk's output for a batch: stored, or computed and stored now."""
        check_pass(given)
        rows = self._rows(trunk, given)
        stored = self._look_up(rows, given) if self._compared else None
        if stored is not None:
            return stored
        features = self._compute(trunk, rows, given)
        if not self._compared:
            stored = self._look_up(rows, given)
            self._compare(trunk, given, features if stored is None else stored)
            self._compared = True
        return features if stored is None else stored

    def _rows(self, trunk: Trunk, given: Mapping[str, Any]) -> Rows:
        try:
            return rows_of(given, by_place=self._moves(trunk, given), encoder_only=self._encoder_only)
        except UnknownRows as error:
            raise MethodError(f"trunk_cache cannot tell the examples of a batch apart: {error}. {_WITHOUT}") from None

    def _look_up(self, rows: Rows, given: Mapping[str, Any]) -> Tensor | None:
        assert self._store is not None
        if any(key not in self._store for key in rows.keys):
            return None
        batch = self._store.read(rows.keys, rows.spans, self._width(rows, given))
        if batch is None:
            return None
        self._served += len(rows.keys)
        return batch.to(self._device, self._dtype)

    @staticmethod
    def _width(rows: Rows, given: Mapping[str, Any]) -> int | None:
        return None if rows.spans is None else int(given["attention_mask"].shape[-1])

    def _compute(self, trunk: Trunk, rows: Rows, given: Mapping[str, Any]) -> Tensor:
        features = trunk.features(self._native, given)
        tokens = self._width(rows, given)
        if len(features) != len(rows.keys) or (tokens is not None and features.shape[1] != tokens):
            raise MethodError(
                f"trunk_cache expected block {trunk.depth} to put out ({len(rows.keys)} rows, {tokens or '…'} tokens, "
                f"…), and it put out {tuple(features.shape)}. {_WITHOUT}"
            )
        self._device, self._dtype = features.device, features.dtype
        if self._store is None:
            self._store = self._open(trunk, features, rows)
        spans = rows.spans or [(0, features.shape[1])] * len(features)
        full = self._store.full
        self._store.add(rows.keys, [row[first:end] for row, (first, end) in zip(features, spans, strict=True)])
        if self._store.full and full is None:
            logger.warning(
                "No more features are stored: %s. Those that are not are computed in each epoch, as ever.",
                self._store.full,
            )
        self._computed += len(rows.keys)
        return features.to(self._store.dtype).to(features.dtype)  # what later passes will read, also in bf16

    def _compare(self, trunk: Trunk, given: Mapping[str, Any], features: Tensor) -> None:
        """Run one batch both ways, without dropout: what they put out must agree.

        Raises:
            MethodError: they differ.
        """
        with torch.no_grad(), eval_mode(self.model):
            plain = self._native(**given)
            with trunk.skipping(features):
                skipped = self._native(**given)
        mask = given.get("attention_mask")
        real = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        bound = _CLOSE if self.options.dtype == "exact" else 2e-2
        for name, a, b in zip(("loss", "output"), _figures(plain, real), _figures(skipped, real), strict=True):
            if len(a) != len(b) or (len(a) and float((a - b).abs().max()) > bound * float(a.abs().max().clamp(min=1))):
                raise MethodError(
                    f"With the output of block {trunk.depth} put in from outside, this {type(self._inner).__name__} "
                    f"gives another {name}: its upper blocks use more of the lower ones than that (layers that share "
                    f"keys, a router's loss, a residual of their own). {_WITHOUT}"
                )

    def _moves(self, trunk: Trunk, given: Mapping[str, Any]) -> bool:
        """Whether one more padding token on the left changes what the trunk makes of the real ones."""
        mask = given.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2 or self._encoder_only or bool(mask[:, 0].all()):
            return bool(self._by_place)
        if self._by_place is None:
            row = int((mask[:, 0] == 0).nonzero()[0])
            first = int(mask[row].nonzero()[0]) if bool(mask[row].any()) else 0
            if not first:
                return False
            pair = []
            for start in (first, first - 1):
                one = {
                    name: value[row : row + 1, start:]
                    if isinstance(value, Tensor) and value.shape[:2] == mask.shape
                    else value
                    for name, value in given.items()
                    if name != "labels"
                }
                pair.append(trunk.features(self._native, one)[:, first - start :])
            size = float(pair[0].abs().max().clamp(min=1e-6))
            self._by_place = float((pair[0] - pair[1]).abs().max()) > 1e-3 * size
        return self._by_place

    # ---- a store ---------------------------------------------------------------------------------------------------

    def _open(self, trunk: Trunk, features: Tensor, rows: Rows) -> FeatureStore:
        """The store of this trunk, new or found.

        Raises:
            MethodError: it would be larger than its limit, or than what is free on the disk.
        """
        exact = self.options.dtype == "exact"
        dtype = features.dtype if exact else torch.bfloat16
        what = identity(self.model, self.layers, trunk.depth) | {"features": str(features.dtype), "stored": str(dtype)}
        name = hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=8).hexdigest()
        limit = self.options.limit_gb * 1e9
        try:
            store = FeatureStore(self._base / name, what, dtype=dtype, limit=limit)
        except OSError as error:
            raise MethodError(f"trunk_cache cannot write its store: {error}. Give another folder=.") from error
        self._check_size(store, features, rows, limit)
        return store

    def _check_size(self, store: FeatureStore, features: Tensor, rows: Rows, limit: float) -> None:
        each = features[0, 0].numel() * store.dtype.itemsize
        if self._data.tokens is not None and rows.spans is not None:
            tokens, guess = self._data.tokens, ""
        elif self._data.examples is not None:
            real = (
                sum(end - first for first, end in rows.spans) if rows.spans else features.shape[0] * features.shape[1]
            )
            tokens, guess = int(self._data.examples * real / len(features)), ", as far as the first batch tells"
        else:
            logger.info("trunk_cache stores %s per token in %s.", _bytes(each), store.folder)
            return
        wanted, free = tokens * each, shutil.disk_usage(store.folder).free + store.bytes
        logger.info(
            "trunk_cache stores the output of block %d: %d tokens × %s = %s%s, in %s%s.",
            self.depth,
            tokens,
            _bytes(each),
            _bytes(wanted),
            guess,
            store.folder,
            f" ({len(store)} examples are there already)" if len(store) else "",
        )
        if wanted > limit:
            raise MethodError(
                f"trunk_cache would store {_bytes(wanted)}{guess}, more than limit_gb={self.options.limit_gb:g}. "
                + ("Raise it." if self.options.dtype == "bf16" else "Raise it, or take dtype='bf16', half of fp32.")
            )
        if wanted > free:
            raise MethodError(
                f"trunk_cache would store {_bytes(wanted)}{guess} in {store.folder}, where {_bytes(free)} are free. "
                "Give folder= on a larger disk."
            )


_WITHOUT = "Train without trunk_cache: everything else stays the same."


def check_model(inner: Any) -> None:
    """Refuse a model whose passes need more of the trunk than its last output.

    Raises:
        MethodError: it returns the hidden states or attentions of all blocks.
    """
    for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
        if getattr(getattr(inner, "config", None), name, False):
            raise MethodError(
                f"trunk_cache skips the lower blocks, and config.{name}=True asks for what they put out. Set it to "
                f"False, or train without trunk_cache."
            )


def check_pass(given: Mapping[str, Any]) -> None:
    """Refuse a pass that asks for what lies inside the trunk, or brings a cache of keys for it (prefix tuning)."""
    for name in ("output_hidden_states", "output_attentions", "output_router_logits", "past_key_values"):
        if given.get(name):
            raise MethodError(f"trunk_cache skips the lower blocks, and this pass sets {name!r}, which needs them.")


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


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"
