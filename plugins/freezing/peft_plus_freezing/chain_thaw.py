"""Chain-thaw (DeepMoji): one layer after the other, each alone, then all together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from peft_plus import Run
from peft_plus.watched_metric import check_patience

from .phased import Phased
from .phases import Phase
from .select import place


@dataclass(kw_only=True)
class ChainThaw(Phased):
    """Train the head alone, then each layer alone from the first to the last, then everything.

    A layer is a depth at which the tuner put something to train; the topmost of them comes first, then the embeddings
    and the blocks from the input upwards, each while all others rest, then all (Felbo et al. 2017, arXiv:1708.00524,
    §3.3). The first stage trains at the rate of the run, the others at `later_lr_scale` of it. Each stage ends when
    `patience` evaluations in a row brought no improvement; the best weights seen so far are then put back, and after
    the last stage the run ends.

    Args:
        metric: name of the metric, with or without the Trainer's `eval_`.
        greater_is_better: its direction; None: lower is better of a loss or an error, by its name, else higher.
        patience: how many evaluations in a row without an improvement end a stage, ≥ 1.
        min_delta: what counts as an improvement: better than the best so far by more than this, in the metric's units,
            ≥ 0.
        steps: in place of the metric: optimizer steps of each stage, ≥ 1; the last one goes on to the end of the run.
        epochs: in place of the metric: passes over the data of each stage, > 0, likewise.
        later_lr_scale: factor of the learning rate in all stages but the first, > 0.
    Raises:
        ValueError: a setting is out of its range, or goes only with the metric; an evaluation does not hold the metric.
    """

    name: ClassVar[str] = "chain_thaw"
    source: ClassVar[str] = "Felbo et al. 2017, arXiv:1708.00524, §3.3"
    needs: ClassVar[tuple[str, ...]] = ("layers",)

    metric: str = "eval_loss"
    greater_is_better: bool | None = None
    patience: int = 5
    min_delta: float = 0.0
    steps: int | None = None
    epochs: float | None = None
    later_lr_scale: float = 0.1

    def __post_init__(self) -> None:
        check_patience(self.patience, self.min_delta)
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps={self.steps}: give a number of optimizer steps ≥ 1.")
        if self.epochs is not None and not (math.isfinite(self.epochs) and self.epochs > 0):
            raise ValueError(f"epochs={self.epochs}: give a finite number > 0.")
        if not (math.isfinite(self.later_lr_scale) and self.later_lr_scale > 0):
            raise ValueError(f"later_lr_scale={self.later_lr_scale}: give a finite number > 0.")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"steps={self.steps} and epochs={self.epochs:g} both end a stage. Give one of them.")
        if self.steps is not None or self.epochs is not None:
            for name in ("metric", "greater_is_better", "patience", "min_delta"):
                if getattr(self, name) != getattr(type(self), name):
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} goes only without steps and epochs: a stage ends in one way."
                    )

    @property
    def restores_best(self) -> bool:
        return self.steps is None and self.epochs is None

    def _phases(self, run: Run) -> Sequence[Phase]:
        by_metric = self.restores_best
        return stages(
            run.depths,
            run.num_blocks,
            later_lr_scale=float(self.later_lr_scale),
            first=Phase(
                train=("all",),
                steps=self.steps,
                epochs=self.epochs,
                patience=self.patience if by_metric else None,
                metric=self.metric,
                min_delta=self.min_delta,
                greater_is_better=self.greater_is_better,
                restore_best=by_metric,
            ),
        )


def order(depths: Sequence[int]) -> list[Sequence[int]]:
    """The depths of each stage: the last layer, then the first to the penultimate one singly, then all.

    Args:
        depths: where something may train, from the top down.
    """
    top, *rest = depths
    return [[top], *([depth] for depth in reversed(rest)), list(depths)]


@lru_cache(maxsize=256)
def stages(depths: tuple[int, ...], num_blocks: int, *, later_lr_scale: float, first: Phase) -> tuple[Phase, ...]:
    """The stages as phases.

    Args:
        depths: where something may train, from the top down.
        num_blocks: L.
        later_lr_scale: factor of the learning rate in all but the first.
        first: how they end.
    """
    from dataclasses import replace

    found = [
        replace(first, train=tuple(place(depth, num_blocks) for depth in group), lr_scale=later_lr_scale if i else 1.0)
        for i, group in enumerate(order(depths))
    ]
    if first.patience is None:
        found[-1] = replace(found[-1], steps=None, epochs=None)
    return tuple(found)
