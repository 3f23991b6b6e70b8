"""What stops a run before its end: at a fraction of its steps, or where a pruner says so."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from transformers import TrainerCallback

from .results import evaluations_in, values_on_the_way


class StopAtFraction(TrainerCallback):
    """Saves and stops after a fraction of all steps, ⌈fraction · steps⌉, as transformers counts `eval_steps=0.3`.

    It does not evaluate: what an evaluation tells plugins would change the course of the run.

    Args:
        fraction: in (0, 1).
    Attributes:
        stopped: whether it did; False where the run ended by itself before.
    """

    def __init__(self, fraction: float) -> None:
        self._fraction, self.stopped = fraction, False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The Trainer's event."""
        if control.should_training_stop:  # by itself, at this very step or before
            return
        if math.ceil(self._fraction * state.max_steps) <= state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = control.should_training_stop = True


class Prunes(TrainerCallback):
    """Tells an Optuna trial each evaluation before the last step, and stops the run where it prunes.

    Args:
        trial: Optuna's.
        metric: what it is told; `accuracy` finds `eval_accuracy`.
        known: numbers of the evaluations that it was told of before the run was interrupted.
    Attributes:
        pruned: whether it stopped the run.
        told: how many evaluations the trial was told of. Their numbers, from 1, are its steps.
    """

    def __init__(self, trial: Any, metric: str, known: Collection[int] = ()) -> None:
        self._trial, self._metric, self._known = trial, metric, known
        self.pruned, self.told = False, 0

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The Trainer's event: once for each of several evaluation sets."""
        # From the log, where a resumed run finds its earlier evaluations too.
        values = values_on_the_way(evaluations_in(state.log_history), self._metric, state.max_steps)
        while self.told < len(values) and not self.pruned:
            self.told += 1
            if self.told not in self._known:
                self._trial.report(values[self.told - 1], self.told)
            if self.told >= max(self._known, default=0):  # the interruption may have come before the verdict
                self.pruned = self._trial.should_prune()
        if self.pruned:
            control.should_training_stop = True
