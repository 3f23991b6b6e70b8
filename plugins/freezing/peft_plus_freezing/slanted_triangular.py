"""The slanted triangular learning rate (ULMFiT)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from peft_plus import Param, Plugin, Run


@dataclass(kw_only=True)
class SlantedTriangular(Plugin):
    """The learning rate rises quickly and falls slowly, both linearly, between the base rate and a 32nd of it.

    η(t) = η_max · (1 + p (ratio − 1)) / ratio, with p = t / cut up to cut = ⌊T · cut_frac⌋ and p = 1 − (t − cut) /
    (T − cut) from there on; T is the number of optimizer steps of the stage, η_max the learning rate that the user set
    (Howard & Ruder 2018, arXiv:1801.06146, §3.2).

    Args:
        cut_frac: share of the steps in which the rate rises, in [0, 1); 0 begins at the base rate.
        ratio: how much smaller the lowest rate is than the base rate, ≥ 1; 1 is a constant rate.
    Raises:
        ValueError: a setting is out of its range.
    """

    name: ClassVar[str] = "slanted_triangular"
    source: ClassVar[str] = "Howard & Ruder 2018, arXiv:1801.06146, §3.2"
    schedule: ClassVar[bool] = True

    cut_frac: float = 0.1
    ratio: float = 32.0

    def __post_init__(self) -> None:
        if not 0 <= self.cut_frac < 1:
            raise ValueError(f"cut_frac={self.cut_frac}: give a share of the steps in [0, 1).")
        if not 1 <= self.ratio < math.inf:
            raise ValueError(f"ratio={self.ratio}: give a finite number ≥ 1.")

    def lr_scale(self, run: Run, param: Param) -> float:
        return slanted_triangle(run.step, run.max_steps, cut_frac=self.cut_frac, ratio=self.ratio)

    def lr_key(self, param: Param) -> tuple[Any, ...]:
        return ()


def slanted_triangle(step: int, steps: int, *, cut_frac: float, ratio: float) -> float:
    """η(t) / η_max at t = `step` of T = `steps`.

    The paper divides the fall by cut · (1 / cut_frac − 1), which is T − cut where T · cut_frac is whole. Elsewhere it
    is less, and the rate of a short run would fall below zero.

    Args:
        step: 0..steps.
        cut_frac: in [0, 1).
        ratio: ≥ 1.
    Returns: between 1 / ratio and 1.
    """
    cut = math.floor(steps * cut_frac)
    p = step / cut if step < cut else 1 - (step - cut) / max(steps - cut, 1)
    return (1 + p * (ratio - 1)) / ratio
