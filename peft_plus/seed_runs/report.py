"""How one training's results spread over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .. import watched_metric
from .results import RunResult, SeedRuns
from .statistics import Estimate, bootstrap, expected_best, mean, spread

_SLACK = 1e-6
"""By how much a metric may be above the largest class's share, relative to it, and still have failed: fp32 rounds."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """How one training's results spread over seeds.

    Attributes:
        metric: the one that counts; `greater_is_better` tells its direction.
        n: finished runs.
        no_number: those of them that have no number as their metric, e.g. because they diverged. They count as failed,
            and are in none of the next six.
        mean: with its 95 % bootstrap interval.
        std: with n − 1, and its 95 % interval, see `statistics.spread`.
        least, median, most: of the metric.
        expected_best: k → the expected best of k runs. Where racing stopped some, those that it finished are no draw of
            all; then it is by the metric where they were judged.
        failed: share of runs no better than `majority`, or without a number; None where that is unknown: nobody said
            the majority, or racing stopped some.
        majority: the value at which a run has failed.
        stopped: runs that racing did not finish.
        broken: runs that ended by an error, and have no result.
        cost: steps that were made, over those of all runs to their end.
        cpu_seconds: of training, the mean over the finished runs that ran in one go; NaN where none did.
        values: run → metric.
    """

    metric: str
    greater_is_better: bool
    n: int
    no_number: tuple[int, ...]
    mean: Estimate
    std: Estimate
    least: float
    median: float
    most: float
    expected_best: Mapping[int, float]
    failed: float | None
    majority: float | None
    stopped: int
    broken: tuple[int, ...]
    cost: float
    cpu_seconds: float
    values: Mapping[int, float]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def markdown(self) -> str:
        """A table, and below it what the table cannot say."""
        failed = "unknown" if self.failed is None else f"{100 * self.failed:.0f} %"
        lines = [
            f"{self.n} runs, {self.metric} ({'more' if self.greater_is_better else 'less'} is better).",
            "",
            "| mean | std | least | median | most | failed runs |",
            "|---|---|--:|--:|--:|--:|",
            f"| {self.mean} | {self.std} | {self.least:.4f} | {self.median:.4f} | {self.most:.4f} | {failed} |",
            "",
            "In brackets: 95 % intervals over the runs.",
        ]
        if self.no_number:
            lines.append(
                f"{len(self.no_number)} of {self.n} runs ended without a number, since they diverged or their metric "
                f"is NaN ({', '.join(map(str, self.no_number))}). They count as failed, and are in no other figure."
            )
        if self.broken:
            lines.append(
                f"{len(self.broken)} runs ended by an error and have no result ({', '.join(map(str, self.broken))}): "
                "they are in no figure, and calling seeds again makes them again."
            )
        best = ", ".join(f"of {k} {value:.4f}" for k, value in self.expected_best.items())
        if self.stopped:
            found = self.most if self.greater_is_better else self.least
            lines.append(
                f"Racing stopped {self.stopped} of {self.stopped + self.n} runs, and found {found:.4f} with "
                f"{100 * self.cost:.0f} % of the steps of all. The runs that went on were chosen, so mean and spread "
                "are theirs alone, and how many would have failed is unknown."
            )
            lines.append(f"Where they were judged, the best to expect of so many runs: {best}.")
            return "\n".join(lines)
        if self.majority is None:
            lines.append("Which runs failed is unknown: give report(majority=…), e.g. the largest class's share.")
        else:
            lines.append(f"A run has failed at {self.majority:.4f} or worse.")
        lines.append(f"The best to expect of so many runs: {best}.")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.markdown()


def report(runs: SeedRuns, *, majority: float | None = None) -> Report:
    """See `SeedRuns.report`.

    Raises:
        ValueError: fewer than two runs finished, and racing stopped none.
    """
    values, stopped = runs.values, len(runs.results) - len(runs.finished)
    if len(values) < (1 if stopped else 2):
        raise ValueError(f"A spread needs two finished runs at least, and there are {len(values)}.")
    numbers = [value for value in values.values() if math.isfinite(value)]
    if majority is None and runs.metric.removeprefix("eval_") == "accuracy":  # of those labels, and no other kind
        majority = next((r.majority for r in runs.finished if r.majority is not None), None)
    drawn = [value for value in (_judged(one, runs.metric) for one in runs.results) if value is not None]
    drawn = drawn if stopped else numbers
    ks = [k for k in (1, 2, 5, 10, 20, 50) if k <= len(drawn)]
    made, whole = sum(r.steps for r in runs.results), sum(r.max_steps for r in runs.results)
    return Report(
        metric=runs.metric,
        greater_is_better=runs.greater_is_better,
        n=len(values),
        no_number=tuple(number for number, value in values.items() if not math.isfinite(value)),
        mean=bootstrap(mean, numbers),
        std=spread(numbers),
        least=min(numbers, default=math.nan),
        median=float(np.median(numbers)) if numbers else math.nan,
        most=max(numbers, default=math.nan),
        expected_best={k: expected_best(drawn, k, greater_is_better=runs.greater_is_better) for k in ks},
        failed=None if stopped else _failed(list(values.values()), majority, runs.greater_is_better),
        majority=majority,
        stopped=stopped,
        broken=runs.broken,
        cost=made / whole if whole else math.nan,
        cpu_seconds=float(np.mean([r.cpu_seconds for r in runs.finished if not r.resumed] or [math.nan])),
        values=values,
    )


def _failed(values: Sequence[float], majority: float | None, greater_is_better: bool) -> float | None:
    """The share of runs at the majority or worse; NaN has failed, too. None where nobody knows the majority."""
    if majority is None:
        return None
    sign = 1 if greater_is_better else -1
    line = sign * majority + _SLACK * (1 + abs(majority))
    return sum(not sign * value > line for value in values) / len(values)


def _judged(result: RunResult, metric: str) -> float | None:
    """The metric where racing judged the run, as a number, if that is known."""
    metrics = result.judged
    value = watched_metric.value_of(metrics, metric) if watched_metric.holds(metrics, metric) else math.nan
    return value if math.isfinite(value) else None
