"""Reading an evaluated metric: where it stands, which way is better, and by how much."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping


def holds(metrics: Mapping[str, float], metric: str) -> bool:
    """Whether an evaluation tells a metric that is named with or without the Trainer's `eval_`."""
    return metric in metrics or f"eval_{metric}" in metrics


def value_of(metrics: Mapping[str, float], metric: str) -> float:
    """The value of a metric that is named with or without the Trainer's `eval_`.

    Raises:
        ValueError: the evaluation does not hold it; says what it holds.
    """
    for name in (metric, f"eval_{metric}"):
        if name in metrics:
            return float(metrics[name])
    raise ValueError(
        f"the evaluation has no {metric!r}, only {', '.join(sorted(metrics)) or 'nothing'}: set metric= to one of "
        "them, or let compute_metrics return it."
    )


FALLING = frozenset(
    {"error", "err", "perplexity", "ppl", "mse", "rmse", "mae", "mape", "nll", "wer", "cer", "ter", "brier", "ece"}
)
"""Words of metrics' names of which less is better."""


def rises(metric: str, greater_is_better: bool | None) -> bool:
    """Whether greater is better; where the user does not say, unless the name tells of a loss or an error.

    It does where it contains "loss", or one of its words is in `FALLING`: `eval_loss`, `rmse`, `dev_perplexity`.
    """
    if greater_is_better is not None:
        return greater_is_better
    words = re.split(r"[^a-z]+", metric.lower())
    return "loss" not in metric.lower() and FALLING.isdisjoint(words)


def gain(value: float, best: float, *, greater_is_better: bool) -> float:
    """By how much `value` is better than `best`, in the metric's units; negative where it is worse."""
    return value - best if greater_is_better else best - value


def better(value: float, best: float | None, *, greater_is_better: bool, min_delta: float = 0.0) -> bool:
    """Whether a value is an improvement: the first one that is a number, or better than the best by > `min_delta`."""
    if value != value:  # NaN
        return False
    return best is None or gain(value, best, greater_is_better=greater_is_better) > min_delta


def check_patience(patience: int, min_delta: float) -> None:
    """Raise ValueError unless a number of evaluations and what counts as an improvement make sense."""
    if patience < 1:
        raise ValueError(f"patience={patience}: give a number of evaluations ≥ 1.")
    if not (math.isfinite(min_delta) and min_delta >= 0):
        raise ValueError(f"min_delta={min_delta}: give a finite number ≥ 0.")
