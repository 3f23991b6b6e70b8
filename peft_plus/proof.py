"""Proof of engagement: what a run declared, compared with which tensors really moved."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .distributed import gather
from .divergence import finite
from .errors import EngagementError
from .timeline import Group, label

logger = logging.getLogger(__name__)

CHUNK = 1 << 21
"""Elements hashed at a time: bounds the extra memory to a few tens of megabytes, whatever the tensor."""

MAX_RESTS = 8
"""How often a tensor that trained is watched while it is frozen again: bounds the cost of schedules that flip often."""


@dataclass(frozen=True)
class Row:
    """What one group declared and did.

    Attributes:
        group: (depth, part).
        steps: updates with a rate above zero in which it was declared trainable, of those that this process ran.
        tensors: how many tensors it has, and how many `moved`.
        reached: whether any of them ever held a gradient.
    """

    group: Group
    steps: int
    tensors: int
    moved: int
    reached: bool = True


class Engagement:
    """Watches one stage of one model.

    Args:
        tensors: every parameter of the model, frozen ones too, by name.
        group_of: name → group, for the parameters that may train; None for the rest.
    """

    def __init__(self, tensors: Mapping[str, nn.Parameter], group_of: Callable[[str], Group | None]) -> None:
        self._tensors, self._group_of = tensors, group_of
        self._before = {name: checksum(tensor) for name, tensor in tensors.items()}
        self._broken = self._not_finite()
        self._resting: dict[str, tuple[int, int]] = {}  # what trained, and is frozen again: its checksum since then
        self._rests: dict[str, int] = {}
        self._steps: dict[str, int] = {}
        self._strays: set[str] = set()
        self._moved: set[str] = set()  # before weights were last put back
        self._reached: set[str] = set()
        self._last: set[str] = set()  # what trained in the update before

    def count(self, names: Iterable[str]) -> None:
        """Note one update, before it happens, in which exactly these parameters train, with a rate above zero."""
        training = set(names)
        for name in self._last - training:
            self._rests[name] = self._rests.get(name, 0) + 1
            if self._rests[name] <= MAX_RESTS:
                self._resting[name] = checksum(self._tensors[name])
        for name in training:
            frozen_as = self._resting.pop(name, None) if name in self._steps else self._before[name]
            if frozen_as is not None and checksum(self._tensors[name]) != frozen_as:
                self._strays.add(name)  # it moved while it was frozen
            if self._tensors[name].grad is not None:
                self._reached.add(name)
            self._steps[name] = self._steps.get(name, 0) + 1
        self._last = training

    @contextmanager
    def rewriting(self) -> Generator[None]:
        """While somebody puts weights back: what moved until then is noted, and what moves meanwhile says nothing."""
        now = {name: checksum(tensor) for name, tensor in self._tensors.items() if self._group_of(name) is not None}
        moved = {name for name in now if now[name] != self._before[name]}
        self._strays |= {name for name, since in self._resting.items() if now[name] != since}
        self._strays |= moved - self._steps.keys()
        self._moved |= moved
        yield
        self._before |= {name: checksum(self._tensors[name]) for name in now}
        self._resting = {name: self._before[name] for name in self._resting}

    def broken(self) -> list[str]:
        """The parameters that may train and were NaN or infinite from the start. Every process must call it."""
        return sorted(n for n in self._anywhere(self._broken)[0] if self._group_of(n) is not None)

    def _not_finite(self) -> set[str]:
        return {name for name, tensor in self._tensors.items() if not finite(tensor)}

    def ruined(self) -> list[str]:
        """The tensors that became NaN or infinite since the start. Every process must call it."""
        now, before = self._anywhere(self._not_finite(), self._broken)
        return sorted(now - before)

    def finish(self) -> tuple[list[Row], list[str]]:
        """Compare with the start. Every process must call it, and all get the same answer.

        Returns: the rows, and the names of tensors that moved while they were not declared trainable.
        """
        now = {name: checksum(tensor) for name, tensor in self._tensors.items()}
        self._strays |= {name for name, since in self._resting.items() if now[name] != since}
        moved, reached, strays = self._anywhere(
            self._moved | {name for name in now if now[name] != self._before[name]}, self._reached, self._strays
        )
        self._compare_processes(now)
        groups: dict[Group, list[str]] = {}
        for name in self._tensors:
            group = self._group_of(name)
            if group is not None:
                groups.setdefault(group, []).append(name)
        rows = [
            Row(
                group,
                max((self._steps.get(n, 0) for n in names), default=0),
                len(names),
                len(moved.intersection(names)),
                not reached.isdisjoint(names),
            )
            for group, names in sorted(groups.items(), reverse=True)
        ]
        return rows, sorted(strays | (moved - self._steps.keys()))

    def _anywhere(self, *found: set[str]) -> list[set[str]]:
        """Each set united over all processes: a sharded tensor moved if any shard of it did."""
        return [set().union(*sets) for sets in zip(*gather(found), strict=True)]

    def _compare_processes(self, now: Mapping[str, tuple[int, int]]) -> None:
        """Warn where processes hold different copies of what trained; nothing would bring them together again."""
        copies = {n: now[n] for n in self._steps if not isinstance(self._tensors[n], DTensor)}
        others = gather(copies)
        apart = [name for name in copies if any(other.get(name) != copies[name] for other in others)]
        if apart:
            logger.warning(
                "%d tensors differ from process to process, e.g. %r. Something changed weights or gradients on some of "
                "them only, such as a callback that does not run on all, or their hardware rounds differently.",
                len(apart),
                apart[0],
            )


def check(rows: list[Row], strays: list[str], num_blocks: int, ruined: Sequence[str] = ()) -> None:
    """Raise EngagementError where a declared group never moved, a frozen tensor did, or one is not finite any more."""
    idle = []
    for row in (r for r in rows if r.steps and not r.moved):
        if not row.reached and row.group[1] != "head" and row.group[0] > num_blocks:
            # E.g. a pooler beside a loss over the hidden states: the model has it, this loss does not use it.
            logger.warning("No gradient ever reached %s: the loss does not use it.", label(row.group, num_blocks))
        else:
            idle.append(label(row.group, num_blocks))
    wrong = []
    if idle:
        wrong.append(
            f"{', '.join(idle)}: declared trainable, yet no tensor of it moved. Either no gradient reaches it (the "
            "loss does not use it, or something detaches it) or the rate is too small for its dtype"
        )
    if strays:
        wrong.append(
            f"{len(strays)} frozen tensors moved, e.g. {strays[0]!r}: something outside the optimizer changed them"
        )
    if ruined:
        wrong.append(
            f"{len(ruined)} tensors became NaN or infinite, e.g. {ruined[0]!r}: go back to an earlier checkpoint, with "
            "a lower learning rate or another optimizer"
        )
    if wrong:
        raise EngagementError("What trained is not what was declared. " + "; ".join(wrong) + ".")


def table(rows: list[Row], num_blocks: int) -> str:
    """The rows as text: group, updates, tensors that moved."""
    lines = [f"{'':>18}  updates  moved"]
    lines += [f"{label(r.group, num_blocks):>18}  {r.steps:>7}  {r.moved}/{r.tensors}" for r in rows]
    return "\n".join(lines)


@torch.no_grad()
def checksum(tensor: Tensor) -> tuple[int, int]:
    """A fingerprint of a tensor's bits, cheap and independent of the device: (Σ b, Σ i·b) mod 2⁶⁴, b its integer bits.

    One changed element always changes the first sum; two changes that cancel there, as when values change places, do
    not cancel in the second, where each counts by its position i.
    """
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()  # of this process alone, so that looking costs no communication
    if tensor.is_meta:  # offloaded by Accelerate: frozen, and out of reach
        return 0, 0
    flat = tensor.detach().contiguous().reshape(-1)
    bits = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    first, second = 0, 0
    for start in range(0, bits.numel(), CHUNK):
        wide = bits[start : start + CHUNK].to(torch.int64)
        first += int(wide.sum())
        second += int((wide * torch.arange(start, start + wide.numel(), device=wide.device)).sum())
    return first % 2**64, second % 2**64
