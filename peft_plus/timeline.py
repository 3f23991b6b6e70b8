"""Who trained when, and did it move: what a run records, and how it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .layers import depth_label
from .plugin import Part

Group = tuple[int, Part]
"""Parameters of one depth and part: the grain at which training is declared, proved and shown."""


@dataclass(frozen=True)
class Change:
    """From `step` of `stage` (which has `max_steps`) on, exactly these groups trained."""

    stage: str
    step: int
    max_steps: int
    groups: frozenset[Group]


def label(group: Group, num_blocks: int) -> str:
    """`embeddings`, `block 3` or `head`, with the part where it says something more."""
    depth, part = group
    place = depth_label(depth, num_blocks)
    if depth > num_blocks and part != "head":
        place = "top"  # above the last block, and not the task's head: a final norm, a pooler
    return place if part in ("head", "base") else f"{place} {part}"


def draw(changes: Sequence[Change], num_blocks: int, width: int = 40) -> str:
    """The timeline as text: a line for each group from the head down, `█` where it trained.

    Args:
        changes: what a plan recorded, in order; stages one after the other.
        width: columns for each stage.
    """
    everything = sorted({g for change in changes for g in change.groups}, reverse=True)
    stages = list(dict.fromkeys(change.stage for change in changes))
    names = [label(group, num_blocks) for group in everything]
    margin = max((len(n) for n in names), default=0)
    lines = [" " * margin + "  " + "  ".join(_ruler(changes, stage, width) for stage in stages)]
    for group, name in zip(everything, names, strict=True):
        bars = "  ".join(_bar(changes, stage, group, width) for stage in stages)
        lines.append(f"{name:>{margin}}  {bars}")
    return "\n".join(lines)


def _ruler(changes: Sequence[Change], stage: str, width: int) -> str:
    steps = next(c.max_steps for c in changes if c.stage == stage)
    return f"{stage}: {steps} steps"[:width].ljust(width)


def _bar(changes: Sequence[Change], stage: str, group: Group, width: int) -> str:
    mine = [c for c in changes if c.stage == stage]
    cells = []
    for column in range(width):
        step = column * mine[0].max_steps // width
        current = [c for c in mine if c.step <= step]
        cells.append("█" if current and group in current[-1].groups else "·")
    return "".join(cells)
