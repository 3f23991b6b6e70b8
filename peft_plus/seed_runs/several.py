"""Several runs, one after another or in several processes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Literal

from ..errors import MethodError
from .call import Call, Failure
from .processes import cores, in_processes
from .results import RunResult

logger = logging.getLogger(__name__)

_MEMORY_SHARE = 0.8
"""Of the free memory, that `workers="auto"` fills."""


def run_all(
    call: Call,
    numbers: Sequence[int],
    workers: int | Literal["auto"],
    keep: Callable[[RunResult], None],
    *,
    fraction: float | None = None,
) -> dict[int, str]:
    """Make runs, and keep each result at once.

    Args:
        keep: what is done with a result.
        fraction: of each run that is made.
    Returns: number → error of those that failed.
    Raises:
        MethodError: what every run would say, too.
    """
    failed: dict[int, str] = {}
    with closing(_outcomes(call, numbers, workers, fraction)) as outcomes:
        for number, outcome in outcomes:
            if isinstance(outcome, RunResult):
                keep(outcome)
            elif outcome.everywhere:
                raise MethodError(outcome.message)
            else:
                call.fail(number, outcome, failed)
    return failed


def _outcomes(
    call: Call, numbers: Sequence[int], workers: int | Literal["auto"], fraction: float | None
) -> Generator[tuple[int, RunResult | Failure]]:
    if workers == "auto":
        peak = 0
        while numbers and not peak:  # one that fails early tells nothing
            with closing(in_processes(call, numbers[:1], 1, fraction=fraction)) as alone:
                for number, outcome in alone:
                    peak = outcome.peak_bytes if isinstance(outcome, RunResult) else 0
                    yield number, outcome
            numbers = numbers[1:]
        workers = fitting(peak)
        logger.info("%d runs at a time.", workers)
    if workers > 1:
        with closing(in_processes(call, numbers, workers, fraction=fraction)) as outcomes:
            yield from outcomes
        return
    for number in numbers:
        try:
            result = call.run(number, fraction)
        except MethodError:
            raise
        except Exception as error:  # noqa: BLE001 - recorded, and told at the end
            yield number, Failure.of(error)
        else:
            yield number, result


def fitting(peak_bytes: int) -> int:
    """Processes that cores and free memory allow.

    Args:
        peak_bytes: that one of them needs.
    """
    import psutil

    return max(1, min(cores(), int(_MEMORY_SHARE * psutil.virtual_memory().available // max(1, peak_bytes))))
