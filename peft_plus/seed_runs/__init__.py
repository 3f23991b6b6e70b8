"""Seeds as an axis: one training, many seeds, and what their results say.

| file | subject |
|---|---|
| `axis.py` | which seeds a run gets |
| `one_run.py` | one run, from the factory to its result |
| `results.py` | results on disk, and read again |
| `call.py` | what all runs of a call share, and what becomes of each |
| `claim.py` | whose results a folder holds |
| `lock.py` | one call at a time works in a folder |
| `several.py` | one after another, or several at a time |
| `processes.py` | in processes of their own |
| `racing.py` | starting many, finishing the best: how, and what it would have found |
| `finish_best.py` | racing and halving, carried out |
| `callbacks.py` | what stops a run before its end |
| `runner.py` | `seeds` |
| `statistics.py` | intervals, tests, expected maxima |
| `report.py` | how one training's results spread |
| `compare.py` | how two trainings differ, and a table of several |
| `plot.py` | the spread, drawn |
| `errors.py` | what a call is told instead of all its runs |
| `optional.py` | packages that only some calls need |
"""

from __future__ import annotations

from .axis import Seeds
from .compare import Comparison, compare_table
from .racing import Racing, SuccessiveHalving, simulate_racing
from .report import Report
from .results import RunResult, SeedRuns
from .runner import seeds

__all__ = [
    "Comparison",
    "Racing",
    "Report",
    "RunResult",
    "SeedRuns",
    "Seeds",
    "SuccessiveHalving",
    "compare_table",
    "seeds",
    "simulate_racing",
]
