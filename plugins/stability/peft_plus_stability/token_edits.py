"""Small random edits of a row of tokens: exchange, drop, insert, replace.

An edit is a pair: which of the old tokens stands at each place of the new row, and the new token ids. So whatever else
a row holds for each token can follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Edit = tuple[Ints, Ints]
Neighbour = Callable[[int, Generator], int | None]
"""A token id → another that may stand for it, or None where none may."""


def runs_of(ids: Ints, *, ordinary: NDArray[np.bool_], segments: Ints | None) -> list[Ints]:
    """The places of ordinary tokens, in runs that no other token and no change of segment interrupts.

    Args:
        ids: shape (tokens,).
        ordinary: True where a token may be edited, shape (tokens,).
        segments: the text to which each token belongs, shape (tokens,); None where that is not told.
    """
    places = np.flatnonzero(ordinary)
    if not len(places):
        return []
    breaks = np.diff(places) > 1
    if segments is not None:
        breaks |= np.diff(segments[places]) != 0
    return np.split(places, np.flatnonzero(breaks) + 1)


def amount(tokens: int, alpha: float) -> int:
    """How many edits a row gets: max(1, ⌊alpha · tokens⌋), as the authors' code has it."""
    return max(1, int(alpha * tokens))


def swap(ids: Ints, runs: Sequence[Ints], count: int, random: Generator) -> Edit:
    """Exchange two tokens of one run, `count` times; runs of a single token stay."""
    order, new = np.arange(len(ids)), ids.copy()
    long = [run for run in runs if len(run) > 1]
    if long:
        sizes = np.array([len(run) for run in long])
        for pick in random.choice(len(long), count, p=sizes / sizes.sum()):
            one, other = random.choice(long[pick], 2, replace=False)
            new[[one, other]] = new[[other, one]]
    return order, new


def delete(ids: Ints, runs: Sequence[Ints], alpha: float, random: Generator) -> Edit:
    """Drop each ordinary token with probability `alpha`; of a run at least one stays."""
    keep = np.ones(len(ids), bool)
    for run in runs:
        gone = random.random(len(run)) < alpha
        if gone.all():
            gone[random.integers(len(run))] = False
        keep[run[gone]] = False
    order = np.flatnonzero(keep)
    return order, ids[order]


def replace(ids: Ints, runs: Sequence[Ints], count: int, random: Generator, neighbour: Neighbour) -> Edit:
    """Put a neighbour into the place of `count` tokens; one without a neighbour is passed over for another."""
    new, left = ids.copy(), count
    for place in random.permutation(np.concatenate(runs)):
        other = neighbour(int(ids[place]), random)
        if other is not None:
            new[place], left = other, left - 1
        if not left:
            break
    return np.arange(len(ids)), new


def insert(ids: Ints, runs: Sequence[Ints], count: int, random: Generator, neighbour: Neighbour) -> Edit:
    """Put a neighbour of a random token in front of a random token of the same run, `count` times.

    Of `count` tokens those that have no neighbour bring nothing.
    """
    run_of = {int(place): run for run in runs for place in run}
    places: list[int] = []
    tokens: list[int] = []
    for source in random.choice(np.concatenate(runs), count):
        other = neighbour(int(ids[source]), random)
        if other is not None:
            places.append(int(random.choice(run_of[int(source)])))
            tokens.append(other)
    order = np.insert(np.arange(len(ids)), places, places)
    return order, np.insert(ids, places, tokens)
