"""The data that a stage trains on, where plugins change them: asked and checked here, used by every loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.data import IterableDataset

from .ask import ask
from .compose import Plan, who
from .errors import MethodError, PluginError
from .stage_start import run_at_start
from .stages import Stage


@dataclass(frozen=True)
class StageData:
    """What a stage trains on.

    Attributes:
        dataset: the user's own object where no plugin changes it.
        redrawn_by: the plugin that makes other rows of the same examples in each epoch; empty where none does.
    """

    dataset: Any
    redrawn_by: str = ""


def data_plugins(plan: Plan, stage: Stage) -> list[Any]:
    """The plugins of a stage that may change its data, in order."""
    return [plugin for plugin in plan.active(stage) if "task_data" in plugin.hooks()]


def stage_data(plan: Plan, stage: Stage, model: nn.Module, dataset: Any, **start: Any) -> StageData:
    """Let every plugin change a stage's data, in order. Before the loader is made.

    Args:
        model: as built, not wrapped.
        dataset: the user's, with all its columns.
        start: what is known of where the stage begins: `seed`, `batch_size`, `processes`, `tokenizer`.
    Raises:
        MethodError: a setting does not fit the data.
        PluginError: a plugin failed, or what it returned cannot be trained on.
    """
    plugins = data_plugins(plan, stage)
    if not plugins:
        return StageData(dataset)
    run, redrawn_by = run_at_start(plan, model, stage, **start), ""
    for plugin in plugins:
        try:
            answer = ask(plugin, "task_data", run, dataset)
        except PluginError as error:
            if isinstance(error.__cause__, ValueError):
                raise MethodError(f"{who(plugin, plan.origins)}: {error.__cause__}") from error.__cause__
            raise
        if answer is dataset:
            continue
        wrong = _wrong(answer, dataset)
        if wrong:
            raise PluginError(f"{who(plugin, plan.origins)}: task_data returned {wrong}.")
        if hasattr(answer, "set_epoch") and not redrawn_by:
            redrawn_by = who(plugin, plan.origins)
        dataset = answer
    return StageData(dataset, redrawn_by)


def _wrong(answer: Any, dataset: Any) -> str:
    """What is wrong with an answer; empty where nothing is."""
    if _is_map_style(dataset) and not _is_map_style(answer):
        return f"{answer!r}; expected data with a length and access by index, as the data that it was given have"
    if _is_map_style(answer):
        return "" if len(answer) else "data without rows"
    if not hasattr(answer, "__iter__"):
        return f"{answer!r}; expected data: the ones that it was given, or others"
    return ""


def _is_map_style(dataset: Any) -> bool:
    stream = isinstance(dataset, IterableDataset)
    return not stream and hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")


def data_taken_from(plan: Plan, stage: Stage, trainer_class: type[Any]) -> MethodError:
    """The error for a Trainer class that makes its own loader, past the plan."""
    names = " and ".join(who(plugin, plan.origins) for plugin in data_plugins(plan, stage))
    return MethodError(
        f"{names} changes the training data, and {trainer_class.__name__} makes its loader of others. Drop the plugin, "
        "or use a Trainer that takes its loader from transformers.Trainer."
    )
