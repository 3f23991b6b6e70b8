"""What trains: the only code that sets `requires_grad`, as `rates.py` is the only one that sets learning rates.

Plugins declare, this applies. Three rules keep it exact:
- the optimizer is built over every parameter that may ever train, and only afterwards is anything frozen, so that a
  layer thawed later moves;
- freezing is `requires_grad_(False)` with `grad = None`, at an update boundary: weight decay and momentum of a zero
  gradient would still move a weight;
- what a step does follows from the plugins' answers for it alone, so that a resumed run does the same.
"""

from __future__ import annotations

import dataclasses
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
from .plugin import Param, Plugin, Run
from .stage_start import depths_of, ever_trained, run_at_start
from .stages import Stage
from .timeline import Change, Group

_LOOKED_AT = 100
"""Changes of a schedule that are looked at before the run, at least, for one at which nothing trains."""


class Effects:
    """Applies a plan's declarations to one model during one stage.

    Args:
        model: the model as built, not wrapped.
        plan: what hangs on it.
        stage: the stage that will run.
        more: what else is known where it begins, e.g. the `seed`.
    Raises:
        MethodError: the model's trainable parameters are no longer those that the plan knows, or none may train.
    """

    def __init__(self, model: nn.Module, plan: Plan, stage: Stage, **more: Any) -> None:
        self.plan, self.stage = plan, stage
        plugins = plan.active(stage)
        self._gates = [p for p in plugins if "may_train" in p.hooks()]
        tensors = dict(model.named_parameters())
        _check_unchanged(tensors, plan.params)
        self.params = ever_trained(plan, run_at_start(plan, model, stage, **more))
        """Every parameter that may train in this stage, in the model's order."""
        self._take(tensors)
        self._running = [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
        self._wanted: dict[str, bool] = {}
        self._next: int | None = 0
        if not self._tensors:
            raise MethodError(
                f"The stage {stage.name!r} trains only the head, but the tuner {plan.tuner!r} left no head trainable."
            )

    def _take(self, tensors: Mapping[str, nn.Parameter]) -> None:
        self._tensors = {param.name: tensors[param.name] for param in self.params}
        self._frozen = [tensors[name] for name in self.plan.params if name not in self._tensors]
        self._others = [t for n, t in tensors.items() if n not in self.plan.params]
        self._by_id = {id(tensors[param.name]): param for param in self.params}

    def rebind(self, model: nn.Module) -> None:
        """After the model was prepared: FSDP2 puts sharded tensors in the place of those that were there."""
        self._take(plain_parameters(model))

    def param_of(self, tensor: torch.Tensor) -> Param | None:
        """What a tensor is; None for one that does not train in this stage."""
        return self._by_id.get(id(tensor))

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
        return depths_of(self.params)

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

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Look at a fresh optimizer, before anything is frozen.

        Raises:
            MethodError: a parameter that may train is not in it, or its states cannot be dropped as a plugin wants.
        """
        held = {id(t) for group in optimizer.param_groups for t in group["params"]}
        missing = [n for n, t in self._tensors.items() if id(t) not in held]
        if missing:
            raise MethodError(
                f"{len(missing)} parameters may train but are not in the optimizer, e.g. {missing[0]!r}: it was made "
                "while they were frozen, so they would never move. Let the Trainer make the optimizer (pass "
                "optimizer_cls_and_kwargs instead of optimizers), or make it from all of model.parameters()."
            )
        dropping = next((plugin for plugin in self._gates if plugin.on_freeze == "drop_state"), None)
        if dropping is not None and isinstance(optimizer, torch.optim.Adagrad):
            raise MethodError(
                f"{who(dropping, self.plan.origins)} drops the optimizer's state of what it freezes, and Adagrad makes "
                "all states at its start and never again. Use another optimizer, e.g. AdamW."
            )

    def apply(self, run: Run) -> bool:
        """Freeze and thaw as the plugins say for `run.step`. Call at each update boundary; returns whether it changed.

        Also undoes what others did to the flags meanwhile.

        Raises:
            MethodError: the optimizer does not let go of the state of what it should forget.
        """
        if not self._wanted or (self._next is not None and run.step >= self._next):
            refusing = {param.name: self._refusing(run, param) for param in self.params}
            wanted = {name: not plugins for name, plugins in refusing.items()}
            self._next = self._earliest_change(run)
            self._drop_states(run.optimizer, refusing)
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

    def _drop_states(self, optimizer: Any, refusing: Mapping[str, list[Plugin]]) -> None:
        """Not only where a tensor has just been frozen: a checkpoint of that step still holds its state."""
        if optimizer is None:
            return
        for name, plugins in refusing.items():
            dropping = next((plugin for plugin in plugins if plugin.on_freeze == "drop_state"), None)
            if dropping is not None:
                tensor = self._tensors[name]
                optimizer.state.pop(tensor, None)
                if optimizer.state.get(tensor):
                    raise MethodError(
                        f"{who(dropping, self.plan.origins)} drops the optimizer's state of what it freezes, but "
                        f"{type(optimizer).__name__} does not let go of that of {name!r}. Use another optimizer."
                    )

    def _refusing(self, run: Run, param: Param) -> list[Plugin]:
        """The plugins that want it frozen."""
        answers = [ask(plugin, "may_train", run, param) for plugin in self._gates]
        for plugin, answer in zip(self._gates, answers, strict=True):
            if not isinstance(answer, bool):
                raise PluginError(
                    f"{who(plugin, self.plan.origins)}: may_train returned {answer!r} for {param.name} at step "
                    f"{run.step}; expected a bool."
                )
        return [plugin for plugin, answer in zip(self._gates, answers, strict=True) if not answer]

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

    def unforeseen(self, run: Run) -> Plugin | None:
        """The first plugin that cannot tell at `run.step` when it will answer differently; None where all can."""
        return next((p for p in self._gates if ask(p, "next_change", run) is NotImplemented), None)

    def recall(self, run: Run) -> None:
        """After a resume: what trained before it, as the plugins tell, so that the timeline is whole."""
        past: list[Change] = []
        for step, names in self.schedule(run, 0, run.step):
            if self.unforeseen(run.at(step)) is not None:
                return  # what made them change then is not known any more
            past.append(Change(self.stage.name, step, run.max_steps, frozenset(self.groups(names.__contains__))))
        self.plan.timeline.extend(past)

    def never_trained(self, run: Run) -> set[Group]:
        """The groups that no step of this stage has trained or will, as far as the plugins can tell ahead.

        Raises:
            MethodError: there is a step at which nothing trains.
        """
        never = self.groups() if run.step < max(run.max_steps, 1) else set()  # else resumed at its end
        never = never.difference(*(change.groups for change in self.plan.timeline if change.stage == self.stage.name))
        for looked, (step, names) in enumerate(self.schedule(run, run.step, max(run.max_steps, 1)), start=1):
            if not names:
                raise self.nothing_trains(step)
            never -= self.groups(names.__contains__)
            if self.unforeseen(run.at(step)) is not None:
                return set()
            if not never and looked >= _LOOKED_AT:
                break
        return never

    def nothing_trains(self, step: int) -> MethodError:
        """The error for a step from which on the plugins leave nothing."""
        alone = len(self._gates) == 1
        return MethodError(
            f"Nothing trains from step {step} on, by what "
            f"{' and '.join(who(plugin, self.plan.origins) for plugin in self._gates)} {'says' if alone else 'say'}. "
            f"Change the settings, or drop {'it' if alone else 'one of them'}."
        )

    def schedule(self, run: Run, start: int, stop: int) -> Iterator[tuple[int, frozenset[str]]]:
        """From `start` until before `stop`: each step at which what trains may change, and what trains from it on.

        After a step that `unforeseen` tells of, that is every step, with answers for the state as it is.
        """
        there, step = dataclasses.replace(run), start
        while step is not None and step < stop:
            there.step = step
            yield step, frozenset(p.name for p in self.params if not self._refusing(there, p))
            step = self._earliest_change(there)

    def groups(self, trains: Callable[[str], bool] = lambda _: True) -> set[Group]:
        """The (depth, part) of the parameters for which `trains(name)` holds."""
        return {(param.depth, param.part) for param in self.params if trains(param.name)}

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
