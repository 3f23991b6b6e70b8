"""Racing and successive halving, carried out."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Literal

from ..errors import MethodError
from .call import Call, Failure
from .errors import CallError
from .optional import imported, quiet
from .racing import Racing, SuccessiveHalving, best, tell
from .results import RunResult, error_file, keep_result, read_results, value_of
from .several import run_all

logger = logging.getLogger(__name__)


def race(
    call: Call, racing: Racing, n: int, done: dict[int, RunResult], workers: int | Literal["auto"]
) -> dict[int, str]:
    """All runs to a fraction, then the best of them to their end.

    Those that fail on the way to be judged have lost, until a later call makes them again.
    """
    early = {number: result for number, result in read_results(call.out, "judged").items() if number < n}

    def judged(result: RunResult) -> None:
        keep_result(call.out, result, "judged")
        error_file(call.out, result.number).unlink(missing_ok=True)
        early[result.number] = result
        value_of(result, call.metric)

    failed = run_all(call, [k for k in range(n) if k not in early], workers, judged, fraction=racing.fraction)
    values = {number: value_of(result, call.metric) for number, result in early.items()}
    chosen = best(values, racing.keep, greater_is_better=call.greater_is_better)
    logger.info("Racing goes on with %s of %d runs.", ", ".join(map(str, chosen)) or "none", n)

    def ended(result: RunResult) -> None:
        before = early[result.number]
        if result.resumed == before.steps:  # so that its time is that of the whole run
            result = replace(
                result,
                resumed=0,
                seconds=before.seconds + result.seconds,
                cpu_seconds=before.cpu_seconds + result.cpu_seconds,
            )
        call.keep(replace(result, judged=before.metrics), done)

    for number in chosen:
        if early[number].finished and number not in done:  # it ended by itself
            call.keep(replace(early[number], judged=early[number].metrics), done)
    waiting = [k for k in chosen if k not in done or not done[k].finished]
    failed |= run_all(call, waiting, workers, ended)
    for number in sorted(early):
        if number not in chosen and number not in done:
            call.keep(replace(early[number], judged=early[number].metrics), done)  # stopped, or over by itself
    return failed


def halve(call: Call, halving: SuccessiveHalving, n: int, done: dict[int, RunResult]) -> dict[int, str]:
    """One run after another, each stopped where the pruner says so.

    Raises:
        CallError: optuna is not installed; the metric is not evaluated before a run's last step.
    """
    from .callbacks import Prunes

    optuna = imported("optuna", "successive halving")
    failed: dict[int, str] = {}
    with quiet(optuna):
        study = halving.study([done[k] for k in sorted(done)], call.metric, call.greater_is_better)
        for number in (k for k in range(n) if k not in done):
            trial = study.ask()
            prunes = Prunes(trial, call.metric)
            try:
                result = call.run(number, callbacks=[prunes])
            except MethodError:
                raise
            except Exception as error:  # noqa: BLE001 - recorded, and told at the end
                call.fail(number, Failure.of(error), failed)
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                continue
            call.keep(replace(result, finished=not prunes.pruned), done)
            if not prunes.told and not result.diverged:
                raise CallError(
                    f"SuccessiveHalving judges by {call.metric!r} while a run trains, and no evaluation before its "
                    "last step tells it: set eval_strategy and eval_steps, or name a metric that they tell."
                )
            tell(study, trial, result, call.metric, pruned=prunes.pruned)
    return failed
