"""Stages: the training runs that one call of `fit` goes through, in order."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import MethodError
from .names import nearest

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training run of a plan.

    Attributes:
        name: unique in the plan; names its folder and its line in tables.
        train: which of the tuner's parameters may train: `all`, or only the task's `head`.
        plugins: names of the plugins at work in this stage, or None for all.
        args: what differs from the user's TrainingArguments, e.g. `{"num_train_epochs": 2, "learning_rate": 1e-3}`.
    """

    name: str = "train"
    train: Literal["all", "head"] = "all"
    plugins: tuple[str, ...] | None = None
    args: Mapping[str, Any] = field(default_factory=dict)


def fit(
    model: nn.Module,
    args: TrainingArguments,
    *,
    trainer_class: type[Any] | None = None,
    resume_from_checkpoint: bool = False,
    **trainer_kwargs: Any,
) -> list[Any]:
    """Run every stage of a model's plan, with a fresh Trainer each, so that optimizer and schedule start anew.

    Args:
        model: from `get_model` or `attach`.
        args: as for a Trainer; a stage changes what it plans (`Stage.args`) and writes into its own sub-folder of
            `output_dir` when there are several.
        trainer_class: any Trainer class, plugins are added to it; `peft_plus.Trainer` by default.
        resume_from_checkpoint: go on where a run with the same plan and `output_dir` was interrupted: in the last stage
            that has a checkpoint, from its newest whole one. Where there is none yet, a warning, and the run begins.
        trainer_kwargs: for the Trainer: `train_dataset`, `eval_dataset`, `data_collator`, …
    Returns: one TrainOutput for each stage; None for a stage that was finished before the run was interrupted.
    Raises:
        MethodError: the model has no plan, or a stage sets an argument that TrainingArguments does not have.
        CheckpointError: the run cannot go on from what is there.
    """
    from .argument_values import check_values
    from .arguments import plan_of
    from .hf import Trainer, with_plugins
    from .own_schedule import check_own_schedule

    plan = plan_of(model)
    if plan is None:
        raise MethodError(
            "fit runs a plan, and this model has none. Make it with get_model, or call attach(model, …) first."
        )
    if len(plan.stages) > 1 and any(o is not None for o in trainer_kwargs.get("optimizers") or ()):
        raise MethodError(
            f"This method runs in {len(plan.stages)} stages, each with an optimizer of its own, but optimizers= was "
            "given. Pass optimizer_cls_and_kwargs=(class, settings) instead."
        )
    if not isinstance(resume_from_checkpoint, bool):
        raise MethodError(
            f"fit(resume_from_checkpoint={resume_from_checkpoint!r}): give True or False. Which stage to go on with, "
            "and from which checkpoint, is found in output_dir."
        )
    stage_args = [arguments_of(stage, args, nested=len(plan.stages) > 1) for stage in plan.stages]
    for own in stage_args:  # of all stages, before the first one trains
        check_values(own, own_optimizer=bool({"optimizers", "optimizer_cls_and_kwargs"} & trainer_kwargs.keys()))
    for stage, own in zip(plan.stages, stage_args, strict=True):
        check_own_schedule(plan, stage, own)
    begun = _last_begun(stage_args) if resume_from_checkpoint else None
    outputs: list[Any] = [None] * (begun or 0)  # what those stages trained is in the checkpoint of a later one
    for number in range(begun or 0, len(plan.stages)):
        trainer = with_plugins(trainer_class or Trainer)(model, stage_args[number], **trainer_kwargs)
        trainer.stage = plan.stages[number]
        outputs.append(trainer.train(resume_from_checkpoint=number == begun))
    return outputs


def _last_begun(stage_args: Sequence[TrainingArguments]) -> int | None:
    """Number of the last stage that has a checkpoint; None where no stage has, with a warning."""
    from .distributed import gather
    from .find_checkpoint import finished

    folders = [args.output_dir or "." for args in stage_args]
    found = [number for number, folder in enumerate(folders) if finished(folder)]
    last = gather(found[-1] if found else None)[0]  # as the process sees it that saves
    if last is None:
        logger.warning("There is no checkpoint in %s yet, so training begins.", " or ".join(map(repr, folders)))
    return last


def arguments_of(stage: Stage, args: TrainingArguments, *, nested: bool = False) -> TrainingArguments:
    """The user's arguments with what a stage changes in them, which is logged.

    Args:
        nested: whether it writes into a folder of its own.
    Raises:
        MethodError: there is no such argument.
    """
    unknown = [name for name in stage.args if not hasattr(args, name)]
    if unknown:
        raise MethodError(
            f"The stage {stage.name!r} sets {unknown[0]!r}, which {type(args).__name__} does not have."
            f"{nearest(unknown[0], vars(args))}"
        )
    changed = {name: value for name, value in stage.args.items() if getattr(args, name) != value}
    if changed:
        told = ", ".join(f"{name} {getattr(args, name)!r} → {value!r}" for name, value in changed.items())
        logger.info("The method changes the arguments of the stage %r: %s.", stage.name, told)
    own = copy.copy(args)
    for name, value in stage.args.items():
        setattr(own, name, value)
    if nested:
        own.output_dir = str(Path(args.output_dir or "trainer_output") / stage.name)
    return own
