"""The spread over seeds, drawn."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .optional import imported
from .results import SeedRuns


def plot(runs: Mapping[str, SeedRuns], path: str | os.PathLike[str]) -> Path:
    """A point for each finished run beside a box of the quartiles; the majority class as a line where it is known.

    Runs without a number, e.g. those that diverged, are counted below the title.

    Args:
        runs: title → runs, of one metric.
        path: the file, whose ending tells its format.
    Returns: the file.
    Raises:
        MethodError: matplotlib is not installed.
    """
    imported("matplotlib", "the plot")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 1.1 * len(runs), 4), layout="constrained")
    axes = figure.subplots()
    scatter = np.random.default_rng(0)
    titles: list[str] = []
    for place, (title, own) in enumerate(runs.items()):
        values = [value for value in own.values.values() if math.isfinite(value)]
        missing = len(own.values) - len(values)
        titles.append(f"{title}\n{missing} without a number" if missing else title)
        axes.boxplot([values], positions=[place], widths=0.5, showfliers=False, medianprops={"color": "black"})
        axes.plot(place + scatter.uniform(-0.12, 0.12, len(values)), values, "o", alpha=0.6, markersize=4)
    majority = next((r.majority for own in runs.values() for r in own.finished if r.majority is not None), None)
    first = next(iter(runs.values()))
    if majority is not None and first.metric.removeprefix("eval_") == "accuracy":
        axes.axhline(majority, linestyle=":", color="grey", label="largest class")
        axes.legend(loc="lower right", fontsize="small")
    axes.set_xticks(range(len(runs)), titles, rotation=30, ha="right")
    axes.set_ylabel(first.metric.removeprefix("eval_"))
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)
    return target
