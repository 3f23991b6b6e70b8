"""Racing and successive halving, carried out."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from ..errors import MethodError
from .call import Call
from .racing import Racing, SuccessiveHalving, best
from .results import RunResult, value_of, write_whole
from .several import run_all

logger = logging.getLogger(__name__)


def race(
    call: Call, racing: Racing, n: int, done: dict[int, RunResult], workers: int | Literal["auto"]
) -> dict[int, str]:
    """All runs to a fraction, then the best of them to their end."""
    early = _early_results(call.out)

    def judged(result: RunResult) -> None:
        value_of(result, call.metric)
        early[result.number] = result
        write_early(call.out, early)

    started = {k for k in range(n) if k in early}
    failed = run_all(
        call, [k for k in range(n) if k not in started and k not in done], {}, workers, fraction=racing.fraction,
        keep=judged,
    )  # fmt: skip
    if failed:
        return failed
    values = {number: value_of(early[number], call.metric) for number in range(n)}
    chosen = best(values, racing.keep, greater_is_better=call.greater_is_better)
    logger.info("Racing goes on with %s of %d runs.", ", ".join(map(str, chosen)), n)
    failed = run_all(call, [k for k in chosen if not (k in done and done[k].finished)], done, workers)
    for number in range(n):
        if number not in chosen and number not in done:
            call.keep(replace(early[number], finished=False), done)
    return failed


_EARLY = "early.json"


def _early_results(out: Path) -> dict[int, RunResult]:
    file = out / _EARLY
    if not file.is_file():
        return {}
    bodies: list[Mapping[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return {body["number"]: RunResult(**body) for body in bodies}


def write_early(out: Path, early: Mapping[int, RunResult]) -> None:
    """Keep what runs gave at the fraction where they are judged."""
    write_whole(out / _EARLY, json.dumps([asdict(result) for result in early.values()]) + "\n")


def halve(call: Call, halving: SuccessiveHalving, n: int, done: dict[int, RunResult]) -> dict[int, str]:
    """One run after another, each stopped where the pruner says so."""
    from .callbacks import Prunes

    study = halving.study([done[k] for k in sorted(done)], call.metric, call.greater_is_better)
    failed: dict[int, str] = {}
    for number in range(n):
        if number in done:
            continue
        trial = study.ask()
        prunes = Prunes(trial, call.metric)
        try:
            result = call.run(number, callbacks=[prunes])
        except MethodError:
            raise
        except Exception as error:  # noqa: BLE001 - recorded, and told at the end
            call.fail(number, error, failed)
            continue
        call.keep(replace(result, finished=not prunes.pruned), done)
        states = type(trial.study.trials[-1].state)
        if prunes.pruned:
            study.tell(trial, state=states.PRUNED)
        else:
            study.tell(trial, value_of(result, call.metric))
    return failed
