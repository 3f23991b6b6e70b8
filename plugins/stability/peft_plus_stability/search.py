"""Hyper-parameter search over a factory of Trainers, by Optuna."""

from __future__ import annotations

import json
import logging
import math
import os
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_plus import MethodError, TrainingError
from peft_plus.seed_runs.axis import AXES, Axis
from peft_plus.seed_runs.call import Call
from peft_plus.seed_runs.callbacks import Prunes
from peft_plus.seed_runs.claim import claim, named, plain
from peft_plus.seed_runs.one_run import Evaluate, clear
from peft_plus.seed_runs.optional import imported, quiet
from peft_plus.seed_runs.results import RunResult, read_results, value_of, write_whole
from peft_plus.watched_metric import rises

from .trials import SETTINGS, STORAGE, STUDY, Trials, storage

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler

logger = logging.getLogger(__name__)

_ENDED = "ended by"

Space = Mapping[str, "BaseDistribution | Callable[[Any], Any]"]


def search(
    factory: Callable[..., Any],
    space: Space,
    trials: int = 20,
    *,
    metric: str = "eval_loss",
    greater_is_better: bool | None = None,
    out: str | os.PathLike[str] = "out/search",
    seeds: int = 1,
    base: int = 0,
    vary: Collection[Axis] = AXES,
    evaluate: Evaluate | None = None,
    sampler: BaseSampler | None = None,
    pruner: BasePruner | None = None,
) -> Trials:
    """Try settings of one training, and keep what each came to.

    ```python
    def lora(seeds, *, rank, learning_rate):
        model = get_model(base, {"lora": {"r": rank}}, task="SEQ_CLS", num_labels=2)
        return Trainer(model, TrainingArguments(learning_rate=learning_rate), train_dataset=train, eval_dataset=dev,
                       compute_metrics=model.peft_plus.task.compute_metrics)

    space = {"rank": IntDistribution(2, 32, log=True), "learning_rate": FloatDistribution(1e-5, 1e-2, log=True)}
    print(search(lora, space, trials=30, metric="accuracy", out="out/search"))
    ```

    The runs are those of `peft_plus.seeds`: all trials have the same seeds, and share the folder `seeds.shared`. A
    trial that fails is kept with its error, and the search goes on. A second call with the same `out` goes on where
    the first ended, with the trial that it was at, too.

    Args:
        factory: (`Seeds`, and by name what `space` holds) → a Trainer, not yet trained.
        space: name → a distribution of Optuna's, or a function of its trial, e.g.
            `lambda trial: 2 ** trial.suggest_int("log2_rank", 1, 5)`, called in this order.
        trials: in all, failed ones too, ≥ 1; fewer where the sampler has tried all. A later call may ask for more.
        metric: of the evaluation at a run's end; a pruner is told it at each one before.
        greater_is_better: by default less is better of what has `loss` in its name, else more.
        out: folder for the trials.
        seeds: runs of each trial, ≥ 1, whose mean counts.
        base, vary, evaluate: as for `peft_plus.seeds`.
        sampler: Optuna's; by default TPE, drawn from `base` and the trial's number, so that a search that was
            interrupted tries what it would have tried.
        pruner: Optuna's; it stops a trial in its first run. By default none is stopped.
    Returns: the trials.
    Raises:
        ValueError: an argument is out of its range.
        MethodError: optuna is not installed; the metric was never logged; `out` holds another search.
        TrainingError: no trial came to its end, and some failed.
    """
    optuna = imported("optuna", "search")
    _check(optuna, factory, space, trials, seeds, base, vary)
    axes = [axis for axis in AXES if axis in vary]
    upward = rises(metric, greater_is_better)
    folder = Path(out)
    body = named(factory) | {"space": _described(optuna, space), "seeds": seeds, "base": base, "vary": axes}
    with quiet(optuna):
        _leave_other_metric(optuna, folder, metric)
        claim(folder / SETTINGS, body, {"metric": metric, "greater_is_better": upward})
        study = optuna.create_study(
            study_name=STUDY,
            storage=storage(folder),
            direction="maximize" if upward else "minimize",
            sampler=sampler,
            pruner=pruner or optuna.pruners.NopPruner(),
            load_if_exists=True,
        )
        common = {
            "base": base,
            "vary": tuple(axes),
            "metric": metric,
            "greater_is_better": upward,
            "evaluate": evaluate,
            "common": folder / "shared",
        }
        own = _Search(
            optuna=optuna,
            study=study,
            factory=factory,
            space=space,
            folder=folder,
            seeds=seeds,
            prunes=pruner is not None,
            seed=base if sampler is None else None,
            common=common,
        )
        # By this a sampler says that it has tried all; Optuna's own refuses it outside `optimize`, which takes a trial
        # that was interrupted for a failed one.
        study.stop = partial(study.set_user_attr, _ENDED, type(study.sampler).__name__)
        while (trial := own.next_trial(trials)) is not None:
            own.attempt(trial)
        found = Trials.of(study, metric=metric, greater_is_better=upward, folder=folder)
    failed = [trial for trial in found.trials if trial.state == "failed"]
    if failed and not found.ranked:
        raise TrainingError(
            f"No trial came to its end, and {len(failed)} of {len(found.trials)} failed, the first by "
            f"{failed[0].error}. The tracebacks are in {folder}/trial-<number>/error.txt."
        )
    return found


