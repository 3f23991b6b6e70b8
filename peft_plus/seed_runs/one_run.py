"""One run: from the factory to its result."""

from __future__ import annotations

import functools
import gc
import logging
import shutil
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..checkpoint import REPLACED
from ..errors import CheckpointError, DivergenceError
from ..find_checkpoint import newest_whole
from ..layers import transformers_model
from ..safeguards import STOPPED
from .axis import AXES, Seeds
from .errors import CallError
from .results import RunResult, evaluations_in, numbers_in
from .statistics import largest_share

logger = logging.getLogger(__name__)

Factory = Callable[[Seeds], Any]
Evaluate = Callable[[Any], Mapping[str, float]]

_TRAINED_BY = "_peft_plus_trained_by_run"
"""Attribute of a model that a run has trained: the run's number."""
_ROWS_LOOKED_AT = 100_000
"""Of an evaluation set that is no `datasets` table, in search of its largest class."""


def run_once(
    factory: Factory,
    seeds: Seeds,
    folder: Path,
    *,
    evaluate: Evaluate | None = None,
    callbacks: Sequence[Any] = (),
    resume: bool = True,
    exact: bool = False,
) -> RunResult:
    """Build, train and evaluate once.

    Args:
        factory: seeds → a Trainer.
        folder: takes the place of the Trainer's `output_dir`.
        evaluate: the Trainer after training → metrics; its own `evaluate()` by default.
        callbacks: added to the Trainer's.
        resume: go on from the newest whole checkpoint in `folder`, if there is one; else what is there is removed.
        exact: whether a Trainer that does not resume bit by bit is refused.
    Returns: the result, of a run that diverged too: it is the training's, and another attempt would diverge again.
    Raises:
        CallError: the factory gave no Trainer, or the model of an earlier run, or the evaluation no metrics.
    """
    from transformers import set_seed

    set_seed(seeds.init)
    trainer = factory(seeds)
    _check_trainer(trainer, factory, exact)
    fresh = _fresh(trainer, factory, seeds.number)
    _give(trainer, seeds, folder)
    for callback in callbacks:
        trainer.add_callback(callback)
    if not resume:
        clear(folder)
    checkpoint, step = _newest(folder)
    set_seed(seeds.dropout)
    wall, cpu, diverged = time.perf_counter(), time.process_time(), ""
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except DivergenceError as error:
        diverged = error.reason
    finally:
        for model in (fresh, transformers_model(trainer.model)):
            setattr(model, _TRAINED_BY, seeds.number)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    state, evaluations = trainer.state, evaluations_in(trainer.state.log_history)
    result = RunResult(
        number=seeds.number,
        seeds={axis: getattr(seeds, axis) for axis in AXES},
        metrics={} if diverged else _metrics(trainer.evaluate() if evaluate is None else evaluate(trainer)),
        evaluations=evaluations,
        steps=state.global_step,
        max_steps=state.max_steps,
        resumed=step,
        diverged=diverged,
        seconds=wall,
        cpu_seconds=cpu,
        majority=_majority(trainer.eval_dataset),
        peak_bytes=_peak_bytes(),
        versions={name: version(name) for name in ("peft-plus", "peft", "transformers", "torch")},
    )
    alive = weakref.ref(trainer)
    del trainer
    if alive() is not None:  # a Trainer and its callbacks hold each other, and the next run needs the memory
        gc.collect()
    return result


