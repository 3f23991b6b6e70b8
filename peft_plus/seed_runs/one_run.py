"""One run: from the factory to its result."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MethodError
from ..find_checkpoint import finished
from .axis import AXES, Seeds
from .results import RunResult

Factory = Callable[[Seeds], Any]
Evaluate = Callable[[Any], Mapping[str, float]]


def run_once(
    factory: Factory, seeds: Seeds, folder: Path, *, evaluate: Evaluate | None = None, callbacks: Sequence[Any] = ()
) -> RunResult:
    """Build, train and evaluate once. A run that was interrupted goes on from its newest whole checkpoint.

    Args:
        factory: seeds → a Trainer.
        folder: takes the place of the Trainer's `output_dir`.
        evaluate: the Trainer after training → metrics; its own `evaluate()` by default.
        callbacks: added to the Trainer's.
    Raises:
        MethodError: the factory gave no Trainer, or the evaluation no metrics.
    """
    from transformers import set_seed

    set_seed(seeds.init)
    trainer = factory(seeds)
    _check_trainer(trainer, factory)
    trainer.args.output_dir = str(folder)
    trainer.args.seed, trainer.args.data_seed = seeds.dropout, seeds.order
    trainer.accelerator.dataloader_config.data_seed = seeds.order  # it was told when the Trainer was built
    for callback in callbacks:
        trainer.add_callback(callback)
    resume = finished(folder)
    set_seed(seeds.dropout)
    wall, cpu = time.perf_counter(), time.process_time()
    trainer.train(resume_from_checkpoint=True) if resume else trainer.train()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    metrics = _numbers(trainer.evaluate() if evaluate is None else evaluate(trainer))
    state = trainer.state
    return RunResult(
        number=seeds.number,
        seeds={axis: getattr(seeds, axis) for axis in AXES},
        metrics=metrics,
        evaluations=_evaluations(state.log_history),
        steps=state.global_step,
        max_steps=state.max_steps,
        seconds=wall,
        cpu_seconds=cpu,
        majority=_majority(trainer.eval_dataset),
        peak_bytes=_peak_bytes(),
    )


def clear(folder: Path) -> None:
    """Drop what a run needed to be taken up again."""
    shutil.rmtree(folder, ignore_errors=True)


def _peak_bytes() -> int:
    """The largest memory that this process ever had."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _check_trainer(trainer: Any, factory: Factory) -> None:
    wanted = ("train", "evaluate", "add_callback", "args", "state", "accelerator")
    if not all(hasattr(trainer, name) for name in wanted):
        name = getattr(factory, "__qualname__", type(factory).__name__)
        raise MethodError(
            f"The factory {name} returned {type(trainer).__name__}; expected a Trainer: return Trainer(model, args, "
            "train_dataset=…, eval_dataset=…, compute_metrics=…), not yet trained."
        )


def _numbers(metrics: Any) -> dict[str, float]:
    if not isinstance(metrics, Mapping):
        raise MethodError(f"evaluate returned {metrics!r}; expected a mapping from names of metrics to numbers.")
    return {name: float(value) for name, value in metrics.items() if isinstance(value, int | float | np.number)}


def _evaluations(log: Sequence[Mapping[str, Any]]) -> tuple[tuple[int, dict[str, float]], ...]:
    """The evaluations while training, those of one step together."""
    found: dict[int, dict[str, float]] = {}
    for entry in log:
        metrics = {name: value for name, value in _numbers(entry).items() if name.startswith("eval_")}
        if metrics:
            found.setdefault(int(entry["step"]), {}).update(metrics)
    return tuple(sorted(found.items()))


def _majority(dataset: Any) -> float | None:
    """The share of the largest class among whole-number labels, one to a row; None where the data hold none."""
    columns = getattr(dataset, "column_names", None)
    name = next((name for name in ("labels", "label") if isinstance(columns, list) and name in columns), None)
    if name is None:
        return None
    labels = np.asarray(dataset[name])
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or not len(labels):
        return None
    return float(np.unique(labels, return_counts=True)[1].max() / len(labels))
