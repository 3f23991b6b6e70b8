"""Several runs, one after another or in several processes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from typing import Literal

from ..errors import MethodError
from .call import Call
from .results import RunResult

logger = logging.getLogger(__name__)

_ATTEMPTS = 2
"""How often a run is tried whose process dies: it may have died for a neighbour's sake."""
_MEMORY_SHARE = 0.8
"""Of the free memory, that `workers="auto"` fills."""


def run_all(
    call: Call,
    numbers: list[int],
    done: dict[int, RunResult],
    workers: int | Literal["auto"],
    *,
    fraction: float | None = None,
    keep: Callable[[RunResult], None] | None = None,
) -> dict[int, str]:
    """Make runs, and keep each result at once.

    Args:
        fraction: of each run that is made.
        keep: what is done with a result; by default it is final.
    Returns: number → error of those that failed.
    """

    kept = keep or (lambda result: call.keep(result, done))
    failed: dict[int, str] = {}
    if workers == 1 or len(numbers) < 2:
        for number in numbers:
            try:
                result = call.run(number, fraction)
            except MethodError:
                raise  # every run would say the same
            except Exception as error:  # noqa: BLE001 - recorded, and told at the end
                call.fail(number, error, failed)
            else:
                kept(result)
        return failed
    if workers == "auto":
        first = in_processes(call, numbers[:1], 1, fraction, kept, failed)
        numbers, workers = numbers[1:], _fitting(first.peak_bytes if first else 0)
        logger.info("%d runs at a time.", workers)
    in_processes(call, numbers, workers, fraction, kept, failed)
    return failed


def _fitting(peak_bytes: int) -> int:
    """Processes that cores and free memory allow."""
    import psutil

    cores = _cores()
    if not peak_bytes:
        return cores
    return max(1, min(cores, int(_MEMORY_SHARE * psutil.virtual_memory().available // peak_bytes)))


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(
    call: Call,
    numbers: list[int],
    workers: int,
    fraction: float | None,
    kept: Callable[[RunResult], None],
    failed: dict[int, str],
) -> RunResult | None:
    """Make runs in several processes. A process that dies takes no result with it. Returns: the last result."""
    cores = _cores()
    call = replace(call, threads=max(1, cores // workers))
    waiting, tried, last = list(numbers), dict.fromkeys(numbers, 0), None
    while waiting:
        with ProcessPoolExecutor(max_workers=workers, mp_context=get_context("spawn")) as pool:
            under_way: dict[Future[RunResult], int] = {}
            broken: BrokenProcessPool | None = None
            while (waiting and broken is None) or under_way:
                while waiting and len(under_way) < workers and broken is None:
                    number = waiting.pop(0)
                    tried[number] += 1
                    try:
                        under_way[pool.submit(call.run, number, fraction)] = number
                    except BrokenProcessPool as error:
                        broken = error
                        waiting.insert(0, number)
                        tried[number] -= 1
                finished, _ = wait(under_way, return_when=FIRST_COMPLETED)
                for future in finished:
                    number = under_way.pop(future)
                    try:
                        last = future.result()
                    except BrokenProcessPool as error:
                        broken = error
                        if tried[number] < _ATTEMPTS:
                            waiting.append(number)
                        else:
                            call.fail(number, error, failed)
                    except MethodError:
                        pool.shutdown(wait=False, cancel_futures=True)
                        raise
                    except Exception as error:  # noqa: BLE001 - recorded, and told at the end
                        call.fail(number, error, failed)
                    else:
                        kept(last)
    return last
