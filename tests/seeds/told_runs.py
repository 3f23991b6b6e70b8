"""Calls whose runs are not trained but told: what `race`, `halve` and the processes make of them is quick to see."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from peft_plus.seed_runs.call import Call
from peft_plus.seed_runs.results import RunResult

STEPS = 10


def nothing(seeds: Any) -> Any:
    raise AssertionError("no run of these is trained")


@dataclass(frozen=True, kw_only=True)
class Told(Call):
    """Gives each run's accuracy where it is judged and at its end, and notes who asked.

    Attributes:
        early, final: run → accuracy.
        failing: runs that raise.
        asked: (run, fraction), in order.
    """

    early: Mapping[int, float]
    final: Mapping[int, float]
    failing: set[int] = field(default_factory=set)
    asked: list[tuple[int, float | None]] = field(default_factory=list)

    def run(self, number: int, fraction: float | None = None, callbacks: Iterable[Any] = ()) -> RunResult:
        self.asked.append((number, fraction))
        if number in self.failing:
            raise RuntimeError("no luck")
        whole = fraction is None
        steps = STEPS if whole else round(fraction * STEPS)
        values = self.final if whole else self.early
        return RunResult(
            number=number,
            seeds={},
            metrics={"eval_accuracy": values[number]},
            steps=steps,
            max_steps=STEPS,
            resumed=3 if whole else 0,
            finished=whole,
            seconds=7.0 if whole else 3.0,
            cpu_seconds=7.0 if whole else 3.0,
        )


def told(out: Path, **settings: Any) -> Told:
    out.mkdir(parents=True, exist_ok=True)
    common = {
        "factory": nothing,
        "out": out,
        "base": 0,
        "vary": ("init",),
        "metric": "accuracy",
        "greater_is_better": True,
        "evaluate": None,
    }
    return Told(**{**common, **settings})


@dataclass(frozen=True, kw_only=True)
class Living(Call):
    """Notes each attempt in a file of its own, with its process, and waits.

    Attributes:
        killed: the run whose process is killed.
    """

    killed: int | None = None
    seconds: float = 0.0

    def run(self, number: int, fraction: float | None = None, callbacks: Iterable[Any] = ()) -> RunResult:
        (self.out / f"attempt-{number}-{time.monotonic_ns()}").write_text(str(os.getpid()))
        if number == self.killed:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        told = {"pid": os.getpid(), "threads": torch.get_num_threads(), "fraction": fraction or 1.0}
        told["gpu"] = int(os.environ.get("CUDA_VISIBLE_DEVICES") or -1)
        return RunResult(number=number, seeds={}, metrics=told, peak_bytes=1)

    def attempts(self, number: int) -> int:
        return len(list(self.out.glob(f"attempt-{number}-*")))


def living(out: Path, **settings: Any) -> Living:
    out.mkdir(parents=True, exist_ok=True)
    common = {
        "factory": nothing,
        "out": out,
        "base": 0,
        "vary": ("init",),
        "metric": "pid",
        "greater_is_better": True,
        "evaluate": None,
    }
    return Living(**{**common, **settings})
