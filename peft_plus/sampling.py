"""The order of the training data, where a plugin sets it: asked and checked here, used by every loop."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.data import BatchSampler, Sampler

from .ask import ask
from .compose import Plan, who
from .errors import MethodError, PluginError
from .plugin import Plugin, Run
from .stages import Stage


def order_plugin(plan: Plan, stage: Stage | None = None) -> Plugin | None:
    """The plugin that sets the order of the data, in one stage or in any; None where the loop's own order holds."""
    plugins = plan.plugins if stage is None else plan.active(stage)
    return next((plugin for plugin in plugins if "sampler" in plugin.hooks()), None)


def order(
    plan: Plan, stage: Stage, model: nn.Module, dataset: Any, *, seed: int, batch_size: int, processes: int
) -> Sampler[int] | None:
    """The order that the plan wants for a stage's data, or None for the loop's own. Before the optimizer exists.

    The loop cuts the indices into batches, and calls `set_epoch` before each epoch where the sampler has it.

    Args:
        model: as built, not wrapped.
        dataset: with all its columns.
        seed: of the data's order.
        batch_size: rows of a micro-batch of one process.
        processes: how many share a step.
    Raises:
        MethodError: the data bring their own order.
        PluginError: what the plugin returned is no sampler of indices.
    """
    plugin = order_plugin(plan, stage)
    if plugin is None:
        return None
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise MethodError(
            f"{who(plugin, plan.origins)} sets the order of the data, but {type(dataset).__name__} has no length or no "
            "access by index, and so brings its own. Give map-style data, e.g. a datasets.Dataset, or drop the plugin."
        )
    run = Run(
        model=model,
        task=plan.task,
        num_blocks=plan.layers.num_blocks,
        stages=plan.stages,
        stage=stage,
        seed=seed,
        batch_size=batch_size,
        processes=processes,
    )
    sampler = ask(plugin, "sampler", run, dataset)
    if sampler is None:
        return None
    if not isinstance(sampler, Sampler) or isinstance(sampler, BatchSampler) or not hasattr(sampler, "__len__"):
        raise PluginError(
            f"{who(plugin, plan.origins)}: sampler returned {sampler!r}; expected a torch.utils.data.Sampler of "
            "indices with a length, or None."
        )
    return sampler


def order_taken_from(plan: Plan, trainer_class: type[Any]) -> MethodError:
    """The error for a Trainer class that makes its own loader or sampler, past the plan."""
    plugin = order_plugin(plan)
    assert plugin is not None
    return MethodError(
        f"{who(plugin, plan.origins)} sets the order of the data, and so does {trainer_class.__name__}. Drop the "
        "plugin, or use a Trainer that takes its sampler from transformers.Trainer."
    )


def check_strategy(plan: Plan, args: Any) -> None:
    """Raise MethodError where TrainingArguments order the data too."""
    plugin = order_plugin(plan)
    if plugin is not None and args.train_sampling_strategy != "random":
        raise MethodError(
            f"{who(plugin, plan.origins)} sets the order of the data, and so does train_sampling_strategy="
            f"{args.train_sampling_strategy!r}. Leave one of them out."
        )
