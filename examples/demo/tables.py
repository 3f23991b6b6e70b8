"""How results look on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .compare import Outcome
from .intervals import Estimate

WIDTH = 100
"""Columns where the output goes to a file; a terminal has its own."""


def console() -> Console:
    """Where everything is printed; numbers are not coloured by guessing."""
    terminal = Console(highlight=False)
    return terminal if terminal.is_terminal else Console(highlight=False, width=WIDTH)


def progress_bar(to: Console) -> Progress:
    """One bar for the whole demo, counting optimizer steps."""
    return Progress(
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=to,
    )


def percent(estimate: Estimate, form: str = ".1f") -> str:
    """`70.1 [67.3, 72.9]`: mean and interval, as percent."""
    mean, low, high = (format(100 * value, form) for value in (estimate.mean, estimate.low, estimate.high))
    return f"{mean} [{low}, {high}]"


def comparison(outcomes: Mapping[str, Sequence[Outcome]], accuracy: Mapping[str, Estimate]) -> Table:
    """A line for each method. Both mappings: title → the outcome of each seed, and accuracy over all seeds."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", no_wrap=True)
    for heading in ("test accuracy, %", "by seed", "parameters", "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for title, runs in outcomes.items():
        table.add_row(
            title,
            percent(accuracy[title]),
            " ".join(f"{100 * run.correct.mean():.1f}" for run in runs),
            f"{runs[0].trainable:,}",
            f"{sum(run.seconds for run in runs) / len(runs):.0f}",
        )
    return table
