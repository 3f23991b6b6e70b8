"""What stops a run before its end: at a fraction of its steps, or where a pruner says so."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback

from ..errors import MethodError


class StopAtFraction(TrainerCallback):
    """Evaluates, saves and stops after a fraction of all steps.

    Args:
        fraction: in (0, 1).
    """

    def __init__(self, fraction: float) -> None:
        self._fraction = fraction

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The Trainer's event."""
        if state.global_step >= math.ceil(self._fraction * state.max_steps):
            control.should_save = control.should_evaluate = control.should_training_stop = True


class Prunes(TrainerCallback):
    """Tells an Optuna trial each evaluation, and stops where it prunes.

    Args:
        trial: Optuna's.
        metric: what it is told.
    Attributes:
        pruned: whether it stopped the run.
        told: how many evaluations it was told of.
    """

    def __init__(self, trial: Any, metric: str) -> None:
        self._trial, self._metric = trial, metric
        self.pruned, self.told = False, 0

    def on_evaluate(self, args: Any, state: Any, control: Any, **told: Any) -> None:
        """The Trainer's event."""
        if state.global_step >= state.max_steps or self.pruned:
            return  # it has made all its steps
        metrics = told.get("metrics") or {}
        value = metrics.get(self._metric, metrics.get(f"eval_{self._metric}"))
        if value is None:
            raise MethodError(
                f"metric={self._metric!r} is not among what the evaluation returned: {', '.join(sorted(metrics))}."
            )
        self.told += 1
        self._trial.report(float(value), self.told)
        if self._trial.should_prune():
            self.pruned = control.should_training_stop = True
