"""What happens at each event of a training run, whoever owns the loop: Trainer, TRL or a bare Accelerate loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import proof
from .ask import ask
from .compose import Plan
from .distributed import plain_parameters
from .divergence import StepParts, check_scaler, check_update, gradient_norm
from .effective import EffectiveWeights
from .effects import Effects
from .errors import EngagementError, MethodError, PluginError, TrainingError
from .eval_weights import EvalWeights
from .graph_cut import cut_graph
from .passes import MicroBatchPasses, Passes
from .plan_state import check_states, load_plan_state, plan_state
from .plugin import Plugin, Run
from .rates import Rates
from .run_data import RunData
from .run_weights import RunWeights
from .stages import Stage
from .timeline import Change, label
from .trunk import TrainingData, TrunkService
from .trunk.asked import asked_options
from .update_edits import UpdateEdits, accepted

logger = logging.getLogger(__name__)

_BETWEEN_STEPS = ("on_stage_begin", "on_step_end", "on_evaluate", "on_stage_end")
"""Events at which weights may be kept and put back: no update is under way."""
_NOT_NOW = (
    "weights are kept and put back in on_stage_begin, on_step_end, on_evaluate and on_stage_end alone, where a step is "
    "whole."
)
_COPIES = "DeepSpeed updates copies of its own, which would undo it at the next step. Use DDP or FSDP2."


class Engine:
    """One stage of one model.

    A loop makes it before the optimizer, and then calls, in this order: `adopt` the optimizer; `begin`; for each
    optimizer step `step_begin`, for each of its micro-batches `before_forward`, the loss, `after_forward`, the
    backward and `after_backward`, then `before_update`, `optimizer.step()`, `after_update` and `step_end`; at the end
    `prove`, and in any case `close`.

    Args:
        model: the model as built, not wrapped.
        plan: what hangs on it.
        stage: the stage that will run.
        start: what is known of where it begins: `seed`, `batch_size`, `processes`.
    """

    run: Run

    def __init__(self, model: nn.Module, plan: Plan, stage: Stage, **start: int) -> None:
        self.model, self.plan, self.stage = model, plan, stage
        self.effects = Effects(model, plan, stage, **start)
        self.effects.open()
        self.rates = Rates(plan, stage, self.effects.param_of)
        self.weights = RunWeights(model, self.effects.tensors)
        self.weights.refused = _NOT_NOW
        self._last_metrics: Mapping[str, float] = {}
        self._last_evaluation_step: int | None = None
        self._stop_reasons: list[str] = []
        self._resumed_at = 0
        self._refused = ""  # why no weights may be kept at all
        self._measured = False  # by an evaluation that plugins were not told of
        self.eval_weights = EvalWeights(plan, stage, self.weights)
        self._training_weights: Mapping[str, Tensor] = {}  # of the checkpoint that it goes on from
        self._sealed: dict[str, Tensor] | None = None  # the weights that train, for the checkpoint at work
        self.rejected = False  # whether a plugin refused the update at work
        self.trunk: TrunkService | None = None
        self._trunk_state: Mapping[str, Any] | None = None
        self.finished = False
        self._watch: proof.Engagement | None = None
        self._restore_rates: Callable[[], None] | None = None
        self._restore_graph: Callable[[], None] = lambda: None
        self._constant: set[str] = set()  # loss terms without a gradient that were told of
        self._skipped = 0

    def adopt(self, optimizer: Optimizer, *, scheduled: bool = False) -> None:
        """Check a fresh optimizer, and split its groups by rate. See `Rates.split`."""
        self.effects.check_optimizer(optimizer)
        self.rates.split(optimizer, scheduled=scheduled)

    def begin(
        self,
        *,
        step: int,
        max_steps: int,
        steps_per_epoch: int,
        optimizer: Any,
        lr: float,
        seed: int,
        batch_size: int = 0,
        processes: int = 1,
        watch: bool = True,
        data: TrainingData | None = None,
        scratch: Path | None = None,
        evaluates: bool | None = None,
    ) -> None:
        """Training starts, or goes on at `step`: freeze what is frozen there, and `watch` what moves.

        Args:
            data: what the loop knows of them.
            scratch: a folder for what is needed until the run has finished, also by a resumed one.
            evaluates: whether it evaluates while it trains; None where nobody knows.
        """
        plan, data = self.plan, data or TrainingData()
        self.effects.rebind(self.model)
        self.weights.tensors, self.weights.optimizer = self.effects.tensors, optimizer
        if self._training_weights:
            self.weights.write(self._training_weights)
            self._training_weights = {}
        self._resumed_at = step
        self.run = Run(
            model=self.model,
            task=plan.task,
            num_blocks=plan.layers.num_blocks,
            params=self.effects.params,
            depths=self.effects.depths,
            layers=plan.layers,
            stages=plan.stages,
            stage=self.stage,
            step=step,
            max_steps=max_steps,
            steps_per_epoch=steps_per_epoch,
            optimizer=optimizer,
            base_lr=lr,
            seed=seed,
            batch_size=batch_size,
            processes=processes,
            last_metrics=self._last_metrics,
            last_evaluation_step=self._last_evaluation_step,
            evaluates=evaluates,
            weights=self.weights,
            stop_reasons=self._stop_reasons,
        )
        active = plan.active(self.stage)
        self._effective = EffectiveWeights(
            self.model, self.effects.tensors, [p for p in active if "effective_weight" in p.hooks()], plan.origins
        )
        self._passes = Passes(self.model, plan, self.stage)
        self._edits = UpdateEdits(active, self.weights, plan.origins)
        if watch:
            self._begin_watch()
        self.weights.watch, self._refused = self._watch, "" if watch else _COPIES
        if step == 0:
            self._begin_stage(data)
        if not self._changes():
            self.effects.recall(self.run)
        never = self.effects.never_trained(self.run)
        if never:
            names = ", ".join(label(g, plan.layers.num_blocks) for g in sorted(never, reverse=True))
            logger.warning(
                "In these %d steps the schedule (%s) never trains: %s. A longer run would, or a quicker schedule.",
                max_steps,
                ", ".join(self.effects.scheduled_by),
                names,
            )
        check_states(plan, self.stage)
        self.effects.apply(self.run)
        self._restore_graph()  # of a run that broke off
        self._restore_graph = cut_graph(self.model)
        self._begin_trunk(data, scratch)

    def _begin_stage(self, data: TrainingData) -> None:
        self.run.data = RunData(self.model, self.plan.task, self.effects.tensors, data)
        try:
            self._tell("on_stage_begin")
        except PluginError as error:
            if isinstance(error.__cause__, ValueError):
                raise MethodError(f"{error}") from error.__cause__
            raise
        finally:
            self.run.data = None

    def _begin_trunk(self, data: TrainingData, scratch: Path | None) -> None:
        options = asked_options(self.plan, self.stage, self.run)
        if options is None and not self.term_plugins:
            return
        self.trunk = self.run.trunk = TrunkService(
            self.model,
            self.plan.layers,
            self.effects,
            options,
            data=data,
            scratch=scratch,
        )
        self.trunk.begin(self.run, self._trunk_state)

    def _begin_watch(self) -> None:
        params = self.plan.params
        self._watch = proof.Engagement(
            plain_parameters(self.model),
            lambda name: (params[name].depth, params[name].part) if name in params else None,
        )
        broken = self._watch.broken()
        if broken:
            raise TrainingError(
                f"{len(broken)} parameters that train hold NaN or infinite values before the first step, e.g. "
                f"{broken[0]!r}: their file is broken, or an earlier run ruined them. Load whole ones."
            )

    def step_begin(self, step: int) -> None:
        """`step` optimizer steps are finished and the next one begins."""
        self.run.step = step
        self._resumed_at = 0
        self.effects.apply(self.run)
        if self.trunk is not None:
            self.trunk.step_begin(self.run)

    def before_forward(self) -> None:
        """Once the model is in train mode, before each micro-batch."""
        self.effects.hold()
        self.effects.rest()
        if self.trunk is not None:
            self.trunk.rest()
        self._effective.put(self.run)

    def after_forward(self) -> None:
        """Between all passes of a micro-batch and its backward."""
        self.effects.hold()

    def returns_weights_with(self, loss: Tensor) -> None:
        """For loops with lines of their own after a backward, e.g. clipping: they find the weights that train.

        Args:
            loss: what the loop will call the backward of.
        """
        self._effective.take_back_with(loss)

    def after_backward(self) -> None:
        """After each micro-batch, before the gradients' norm is taken."""
        self._effective.take_back()
        self.effects.drop_frozen_gradients()

    def check_terms(self, parts: StepParts, device: torch.device) -> None:
        """After the plugins were asked for their loss terms, before these are added.

        Args:
            device: of the task's loss.
        Raises:
            PluginError: a term lies elsewhere, or carries no gradient though everything trains.
        """
        for name, term in parts.losses[-1].items():
            if term.device != device:
                raise PluginError(
                    f"{parts.owners[name]}: the loss term {name!r} is on {term.device}, the task's loss on {device}. "
                    "Compute it from the batch and the output that loss_terms is given."
                )
        for name in parts.constant - self._constant:
            text = f"{parts.owners[name]}: the loss term {name!r} carries no gradient at step {self.run.step}"
            if not self.effects.flips:
                raise PluginError(
                    f"{text}, so it changes nothing. Compute it from the output, without detach() or no_grad(); "
                    "return {} where there is nothing to add."
                )
            logger.warning("%s: it uses nothing that trains now.", text)
        self._constant |= parts.constant

    def check_update(self, norm: Any, parts: StepParts) -> None:
        """Once the gradients of a step are whole, before `before_update`. Not where a gradient scaler looks itself.

        Args:
            norm: of all gradients.
        Raises:
            TrainingError: it is no finite number, and no plugin refused the update.
        """
        guards = self._listeners("accept_update")
        if guards and not accepted(guards, self.run, parts.task_loss, float(norm), self.plan.origins):
            self.rejected = True
            for tensor in self.effects.tensors.values():
                tensor.grad = None
            return
        optimizer: Any = self.run.optimizer
        rate = max((float(group["lr"] or 0.0) for group in optimizer.param_groups), default=0.0)
        check_update(norm, parts, self.model, step=self.run.step, rate=rate)

    def before_update(self, *, may_overflow: bool = False) -> None:
        """Right before `optimizer.step()`, when the gradients are unscaled.

        Args:
            may_overflow: whether a gradient scaler will skip the update if they are not finite.
        """
        self._effective.take_back()
        self.effects.drop_frozen_gradients()
        if self.rejected:
            return
        told = self._listeners("on_pre_optimizer_step")
        if told and not (may_overflow and not bool(gradient_norm(self.effects.tensors.values()).isfinite())):
            self._tell("on_pre_optimizer_step")
        self._edits.before_update(self.run, self.effects.trains)
        optimizer: Any = self.run.optimizer
        self._restore_rates = self.rates.scale(optimizer, self.run)
        if self._watch is None:
            return
        moving = [group for group in optimizer.param_groups if group["lr"] is None or float(group["lr"]) > 0]
        ids = {id(tensor) for group in moving for tensor in group["params"]}
        tensors = self.effects.tensors.items()
        self._watch.count(name for name, tensor in tensors if id(tensor) in ids and self.effects.trains(name))

    def after_update(self, *, skipped: bool = False) -> None:
        """Right after `optimizer.step()`: schedulers must find the rate that they left.

        Args:
            skipped: whether a gradient scaler found an overflow, and nothing was updated.
        """
        self._edits.after_update()
        self.rejected = False
        if self._restore_rates is not None:
            self._restore_rates()
            self._restore_rates = None
        self._skipped = self._skipped + 1 if skipped else 0
        check_scaler(self._skipped, step=self.run.step)

    @property
    def updating(self) -> bool:
        """Whether an update is under way, so that the weights may be half old and half new."""
        return self._restore_rates is not None

    def step_end(self, step: int) -> None:
        """`step` optimizer steps are finished, and nothing of the last one was logged, evaluated or saved yet."""
        self.run.step = step
        self._tell("on_step_end")

    def _listeners(self, event: str) -> list[Plugin]:
        return [plugin for plugin in self.plan.active(self.stage) if event in plugin.hooks()]

    def _tell(self, event: str) -> None:
        self.weights.refused = self._refused if event in _BETWEEN_STEPS else _NOT_NOW
        try:
            for plugin in self._listeners(event):
                ask(plugin, event, self.run)
        finally:
            self.weights.refused = _NOT_NOW

    @property
    def stopped(self) -> bool:
        """Whether a plugin wants the run to end after this step."""
        return hasattr(self, "run") and bool(self.run.stop_reasons)

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """An evaluation returned. Those of several datasets at one step count as one."""
        if not hasattr(self, "run") or (self._resumed_at and self.run.step == self._resumed_at):
            return  # none of this run's; the checkpoint that it goes on from knows of those at its step
        self._measured = True
        same = self.run.last_evaluation_step == self.run.step
        numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, Real)}
        self.run.last_metrics = {**(self.run.last_metrics if same else {}), **numbers}
        self.run.last_evaluation_step = self.run.step

    def evaluation_ended(self) -> None:
        """Each dataset of an evaluation has returned, and nothing of this step was saved yet."""
        if self._measured and self.eval_weights.inside is not None:
            raise MethodError(
                "An evaluation was told of while the weights to evaluate stood in the model: call session.evaluated(…) "
                "after `with session.eval_weights():`, not within it."
            )
        if self._measured:
            self._measured = False
            self._tell("on_evaluate")

    def seal(self, beside: Path | None = None) -> None:
        """When a checkpoint is written, on every process: what it will need lies on the disk.

        Args:
            beside: a folder beside the checkpoints, where the loop gave `begin` none.
        """
        self._sealed = self.eval_weights.training(self.run)  # only one process asks for the state afterwards
        if self.trunk is not None:
            self.trunk.seal(beside)

    def _training_now(self) -> dict[str, Tensor]:
        """The weights that train, where the model files hold others: as every process found them in `seal`."""
        sealed, self._sealed = self._sealed, None
        return self.eval_weights.training(self.run) if sealed is None else sealed

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this stage, and of how the ones before went, as plain values and tensors."""
        return plan_state(self.plan, self.stage) | {
            "trunk": {} if self.trunk is None else self.trunk.state_dict(),
            "last_metrics": dict(self.run.last_metrics),
            "last_evaluation_step": self.run.last_evaluation_step,
            "stop_reasons": list(self.run.stop_reasons),
            "kept": self.weights.kept,
            "kept_states": self.weights.kept_states,
            "training_weights": self._training_now(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave, before `begin`.

        Raises:
            MethodError: the state is of other plugins.
            PluginError: a plugin does not take its state back.
        """
        load_plan_state(self.plan, self.stage, state)
        self._last_metrics = dict(state["last_metrics"])
        self._last_evaluation_step = state["last_evaluation_step"]
        self._trunk_state = state.get("trunk")
        self._stop_reasons = list(state.get("stop_reasons", ()))  # earlier versions knew of neither
        self.weights.kept = state.get("kept", {})
        self.weights.kept_states = state.get("kept_states", {})
        self._training_weights = state.get("training_weights", {})

    def _changes(self) -> list[Change]:
        return [change for change in self.plan.timeline if change.stage == self.stage.name]

    def prove(self, save: Callable[[], str] | None) -> None:
        """Compare what was declared with what moved. Once; a second call does nothing.

        Args:
            save: saves the weights as they are and returns where; called before an error is raised. None where the
                loop is the user's, who still has the model.
        Raises:
            EngagementError: a declared group never moved, a frozen tensor did, or a tensor is not finite any more.
        """
        if self.finished:
            return
        self.finished = True
        watch, self._watch = self._watch, None
        if watch is not None:  # under DeepSpeed nothing is watched
            self._compare(watch, save)
        self.weights.watch = None
        self._tell("on_stage_end")
        self.eval_weights.stay(self.run)

    def _compare(self, watch: proof.Engagement, save: Callable[[], str] | None) -> None:
        rows, strays = watch.finish()
        blocks = self.plan.layers.num_blocks
        self.plan.engagement[self.stage.name] = rows
        logger.info("What trained in stage %r:\n%s", self.stage.name, proof.table(rows, blocks))
        try:
            proof.check(rows, strays, blocks, watch.ruined())
        except EngagementError as error:
            if save is None:
                raise
            raise EngagementError(f"{error} The weights as they are were saved in {save()!r}.") from None

    def close(self) -> None:
        """Give the model back as `get_model` made it: every parameter of the plan trainable."""
        self.weights_back()
        self._restore_graph()
        if self.trunk is not None:
            # Who stopped it by a callback may go on later.
            self.trunk.close(finished=self.finished and (self.run.step >= self.run.max_steps or self.stopped))
            self.trunk = None
        self.effects.close()

    def weights_back(self) -> None:
        """The weights that train stand in the model again, also where a micro-batch broke off."""
        if hasattr(self, "_effective"):
            self._effective.take_back()

    @contextmanager
    def evaluating(self) -> Generator[None]:
        """While this is open, the weights to evaluate and to save stand in the model. Every process must open it."""
        self.weights_back()
        if not hasattr(self, "run") or self.finished:
            yield
            return
        with self.eval_weights.standing(self.run):
            yield

    def passes(self, batch: Mapping[str, Any]) -> MicroBatchPasses | None:
        """The passes that a plugin puts in the place of a micro-batch's plain one; None where there is only that."""
        return self._passes.of(self.run, batch)

    @property
    def term_plugins(self) -> list[Plugin]:
        """The plugins of this stage that add to the loss."""
        return [p for p in self.plan.active(self.stage) if "loss_terms" in p.hooks()]

    def no_gradient(self) -> MethodError:
        """The error for a loss that needs nothing of what trains at this step."""
        groups = sorted(self.effects.groups(self.effects.trains), reverse=True)
        if not groups:
            return self.effects.nothing_trains(self.run.step)
        now = ", ".join(label(group, self.plan.layers.num_blocks) for group in groups)
        return MethodError(
            f"At step {self.run.step} only {now} may train, and the loss uses none of it. "
            "Let something that it uses train from the start, or use another loss."
        )
