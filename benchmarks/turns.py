"""Loops that take turns, one optimizer step each, so that a busy machine is busy for all of them alike.

Each loop runs in a thread of its own, of which only one works at a time. A step of one loop is compared with the step
of the other beside it; a median over many such pairs tells differences far below what single runs scatter by. Who goes
first changes from round to round, since a step finds in the caches what the step before it left there.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Turn = Callable[[], None]
Loop = Callable[[Turn], None]
"""A loop calls `turn()` at the start of each of its steps, and once after the last."""


@dataclass(frozen=True)
class Laps:
    """What each step took, in seconds: of this thread's processor time, and by the clock."""

    cpu: np.ndarray
    wall: np.ndarray


class _Players:
    """Whose turn it is."""

    def __init__(self, number: int) -> None:
        self._condition = threading.Condition()
        self._playing = list(range(number))
        self._left = list(self._playing)  # of this round, in order
        self.failure: BaseException | None = None

    def wait(self, player: int) -> None:
        with self._condition:
            self._condition.wait_for(lambda: self.failure is not None or self._left[0] == player)
        if self.failure is not None:
            raise _Stopped

    def pass_on(self) -> None:
        with self._condition:
            self._left.pop(0)
            self._next_round()
            self._condition.notify_all()

    def leave(self, player: int, failure: BaseException | None) -> None:
        with self._condition:
            self.failure = self.failure or failure
            self._playing.remove(player)
            if player in self._left:
                self._left.remove(player)
            self._next_round()
            self._condition.notify_all()

    def _next_round(self) -> None:
        if not self._left:
            self._playing.reverse()
            self._left = list(self._playing)


class _Stopped(Exception):
    """Another loop failed."""


def take_turns(loops: Mapping[str, Loop], *, warm_up: int = 3) -> dict[str, Laps]:
    """Run all loops to their ends, step by step in turn, each on one torch thread.

    Args:
        loops: name → loop; all of the same number of steps.
        warm_up: how many first steps do not count.
    Returns: name → its laps, shape (steps - warm_up,) each.
    """
    players = _Players(len(loops))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in loops}

    def play(player: int, name: str, loop: Loop) -> None:
        import torch

        started: tuple[float, float] | None = None

        def turn() -> None:
            nonlocal started
            if started is not None:
                times[name].append((time.thread_time() - started[0], time.perf_counter() - started[1]))
            players.pass_on()
            players.wait(player)
            started = time.thread_time(), time.perf_counter()

        failure: BaseException | None = None
        try:
            players.wait(player)
            torch.set_num_threads(1)
            _stay_on_one_core()
            loop(turn)
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001  # raised below, in the thread that called
            failure = error
        players.leave(player, failure)

    threads = [
        threading.Thread(target=play, args=(player, name, loop), daemon=True)
        for player, (name, loop) in enumerate(loops.items())
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if players.failure is not None:
        raise players.failure
    laps = {name: np.array(of_one[warm_up:]).reshape(-1, 2) for name, of_one in times.items()}
    return {name: Laps(lap[:, 0], lap[:, 1]) for name, lap in laps.items()}


def take_turns_both_ways(loops: Mapping[str, Loop], *, warm_up: int = 3) -> dict[str, Laps]:
    """`take_turns` twice, with the loops made in either order, since memory is laid out in the order it is asked for.

    Returns: name → the laps of both, shape (2 · (steps - warm_up),) each; pairs stay pairs.
    """
    first, second = take_turns(loops, warm_up=warm_up), take_turns(dict(reversed(loops.items())), warm_up=warm_up)
    return {
        name: Laps(
            np.concatenate([first[name].cpu, second[name].cpu]), np.concatenate([first[name].wall, second[name].wall])
        )
        for name in loops
    }


def _stay_on_one_core() -> None:
    """All loops on the same one, since others may be busier or slower."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # of this thread alone


@dataclass(frozen=True)
class Difference:
    """How much longer a step of one loop takes than one of another, as medians over pairs of steps.

    Attributes:
        step: of the other loop, in seconds.
        more: seconds more; `low` and `high` are its quartiles.
        share: `more` / `step`.
        pairs: how many.
    """

    step: float
    more: float
    low: float
    high: float
    share: float
    pairs: int


def difference(ours: np.ndarray, theirs: np.ndarray) -> Difference:
    """Compare laps pair by pair."""
    low, more, high = np.percentile(ours - theirs, [25, 50, 75])
    step = float(np.median(theirs))
    return Difference(step, float(more), float(low), float(high), float(more) / step, len(ours))
