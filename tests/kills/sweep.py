"""One save, ended at each of its operations on files in turn; then a life that goes on from what is left.

The life that trains stops where the save begins and forks: each fork gets a copy of the run's folder and its save ends
at another place. Forks that leave the same files are gone on from once.
"""

from __future__ import annotations

import faulthandler
import hashlib
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .ending import differences
from .life import OUTPUT, REFUSED, SECONDS
from .operations import end_at
from .warm import Ranks, Warm, check_one_thread, report

DONE_ALL_THE_SAME = 4
"""Exit code of a save that succeeded on a full disk, since it had only to delete from there on."""


def _killed(count: int) -> Callable[[], bool]:
    return end_at(count)


def _disk_full(count: int) -> Callable[[], bool]:
    return end_at(count, disk_full=True)


def _quota(count: int) -> Callable[[], bool]:
    """No file may grow beyond a limit: the system kills inside a write, wherever that is."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python has it ignored
    return _quota_told(count)


def _quota_told(count: int) -> Callable[[], bool]:
    """The same, as an error."""
    limit = 128 * 2**count
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return lambda: False


KINDS: dict[str, tuple[Callable[[int], Callable[[], bool]], set[int]]] = {
    "killed": (_killed, {-signal.SIGKILL}),
    "disk full": (_disk_full, {REFUSED, DONE_ALL_THE_SAME}),
    "killed in a write": (_quota, {-signal.SIGXFSZ}),
    "file too big": (_quota_told, {REFUSED}),
}
"""How a save ends → what lets the process end so at its place number `count`, and with which exit codes."""


@dataclass
class Sweep:
    """What became of one save."""

    loop: str
    case: str
    at: int
    end: str
    places: int = 0
    states: int = 0
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0


def sweep(warm: Warm, loop: str, case: str, at: int, end: str, every: int = 1) -> Sweep:
    """End the save after step `at` in one of `KINDS`, at each place, or at every so manieth, and go on."""
    result, begun = Sweep(loop, case, at, end), time.monotonic()
    reference = warm.reference(loop, case)
    folder = reference.with_name(f"sweep {at} {end}")
    first = Ranks(warm.life(loop, case, watch=_forks(at, every, *KINDS[end])), folder / "first")
    first.wait()
    if first.codes[0] != 0:
        result.faults.append(f"no sweep: {report(folder / 'first')}")
    ends = sorted((path for path in folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    result.places = len(ends)
    seen: set[str] = set()
    for place in ends:
        state = _state(place / OUTPUT)
        if state not in seen:
            seen.add(state)
            Ranks(warm.life(loop, case), place).wait()
            result.faults += [f"{place}: {fault}" for fault in differences(place, reference)]
    result.states = len(seen)
    if not result.faults:
        shutil.rmtree(folder)
    result.seconds = time.monotonic() - begun
    return result


def _forks(
    at: int, every: int, arm: Callable[[int], Callable[[], bool]], codes: set[int]
) -> Callable[[str, int], None]:
    """Called at each event of the life that trains; returns in each of its forks, to let the save go on there."""
    ended: Callable[[], bool] | None = None

    def watch(event: str, number: int) -> None:
        nonlocal ended
        if event == "saved" and ended is not None:
            os._exit(DONE_ALL_THE_SAME if ended() else 0)
        if (event, number) != ("save", at):
            return
        faulthandler.cancel_dump_traceback_later()  # it has a thread
        check_one_thread()
        here = Path.cwd()
        for count in range(1, 10_000, every):
            place = here.parent / str(count)
            shutil.copytree(here, place)
            pid = os.fork()
            if not pid:
                os.chdir(place)
                faulthandler.dump_traceback_later(SECONDS, exit=True)
                ended = arm(count)
                return
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if code == 0:  # it has fewer places
                shutil.rmtree(place)
                os._exit(0)
            if code not in codes:
                raise RuntimeError(f"{place}: the save ended with exit code {code} instead of {codes}")

    return watch


def _state(folder: Path) -> str:
    """A digest of the names and contents of all files."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        digest.update(f"{path.relative_to(folder)} {content}\n".encode())
    return digest.hexdigest()
