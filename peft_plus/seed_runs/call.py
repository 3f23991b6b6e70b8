"""What all runs of one call have in common, and what becomes of each: kept, or recorded as failed."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .axis import Axis, seeds_of
from .one_run import Evaluate, Factory, clear, run_once
from .results import RunResult, keep_result, write_whole

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Call:
    """What all runs of a call have in common; goes to other processes."""

    factory: Factory
    out: Path
    base: int
    vary: tuple[Axis, ...]
    metric: str
    greater_is_better: bool
    evaluate: Evaluate | None
    threads: int = 0

    def run(self, number: int, fraction: float | None = None, callbacks: Iterable[Any] = ()) -> RunResult:
        """Make run `number`, to its end or to a fraction of it."""
        from .callbacks import StopAtFraction

        if self.threads:
            import torch

            torch.set_num_threads(self.threads)
        shared = self.out / "shared"
        shared.mkdir(parents=True, exist_ok=True)
        own = seeds_of(number, base=self.base, vary=self.vary, shared=shared)
        stops = [] if fraction is None else [StopAtFraction(fraction)]
        result = run_once(
            self.factory, own, self.folder(number), evaluate=self.evaluate, callbacks=[*stops, *callbacks]
        )
        return replace(result, finished=result.steps >= result.max_steps or fraction is None)

    def folder(self, number: int) -> Path:
        """Where the run works."""
        return self.out / f"run-{number}"

    def keep(self, result: RunResult, done: dict[int, RunResult]) -> None:
        """Keep a final result at once, and drop what the run needed to be taken up again."""
        keep_result(self.out, result)
        done[result.number] = result
        (self.out / f"run-{result.number}.error.txt").unlink(missing_ok=True)
        clear(self.folder(result.number))
        shown = ", ".join(f"{name} {value:.4g}" for name, value in result.metrics.items() if self.metric in name)
        logger.info("Run %d: %s after %d steps, %.0f s.", result.number, shown, result.steps, result.seconds)

    def fail(self, number: int, error: BaseException, failed: dict[int, str]) -> None:
        """Record that a run failed."""
        write_whole(self.out / f"run-{number}.error.txt", "".join(traceback.format_exception(error)))
        failed[number] = f"{type(error).__name__}: {error}"
        logger.error("Run %d failed: %s", number, failed[number])
