"""What the tests of bad inputs share: small runs, and a close look at what an error says and what it left behind."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback, default_data_collator

import peft_plus
from peft_plus import get_model

from .models import batch, rows_of, tiny
from .training import quiet

ROWS = 24
_TRAINERS = {
    "train_dataset",
    "eval_dataset",
    "data_collator",
    "compute_metrics",
    "compute_loss_func",
    "callbacks",
    "optimizers",
    "optimizer_cls_and_kwargs",
}


def rows(name: str = "bert", task: str | None = None, count: int = ROWS) -> list[dict[str, Tensor]]:
    """Good rows, to be spoilt."""
    return rows_of(batch(name, task, rows=count))


def spoilt(row: int, column: str, value: Any, name: str = "bert", task: str | None = None) -> list[dict[str, Tensor]]:
    """Good rows but for one value, which stands in one row or in one place of it."""
    made = rows(name, task)
    tensor = made[row][column].clone()
    if tensor.dim():
        tensor.view(-1)[1] = value
    else:
        tensor = torch.tensor(value)
    made[row][column] = tensor
    return made


def built(method: Any = "lora", name: str = "bert", task: str | None = None) -> Any:
    """Two of the same call have equal weights, adapters too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_model(tiny(name, task), method)


def trainer(model: Any, folder: Path, data: Any = None, *, kind: Any = peft_plus.Trainer, **given: Any) -> Any:
    """A Trainer over 6 steps of 4 rows, in their order; `given` is for it or for its arguments."""
    own = {name: given.pop(name) for name in _TRAINERS & given.keys()}
    own.setdefault("data_collator", default_data_collator)
    settings: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "optim": "sgd",
        "learning_rate": 0.1,
    }
    plan = getattr(model, "peft_plus", None)
    if plan is None or not any("sampler" in plugin.hooks() for plugin in plan.plugins):
        settings["train_sampling_strategy"] = "sequential"
    args = quiet(folder, **{**settings, "logging_steps": 1, **given})
    return kind(model, args, train_dataset=rows() if data is None else data, **own)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def same(model: nn.Module, before: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())


def after(steps: int, model: Any, folder: Path, data: Any = None, **given: Any) -> dict[str, Tensor]:
    """The weights after so many steps of the same run without anything bad in it; `model` is a copy of the other."""
    run = trainer(model, folder / "good", data, **given)
    run.add_callback(_StopAt(steps))
    run.train()
    return weights(model)


class Watched:
    """Counts the forward passes of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.passes = 0
        model.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.passes += 1


def refused(run: Callable[[], Any], error: type[Exception], *says: str) -> str:
    """Run it; the error is exactly of that type, and its message holds each of the texts. Returns the message."""
    with pytest.raises(error) as caught:
        run()
    assert type(caught.value) is error, caught.value
    message = " ".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    for words in says:
        assert re.search(words, message), f"{words!r} is not in: {message}"
    return message


def stopped(folder: Path) -> dict[str, Tensor]:
    """The adapter that a run left behind when an error ended it."""
    return load_file(folder / "stopped" / "adapter_model.safetensors")


def holds(saved: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    """Whether what was saved are these weights, bit for bit."""
    named = {name.replace(".default", "").replace(".modules_to_save", ""): tensor for name, tensor in wanted.items()}
    return bool(saved) and all(torch.equal(tensor, named[name]) for name, tensor in saved.items())


def free(model: Any) -> bool:
    """Whether every parameter of the plan may train, as `get_model` left the model."""
    tensors = dict(model.named_parameters())
    return all(tensors[name].requires_grad for name in model.peft_plus.params)


class _StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step
