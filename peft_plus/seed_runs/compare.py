"""How two trainings differ, run by run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .results import SeedRuns, value_of
from .statistics import Estimate, bootstrap, mean, paired_permutation, std

_NO_SPREAD = 1e-12
"""Below it a standard deviation is that of rounding."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One training minus another, paired by run.

    Attributes:
        n: pairs.
        left_out: runs that have no number in one of them, e.g. because they diverged.
        mean: of the differences, with a 95 % bootstrap interval over the pairs.
        p: of a two-sided paired permutation test that the mean difference is 0.
        std: the difference of the standard deviations, redrawn pair by pair.
        std_ratio: of the first over the second.
    """

    metric: str
    n: int
    left_out: tuple[int, ...]
    mean: Estimate
    p: float
    std: Estimate
    std_ratio: Estimate

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        without = f", without {', '.join(map(str, self.left_out))}, which gave no number" if self.left_out else ""
        return f"{self.metric}, {self.n} pairs{without}: mean {self.mean}, p = {self.p:.3g}; std {self.std}"


def compare(runs: SeedRuns, other: SeedRuns) -> Comparison:
    """See `SeedRuns.compare`."""
    if runs.metric != other.metric:
        raise ValueError(f"One counts {runs.metric!r}, the other {other.metric!r}: read them with one metric.")
    if any(not result.finished for result in (*runs.results, *other.results)):
        raise ValueError("Racing chose which of these runs were finished, so a comparison would be of the chosen ones.")
    mine, theirs = ({result.number: result for result in one.results} for one in (runs, other))
    shared = sorted(mine.keys() & theirs.keys())
    for k in shared:
        if mine[k].seeds != theirs[k].seeds:
            raise ValueError(
                f"Run {k} of one has the seeds {dict(mine[k].seeds)}, of the other {dict(theirs[k].seeds)}: only runs "
                "of equal base and vary are pairs."
            )
    values = {k: (value_of(mine[k], runs.metric), value_of(theirs[k], runs.metric)) for k in shared}
    both = {k: pair for k, pair in values.items() if all(map(math.isfinite, pair))}
    if len(both) < 2:
        raise ValueError(f"A comparison needs two runs at least that ended with a number in both; here {list(both)}.")
    a, b = ([pair[side] for pair in both.values()] for side in (0, 1))
    differences = [x - y for x, y in zip(a, b, strict=True)]
    return Comparison(
        metric=runs.metric,
        n=len(both),
        left_out=tuple(k for k in shared if k not in both),
        mean=bootstrap(mean, differences),
        p=paired_permutation(differences),
        std=bootstrap(lambda x, y: std(x) - std(y), a, b),
        std_ratio=bootstrap(_ratio, a, b),
    )


def _ratio(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of the standard deviations; infinite where the second is 0 alone, 1 where both are."""
    first, second = std(x), std(y)
    some = second > _NO_SPREAD
    alone = np.where(first > _NO_SPREAD, math.inf, 1.0)
    return np.where(some, first / np.where(some, second, 1.0), alone)


def compare_table(runs: Mapping[str, SeedRuns], *, baseline: str, majority: float | None = None) -> str:
    """Several trainings against one, as a Markdown table.

    Args:
        runs: title → runs, the baseline among them.
        majority: as for `SeedRuns.report`.
    Raises:
        ValueError: there is no such baseline; runs are no pairs, or racing chose them.
    """
    if baseline not in runs:
        raise ValueError(f"baseline={baseline!r} is none of {list(runs)}.")
    lines = [
        "| | runs | mean | std | least | failed | difference of means | p | std ÷ baseline's | time |",
        "|---|--:|--:|--:|--:|--:|---|--:|---|--:|",
    ]
    base = runs[baseline].report(majority=majority)
    for title, own in runs.items():
        made = own.report(majority=base.majority)
        failed = "" if made.failed is None else f"{100 * made.failed:.0f} %"
        row = f"| {title} | {made.n} | {made.mean.value:.4f} | {made.std.value:.4f} | {made.least:.4f} | {failed} |"
        times = made.cpu_seconds / base.cpu_seconds if base.cpu_seconds else math.nan
        time = "" if math.isnan(times) else f"{times:.2f} ×"
        if title == baseline:
            lines.append(f"{row} | | | {time} |")
            continue
        difference = compare(own, runs[baseline])
        ratio = f"{difference.std_ratio.value:.2f} [{difference.std_ratio.low:.2f}, {difference.std_ratio.high:.2f}]"
        gap = f"{difference.mean.value:+.4f} [{difference.mean.low:+.4f}, {difference.mean.high:+.4f}]"
        lines.append(f"{row} {gap} | {difference.p:.3f} | {ratio} | {time} |")
    return "\n".join(lines)
