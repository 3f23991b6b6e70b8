"""The study of Optuna's behind a search: begun, or taken up for this call's metric."""

from __future__ import annotations

import json
import logging
import uuid
from pathlib import Path
from typing import Any

from peft_plus import MethodError
from peft_plus.seed_runs.results import read_results

from .trials import SETTINGS, STORAGE, STUDY, Trials, storage

logger = logging.getLogger(__name__)

STUDY_ID = "id"
"""Attribute of a study, by which a trial's folder is known for its own."""


def taken_up(optuna: Any, folder: Path, *, upward: bool, sampler: Any, pruner: Any, known_as: str | None) -> Any:
    """The folder's study, or a new one.

    Args:
        upward: whether more of the metric is better.
        known_as: the `STUDY_ID` of a new one; another one by default.
    """
    make = {"study_name": STUDY, "storage": storage(folder), "sampler": sampler, "pruner": pruner}
    direction = "maximize" if upward else "minimize"
    study = optuna.create_study(**make, direction=direction, load_if_exists=True)
    if study.direction.name.lower() != direction:  # Optuna loads it as it is
        trials, told = study.get_trials(), study.user_attrs
        optuna.delete_study(study_name=STUDY, storage=storage(folder))
        study = optuna.create_study(**make, direction=direction)
        for name, value in told.items():
            study.set_user_attr(name, value)
        study.add_trials(trials)
        logger.info("%s: from now on %s of the metric is better.", folder, "more" if upward else "less")
    if STUDY_ID not in study.user_attrs:
        study.set_user_attr(STUDY_ID, known_as or uuid.uuid4().hex)
    return study


def leave_other_metric(optuna: Any, folder: Path, metric: str, *, upward: bool) -> str | None:
    """Forget trials that another metric should have judged and did not; their finished runs stay.

    Args:
        upward: whether more of the metric is better.
    Returns: the `STUDY_ID` of what was forgotten, with which a new study finds those runs.
    Raises:
        MethodError: the other metric did judge some, or they were pruned as if the opposite were better.
    """
    settings = folder / SETTINGS
    if not settings.is_file() or not (folder / STORAGE).is_file():
        return None
    told = json.loads(settings.read_text(encoding="utf-8"))
    before, states = told["metric"], {trial.state for trial in Trials.load(folder).trials}
    if before == metric:
        if told["greater_is_better"] != upward and "pruned" in states:
            other, this = ("less", "more") if upward else ("more", "less")
            raise MethodError(
                f"{folder} holds trials that were pruned because {other} of {metric!r} was better, and in this call "
                f"{this} is: give another out."
            )
        return None
    if states & {"complete", "pruned"}:
        raise MethodError(f"{folder} holds trials judged by {before!r}, this call has {metric!r}: give another out.")
    for place in folder.glob("trial-*/"):
        for number, run in read_results(place).items():
            if not run.finished:  # the other metric stopped it
                (place / f"run-{number}.json").unlink()
    known_as = optuna.load_study(study_name=STUDY, storage=storage(folder)).user_attrs.get(STUDY_ID)
    optuna.delete_study(study_name=STUDY, storage=storage(folder))
    return known_as
