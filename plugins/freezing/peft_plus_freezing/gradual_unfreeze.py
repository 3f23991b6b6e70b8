"""Gradual unfreezing (ULMFiT)."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from peft_plus import Param, Plugin, Run

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class GradualUnfreeze(Plugin):
    """Thaw from the top: the head trains from the start, then one block more at a time, the embeddings last.

    Phase p trains the topmost p + 1 depths at which the tuner put something to train (Howard & Ruder 2018,
    arXiv:1801.06146, §3.3): p = ⌊step / interval⌋, or with `every="stall"` how often the evaluated metric has stopped
    improving. In an encoder-decoder both stacks thaw in parallel, aligned from the top (Raffel et al. 2020,
    arXiv:1910.10683, §3.5.1).

    Args:
        every: the interval between two thaws: `"epoch"`, or a number of optimizer steps ≥ 1; or `"stall"`, then the
            settings below apply.
        metric: name of the metric, with or without the Trainer's `eval_`.
        greater_is_better: its direction; None: lower is better where the name contains "loss", higher elsewhere.
        patience: how many evaluations in a row without an improvement let the next depth thaw, ≥ 1.
        min_delta: what counts as an improvement: better than the best so far by more than this, in the metric's units,
            ≥ 0.
    Raises:
        ValueError: a setting is out of its range, or goes only with `every="stall"`; `every` is `"epoch"` and the data
            has no length; an evaluation does not hold the metric.
    """

    name: ClassVar[str] = "gradual_unfreeze"
    source: ClassVar[str] = "Howard & Ruder 2018, arXiv:1801.06146, §3.3"
    needs: ClassVar[tuple[str, ...]] = ("layers",)

    every: Literal["epoch", "stall"] | int = "epoch"
    metric: str = "eval_loss"
    greater_is_better: bool | None = None
    patience: int = 1
    min_delta: float = 0.0

    phase: int = field(init=False, default=0)
    """How often the metric has stopped improving."""
    best: float | None = field(init=False, default=None)
    waited: int = field(init=False, default=0)
    """Evaluations since the best one, or since the last thaw."""
    judged: int | None = field(init=False, default=None)
    """The step of the last evaluation that was looked at."""

    def __post_init__(self) -> None:
        if isinstance(self.every, int) and self.every < 1:
            raise ValueError(f"every={self.every!r}: give 'epoch', 'stall' or a number of optimizer steps ≥ 1.")
        if self.patience < 1:
            raise ValueError(f"patience={self.patience}: give a number of evaluations ≥ 1.")
        if not (math.isfinite(self.min_delta) and self.min_delta >= 0):
            raise ValueError(f"min_delta={self.min_delta}: give a finite number ≥ 0.")
        for f in dataclasses.fields(self):
            if f.init and f.name != "every" and self.every != "stall" and getattr(self, f.name) != f.default:
                raise ValueError(f"{f.name}={getattr(self, f.name)!r} goes only with every='stall'.")

    def may_train(self, run: Run, param: Param) -> bool:
        return param.depth in thawed(run.depths, self._phase(run))

    def next_change(self, run: Run) -> int | None:
        phase = self._phase(run) + 1
        if phase >= len(run.depths):
            return None
        return NotImplemented if self.every == "stall" else phase * self._interval(run)

    def on_step_end(self, run: Run) -> None:
        if self.every != "stall":
            return
        if run.step == 1:  # the first of a stage: what an earlier one found out does not count here
            self.phase, self.best, self.waited, self.judged = 0, None, 0, None
        if run.last_evaluation_step is not None and run.last_evaluation_step != self.judged:
            self.judged = run.last_evaluation_step
            self._judge(self._value(run.last_metrics))
        if run.step == run.max_steps and self.judged is None:
            logger.warning(
                "gradual_unfreeze(every='stall') saw no evaluation in these %d steps, so nothing was thawed: set "
                "eval_strategy='steps' and eval_steps, and give an eval_dataset.",
                run.max_steps,
            )

    def _judge(self, value: float) -> None:
        """Take one more evaluation into account."""
        known = not math.isnan(value)
        if known and (self.best is None or gain(value, self.best, greater_is_better=self._greater()) > self.min_delta):
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        if self.waited >= self.patience:
            self.phase, self.waited = self.phase + 1, 0

    def _greater(self) -> bool:
        return "loss" not in self.metric.lower() if self.greater_is_better is None else self.greater_is_better

    def _value(self, metrics: Mapping[str, float]) -> float:
        for name in (self.metric, f"eval_{self.metric}"):
            if name in metrics:
                return float(metrics[name])
        raise ValueError(
            f"the evaluation has no {self.metric!r}, only {', '.join(sorted(metrics)) or 'nothing'}: set metric= to "
            "one of them, or let compute_metrics return it."
        )

    def _phase(self, run: Run) -> int:
        if self.every == "stall":
            return self.phase if run.step else 0  # before the first step the state may still be that of another stage
        return run.step // self._interval(run)

    def _interval(self, run: Run) -> int:
        if isinstance(self.every, int):
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


def gain(value: float, best: float, *, greater_is_better: bool) -> float:
    """By how much `value` is better than `best`, in the metric's units; negative where it is worse."""
    return value - best if greater_is_better else best - value
