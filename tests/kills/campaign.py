"""Kill, go on, kill again, go on, compare: what whole processes and forked ones have in common."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .ending import lives

EVENTS = {"begin": 0.15, "step": 0.3, "save": 0.45, "saved": 0.1}
"""After which event of a life to kill, and how often: most bugs are where a checkpoint is being written."""

KILLS_PER_RUN = 4
POLL = 0.0005


@dataclass(frozen=True)
class Moment:
    """When to kill: after the event of this kind that is number `count` of a life, by so much of what follows it."""

    event: str
    count: int
    fraction: float

    @classmethod
    def draw(cls, draw: random.Random) -> Moment:
        event = draw.choices(list(EVENTS), list(EVENTS.values()))[0]
        return cls(event, 1 if event == "begin" else draw.randint(1, 4), draw.random())


def reached(log: Path, life: int, moment: Moment) -> bool:
    """Whether the life number `life` of a log had its moment's event."""
    found = lives(log)[life:]
    return bool(found) and sum(event == moment.event for _, event, _, _ in found[0]) >= moment.count


def doing(log: Path, life: int) -> str:
    """What a killed life was doing: `start`, `step` or `save`."""
    found = lives(log)[life:]
    events = [event for _, event, _, _ in found[0]] if found else []
    return "save" if events[-1:] == ["save"] else "step" if "step" in events else "start"


@dataclass
class Result:
    """What became of a case.

    Attributes:
        kills: what a life was doing → how many were killed then.
        faults: what differs from the uninterrupted run; nothing should.
    """

    loop: str
    case: str
    processes: int = 1
    runs: int = 0
    lives: int = 0
    kills: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0


def campaign(
    result: Result,
    kills: int,
    folder_of: Callable[[int], Path],
    one_life: Callable[[Path, bool], str | None],
    compare: Callable[[Path], list[str]],
) -> Result:
    """Begin run after run, until so many lives were killed, or a run ended elsewhere. Its last life is let be.

    Args:
        result: is filled in.
        kills: how many.
        folder_of: number of a run → its folder.
        one_life: lives in a folder; is told whether to be killed, and tells what it was doing then. None: it was not.
        compare: the faults of the run in a folder.
    """
    begun = time.monotonic()
    while sum(result.kills.values()) < kills and not result.faults:
        folder = folder_of(result.runs)
        result.runs += 1
        for left in range(min(KILLS_PER_RUN, kills - sum(result.kills.values())), -1, -1):
            result.lives += 1
            where = one_life(folder, left > 0)
            if where is None:
                break
            result.kills[where] = result.kills.get(where, 0) + 1
        result.faults += compare(folder)
        if not result.faults:
            shutil.rmtree(folder)
    result.seconds = time.monotonic() - begun
    return result
