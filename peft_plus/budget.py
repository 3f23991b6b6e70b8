"""What a Trainer's stage may cost and at which rate, where plugins choose it by the data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from .ask import ask
from .compose import Plan, who
from .distributed import gather
from .errors import MethodError, PluginError
from .plugin import Plugin
from .run_data import RunData
from .stage_start import run_at_start
from .stages import Stage, arguments_of
from .trunk import TrainingData

if TYPE_CHECKING:
    from transformers import TrainingArguments


def budgeted(
    plan: Plan, stage: Stage, model: nn.Module, args: TrainingArguments, data: TrainingData, *, evaluates: bool
) -> TrainingArguments:
    """The arguments with what the plugins of a stage choose; the same object where none chooses.

    Every process must call it; what the first one found counts.

    Args:
        data: what the Trainer knows of them.
        evaluates: whether there is something to evaluate on.
    Raises:
        MethodError: two plugins choose differently, an argument is unknown, or a setting does not fit the data.
        PluginError: an answer is no mapping.
    """
    plugins = [plugin for plugin in plan.active(stage) if "plan_budget" in plugin.hooks()]
    if not plugins:
        return args
    tensors = dict(model.named_parameters())
    rows = args.train_batch_size * args.world_size
    run = run_at_start(
        plan,
        model,
        stage,
        seed=args.seed,
        base_lr=args.learning_rate,
        batch_size=args.train_batch_size,
        processes=args.world_size,
        steps_per_epoch=math.ceil(math.ceil((data.examples or 0) / rows) / args.gradient_accumulation_steps),
        evaluates=evaluates,
        arguments=args,
    )
    run.data = RunData(model, plan.task, {param.name: tensors[param.name] for param in run.params}, data)
    chosen: dict[str, Any] = {}
    owners: dict[str, Plugin] = {}
    for plugin in plugins:
        for name, value in _answer(plan, plugin, run).items():
            other = owners.setdefault(name, plugin)
            if chosen.setdefault(name, value) != value:
                raise MethodError(
                    f"{who(other, plan.origins)} chooses {name}={chosen[name]!r} and {who(plugin, plan.origins)} "
                    f"{name}={value!r}. Drop one of them."
                )
    chosen = gather(chosen)[0]
    fixed = {name: stage.args[name] for name in chosen if name in stage.args and stage.args[name] != chosen[name]}
    if fixed:
        raise MethodError(
            f"{who(owners[next(iter(fixed))], plan.origins)} chooses {', '.join(chosen)} by the data, and the method "
            f"sets {', '.join(f'{name}={value!r}' for name, value in fixed.items())}. Drop one of them."
        )
    return arguments_of(Stage(name=stage.name, args=chosen), args) if chosen else args


def _answer(plan: Plan, plugin: Plugin, run: Any) -> Mapping[str, Any]:
    try:
        answer = ask(plugin, "plan_budget", run)
    except PluginError as error:
        if isinstance(error.__cause__, ValueError):
            raise MethodError(f"{who(plugin, plan.origins)}: {error.__cause__}") from error.__cause__
        raise
    if not isinstance(answer, Mapping):
        raise PluginError(
            f"{who(plugin, plan.origins)} returned {answer!r} from plan_budget; expected a mapping from names of "
            "TrainingArguments to values."
        )
    return answer
