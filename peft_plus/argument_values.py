"""TrainingArguments with which nothing would be learned, or everything lost: refused before the data are touched."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from transformers.trainer_utils import SaveStrategy

from .errors import MethodError

_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("per_device_train_batch_size", lambda v: v >= 1, "a number of rows ≥ 1"),
    ("per_device_eval_batch_size", lambda v: v >= 1, "a number of rows ≥ 1"),
    ("gradient_accumulation_steps", lambda v: v >= 1, "a number of micro-batches ≥ 1"),
    ("max_steps", lambda v: v != 0, "a number of optimizer steps ≥ 1, or leave it out and set num_train_epochs"),
    ("max_grad_norm", lambda v: v is None or v >= 0, "a norm > 0, or 0 for no clipping"),
    ("weight_decay", lambda v: math.isfinite(v) and v >= 0, "a finite number ≥ 0"),
    ("label_smoothing_factor", lambda v: 0 <= v < 1, "a number from 0 to below 1"),
)
_ADAM: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("adam_beta1", lambda v: 0 <= v < 1, "a number from 0 to below 1"),
    ("adam_beta2", lambda v: 0 <= v < 1, "a number from 0 to below 1"),
    # A gradient of exactly 0, as LoRA's A has it in its first step, would be divided by 0.
    ("adam_epsilon", lambda v: math.isfinite(v) and v > 0, "a finite number > 0, e.g. 1e-8"),
)


def check_values(args: Any, *, own_optimizer: bool) -> None:
    """Refuse numbers that cannot train.

    Args:
        args: TrainingArguments; None for transformers' own.
        own_optimizer: whether the learning rate is not taken from them.
    Raises:
        MethodError: names the argument, its value, and what it should be.
    """
    if args is None:
        return
    adam = not own_optimizer and "adam" in str(getattr(args.optim, "value", args.optim))
    for name, fits, expected in (*_RULES, *(_ADAM if adam else ())):
        value = getattr(args, name, None)
        if value is not None and not _holds(fits, value):
            raise MethodError(f"TrainingArguments({name}={value!r}): give {expected}.")
    rate = args.learning_rate
    if not own_optimizer and not _holds(lambda v: math.isfinite(v) and v > 0, rate):
        raise MethodError(
            f"TrainingArguments(learning_rate={rate!r}): nothing would be learned, or everything ruined. Give a finite "
            "number > 0, e.g. 1e-4 for adapters, 2e-5 for whole models."
        )
    if args.max_steps < 0 and not _holds(lambda v: math.isfinite(v) and v > 0, args.num_train_epochs):
        raise MethodError(
            f"TrainingArguments(num_train_epochs={args.num_train_epochs!r}): not a single step would be made. Give a "
            "number > 0, or max_steps."
        )


def _holds(fits: Callable[[Any], bool], value: Any) -> bool:
    """Whether a rule holds; it does not for text, as a file of settings may bring it."""
    try:
        return fits(value)
    except TypeError:
        return False


def check_best_metric(
    args: Any, *, eval_sets: list[str] | None, computes: bool, stops_early: bool, known: bool = True
) -> None:
    """Refuse a metric that no evaluation will ever return.

    What the user's own `compute_metrics` returns is known at the first evaluation only.

    Args:
        args: TrainingArguments.
        eval_sets: names of several evaluation sets; [] for a single one, None where there is none.
        computes: whether there is a `compute_metrics`.
        stops_early: whether an `EarlyStoppingCallback` runs.
        known: whether the Trainer class evaluates as transformers does.
    Raises:
        MethodError: says which argument to set or change.
    """
    wanted = args.metric_for_best_model
    picks_best = args.load_best_model_at_end or args.save_strategy == SaveStrategy.BEST
    evaluates = args.eval_strategy != "no"
    if stops_early and not evaluates:
        raise MethodError(
            "EarlyStoppingCallback stops by an evaluation, and eval_strategy='no' makes none. Set eval_strategy="
            "'steps' and eval_steps, and give an eval_dataset."
        )
    if stops_early and wanted is None:
        raise MethodError(
            "EarlyStoppingCallback needs to know which metric to watch: set metric_for_best_model, e.g. 'eval_loss'."
        )
    if picks_best and not evaluates:
        raise MethodError(
            "The best model is to be kept (load_best_model_at_end, or save_strategy='best'), but eval_strategy='no' "
            "never evaluates. Set eval_strategy='steps' and eval_steps, and give an eval_dataset."
        )
    if wanted is None or eval_sets is None or not evaluates or not known:
        return
    name = wanted.removeprefix("eval_")
    mine = next((s for s in eval_sets if name.startswith(f"{s}_")), None)
    if eval_sets and mine is None:
        raise MethodError(
            f"metric_for_best_model={wanted!r}: eval_dataset holds several sets, whose metrics carry their names. "
            f"Choose one, e.g. 'eval_{eval_sets[0]}_{name}'."
        )
    plain = name.removeprefix(f"{mine}_") if mine else name
    if not computes and plain not in _ALWAYS:
        raise MethodError(
            f"metric_for_best_model={wanted!r} will never come: without compute_metrics an evaluation returns only "
            f"{', '.join(sorted(_ALWAYS))}. Pass compute_metrics=model.peft_plus.task.compute_metrics or your own, or "
            "choose 'loss'."
        )


_ALWAYS = frozenset({"loss", "runtime", "samples_per_second", "steps_per_second"})
