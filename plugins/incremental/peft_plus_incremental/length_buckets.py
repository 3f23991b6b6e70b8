"""Batches of examples of equal length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor
from torch.utils.data import Sampler

from peft_plus import Plugin, Run
from peft_plus.lengths import lengths_of


@dataclass(kw_only=True)
class LengthBuckets(Plugin):
    """Put examples of equal length into one batch, and the batches into random order: less padding, so less time.

    Every example comes once in each epoch. All of them are sorted by length, ties at random, cut into batches, and the
    batches are shuffled, anew in each epoch (Morishita et al. 2017, arXiv:1706.05765; Khomenko et al. 2016,
    arXiv:1708.05604). The batch with the longest example comes first, so that a lack of memory shows at once.

    Args:
        bucket_tokens: lengths that round up to the same multiple of it count as equal, in tokens, ≥ 1. More is more
            randomness and more padding; with a collator that pads to a multiple, that multiple costs nothing.
    Raises:
        ValueError: `bucket_tokens` is below 1.
        MethodError: the data have neither a column `length` nor `input_ids`.
    """

    name: ClassVar[str] = "length_buckets"
    source: ClassVar[str] = "Morishita et al. 2017, arXiv:1706.05765"

    bucket_tokens: int = 1

    def __post_init__(self) -> None:
        if self.bucket_tokens < 1:
            raise ValueError(f"bucket_tokens={self.bucket_tokens}: give a number of tokens ≥ 1.")

    def sampler(self, run: Run, dataset: Any) -> Sampler[int]:
        buckets = -(-torch.from_numpy(lengths_of(dataset, "length_buckets")) // self.bucket_tokens)
        return LengthOrder(buckets, run)


class LengthOrder(Sampler[int]):
    """An epoch's indices: what depends on the epoch alone, and so is found again by a resumed run.

    Args:
        lengths: of all examples, shape (examples,).
        run: where the stage begins.
    """

    def __init__(self, lengths: Tensor, run: Run) -> None:
        self._lengths, self._run = lengths, run
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Before an epoch: which one."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        run = self._run
        indices = by_length(
            self._lengths,
            batch_size=run.batch_size,
            processes=run.processes,
            generator=run.generator("length_buckets", self._epoch),
        )
        return iter(indices.tolist())


def by_length(lengths: Tensor, *, batch_size: int, processes: int, generator: Generator) -> Tensor:
    """An order of all examples in which any `batch_size` in a row, counted from the start, are about equally long.

    Batches that the processes work on at the same time, `processes` in a row, are about equally long too, so that no
    process waits for another; which of them gets which is random. The longest come first. What does not fill a batch
    for every process comes last: neighbours in length from a random place below the longest, so that no example is
    always in a short batch, or always left out by drop_last.

    Args:
        lengths: integers, shape (examples,).
        batch_size: rows of one batch.
        processes: how many take a batch at a time.
        generator: of everything random here.
    Returns: indices, a permutation, shape (examples,).
    """
    shuffled = torch.randperm(len(lengths), generator=generator)
    ascending = shuffled[lengths[shuffled].argsort(stable=True)]
    together = batch_size * processes
    turns, surplus = divmod(len(lengths), together)
    if turns == 0:
        return ascending
    first = int(torch.randint(len(lengths) - surplus - together + 1, (), generator=generator))
    last = ascending[first : first + surplus]
    full = torch.cat([ascending[:first], ascending[first + surplus :]]).view(turns, processes, batch_size)
    full = full[torch.cat([torch.tensor([turns - 1]), torch.randperm(turns - 1, generator=generator)])]
    places = torch.rand(turns, processes, generator=generator).argsort(1)
    full = full[torch.arange(turns)[:, None], places]
    return torch.cat([full.flatten(), last])
