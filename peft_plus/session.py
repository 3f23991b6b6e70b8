"""Plugins, exact loss scale and resume for a bare Accelerate loop, which stays the user's own."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import skip_first_batches
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import Tensor, nn

from . import session_checkpoint
from .arguments import plan_in, plan_of
from .compose import Plan
from .distributed import check_accelerator, flipping, leave_together
from .divergence import gradient_norm, unscale
from .engine import Engine
from .errors import MethodError
from .loop_watch import LoopWatch
from .own_schedule import check_named
from .plugin import Pass
from .random_state import rng_state, set_rng_state
from .session_data import SessionData
from .stages import Stage
from .step_loss import StepLoss
from .tasks.base import own_loss

logger = logging.getLogger(__name__)


class Session:
    """Runs a model's plan inside a loop that you write.

    ```python
    session = Session(model, accelerator, epochs=3)
    optimizer = session.optimizer(torch.optim.AdamW, lr=1e-3)
    loader = session.loader(train, batch_size=16, collate_fn=collate)
    for batch in session.batches(loader):
        with accelerator.accumulate(session.model):
            accelerator.backward(session.loss(batch))
            optimizer.step()
            optimizer.zero_grad()
    ```

    Args:
        model: from `get_model` or `attach`; one that plain PEFT made gets a plan without plugins.
        accelerator: yours; its `gradient_accumulation_steps` is the number of micro-batches in a step.
        epochs: passes over the data, whole or not; not needed with `max_steps`.
        max_steps: optimizer steps; counts before `epochs`.
        seed: of the order of the data, of random collators and of the plugins' noise.
        stage: which of the plan's stages to run, by name; needed where there are several.
    Attributes:
        model: for the loop's forward passes: what `accelerator.prepare` made of it, once `optimizer` was called.
        step: finished optimizer steps.
        epoch: finished passes over the data.
        end_of_epoch: whether the batch in hand is the last one of its epoch.
    Raises:
        MethodError: the plan cannot run here; says what to change.
    """

    def __init__(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        *,
        epochs: float | None = None,
        max_steps: int | None = None,
        seed: int = 42,
        stage: str | None = None,
    ) -> None:
        if not isinstance(accelerator, Accelerator):
            raise MethodError(f"Session(model, accelerator): accelerator is {accelerator!r}, not an Accelerator.")
        if epochs is None and max_steps is None:
            raise MethodError("Say how long to train: Session(model, accelerator, epochs=3), or max_steps=1000.")
        for name, value in (("epochs", epochs), ("max_steps", max_steps)):
            if value is not None and not value > 0:
                raise MethodError(f"{name}={value}: give a number > 0.")
        self.accelerator, self.bare_model, self.model, self.seed = accelerator, model, model, seed
        self.step, self.epoch, self.end_of_epoch = 0, 0, False
        self.optimizers: list[Any] = []
        self.schedulers: list[Any] = []
        self.epoch_steps = 0  # finished steps of the epoch at work
        self.random_state: Any = None  # to go on with, after a resume
        self.scratch: Path | None = None  # what lies beside the checkpoints that it was resumed from
        self._epochs, self._max_steps = epochs, max_steps
        self._window: list[Any] = []  # the micro-batches of the step at work
        self._running = False
        self._overflows = False  # whether a fused optimizer leaves out the update at work
        self._modules: list[nn.Module] = []
        self._task_loss, self._task_steps = torch.zeros(()), 0  # its sum over the steps since the last log
        self._after_save: Any = None
        plan = _plan_of(model)
        self.stage = _stage_of(plan, stage)
        if self.stage.args:
            logger.warning(
                "The method sets arguments that a Trainer would take from it, and your own loop must follow: %s. They "
                "belong into Session(…), session.optimizer(…), session.scheduler(…) and what the loop does itself.",
                ", ".join(f"{name}={value!r}" for name, value in self.stage.args.items()),
            )
        if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise MethodError(
                f"Session does not drive {accelerator.distributed_type.value}, which owns optimizer and backward "
                "itself. Use peft_plus.Trainer there."
            )
        check_accelerator(plan, model, accelerator)
        self.engine = Engine(model, plan, self.stage, seed=seed, processes=accelerator.num_processes)
        self.data = SessionData(model, plan, self.stage, accelerator, seed=seed)
        self._watch = LoopWatch()
        self._loss = StepLoss(
            model,
            plan.task,
            gather=lambda numbers: accelerator.gather(numbers.to(accelerator.device)[None]).cpu(),  # type: ignore[union-attr]
            processes=accelerator.num_processes,
            rank=accelerator.process_index,
        )

    @property
    def plan(self) -> Plan:
        """The model's plan."""
        return self.engine.plan

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self._max_steps is not None:
            return self._max_steps
        if not self.data.steps_per_epoch:
            raise MethodError("How many steps the epochs have is known after session.loader(…): call it before.")
        assert self._epochs is not None
        return math.ceil(self._epochs * self.data.steps_per_epoch)

    # ---- what the loop is made of ----------------------------------------------------------------------------------

    def optimizer(self, optimizer_class: Callable[..., torch.optim.Optimizer], **settings: Any) -> Any:
        """The optimizer over everything that may ever train, prepared; `session.model` is ready after it.

        Args:
            optimizer_class: e.g. `torch.optim.AdamW`.
            settings: its settings; `params` for groups of your own, which must hold all that may train.
        """
        if self.optimizers:
            raise MethodError("This session has its optimizer already; another run needs another Session.")
        params = settings.pop("params", None)
        everything = list(self.engine.effects.tensors.values())
        optimizer = optimizer_class(everything if params is None else params, **settings)
        if _at_rest(optimizer):
            raise MethodError("session.optimizer(…, lr=0): nothing would be learned. Give a rate > 0.")
        self.engine.adopt(optimizer)
        self._let_ddp_wait_for_nothing()
        self.model, prepared = self.accelerator.prepare(self.bare_model, optimizer)
        self._watch.listen(optimizer, self._finish_skipped)
        optimizer.register_step_pre_hook(lambda *_: self._before_update())
        optimizer.register_step_post_hook(lambda *_: self._after_update())
        self._base_lr = float(optimizer.param_groups[0]["lr"] or 0.0)
        self.optimizers.append(prepared)
        return prepared

    def _let_ddp_wait_for_nothing(self) -> None:
        """A frozen parameter gets no gradient, and DDP would wait for it for ever."""
        if flipping(self.plan) is None or self.accelerator.num_processes == 1:
            return
        accelerator: Any = self.accelerator
        handler = accelerator.ddp_handler or DistributedDataParallelKwargs()
        if handler.static_graph:
            raise MethodError(
                "DistributedDataParallelKwargs(static_graph=True) promises DDP that the same parameters get gradients "
                "in each step, and this plan freezes some. Leave it out."
            )
        handler.find_unused_parameters = True
        accelerator.ddp_handler = handler

    def scheduler(self, scheduler: str | Callable[..., Any], **settings: Any) -> Any:
        """A learning-rate scheduler that counts optimizer steps. Step it in each turn of the loop, as ever.

        Args:
            scheduler: a name that `transformers.get_scheduler` knows (`"linear"`, `"cosine"`, …; `num_training_steps`
                is filled in), or a function from the optimizer to a scheduler, e.g. a class of
                `torch.optim.lr_scheduler`.
            settings: its settings, e.g. `num_warmup_steps=100`.
        """
        if not self.optimizers:
            raise MethodError("Call session.optimizer(…) first: a scheduler needs it.")
        inner = self.optimizers[0].optimizer
        if isinstance(scheduler, str):
            check_named(self.plan, self.stage, scheduler)
            from transformers import get_scheduler

            known: dict[str, Any] = {"num_warmup_steps": 0, "num_training_steps": self.max_steps}
            made = get_scheduler(scheduler, inner, **(known | settings))
        else:
            made = scheduler(inner, **settings)
        # One step of it for each step of the optimizer, however many processes share that.
        prepared = AcceleratedScheduler(made, self.optimizers[0], step_with_optimizer=True, split_batches=True)
        self.schedulers.append(prepared)
        return prepared

    def loader(
        self,
        dataset: Any,
        batch_size: int,
        *,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        shuffle: bool = True,
        **settings: Any,
    ) -> Any:
        """The training data, prepared, in an order that a resumed run finds again.

        Args:
            dataset: map-style, or iterable (which then brings its own order).
            batch_size: rows of a micro-batch on one process.
            collate_fn: a list of rows → a batch; by default the task's, with the tokenizer that preprocessed the data.
            shuffle: another order in each epoch, unless a plugin sets the order.
            settings: for the DataLoader, e.g. `num_workers`, `drop_last`.
        Raises:
            MethodError: a setting that a resumed run could not repeat.
            DataError: no data, or token ids that the model does not have.
        """
        return self.data.loader(
            dataset, batch_size, collate_fn=collate_fn, shuffle=shuffle, max_steps=self._max_steps, **settings
        )

    # ---- the loop --------------------------------------------------------------------------------------------------

    def batches(self, loader: Any) -> Iterator[Any]:
        """Every micro-batch from where the run stands to its end, over all epochs.

        The body of the loop works on one micro-batch, as in the example above. When the last step is done, what was
        declared is compared with what moved.

        Raises:
            MethodError: the optimizer was not stepped at the end of a step, or was in the middle of one.
            EngagementError: what trained is not what was declared.
        """
        if not self.optimizers:
            raise MethodError("Call session.optimizer(…) before session.batches(…).")
        if self._running:
            raise MethodError("session.batches(…) is running already.")
        state, self._running = self.accelerator.gradient_state, True
        before = state.plugin_kwargs
        # Which micro-batch ends a step is known here, also where the batches of a step were fetched ahead.
        state.plugin_kwargs = {**before, "sync_with_dataloader": False}
        self.model.train()
        self._modules = list(self.model.modules())
        try:
            self.engine.begin(
                step=self.step,
                max_steps=self.max_steps,
                steps_per_epoch=self.data.steps_per_epoch,
                optimizer=self.optimizers[0].optimizer,
                lr=self._base_lr,
                seed=self.seed,
                batch_size=self.data.batch_size,
                processes=self.accelerator.num_processes,
                data=self.data.training_data(),
                scratch=self.scratch,
            )
            while self._goes_on:
                start = self.step
                yield from self._one_epoch(loader)
                if self.step == start:
                    raise MethodError(f"The loader gave no batch in epoch {self.epoch}, after {self.step} steps.")
            self._loss.check_labels(self.step)
            self._watch.check_rates()
            self.engine.prove(None)
            leave_together()
        finally:
            state.plugin_kwargs = before
            self._running = False
            self.engine.close()

    def _one_epoch(self, loader: Any) -> Iterator[Any]:
        accumulation = self.accelerator.gradient_accumulation_steps
        first = self.epoch_steps * accumulation
        source = skip_first_batches(loader, first) if first else loader
        self.data.begin(source, self.epoch, first)
        if not first:
            self._restore()
        iterator = iter(source)
        while self._goes_on and (window := list(islice(iterator, accumulation))):
            self._restore()  # beginning in the middle of an epoch may have drawn random numbers
            self.data.take(len(window))
            yield from self._one_step(window, getattr(source, "end_of_dataloader", False))

    @property
    def _goes_on(self) -> bool:
        return self.step < self.max_steps and not self.engine.stopped

    def _restore(self) -> None:
        if self.random_state is not None:
            set_rng_state(self.random_state)
            self.random_state = None

    def _one_step(self, window: list[Any], ends_epoch: bool) -> Iterator[Any]:
        accumulation = self.accelerator.gradient_accumulation_steps
        self._window = window
        self._watch.begin(self.step, len(window))
        if hasattr(self.optimizers[0], "_is_overflow"):
            self.optimizers[0]._is_overflow = False  # what Accelerate says of the step before
        self._loss.begin(window, micro_batches=accumulation)
        self.engine.step_begin(self.step)
        for place, batch in enumerate(window):
            last = place == len(window) - 1
            self.end_of_epoch = last and ends_epoch
            self.accelerator.step = accumulation - 1 if last else 0  # so that `accumulate` syncs after the last one
            self._watch.turn(place)
            self._ready()
            yield batch
            self.engine.after_backward()
            self._loss.advance()
        self._finish_skipped()
        self._watch.end()
        self._window = []
        if self._after_save is not None:
            session_checkpoint.check_undisturbed(self._after_save)
            self._after_save = None

    def _ready(self) -> None:
        # All of it: a fresh PeftModel says that it trains while the base inside it is still as it was loaded, and an
        # evaluation may have left any part in eval mode.
        if not all(module.training for module in self._modules):
            self.model.train()
        self.engine.before_forward()

    def loss(self, batch: Mapping[str, Any], *, output: Any = None, loss: Tensor | None = None) -> Tensor:
        """The loss of a micro-batch, for `accelerator.backward`: the task's and the plugins' terms, exactly scaled.

        Σ over the micro-batches of a step and over all processes is the mean over the step's labels, whatever their
        number in each.

        Args:
            batch: as `batches` gave it.
            output: of `session.model(**batch)`, where you made the pass yourself.
            loss: your own task loss, as a mean over the batch's labels, shape (); by default the model's.
        Returns: scalar, shape (), with gradient: that share × `gradient_accumulation_steps`, by which
            `accelerator.backward` divides, and nothing else would. To look at the loss, use `session.logs()`.
        """
        if not self._window:
            raise MethodError("session.loss(batch) belongs into the body of `for batch in session.batches(loader)`.")
        if not isinstance(batch, Mapping):
            raise MethodError(f"session.loss takes a mapping of the model's arguments, not a {type(batch).__name__}.")
        if loss is None:
            self.data.judge_labels(batch)
        accumulation = self.accelerator.gradient_accumulation_steps  # by which accelerator.backward will divide
        run = self.engine.run
        run.batch, run.first_example, run.copies = batch, self._loss.first_example, 1
        passes = self.engine.passes(batch)
        if passes is None:
            total = self._pass(batch, Pass(), output, loss)
        elif output is not None or loss is not None:
            raise MethodError(
                "session.loss(batch, output=…) or (batch, loss=…): a plugin of this model makes the passes itself. "
                "Call session.loss(batch), without a pass of your own."
            )
        else:
            total = passes.make(
                self._pass,
                backward=lambda part: self.accelerator.backward(part * accumulation),
                alone=lambda: self.accelerator.no_sync(self.model),
            )
        total = total * accumulation
        self.engine.returns_weights_with(total)
        if self.step == 0 and accumulation > 1:
            total.register_hook(self._check_backward)
        return total

    def _pass(self, batch: Mapping[str, Any], how: Pass, output: Any = None, loss: Tensor | None = None) -> Tensor:
        """The weighted loss of one pass, with all terms: its share of the step's."""
        if output is None:
            self._ready()
            output = self.model(**batch)
        mean = own_loss(output, batch, self.plan.task.name) if loss is None else loss
        self._loss.copies = how.copies
        if self._loss.totals is None:
            total = mean * how.copies / len(self._window)  # the labels cannot be counted
        else:
            total = self._loss.share(mean, batch)
            if loss is None:
                total = total - self._loss.router_excess(output, self._loss.weight(batch))
        if how.copies > 1 or how.weight != 1:
            total = total * (how.weight / how.copies)
        plugins = self.engine.term_plugins
        self.engine.run.batch = batch
        self._loss.parts.begin(total, number=self._loss.done)
        if plugins:
            terms = self._loss.terms(plugins, self.engine.run, batch, output, weight=how.weight)
            self.engine.check_terms(self._loss.parts, total.device)
            for term in terms:
                total = total + term
        if not total.requires_grad:
            raise self.engine.no_gradient()
        self.engine.after_forward()
        return total

    def _check_backward(self, gradient: Tensor) -> None:
        """In the first step: `loss.backward()` would not divide."""
        if float(gradient) == 1:
            raise MethodError(
                f"loss.backward() makes gradients {self.accelerator.gradient_accumulation_steps} times too large: call "
                "accelerator.backward(loss), which divides by the accumulation."
            )

    def _before_update(self) -> None:
        self._overflows = unscale(self.optimizers[0].optimizer)
        self._watch.before_update(at_rest=_at_rest(self.optimizers[0].optimizer))
        parts = self._loss.parts
        if len(parts.losses) < len(self._window):
            raise MethodError(
                f"session.loss(batch) was asked for {len(parts.losses)} of the {len(self._window)} micro-batches of "
                f"step {self.step + 1}: without it the plugins' terms and the exact scale are missing. A loss of your "
                "own goes through it, too: session.loss(batch, loss=mine)."
            )
        if self._overflows:
            return
        parts.rows = self.data.rows_of_last(len(self._window))
        self.engine.check_update(gradient_norm(self.engine.effects.tensors.values()), parts)
        self.engine.before_update()

    def _after_update(self) -> None:
        self.engine.after_update(skipped=self._overflows)
        self._watch.after_update(self.engine.effects.tensors.values())
        self._count_step()

    def _finish_skipped(self) -> None:
        """A gradient scaler that finds an overflow leaves the update out; the step is over all the same."""
        if self._watch.at_last and not self._watch.over and self.optimizers[0].step_was_skipped:
            self._watch.skipped = True
            self.engine.after_update(skipped=True)
            self._count_step()

    def _count_step(self) -> None:
        self.step += 1
        self.epoch_steps += 1
        if self.end_of_epoch:
            self.epoch, self.epoch_steps = self.epoch + 1, 0
        for micro_batch in self._loss.parts.losses:
            self._task_loss = micro_batch[""] + self._task_loss.to(micro_batch[""].device)
        self._task_steps += bool(self._loss.parts.losses)
        self.engine.step_end(self.step)

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """Tell the plugins what an evaluation returned, e.g. `{"eval_loss": 0.3}`; of several data sets all at once.

        They may put earlier weights back then, or end the run.

        Raises:
            MethodError: in the middle of an accumulated step.
        """
        self._check_whole_step("evaluated")
        self.engine.evaluated(metrics)
        self.engine.evaluation_ended()

    def eval_weights(self) -> AbstractContextManager[None]:
        """A context for an evaluation: within it the model has the weights that a plugin has evaluated, e.g. averages.

        ```python
        with session.eval_weights():
            metrics = evaluate(session.model)
        session.evaluated(metrics)
        ```
        Without such a plugin it changes nothing. Once `batches` has come to its end the model has them for good; a loop
        that breaks off before leaves it with those that train.
        """
        return self.engine.evaluating()

    def logs(self) -> dict[str, float]:
        """Since this was last asked: the task's mean `loss`, the means of the plugins' terms, what the plugins logged.

        Those of this process. The average of `loss` over all processes is the mean over all labels of the steps.
        """
        found: dict[str, float] = {}
        if self._task_steps:
            found["loss"] = float(self._task_loss) / self._task_steps
            self._task_loss, self._task_steps = torch.zeros(()), 0
        found |= self._loss.drain() | self.engine.run.logged
        self.engine.run.logged.clear()
        return found

    def _check_whole_step(self, call: str) -> None:
        self._finish_skipped()
        if self._window and not self._watch.over:
            raise MethodError(
                f"session.{call}(…) in the middle of a step: it belongs where a step is whole, `if "
                f"accelerator.sync_gradients: session.{call}(…)`."
            )

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def save(self, output_dir: str | os.PathLike[str], *, limit: int | None = None) -> Path:
        """Write `output_dir/checkpoint-<step>`, from which a killed run goes on bit for bit.

        Call it on every process, as the last thing in the body of the loop, after the step.

        Args:
            limit: how many checkpoints to keep; None keeps all.
        Returns: the checkpoint's folder.
        Raises:
            MethodError: in the middle of an accumulated step.
            CheckpointError: it could not be written; earlier ones are as they were.
        """
        self._check_whole_step("save")
        folder = session_checkpoint.save(self, Path(output_dir), limit)
        self._after_save = rng_state()
        return folder

    def resume(self, source: str | os.PathLike[str]) -> bool:
        """Go on from a checkpoint. Call it after optimizer, schedulers and loader were made, before `batches`.

        Args:
            source: an `output_dir`, of which the newest whole checkpoint is taken, or a checkpoint's folder.
        Returns: whether there was one.
        Raises:
            CheckpointError: it is damaged, or belongs to another run. Nothing was changed.
            PluginError: a plugin does not take its state back. Weights and optimizer are as they were.
        """
        if self._running or self.step:
            raise MethodError("session.resume(…) belongs before session.batches(…).")
        if not self.optimizers:
            raise MethodError("Call session.optimizer(…) before session.resume(…): it loads its state.")
        return session_checkpoint.resume(self, Path(source))


def _at_rest(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its every learning rate is 0."""
    return all(group["lr"] is not None and float(group["lr"]) == 0 for group in optimizer.param_groups)


def _plan_of(model: nn.Module) -> Plan:
    plan_in((model,), {})  # refuses a wrapped model, whose plan would be lost
    if plan_of(model) is None:
        from .build import attach

        attach(model, [])
    plan = plan_of(model)
    assert plan is not None
    return plan


def _stage_of(plan: Plan, name: str | None) -> Stage:
    stages = {stage.name: stage for stage in plan.stages}
    if name is None and len(stages) == 1:
        return plan.stages[0]
    if name not in stages:
        what = "needs one Session for each of its stages" if name is None else f"has no stage {name!r}"
        raise MethodError(
            f"This method {what}: Session(…, stage=name) with a name of {list(stages)}. What a stage changes is in "
            "its `args`."
        )
    return stages[name]
