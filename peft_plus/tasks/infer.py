"""The task of a loaded model, told by its class."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..layers import transformers_model
from .base import Task
from .generic import GenericTask


def infer_task(model: nn.Module) -> Task:
    """The task whose AutoModel class builds this model's class; a `GenericTask` where none does.

    Args:
        model: a transformers model, a PeftModel over one, or any module.
    """
    from ..tuning import prepends_tokens

    task = _told_by(transformers_model(model))
    task.virtual_tokens = prepends_tokens(model)
    return task


def _told_by(base: Any) -> Task:
    from ..registry import entries, load

    config = getattr(base, "config", None)
    # Masked last: BART is one class for both MASKED_LM and SEQ_2_SEQ_LM, and the second is what it generates with.
    known = sorted(entries("task").values(), key=lambda entry: entry.name == "MASKED_LM") if config is not None else []
    for entry in known:
        if entry.distribution != "peft-plus":
            continue  # a plugin that nobody named is never imported
        task = load(entry).from_config(config)
        if builds(task, base):
            return task
    return GenericTask(shifts_labels=has_causal_loss(base))


def builds(task: Task, model: Any) -> bool:
    """Whether the AutoModel class that `task` picks builds models of exactly this class."""
    mapping = getattr(task.auto_class(model.config), "_model_mapping", {})
    if type(model.config) not in mapping:
        return False
    built = mapping[type(model.config)]
    return type(model) in (built if isinstance(built, tuple) else (built,))


def has_causal_loss(base: nn.Module) -> bool:
    """Whether the model's own loss compares logits[t] with labels[t + 1] (transformers' ForCausalLMLoss)."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    encoder_decoder = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    return not encoder_decoder and LOSS_MAPPING.get(getattr(base, "loss_type", None) or "") is ForCausalLMLoss
