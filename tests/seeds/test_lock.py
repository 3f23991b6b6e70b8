"""One process at a time in a folder: the operating system's own lock is the oracle."""

from __future__ import annotations

import errno
import importlib.util
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from peft_plus import MethodError
from peft_plus.seed_runs import lock
from peft_plus.seed_runs.lock import only_one

fcntl = pytest.importorskip("fcntl")

WORKS = """
import os, sys, time
from pathlib import Path
from peft_plus.seed_runs.lock import only_one
child = 0
with only_one(Path(sys.argv[1])):
    if sys.argv[2] == "forks":
        if not (first := os.fork()):
            sys.exit()  # through the end of the block
        os.waitpid(first, 0)
        if not (child := os.fork()):
            time.sleep(300)
    print(child, flush=True)
    time.sleep(300)
"""


@contextmanager
def working(folder: Path, how: str = "alone") -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Another process that works in a folder, and one that it forked, after one that has ended."""
    child = 0
    with subprocess.Popen(
        [sys.executable, "-c", WORKS, str(folder), how], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            child = int(process.stdout.readline())
            yield process, child
        finally:
            process.kill()
            if child:
                os.kill(child, signal.SIGKILL)


def taken(folder: Path) -> bool:
    """Whether the operating system says that someone holds the lock."""
    with open(folder / ".lock", "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def test_a_second_call_is_told_who_works_there(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    says = rf"works in {folder} already \(process {os.getpid()} on host {socket.gethostname()}\): wait for it, or give"
    with only_one(folder):
        assert taken(folder)
        for _ in range(2):  # the refused one takes nothing from the first
            with pytest.raises(MethodError, match=says), only_one(folder):
                pass
        with only_one(tmp_path):  # a folder above is another one
            pass
    assert not taken(folder)


def test_an_error_lets_go_of_the_folder(tmp_path: Path) -> None:
    descriptors = len(os.listdir("/dev/fd"))
    with pytest.raises(KeyboardInterrupt), only_one(tmp_path):
        raise KeyboardInterrupt
    with only_one(tmp_path), pytest.raises(MethodError, match="already"), only_one(tmp_path):
        pass
    assert len(os.listdir("/dev/fd")) == descriptors


def test_a_process_that_was_killed_blocks_nobody(tmp_path: Path) -> None:
    with working(tmp_path) as (process, _):
        with pytest.raises(MethodError, match=rf"\(process {process.pid} on host"), only_one(tmp_path):
            pass
        process.kill()
        process.wait()
        assert str(process.pid) in (tmp_path / ".lock").read_text()  # what it wrote is there yet
        with only_one(tmp_path):
            assert str(os.getpid()) in (tmp_path / ".lock").read_text()


def test_a_forked_process_neither_lets_go_of_the_lock_nor_holds_it_on(tmp_path: Path) -> None:
    """A loader's worker outlives a parent that was killed, for some seconds or for good."""
    with working(tmp_path, "forks") as (process, child):
        assert taken(tmp_path)
        process.kill()
        process.wait()
        os.kill(child, 0)  # alive
        assert not taken(tmp_path)


def test_a_file_system_without_locks_is_told_and_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuses)
    worked = []
    with pytest.warns(UserWarning, match="knows no locks .*one process at a time") as told, only_one(tmp_path):
        worked.append(1)
    assert worked == [1]
    assert [each.filename for each in told] == [__file__]  # by whom the folder was named, so once for a call


def test_a_disk_that_fails_is_no_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", fails)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), only_one(tmp_path):
        pass


def test_windows_locks_a_byte_that_nobody_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the rules of its `locking`: from the position on, by handle, let go of when that is closed."""
    held: dict[int, int] = {}

    def locking(file: int, mode: int, count: int) -> None:
        assert (mode, count) == (2, 1)
        if held:
            raise PermissionError(errno.EACCES, "Permission denied")
        held[file] = os.lseek(file, 0, os.SEEK_CUR)

    def close(file: int, real: Any = os.close) -> None:
        held.pop(file, None)
        real(file)

    spec = importlib.util.spec_from_file_location("peft_plus.seed_runs.lock_on_windows", lock.__file__)
    assert spec is not None
    assert spec.loader is not None
    windows = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))  # type: ignore[arg-type]
    with monkeypatch.context() as patched:
        patched.setattr(sys, "platform", "win32")
        spec.loader.exec_module(windows)
    monkeypatch.setattr(os, "close", close)
    with windows.only_one(tmp_path):
        assert min(held.values()) > len((tmp_path / ".lock").read_text())
        with pytest.raises(MethodError, match=f"process {os.getpid()}"), windows.only_one(tmp_path):
            pass
    assert not held
