"""Starting many runs and finishing the best (Dodge et al. 2020, arXiv:2002.06305, §5)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .optional import imported
from .results import RunResult, value_of, values_on_the_way


@dataclass(frozen=True, kw_only=True)
class Racing:
    """Start all runs, stop them at a fraction of their steps, and finish the best.

    The schedules are those of the whole run. It costs n · fraction + keep · (1 − fraction) runs.

    Args:
        fraction: of a run's steps after which it is judged, in (0, 1).
        keep: runs that are finished, ≥ 1.
    Raises:
        ValueError: one is out of its range.
    """

    fraction: float = 0.3
    keep: int = 5

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ValueError(f"Racing(fraction={self.fraction}): give a fraction of a run in (0, 1).")
        if self.keep < 1:
            raise ValueError(f"Racing(keep={self.keep}): give a number of runs ≥ 1.")

    def cost(self, n: int) -> float:
        """Whole runs that n started ones cost."""
        return n * self.fraction + self.keep * (1 - self.fraction)


@dataclass(frozen=True, kw_only=True)
class SuccessiveHalving:
    """Stop a run at an evaluation where it is not among the best 1/η of those that came so far before it.

    That is Optuna's `SuccessiveHalvingPruner` (Li et al. 2020, arXiv:1810.05934), which sees the evaluations one after
    another. So the runs go one after another, too, and the earliest are stopped least.

    Args:
        min_evaluations: that a run has in any case, ≥ 1.
        reduction_factor: η ≥ 2.
    Raises:
        ValueError: one is out of its range.
    """

    min_evaluations: int = 1
    reduction_factor: int = 3

    def __post_init__(self) -> None:
        if self.min_evaluations < 1:
            raise ValueError(f"SuccessiveHalving(min_evaluations={self.min_evaluations}): give a number ≥ 1.")
        if self.reduction_factor < 2:
            raise ValueError(f"SuccessiveHalving(reduction_factor={self.reduction_factor}): give a number ≥ 2.")

    def study(self, done: Sequence[RunResult], metric: str, greater_is_better: bool) -> Any:
        """An Optuna study that knows the runs that are done."""
        optuna = imported("optuna", "successive halving")
        direction = "maximize" if greater_is_better else "minimize"
        pruner = optuna.pruners.SuccessiveHalvingPruner(
            min_resource=self.min_evaluations, reduction_factor=self.reduction_factor
        )
        study = optuna.create_study(direction=direction, pruner=pruner)
        for result in done:
            trial = study.ask()
            tell(study, trial, result, metric, pruned=report_all(trial, result, metric))
        return study


def tell(study: Any, trial: Any, result: RunResult, metric: str, *, pruned: bool) -> None:
    """Tell a study how a trial ended; a run without a number as its metric has failed."""
    states = imported("optuna", "successive halving").trial.TrialState
    if pruned:
        study.tell(trial, state=states.PRUNED)
    elif math.isnan(value := value_of(result, metric)):
        study.tell(trial, state=states.FAIL)
    else:
        study.tell(trial, value)


def report_all(trial: Any, result: RunResult, metric: str) -> bool:
    """Tell a trial the evaluations of a run that is done; whether it was stopped."""
    for number, value in enumerate(values_on_the_way(result.evaluations, metric, result.max_steps), start=1):
        trial.report(value, number)
        trial.should_prune()  # notes the rung that it reached
    return not result.finished


def best(values: Mapping[int, float], keep: int, *, greater_is_better: bool) -> list[int]:
    """The `keep` best runs; of equals the ones with the lower numbers. NaN is worse than any number."""
    sign = -1 if greater_is_better else 1
    ranks = {number: math.inf if math.isnan(value) else sign * value for number, value in values.items()}
    return sorted(sorted(ranks, key=lambda number: (ranks[number], number))[:keep])


def simulate_racing(
    early: Sequence[float],
    final: Sequence[float],
    *,
    racing: Racing,
    greater_is_better: bool = True,
    draws: int = 10_000,
    n: int | None = None,
    whole: int | None = None,
) -> tuple[float, float, float]:
    """What racing would have found among runs that are recorded to their end.

    Args:
        early, final: the metric of each run where it would have been judged, and at its end; NaN, of one that
            diverged, is worse than any number.
        racing: how many are kept, and when.
        greater_is_better: whether more of the metric is better.
        draws: how often it is played.
        n: runs started each time, drawn with replacement; by default as many as there are.
        whole: runs to their end that it is compared with; by default as many as the same budget pays for, at least one.
    Returns: the mean, over the draws, of the best run that racing finishes, where not all of these diverged; the median
        best of that many whole runs; the share of draws in which racing's is no worse.
    """
    sign = 1 if greater_is_better else -1
    a, b = (sign * np.asarray(values, dtype=float) for values in (early, final))
    a[np.isnan(a)] = b[np.isnan(b)] = -np.inf
    started = n or len(a)
    plays = whole or max(1, math.floor(racing.cost(started)))
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(a), (draws, started))
    kept = np.take_along_axis(picks, np.argsort(-a[picks], axis=1, kind="stable")[:, : racing.keep], axis=1)
    found = b[kept].max(1)
    plain = float(np.median(b[rng.integers(0, len(a), (draws, plays))].max(1)))
    ended = found[np.isfinite(found)]
    return sign * float(ended.mean()) if len(ended) else math.nan, sign * plain, float(np.mean(found >= plain))
