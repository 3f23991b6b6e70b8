"""One model's training passes, served from a store: features are looked up, or computed and stored.

What is served is never wrong: the first batch is run both ways and compared, and a store is found again only by a
fingerprint of all that it was computed from. What a pass gets is always what the store holds, also when it was computed
for this very pass, so that a resumed run, whose store may hold more, gets the same.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..distributed import gather
from ..errors import MethodError
from ..layers import Layers, transformers_model
from ..random_state import rng_state, set_rng_state
from .data import TrainingData
from .identity import identity
from .passes import Trunk
from .rows import Rows, UnknownRows, row_count, rows_of
from .space import check_space
from .store import FeatureStore, rank
from .trial import WITHOUT, check_mates, check_model, check_pass, compare, far, moves, padding_matters

logger = logging.getLogger(__name__)


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
        scratch: where a store goes that nobody named a folder for, of its own; None: a temporary folder.
        data: what the loop knows of it.
    Raises:
        MethodError: the model cannot be served, or the folder cannot be written.
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
        self._base = _writable(Path(options.folder)) if options.folder else scratch or _temporary()
        self._native: Callable[..., Any] = self._inner.forward
        self._signature = inspect.signature(self._native)
        self._encoder_only = bool(getattr(self._inner.config, "is_encoder_decoder", False))
        self._trunk: Trunk | None = None
        self._store: FeatureStore | None = None
        self._what: dict[str, Any] = {}  # what the store is of
        self._weights: list[Tensor] = []  # of the trunk
        self._versions: list[tuple[int, int]] = []
        self._left: dict[Path, int] = {}  # stores of other blocks → checkpoints begun since
        self._lifted = self._filling = self._gave_up = False
        self._compared = self._tried = False  # a pass with the trunk's output put in; a row alone, and as it was found
        self._by_place: bool | None = None  # whether padding on the left moves positions; None: not known yet
        self._matters: dict[bool, bool] = {}  # left or right → whether what the trunk makes of padding counts
        self._passes = 0  # whole ones over the data
        self._served, self._computed = 0, 0  # rows since the last look
        self._install()

    # ---- when it serves --------------------------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        """The depth up to which passes are served, 0 for none."""
        return self._trunk.depth if self._trunk is not None else 0

    def serve(self, depth: int, *, whole: bool = True) -> None:
        """From now on store and look up the output of block `depth`; 0 for none.

        Args:
            whole: whether a pass over the data begins now.
        """
        if depth == self.depth:
            return
        self._drop()
        self._trunk = Trunk(self.model, self.layers, depth) if depth else None
        self._weights = [t for n, t in self.model.named_parameters() if self.layers.depth.get(n, depth + 1) <= depth]
        self._compared = self._tried = False
        self._passes = 0 if whole else -1

    def _drop(self) -> None:
        """Let go of the store. One beside checkpoints stays until no run is likely to go on from one that needs it."""
        store, self._store = self._store, None
        if store is not None:
            store.close(remove=self._temporary)
            if not self._kept and not self._temporary:
                self._left[store.folder] = 0

    def state_dict(self) -> dict[str, Any]:
        """What was found out about padding: a resumed run must name rows as the interrupted one did."""
        return {"by_place": self._by_place, "left": self._matters.get(True), "right": self._matters.get(False)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._by_place = state["by_place"]
        self._matters = {side == "left": state[side] for side in ("left", "right") if state[side] is not None}

    def rest(self) -> None:
        """Once the model is in train mode: what runs in the trunk stays in eval mode."""
        if self._trunk is not None:
            self._trunk.rest()

    def step_begins(self) -> None:
        """Look whether somebody changed the trunk's weights, as when earlier ones are put back."""
        if self._trunk is None or self._store is None or self._state_of_weights() == self._versions:
            return
        self._versions = self._state_of_weights()
        if self._identity(self._trunk) != self._what:
            logger.warning("The frozen blocks 1 to %d were changed, so their output is stored anew.", self.depth)
            depth, self._trunk = self.depth, None
            self.serve(depth, whole=False)

    def _state_of_weights(self) -> list[tuple[int, int]]:
        return [(tensor.data_ptr(), tensor._version) for tensor in self._weights]

    def epoch_ends(self) -> None:
        """Between two passes over the data. Every process must call it."""
        if self._trunk is None or self._gave_up:
            return
        self._share()
        told = gather((self._served, self._computed, self._store is not None and self._store.full is not None))
        self._served, self._computed = 0, 0
        self._passes += 1
        served, computed = sum(row[0] for row in told), sum(row[1] for row in told)
        if self._passes >= 2 and computed > served and not any(row[2] for row in told):
            logger.warning(
                "%d of %d examples of this epoch were never seen before, so storing their features saves nothing: the "
                "data change from epoch to epoch (augmentation, masking, packing anew). Training goes on as ever, "
                "without trunk_cache's store.",
                computed,
                served + computed,
            )
            self._gave_up = True
            self._drop()

    def _share(self) -> None:
        """Let the processes find what the others have stored."""
        if self._store is not None:
            self._store.seal()
        gather(None)  # the others have sealed theirs
        if self._store is not None:
            self._store.refresh()

    def seal(self) -> None:
        """Make what was stored safe, when a checkpoint begins: a resumed run must find the same bits.

        Every process must call it: each has stored what it has seen.
        """
        if self._store is not None:
            self._store.seal()
        for folder, checkpoints in list(self._left.items()):
            if checkpoints:  # one was finished since, and does not need it
                shutil.rmtree(folder, ignore_errors=True)
                del self._left[folder]
            else:
                self._left[folder] = 1

    def move(self, folder: Path) -> None:
        """Keep a temporary store beside checkpoints from now on. Every process must call it, once it has sealed.

        Args:
            folder: of its own.
        """
        if not self._temporary:
            return
        gather(None)  # all have sealed
        problem = None
        if rank() == 0 and self._base.is_dir():
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(folder, ignore_errors=True)
                shutil.move(self._base, folder)
            except OSError as error:
                problem = str(error)
        problem = gather(problem)[0]
        if problem is not None:
            logger.warning("What trunk_cache stored could not be kept beside the checkpoints: %s.", problem)
            return
        self._base, self._temporary = folder, False
        if self._store is not None:
            self._store.folder = folder / self._store.folder.name

    def close(self, *, finished: bool) -> None:
        """Give the model back. Where nobody named a folder, the store goes too once the run has `finished`."""
        if self._store is not None:
            self._store.close()
        if not self._kept and (finished or self._temporary):
            shutil.rmtree(self._base, ignore_errors=True)
        elif not self._kept and self._base.is_dir():
            with suppress(OSError):
                self._base.rmdir()  # nothing was stored
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
        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if module is not self._inner:  # a copy of the model, which took this along
                return type(module).forward(module, *args, **kwargs)
            trunk = self._trunk
            training = torch.is_grad_enabled() and self._inner.training
            if trunk is None or self._lifted or self._gave_up or not (training or self._filling):
                return self._native(*args, **kwargs)
            given = self._named(args, kwargs)
            check_pass(given)
            if not self._compared:
                compare(self.model, self._native, trunk, given)
                self._compared = True
            if self._filling:
                return self._fill_with(trunk, given)
            features = self._features(trunk, given)
            trunk.rest()  # which modules these are is known only now, after the first time
            with trunk.skipping(features):
                return self._native(**given)

        module = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        signature = self._signature.replace(parameters=[module, *self._signature.parameters.values()])
        forward.__signature__ = signature  # type: ignore[attr-defined]
        self._own_forward = vars(self._inner).get("forward")
        self._forward_in_place = MethodType(forward, self._inner)
        self._inner.forward = self._forward_in_place

    def _named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments by name."""
        given = dict(self._signature.bind_partial(*args, **kwargs).arguments)
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        return given

    def fill(self, *, batch_size: int) -> None:
        """Compute and store what the data hold, before training. Every process must call it.

        Args:
            batch_size: of training. Only with 1 does a collator that packs a batch into one row make the same row twice.
        Raises:
            MethodError: the data are read as a stream, or packed anew in each epoch.
        """
        random, self._filling = rng_state(), True
        try:
            with torch.no_grad():
                for batch in self._batches(batch_size):
                    # Through all that wraps the model, e.g. in autocast, and adds arguments.
                    self.model.forward(**{k: v for k, v in batch.items() if k in self._signature.parameters})
        finally:
            self._filling = False
        self._share()
        set_rng_state(random)  # training draws what it would have drawn

    def _batches(self, batch_size: int) -> Iterable[Mapping[str, Any]]:
        batches = iter(self._data.batches())
        first = next(batches, None)
        if first is None:
            return ()
        if row_count(first) != 1 or self._data.examples == 1:
            return chain([first], batches)
        if batch_size != 1:
            raise MethodError(
                "trunk_cache(fill='before') cannot know which examples will be packed into one row. Use "
                "fill='first_epoch', or per_device_train_batch_size=1 with data that are packed beforehand."
            )
        return self._data.batches(1)

    def _fill_with(self, trunk: Trunk, given: Mapping[str, Any]) -> None:
        rows = self._rows(trunk, given)
        if self._store is None or any(key not in self._store for key in rows.keys):
            self._compute(trunk, rows, given)

    @contextmanager
    def lifted(self) -> Generator[None]:
        """Passes run the trunk themselves for a while, e.g. with noise in the embeddings."""
        before, self._lifted = self._lifted, True
        try:
            yield
        finally:
            self._lifted = before

    def _features(self, trunk: Trunk, given: Mapping[str, Any]) -> Tensor:
        """The trunk's output for a batch, as it is stored; computed and stored now where it is not."""
        rows = self._rows(trunk, given)
        if self._tried:
            stored = self._read(rows, given)
            if stored is not None:
                self._served += len(rows.keys)
                return stored
        features = self._compute(trunk, rows, given)
        stored = self._read(rows, given, _real_tokens(rows, features))
        assert stored is not None
        if not self._tried:
            check_mates(self._native, trunk, given, features)
            self._check_stored(rows, features, stored)
            self._tried = True
        return stored

    def _rows(self, trunk: Trunk, given: Mapping[str, Any]) -> Rows:
        mask = given.get("attention_mask")
        if isinstance(mask, Tensor) and 2 <= mask.dim() <= 3:
            self._look_at_padding(trunk, given, mask)
        whole = any(self._matters.values())
        try:
            return rows_of(given, by_place=bool(self._by_place), whole=whole, encoder_only=self._encoder_only)
        except UnknownRows as error:
            raise MethodError(f"trunk_cache cannot tell the examples of a batch apart: {error}. {WITHOUT}") from None

    def _look_at_padding(self, trunk: Trunk, given: Mapping[str, Any], mask: Tensor) -> None:
        """Find out what padding does to a row, once there is some."""
        for left in (True, False):
            if left not in self._matters and not bool(mask[..., 0 if left else -1].all()):
                self._matters[left] = padding_matters(self.model, self._native, trunk, given, mask, left=left)
                if self._matters[left]:
                    logger.info(
                        "Padding on the %s counts in this model, so an example that is padded further is stored anew.",
                        "left" if left else "right",
                    )
        if self._by_place is None and mask.dim() == 2 and bool(((mask[:, 0] == 0) & mask.bool().any(1)).any()):
            self._by_place = moves(self._native, trunk, given, mask)

    def _read(self, rows: Rows, given: Mapping[str, Any], otherwise: Sequence[Tensor] | None = None) -> Tensor | None:
        assert self._store is not None
        width = None if rows.spans is None else int(given["attention_mask"].shape[-1])
        batch = self._store.read(rows.keys, rows.spans, width, otherwise)
        return None if batch is None else batch.to(self._device, self._dtype)

    def _compute(self, trunk: Trunk, rows: Rows, given: Mapping[str, Any]) -> Tensor:
        features = trunk.features(self._native, given)
        tokens = None if rows.spans is None else int(given["attention_mask"].shape[-1])
        if len(features) != len(rows.keys) or (tokens is not None and features.shape[1] != tokens):
            raise MethodError(
                f"trunk_cache expected block {trunk.depth} to put out ({len(rows.keys)} rows, {tokens or '…'} tokens, "
                f"…), and it put out {tuple(features.shape)}. {WITHOUT}"
            )
        self._device, self._dtype = features.device, features.dtype
        if self._store is None:
            self._store = self._open(trunk, features, rows)
        full = self._store.full
        self._store.add(rows.keys, _real_tokens(rows, features))
        if self._store.full and full is None:
            logger.warning(
                "No more features are stored: %s. Those that are not are computed in each epoch, as ever.",
                self._store.full,
            )
        self._computed += len(rows.keys)
        return features

    # ---- a store ---------------------------------------------------------------------------------------------------

    def _identity(self, trunk: Trunk) -> dict[str, Any]:
        dtype = trunk.dtype if self.options.dtype == "exact" else torch.bfloat16
        what = identity(self.model, self.layers, trunk.depth, autocast=trunk.autocast)
        return what | {"features": str(trunk.dtype), "stored": str(dtype)}

    def _open(self, trunk: Trunk, features: Tensor, rows: Rows) -> FeatureStore:
        """The store of this trunk, new or found.

        Raises:
            MethodError: it would be larger than its limit, or than what is free on the disk.
        """
        self._what, self._versions = self._identity(trunk), self._state_of_weights()
        name = hashlib.blake2b(json.dumps(self._what, sort_keys=True).encode(), digest_size=8).hexdigest()
        dtype = features.dtype if self.options.dtype == "exact" else torch.bfloat16
        self._left.pop(self._base / name, None)
        try:
            store = FeatureStore(self._base / name, self._what, dtype=dtype, limit=self.options.limit_gb * 1e9)
        except OSError as error:
            raise _cannot_write(error) from error
        try:
            check_space(store, self._data, rows, features, block=trunk.depth)
        except MethodError:
            store.close(remove=not len(store))
            raise
        return store

    def _check_stored(self, rows: Rows, features: Tensor, stored: Tensor) -> None:
        """What was found must be what is computed.

        Raises:
            MethodError: it is not.
        """
        assert self._store is not None
        for row, (first, end) in enumerate(rows.spans or [(0, features.shape[1])] * len(features)):
            if far(stored[row : row + 1, first:end], features[row : row + 1, first:end]):
                raise MethodError(
                    f"The features in {self._store.folder} are not those that this model computes. Delete that folder: "
                    "they are computed again."
                )


def _real_tokens(rows: Rows, features: Tensor) -> list[Tensor]:
    """The features of each row, without its padding."""
    spans = rows.spans or [(0, features.shape[1])] * len(features)
    return [row[first:end] for row, (first, end) in zip(features, spans, strict=True)]


def _temporary() -> Path:
    """A temporary folder, the same for all processes."""
    mine = tempfile.mkdtemp(prefix="peft_plus_trunk_")
    first = gather(mine)[0]
    if first != mine:
        os.rmdir(mine)
    return Path(first)


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise _cannot_write(error) from error


def _cannot_write(error: OSError) -> MethodError:
    return MethodError(f"trunk_cache cannot write its store: {error}. Give another folder=.")