def clear(folder: Path) -> None:
    """Drop what a run needed to be taken up again. What else a factory or `evaluate` put there stays."""
    checkpoints = [part for prefix in ("", REPLACED) for part in folder.glob(f"{prefix}checkpoint-[0-9]*")]
    for part in (*checkpoints, folder / "_trunk", folder / STOPPED):
        shutil.rmtree(part, ignore_errors=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _check_trainer(trainer: Any, factory: Factory, exact: bool) -> None:
    wanted = ("train", "evaluate", "add_callback", "args", "state", "accelerator")
    if not all(hasattr(trainer, name) for name in wanted):
        name = getattr(factory, "__qualname__", type(factory).__name__)
        raise CallError(
            f"The factory {name} returned {type(trainer).__name__}; expected a Trainer: return Trainer(model, args, "
            "train_dataset=…, eval_dataset=…, compute_metrics=…), not yet trained."
        )
    if trainer.state.global_step:
        raise CallError(
            f"The factory returned a Trainer that has trained for {trainer.state.global_step} steps; return a new one."
        )
    from ..hf import Bridge

    if exact and not isinstance(trainer, Bridge):
        kind = type(trainer)
        raise CallError(
            f"Racing stops runs and takes them up again bit by bit, which {kind.__module__}.{kind.__name__} does not "
            f"promise: use peft_plus.Trainer, or peft_plus.with_plugins({kind.__name__})."
        )
    if exact and trainer.args.save_only_model:
        raise CallError("Racing takes runs up again from checkpoints: leave out save_only_model=True.")


def _fresh(trainer: Any, factory: Factory, number: int) -> nn.Module:
    """The Trainer's model, which no other run may have trained before."""
    model = transformers_model(trainer.model)
    before = getattr(model, _TRAINED_BY, None)
    if before is not None:
        name = getattr(factory, "__qualname__", type(factory).__name__)
        raise CallError(
            f"The factory {name} returned, for run {number}, the model that run {before} trained, so that one would go "
            "on from the other: build or load the model inside the factory."
        )
    return model


def _give(trainer: Any, seeds: Seeds, folder: Path) -> None:
    """Folder and seeds, wherever a Trainer has them from."""
    args, loading = trainer.args, trainer.accelerator.dataloader_config
    args.output_dir = str(folder)
    args.seed, args.data_seed = seeds.dropout, seeds.order
    loading.data_seed = seeds.order  # it was told when the Trainer was built
    if not loading.use_seedable_sampler:
        raise CallError(
            "accelerator_config={'use_seedable_sampler': False} draws the order of the data from the stream of the "
            "dropout, so that they cannot be told apart: leave it out."
        )
    build = getattr(trainer, "model_init", None)
    if build is not None:  # the Trainer calls it once more, with the seed of the dropout

        @functools.wraps(build)
        def seeded(*given: Any) -> Any:
            from transformers import set_seed

            set_seed(seeds.init)
            model = build(*given)
            set_seed(seeds.dropout)
            return model

        trainer.model_init = seeded


def _newest(folder: Path) -> tuple[str | None, int]:
    """The newest whole checkpoint of an interrupted run, and its step; (None, 0) where there is none."""
    try:
        found = newest_whole(folder)
    except CheckpointError as error:
        logger.warning("The run begins anew, since none of its checkpoints can be used: %s", error)
        clear(folder)
        return None, 0
    if found is None:
        return None, 0
    logger.info("The run goes on from %s.", found.folder)
    return str(found.folder), found.step


def _peak_bytes() -> int:
    """The largest memory that this process ever had."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _metrics(found: Any) -> dict[str, float]:
    if not isinstance(found, Mapping):
        raise CallError(f"evaluate returned {found!r}; expected a mapping from names of metrics to numbers.")
    return numbers_in(found)


def _majority(dataset: Any) -> float | None:
    """The share of the largest class among whole-number labels, one to a row; None where the data hold none."""
    columns = getattr(dataset, "column_names", None)
    rows: Any = None
    if isinstance(columns, list):
        name = next((name for name in ("labels", "label") if name in columns), None)
        rows = None if name is None else dataset[name]
    elif isinstance(dataset, list) and 0 < len(dataset) <= _ROWS_LOOKED_AT and isinstance(dataset[0], Mapping):
        name = next((name for name in ("labels", "label") if name in dataset[0]), None)
        rows = None if name is None else [row[name] for row in dataset]
    if rows is None:
        return None
    try:
        labels = np.asarray(rows)
    except ValueError:  # of different lengths: not one to a row
        return None
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or not len(labels):
        return None
    return largest_share(labels)
