"""What a checkpoint keeps of a plan: its plugins' states, what trained when, and how earlier stages went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .ask import ask
from .compose import Plan, who
from .errors import MethodError, PluginError
from .proof import Row
from .stages import Stage
from .state_files import check_state
from .timeline import Change


def check_states(plan: Plan, stage: Stage) -> None:
    """Look whether every plugin's state can be saved: now rather than at the first checkpoint.

    Raises:
        PluginError: one cannot.
    """
    for plugin in plan.active(stage):
        label = who(plugin, plan.origins)
        state = ask(plugin, "state_dict")
        if not isinstance(state, Mapping):
            raise PluginError(f"{label}: state_dict returned {state!r}; expected a mapping, {{}} for no state.")
        try:
            check_state(dict(state), label)
        except TypeError as error:
            raise PluginError(f"Its checkpoints could not be saved: {error}") from error


def plan_state(plan: Plan, stage: Stage) -> dict[str, Any]:
    """Plain values and tensors, as the plan stands in a stage."""
    return {
        "plugins": {plugin.name: dict(ask(plugin, "state_dict")) for plugin in plan.active(stage)},
        "timeline": [[c.stage, c.step, c.max_steps, sorted(map(list, c.groups))] for c in plan.timeline],
        "engagement": {
            name: [[*row.group, row.steps, row.tensors, row.moved, row.reached] for row in rows]
            for name, rows in plan.engagement.items()
            if name != stage.name
        },
    }


def load_plan_state(plan: Plan, stage: Stage, state: Mapping[str, Any]) -> None:
    """Put back what `plan_state` gave.

    Raises:
        MethodError: the state is of other plugins.
        PluginError: a plugin does not take its state back.
    """
    plugins = {plugin.name: plugin for plugin in plan.active(stage)}
    if plugins.keys() != state["plugins"].keys():
        raise MethodError(
            f"The checkpoint holds the state of the plugins {sorted(state['plugins'])}, this run has "
            f"{sorted(plugins)}. Resume with the same method."
        )
    for name, own in state["plugins"].items():
        ask(plugins[name], "load_state_dict", own)
    plan.timeline[:] = [
        Change(name, step, max_steps, frozenset((depth, part) for depth, part in groups))
        for name, step, max_steps, groups in state["timeline"]
    ]
    for name, rows in state["engagement"].items():
        plan.engagement[name] = [Row((depth, part), *counts) for depth, part, *counts in rows]
