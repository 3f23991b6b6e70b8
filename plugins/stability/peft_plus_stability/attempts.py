"""A search under way: which trial is next, and what its runs come to."""

from __future__ import annotations

import json
import logging
import math
import shutil
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_plus import Seeds, TrainingError
from peft_plus.seed_runs.call import Call
from peft_plus.seed_runs.callbacks import Prunes
from peft_plus.seed_runs.claim import named, plain
from peft_plus.seed_runs.errors import CallError
from peft_plus.seed_runs.one_run import clear
from peft_plus.seed_runs.results import RunResult, read_results, value_of, write_whole
from peft_plus.watched_metric import holds

from .study import STUDY_ID
from .trials import AGAIN, by_number

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

logger = logging.getLogger(__name__)

Space = Mapping[str, "BaseDistribution | Callable[[Any], Any]"]

ENDED = "ended by"
"""Attribute of a study: the sampler that has tried all."""
_DIVERGED = "diverged"
_OF_A_GRID = ("grid_id", "search_space")
"""What Optuna's GridSampler notes of a trial that it proposed, and misses at the end of one that it did not."""


@dataclass(frozen=True, kw_only=True)
class Attempts:
    """The trials of a search.

    Attributes:
        optuna: the package.
        study: of Optuna's.
        seed: of the sampler; None where the user gave one.
        prunes: whether there is a pruner.
        common: what the calls of all trials have in common.
    """

    optuna: Any
    study: Any
    factory: Callable[..., Any]
    space: Space
    folder: Path
    seeds: int
    prunes: bool
    seed: int | None
    common: Mapping[str, Any]

    def make(self, trials: int) -> None:
        """Make what is missing of so many trials: first that which was interrupted, then those that failed.

        Raises:
            CallError: what every other trial would say, too. Another error may be due to the trial's settings, be it
                of the factory or of the Trainer, and fails the trial.
        """
        states = self.optuna.trial.TrialState
        known = self._known()
        failed = [
            number
            for number, trial in known.items()
            if number < trials and trial.state == states.FAIL and not trial.user_attrs.get(_DIVERGED)
        ]
        for number, trial in known.items():
            if trial.state in (states.RUNNING, states.WAITING):
                self._attempt(number, trial)
        if failed:
            logger.info("Trials that failed are made again: %s.", ", ".join(map(str, failed)))
        for number in failed:
            self._attempt(number, self._again(number, self._known()[number]))
        while (number := len(self._known())) < trials and not self._tried_all():
            self._attempt(number)

    def _known(self) -> dict[int, Any]:
        return by_number(self.study.get_trials(deepcopy=False))

    def _tried_all(self) -> bool:
        return self.study.user_attrs.get(ENDED) == type(self.study.sampler).__name__

    def _again(self, number: int, failed: Any) -> Any:
        """A trial that stands for one that failed, and waits; Optuna changes none that has ended."""
        noted = {name: value for name, value in failed.system_attrs.items() if name in _OF_A_GRID}
        self.study.add_trial(
            self.optuna.trial.create_trial(
                state=self.optuna.trial.TrialState.WAITING,
                system_attrs={**noted, "fixed_params": failed.params},
                user_attrs={AGAIN: number},
            )
        )
        return self._known()[number]

    def _attempt(self, number: int, begun: Any = None) -> None:
        """Make the runs of a trial that are not there yet, and tell the study what they came to.

        Args:
            begun: the trial that is there already, waiting or interrupted.
        """
        if self.seed is not None:
            self.study.sampler = self.optuna.samplers.TPESampler(seed=(self.seed + 1_000_003 * number) % 2**32)
        states, place = self.optuna.trial.TrialState, self.folder / f"trial-{number}"
        if begun is None or begun.state == states.WAITING:
            trial = self.study.ask()  # that which waits, if one does
        else:
            trial = self.optuna.trial.Trial(self.study, begun._trial_id)
        try:
            params = {name: _suggested(self.optuna, trial, name, what) for name, what in self.space.items()}
            trial.set_user_attr("params", plain(params))
            self._own(place, params)
            runs = self._runs(trial, Call(factory=self._factory(params), out=place, **self.common))
            values = [value_of(run, self.common["metric"]) for run in runs]
            if math.isnan(values[-1]):
                trial.set_user_attr(_DIVERGED, True)
                raise TrainingError(runs[-1].diverged or f"{self.common['metric']} is not a number.")
        except Exception as error:
            self._fail(number, trial, place, error)
            if isinstance(error, CallError):
                raise
            return
        (place / "error.txt").unlink(missing_ok=True)
        trial.set_user_attr("values", values)
        trial.set_user_attr("seconds", sum(run.seconds for run in runs))
        if runs[0].finished:
            self.study.tell(trial, sum(values) / len(values))
        else:
            self.study.tell(trial, state=states.PRUNED)
        how = "" if runs[0].finished else ", pruned"
        logger.info("Trial %d: %.4g%s, %s.", number, sum(values) / len(values), how, params)

    def _own(self, place: Path, params: Mapping[str, Any]) -> None:
        """Give the trial its folder, without what a trial of another study, or with other parameters, left there."""
        file = place / "trial.json"
        body = json.dumps({"study": self.study.user_attrs[STUDY_ID], "params": plain(params)})
        if place.exists() and not (file.is_file() and file.read_text(encoding="utf-8") == body):
            shutil.rmtree(place)
        place.mkdir(parents=True, exist_ok=True)
        write_whole(file, body)

    def _factory(self, params: Mapping[str, Any]) -> Callable[[Seeds], Any]:
        def made(seeds: Seeds) -> Any:
            try:
                return self.factory(seeds, **params)
            except TypeError as error:
                called, sign, _ = str(error).partition("() ")
                if sign and made.__qualname__.endswith(f".{called}"):  # of its signature, not of what it calls
                    raise CallError(
                        f"The space makes search call the factory with {', '.join(params)}: {error}."
                    ) from error
                raise

        made.__qualname__ = named(self.factory)["factory"]
        return made

    def _fail(self, number: int, trial: Any, place: Path, error: Exception) -> None:
        place.mkdir(parents=True, exist_ok=True)
        write_whole(place / "error.txt", "".join(traceback.format_exception(error)))
        for folder in place.glob("run-*/"):
            clear(folder)
        name = type(error).__name__
        trial.set_user_attr("error", f"{name}: {error}")
        self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)
        logger.error("Trial %d failed: %s: %s", number, name, error)

    def _runs(self, trial: Any, call: Call) -> list[RunResult]:
        """All runs of a trial, or those up to the one that was stopped or diverged."""
        found = read_results(call.out)
        done = {number: run for number, run in found.items() if run.diverged or holds(run.metrics, call.metric)}
        for number in range(self.seeds):
            if number not in done:
                prunes = None
                if self.prunes and number == 0:
                    known = self.study.trials[trial.number].intermediate_values
                    prunes = Prunes(trial, call.metric, known)
                result = call.run(number, callbacks=[] if prunes is None else [prunes])
                call.keep(replace(result, finished=prunes is None or not prunes.pruned), done)
                if prunes is not None and not prunes.told and not result.diverged:
                    raise CallError(
                        f"The pruner judges by {call.metric!r} while a run trains, and no evaluation before its last "
                        "step tells it: set eval_strategy and eval_steps, or name a metric that they tell."
                    )
            if not done[number].finished or math.isnan(value_of(done[number], call.metric)):
                break
        return [done[number] for number in sorted(done)]


def _suggested(optuna: Any, trial: Any, name: str, what: Any) -> Any:
    """A value for one name of the space."""
    kinds = optuna.distributions
    match what:
        case kinds.FloatDistribution():
            return trial.suggest_float(name, what.low, what.high, step=what.step, log=what.log)
        case kinds.IntDistribution():
            return trial.suggest_int(name, what.low, what.high, step=what.step, log=what.log)
        case kinds.CategoricalDistribution():
            return trial.suggest_categorical(name, what.choices)
        case _:
            return what(trial)
