"""Early stopping."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import ClassVar

from peft_plus import Plugin, Run
from peft_plus.watched_metric import better, check_patience, rises, value_of

logger = logging.getLogger(__name__)

_KEPT = "early_stop"


@dataclass(kw_only=True)
class EarlyStop(Plugin):
    """End the run when a metric stops improving, with the weights of the best evaluation.

    After each evaluation: an improvement by more than `min_delta` is the best so far; after `patience` evaluations in a
    row without one the run ends (Prechelt 1998, doi:10.1007/3-540-49430-8_3). A metric that is no number counts as no
    improvement. The best weights are kept in memory and in checkpoints, and come back when the run ends, whether here
    or after its last step.

    Args:
        metric: what an evaluation tells, with or without `eval_`.
        patience: evaluations in a row, ≥ 1.
        min_delta: ≥ 0, in the metric's units.
        greater_is_better: None: unless its name is that of a loss or an error.
        restore_best: whether the best weights come back.
    Raises:
        ValueError: a setting is out of its range; the run never evaluates, or an evaluation does not tell the metric.
    """

    name: ClassVar[str] = "early_stop"
    source: ClassVar[str] = "Prechelt 1998, doi:10.1007/3-540-49430-8_3"

    metric: str = "eval_loss"
    patience: int = 3
    min_delta: float = 0.0
    greater_is_better: bool | None = None
    restore_best: bool = True

    best: float | None = field(init=False, default=None)
    best_step: int = field(init=False, default=0)
    waited: int = field(init=False, default=0)
    """Evaluations since the best one."""

    def __post_init__(self) -> None:
        check_patience(self.patience, self.min_delta)

    @property
    def restores_best(self) -> bool:
        return self.restore_best

    def on_stage_begin(self, run: Run) -> None:
        if run.evaluates is False:
            raise ValueError("it waits for evaluations, and this run makes none: set eval_strategy and eval_dataset.")
        self.best, self.best_step, self.waited = None, 0, 0

    def on_evaluate(self, run: Run) -> None:
        value = value_of(run.last_metrics, self.metric)
        rising = rises(self.metric, self.greater_is_better)
        if better(value, self.best, greater_is_better=rising, min_delta=self.min_delta):
            self.best, self.best_step, self.waited = value, run.step, 0
            if self.restore_best:
                run.keep(_KEPT)
            return
        self.waited += 1
        ends = self.waited >= self.patience
        if self.restore_best and self.best is not None and (ends or run.step >= run.max_steps):
            run.restore(_KEPT)
        if ends and run.step < run.max_steps:
            best = "was never a number" if self.best is None else f"was best at step {self.best_step} ({self.best:.6g})"
            back = ", whose weights are back" if self.restore_best and self.best is not None else ""
            run.stop(f"early_stop: {self.metric} {best}{back}, and {self.waited} evaluations since brought no better.")

    def on_stage_end(self, run: Run) -> None:
        if run.last_evaluation_step is None:
            logger.warning(
                "early_stop saw no evaluation in these %d steps, so it stopped nothing. A loop of your own tells it "
                "of one by session.evaluated(metrics).",
                run.step,
            )
        if self.restore_best and self.best is not None:
            run.restore(_KEPT)  # also where steps came after the last evaluation, or another plugin ended the run
