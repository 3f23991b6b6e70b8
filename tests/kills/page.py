"""docs/storm.md: what a storm came to, as it tells it itself."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

Result = dict[str, Any]

WHERE = ("start", "step", "save")
STARTED = {"storm": "", "cold": ", started anew", "launch": ", `accelerate launch`"}
LIBRARIES = ("peft-plus", "peft", "transformers", "accelerate", "torch", "bitsandbytes")

INTRODUCTION = """\
# The storm

Written on {date} by `make storm KILLS={kills} SEED={seed}`.

Each run is killed with `kill -9` again and again, and goes on from its newest whole checkpoint each time. Then it is
compared with the same run that nobody killed, to the last bit: all weights and buffers, the state of optimizer,
scheduler and plugins, the timeline, and the loss of every step of every life. Dropout is on everywhere.

**{killed} kills** in {lives} lives of {runs} runs: {start} before the first step of a life, {step} between saves,
{save} inside a save. **{verdict}**
"""

TABLE = """\
| loop | run | processes | runs | lives | kills: at the start | between saves | in a save | end |
|---|---|---|--:|--:|--:|--:|--:|---|"""

SWEEPS = """\
Processes without a remark are forked from one that has imported everything; the others are killed while they import,
too. Of two processes one is killed, or both, or their launcher.

## One save, ended everywhere

A save ends at each of its operations on files in turn (what Python writes is empty, half or whole then), and another
life goes on from what is left; where two ends leave the same files, once. *killed in a write*: by the system, at a
limit of the size of a file, which grows until the save succeeds. *disk full* and *file too big*: the save must raise
CheckpointError, and the run goes on once there is room.

| loop | run | save after step | ends by | places | different remains | end |
|---|---|--:|---|--:|--:|---|"""


def page(results: Sequence[Result], *, kills: int, seed: int, seconds: float) -> str:
    """The page, in Markdown.

    Args:
        results: as `tests.kills.serve` writes them.
        kills, seed: what was asked for.
        seconds: how long it took.
    """
    storms = [result for result in results if result["kind"] != "sweep"]
    sweeps = [result for result in results if result["kind"] == "sweep"]
    where = {name: sum(result["kills"].get(name, 0) for result in storms) for name in WHERE}
    wrong = sum(bool(result["faults"]) for result in results)
    introduction = INTRODUCTION.format(
        date=f"{datetime.now(timezone.utc):%Y-%m-%d}",
        kills=kills,
        seed=seed,
        killed=sum(where.values()),
        lives=sum(result["lives"] for result in storms),
        runs=sum(result["runs"] for result in storms),
        verdict=f"{wrong} of {len(results)} rows went wrong." if wrong else "Every run ended bit-identical.",
        **where,
    )
    machine = f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}"
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    lines = [introduction, TABLE, *map(_storm, storms), "", SWEEPS, *map(_sweep, sweeps)]
    return "\n".join([*lines, "", f"{seconds:.0f} seconds on {machine}, {versions}.", ""])


def _storm(result: Result) -> str:
    runs = [run.split(":") for run in result["case"].split(" + ")] if STARTED[result["kind"]] else None
    loop, case = (" + ".join(part) for part in zip(*runs, strict=True)) if runs else (result["loop"], result["case"])
    counts = (result["kills"].get(name, 0) for name in WHERE)
    started = f"{result['processes']}{STARTED[result['kind']]}"
    return _row(loop, case, started, result["runs"], result["lives"], *counts, verdict(result))


def _sweep(result: Result) -> str:
    cells = (result[name] for name in ("loop", "case", "at", "end", "places", "states"))
    return _row(*cells, verdict(result))


def _row(*cells: Any) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def verdict(result: Result) -> str:
    """`identical`, or what was found first."""
    return next(_short(result["faults"]), "identical")


def _short(faults: Sequence[str]) -> Iterator[str]:
    for fault in faults:
        yield f"**{' '.join(fault.replace('|', '/').split())[:200]}**"
