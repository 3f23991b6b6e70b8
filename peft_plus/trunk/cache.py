"""One model's training passes, served from a store: features are looked up, or computed and stored.

What is served is never wrong: the first batch is run both ways and compared, and a store is found again only by a
fingerprint of all that it was computed from. What a pass gets is always what the store holds, also when it was computed
for this very pass, so that a resumed run, whose store may hold more, gets the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import gather
from ..errors import MethodError
from ..layers import Layers, transformers_model
from ..random_state import rng_state, set_rng_state
from .data import TrainingData
from .folder import Folder, cannot_write
from .identity import identity, settings_of
from .in_place import InPlace
from .options import CacheOptions
from .padding import Padding
from .passes import Trunk
from .rows import Rows, UnknownRows, row_count, rows_of
from .space import check_space
from .store import FeatureStore
from .trial import WITHOUT, check_mates, check_model, check_pass, check_stored, compare

logger = logging.getLogger(__name__)


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
        self.folder = Folder(options.folder, scratch)
        self.padding = Padding()
        self._encoder_only = bool(getattr(self._inner.config, "is_encoder_decoder", False))
        self._trunk: Trunk | None = None
        self._store: FeatureStore | None = None
        self._settings = settings_of(model)
        self._what: dict[str, Any] = {}  # what the store is of
        self._weights: list[Tensor] = []  # of the trunk
        self._versions: list[tuple[int, int]] = []
        self._lifted = self._filling = self._gave_up = False
        self._compared = self._tried = False  # a pass with the trunk's output put in; a row alone, and as it was found
        self._passes = 0  # whole ones over the data
        self._served, self._computed = 0, 0  # rows since the last look
        self._place = InPlace(self._inner, self._pass)
        self._native = self._place.native

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
        """Let go of the store."""
        store, self._store = self._store, None
        if store is not None:
            store.close()
            self.folder.leaves(store.folder.name)

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
        self.folder.checkpoint_begins()

    def move(self, place: Path) -> None:
        """Keep a temporary store beside checkpoints from now on. Every process must call it, once it has sealed.

        Args:
            place: a folder of its own.
        """
        if self.folder.move(place) and self._store is not None:
            self._store.folder = place / self._store.folder.name

    def close(self, *, finished: bool) -> None:
        """Give the model back. Where nobody named a folder, the store goes too once the run has `finished`."""
        if self._store is not None:
            self._store.close()
        self.folder.close(finished=finished)
        self._trunk, self._store = None, None
        self._place.remove()

    # ---- a pass ----------------------------------------------------------------------------------------------------

    def _pass(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """A pass of the model."""
        trunk = self._trunk
        training = torch.is_grad_enabled() and self._inner.training
        if trunk is None or self._lifted or self._gave_up or not (training or self._filling):
            return self._native(*args, **kwargs)
        given = self._place.named(args, kwargs)
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

    def fill(self, *, batch_size: int) -> None:
        """Compute and store what the data hold, before training. Every process must call it.

        Args:
            batch_size: of training. A collator that packs a batch into one row makes the same row twice only with 1.
        Raises:
            MethodError: the data are read as a stream, or packed anew in each epoch.
        """
        random, self._filling = rng_state(), True
        try:
            with torch.no_grad():
                for batch in self._batches(batch_size):
                    # Through all that wraps the model, e.g. in autocast, and adds arguments.
                    self.model.forward(**{name: value for name, value in batch.items() if self._place.takes(name)})
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
        stored = self._read(rows, given, rows.real_tokens(features))
        assert stored is not None
        if not self._tried:
            check_mates(self._native, trunk, given, features)
            assert self._store is not None
            check_stored(features, stored, rows, self._store.folder)
            self._tried = True
        return stored

    def _rows(self, trunk: Trunk, given: Mapping[str, Any]) -> Rows:
        mask = given.get("attention_mask")
        if isinstance(mask, Tensor) and 2 <= mask.dim() <= 3:
            self.padding.look(self.model, self._native, trunk, given, mask)
        by_place, whole = bool(self.padding.by_place), self.padding.whole
        try:
            return rows_of(given, by_place=by_place, whole=whole, encoder_only=self._encoder_only)
        except UnknownRows as error:
            raise MethodError(f"trunk_cache cannot tell the examples of a batch apart: {error}. {WITHOUT}") from None

    def _read(self, rows: Rows, given: Mapping[str, Any], otherwise: Sequence[Tensor] | None = None) -> Tensor | None:
        assert self._store is not None
        batch = self._store.read(rows.keys, rows.spans, _width(rows, given), otherwise)
        return None if batch is None else batch.to(self._device, self._dtype)

    def _compute(self, trunk: Trunk, rows: Rows, given: Mapping[str, Any]) -> Tensor:
        features = trunk.features(self._native, given)
        tokens = _width(rows, given)
        if len(features) != len(rows.keys) or (tokens is not None and features.shape[1] != tokens):
            raise MethodError(
                f"trunk_cache expected block {trunk.depth} to put out ({len(rows.keys)} rows, {tokens or '…'} tokens, "
                f"…), and it put out {tuple(features.shape)}. {WITHOUT}"
            )
        self._device, self._dtype = features.device, features.dtype
        if self._store is None:
            self._store = self._open(trunk, features, rows)
        full = self._store.full
        self._store.add(rows.keys, rows.real_tokens(features))
        if self._store.full and full is None:
            logger.warning(
                "No more features are stored: %s. Those that are not are computed in each epoch, as ever.",
                self._store.full,
            )
        self._computed += len(rows.keys)
        return features

    # ---- a store ---------------------------------------------------------------------------------------------------

    def _stored_dtype(self, trunk: Trunk) -> torch.dtype:
        return trunk.dtype if self.options.dtype == "exact" else torch.bfloat16

    def _identity(self, trunk: Trunk) -> dict[str, Any]:
        what = identity(self.model, self.layers, trunk.depth, settings=self._settings, autocast=trunk.autocast)
        return what | {"features": str(trunk.dtype), "stored": str(self._stored_dtype(trunk))}

    def _open(self, trunk: Trunk, features: Tensor, rows: Rows) -> FeatureStore:
        """The store of this trunk, new or found.

        Raises:
            MethodError: it would be larger than its limit, or than what is free on the disk.
        """
        self._what, self._versions = self._identity(trunk), self._state_of_weights()
        name = hashlib.blake2b(json.dumps(self._what, sort_keys=True).encode(), digest_size=8).hexdigest()
        folder, limit = self.folder.opens(name), self.options.limit_gb * 1e9
        try:
            store = FeatureStore(folder, self._what, dtype=self._stored_dtype(trunk), limit=limit)
        except OSError as error:
            raise cannot_write(error) from error
        try:
            check_space(store, self._data, rows, features, block=trunk.depth)
        except MethodError:
            store.close(remove=not len(store))
            raise
        return store


def _width(rows: Rows, given: Mapping[str, Any]) -> int | None:
    """Tokens of a batch, with its padding; None where it has no mask."""
    return None if rows.spans is None else int(given["attention_mask"].shape[-1])
