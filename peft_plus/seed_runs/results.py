"""Results of runs on disk: written whole or not at all, and read again."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .. import watched_metric
from .errors import CallError

if TYPE_CHECKING:
    from .compare import Comparison
    from .report import Report

SETTINGS = "seeds.json"

Kind = Literal["run", "judged"]
"""A run to its end, or to where racing judges it."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What one run gave.

    Attributes:
        number: which run, from 0.
        seeds: axis → seed.
        metrics: of the evaluation at its end; none where it diverged.
        evaluations: those while it trained: (optimizer step, metrics).
        steps, max_steps: optimizer steps that were made, and that the whole run has.
        resumed: the step at which it was taken up again; 0 where it ran in one go.
        finished: whether it ran to its end; False where racing stopped it.
        judged: the metrics by which racing let it go on; empty where nothing raced.
        diverged: why it diverged, if it did: its loss or gradients were no numbers. It counts as failed.
        seconds, cpu_seconds: of training, since it was taken up.
        majority: share of the largest class in the evaluation's labels; None where that cannot be told.
        peak_bytes: the largest memory of its process.
        versions: package → version.
    """

    number: int
    seeds: Mapping[str, int]
    metrics: Mapping[str, float]
    evaluations: Sequence[tuple[int, Mapping[str, float]]] = ()
    steps: int = 0
    max_steps: int = 0
    resumed: int = 0
    finished: bool = True
    judged: Mapping[str, float] = field(default_factory=dict)
    diverged: str = ""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    majority: float | None = None
    peak_bytes: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SeedRuns:
    """The results of one training under many seeds.

    Attributes:
        results: by number. Those that racing stopped are among them.
        metric: name of the metric that counts.
        greater_is_better: whether more of it is better.
        folder: where the results are.
    """

    results: tuple[RunResult, ...]
    metric: str
    greater_is_better: bool
    folder: Path | None = field(default=None, compare=False)

    @property
    def finished(self) -> tuple[RunResult, ...]:
        """Those that ran to their end."""
        return tuple(result for result in self.results if result.finished)

    @property
    def broken(self) -> tuple[int, ...]:
        """Numbers of the runs that ended by an error, which is in the folder, and have no result."""
        files = [] if self.folder is None else self.folder.glob(error_file(self.folder, "*").name)
        numbers = {int(file.name.split(".")[0].removeprefix("run-")) for file in files}
        return tuple(sorted(numbers - {result.number for result in self.results}))

    @property
    def values(self) -> dict[int, float]:
        """Number of each finished run → the metric that counts; NaN where the run diverged."""
        return {result.number: value_of(result, self.metric) for result in self.finished}

    def report(self, *, majority: float | None = None) -> Report:
        """Mean, spread, failed runs, with intervals.

        Args:
            majority: the metric's value at or below which a run has failed, e.g. the share of the largest class; by
                default the one in `eval_dataset`'s labels, if the metric is its accuracy.
        """
        from .report import report

        return report(self, majority=majority)

    def compare(self, other: SeedRuns) -> Comparison:
        """This minus `other`, paired by number.

        Raises:
            ValueError: fewer than two runs have both; their seeds differ; racing chose which were finished.
        """
        from .compare import compare

        return compare(self, other)

    def plot(self, path: str | os.PathLike[str], **others: SeedRuns) -> Path:
        """Draw every run and the quartiles; `others` beside it, by title. Needs matplotlib.

        Returns: the file.
        """
        from .plot import plot

        return plot({self.folder.name if self.folder else "runs": self, **others}, path)

    def save(self, folder: str | os.PathLike[str] | None = None, *, majority: float | None = None) -> Path:
        """Write `report.json` and `report.md`.

        Args:
            folder: by default the one with the results.
            majority: as for `report`.
        Returns: the folder.
        """
        target = Path(folder) if folder is not None else self.folder
        if target is None:
            raise ValueError("runs.save(folder): these runs were read from nowhere, so say where to.")
        target.mkdir(parents=True, exist_ok=True)
        made = self.report(majority=majority)
        write_whole(target / "report.json", as_json(made.as_dict(), indent=2))
        write_whole(target / "report.md", made.markdown() + "\n")
        return target

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], *, metric: str | None = None, greater_is_better: bool | None = None
    ) -> SeedRuns:
        """Read what `seeds` wrote into `out`; nothing runs.

        Args:
            metric, greater_is_better: by default those of that call.
        """
        place = Path(folder)
        if not (place / SETTINGS).is_file():
            raise CallError(f"{place} holds no results of peft_plus.seeds: there is no {SETTINGS} in it.")
        settings = json.loads((place / SETTINGS).read_text(encoding="utf-8"))
        chosen = metric or settings["metric"]
        better = greater_is_better
        if better is None and chosen.removeprefix("eval_") == settings["metric"].removeprefix("eval_"):
            better = settings["greater_is_better"]
        return cls(
            results=tuple(read_results(place).values()),
            metric=chosen,
            greater_is_better=watched_metric.rises(chosen, better),
            folder=place,
        )


def value_of(result: RunResult, metric: str) -> float:
    """The metric of a run; `accuracy` finds `eval_accuracy`. NaN where the run diverged.

    Raises:
        CallError: it was never logged; says what was.
    """
    if result.diverged:
        return math.nan
    try:
        return watched_metric.value_of(result.metrics, metric)
    except ValueError as error:
        raise CallError(f"Run {result.number}: {error} Finished runs are kept.") from None


def evaluations_in(log: Sequence[Mapping[str, Any]]) -> tuple[tuple[int, dict[str, float]], ...]:
    """The evaluations in a Trainer's `log_history`: (step, metrics), those of one step together."""
    found: dict[int, dict[str, float]] = {}
    for entry in log:
        metrics = {name: value for name, value in numbers_in(entry).items() if name.startswith("eval_")}
        if metrics:
            found.setdefault(int(entry["step"]), {}).update(metrics)
    return tuple(sorted(found.items()))


