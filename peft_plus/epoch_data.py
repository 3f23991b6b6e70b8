"""Data for a bare loop: an order, and a randomness of rows and collator, that a resumed run finds again."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, SequentialSampler, get_worker_info

from .errors import MethodError


class Keyed:
    """Draws each batch of an epoch from a random stream of its own, keyed by seed, process, epoch and batch.

    It neither depends on what the model drew before nor disturbs it, and is the same after a resume, also in worker
    processes.

    Args:
        seed: of the run.
        rank: of this process.
    """

    def __init__(self, *, seed: int, rank: int) -> None:
        self._key = (seed, rank)
        self._now = torch.zeros(3, dtype=torch.int64)  # epoch, first batch, how often an epoch has begun
        self._begun, self._made = 0, 0

    def begin(self, epoch: int, first: int) -> None:
        """Before an epoch is iterated, from its batch number `first` on."""
        self._now[:] = torch.tensor([epoch, first, int(self._now[2]) + 1])

    def share(self) -> None:
        """Let workers that outlive an epoch see the next one begin. Call before they are made."""
        self._now.share_memory_()

    def _next(self) -> tuple[int, int, int]:
        """Epoch, its first batch, and how many batches were made since, in this process."""
        epoch, first, begun = self._now.tolist()
        if begun != self._begun:
            self._begun, self._made = begun, 0
        self._made += 1
        return epoch, first, self._made - 1


class EpochData(Keyed, Dataset[Any]):
    """A map-style dataset that hands out collated batches, for a DataLoader whose own collate function does nothing.

    So the rows are drawn (augmentation) from the batch's stream, as well as what the collator adds (masked words).

    Args:
        dataset: with `__getitem__` and `__len__`.
        collate: a list of rows → a batch.
        seed, rank: as for `Keyed`.
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any], *, seed: int, rank: int = 0) -> None:
        super().__init__(seed=seed, rank=rank)
        self._dataset, self._collate = dataset, collate
        self._told: int | None = None  # the epoch that the dataset knows of

    def set_epoch(self, epoch: int) -> None:
        """For a dataset that wants to know it. Accelerate calls this, but not under each of its loaders."""
        self._told = epoch
        if hasattr(self._dataset, "set_epoch"):
            self._dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, attribute: str) -> Any:
        # Callbacks ask a loader's dataset for what is the user's own.
        if attribute.startswith("_"):  # not there yet while this is unpickled
            raise AttributeError(attribute)
        return getattr(self._dataset, attribute)

    def __getitem__(self, index: int) -> Any:
        return self._dataset[index]

    def __getitems__(self, indices: Sequence[int]) -> Any:
        epoch, first, made = self._next()
        if self._told != epoch:  # workers that outlive an epoch have a copy of the dataset that nobody else reaches
            self.set_epoch(epoch)
        worker = get_worker_info()  # each has its own copy of this object, and every n-th batch
        place = first + (worker.id + made * worker.num_workers if worker else made)
        with seeded(*self._key, epoch, place):
            many = getattr(self._dataset, "__getitems__", None)
            rows = many(list(indices)) if many else [self._dataset[index] for index in indices]
            return self._collate(rows)


class StreamCollate(Keyed):
    """The collate function of data without a length, which a resumed run reads from the beginning of the epoch again.

    What the data themselves draw while they are read stays what it is.

    Args:
        collate: a list of rows → a batch.
        seed, rank: as for `Keyed`.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], *, seed: int, rank: int = 0) -> None:
        super().__init__(seed=seed, rank=rank)
        self._collate = collate

    def __call__(self, rows: list[Any]) -> Any:
        epoch, _, made = self._next()
        worker = get_worker_info()
        with seeded(*self._key, epoch, made, worker.id if worker else -1):
            return self._collate(rows)


def epoch_loader(
    dataset: Any,
    *,
    batch_size: int,
    collate: Callable[[list[Any]], Any],
    order: Sampler[int] | None,
    shuffle: bool,
    seed: int,
    rank: int,
    **settings: Any,
) -> DataLoader[Any]:
    """A DataLoader whose order depends on seed and epoch alone, not yet prepared by Accelerate.

    Its `dataset` is an `EpochData`, its `sampler` has `set_epoch` where the order changes.

    Args:
        order: that a plugin wants; by default a shuffle, or the data's own.
    Raises:
        MethodError: no data, or a setting that a resumed run could not repeat.
    """
    check_settings(settings)
    if len(dataset) == 0:
        raise MethodError("The training data are empty.")
    if settings.get("drop_last") and len(dataset) < batch_size:
        raise MethodError(
            f"drop_last=True leaves no batch: there are {len(dataset)} rows, and batch_size={batch_size}."
        )
    data = EpochData(dataset, collate, seed=seed, rank=rank)
    sampler = order or (SeedableRandomSampler(data, data_seed=seed) if shuffle else SequentialSampler(data))
    # Its own generator: beginning an epoch must not draw from the stream that dropout uses.
    return DataLoader(data, batch_size, sampler=sampler, collate_fn=_as_it_is, generator=torch.Generator(), **settings)


def keyed(loader: Any, *, seed: int, rank: int) -> Keyed | None:
    """Let a DataLoader that is there already, prepared by Accelerate or not, draw its batches from keyed streams.

    Returns: what to tell of each epoch; None, and nothing changed, where it is no DataLoader of batches.
    """
    base: Any = getattr(loader, "base_dataloader", loader)
    if not isinstance(base, DataLoader) or (base.batch_size is None and base.batch_sampler is None):
        return None
    if isinstance(base.dataset, IterableDataset):
        base.collate_fn = found = StreamCollate(base.collate_fn, seed=seed, rank=rank)
    else:
        found = EpochData(base.dataset, base.collate_fn, seed=seed, rank=rank)
        object.__setattr__(base, "dataset", found)  # a DataLoader lets nobody else replace it
        base.collate_fn = _as_it_is
    if base.persistent_workers:
        found.share()
        # Otherwise they take their seed from the stream that dropout uses, once in a run, and once more after a resume.
        base.generator = torch.Generator().manual_seed(seed)
    return found


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse what would set the order or the randomness of the data behind a checkpoint's back."""
    if settings.get("persistent_workers"):
        raise MethodError("persistent_workers=True keeps random states that no checkpoint sees. Leave it out.")
    for name in ("sampler", "batch_sampler", "generator"):
        if name in settings:
            raise MethodError(f"{name}= would set an order that a resumed run could not find again. Leave it out.")


def _as_it_is(batch: Any) -> Any:
    """The collate function of a DataLoader whose dataset hands out whole batches."""
    return batch


@contextmanager
def seeded(*key: int) -> Generator[None]:
    """Inside, Python's, numpy's and torch's CPU generators depend on `key` alone; outside they are as they were."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little") >> 1
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed: that would reseed the accelerators too
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
