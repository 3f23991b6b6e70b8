"""Tables: how one training's results spread over seeds, and how two trainings differ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .results import SeedRuns
from .statistics import Estimate, bootstrap, expected_best, mean, paired_permutation, std


@dataclass(frozen=True, kw_only=True)
class Report:
    """How one training's results spread over seeds.

    Attributes:
        metric: the one that counts; `greater_is_better` tells its direction.
        n: finished runs.
        mean, std: with 95 % bootstrap intervals; std with n − 1.
        least, median, most: of the metric.
        failed: share of runs no better than `majority`; None where that is unknown.
        majority: the value at which a run has failed.
        expected_best: k → the expected best of k runs.
        stopped: runs that racing did not finish.
        cost: steps that were made, over those of all runs to their end.
        cpu_seconds: of training, the mean over the finished runs that ran in one go; NaN where none did.
        values: run → metric.
    """

    metric: str
    greater_is_better: bool
    n: int
    mean: Estimate
    std: Estimate
    least: float
    median: float
    most: float
    failed: float | None
    majority: float | None
    expected_best: Mapping[int, float]
    stopped: int
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
            "In brackets: 95 % bootstrap intervals over the runs.",
        ]
        if self.majority is None:
            lines.append("Which runs failed is unknown: give report(majority=…), e.g. the largest class's share.")
        else:
            lines.append(f"A run has failed at {self.majority:.4f} or worse.")
        best = ", ".join(f"of {k} {value:.4f}" for k, value in self.expected_best.items())
        lines.append(f"The best to expect of so many runs: {best}.")
        if self.stopped:
            lines.append(
                f"Racing stopped {self.stopped} of {self.stopped + self.n} runs: {100 * self.cost:.0f} % of all steps "
                "were made. The runs that went on were chosen, so mean and spread are theirs alone."
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.markdown()


def report(runs: SeedRuns, *, majority: float | None = None) -> Report:
    """See `SeedRuns.report`.

    Raises:
        ValueError: fewer than two runs finished.
    """
    values = runs.values
    if len(values) < 2:
        raise ValueError(f"A spread needs two finished runs at least, and there are {len(values)}.")
    numbers = np.array(list(values.values()))
    if majority is None and runs.metric.removeprefix("eval_") == "accuracy":  # of those labels, and no other kind
        majority = next((r.majority for r in runs.finished if r.majority is not None), None)
    failed = None
    if majority is not None:  # NaN has failed, too
        failed = float(np.mean(~(numbers > majority if runs.greater_is_better else numbers < majority)))
    made, whole = sum(r.steps for r in runs.results), sum(r.max_steps for r in runs.results)
    ks = [k for k in (1, 2, 5, 10, 20, 50) if k <= len(numbers)]
    return Report(
        metric=runs.metric,
        greater_is_better=runs.greater_is_better,
        n=len(numbers),
        mean=bootstrap(mean, numbers.tolist()),
        std=bootstrap(std, numbers.tolist()),
        least=float(numbers.min()),
        median=float(np.median(numbers)),
        most=float(numbers.max()),
        failed=failed,
        majority=majority,
        expected_best={k: expected_best(numbers.tolist(), k, greater_is_better=runs.greater_is_better) for k in ks},
        stopped=len(runs.results) - len(numbers),
        cost=made / whole if whole else math.nan,
        cpu_seconds=float(np.mean([r.cpu_seconds for r in runs.finished if not r.resumed] or [math.nan])),
        values=values,
    )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One training minus another, paired by run.

    Attributes:
        n: pairs.
        mean: of the differences, with a 95 % bootstrap interval over the pairs.
        p: of a two-sided paired permutation test that the mean difference is 0.
        std: the difference of the standard deviations, redrawn pair by pair.
        std_ratio: of the first over the second.
    """

    metric: str
    n: int
    mean: Estimate
    p: float
    std: Estimate
    std_ratio: Estimate

    def __str__(self) -> str:
        return f"{self.metric}, {self.n} pairs: mean {self.mean}, p = {self.p:.3g}; std {self.std}"


def compare(runs: SeedRuns, other: SeedRuns) -> Comparison:
    """See `SeedRuns.compare`."""
    if runs.metric != other.metric:
        raise ValueError(f"One counts {runs.metric!r}, the other {other.metric!r}: read them with one metric.")
    mine, theirs = runs.values, other.values
    both = sorted(mine.keys() & theirs.keys())
    if len(both) < 2:
        raise ValueError(f"A comparison needs two runs at least that both have finished; here {both}.")
    a, b = [mine[k] for k in both], [theirs[k] for k in both]
    differences = [x - y for x, y in zip(a, b, strict=True)]
    return Comparison(
        metric=runs.metric,
        n=len(both),
        mean=bootstrap(mean, differences),
        p=paired_permutation(differences),
        std=bootstrap(lambda x, y: std(x) - std(y), a, b),
        std_ratio=bootstrap(lambda x, y: std(x) / np.maximum(std(y), 1e-12), a, b),
    )


def compare_table(runs: Mapping[str, SeedRuns], *, baseline: str, majority: float | None = None) -> str:
    """Several trainings against one, as a Markdown table.

    Args:
        runs: title → runs, the baseline among them.
        majority: as for `SeedRuns.report`.
    Raises:
        ValueError: there is no such baseline.
    """
    if baseline not in runs:
        raise ValueError(f"baseline={baseline!r} is none of {list(runs)}.")
    lines = [
        "| | mean | std | least | failed | difference of means | p | std ÷ baseline's | time |",
        "|---|--:|--:|--:|--:|---|--:|---|--:|",
    ]
    base = runs[baseline].report(majority=majority)
    for title, own in runs.items():
        made = own.report(majority=base.majority)
        failed = "" if made.failed is None else f"{100 * made.failed:.0f} %"
        row = f"| {title} | {made.mean.value:.4f} | {made.std.value:.4f} | {made.least:.4f} | {failed} |"
        times = made.cpu_seconds / base.cpu_seconds if base.cpu_seconds else math.nan
        time = "" if math.isnan(times) else f"{times:.2f} ×"
        if title == baseline:
            lines.append(f"{row} | | | {time} |")
            continue
        difference, ratio = compare(own, runs[baseline]), ""
        ratio = f"{difference.std_ratio.value:.2f} [{difference.std_ratio.low:.2f}, {difference.std_ratio.high:.2f}]"
        gap = f"{difference.mean.value:+.4f} [{difference.mean.low:+.4f}, {difference.mean.high:+.4f}]"
        lines.append(f"{row} {gap} | {difference.p:.3f} | {ratio} | {time} |")
    return "\n".join(lines)
