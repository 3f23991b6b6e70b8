"""The one owner of effects: the only code that sets `requires_grad` and learning rates.

Plugins declare, this applies. Three rules keep it exact:
- the optimizer is built over every parameter that may ever train, and only afterwards is anything frozen, so that a
  layer thawed later moves;
- freezing is `requires_grad_(False)` with `grad = None`, at an update boundary: weight decay and momentum of a zero
  gradient would still move a weight;
- a scaled rate stands in a group only during `optimizer.step()`, so schedulers never compound it.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from .ask import ask
from .compose import Plan, who
from .distributed import plain_parameters
from .errors import MethodError, PluginError
from .plugin import Param, Run
from .stages import Stage
from .timeline import Change, Group

logger = logging.getLogger(__name__)


class Effects:
    """Applies a plan's declarations to one model during one stage.

    Args:
        model: the model as built, not wrapped.
        plan: what hangs on it.
        stage: the stage that will run.
    Raises:
        MethodError: the model's trainable parameters are no longer those that the plan knows.
    """

    def __init__(self, model: nn.Module, plan: Plan, stage: Stage) -> None:
        self.plan, self.stage = plan, stage
        plugins = plan.active(stage)
        self._gates = [p for p in plugins if "may_train" in p.hooks()]
        self._rates = [p for p in plugins if "lr_scale" in p.hooks()]
        tensors = dict(model.named_parameters())
        _check_unchanged(tensors, plan.params)
        self._take(tensors)
        self._running = [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
        self._wanted: dict[str, bool] = {}
        self._next: int | None = 0
        if not self._tensors:
            raise MethodError(
                f"The stage {stage.name!r} trains only the head, but the tuner {plan.tuner!r} left no head trainable."
            )

    def _take(self, tensors: Mapping[str, nn.Parameter]) -> None:
        params = self.plan.params
        self._frozen = [t for n, t in tensors.items() if n in params and not self._in_stage(params[n])]
        self._others = [t for n, t in tensors.items() if n not in params]
        self._tensors = {n: tensors[n] for n, p in params.items() if self._in_stage(p)}
        self._by_id = {id(t): params[n] for n, t in self._tensors.items()}

    def rebind(self, model: nn.Module) -> None:
        """After the model was prepared: FSDP2 puts sharded tensors in the place of those that were there."""
        self._take(plain_parameters(model))

    def _in_stage(self, param: Param) -> bool:
        return self.stage.train == "all" or param.part == "head"

    @property
    def flips(self) -> bool:
        """Whether anything may be frozen or thawed while this stage runs."""
        return bool(self._gates)

    @property
    def scheduled_by(self) -> list[str]:
        """The names of the plugins that freeze and thaw."""
        return [plugin.name for plugin in self._gates]

    @property
    def depths(self) -> tuple[int, ...]:
        """The depths at which something may train, from the top down."""
        return tuple(sorted({self.plan.params[n].depth for n in self._tensors}, reverse=True))

    @property
    def lowest(self) -> int:
        """The lowest depth at which something trains now; L + 2 where nothing does. All blocks below it are frozen."""
        trained = (self.plan.params[name].depth for name, trains in self._wanted.items() if trains)
        return min(trained, default=self.plan.layers.num_blocks + 2)

    @property
    def tensors(self) -> Mapping[str, nn.Parameter]:
        """Name → parameter of all that may train in this stage."""
        return self._tensors

    def open(self) -> None:
        """Let everything train that ever may in this stage: before the optimizer is made and the model wrapped."""
        for tensor in self._frozen:
            _set_trainable(tensor, False)
        for tensor in self._tensors.values():
            _set_trainable(tensor, True)
            tensor.grad = None  # what a run left behind that broke off in the middle of a step
        self.plan.timeline[:] = [change for change in self.plan.timeline if change.stage != self.stage.name]

    def close(self) -> None:
        """After the stage: every parameter of the plan trainable again, as `get_model` left it."""
        for tensor in (*self._frozen, *self._tensors.values()):
            _set_trainable(tensor, True)

    def group(self, optimizer: Optimizer, *, scheduled: bool = False) -> None:
        """Split the optimizer's groups so that each holds one learning rate, keeping all their options.

        Args:
            optimizer: a fresh optimizer, over at least the parameters of this stage.
            scheduled: whether a scheduler was already made for its groups; then they cannot be split any more.
        Raises:
            MethodError: a parameter that may train is not in the optimizer, or its groups cannot be scaled.
        """
        held = {id(t) for group in optimizer.param_groups for t in group["params"]}
        missing = [n for n, t in self._tensors.items() if id(t) not in held]
        if missing:
            raise MethodError(
                f"{len(missing)} parameters may train but are not in the optimizer, e.g. {missing[0]!r}: it was made "
                "while they were frozen, so they would never move. Let the Trainer make the optimizer (pass "
                "optimizer_cls_and_kwargs instead of optimizers), or make it from all of model.parameters()."
            )
        if not self._rates:
            return
        groups = [part for group in optimizer.param_groups for part in self._split(group)]
        if scheduled and len(groups) != len(optimizer.param_groups):
            raise MethodError(
                f"{self._rates[0].name!r} sets a rate for each layer, but the learning-rate scheduler was already "
                "made for the optimizer's groups. Pass optimizers=(optimizer, None), or let the Trainer make both."
            )
        optimizer.param_groups[:] = groups

    def _split(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        parts: dict[Any, list[nn.Parameter]] = {}
        for tensor in group["params"]:
            param = self._by_id.get(id(tensor))
            key = tuple(ask(p, "lr_key", param) for p in self._rates) if param else None
            parts.setdefault(key, []).append(tensor)
        return [{**group, "params": tensors} for tensors in parts.values()]

    def apply(self, run: Run) -> bool:
        """Freeze and thaw as the plugins say for `run.step`. Call at each update boundary; returns whether it changed.

        Also undoes what others did to the flags meanwhile.
        """
        if not self._wanted or (self._next is not None and run.step >= self._next):
            wanted = {name: self._asks(run, self.plan.params[name]) for name in self._tensors}
            self._next = self._earliest_change(run)
        else:
            wanted = self._wanted
        changed, self._wanted = wanted != self._wanted, wanted
        self.hold()
        if changed:
            self._note(run, frozenset(self.groups(wanted.__getitem__)))
        return changed

    def hold(self) -> None:
        """Put every flag back to what it is in this step.

        PEFT lets all adapters train again whenever they are switched, as preference trainers do for their reference
        pass. Between a forward pass and its backward that would break activation checkpointing, which runs the forward
        once more and must find it as it was.
        """
        for name, tensor in self._tensors.items():
            if tensor.requires_grad != self._wanted[name]:
                _set_trainable(tensor, self._wanted[name])
        for tensor in (*self._frozen, *self._others):
            if tensor.requires_grad:
                _set_trainable(tensor, False)

    def _note(self, run: Run, groups: frozenset[Group]) -> None:
        """Write what trains from now on into the timeline, unless it says so already (after a resume)."""
        if run.step >= max(run.max_steps, 1):
            return  # resumed at its end
        mine = [change for change in self.plan.timeline if change.stage == self.stage.name]
        if not mine or mine[-1].groups != groups:
            self.plan.timeline.append(Change(self.stage.name, run.step, run.max_steps, groups))

    def _asks(self, run: Run, param: Param) -> bool:
        answers = [ask(plugin, "may_train", run, param) for plugin in self._gates]
        for plugin, answer in zip(self._gates, answers, strict=True):
            if not isinstance(answer, bool):
                raise PluginError(
                    f"{who(plugin, self.plan.origins)}: may_train returned {answer!r} for {param.name} at step "
                    f"{run.step}; expected a bool."
                )
        return all(answers)

    def _earliest_change(self, run: Run) -> int | None:
        steps: list[Any] = []
        for plugin in self._gates:
            answer = ask(plugin, "next_change", run)
            if answer is None:
                continue
            whole = isinstance(answer, int) and not isinstance(answer, bool)
            if answer is not NotImplemented and not (whole and answer > run.step):
                raise PluginError(
                    f"{who(plugin, self.plan.origins)}: next_change answered {answer!r} at step {run.step}; expected a "
                    "later step, None for never again, or NotImplemented."
                )
            steps.append(answer)
        return run.step + 1 if NotImplemented in steps else min(steps, default=None)

    def _foresight(self, run: Run) -> bool:
        """Whether every plugin can tell ahead what will train when."""
        return all(ask(plugin, "next_change", run) is not NotImplemented for plugin in self._gates)

    def recall(self, run: Run) -> None:
        """After a resume: what trained before it, as the plugins tell, so that the timeline is whole."""
        if run.step == 0 or not self._foresight(run):
            return
        for step, groups in self._schedule(run, 0, run.step):
            self.plan.timeline.append(Change(self.stage.name, step, run.max_steps, frozenset(groups)))

    def never_trained(self, run: Run) -> set[Group]:
        """The groups that no step of this stage will train, as far as the plugins can tell ahead."""
        if not self._foresight(run) or run.step >= max(run.max_steps, 1):
            return set()  # unknown, or resumed at its end
        never = self.groups()
        for _, groups in self._schedule(run, run.step, max(run.max_steps, 1)):
            never -= groups
            if not never:
                break
        return never

    def _schedule(self, run: Run, start: int, stop: int) -> Iterator[tuple[int, set[Group]]]:
        """From `start` until before `stop`: each step at which what trains may change, and what trains from it on."""
        there, step = dataclasses.replace(run), start
        while step is not None and step < stop:
            there.step = step
            yield step, self.groups(lambda name: self._asks(there, self.plan.params[name]))
            step = self._earliest_change(there)

    def groups(self, trains: Callable[[str], bool] = lambda _: True) -> set[Group]:
        """The (depth, part) of the parameters for which `trains(name)` holds."""
        return {(self.plan.params[n].depth, self.plan.params[n].part) for n in self._tensors if trains(n)}

    def trains(self, name: str) -> bool:
        """Whether a parameter trains at the current step."""
        return self._wanted.get(name, False)

    def rest(self) -> None:
        """Once the model is in train mode: norms with running statistics rest (eval mode) while they are frozen.

        Their statistics are part of the base: they would go on moving without any gradient, and are saved by nobody.
        """
        for module in self._running:
            if not any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
                module.eval()

    def drop_frozen_gradients(self) -> None:
        """After each backward: no frozen tensor may hold a gradient, however it got one (it would enter the norm)."""
        for name, tensor in self._tensors.items():
            if not self.trains(name):
                tensor.grad = None
        for tensor in self._frozen:
            tensor.grad = None

    def scale_rates(self, optimizer: Optimizer, run: Run) -> Callable[[], None]:
        """Put the plugins' rates into the groups for one update; the returned function puts the old ones back.

        Raises:
            MethodError: a group has no learning rate to scale (Adafactor with relative steps).
            PluginError: a plugin answered with something that is no factor ≥ 0.
        """
        if not self._rates:
            return lambda: None
        before = [(group, group["lr"]) for group in optimizer.param_groups]
        scaled: list[tuple[dict[str, Any], Any]] = []
        for group, rate in before:
            param = self._by_id.get(id(group["params"][0])) if group["params"] else None
            if param is None:
                continue
            if rate is None:
                raise MethodError(
                    f"{self._rates[0].name!r} scales the learning rate, but the optimizer computes its own (lr=None): "
                    "set relative_step=False and a learning rate."
                )
            scaled.append((group, rate * self.scale(run, param)))
        for group, rate in scaled:  # once all plugins have answered, so that none that raises leaves half of them
            # Not in place: capturable optimizers keep the rate in a tensor that the scheduler still holds.
            group["lr"] = rate

        def restore() -> None:
            for group, rate in before:
                group["lr"] = rate

        return restore

    def scale(self, run: Run, param: Param) -> float:
        """The product of all plugins' multipliers for one parameter."""
        product = 1.0
        for plugin in self._rates:
            factor = ask(plugin, "lr_scale", run, param)
            if not (isinstance(factor, (int, float)) and math.isfinite(factor) and factor >= 0):
                raise PluginError(
                    f"{who(plugin, self.plan.origins)}: lr_scale returned {factor!r} for {param.name} at step "
                    f"{run.step}; expected a number ≥ 0."
                )
            product *= factor
        return product


