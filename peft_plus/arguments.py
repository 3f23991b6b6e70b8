"""What a Trainer is given for a model with a plan: found, checked and completed before the Trainer is built."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from peft import PeftConfig
from torch import nn
from transformers import TrainingArguments

from .compose import Plan, who
from .distributed import check_batches, check_checkpointing, check_ddp
from .errors import MethodError
from .sampling import check_strategy

_ROWS_LOOKED_AT = 64
_TRL_OBJECTIVES = (
    ("SFT", "supervised"),
    ("GKD", "distillation"),
    ("GOLD", "distillation"),
    ("Distillation", "distillation"),
    ("OPD", "distillation"),
    ("SDFT", "distillation"),
    ("SDPO", "distillation"),
    ("Reward", "reward"),
    ("PRM", "reward"),
    ("GRPO", "reinforcement"),
    ("RLOO", "reinforcement"),
    ("GMPO", "reinforcement"),
    ("A2PO", "reinforcement"),
    ("PPO", "reinforcement"),
)
"""Part of a TRL class's name → what it optimises."""


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
    if plan_of(getattr(model, "module", None)) is not None:
        raise MethodError(
            f"The model was wrapped by {type(model).__name__}, which hides its plan. Give the model itself: under "
            "`accelerate launch` it is wrapped for several processes."
        )
    return plan_of(model)


def find_argument(kind: type[Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The first argument of that type, or None: Trainer classes differ in where they take it."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, kind)), None)


def check_adapter(plan: Plan, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse a second tuner, which TRL's trainers would put around the model and its plan."""
    config = find_argument(PeftConfig, args, kwargs)
    if config is not None:
        name = type(config).__name__
        raise MethodError(
            f"peft_config={name}(…) came with a model that has its tuner already ({plan.tuner!r}). Leave peft_config "
            f"out, and give the config to get_model: method=[{name}(…)]."
        )


def check_arguments(plan: Plan, args: TrainingArguments | None) -> None:
    """Refuse what could only fail, or be wrong, after the run has begun; set what the plan needs from DDP."""
    if args is None:
        return
    checkpointing = getattr(args, "activation_checkpointing", False) or getattr(args, "gradient_checkpointing", False)
    if checkpointing and plan.tuner == "prefix_tuning":
        raise MethodError("prefix_tuning does not work with gradient checkpointing (PEFT's limit): drop one of them.")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and args.world_size == 1:
        raise MethodError(
            f"{launched} processes were launched, but each would train alone, into one output_dir: torch finds no GPU "
            "for them. On CPUs set ACCELERATE_USE_CPU=1 before `accelerate launch`; with GPUs see why "
            "torch.cuda.is_available() is False."
        )
    if args.n_gpu > 1 and plan.plugins:
        raise MethodError("nn.DataParallel cannot run plugins: start the script with `accelerate launch` instead.")
    check_strategy(plan, args)
    check_ddp(plan, args)
    check_checkpointing(plan, args)
    check_batches(args)


def check_objective(plan: Plan, trainer_class: type[Any]) -> None:
    """Refuse a loss term that was written for another objective than this Trainer's.

    Preference trainers pair their rows, reinforcement and distillation sample new ones: no labels to take a term over.
    """
    objective = objective_of(trainer_class)
    for plugin in plan.plugins:
        if "loss_terms" in plugin.hooks() and objective not in plugin.objectives:
            raise MethodError(
                f"{who(plugin, plan.origins)} adds a loss term for {' or '.join(plugin.objectives)} training, and "
                f"{trainer_class.__name__} does {objective} training. Drop the plugin, or use another Trainer."
            )


def objective_of(trainer_class: type[Any]) -> str:
    """`supervised`, `preference`, `reward`, `reinforcement` or `distillation`: what a Trainer class optimises."""
    for cls in trainer_class.__mro__:
        if not cls.__module__.startswith("trl."):
            continue
        for sign, objective in _TRL_OBJECTIVES:
            if sign in cls.__name__:
                return objective
        return "preference"  # one of TRL's many others (DPO, KTO, CPO, ORPO, …)
    return "supervised"


def default_collator(plan: Plan, model: Any, tokenizer: Any, dataset: Any) -> Any:
    """For a Trainer without a collator: the task's, with the tokenizer that preprocessed the data.

    Args:
        tokenizer: the Trainer's `processing_class`, or None.
        dataset: its training data, or None.
    Returns: the collator, or None where the Trainer's own default serves.
    Raises:
        MethodError: no tokenizer is known, and the rows differ in length, so nothing could batch them.
    """
    tokenizer = tokenizer or plan.task.tokenizer
    if tokenizer is not None and plan.task.name:
        return plan.task.collator(tokenizer, model)
    if tokenizer is None and _ragged(dataset):
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
