"""Gradual unfreezing (ULMFiT)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from peft_plus import Param, Plugin, Run


@dataclass(kw_only=True)
class GradualUnfreeze(Plugin):
    """Thaw from the top: the head trains from the start, then one block more at a time, the embeddings last.

    Phase p = ⌊step / interval⌋ trains the topmost p + 1 depths at which the tuner put something to train (Howard &
    Ruder 2018, arXiv:1801.06146, §3.3). In an encoder-decoder both stacks thaw in parallel, aligned from the top
    (Raffel et al. 2020, arXiv:1910.10683, §3.5.1).

    Args:
        every: the interval between two thaws: `"epoch"`, or a number of optimizer steps ≥ 1.
    Raises:
        ValueError: `every` is below 1; or it is `"epoch"` and the data has no length.
    """

    name: ClassVar[str] = "gradual_unfreeze"
    source: ClassVar[str] = "Howard & Ruder 2018, arXiv:1801.06146, §3.3"
    needs: ClassVar[tuple[str, ...]] = ("layers",)

    every: Literal["epoch"] | int = "epoch"

    def __post_init__(self) -> None:
        if self.every != "epoch" and not (isinstance(self.every, int) and self.every >= 1):
            raise ValueError(f"every={self.every!r}: give 'epoch' or a number of optimizer steps ≥ 1.")

    def may_train(self, run: Run, param: Param) -> bool:
        return param.depth in thawed(run.depths, run.step // self._interval(run))

    def next_change(self, run: Run) -> int | None:
        interval = self._interval(run)
        phase = run.step // interval + 1
        return phase * interval if phase < len(run.depths) else None

    def _interval(self, run: Run) -> int:
        if self.every != "epoch":
            return self.every
        if not run.steps_per_epoch:
            raise ValueError("gradual_unfreeze(every='epoch') needs data with a length; give every=<optimizer steps>.")
        return run.steps_per_epoch


def thawed(depths: Sequence[int], phase: int) -> Sequence[int]:
    """The depths that train in a phase.

    Args:
        depths: where something may train, from the top down.
        phase: 0, 1, 2, …; phases past the last leave everything thawed.
    """
    return depths[: phase + 1]
