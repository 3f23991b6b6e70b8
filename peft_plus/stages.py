"""Stages: the training runs that one call of `fit` goes through, in order."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import MethodError
from .names import nearest

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments


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
    **trainer_kwargs: Any,
) -> list[Any]:
    """Run every stage of a model's plan, with a fresh Trainer each, so that optimizer and schedule start anew.

    Args:
        model: from `get_model` or `attach`.
        args: as for a Trainer; a stage changes what it plans (`Stage.args`) and writes into its own sub-folder of
            `output_dir` when there are several.
        trainer_class: any Trainer class, plugins are added to it; `peft_plus.Trainer` by default.
        trainer_kwargs: for the Trainer: `train_dataset`, `eval_dataset`, `data_collator`, …
    Returns: one TrainOutput for each stage.
    Raises:
        MethodError: the model has no plan, or a stage sets an argument that TrainingArguments does not have.
    """
    from .argument_values import check_values
    from .arguments import plan_of
    from .hf import Trainer, with_plugins

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
    stage_args = [_arguments_of(stage, args, nested=len(plan.stages) > 1) for stage in plan.stages]
    for own in stage_args:  # of all stages, before the first one trains
        check_values(own, own_optimizer=bool({"optimizers", "optimizer_cls_and_kwargs"} & trainer_kwargs.keys()))
    outputs = []
    for stage, own in zip(plan.stages, stage_args, strict=True):
        trainer = with_plugins(trainer_class or Trainer)(model, own, **trainer_kwargs)
        trainer.stage = stage
        outputs.append(trainer.train())
    return outputs


def _arguments_of(stage: Stage, args: TrainingArguments, *, nested: bool) -> TrainingArguments:
    unknown = [name for name in stage.args if not hasattr(args, name)]
    if unknown:
        raise MethodError(
            f"The stage {stage.name!r} sets {unknown[0]!r}, which {type(args).__name__} does not have."
            f"{nearest(unknown[0], vars(args))}"
        )
    own = copy.copy(args)
    for name, value in stage.args.items():
        setattr(own, name, value)
    if nested:
        own.output_dir = str(Path(args.output_dir or "trainer_output") / stage.name)
    return own
