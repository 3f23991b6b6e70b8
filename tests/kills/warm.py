"""Lives that cost no start: a process that has imported everything forks them, and kills them at random moments.

The parent never trains, so it has one thread and may fork. With two processes both ranks are forked, and one of them or
both are killed.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from .campaign import POLL, Moment, Result, campaign, doing, reached
from .cases import CASES
from .ending import differences, lives
from .life import built, explained, live, save_base


class Ranks:
    """The processes of one life, in one folder.

    Args:
        work: what each does.
        folder: their current folder.
        processes: how many, each a rank of one gloo group.
    """

    def __init__(self, work: Callable[[], None], folder: Path, processes: int = 1) -> None:
        check_one_thread()
        self.codes: dict[int, int] = {}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "store").unlink(missing_ok=True)
        self._pids = [_fork(work, folder, rank, processes) for rank in range(processes)]

    def running(self) -> list[int]:
        """The ranks that have not ended."""
        for rank, pid in enumerate(self._pids):
            if rank not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return [rank for rank in range(len(self._pids)) if rank not in self.codes]

    def kill(self, ranks: list[int]) -> None:
        """kill -9, with their data workers."""
        for rank in ranks:
            os.killpg(self._pids[rank], signal.SIGKILL)

    def wait(self, seconds: float = float("inf")) -> bool:
        """Whether all ended in time."""
        end = time.monotonic() + seconds
        while self.running():
            if time.monotonic() > end:
                return False
            time.sleep(POLL)
        return True


def check_one_thread() -> None:
    """Before a fork, which copies the memory of other threads, but not the threads."""
    end = time.monotonic() + 5
    while (threads := len(os.listdir("/proc/self/task"))) != 1:  # one that was joined may be seen for a while
        if time.monotonic() > end:
            raise RuntimeError(f"{threads} threads run here; to fork, there must be one")
        time.sleep(POLL)


def _fork(work: Callable[[], None], folder: Path, rank: int, processes: int) -> int:
    pid = os.fork()
    with contextlib.suppress(PermissionError, ProcessLookupError):  # done, or ended, by the other of the two
        os.setpgid(pid, pid)  # a group of its own, in both processes: whoever is first
    if pid:
        return pid
    os.chdir(folder)
    with open(f"output.{rank}.txt", "a", encoding="utf-8") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)

    def all_of_it() -> None:
        if processes > 1:
            os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
            os.environ |= {"WORLD_SIZE": f"{processes}", "LOCAL_WORLD_SIZE": f"{processes}"}
            store = f"file://{os.path.abspath('store')}"  # no port that somebody else could take
            torch.distributed.init_process_group("gloo", store, rank=rank, world_size=processes)
        work()

    code = explained(all_of_it, rank)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Warm:
    """Runs with kills, in folders below `root`."""

    def __init__(self, root: Path, draw: random.Random) -> None:
        self._root, self._draw = root, draw
        self._gaps: dict[Path, dict[str, float]] = {}

        Ranks(lambda: save_base(root / "base"), root / "making base").wait()
        self._warm_up()

    def _warm_up(self) -> None:
        """Import here what a life imports late, so that no later one has to."""
        for loop, case in (("trainer", "together"), ("session", "nf4")):
            folder = self._root / "warming up" / loop
            life = self.life(loop, case)

            def first(life: Callable[[], None] = life) -> None:
                life()
                Path("modules.txt").write_text("\n".join(sys.modules), encoding="utf-8")

            ranks = Ranks(first, folder)
            ranks.wait()
            if ranks.codes[0] != 0:
                raise RuntimeError(f"The first life failed: {report(folder)}")
            for name in (folder / "modules.txt").read_text(encoding="utf-8").split("\n"):
                if name not in sys.modules and not name.startswith("__"):
                    importlib.import_module(name)
        built(CASES["plain"], self._root)  # fills transformers' and PEFT's own tables
        gc.freeze()  # a life's garbage collector need not look at what is here

    def life(self, loop: str, case: str, processes: int = 1, **options: Any) -> Callable[[], None]:
        return lambda: live(loop, case, self._root / "base", **options)

    def reference(self, loop: str, case: str, processes: int = 1) -> Path:
        """The folder of the uninterrupted run."""
        folder = self._root / f"{loop} × {processes}" / case / "uninterrupted"
        if not folder.is_dir():
            ranks = Ranks(self.life(loop, case), folder, processes)
            ranks.wait()
            if set(ranks.codes.values()) != {0}:
                raise RuntimeError(f"The uninterrupted run failed: {report(folder)}")
        return folder

    def storm(self, loop: str, case: str, kills: int, processes: int = 1) -> Result:
        """Run the case again and again until so many of its lives were killed."""
        reference = self.reference(loop, case, processes)

        def compare(folder: Path) -> list[str]:
            found = {rank: differences(folder, reference, rank) for rank in range(processes)}
            return [f"{folder}, rank {rank}: {fault}" for rank, faults in found.items() for fault in faults]

        return campaign(
            Result(loop, case, processes),
            kills,
            lambda number: reference.with_name(f"run {number}"),
            lambda folder, to_kill: self._one_life(loop, case, processes, folder, to_kill),
            compare,
        )

    def _one_life(self, loop: str, case: str, processes: int, folder: Path, to_kill: bool) -> str | None:
        """What it was doing when it was killed; None if it ended by itself."""
        before = [len(lives(folder / f"log.{rank}.txt")) for rank in range(processes)]
        ranks = Ranks(self.life(loop, case), folder, processes)
        if not to_kill:
            ranks.wait()
            return None
        victims = self._draw.choice([[0], [1], [0, 1]]) if processes > 1 else [0]
        watched, moment = victims[0], Moment.draw(self._draw)
        log = folder / f"log.{watched}.txt"
        while watched in ranks.running() and not reached(log, before[watched], moment):
            time.sleep(POLL)
        time.sleep(moment.fraction * self._gap(loop, case, processes, moment.event))
        victims = [rank for rank in ranks.running() if rank in victims]
        ranks.kill(victims)
        if not ranks.wait(self._draw.random()):  # the others wait for it, or find that it is gone
            ranks.kill(ranks.running())
            ranks.wait()
        if -signal.SIGKILL not in ranks.codes.values():
            return None
        return doing(log, before[watched])

    def _gap(self, loop: str, case: str, processes: int, event: str) -> float:
        """The mean time from such an event to the next one, in seconds."""
        reference = self.reference(loop, case, processes)
        if reference not in self._gaps:
            lines = lives(reference / "log.0.txt")[0]
            gaps: dict[str, list[float]] = {}
            for line, after in pairwise(lines):
                gaps.setdefault(line[1], []).append(after[0] - line[0])
            self._gaps[reference] = {name: sum(times) / len(times) for name, times in gaps.items()}
        return self._gaps[reference].get(event, 0.0)


def report(folder: Path) -> str:
    """What the lives in a folder wrote, from its end."""
    return "\n".join(path.read_text(encoding="utf-8")[-2000:] for path in sorted(folder.glob("*r.*.txt")))
