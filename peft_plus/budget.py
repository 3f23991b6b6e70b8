"""What a Trainer's stage may cost and at which rate, where plugins choose it by the data."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
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


class Budgets:
    """The arguments of one Trainer's runs: each is chosen anew from what the user gave, and changed since."""

    def __init__(self) -> None:
        self._given: Any = None
        self._chosen: Any = None
        self._as_chosen: dict[str, Any] = {}
        self._under_way = False

    def begin(self, args: Any, choose: Callable[[Any], Any], *, resumes: bool) -> Any:
        """The arguments of the run that begins.

        Args:
            args: those that the Trainer has now.
            choose: the user's arguments → those of the run.
            resumes: whether it goes on from a checkpoint; one that broke off in this process keeps what was chosen,
                for its model has trained meanwhile, and a probe of it would say something else.
        """
        if args is self._chosen and resumes and self._under_way:
            return args
        if args is not self._chosen:
            self._given = args
        elif self._chosen is not self._given:
            changed = {name: value for name, value in vars(args).items() if not self._is_as_chosen(name, value)}
            self._given = copy.copy(self._given)
            for name, value in changed.items():
                setattr(self._given, name, value)
        self._chosen = choose(self._given)
        self._as_chosen, self._under_way = dict(vars(self._chosen)), True
        return self._chosen

    def ended(self) -> None:
        """The run came to its end."""
        self._under_way = False

    def _is_as_chosen(self, name: str, value: Any) -> bool:
        before = self._as_chosen.get(name)
        return name in self._as_chosen and (value is before or bool(value == before))


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
