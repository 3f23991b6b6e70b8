"""Hyper-parameter search over a factory of Trainers, by Optuna."""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_plus import MethodError, TrainingError
from peft_plus.seed_runs.axis import AXES, Axis
from peft_plus.seed_runs.claim import check_claim, claim, named, plain
from peft_plus.seed_runs.lock import only_one
from peft_plus.seed_runs.one_run import Evaluate
from peft_plus.seed_runs.optional import imported, quiet
from peft_plus.watched_metric import rises

from .attempts import ENDED, Attempts, Space
from .study import begun, fit_to
from .trials import SETTINGS, Trials

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler

logger = logging.getLogger(__name__)


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
        model = get_model("roberta-base", {"lora": {"r": rank}}, task="SEQ_CLS")
        arguments = TrainingArguments(learning_rate=learning_rate)
        return Trainer(model, arguments, train_dataset=train, eval_dataset=dev)

    rates = FloatDistribution(1e-5, 1e-2, log=True)
    space = {"rank": IntDistribution(2, 32, log=True), "learning_rate": rates}
    print(search(lora, space, trials=30, out="out/search"))
    ```

    The runs are those of `peft_plus.seeds`: all trials have the same seeds, and share the folder `seeds.shared`. A
    trial that fails is kept with its error, and the search goes on. A second call with the same `out` goes on where
    the first ended, with the trial that it was at, too, and makes those again that failed; not those that diverged,
    which they would do again. Trials go one after another, and one call at a time works in `out`.

    Args:
        factory: (`Seeds`, and by name what `space` holds) → a Trainer, not yet trained.
        space: name → a distribution of Optuna's, or a function of its trial, e.g.
            `lambda trial: 2 ** trial.suggest_int("log2_rank", 1, 5)`, called in this order.
        trials: in all, failed ones too, ≥ 1; fewer where the sampler has tried all. A later call may ask for more.
        metric: of the evaluation at a run's end; a pruner is told it at each one before.
        greater_is_better: by default less is better of a loss or an error, by its name, else more.
        out: folder for the trials.
        seeds: runs of each trial, ≥ 1, whose mean counts.
        base, vary, evaluate: as for `peft_plus.seeds`.
        sampler: Optuna's; by default TPE, drawn from `base` and the trial's number, so that a search that was
            interrupted tries what it would have tried. Another one is seeded anew where trials are there already.
        pruner: Optuna's; it stops a trial in its first run. By default none is stopped.
    Returns: the trials.
    Raises:
        ValueError: an argument is out of its range.
        MethodError: optuna is not installed; the factory does not take what `space` holds, or gives no Trainer; the
            metric was never logged; `out` holds another search, or another call works there.
        TrainingError: no trial came to its end, and some failed.
    """
    optuna = imported("optuna", "search")
    _check(optuna, factory, space, trials, seeds, base, vary)
    axes = [axis for axis in AXES if axis in vary]
    upward = rises(metric, greater_is_better)
    folder = Path(out)
    body = named(factory) | {"space": _described(optuna, space), "seeds": seeds, "base": base, "vary": axes}
    with only_one(folder), quiet(optuna):
        check_claim(folder / SETTINGS, body)
        fit_to(optuna, folder, metric, upward=upward)
        claim(folder / SETTINGS, body, {"metric": metric, "greater_is_better": upward})
        study = begun(optuna, folder, upward=upward, sampler=sampler, pruner=pruner or optuna.pruners.NopPruner())
        if sampler is not None and study.get_trials(deepcopy=False):
            logger.info("%s holds trials: %s is seeded anew, lest it repeat them.", folder, type(sampler).__name__)
            sampler.reseed_rng()
        own = Attempts(
            optuna=optuna,
            study=study,
            factory=factory,
            space=space,
            folder=folder,
            seeds=seeds,
            prunes=pruner is not None,
            seed=base if sampler is None else None,
            common={
                "base": base,
                "vary": tuple(axes),
                "metric": metric,
                "greater_is_better": upward,
                "evaluate": evaluate,
                "common": folder / "shared",
            },
        )
        # By this a sampler says that it has tried all; Optuna's own refuses it outside `optimize`, which takes a trial
        # that was interrupted for a failed one.
        study.stop = partial(study.set_user_attr, ENDED, type(study.sampler).__name__)
        own.make(trials)
        found = Trials.of(study, metric=metric, greater_is_better=upward, folder=folder)
    failed = [trial for trial in found.trials if trial.state == "failed"]
    if failed and not found.ranked:
        raise TrainingError(
            f"No trial came to its end, and {len(failed)} of {len(found.trials)} failed, the first by "
            f"{failed[0].error.rstrip('.')}. The tracebacks are in {folder}/trial-<number>/error.txt. Mend the cause "
            "and call again: they are made again, but for those that diverged."
        )
    return found


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
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise MethodError(
            "search makes whole runs, one after another: call it in a single process, not under torchrun or accelerate "
            "launch."
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
    _check_takes(factory, space)


def _check_takes(factory: Callable[..., Any], space: Space) -> None:
    """That the factory has the names of the space for parameters, as far as its signature tells."""
    try:
        signature = inspect.signature(factory, follow_wrapped=False)
    except ValueError:  # written in C
        return
    try:
        signature.bind(None, **dict.fromkeys(space))
    except TypeError as error:
        raise MethodError(
            f"The space makes search call {named(factory)['factory']} with {', '.join(space)}: {error}. Give the "
            "factory these parameters, or the space other names."
        ) from None
