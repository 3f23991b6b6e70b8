"""Which seeds a run gets."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Axis = Literal["init", "order", "dropout"]
AXES: tuple[Axis, ...] = ("init", "order", "dropout")


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """The seeds of one run.

    Attributes:
        number: which run it is, from 0.
        init: of what is drawn while the model is built: the new head, the adapter. Set before the factory is called.
        order: of the data: `TrainingArguments.data_seed`.
        dropout: of everything that training itself draws, the plugins' noise too: `TrainingArguments.seed`.
        shared: a folder that all runs of a call share, e.g. for tokenised data or a stored trunk.
    """

    number: int
    init: int
    order: int
    dropout: int
    shared: Path


def seeds_of(number: int, *, base: int, vary: Collection[Axis], shared: Path) -> Seeds:
    """The seeds of run `number`: base + number on the axes that vary, base on the others.

    Args:
        base: ≥ 0.
    """
    values = {axis: base + number if axis in vary else base for axis in AXES}
    return Seeds(number=number, shared=shared, **values)
