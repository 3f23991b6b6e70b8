"""Where a stage begins, before there is an optimizer: what plugins are asked there."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from .ask import ask
from .compose import Plan, who
from .errors import MethodError, PluginError
from .plugin import NEEDS, Param, Plugin, Run
from .stages import Stage


def run_at_start(plan: Plan, model: nn.Module, stage: Stage, **more: Any) -> Run:
    """A run that stands at step 0 of a stage.

    Args:
        more: what else is known, e.g. the `seed`.
    """
    params = tuple(param for param in plan.params.values() if stage.train == "all" or param.part == "head")
    return Run(
        model=model,
        task=plan.task,
        num_blocks=plan.layers.num_blocks,
        params=params,
        depths=depths_of(params),
        layers=plan.layers,
        stages=plan.stages,
        stage=stage,
        **more,
    )


def depths_of(params: Iterable[Param]) -> tuple[int, ...]:
    """The depths at which they lie, from the top down."""
    return tuple(sorted({param.depth for param in params}, reverse=True))


def check_settings_fit(plan: Plan, model: nn.Module) -> None:
    """Let every plugin look at a model that was just built.

    Raises:
        MethodError: a setting does not fit it.
        PluginError: a plugin failed.
    """
    starts = [run_at_start(plan, model, stage) for stage in plan.stages]
    most = max(starts, key=lambda run: len(run.params))  # a first stage may train the head alone
    run = dataclasses.replace(starts[0], params=most.params, depths=most.depths)
    for plugin in plan.plugins:
        others = [_trained_by(plan, other, run) for other in plan.plugins if other is not plugin]
        params = _in_all(run.params, others)
        if "layers" in plugin.needs:
            _check_layers(plan, plugin, params)
        if "on_build" not in plugin.hooks():
            continue
        try:
            ask(plugin, "on_build", dataclasses.replace(run, params=params, depths=depths_of(params)))
        except PluginError as error:
            if isinstance(error.__cause__, ValueError):
                raise MethodError(f"{who(plugin, plan.origins)}: {error.__cause__}") from error.__cause__
            raise


def _trained_by(plan: Plan, plugin: Plugin, run: Run) -> set[str]:
    """The names of those of `run.params` that may train as far as one plugin is concerned.

    Raises:
        PluginError: it answered with something that is no bool.
    """
    if "ever_trains" not in plugin.hooks():
        return {param.name for param in run.params}
    answers = {param.name: ask(plugin, "ever_trains", run, param) for param in run.params}
    for name, answer in answers.items():
        if not isinstance(answer, bool):
            raise PluginError(
                f"{who(plugin, plan.origins)}: ever_trains returned {answer!r} for {name}; expected a bool."
            )
    return {name for name, answer in answers.items() if answer}


def _in_all(params: Iterable[Param], sets: Collection[set[str]]) -> tuple[Param, ...]:
    return tuple(param for param in params if all(param.name in names for names in sets))


def _check_layers(plan: Plan, plugin: Plugin, params: tuple[Param, ...]) -> None:
    if len(depths_of(params)) < 2:
        raise MethodError(
            f"{who(plugin, plan.origins)} needs {NEEDS['layers']}; here everything that trains lies at depth "
            f"{sorted(depths_of(params))}. Drop the plugin, or let the tuner reach more layers, and other plugins "
            "leave them."
        )


def ever_trained(plan: Plan, run: Run) -> tuple[Param, ...]:
    """Those of `run.params` that some step of the stage may train.

    Raises:
        MethodError: none is left.
        PluginError: a plugin answered with something that is no bool.
    """
    assert run.stage is not None
    plugins = [plugin for plugin in plan.active(run.stage) if "ever_trains" in plugin.hooks()]
    left = _in_all(run.params, [_trained_by(plan, plugin, run) for plugin in plugins])
    if not left and run.params:
        names = " and ".join(who(plugin, plan.origins) for plugin in plugins)
        raise MethodError(
            f"Nothing is left to train in the stage {run.stage.name!r}: {names} leaves out all {len(run.params)} "
            f"parameters that the tuner {plan.tuner!r} trains there. Change the settings, or drop "
            f"{'one of them' if len(plugins) > 1 else 'it'}."
        )
    return left


def check_without_epochs(plan: Plan, stage: Stage, model: nn.Module, max_steps: int) -> None:
    """For data without a length: ask once, as at step 0, what trains, so that a schedule in epochs is refused now.

    Raises:
        PluginError: a plugin needs to know how many steps an epoch has.
    """
    run = run_at_start(plan, model, stage, max_steps=max_steps)
    for plugin in plan.active(stage):
        for hook in {"may_train", "lr_scale"}.intersection(plugin.hooks()):
            ask(plugin, hook, run, next(iter(plan.params.values())))
