"""A learning rate that falls where the metric stands still."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from peft_plus import Plugin, Run, Stage
from peft_plus.watched_metric import rises


@dataclass(kw_only=True)
class Plateau(Plugin):
    """Multiply the learning rate by a factor whenever the metric has not improved for some evaluations.

    torch's `ReduceLROnPlateau` through transformers' own schedule, which reads the metric that chooses the best model.
    So this sets both: the schedule, and `metric_for_best_model` with its direction.

    Args:
        metric: what an evaluation tells, with or without `eval_`.
        greater_is_better: None: unless its name is that of a loss or an error.
        factor: in (0, 1).
        patience: evaluations without improvement that are let pass, ≥ 0.
        threshold: relative improvement that counts, ≥ 0.
        min_lr: ≥ 0, below which the rate does not fall.
    Raises:
        ValueError: a setting is out of its range; the run never evaluates.
    """

    name: ClassVar[str] = "plateau"
    source: ClassVar[str] = "torch.optim.lr_scheduler.ReduceLROnPlateau"

    metric: str = "eval_loss"
    greater_is_better: bool | None = None
    factor: float = 0.5
    patience: int = 2
    threshold: float = 1e-4
    min_lr: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.factor < 1:
            raise ValueError(f"factor={self.factor}: give a factor in (0, 1).")
        for name in ("patience", "threshold", "min_lr"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: give a number ≥ 0.")

    def plan_stages(self, stages: Sequence[Stage]) -> Sequence[Stage]:
        rising = rises(self.metric, self.greater_is_better)
        kwargs: dict[str, Any] = {"mode": "max" if rising else "min", "factor": self.factor, "patience": self.patience}
        args = {
            "lr_scheduler_type": "reduce_lr_on_plateau",
            "lr_scheduler_kwargs": {**kwargs, "threshold": self.threshold, "min_lr": self.min_lr},
            "metric_for_best_model": self.metric,
            "greater_is_better": rising,
        }
        return [replace(stage, args={**stage.args, **args}) for stage in stages]

    def on_stage_begin(self, run: Run) -> None:
        if run.evaluates is False:
            raise ValueError("it reads a metric, and this run never evaluates: set eval_strategy and eval_dataset.")
