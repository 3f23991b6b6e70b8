"""The study of Optuna's behind a search: begun, or made to fit what this call calls better."""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_plus import MethodError
from peft_plus.seed_runs.results import read_results

from .trials import SETTINGS, STORAGE, STUDY, Trials, holds_study, storage

logger = logging.getLogger(__name__)

STUDY_ID = "id"
"""Attribute of a study, by which a trial's folder is known for its own."""


def begun(optuna: Any, folder: Path, *, upward: bool, sampler: Any, pruner: Any) -> Any:
    """The folder's study, or a new one.

    Args:
        upward: whether more of the metric is better.
    """
    study = optuna.create_study(
        study_name=STUDY,
        storage=storage(folder),
        direction=_direction(upward),
        sampler=sampler,
        pruner=pruner,
        load_if_exists=True,
    )
    if STUDY_ID not in study.user_attrs:
        study.set_user_attr(STUDY_ID, uuid.uuid4().hex)
    return study


def fit_to(optuna: Any, folder: Path, metric: str, *, upward: bool) -> None:
    """Make a study of earlier calls one of this call's metric, if it may be.

    Trials that another metric should have judged and did not are forgotten; their finished runs stay, and the study its
    `STUDY_ID`, by which it finds them.

    Args:
        upward: whether more of the metric is better.
    Raises:
        MethodError: another metric did judge some, or they were pruned as if the opposite were better.
    """
    settings = folder / SETTINGS
    if not settings.is_file() or not holds_study(optuna, folder):
        return
    told = json.loads(settings.read_text(encoding="utf-8"))
    study = optuna.load_study(study_name=STUDY, storage=storage(folder))
    found = Trials.of(study, metric=told["metric"], greater_is_better=told["greater_is_better"], folder=folder)
    before, states = found.metric, {trial.state for trial in found.trials}
    if before != metric:
        if states & {"complete", "pruned"}:
            raise MethodError(
                f"{folder} holds trials judged by {before!r}, this call has {metric!r}: give another out."
            )
        for place in folder.glob("trial-*/"):
            for number, run in read_results(place).items():
                if not run.finished:  # the other metric stopped it
                    (place / f"run-{number}.json").unlink()
        _replace(optuna, folder, study, upward, trials=())
        return
    if found.greater_is_better != upward and "pruned" in states:
        other, this = ("less", "more") if upward else ("more", "less")
        raise MethodError(
            f"{folder} holds trials that were pruned because {other} of {metric!r} was better, and in this call {this} "
            "is: give another out."
        )
    if study.direction.name.lower() != _direction(upward):  # Optuna would load it as it is
        _replace(optuna, folder, study, upward, trials=study.get_trials())
        logger.info("%s: from now on %s of %s is better.", folder, "more" if upward else "less", metric)


def _replace(optuna: Any, folder: Path, old: Any, upward: bool, trials: Sequence[Any]) -> None:
    """Put another study with the old one's attributes in its place; a kill leaves the one or the other."""
    scratch = f".{STORAGE}.tmp"
    (folder / scratch).unlink(missing_ok=True)
    kept = optuna.storages.RDBStorage(storage(folder, scratch))
    study = optuna.create_study(study_name=STUDY, storage=kept, direction=_direction(upward))
    study.add_trials(trials)
    for name, value in old.user_attrs.items():
        study.set_user_attr(name, value)
    kept.remove_session()
    kept.engine.dispose()
    os.replace(folder / scratch, folder / STORAGE)


def _direction(upward: bool) -> str:
    return "maximize" if upward else "minimize"
