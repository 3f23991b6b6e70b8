"""What a search found, read from its folder and written down."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from peft_plus import MethodError
from peft_plus.seed_runs.optional import imported, quiet
from peft_plus.seed_runs.results import as_json, write_whole

SETTINGS = "search.json"
STORAGE = "trials.db"
STUDY = "search"

AGAIN = "again"
"""Attribute of a trial of Optuna's that stands for one that failed: that one's number."""

State = Literal["complete", "pruned", "failed", "running"]


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """One trial.

    Attributes:
        number: from 0; a trial that failed and is made again keeps it.
        params: what the factory was given.
        state: `running` where the call that made it was interrupted; the next one goes on with it.
        value: mean of the metric over its runs; of a pruned trial the last that it told; None where it failed.
        values: the metric of each of its runs.
        seconds: of training, of all its runs.
        error: what ended a trial that failed, in one line.
    """

    number: int
    params: Mapping[str, Any]
    state: State
    value: float | None = None
    values: tuple[float, ...] = ()
    seconds: float = 0.0
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Trials:
    """All trials of a search.

    Attributes:
        trials: by number.
        metric: name of the metric that counts.
        greater_is_better: whether more of it is better.
        folder: where they are kept.
    """

    trials: tuple[TrialResult, ...]
    metric: str
    greater_is_better: bool
    folder: Path | None = field(default=None, compare=False)

    @property
    def ranked(self) -> tuple[TrialResult, ...]:
        """The complete trials, best first; of equals the earlier ones."""
        sign = -1 if self.greater_is_better else 1
        complete = [trial for trial in self.trials if trial.state == "complete" and trial.value is not None]
        return tuple(sorted(complete, key=lambda trial: (sign * (trial.value or 0.0), trial.number)))

    @property
    def best(self) -> TrialResult:
        """The best complete trial.

        Raises:
            ValueError: there is none.
        """
        if not self.ranked:
            raise ValueError(f"None of the {len(self.trials)} trials is complete.")
        return self.ranked[0]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "metric": self.metric,
            "greater_is_better": self.greater_is_better,
            "best": self.ranked[0].number if self.ranked else None,
            "trials": [asdict(trial) for trial in self.trials],
        }

    def markdown(self) -> str:
        """A table of all trials, the best first, those that did not end below."""
        names = list(dict.fromkeys(name for trial in self.trials for name in trial.params))
        lines = [
            f"{len(self.trials)} trials, {self.metric} ({'more' if self.greater_is_better else 'less'} is better).",
            "",
            "| trial | " + "".join(f"{name} | " for name in names) + f"{self.metric} | runs | seconds | |",
            "|--:|" + "---|" * len(names) + "--:|--:|--:|---|",
        ]
        others = [trial for trial in self.trials if trial not in self.ranked]
        for trial in (*self.ranked, *others):
            params = "".join(f"{_text(trial.params.get(name, ''))} | " for name in names)
            value = "" if trial.value is None else f"{trial.value:.4f}"
            note = "" if trial.state == "complete" else trial.state + (f": {trial.error}" if trial.error else "")
            note = note.replace("|", "\\|").replace("\n", " ")
            lines.append(f"| {trial.number} | {params}{value} | {len(trial.values)} | {trial.seconds:.0f} | {note} |")
        lines += [
            "",
            "The best of many trials looks better than it is: confirm it with `peft_plus.seeds` under seeds, and on "
            "data, that no trial has seen.",
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.markdown()

    def save(self, folder: str | os.PathLike[str] | None = None) -> Path:
        """Write `report.json` and `report.md`.

        Args:
            folder: by default the one with the trials.
        Returns: the folder.
        """
        target = Path(folder) if folder is not None else self.folder
        if target is None:
            raise ValueError("trials.save(folder): these trials were read from nowhere, so say where to.")
        target.mkdir(parents=True, exist_ok=True)
        write_whole(target / "report.json", as_json(self.as_dict(), indent=2))
        write_whole(target / "report.md", self.markdown() + "\n")
        return target

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Trials:
        """Read what `search` wrote into `out`; nothing runs.

        Raises:
            MethodError: there is nothing of it; optuna is not installed.
        """
        place, optuna = Path(folder), imported("optuna", "search")
        if not (place / SETTINGS).is_file() or not holds_study(optuna, place):
            raise MethodError(f"{place} holds no trials of search: there is no {SETTINGS} with {STORAGE} in it.")
        told = json.loads((place / SETTINGS).read_text(encoding="utf-8"))
        with quiet(optuna):
            study = optuna.load_study(study_name=STUDY, storage=storage(place))
            return cls.of(study, metric=told["metric"], greater_is_better=told["greater_is_better"], folder=place)

    @classmethod
    def of(cls, study: Any, *, metric: str, greater_is_better: bool, folder: Path) -> Trials:
        """The trials of a study of Optuna's."""
        return cls(
            trials=tuple(_result(number, trial) for number, trial in by_number(study.trials).items()),
            metric=metric,
            greater_is_better=greater_is_better,
            folder=folder,
        )


def storage(folder: Path, name: str = STORAGE) -> str:
    """Where Optuna keeps the trials: a database that a kill leaves whole."""
    return f"sqlite:///{(folder / name).resolve().as_posix()}"


def holds_study(optuna: Any, folder: Path) -> bool:
    """Whether there is a study; a call that was killed early leaves a database without one."""
    return (folder / STORAGE).is_file() and STUDY in optuna.get_all_study_names(storage(folder))


def by_number(trials: Iterable[Any]) -> dict[int, Any]:
    """Trials of Optuna's by our numbers: to it, one that is made again is another one, with a number of its own."""
    found: dict[int, Any] = {}
    for trial in trials:
        found[trial.user_attrs.get(AGAIN, len(found))] = trial
    return found


def _result(number: int, trial: Any) -> TrialResult:
    """A trial of Optuna's."""
    told = trial.user_attrs
    states: Mapping[str, State] = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
    return TrialResult(
        number=number,
        params=told.get("params", trial.params),
        state=states.get(trial.state.name, "running"),
        value=trial.value,
        values=tuple(told.get("values", ())),
        seconds=told.get("seconds", 0.0),
        error=told.get("error", ""),
    )


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")
