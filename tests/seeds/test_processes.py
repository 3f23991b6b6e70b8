"""Runs in processes of their own: one that dies takes nothing along, and none stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from peft_plus.seed_runs import processes, several
from peft_plus.seed_runs.call import Failure
from peft_plus.seed_runs.processes import cores, in_processes
from peft_plus.seed_runs.results import RunResult
from tests.seeds.told_runs import living

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow  # a process takes seconds to import torch


def until(condition: Callable[[], Any], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def test_a_process_that_dies_is_one_failed_run_and_no_neighbour_begins_again(tmp_path: Path) -> None:
    call = living(tmp_path, killed=1, seconds=1.0)
    found = dict(in_processes(call, [0, 1, 2, 3], 2))
    failure = found.pop(1)
    assert isinstance(failure, Failure)
    assert "exit code -9" in failure.message
    assert all(isinstance(result, RunResult) for result in found.values())
    assert sorted(found) == [0, 2, 3]
    assert [call.attempts(number) for number in range(4)] == [1, 2, 1, 1]


def test_a_process_makes_one_run_after_another(tmp_path: Path) -> None:
    found = dict(in_processes(living(tmp_path), [4, 5, 6], 1, fraction=0.25))
    pids = {result.metrics["pid"] for result in found.values() if isinstance(result, RunResult)}
    assert len(pids) == 1
    assert os.getpid() not in pids
    assert all(result.metrics["fraction"] == 0.25 for result in found.values() if isinstance(result, RunResult))
    assert until(lambda: not psutil.pid_exists(int(pids.pop())))


def test_processes_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = dict(in_processes(living(tmp_path), [0, 1], cores()))
    assert {result.metrics["threads"] for result in found.values() if isinstance(result, RunResult)} == {1}


def test_each_process_sees_a_gpu_of_its_own_and_its_successor_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Trainer that sees several would split each batch over them."""
    monkeypatch.setattr(processes, "devices", lambda: ["3", "5"])
    found = dict(in_processes(living(tmp_path, killed=1, seconds=1.0), [0, 1, 2, 3], 2))
    seen = [result.metrics["gpu"] for result in found.values() if isinstance(result, RunResult)]
    assert set(seen) == {3, 5}


def test_closing_ends_all_runs_at_once(tmp_path: Path) -> None:
    call = living(tmp_path, killed=0, seconds=600)
    with closing(in_processes(call, [0, 1], 2)) as outcomes:
        number, _ = next(outcomes)
    assert number == 0
    (own,) = tmp_path.glob("attempt-1-*")
    assert not psutil.pid_exists(int(own.read_text()))


SCRIPT = """
import signal
import sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
from peft_plus.seed_runs.several import run_all
from tests.seeds.told_runs import living, nothing
from peft_plus import seeds

def own(seeds):
    return None

{body}
"""


@contextmanager
def script(folder: Path, body: str) -> Iterator[subprocess.Popen[str]]:
    """A script that runs, and never outlives the test."""
    file = folder / "script.py"
    file.write_text(SCRIPT.format(body=body))
    process = subprocess.Popen(
        [sys.executable, str(file)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_no_process_goes_on_when_the_one_that_began_it_is_killed(tmp_path: Path) -> None:
    body = "if __name__ == '__main__':\n    run_all(living(Path('out'), seconds=600), [0, 1], 2, print)"
    with script(tmp_path, body) as parent:
        assert until(lambda: len(list((tmp_path / "out").glob("attempt-*"))) == 2)
        assert until(lambda: all(file.read_text() for file in (tmp_path / "out").glob("attempt-*")))
        pids = [int(file.read_text()) for file in (tmp_path / "out").glob("attempt-*")]
        assert all(psutil.pid_exists(pid) for pid in pids)
        parent.send_signal(signal.SIGKILL)
    assert until(lambda: not any(psutil.pid_exists(pid) for pid in pids), 10)


def test_an_interruption_ends_all_runs_at_once(tmp_path: Path) -> None:
    body = "if __name__ == '__main__':\n    run_all(living(Path('out'), seconds=600), [0, 1], 2, print)"
    with script(tmp_path, body) as parent:
        assert until(lambda: len(list((tmp_path / "out").glob("attempt-*"))) == 2)
        parent.send_signal(signal.SIGINT)
        out, _ = parent.communicate(timeout=60)
    assert "KeyboardInterrupt" in out
    assert not [file for file in (tmp_path / "out").glob("attempt-*") if psutil.pid_exists(int(file.read_text()))]


def test_a_script_without_a_main_guard_is_told(tmp_path: Path) -> None:
    with script(tmp_path, "run_all(living(Path('out')), [0, 1], 2, print)") as parent:
        out, _ = parent.communicate(timeout=120)
    assert parent.returncode == 1
    assert 'below `if __name__ == "__main__":`' in out
    assert not list((tmp_path / "out").glob("attempt-*"))


def test_a_factory_that_another_process_cannot_find_is_told(tmp_path: Path) -> None:
    """One of a session that has no file, as in a notebook."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(body="seeds(own, 2, out='out', workers=2)")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "another process cannot find the factory" in done.stderr
    assert "top level of a module" in done.stderr


def test_as_many_processes_as_memory_and_cores_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 10_000

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    monkeypatch.setattr(several, "cores", lambda: 6)
    assert several.fitting(2_000) == 4  # 8,000 of them
    assert several.fitting(20_000) == 1
    assert several.fitting(10) == 6
    assert cores() >= 1
