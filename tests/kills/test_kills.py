"""kill -9 at random moments and at every place of a save: the run that goes on ends bit-identical to the uninterrupted.

Two processes fork all lives, one for each kind of loop. `make storm` does the same with hundreds of kills.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from . import serve
from .cases import RUNS

LOOPS = ("trainer", "session")
SEED = 11
SWEPT = {
    "killed": ("limit 1", 1),
    "disk full": ("limit 1", 5),
    "killed in a write": ("together", 1),
    "file too big": ("together", 1),
}
"""How a save ends → the case whose save does, and at which of its places: 5 is every fifth."""
TWO = "together"
COLD, LAUNCHED = 6, 2
"""Kills of whole processes, for each loop, and of launches of two, for both."""

pytestmark = pytest.mark.slow


def tasks(loop: str) -> list[serve.Task]:
    return [
        *(["storm", loop, case, 2, 1] for own, case in RUNS if own == loop),
        *(["sweep", loop, case, 10, end, every] for end, (case, every) in SWEPT.items()),
        ["storm", loop, TWO, 2, 2],
        ["cold", [[loop, "plain"]], COLD],
        *([["launch", [["trainer", TWO], ["session", TWO]], LAUNCHED]] if loop == "session" else []),
    ]


Results = dict[tuple[Any, ...], dict[str, Any]]


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.getbasetemp()
    return base.parent if base.name.startswith("popen-") else base


def results(root: Path, loop: str) -> Results:
    """What all tasks of a loop came to. Those of both loops are done once, side by side, for all pytest workers."""
    folder = root / f"kills {loop}"
    with FileLock(root / "kills.lock"):
        if not folder.is_dir():
            for process in [serve.start(root / f"kills {name}", SEED, tasks(name)) for name in LOOPS]:
                process.wait()
    file = folder / "results.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    assert len(found) == len(tasks(loop)), (folder / "output.txt").read_text(encoding="utf-8")[-4000:]
    return {_key(result): result for result in found}


def _key(result: dict[str, Any]) -> tuple[Any, ...]:
    return result["kind"], result["case"], result["end"] if result["kind"] == "sweep" else result["processes"]


@pytest.mark.parametrize(("loop", "case"), RUNS)
def test_a_killed_run_ends_as_if_nothing_had_happened(loop: str, case: str, root: Path) -> None:
    result = results(root, loop)["storm", case, 1]
    assert result["faults"] == []
    assert sum(result["kills"].values()) >= 2


@pytest.mark.parametrize("loop", LOOPS)
def test_many_were_killed_and_many_inside_a_save(loop: str, root: Path) -> None:
    kills = [result["kills"] for (kind, _, _), result in results(root, loop).items() if kind == "storm"]
    assert sum(sum(where.values()) for where in kills) >= 20
    assert sum(where.get("save", 0) for where in kills) >= 5


@pytest.mark.parametrize("end", SWEPT)
@pytest.mark.parametrize("loop", LOOPS)
def test_a_save_may_end_anywhere(loop: str, end: str, root: Path) -> None:
    """After a full disk or a kill at any of its operations, no checkpoint is lost and no half one is taken."""
    case, every = SWEPT[end]
    result = results(root, loop)["sweep", case, end]
    assert result["faults"] == []
    assert result["states"] >= (3 if end in ("killed in a write", "file too big") else 40 // every)


@pytest.mark.parametrize("loop", LOOPS)
def test_either_of_two_ranks_may_be_killed(loop: str, root: Path) -> None:
    result = results(root, loop)["storm", TWO, 2]
    assert result["faults"] == []
    assert sum(result["kills"].values()) >= 2


@pytest.mark.parametrize("loop", LOOPS)
def test_whole_processes_are_killed(loop: str, root: Path) -> None:
    result = results(root, loop)["cold", f"{loop}:plain", 1]
    assert result["faults"] == []
    assert sum(result["kills"].values()) >= COLD


def test_launches_of_two_are_killed(root: Path) -> None:
    result = results(root, "session")["launch", f"trainer:{TWO} + session:{TWO}", 2]
    assert result["faults"] == []
    assert sum(result["kills"].values()) >= LAUNCHED
