"""A Trainer's loss: made the exact share of its step, whoever computes it, and completed by the plugins' terms.

Its methods are called by the Trainer itself.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from . import own_loss
from .data_columns import columns
from .errors import DataError, MethodError
from .forward import FirstPass
from .losses import scales_by_items
from .plugin import Pass
from .step_loss import StepLoss

if TYPE_CHECKING:
    from .engine import Engine

logger = logging.getLogger(__name__)

_Trainer: Any = object  # stands before any Trainer class in the order of resolution


class TrainerLoss(_Trainer):
    """Scales what a Trainer class computes, in front of it; `ExactLoss` in hf.py does so behind it."""

    model: Any
    args: Any
    accelerator: Any
    loss_is_scaled_for_ga: bool | None
    model_accepts_loss_kwargs: bool
    compute_loss_func: Any
    _engine: Engine | None = None
    _step_loss: StepLoss
    _first_pass: FirstPass
    _in_step: bool = False
    _asked: bool = False
    _divisor: float = 1.0
    _mean_func: bool | None = None  # whether the user's compute_loss_func is a mean; None: not known yet

    def _choose_scale(self) -> None:
        """Tell the Trainer by what the loss is divided already."""
        *others, _ = owners(type(self), "compute_loss")  # the last is transformers' own
        losses = own_loss.chain([vars(cls)["compute_loss"] for cls in others])
        from_trl = any(cls.__module__.startswith("trl.") for cls in others)
        self._divides = scales_by_items(self.model)
        if not self._divides and not from_trl and not any(own_loss.divides_by(f, own_loss.ITEMS) for f in losses):
            # transformers#47688: the model takes **kwargs but ignores num_items_in_batch, so its mean loss would
            # count once per micro-batch and per process.
            self.model_accepts_loss_kwargs = False
        if self.loss_is_scaled_for_ga is None and any(own_loss.divides_by(f, *own_loss.ACCUMULATION) for f in losses):
            self.loss_is_scaled_for_ga = True
        own = bool(losses) and not own_loss.hands_over(losses[-1])  # else it ends in transformers' own, see `ExactLoss`
        if self.loss_is_scaled_for_ga is None and own and all(map(own_loss.ignores_items, losses)):
            self.loss_is_scaled_for_ga = False  # it never sees a count, so it is the mean of a micro-batch
        if self.loss_is_scaled_for_ga is None and own and not from_trl:
            self._tell_what_is_trusted(losses)
        if self.compute_loss_func is not None:
            self._loss_func, self.compute_loss_func = self.compute_loss_func, self._exact_loss_func

    def _tell_what_is_trusted(self, losses: list[Any]) -> None:
        """Warn of an own loss of which it cannot be read whether it divides by the step's count."""
        micro_batches = self.args.gradient_accumulation_steps
        if micro_batches == 1 or not self.model_accepts_loss_kwargs:
            return  # nothing is trusted
        counts = (own_loss.ITEMS, *own_loss.ACCUMULATION)
        divides = any(own_loss.divides_by(loss, *counts, handed_on=False) for loss in losses)
        may_divide = any(own_loss.divides_by(loss, *counts) or not own_loss.is_readable(loss) for loss in losses)
        if may_divide and not divides:
            logger.warning(
                "Whether %s divides by num_items_in_batch cannot be read from its source, so it is trusted to, as "
                "transformers does. If it returns the mean of a micro-batch, its gradients are %d times too large: set "
                "loss_is_scaled_for_ga = False in the class (True says that all is right).",
                getattr(losses[-1], "__qualname__", "compute_loss"),
                micro_batches,
            )

    def _gathered(self, numbers: Tensor) -> Tensor:
        gathered: Any = self.accelerator.gather(numbers.to(self.args.device)[None])
        return gathered.cpu()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        samples, items = super().get_batch_samples(*args, **kwargs)
        self._step_loss.begin(samples, micro_batches=self.args.gradient_accumulation_steps)
        return samples, items

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        self._in_step, self._asked = True, False
        self._divisor = self._later_divisor(num_items_in_batch)
        try:
            loss = super().training_step(model, inputs, num_items_in_batch, **kwargs)
        except (RuntimeError, ValueError) as error:
            if self._engine is None:
                raise
            if "does not require grad" in str(error):
                raise self._engine.no_gradient() from error
            if "did not return a loss" in str(error):
                raise DataError(
                    f"The batches hold no labels for the loss. {error} Name the column 'labels', or pass a "
                    f"compute_loss_func; train_dataset has {columns(self.train_dataset)}."
                ) from error
            raise
        finally:
            self._in_step = False
            if self._engine is not None:
                self._engine.weights_back()
            self._first_pass.begin({})  # lets go of the logits
        if self._engine is not None:
            self._engine.after_backward()
        self._step_loss.advance()
        if self._engine is not None and self._engine.term_plugins and not self._asked:
            raise MethodError(
                f"plugin {self._engine.term_plugins[0].name!r} adds a loss term, but {type(self).__name__} trained on "
                "a loss that never went through compute_loss. Let its training_step call super().training_step()."
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
        if not self._in_step:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch, **kwargs)
        if self._engine is None:
            self._first_pass.begin(inputs)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch, **kwargs)
        run = self._engine.run
        run.batch, run.first_example, run.copies = inputs, self._step_loss.first_example, 1
        more = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch, **kwargs}
        passes = self._engine.passes(inputs)
        if passes is None:
            loss, rest = self._pass(self._engine, model, inputs, Pass(), more)
        else:
            rest: tuple[Any, ...] = ()

            def one(engine: Engine, batch: Mapping[str, Any], how: Pass) -> Tensor:
                nonlocal rest
                loss, rest = self._pass(engine, model, dict(batch), how, more)
                return loss

            loss = passes.make(
                partial(one, self._engine),
                backward=lambda part: self.accelerator.backward(part / self._divisor),
                alone=lambda: self.accelerator.no_sync(model),
            )
        self._asked = True
        return (loss, *rest) if rest else loss

    def _pass(
        self, engine: Engine, model: nn.Module, inputs: dict[str, Any], how: Pass, more: Mapping[str, Any]
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """The weighted loss of one pass, with all terms, and what else the Trainer class returns with it."""
        engine.before_forward()
        self._first_pass.begin(inputs)
        self._step_loss.copies = how.copies
        result = super().compute_loss(model, inputs, **more)
        loss, rest = (result[0], tuple(result[1:])) if isinstance(result, tuple) else (result, ())
        if how.copies > 1 or how.weight != 1:
            loss = loss * (how.weight / how.copies)
        plugins, batch, parts = engine.term_plugins, self._first_pass.batch, self._step_loss.parts
        engine.run.batch = batch
        parts.begin(loss / self._divisor, number=self._step_loss.done)
        if plugins:
            terms = self._step_loss.terms(plugins, engine.run, batch, self._first_pass.output, weight=how.weight)
            engine.check_terms(parts, loss.device)
            for term in terms:
                loss = loss + term * self._divisor
        engine.after_forward()
        return loss, rest

    def _exact_loss_func(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        """The user's `compute_loss_func`. Where it gives a micro-batch's mean, its exact share of the step."""
        loss = self._loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        if not self._in_step or self._step_loss.totals is None:
            return loss
        mean = True  # nobody told it by what to divide
        if num_items_in_batch is not None:
            if self._mean_func is None and loss.detach().isfinite() and loss.detach() != 0:  # 0 and NaN tell nothing
                self._mean_func = own_loss.is_mean(self._loss_func, outputs, labels, num_items_in_batch, loss.device)
            mean = self._mean_func is not False
        batch = self._first_pass.batch
        return self._step_loss.share(loss / self._multiplied(num_items_in_batch), batch) if mean else loss

    def _multiplied(self, num_items_in_batch: Any) -> int:
        """What the Trainer multiplies a loss by, of which it believes that it was divided by all processes' items."""
        believes = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        across = self.args.average_tokens_across_devices and believes and num_items_in_batch is not None
        return self.accelerator.num_processes if across else 1

    def _bypassed(self, method: str) -> MethodError:
        """The error for a subclass of ours that replaced a method on which the plan depends."""
        owner = owners(type(self), method)[0].__name__
        return MethodError(
            f"{owner}.{method} never calls the one that it replaces, so the plan of this model would not run. Call "
            f"super().{method}(…) in it, or derive {owner} from transformers.Trainer and use with_plugins({owner})."
        )

    def _later_divisor(self, num_items_in_batch: Any) -> float:
        """What the Trainer will divide by after `compute_loss`: by the same rule as its own."""
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            scaled = (
                self.model_accepts_loss_kwargs and num_items_in_batch is not None
            ) or self.compute_loss_func is not None
        return 1.0 if scaled else float(self.current_gradient_accumulation_steps)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs.update(self._step_loss.drain())
            if self._engine is not None:
                logs.update(self._engine.run.logged)
                self._engine.run.logged.clear()
        super().log(logs, *args, **kwargs)


def owners(cls: type[Any], method: str) -> list[type[Any]]:
    """The classes that define `method` themselves, in the order of resolution, without ours."""
    return [base for base in cls.__mro__ if method in vars(base) and not base.__module__.startswith("peft_plus.")]