def _leave_other_metric(optuna: Any, folder: Path, metric: str) -> None:
    """Forget trials that another metric should have judged and did not, since it was never logged.

    Raises:
        MethodError: it did judge some.
    """
    settings = folder / SETTINGS
    if not settings.is_file() or not (folder / STORAGE).is_file():
        return
    before = json.loads(settings.read_text(encoding="utf-8"))["metric"]
    if before == metric:
        return
    if any(trial.state in ("complete", "pruned") for trial in Trials.load(folder).trials):
        raise MethodError(f"{folder} holds trials judged by {before!r}, this call has {metric!r}: give another out.")
    optuna.delete_study(study_name=STUDY, storage=storage(folder))


class _Unanswered(MethodError):
    """What every other trial would say, too."""


@dataclass(frozen=True, kw_only=True)
class _Search:
    """A search under way.

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

    def next_trial(self, trials: int) -> Any:
        """The one that a call before was at, else a new one; None where all are there."""
        known = self.study.get_trials(deepcopy=False)
        at_work = next((trial for trial in known if trial.state == self.optuna.trial.TrialState.RUNNING), None)
        ended = self.study.user_attrs.get(_ENDED) == type(self.study.sampler).__name__
        if at_work is None and (ended or len(known) >= trials):
            return None
        number = len(known) if at_work is None else at_work.number
        if self.seed is not None:
            self.study.sampler = self.optuna.samplers.TPESampler(seed=(self.seed + 1_000_003 * number) % 2**32)
        return self.study.ask() if at_work is None else self.optuna.trial.Trial(self.study, at_work._trial_id)

    def attempt(self, trial: Any) -> None:
        """Make the runs of a trial that are not there yet, and tell the study what they came to.

        Raises:
            MethodError: the metric was never logged, or not before the last step, where a pruner needs it.
        """
        states, place = self.optuna.trial.TrialState, self.folder / f"trial-{trial.number}"
        try:
            params = {name: _suggested(self.optuna, trial, name, what) for name, what in self.space.items()}
            trial.set_user_attr("params", plain(params))
            runs = self._runs(trial, Call(factory=partial(self.factory, **params), out=place, **self.common))
            values = [value_of(run, self.common["metric"]) for run in runs]
            if any(math.isnan(value) for value in values):
                raise TrainingError(f"{self.common['metric']} is not a number.")
        except _Unanswered:
            self.study.tell(trial, state=states.FAIL)
            raise
        except Exception as error:  # noqa: BLE001 - kept with the trial, and told by the report
            self._fail(trial, place, error)
            return
        trial.set_user_attr("values", values)
        trial.set_user_attr("seconds", sum(run.seconds for run in runs))
        if runs[0].finished:
            self.study.tell(trial, sum(values) / len(values))
        else:
            self.study.tell(trial, state=states.PRUNED)
        how = "" if runs[0].finished else ", pruned"
        logger.info("Trial %d: %.4g%s, %s.", trial.number, sum(values) / len(values), how, params)

    def _fail(self, trial: Any, place: Path, error: Exception) -> None:
        place.mkdir(parents=True, exist_ok=True)
        write_whole(place / "error.txt", "".join(traceback.format_exception(error)))
        for folder in place.glob("run-*/"):
            clear(folder)
        trial.set_user_attr("error", f"{type(error).__name__}: {error}")
        self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)
        logger.error("Trial %d failed: %s: %s", trial.number, type(error).__name__, error)

    def _runs(self, trial: Any, call: Call) -> list[RunResult]:
        """All runs of a trial, or the first alone where it was stopped."""
        done = read_results(call.out)
        for number in range(self.seeds):
            if number not in done:
                prunes = None
                if self.prunes and number == 0:
                    known = self.study.trials[trial.number].intermediate_values
                    prunes = Prunes(trial, call.metric, known)
                result = call.run(number, callbacks=[] if prunes is None else [prunes])
                try:
                    value_of(result, call.metric)
                except MethodError as error:
                    raise _Unanswered(str(error)) from None
                if prunes is not None and not prunes.told:
                    raise _Unanswered(
                        f"The pruner judges by {call.metric!r} while a run trains, and no evaluation before its last "
                        "step tells it: set eval_strategy and eval_steps, or name a metric that they tell."
                    )
                call.keep(replace(result, finished=prunes is None or not prunes.pruned), done)
            if not done[number].finished:
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


def _described(optuna: Any, space: Space) -> dict[str, Any]:
    """The space as JSON holds it; of a function its name."""
    kinds = optuna.distributions
    return {
        name: json.loads(kinds.distribution_to_json(what)) if isinstance(what, kinds.BaseDistribution) else plain(what)
        for name, what in space.items()
    }


def _check(optuna: Any, factory: Any, space: Any, trials: int, seeds: int, base: int, vary: Collection[str]) -> None:
    if not callable(factory):
        raise MethodError(
            f"search(factory, …): {factory!r} is not callable; give a function: Seeds, settings → Trainer."
        )
    if not space:
        raise ValueError("space={}: give a distribution for one name at least.")
    for name, what in space.items():
        if not isinstance(what, optuna.distributions.BaseDistribution) and not callable(what):
            raise ValueError(
                f"space[{name!r}]={what!r}: give a distribution of Optuna's, e.g. FloatDistribution(1e-5, 1e-2, "
                "log=True), or a function of the trial."
            )
    if trials < 1:
        raise ValueError(f"trials={trials}: give a number ≥ 1.")
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: give a number of runs ≥ 1.")
    if base < 0:
        raise ValueError(f"base={base}: give a seed ≥ 0.")
    unknown = set(vary) - set(AXES)
    if unknown or not vary:
        raise ValueError(f"vary={tuple(vary)}: give one or more of {', '.join(AXES)}.")
