"""The schedule that a plan would follow, asked ahead and written down in the words of `freeze_plan`."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from .arguments import plan_of
from .ask import ask
from .compose import Plan, who
from .effects import Effects
from .errors import MethodError
from .layers import depth_label
from .plugin import Param, Run
from .stage_start import run_at_start
from .stages import Stage

logger = logging.getLogger(__name__)


def freezing_schedule(
    model: nn.Module, *, max_steps: int, steps_per_epoch: int = 0, seed: int = 42, stage: str | None = None
) -> list[dict[str, Any]]:
    """Which weights train when, as far as the plan's plugins tell ahead: phases for `freeze_plan`.

    ```python
    phases = freezing_schedule(model, max_steps=300, steps_per_epoch=100)  # [{"train": ["head"], "steps": 100}, …]
    model = get_model(base, method={"lora": {}, "freeze_plan": {"phases": phases}})
    ```
    The phases say what trains, and by what a plugin that freezes multiplies the rate of a whole phase (`chain_thaw`).
    Plugins of rates alone (`llrd`) stay beside `freeze_plan`. Nothing is trained or changed.

    Args:
        model: from `get_model` or `attach`.
        max_steps: optimizer steps of the run.
        steps_per_epoch: of one pass over the data, for plugins that count epochs.
        seed: the run's, for plugins that draw.
        stage: which of the plan's stages, by name; needed where there are several.
    Returns: the phases in order; the last one has no end.
    Raises:
        MethodError: the model has no plan; a plugin decides by what the run brings, e.g. by a metric; or at some step
            nothing trains.
    """
    plan = plan_of(model)
    if plan is None:
        raise MethodError("This model has no plan. Make it with get_model, or call attach(model, …) first.")
    if max_steps < 1:
        raise MethodError(f"max_steps={max_steps}: give the number of optimizer steps of the run, ≥ 1.")
    known = {"seed": seed, "max_steps": max_steps, "steps_per_epoch": steps_per_epoch}
    chosen = _stage(plan, stage)
    effects = Effects(model, plan, chosen, **known)
    run = dataclasses.replace(run_at_start(plan, model, chosen, **known), params=effects.params, depths=effects.depths)
    changes: list[tuple[int, frozenset[str]]] = []
    for step, names in effects.schedule(run, 0, max_steps):
        unsure = effects.unforeseen(run.at(step))
        if unsure is not None:
            raise MethodError(
                f"{who(unsure, plan.origins)} decides by what the run brings, such as a metric or gradients, so nobody "
                f"knows ahead what trains after step {step}. Choose settings that count steps or epochs, or write the "
                "phases by hand."
            )
        if not names:
            raise effects.nothing_trains(step)
        changes.append((step, names))
    ends = [step for step, _ in changes[1:]] + [max_steps]
    begun: list[tuple[int, frozenset[str], float]] = []
    for (step, names), end in zip(changes, ends, strict=True):
        factor = _factor(plan, chosen, run, names, range(step, end))
        if not begun or begun[-1][1:] != (names, factor):
            begun.append((step, names, factor))
    phases: list[dict[str, Any]] = []
    for (step, names, factor), (end, *_) in zip(begun, [*begun[1:], (None,)], strict=True):
        phase: dict[str, Any] = {"train": words(names, plan.params.values(), plan.layers.num_blocks)}
        phase |= {"steps": end - step} if end is not None else {}
        phases.append(phase | ({"lr_scale": factor} if factor != 1 else {}))
    return phases


def _factor(plan: Plan, stage: Stage, run: Run, names: Collection[str], steps: range) -> float:
    """By what the plugins that freeze multiply the rate of all that trains in some steps.

    What changes from weight to weight or from step to step is left out, with a warning; 1 stands for it.
    """
    product = 1.0
    for plugin in plan.active(stage):
        freezes = {"may_train", "ever_trains"}.intersection(plugin.hooks())
        if not freezes or "lr_scale" not in plugin.hooks():
            continue
        there = {steps[0], steps[len(steps) // 2], steps[-1]}
        params = [param for param in run.params if param.name in names]
        found = {float(ask(plugin, "lr_scale", run.at(step), param)) for step in there for param in params}
        if len(found) == 1:
            product *= found.pop()
        elif steps[0] == 0:  # once is enough
            logger.warning("%s sets rates that no phase can hold; what is written leaves them out.", plugin.name)
    return product


def _stage(plan: Plan, name: str | None) -> Stage:
    if name is None and len(plan.stages) == 1:
        return plan.stages[0]
    found = next((stage for stage in plan.stages if stage.name == name), None)
    if found is None:
        names = ", ".join(repr(stage.name) for stage in plan.stages)
        if name is None:
            raise MethodError(f"This plan has the stages {names}. Say which: stage={plan.stages[-1].name!r}.")
        raise MethodError(f"This plan has the stages {names}, and stage={name!r} names none of them.")
    return found


def words(names: Collection[str], params: Iterable[Param], num_blocks: int) -> list[str]:
    """A set of parameters in the words of `freeze_plan`: places, and exact names where only part of a place trains.

    Args:
        names: which of `params`.
        params: all that the tuner trains.
        num_blocks: L.
    """
    there: dict[int, list[str]] = {}
    for param in params:
        there.setdefault(param.depth, []).append(param.name)
    full = [depth for depth in sorted(there) if all(name in names for name in there[depth])]
    if len(full) == len(there):
        return ["all"]
    said: list[str] = []
    for depth in full:
        previous = said[-1] if said else ""
        run = re.fullmatch(r"blocks? (\d+)(?:-(\d+))?", previous)
        if depth <= num_blocks and run and int(run[2] or run[1]) == depth - 1:
            said[-1] = f"blocks {run[1]}-{depth}"
        else:
            said.append(depth_label(depth, num_blocks))
    partly = [n for depth in sorted(there) if depth not in full for n in there[depth] if n in names]
    everything = [name for group in there.values() for name in group]
    return said + [_exactly(name, everything) for name in partly]


def _exactly(name: str, everything: Iterable[str]) -> str:
    """A pattern for this name: the name, or an expression where it would mean part of another one too."""
    plain = re.fullmatch(r"[\w.-]+", name) and not any(f".{name}." in f".{x}." for x in everything if x != name)
    return name if plain and "." in name else f"re:^{re.escape(name)}$"


def as_yaml(phases: Sequence[Mapping[str, Any]]) -> str:
    """The phases as a method in YAML, ready for an editor: `freeze_plan: {phases: […]}`."""
    lines = ["freeze_plan:", "  phases:"]
    for phase in phases:
        for i, (key, value) in enumerate(phase.items()):
            text = f"[{', '.join(map(_scalar, value))}]" if isinstance(value, list) else _scalar(value)
            lines.append(f"    {' ' if i else '-'} {key}: {text}")
    return "\n".join(lines)


def _scalar(value: Any) -> str:
    plain = isinstance(value, str) and re.fullmatch(r"[a-z][\w.-]*\.[\w.-]+|all|embeddings|head|blocks? [\d-]+", value)
    return value if plain else json.dumps(value)
