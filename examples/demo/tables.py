"""How results look on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from peft_plus import proof, timeline

from .compare import Outcome
from .intervals import Estimate, bootstrap
from .language_model import ENDS, HELD_OUT, Losses
from .reload import Reloaded

WIDTH = 100
"""Columns where the output goes to a file; a terminal has its own."""


def console() -> Console:
    """Where everything is printed. Numbers are not coloured by guessing."""
    probe = Console()
    return probe if probe.is_terminal else Console(width=WIDTH, highlight=False)


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


def percent(estimate: Estimate, *, signed: bool = False) -> str:
    """`70.1 [67.3, 72.9]`, in percent."""
    form = "{:+.1f} [{:+.1f}, {:+.1f}]" if signed else "{:.1f} [{:.1f}, {:.1f}]"
    return form.format(*(100 * value for value in (estimate.mean, estimate.low, estimate.high)))


def comparison(outcomes: Mapping[str, Sequence[Outcome]], accuracy: Mapping[str, Estimate]) -> Table:
    """A line for each method."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", no_wrap=True)
    for heading in ("test accuracy, %", "each seed", "parameters", "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for title, runs in outcomes.items():
        table.add_row(
            title,
            percent(accuracy[title]),
            ", ".join(f"{100 * run.correct.mean():.1f}" for run in runs),
            f"{runs[0].trainable:,}",
            f"{sum(run.seconds for run in runs) / len(runs):.0f}",
        )
    return table