def values_on_the_way(
    evaluations: Sequence[tuple[int, Mapping[str, float]]], metric: str, max_steps: int
) -> list[float]:
    """The metric at each evaluation before the last step; those without it are left out."""
    return [
        watched_metric.value_of(metrics, metric)
        for step, metrics in evaluations
        if step < max_steps and watched_metric.holds(metrics, metric)
    ]


def numbers_in(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What of it is a number."""
    return {name: float(value) for name, value in metrics.items() if isinstance(value, int | float | np.number)}


def keep_result(out: Path, result: RunResult, kind: Kind = "run") -> None:
    """At once, and whole."""
    write_whole(out / f"{kind}-{result.number}.json", as_json(asdict(result)))


def error_file(out: Path, number: int | str) -> Path:
    """Where the traceback of a run that failed is kept."""
    return out / f"run-{number}.error.txt"


def read_results(out: Path, kind: Kind = "run") -> dict[int, RunResult]:
    """Number → result of every run that gave one.

    Raises:
        CallError: a file holds something else.
    """
    found: dict[int, RunResult] = {}
    for file in out.glob(f"{kind}-*.json"):
        try:
            body: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            body["evaluations"] = tuple((step, _numbers(metrics)) for step, metrics in body["evaluations"])
            body |= {name: _numbers(body[name]) for name in ("metrics", "judged") if name in body}
            found[body["number"]] = RunResult(**body)
        except (ValueError, TypeError, KeyError) as error:
            raise CallError(
                f"{file} is not what this peft_plus writes ({type(error).__name__}: {error}). Remove it, and its run "
                "is made again."
            ) from error
    return dict(sorted(found.items()))


def as_json(value: Any, indent: int | None = None) -> str:
    """As any reader of JSON takes it: what is no finite number is null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {key: _finite(part) for key, part in value.items()}
        case list() | tuple():
            return [_finite(part) for part in value]
        case _:
            return value


def _numbers(metrics: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in metrics.items()}


def write_whole(path: Path, text: str) -> None:
    """Written beside its place and renamed into it, so that a kill leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
