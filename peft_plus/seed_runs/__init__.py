"""Seeds as an axis: one training, many seeds, and what their results say.

| file | subject |
|---|---|
| `axis.py` | which seeds a run gets |
| `one_run.py` | one run, from the factory to its result |
| `results.py` | results on disk, and read again |
| `call.py` | what all runs of a call share, and what becomes of each |
| `claim.py` | whose results a folder holds |
| `several.py` | one after another, or several at a time |
| `processes.py` | in processes of their own |
| `racing.py` | starting many, finishing the best: how, and what it would have found |
| `finish_best.py` | racing and halving, carried out |
| `callbacks.py` | what stops a run before its end |
| `runner.py` | `seeds` |
| `statistics.py` | intervals, tests, expected maxima |
| `report.py` | tables of one and of several methods |
| `plot.py` | the spread, drawn |
| `optional.py` | packages that only some calls need |
"""

from __future__ import annotations

from .axis import Seeds
from .racing import Racing, SuccessiveHalving, simulate_racing
from .report import Comparison, Report, compare_table
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
