"""The bridge to `transformers.Trainer` and its subclasses: the only file that imports a Trainer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from peft import PeftModel
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType, has_length

from .argument_values import check_values
from .arguments import (
    check_adapter,
    check_arguments,
    check_objective,
    default_collator,
    find_argument,
    plan_in,
    plan_of,
)
from .budget import Budgets, budgeted
from .checkpoint_trouble import loading
from .distributed import check_accelerator, leave_together
from .engine import Engine
from .errors import MethodError
from .forward import FirstPass
from .own_schedule import check_own_schedule, replaces_scheduler
from .rehearsal import check_adapter_folder
from .renamed_weights import left_out, load_by_their_class
from .safeguards import Safeguards
from .sampling import order, order_plugin, order_taken_from
from .saving import THAWED, load_thawed
from .sharded_resume import check_sharded_resume, load_sharded_weights, rest_stateless
from .stage_data import StageData, data_taken_from, stage_data
from .stages import Stage, arguments_of
from .step_loss import StepLoss
from .tasks import infer_task
from .trainer_checkpoint import SealedCheckpoints
from .trainer_events import Events
from .trainer_loss import TrainerLoss, owners
from .trunk import TrainingData

if TYPE_CHECKING:
    _Trainer = transformers.Trainer
else:
    _Trainer = object  # stands before any Trainer class in the order of resolution


class Bridge(SealedCheckpoints, Safeguards, TrainerLoss, _Trainer):
    """What `with_plugins` puts in front of a Trainer class. Its methods only hand events and losses to the core."""

    model: Any
    optimizer: Any
    stage: Stage | None = None
    _engine: Engine | None = None
    _hook: Any = None
    _order: Any = None
    _order_taken: bool = False
    _stage_data: StageData | None = None
    _data_taken: bool = False
    _loads: str | None = None  # the folder that weights are loaded from
    _budgets: Budgets
    _evaluations: int = 0  # under way; one of several datasets makes one for each

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = plan_in(args, kwargs)
        if given is not None:  # before TRL tokenises its data
            check_adapter(given, args, kwargs)
            check_objective(given, type(self))
            found = find_argument(TrainingArguments, args, kwargs)
            if found is not None and len(given.stages) == 1 and given.stages[0].args:
                planned = arguments_of(given.stages[0], found)
                args = tuple(planned if value is found else value for value in args)
                kwargs = {name: planned if value is found else value for name, value in kwargs.items()}
                found = planned
            check_arguments(given, found)
            check_values(found, own_optimizer=bool({"optimizers", "optimizer_cls_and_kwargs"} & kwargs.keys()))
        super().__init__(*args, **kwargs)
        plan = plan_of(self.model)
        if given is not None and plan is not given:
            raise MethodError(f"{type(self).__name__} put another model in the place of yours, and its plan is lost.")
        if plan is not None:
            check_objective(plan, type(self))  # a model from model_init is here for the first time
            check_accelerator(plan, self.model, self.accelerator)
        self._planned, self._budgets = plan, Budgets()
        task = plan.task if plan else infer_task(self.model)
        # Which labels the Trainer counts. The last virtual token predicts a row's first one.
        self._loss_shifts_labels = task.predicts_next and not task.virtual_tokens
        self._first_pass = FirstPass(self.model)
        self._step_loss = StepLoss(
            self.model,
            task,
            gather=self._gathered,
            processes=self.accelerator.num_processes,
            rank=self.accelerator.process_index,
            together=self.args.average_tokens_across_devices,
        )
        self._choose_scale()
        self.add_callback(Events(self))

    # ---- the life of a run -------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        plan = plan_of(self.model)
        if plan and self.stage is None:
            first, *others = plan.stages
            if others:
                raise MethodError(
                    f"This method runs in {len(plan.stages)} stages ({', '.join(s.name for s in plan.stages)}), one "
                    "Trainer each: call peft_plus.fit(model, args, train_dataset=…) instead of Trainer.train()."
                )
            lost = [name for name, value in first.args.items() if getattr(self.args, name, None) != value]
            if lost:
                raise MethodError(
                    f"The method sets {', '.join(lost)}, and this Trainer was built without it: give it the model and "
                    "its TrainingArguments, Trainer(model, args, …), rather than a model_init or no arguments."
                )
        if plan:
            choose = partial(
                budgeted,
                plan,
                self.stage or plan.stages[0],
                self.model,
                data=self._training_data(),
                evaluates=self.eval_dataset is not None,
            )
            self.args = self._budgets.begin(self.args, choose, resumes=bool(resume_from_checkpoint))
            check_own_schedule(plan, self.stage or plan.stages[0], self.args)
        try:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
            leave_together()
            return result
        finally:
            if self._engine is not None and self._engine.finished:
                self._budgets.ended()  # also where what came after it failed
            self._let_go()

    def _let_go(self) -> None:
        """Give the model back as it was before the run."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def get_train_dataloader(self) -> Any:
        plan, given = plan_of(self.model), self.train_dataset
        data = self._stage_data = self._planned_data()
        self._data_taken = self._order_taken = False
        self.train_dataset = data.dataset  # the loader's rows and length, and what the order is of
        try:
            self._order = self._planned_order()
            loader = super().get_train_dataloader()
        finally:
            self.train_dataset = given
        if plan is not None and self._order is not None and not self._order_taken:
            raise order_taken_from(plan, type(self))
        if plan is not None and data.dataset is not given and not self._data_taken:
            raise data_taken_from(plan, self.stage or plan.stages[0], type(self))
        return loader

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        self._data_taken |= self._stage_data is not None and dataset is self._stage_data.dataset
        return super()._get_dataloader(dataset, *args, **kwargs)

    def _planned_data(self) -> StageData:
        plan = plan_of(self.model)
        if plan is None or self.train_dataset is None:
            return StageData(self.train_dataset)
        return stage_data(
            plan,
            self.stage or plan.stages[0],
            self.model,
            self.train_dataset,
            tokenizer=self.processing_class or plan.task.tokenizer,
            **self._data_start,
        )

    @property
    def _data_start(self) -> dict[str, int]:
        """What plugins that set data or order know of where the stage begins."""
        return {
            "seed": self.args.seed if self.args.data_seed is None else self.args.data_seed,
            "batch_size": self._rows,
            "processes": self.accelerator.num_processes,
        }

    @property
    def _rows(self) -> int:
        """Rows of a micro-batch of one process."""
        return self._train_batch_size // (self.accelerator.num_processes if self.accelerator.split_batches else 1)

    def _planned_order(self) -> Any:
        plan = plan_of(self.model)
        if plan is None or self.train_dataset is None:
            return None
        stage, owner = self.stage or plan.stages[0], owners(type(self), "_get_train_sampler")[0]
        if order_plugin(plan, stage) is not None and owner is not transformers.Trainer:
            raise order_taken_from(plan, owner)
        return order(
            plan,
            stage,
            self.model,
            self.train_dataset,
            **self._data_start,
        )

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        self._order_taken = True
        return super()._get_train_sampler(*args, **kwargs) if self._order is None else self._order

    def _begin_epoch(self) -> None:
        # Accelerate tells it too, but does not reach it where a resumed run skips batches on several processes.
        if hasattr(self._order, "set_epoch"):
            self._order.set_epoch(self.state.global_step // self._steps_per_epoch)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        plan = plan_of(self.model)
        if plan is None:
            return super().create_optimizer(*args, **kwargs)
        self._let_go()  # of an attempt that found its batches too large (auto_find_batch_size)
        self._engine = Engine(
            self.model,
            plan,
            self.stage or plan.stages[0],
            seed=self.args.seed,
            batch_size=self._rows,
            processes=self.accelerator.num_processes,
        )
        optimizer = super().create_optimizer(*args, **kwargs) or self.optimizer  # an own method may return nothing
        self._engine.adopt(optimizer, scheduled=self.lr_scheduler is not None)
        return optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        plan = plan_of(self.model)
        if plan is None or not replaces_scheduler(plan, self.stage or plan.stages[0], self.args):
            return super().create_scheduler(*args, **kwargs)
        asked, self.args.lr_scheduler_type = self.args.lr_scheduler_type, SchedulerType.CONSTANT
        try:
            return super().create_scheduler(*args, **kwargs)
        finally:
            self.args.lr_scheduler_type = asked  # by which a resumed run is known

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> Any:
        values = super().set_initial_training_values(args, dataloader)
        # Where the data have no length, the Trainer takes all of max_steps for one epoch.
        self._steps_per_epoch = values[1] if has_length(dataloader) else 0
        return values

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with loading(resume_from_checkpoint):
            check_sharded_resume(self.accelerator, self.model, resume_from_checkpoint)
            if isinstance(self.model, PeftModel):
                check_adapter_folder(resume_from_checkpoint, self.model, engine_owned=self.is_fsdp_enabled)
            self._loads = resume_from_checkpoint
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            if self.is_fsdp_enabled:
                load_sharded_weights(self.accelerator, self.model, resume_from_checkpoint)
                rest_stateless(self.accelerator, self.model, resume_from_checkpoint)
            elif (Path(resume_from_checkpoint) / THAWED).is_file():
                load_thawed(model or self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        # The best checkpoint may be older than a layer's thawing: prove first, then load.
        self._prove()
        self._loads = self.state.best_model_checkpoint
        super()._load_best_model()
        best = self.state.best_model_checkpoint
        if best and self.is_fsdp_enabled:
            load_sharded_weights(self.accelerator, self.model, best)
        elif best and (Path(best) / THAWED).is_file():
            load_thawed(self.model, best)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        missing = left_out(self.model, load_result.missing_keys)
        if missing and self._loads and plan_of(self.model) is not None and not isinstance(self.model, PeftModel):
            load_by_their_class(self.model, self._loads)
        else:
            super()._issue_warnings_after_load(load_result)

    def _begin(self) -> None:
        if self._engine is None:
            if plan_of(self.model) is not None:
                raise self._bypassed("create_optimizer")
            return
        self._first_step = self.state.global_step
        if self._engine.term_plugins and owners(type(self), "compute_loss")[0] is not transformers.Trainer:
            self._hook = self.model.register_forward_hook(self._first_pass.look, with_kwargs=True)
        self._engine.begin(
            step=self.state.global_step,
            max_steps=self.state.max_steps,
            steps_per_epoch=self._steps_per_epoch,
            optimizer=self.optimizer,
            lr=self.args.learning_rate,
            seed=self.args.seed,
            batch_size=self._rows,
            processes=self.accelerator.num_processes,
            watch=not self.is_deepspeed_enabled,  # which updates inside the backward, and copies of its own
            data=self._training_data(),
            evaluates=str(getattr(self.args.eval_strategy, "value", self.args.eval_strategy)) != "no",
            scratch=Path(self.args.output_dir or ".") / "_trunk",  # a name that the Trainer never uploads
        )
        self._stop_if_told()  # before the checkpoint that it goes on from

    def _training_data(self) -> TrainingData:
        data = self._stage_data or StageData(self.train_dataset)

        def loader(order: Any, rows: int) -> Any:
            return self._get_dataloader(data.dataset, "Storing", rows, sampler_fn=lambda _: order)

        return TrainingData(
            dataset=data.dataset,
            redrawn_by=data.redrawn_by,
            loader=loader,
            collator=self.data_collator,
            collate=self._get_collator_with_removed_columns(self.data_collator),
        )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self._engine is None or not self._engine.stopped:
            super()._run_epoch(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        self._evaluations += 1
        try:
            with self._evaluating():
                metrics = super().evaluate(*args, **kwargs)
        finally:
            self._evaluations -= 1
        if self._engine is not None and not self._evaluations:
            self._engine.evaluation_ended()
            self._stop_if_told()
        return metrics

    def _evaluating(self) -> AbstractContextManager[None]:
        return nullcontext() if self._engine is None else self._engine.evaluating()

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        with self._evaluating():
            return super().predict(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        with self._evaluating():
            super().save_model(*args, **kwargs)

    def _stop_if_told(self) -> None:
        if self._engine is not None and self._engine.stopped:
            self.control.should_training_stop = True

    def _prove(self) -> None:
        if self._engine is not None:
            self._engine.prove(self._save_unproven)

    def _save_unproven(self) -> str:
        folder = str(Path(self.args.output_dir or ".") / "unproven")
        self.save_model(folder)
        return folder


class ExactLoss(transformers.Trainer):
    """Stands right above `transformers.Trainer`, where the arguments and calls of any Trainer class arrive.

    Whoever calls its `compute_loss` during a step gets the exact share of the step's loss.
    """

    _in_step: bool
    _divisor: float
    _divides: bool
    _first_pass: FirstPass
    _step_loss: StepLoss
    _multiplied: Callable[[Any], int]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(transformers.Trainer.__init__).bind(self, *args, **kwargs).arguments
        super().__init__(*args, **kwargs)
        plan = plan_of(self.model)
        if plan is None:
            return
        check_arguments(plan, self.args)
        if given.get("data_collator") is None:  # nor does the Trainer class bring one of its own
            collator = default_collator(plan, self.model, self.processing_class, self.train_dataset)
            self.data_collator = collator or self.data_collator

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        if not self._in_step or self._step_loss.totals is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch, **kwargs)
        batch = self._first_pass.batch = dict(inputs)
        loss, output = super().compute_loss(model, inputs, True, num_items_in_batch=num_items_in_batch, **kwargs)
        self._first_pass.keep(output)
        factor = self._multiplied(num_items_in_batch)
        smoothed = self.label_smoother is not None and "labels" in batch
        divided = num_items_in_batch is not None and (smoothed or (self._divides and self.model_accepts_loss_kwargs))
        if self.compute_loss_func is None and not divided:
            loss, factor = self._step_loss.share(loss / factor, batch), self._step_loss.weight(batch)
        if self.compute_loss_func is None and not smoothed:  # the model's own loss
            loss = loss - self._step_loss.router_excess(output, factor)
        loss = loss * self._divisor
        return (loss, output) if return_outputs else loss


@cache
def with_plugins(trainer_class: type[Any]) -> type[Any]:
    """A subclass of any Trainer class that runs the plans of our models.

    ```python
    SFT = with_plugins(trl.SFTTrainer)
    ```
    A model without a plan trains as ever, except for what `docs/coming_from_peft.md` lists under "What differs": above
    all, its loss is scaled exactly under gradient accumulation.

    Raises:
        TypeError: it is no subclass of `transformers.Trainer`.
    """
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, transformers.Trainer)):
        raise TypeError(f"with_plugins takes a subclass of transformers.Trainer, not {trainer_class!r}.")
    if issubclass(trainer_class, Bridge):
        return trainer_class
    if trainer_class is transformers.Trainer:
        return Trainer
    bases: tuple[Any, ...] = (Bridge, trainer_class, ExactLoss)
    return type(
        trainer_class.__name__,
        bases,
        {"__module__": trainer_class.__module__, "__doc__": trainer_class.__doc__},
    )


class Trainer(Bridge, ExactLoss):
    """`transformers.Trainer` that runs the plan of a model from `get_model`. Same arguments, same methods."""
