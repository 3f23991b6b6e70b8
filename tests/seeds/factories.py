"""Factories of tiny runs, at the top level of a module, so that other processes find them."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainerCallback, default_data_collator

import peft_plus
from peft_plus import Seeds, get_model
from tests.models import NUM_LABELS, batch, tiny
from tests.training import quiet


def rows(number: int = 16) -> Dataset:
    """Rows whose first token tells the label."""
    data = batch("bert", rows=number)
    data["labels"] = data["input_ids"][:, 1] % NUM_LABELS
    return Dataset.from_dict({name: value.tolist() for name, value in data.items()}).with_format("torch")


def accuracy(prediction: Any) -> dict[str, float]:
    logits, labels = prediction.predictions, prediction.label_ids
    return {"accuracy": float(np.mean(np.argmax(logits, -1) == labels))}


class Watch(TrainerCallback):
    """Keeps the first weights and the batches that come by."""

    def __init__(self) -> None:
        self.start: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.start = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def made(
    seeds: Seeds, *, method: Any = "lora", kind: Any = peft_plus.Trainer, model_init: Any = None, **settings: Any
) -> Any:
    """A Trainer over 6 steps."""
    model = None if model_init else get_model(tiny("bert", hidden_dropout_prob=0.1), method)
    args = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_strategy": "no"}
    return kind(
        model,
        quiet(settings.pop("folder", "unused"), **{**args, **settings}),
        model_init=model_init,
        train_dataset=rows(),
        eval_dataset=rows(8),
        data_collator=default_data_collator,
        compute_metrics=accuracy,
    )


def plain(seeds: Seeds) -> Any:
    return made(seeds)


class BreaksOnce(TrainerCallback):
    """Ends a run by an error at the beginning of a step, the first time."""

    def __init__(self, step: int, error: type[BaseException] = RuntimeError) -> None:
        self._step, self._error, self.broken = step, error, False

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._step and not self.broken:
            self.broken = True
            raise self._error("no luck")


def fails_once(seeds: Seeds) -> Any:
    """Run 1 fails until a file lies in the shared folder."""
    if seeds.number == 1 and not (seeds.shared / "mended").exists():
        raise ValueError("no luck")
    return made(seeds)


def dies_once(seeds: Seeds) -> Any:
    """The process of run 1 is killed, the first time."""
    mark = Path(seeds.shared) / "died"
    if seeds.number == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return made(seeds)


def dies_always(seeds: Seeds) -> Any:
    """The process of run 1 is killed each time."""
    if seeds.number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return made(seeds)
