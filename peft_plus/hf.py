"""The bridge to `transformers.Trainer` and its subclasses: the only file that imports a Trainer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import has_length

from . import losses, proof
from .arguments import check_arguments, default_collator, find_argument, plan_in, plan_of
from .checkpoint import THAWED, load_thawed
from .compose import Plan
from .effects import Effects
from .errors import EngagementError, MethodError
from .losses import StepTotals
from .plugin import LossTerm, Plugin, Run
from .stages import Stage
from .tasks import infer_task
from .timeline import label

if TYPE_CHECKING:
    _Trainer = transformers.Trainer
else:
    _Trainer = object  # stands before any Trainer class in the order of resolution

logger = logging.getLogger(__name__)


class Bridge(_Trainer):
    """What `with_plugins` puts in front of a Trainer class. Its methods only hand events and losses to the core."""

    model: Any
    optimizer: Any
    stage: Stage | None = None
    _effects: Effects | None = None
    _watch: proof.Engagement | None = None
    _totals: StepTotals | None = None
    _rank_offset: int = 0
    _seen: int = 0
    _in_step: bool = False
    _asked: bool = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        plan = plan_in(args, kwargs)
        if plan is not None:
            check_arguments(plan, find_argument(TrainingArguments, args, kwargs))
            self._choose_collator(plan, kwargs.get("model", args[0] if args else None), args, kwargs)
        super().__init__(*args, **kwargs)
        if plan is None and (plan := plan_of(self.model)) is not None:  # from model_init
            check_arguments(plan, self.args)
            self._choose_collator(plan, self.model, args, kwargs)
            self.data_collator = kwargs.get("data_collator") or self.data_collator
        self._task = plan.task if plan else infer_task(self.model)
        self._owns_loss = _first_definition(type(self), "compute_loss") is transformers.Trainer
        if not losses.scales_by_items(self.model):
            # transformers#47688: the model takes **kwargs but ignores num_items_in_batch, so its mean loss would count
            # once per micro-batch and per process.
            self.model_accepts_loss_kwargs = False
        self._means: dict[str, tuple[Tensor, int]] = {}  # loss term → sum of its means since the last log, how many
        self.add_callback(_Events(self))

    def _choose_collator(self, plan: Plan, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _first_definition(type(self), "__init__") not in (transformers.Trainer, transformers.Seq2SeqTrainer):
            return  # other Trainer classes bring collators of their own
        collator = default_collator(plan, model, args, kwargs)
        if collator is not None:
            kwargs["data_collator"] = collator

    # ---- the life of a run -------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        plan = plan_of(self.model)
        if plan and self.stage is None and len(plan.stages) > 1:
            raise MethodError(
                f"This method runs in {len(plan.stages)} stages ({', '.join(s.name for s in plan.stages)}), one "
                "Trainer each: call peft_plus.fit(model, args, train_dataset=…) instead of Trainer.train()."
            )
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._effects is not None:
                self._effects.close()
                self._effects = None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        plan = plan_of(self.model)
        if plan is None:
            return super().create_optimizer(*args, **kwargs)
        self._effects = Effects(self.model, plan, self.stage or plan.stages[0])
        self._effects.open()
        optimizer = super().create_optimizer(*args, **kwargs)
        self._effects.group(optimizer, scheduled=self.lr_scheduler is not None)
        return optimizer

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> Any:
        values = super().set_initial_training_values(args, dataloader)
        # Where the data have no length, the Trainer takes all of max_steps for one epoch.
        self._steps_per_epoch = values[1] if has_length(dataloader) else 0
        return values

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if (Path(resume_from_checkpoint) / THAWED).is_file():
            load_thawed(model or self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        # The best checkpoint may be older than a layer's thawing: prove first, then load.
        self._prove()
        super()._load_best_model()
        best = self.state.best_model_checkpoint
        if best and (Path(best) / THAWED).is_file():
            load_thawed(self.model, best)

    # ---- events, called by _Events -----------------------------------------------------------------------------

    def _begin(self) -> None:
        if self._effects is None:
            return
        plan = self._effects.plan
        self._run = Run(
            model=self.model,
            task=plan.task,
            num_blocks=plan.layers.num_blocks,
            depths=self._effects.depths,
            stages=plan.stages,
            stage=self._effects.stage,
            step=self.state.global_step,
            max_steps=self.state.max_steps,
            steps_per_epoch=self._steps_per_epoch,
            optimizer=self.optimizer,
            base_lr=self.args.learning_rate,
            seed=self.args.seed,
        )
        params = plan.params
        self._watch = proof.Engagement(
            dict(self.model.named_parameters()),
            lambda name: (params[name].depth, params[name].part) if name in params else None,
        )
        never = self._effects.never_trained(self._run)
        if never:
            names = ", ".join(label(g, plan.layers.num_blocks) for g in sorted(never, reverse=True))
            logger.warning("In these %d steps the schedule never trains: %s.", self.state.max_steps, names)
        self._effects.recall(self._run)
        self._effects.apply(self._run)

    def _step_begin(self) -> None:
        if self._effects is not None:
            self._run.step, self._seen = self.state.global_step, 0
            self._effects.apply(self._run)

    def _before_update(self) -> None:
        if self._effects is None:
            return
        self._effects.drop_frozen_gradients()
        self._restore_rates = self._effects.scale_rates(self.optimizer, self._run)
        assert self._watch is not None
        moving = [group for group in self.optimizer.param_groups if group["lr"] is None or float(group["lr"]) > 0]
        ids = {id(tensor) for group in moving for tensor in group["params"]}
        tensors = self._effects.tensors.items()
        self._watch.count(name for name, tensor in tensors if id(tensor) in ids and self._effects.trains(name))

    def _after_update(self) -> None:
        if self._effects is not None:
            self._restore_rates()

    def _evaluated(self, metrics: Mapping[str, float]) -> None:
        if self._effects is not None:
            self._run.last_metrics = dict(metrics)

    def _prove(self) -> None:
        """Compare what was declared with what moved; on a contradiction save the work, then raise."""
        if self._effects is None or self._watch is None:
            return
        watch, self._watch = self._watch, None
        plan = self._effects.plan
        rows, strays = watch.finish()
        plan.engagement[self._effects.stage.name] = rows
        logger.info(
            "What trained in stage %r:\n%s", self._effects.stage.name, proof.table(rows, plan.layers.num_blocks)
        )
        try:
            proof.check(rows, strays, plan.layers.num_blocks)
        except EngagementError as error:
            folder = Path(self.args.output_dir or ".") / "unproven"
            self.save_model(str(folder))
            raise EngagementError(f"{error} The weights as they are were saved in {str(folder)!r}.") from None

    # ---- the loss ----------------------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        samples, items = super().get_batch_samples(*args, **kwargs)
        self._totals = self._count(samples)
        return samples, items

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._in_step, self._asked = True, False
        try:
            loss = super().training_step(*args, **kwargs)
        except RuntimeError as error:
            if self._effects is None or "does not require grad" not in str(error):
                raise
            blocks = self._effects.plan.layers.num_blocks
            groups = sorted(self._effects.groups(self._effects.trains), reverse=True)
            now = ", ".join(label(group, blocks) for group in groups) or "nothing"
            raise MethodError(
                f"At step {self.state.global_step} only {now} may train, "
                "and the loss uses none of it. Let something that it uses train from the start, or use another loss."
            ) from error
        finally:
            self._in_step = False
        if self._effects is not None:
            self._effects.drop_frozen_gradients()
        silent = [] if self._asked else self._term_plugins()
        if silent:
            raise MethodError(
                f"plugin {silent[0].name!r} adds a loss term, but {type(self).__name__}.compute_loss never asked for "
                "it. Let it call super().compute_loss, or write it in a subclass of transformers.Trainer and use "
                "peft_plus.with_plugins(ThatTrainer)."
            )
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        if not self._in_step or self._totals is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch, **kwargs)
        if self._effects is not None:
            self._effects.rest()
        batch = dict(inputs)
        loss, output = super().compute_loss(model, inputs, True, num_items_in_batch=num_items_in_batch, **kwargs)
        scaled = self._already_scaled(num_items_in_batch)
        # What the Trainer will divide by after this method; undone here, since every part below is scaled exactly.
        divisor = 1.0 if scaled else float(self.current_gradient_accumulation_steps)
        if self._owns_loss and not scaled:
            loss = self._exact(loss, batch) * divisor
        for term in self._terms(batch, output).values():
            loss = loss + losses.contribution(term, self._totals) * divisor
        return (loss, output) if return_outputs else loss

    def _exact(self, loss: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """The task's mean over this micro-batch, rescaled to its share of the mean over the whole step."""
        assert self._totals is not None
        count = float(self._task.count(batch))
        if count == 0:  # the mean over nothing is NaN; its share of the step is nothing, still with a graph
            return loss.nan_to_num() * 0
        # The share first: with one micro-batch it is exactly 1 and the loss stays what it was, bit for bit.
        return loss * (count * self._totals.processes / self._totals.labels)

    def _terms(self, batch: Mapping[str, Any], output: Any) -> dict[str, LossTerm]:
        plugins = self._term_plugins()
        if not plugins:
            return {}
        self._asked = True
        self._run.batch, self._run.first_example = batch, self._rank_offset + self._seen
        terms = losses.collect(plugins, self._run, batch, output)
        self._seen += _rows(batch) * self.accelerator.num_processes
        for name, term in terms.items():
            total, number = self._means.get(name, (torch.zeros(()), 0))
            self._means[name] = (losses.mean(term) + total.to(term.sum.device), number + 1)
        return terms

    def _term_plugins(self) -> list[Plugin]:
        if self._effects is None:
            return []
        return [p for p in self._effects.plan.active(self._effects.stage) if "loss_terms" in p.hooks()]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            for name, (total, number) in self._means.items():
                logs[name] = round(float(total) / number, 6)
            self._means.clear()
            if self._effects is not None:
                logs.update(self._run.logged)
                self._run.logged.clear()
        super().log(logs, *args, **kwargs)

    def _already_scaled(self, num_items_in_batch: Any) -> bool:
        """Whether the Trainer will leave the loss as it is; the same rule as its own, which it applies afterwards."""
        if self.loss_is_scaled_for_ga is not None:
            return bool(self.loss_is_scaled_for_ga)
        return (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or self.compute_loss_func is not None

    def _count(self, samples: list[Any]) -> StepTotals | None:
        """Labels and rows of the whole optimizer step, over all micro-batches and processes."""
        if not samples or not all(isinstance(batch, Mapping) for batch in samples):
            return None
        rows = [_rows(batch) for batch in samples]
        try:
            labels = sum(float(self._task.count(batch)) for batch in samples)
        except ValueError:
            if self._term_plugins():
                raise
            return None  # no labels that the task knows: the loss stays as the model or the user computes it
        counts = torch.tensor([labels, sum(rows)], dtype=torch.float64)
        processes = self.accelerator.num_processes
        self._rank_offset = 0
        if processes > 1:
            counts = torch.as_tensor(self.accelerator.reduce(counts.to(self.args.device), "sum")).cpu()
            self._rank_offset = self.accelerator.process_index * rows[0]
        return StepTotals(float(counts[0]), float(counts[1]), len(samples), processes)


class _Events(TrainerCallback):
    """Hands the Trainer's events to the bridge. Added last, so that it runs after the user's callbacks."""

    def __init__(self, trainer: Bridge) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._trainer._begin()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._trainer._step_begin()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._trainer._before_update()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._trainer._after_update()

    def on_evaluate(self, *_: Any, metrics: Mapping[str, float] | None = None, **__: Any) -> None:
        self._trainer._evaluated(metrics or {})

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._trainer._prove()


@cache
def with_plugins(trainer_class: type[Any]) -> type[Any]:
    """A subclass of any Trainer class that runs the plans of our models.

    ```python
    SFT = with_plugins(trl.SFTTrainer)
    ```
    A model without a plan trains as ever, except that its loss is scaled exactly under gradient accumulation.

    Raises:
        TypeError: it is no subclass of `transformers.Trainer`.
    """
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, transformers.Trainer)):
        raise TypeError(f"with_plugins takes a subclass of transformers.Trainer, not {trainer_class!r}.")
    if issubclass(trainer_class, Bridge):
        return trainer_class
    return type(
        trainer_class.__name__,
        (Bridge, trainer_class),
        {"__module__": trainer_class.__module__, "__doc__": trainer_class.__doc__},
    )


class Trainer(Bridge, transformers.Trainer):
    """`transformers.Trainer` that runs the plan of a model from `get_model`. Same arguments, same methods."""


def _rows(batch: Mapping[str, Any]) -> int:
    return next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()), 0)


def _first_definition(cls: type[Any], method: str) -> type[Any]:
    """The class after Bridge in the order of resolution that defines `method`."""
    order = cls.__mro__[cls.__mro__.index(Bridge) + 1 :]
    return next(base for base in order if method in vars(base))
