"""What stands around a Trainer's run so that a bad input is named early, and what was learned before it is kept.

Its methods are called by the Trainer itself; a model without a plan trains as ever.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import EarlyStoppingCallback
from transformers.trainer_utils import has_length

from .argument_values import check_best_metric, check_values
from .arguments import objective_of, plan_of
from .checkpoint import MANIFEST
from .data_columns import check_columns, check_inputs
from .data_limits import Limits, limits_of
from .errors import CheckpointError, DataError, EngagementError, MethodError, PluginError, TrainingError
from .metric_values import named_metrics
from .named_rows import Rows, hands_on, name_rows
from .stage_start import check_without_epochs

if TYPE_CHECKING:
    from .compose import Plan
    from .engine import Engine
    from .step_loss import StepLoss

logger = logging.getLogger(__name__)

_Trainer: Any = object  # stands before any Trainer class in the order of resolution
_OURS = (CheckpointError, DataError, EngagementError, MethodError, PluginError, TrainingError)
_NO_BATCH = "train_dataset gave no batch: it is empty, or was read to its end before."
STOPPED = "stopped"
"""Folder in `output_dir` with the weights of a run that an error ended."""


class Safeguards(_Trainer):
    """Checks before a run, names while it runs, and a rescue when it breaks off."""

    stage: Any
    _engine: Engine | None = None
    _step_loss: StepLoss
    _numbered: Rows | None = None  # the training data
    _iterator: Any = None  # of the epoch at work
    _taken: int = 0  # batches taken from it
    _first_step: int = 0  # finished steps when this run began
    _planned: Plan | None = None

    # ---- before --------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        plan = plan_of(self.model)
        if plan is None and self._planned is not None and self.model_init is None:
            raise MethodError(
                "This Trainer was built for a model with a plan, and model.peft_plus is gone: its plugins would not "
                "run. Call attach(model, …) and build the Trainer again."
            )
        if plan is not None:
            own = self.optimizer is not None or self.optimizer_cls_and_kwargs is not None
            check_values(self.args, own_optimizer=own)
            self._check_training_data()
            self._check_evaluation()
            self._step_loss.needs_labels = self._trains_on_labels
        hides = self.args.logging_nan_inf_filter
        if plan is not None and self.accelerator.scaler is None:
            # It would wait for the device twice per micro-batch to leave out of the log what ends this run anyway.
            self.args.logging_nan_inf_filter = False
        try:
            result = super().train(*args, **kwargs)
            self._step_loss.check_labels(self.state.global_step)
            return result
        except Exception as error:
            self._rescue(error)
            if isinstance(error, EngagementError):  # that there were no labels tells more
                self._step_loss.check_labels(self.state.global_step)
            raise
        finally:
            self.args.logging_nan_inf_filter = hides
            self._numbered = self._iterator = None

    def _check_training_data(self) -> None:
        data, rows = self.train_dataset, self._train_batch_size
        if data is None or self._own("get_train_dataloader"):
            return
        if has_length(data) and len(data) == 0:
            raise DataError("train_dataset has no rows, so there is nothing to train on.")
        if self.args.dataloader_drop_last and has_length(data) and len(data) < rows:
            raise DataError(
                f"dataloader_drop_last=True leaves no batch: train_dataset has {len(data)} rows, a batch {rows}. Leave "
                "it out, or lower per_device_train_batch_size."
            )
        plan = plan_of(self.model)
        if plan is not None and not has_length(data):
            check_without_epochs(plan, self.stage or plan.stages[0], self.model, self.args.max_steps)
        self._check_columns(data, "train_dataset")

    def _check_evaluation(self) -> None:
        sets = self.eval_dataset
        check_best_metric(
            self.args,
            eval_sets=None if sets is None else list(map(str, sets)) if isinstance(sets, dict) else [],
            computes=self.compute_metrics is not None,
            stops_early=any(isinstance(c, EarlyStoppingCallback) for c in self.callback_handler.callbacks),
            known=not any(self._own(name) for name in ("evaluate", "evaluation_loop", "_evaluate")),
        )
        if self.args.eval_strategy == "no" or sets is None or self._own("get_eval_dataloader"):
            return
        for name, part in sets.items() if isinstance(sets, dict) else [("", sets)]:
            label = f"eval_dataset[{name!r}]" if name else "eval_dataset"
            if has_length(part) and len(part) == 0:
                raise DataError(f"{label} has no rows, so no evaluation could return a metric. Give it rows.")
            self._check_columns(part, label, training=False)

    def _own(self, method: str) -> bool:
        """Whether a Trainer class other than transformers' own defines the method."""
        owner = next(cls for cls in type(self).__mro__ if method in vars(cls) and not _is_ours(cls))
        return not owner.__module__.startswith("transformers.")

    @property
    def _limits(self) -> Limits:
        """What the model takes, as far as its own loss is what this Trainer trains on."""
        own = self._own("compute_loss") or self.compute_loss_func is not None
        if objective_of(type(self)) != "supervised":
            return Limits()
        return limits_of(self.model, self._step_loss.task, own_loss=own)

    @property
    def _trains_on_labels(self) -> bool:
        """Whether the loss is known to be one of labels: the model's, through nobody's `compute_loss` but TRL's."""
        owners = [cls for cls in type(self).__mro__ if "compute_loss" in vars(cls) and not _is_ours(cls)]
        known = all(cls.__module__.startswith(("transformers.", "trl.")) for cls in owners)
        return known and objective_of(type(self)) == "supervised"

    def _check_columns(self, dataset: Any, name: str, *, training: bool = True) -> None:
        """Look through the columns, where it is known that the collator hands them on as they are."""
        if hands_on(self.data_collator):
            check_inputs(dataset, self._limits, name)
            check_columns(dataset, self._limits, name, training=training)

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        if plan_of(self.model) is None:
            return loader
        if has_length(loader) and len(loader) == 0:
            raise DataError(
                f"The data give no batch of {self._train_batch_size} rows on each of {self.args.world_size} processes: "
                "more rows, smaller batches, or dataloader_drop_last=False."
            )
        if objective_of(type(self)) not in ("reinforcement", "distillation"):  # whose batches are lists of prompts
            self._numbered = name_rows(loader, self._limits, "train_dataset")
        return loader

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super().get_eval_dataloader(*args, **kwargs)
        if plan_of(self.model) is not None and not self._own("get_eval_dataloader"):
            name_rows(loader, self._limits, "eval_dataset")
        return loader

    # ---- while it runs -------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, *args: Any, **kwargs: Any) -> Any:
        if epoch_iterator is not self._iterator:
            self._iterator, self._taken = epoch_iterator, 0
            if self._numbered is not None:
                self._numbered.begin()
        if plan_of(self.model) is not None:
            epoch_iterator = _Named(epoch_iterator, self.state.global_step)
        samples, items = super().get_batch_samples(epoch_iterator, *args, **kwargs)
        if not samples and self._engine is not None and not self._taken and not self.state.global_step:
            raise DataError(_NO_BATCH)
        self._taken += len(samples)
        return samples, items

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        # A gradient scaler skips updates that overflow; DeepSpeed has updated already.
        if self._engine is not None and self.accelerator.scaler is None and not self.is_deepspeed_enabled:
            parts = self._step_loss.parts
            first = self._taken - len(parts.batches)
            if self._numbered is not None:
                parts.rows = [self._numbered.of_batch(first + place) for place in range(len(parts.batches))]
            self._engine.check_update(norm, parts)
        return norm

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        if plan_of(self.model) is None:
            return super()._evaluate(*args, **kwargs)
        compute, saved = self.compute_metrics, self.args.save_strategy != "no"
        self.compute_metrics = named_metrics(compute, self._watched, saved=saved)
        try:
            return super()._evaluate(*args, **kwargs)
        finally:
            self.compute_metrics = compute

    @property
    def _watched(self) -> set[str]:
        """The metric that chooses the best model, as `compute_metrics` may call it."""
        wanted = (self.args.metric_for_best_model or "").removeprefix("eval_")
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        return {wanted, *(wanted.removeprefix(f"{name}_") for name in sets)} - {""}

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        try:
            return super()._determine_best_metric(metrics, trial)
        except KeyError as error:
            if plan_of(self.model) is None:
                raise
            raise MethodError(
                f"metric_for_best_model={self.args.metric_for_best_model!r} is not among what the evaluation at step "
                f"{self.state.global_step} returned: {', '.join(sorted(metrics))}. Let compute_metrics return it, or "
                "choose another."
            ) from error

    # ---- when it breaks off ----------------------------------------------------------------------------------------

    def _rescue(self, error: Exception) -> None:
        """Save the weights of the last finished step, where nothing else holds them."""
        step = self.state.global_step
        engine = self._engine
        if engine is None or not hasattr(engine, "run") or isinstance(error, CheckpointError | EngagementError):
            return  # it never began; or what went wrong is saving itself, or was saved already
        if step <= self._first_step or engine.updating or getattr(error, "weights_lost", False):
            return
        alone = self.args.world_size == 1 or not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if not alone and not isinstance(error, TrainingError):
            return  # the other processes may be anywhere, and would have to take part
        output = Path(self.args.output_dir or ".")
        folder = output / f"checkpoint-{step}"
        if not (folder / MANIFEST).is_file():
            folder = output / STOPPED
            try:
                self.save_model(str(folder), _internal_call=True)
            except Exception as second:  # noqa: BLE001 - the first error is what the user must see
                logger.error("The weights after step %d could not be saved in %s: %s", step, folder, second)
                return
        note = f"The weights after {step} finished steps are in memory and in {str(folder)!r}."
        logger.error("Training stopped. %s", note)
        if isinstance(error, _OURS):
            error.args = (f"{error} {note}",)
        elif add_note := getattr(error, "add_note", None):  # Python 3.11
            add_note(note)


class _Named:
    """An iterator over batches whose errors say at which step they happened."""

    def __init__(self, iterator: Iterator[Any], step: int) -> None:
        self._iterator, self._step = iterator, step

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            return next(self._iterator)
        except (StopIteration, *_OURS):
            raise
        except Exception as error:
            if "does not contain any data" in str(error):  # Accelerate's loader of streams
                raise DataError(_NO_BATCH) from error
            raise DataError(
                f"train_dataset could not give the batches of the step after step {self._step}: "
                f"{type(error).__name__}: {error}."
            ) from error


def _is_ours(cls: type[Any]) -> bool:
    return cls.__module__.startswith("peft_plus.")
