"""Whole processes, started as a user starts them and killed while they import, train or save.

With two processes they are started by `accelerate launch`; a rank is killed, both are, or the launcher is.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .campaign import POLL, Moment, Result, campaign, doing, reached
from .ending import differences, lives

ROOT = Path(__file__).resolve().parent.parent.parent
LAUNCHER = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
IMPORTS = 5.0
"""Seconds in which a process that is killed early still imports."""
WHILE_IMPORTING = 0.15
"""How often."""


class Process:
    """One life of runs that follow each other, in the folders `folder/LOOP:CASE`, as a process or a launch of two.

    Args:
        folder: with the saved base in `base`.
        runs: `LOOP:CASE` each.
        processes: 2 for a launch.
    """

    def __init__(self, folder: Path, runs: list[str], processes: int = 1) -> None:
        self.folder = folder
        command = [sys.executable, *(LAUNCHER if processes > 1 else ()), "-m", "tests.kills.life", str(folder), *runs]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}
        with (folder / "output.txt").open("ab") as output:
            self._first = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def ended(self) -> bool:
        return self._first.poll() is not None

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it ended in time."""
        try:
            self._first.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self, pid: int | None = None) -> None:
        """kill -9: by default the process itself, which is the launcher where there is one."""
        try:
            os.kill(self._first.pid if pid is None else pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def kill_all(self) -> None:
        """Leave nothing behind, whoever has lost its parent."""
        while found := self.all():
            for pid in found:
                self.kill(pid)
            time.sleep(0.05)
        self._first.wait()

    def all(self) -> list[int]:
        """Every process of this life: its command names the folder."""
        mark = os.fsencode(self.folder) + b"\0"
        found: list[int] = []
        for place in Path("/proc").iterdir():
            try:
                if place.name.isdigit() and mark in (place / "cmdline").read_bytes():
                    found.append(int(place.name))
            except OSError:  # it ended meanwhile
                continue
        return found


def cold_storm(
    root: Path, references: list[Path], runs: list[str], kills: int, draw: random.Random, processes: int = 1
) -> Result:
    """Run processes again and again until so many were killed.

    Args:
        root: where to work; holds `base`.
        references: the folder of the uninterrupted run, for each of `runs`.
        runs: `LOOP:CASE` each; a process trains one after the other.
        kills: how many.
    """

    def begin(_: int) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="cold-", dir=root))
        shutil.copytree(root / "base", folder / "base")
        return folder

    def compare(folder: Path) -> list[str]:
        return [
            f"{folder / run}, rank {rank}: {fault}"
            for run, reference in zip(runs, references, strict=True)
            for rank in range(processes)
            for fault in differences(folder / run, reference, rank)
        ]

    return campaign(
        Result("cold", " + ".join(runs), processes),
        kills,
        begin,
        lambda folder, to_kill: _one_life(folder, runs, processes, draw if to_kill else None),
        compare,
    )


def _one_life(folder: Path, runs: list[str], processes: int, draw: random.Random | None) -> str | None:
    """What it was doing when it was killed; None if it ended by itself."""
    run = draw.choice(runs) if draw else runs[-1]
    watched = draw.randrange(processes) if draw else 0
    log = folder / run / f"log.{watched}.txt"
    before = len(lives(log))
    process = Process(folder, runs, processes)
    try:
        if draw is None:
            process.wait()
            return None
        moment = Moment.draw(draw)
        if draw.random() < WHILE_IMPORTING:
            process.wait(draw.random() * IMPORTS)
        else:
            while not process.ended() and not reached(log, before, moment):
                time.sleep(POLL)
            time.sleep(moment.fraction * 0.1)
        if process.ended():
            return None
        begun = lives(log)[before:]
        what = draw.choice(["launcher", "rank", "all"]) if processes > 1 and begun else "launcher"
        if what == "launcher":
            process.kill()
        elif what == "rank":
            process.kill(begun[0][0][2])
        else:
            process.kill_all()
        process.wait(draw.random() * 5)  # what is left goes on, or notices
        return doing(log, before)
    finally:
        process.kill_all()
