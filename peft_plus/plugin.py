"""The contract: what a plugin declares, and what it is told.

A plugin never acts. It is a keyword-only dataclass whose init fields are its settings; it answers the few
questions below (the *hooks*), and the core alone sets `requires_grad`, learning rates and the loss. This module
imports no torch, so that a plugin's settings can be read and checked before anything heavy loads.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .hook_values import NEEDS as NEEDS
from .hook_values import LossTerm as LossTerm
from .hook_values import Param as Param
from .hook_values import Part as Part
from .hook_values import Pass as Pass
from .hook_values import Unit as Unit
from .run import Run as Run

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from torch.utils.data import Sampler

    from .stages import Stage
    from .trunk import CacheOptions

API = 1
"""Version of the contract. A plugin written for another version is refused by name, not run by luck."""


@dataclass(kw_only=True)
class Plugin:
    """How something is trained. Subclass it as a `@dataclass(kw_only=True)`; see `docs/writing_a_plugin.md`.

    Init fields are settings and take plain values; `field(init=False)` is state. Override only the hooks that the
    technique needs: the core asks no plugin about a hook that it did not override.

    Class variables:
        name: the entry-point name, in snake_case.
        source: the paper.
        api: version of this contract the plugin was written for.
        after: names of plugins that this one must follow in a chain, whatever order the user wrote.
        conflicts: names of plugins that it cannot run with.
        needs: words of `NEEDS`, checked before the base model loads.
        objectives: what kinds of training its loss terms are written for: `supervised` (the rows have labels),
            `preference`, `reward`, `reinforcement` or `distillation`.
        on_freeze: what becomes of the optimizer's state of a tensor that its `may_train` freezes after it has trained:
            `drop_state` frees it, and a later thaw starts with a fresh one. One plugin that says so is enough.
        schedule: whether its `lr_scale` is itself a learning-rate schedule, so that a constant one must run underneath.
    """

    name: ClassVar[str] = ""
    source: ClassVar[str] = ""
    api: ClassVar[int] = API
    after: ClassVar[tuple[str, ...]] = ()
    conflicts: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()
    objectives: ClassVar[tuple[str, ...]] = ("supervised",)
    on_freeze: ClassVar[Literal["keep", "drop_state"]] = "keep"
    schedule: ClassVar[bool] = False

    @property
    def restores_best(self) -> bool:
        """Whether, with these settings, it puts back weights for having been best when evaluated.

        Refused beside a plugin with `eval_weights`, which has others evaluated than those that train.
        """
        return False

    def plan_stages(self, stages: Sequence[Stage]) -> Sequence[Stage]:
        """Once, before anything loads: the stages to run, changed or not. Plugins chain, in order."""
        return stages

    def prepare_base(self, model: Module) -> Module:
        """Once, when the model is built, before the tuner goes in: the base, with other weights in it. Plugins chain.

        Not asked of a skeleton without weights. Random numbers come from torch's global generator, as those of a new
        head do, so that `set_seed` before `get_model` rules both. Under `attach` it must be the same object. What a
        reloaded adapter would not find in the base that it is put on must not be changed here: see `needs = ("base",)`.
        """
        return model

    def on_build(self, run: Run) -> None:
        """Once, when the model is built or attached: look whether the settings fit it.

        `run` stands where the first stage begins; `params` and `depths` tell what may train in any of the stages. There
        is no optimizer yet, and how many steps there will be is unknown. Nothing may be kept.

        Raises:
            ValueError: a setting does not fit this model, e.g. a block past its depth, a pattern that matches nothing.
        """

    def plan_budget(self, run: Run) -> Mapping[str, Any]:
        """Before a Trainer begins a stage: which of its arguments the data ask for, by name, e.g. `num_train_epochs`.

        Asked again by a resumed run, which must get the same answer: it may depend on the settings, the data and the
        model as it was built. `run` stands where the stage begins; `run.examples()` goes through the data, and
        `run.evaluates` tells whether there is something to evaluate on. A `Session` does not ask: its loop is yours.

        Raises:
            ValueError: a setting does not fit the data.
        """
        return {}

    def task_data(self, run: Run, dataset: Any) -> Any:
        """Once in each stage, when the loop makes its loader: the data to train on, changed or not. Plugins chain.

        Before each epoch the loop calls `set_epoch(epoch)` of what is returned, in worker processes too, where it has
        one: a row may depend on that, its index and `run.seed` alone, or no resumed run could find it again. A
        trunk cache refuses data that have it; data around others hand it on. They may be pickled for worker processes,
        so they hold no `run`, which stands where the stage begins: `step` is 0, and there is no optimizer yet.
        Evaluations never see them.

        Args:
            dataset: the user's training data, with all their columns, or what a plugin before made of them.
        Returns: the same object where nothing changes; else data of the same kind, with a length and access by index.
        Raises:
            ValueError: a setting does not fit the data.
        """
        return dataset

    def sampler(self, run: Run, dataset: Any) -> Sampler[int] | None:
        """Once in each stage, when the loop makes its loader: the order of the data, or None for the loop's own.

        One plugin at most. The loader cuts the indices into batches of `run.batch_size`, one after another, and hands
        them to the processes in turn. Before each epoch the loop calls the sampler's `set_epoch(epoch)`, where it has
        one; an epoch's order may depend on that and on `run.seed` alone, or no resumed run could find it again. `run`
        tells where the stage begins: `step` is 0, and there is no optimizer yet.
        """
        return None

    def ever_trains(self, run: Run, param: Param) -> bool:
        """Whether `param` trains at all in the stage that begins. Plugins must agree.

        False = it has no place in this stage: not in `run.params` and `run.depths` of what the stage asks later, not in
        the optimizer, not in what processes exchange, and nobody warns that it never trained.

        Pure in the settings: a resumed run asks before it has loaded any state. `run` stands where the stage begins,
        and there is no optimizer yet.
        """
        return True

    def on_stage_begin(self, run: Run) -> None:
        """When a stage begins, before its first step: where state is set up, and that of an earlier stage thrown away.

        Never when a stage is resumed: then state comes from the checkpoint. Nothing is frozen yet, `run.optimizer`
        holds all that may train, and weights may be kept.

        Raises:
            ValueError: a setting does not fit the run, e.g. an evaluation is needed and there is none.
        """

    def may_train(self, run: Run, param: Param) -> bool:
        """Whether `param` trains at `run.step`. Asked at the start and at each update boundary.

        Pure in (settings, state, step): it is asked again after a resume. A parameter trains only when the tuner
        made it trainable and every plugin agrees.
        """
        return True

    def lr_scale(self, run: Run, param: Param) -> float:
        """Multiplier (≥ 0) of the base rate for `param` in this step. Plugins multiply.

        Equal for all parameters of equal `lr_key`. Schedulers never see it: the core restores the rate after each
        optimizer step.
        """
        return 1.0

    def lr_key(self, param: Param) -> tuple[Any, ...]:
        """Parameters of equal key share a rate and form one optimizer group."""
        return (param.depth, param.part)

    def next_change(self, run: Run) -> int | None:
        """The next step (> `run.step`) at which `may_train` answers differently, or None for never again.

        `NotImplemented`, the default, where that cannot be told ahead: `may_train` is then asked at every step. The
        earliest of all plugins counts. It lets a plan be printed, and work on frozen layers be saved, ahead.
        """
        return NotImplemented

    def trunk_cache(self, run: Run) -> CacheOptions | None:
        """When a stage begins: whether the output of the frozen lower blocks is stored, and how; None for no.

        One plugin at most. The core decides which blocks, from `may_train` and `next_change`.
        """
        return None

    def effective_weight(self, run: Run, param: Param, value: Tensor) -> Tensor:
        """For each pass of a micro-batch: the weight to compute with in the place of `param`. Plugins chain.

        Asked of all in `run.params`, also while it is frozen: `value` requires a gradient where it trains now, and the
        answer for one that does not must stay the same until it does, since what frozen blocks put out may be stored.
        The gradient flows through the answer to the weight itself; evaluations and checkpoints see the weight itself.
        In place until the micro-batch's backward is done, so that activation checkpointing computes with it again.

        Args:
            value: the weight, or what a plugin before made of it.
        Returns: the same shape, dtype and device; `value` itself where nothing changes.
        """
        return value

    def passes(self, run: Run, batch: Mapping[str, Any]) -> Generator[Pass, Tensor | None, None] | None:
        """For each micro-batch: the passes to make instead of the plain one, or None for that. One plugin at most.

        A generator. The core makes each pass, with the loss and all terms, and its backward (without an exchange
        between processes but after the last), and sends back the gradient of that loss with respect to the pass's δ,
        where it requires one. It must end with a `Pass` that is `final`; `loss_terms` is asked in each.
        """
        return None

    def loss_terms(self, run: Run, batch: Mapping[str, Any], output: Any) -> Mapping[str, LossTerm]:
        """For each training micro-batch: what to add to the task's loss, by name. Names are unique over plugins."""
        return {}

    def accept_update(self, run: Run, loss: float, norm: float) -> bool:
        """Once the gradients of a step are whole: whether its update may be made. Plugins must agree.

        False leaves it out: all gradients are dropped, so that neither weights nor moments move; the step counts. What
        is no finite number ends the run unless a plugin refuses it here. State may change. Not asked under a gradient
        scaler (fp16), which leaves updates out itself.

        Args:
            loss: the task's, the mean over the step and all processes.
            norm: of all gradients; before a Trainer's clipping, after that of a `Session`'s loop. Both may be NaN or
                infinite, and are equal on every process.
        """
        return True

    def on_pre_optimizer_step(self, run: Run) -> None:
        """Right before each optimizer step, when its gradients are whole: `run.gradient(param)`.

        They are averaged over the processes, unscaled and clipped. `lr_scale` is asked after it, and state may change
        here too. Not asked where a gradient scaler skips the update because gradients overflowed.
        """

    def edit_gradient(self, run: Run, param: Param, gradient: Tensor) -> Tensor:
        """After `on_pre_optimizer_step`: the gradient to update with, in the place of this one. Plugins chain.

        Args:
            gradient: of `param`, averaged over the processes, unscaled, clipped and whole; not to be changed itself.
        Returns: the same shape; `gradient` itself where nothing changes.
        """
        return gradient

    def moves(self, run: Run, param: Param) -> Tensor | None:
        """After `edit_gradient`: which elements of `param` may move in this update; None for all. Plugins must agree.

        The others are put back after it bit for bit: decay and momentum would move them, whatever their gradient.

        Returns: bool, the shape of `param`, True = may move.
        """
        return None

    def eval_weights(self, run: Run) -> Mapping[str, Tensor] | None:
        """The weights to evaluate, to save and to end with, in the place of those that train; None for these.

        One plugin at most. Asked at each evaluation (in a Session: within `session.eval_weights()`), for the model
        files of each checkpoint, and at the end of the stage, where they stay in the model. A resumed run goes on with
        the weights that train, which checkpoints hold too.

        Returns: name of a parameter → whole tensor, on any device and in any dtype; what is left out stays.
        """
        return None

    def on_step_end(self, run: Run) -> None:
        """After each optimizer step: where state changes, since checkpoints are written after it.

        `run.step` counts the finished step too. What can be derived from `run.step` needs no state.
        """

    def on_evaluate(self, run: Run) -> None:
        """After an evaluation, which `run.last_metrics` and `run.last_evaluation_step` tell; the weights are those.

        Asked once for all data sets of an evaluation. State may change here too: a checkpoint of the same step is
        written after it.
        """

    def on_stage_end(self, run: Run) -> None:
        """When a stage has ended, and what moved in it was compared with what was declared: weights may be put back.

        No checkpoint is written after it; a run that is resumed at its end asks again. `eval_weights` comes after it.
        """

    def state_dict(self) -> Mapping[str, Any]:
        """What a checkpoint keeps of this plugin: plain values and tensors. By default every `field(init=False)`."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if not f.init}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave, before a resumed run goes on.

        Raises:
            ValueError: the names are not those of this version's state.
        """
        names = {f.name for f in dataclasses.fields(self) if not f.init}
        if names != set(state):
            raise ValueError(f"the checkpoint holds the state {sorted(state)}, this version has {sorted(names)}.")
        for name, value in state.items():
            setattr(self, name, value)

    def __post_init__(self) -> None:
        """Override to check the values of settings; their types are checked before."""
        _check_settings(self)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = vars(cls).get("__post_init__")
        if own is not None:

            @wraps(own)
            def checked(self: Plugin) -> None:
                _check_settings(self)  # first, so that a class may compare numbers without asking what they are
                own(self)

            cls.__post_init__ = checked
        for name, value in vars(cls).items():
            function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
            if not name.startswith("_") and inspect.isfunction(function):
                _check_hook(cls, name, function)

    @classmethod
    def hooks(cls) -> tuple[str, ...]:
        """The hooks that this class overrides, in the order of the contract."""
        return tuple(h for h in HOOKS if getattr(cls, h) is not getattr(Plugin, h))

    def settings(self) -> dict[str, Any]:
        """Name → value of every setting (init field), without the state."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}


HOOKS: tuple[str, ...] = (
    "plan_stages",
    "prepare_base",
    "on_build",
    "plan_budget",
    "task_data",
    "sampler",
    "ever_trains",
    "on_stage_begin",
    "may_train",
    "lr_scale",
    "lr_key",
    "next_change",
    "trunk_cache",
    "effective_weight",
    "passes",
    "loss_terms",
    "accept_update",
    "on_pre_optimizer_step",
    "edit_gradient",
    "moves",
    "on_step_end",
    "eval_weights",
    "on_evaluate",
    "on_stage_end",
    "state_dict",
    "load_state_dict",
)
"""Every hook there is. Anything else a plugin defines without a leading underscore is refused."""

_RESERVED = frozenset({"hooks", "settings"})


def _check_settings(plugin: Plugin) -> None:
    from .settings import check_types

    check_types(type(plugin), plugin.settings(), f"plugin {plugin.name!r}")


def _check_hook(cls: type[Plugin], name: str, function: Callable[..., Any]) -> None:
    """Refuse at class creation what would be silently dead: a misspelt hook, or one with other parameters."""
    where = f"{cls.__module__}.{cls.__qualname__}.{name}"
    if name in _RESERVED:
        raise TypeError(f"{where}: `{name}` belongs to the contract and cannot be overridden.")
    if name not in HOOKS:
        from .names import nearest

        raise TypeError(
            f"{where} is neither a hook nor private, so nothing would ever call it.{nearest(name, HOOKS)} "
            f"Hooks: {', '.join(HOOKS)}. Name a helper with a leading underscore, or move it out of the class."
        )
    expected = list(inspect.signature(getattr(Plugin, name)).parameters)
    got = list(inspect.signature(function).parameters)
    if got != expected:
        raise TypeError(f"{where}({', '.join(got)}): the hook's parameters are ({', '.join(expected)}).")
