"""What all runs of one call have in common, and what becomes of each: kept, or recorded as failed."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import MethodError
from .axis import Axis, seeds_of
from .one_run import Evaluate, Factory, clear, run_once
from .results import RunResult, error_file, keep_result, value_of, write_whole

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Call:
    """What all runs of a call have in common; goes to other processes.

    Attributes:
        factory, out, base, vary, metric, greater_is_better, evaluate: as for `seeds`.
        exact: whether runs are stopped and must go on bit by bit.
        common: the folder that runs share; `shared` in `out` by default.
    """

    factory: Factory
    out: Path
    base: int
    vary: tuple[Axis, ...]
    metric: str
    greater_is_better: bool
    evaluate: Evaluate | None
    exact: bool = False
    common: Path | None = None

    def run(self, number: int, fraction: float | None = None, callbacks: Iterable[Any] = ()) -> RunResult:
        """Make run `number`, to its end, or from its start to a fraction of it."""
        from .callbacks import StopAtFraction

        shared = self.common or self.out / "shared"
        for folder in (self.out, shared):
            folder.mkdir(parents=True, exist_ok=True)
        own = seeds_of(number, base=self.base, vary=self.vary, shared=shared)
        stop = None if fraction is None else StopAtFraction(fraction)
        result = run_once(
            self.factory,
            own,
            self.folder(number),
            evaluate=self.evaluate,
            callbacks=[*callbacks, *([] if stop is None else [stop])],
            resume=fraction is None,  # to be judged at the very step, which a checkpoint may lie beyond
            exact=self.exact,
        )
        return replace(result, finished=stop is None or not stop.stopped)

    def folder(self, number: int) -> Path:
        """Where the run works."""
        return self.out / f"run-{number}"

    def keep(self, result: RunResult, done: dict[int, RunResult]) -> None:
        """Keep a final result at once, and drop what the run needed to be taken up again.

        Raises:
            CallError: the metric that counts is not in it. It is kept nevertheless.
        """
        keep_result(self.out, result)
        done[result.number] = result
        error_file(self.out, result.number).unlink(missing_ok=True)
        clear(self.folder(result.number))
        if result.diverged:
            logger.warning("Run %d diverged, and counts as failed: %s", result.number, result.diverged)
            return
        value = value_of(result, self.metric)
        logger.info(
            "Run %d: %s %.4g, %d steps, %.0f s.", result.number, self.metric, value, result.steps, result.seconds
        )

    def fail(self, number: int, failure: Failure, failed: dict[int, str]) -> None:
        """Record that a run failed."""
        write_whole(error_file(self.out, number), failure.traceback)
        failed[number] = failure.message
        logger.error("Run %d failed: %s", number, failure.message)


@dataclass(frozen=True)
class Failure:
    """What a run that failed says; goes from one process to another.

    Attributes:
        message: one line.
        traceback: all of it.
        everywhere: a MethodError, which every other run would meet, too.
    """

    message: str
    traceback: str
    everywhere: bool = False

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Of an error that was caught."""
        everywhere = isinstance(error, MethodError)
        message = f"{error}" if everywhere else f"{type(error).__name__}: {error}"
        return cls(message, "".join(traceback.format_exception(error)), everywhere)
