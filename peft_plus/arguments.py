"""What a Trainer is given for a model with a plan: found, checked and completed before the Trainer is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import TrainingArguments

from .compose import Plan
from .errors import MethodError

_ROWS_LOOKED_AT = 64


def plan_of(model: Any) -> Plan | None:
    """The plan that hangs on a model itself (not on one inside it), or None."""
    plan = vars(model).get("peft_plus") if isinstance(model, nn.Module) else None
    return plan if isinstance(plan, Plan) else None


def plan_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Plan | None:
    """The plan of the model among a Trainer's arguments, or None."""
    model = kwargs.get("model", args[0] if args else None)
    inner = getattr(model, "_orig_mod", None)
    if plan_of(inner) is not None:
        raise MethodError(
            "The model was wrapped by torch.compile, which hides its plan. Give the Trainer the model itself, and "
            "compile with TrainingArguments(torch_compile=True)."
        )
    return plan_of(model)


def find_argument(kind: type[Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The first argument of that type, or None: Trainer classes differ in where they take it."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, kind)), None)


def check_arguments(plan: Plan, args: TrainingArguments | None) -> None:
    """Refuse what could only fail, or be wrong, after the run has begun; set what the plan needs from DDP."""
    if args is None:
        return
    checkpointing = getattr(args, "activation_checkpointing", False) or getattr(args, "gradient_checkpointing", False)
    if checkpointing and plan.tuner == "prefix_tuning":
        raise MethodError("prefix_tuning does not work with gradient checkpointing (PEFT's limit): drop one of them.")
    if args.n_gpu > 1 and plan.plugins:
        raise MethodError("nn.DataParallel cannot run plugins: start the script with `accelerate launch` instead.")
    if args.ddp_find_unused_parameters is None and any("may_train" in p.hooks() for p in plan.plugins):
        # A frozen parameter gets no gradient, and DDP would wait for it for ever.
        args.ddp_find_unused_parameters = True


def default_collator(plan: Plan, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Without a collator of the user's own, take the task's, with the tokenizer that preprocessed the data.

    Returns: the collator, or None where the Trainer's own default serves.
    Raises:
        MethodError: no tokenizer is known, and the rows differ in length, so nothing could batch them.
    """
    if len(args) > 2 or kwargs.get("data_collator") is not None:
        return None
    tokenizer = kwargs.get("processing_class") or plan.task.tokenizer
    if tokenizer is not None and plan.task.name:
        return plan.task.collator(tokenizer, model)
    if tokenizer is None and _ragged(kwargs.get("train_dataset")):
        raise MethodError(
            "The rows of train_dataset differ in length and must be padded, but with which token is unknown: "
            "this model's task did not tokenise them. Pass processing_class=tokenizer, or a data_collator."
        )
    return None


def _ragged(dataset: Any) -> bool:
    """Whether the first rows of a dataset, where it can be looked into, have token ids of different length."""
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        return False
    rows = [dataset[i] for i in range(min(len(dataset), _ROWS_LOOKED_AT))]
    lengths = {len(row["input_ids"]) for row in rows if isinstance(row, Mapping) and "input_ids" in row}
    return len(lengths) > 1