def check_without_epochs(plan: Plan, stage: Stage, model: nn.Module, max_steps: int) -> None:
    """For data without a length: ask once, as at step 0, what trains, so that a schedule in epochs is refused now.

    Raises:
        PluginError: a plugin needs to know how many steps an epoch has.
    """
    run = Run(
        model=model,
        task=plan.task,
        num_blocks=plan.layers.num_blocks,
        depths=tuple(sorted({param.depth for param in plan.params.values()}, reverse=True)),
        stages=plan.stages,
        stage=stage,
        max_steps=max_steps,
    )
    for plugin in plan.active(stage):
        for hook in {"may_train", "lr_scale"}.intersection(plugin.hooks()):
            ask(plugin, hook, run, next(iter(plan.params.values())))


def trainable_names(model: nn.Module) -> list[str]:
    """Names of the parameters that train as the model stands."""
    return [name for name, tensor in model.named_parameters() if tensor.requires_grad]


def _set_trainable(tensor: torch.Tensor, trains: bool) -> None:
    tensor.requires_grad_(trains)
    if not trains:
        tensor.grad = None


def _check_unchanged(tensors: Mapping[str, nn.Parameter], params: Mapping[str, Param]) -> None:
    """Raise where somebody changed what trains behind the plan's back: going on would undo it silently."""
    fix = "Call peft_plus.attach(model, …) after the change, so that the plan knows it."
    gone = [name for name in params if name not in tensors]
    if gone:
        raise MethodError(f"{len(gone)} parameters of the plan are no longer in the model, e.g. {gone[0]!r}. {fix}")
    added = [n for n, t in tensors.items() if t.requires_grad and n not in params]
    if added:
        raise MethodError(f"{len(added)} parameters were made trainable after the plan, e.g. {added[0]!r}. {fix}")
    frozen = [name for name in params if not tensors[name].requires_grad]
    if frozen:
        raise MethodError(f"{len(frozen)} parameters of the plan were frozen by hand, e.g. {frozen[0]!r}. {fix}")
