"""Learning rates as they act: update ÷ gradient under plain SGD, by depth, in every loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainerCallback, default_data_collator

import peft_plus

from . import models
from .training import quiet

Rates = list[dict[int, float]]


def multipliers(model: Any, lr: float) -> Callable[[], dict[int, float]]:
    """Call it between backward and update of plain SGD, and what it returns after the update.

    Returns: depth → what the update was in units of −lr · gradient, of all tensors together that have a gradient;
        checked to be the same for each of them.
    """
    params = model.peft_plus.params
    tensors = {n: t for n, t in model.named_parameters() if n in params and t.grad is not None and bool(t.grad.any())}
    before = {n: (t.detach().clone(), t.grad.clone()) for n, t in tensors.items() if t.grad is not None}

    def measure() -> dict[int, float]:
        found: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for name, (weight, gradient) in before.items():
            update = (tensors[name].detach().double() - weight.double()).flatten()
            found.setdefault(params[name].depth, []).append((update, -lr * gradient.double().flatten()))
        rates: dict[int, float] = {}
        for depth, pairs in found.items():
            update, unit = (torch.cat(parts) for parts in zip(*pairs, strict=True))
            rates[depth] = float((update @ unit) / (unit @ unit))
        return rates

    return measure


class Multipliers(TrainerCallback):
    """Keeps them in `rates` for each update of a Trainer."""

    def __init__(self, lr: float) -> None:
        self.rates: Rates = []
        self._lr = lr

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self._measure = multipliers(model, self._lr)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.rates.append(self._measure())


def rows_of(number: int) -> list[dict[str, Tensor]]:
    return models.rows_of(models.batch("bert", rows=number))


def in_trainer(
    model: nn.Module,
    folder: Any,
    *callbacks: TrainerCallback,
    steps: int,
    rows: int = 32,
    lr: float = 0.1,
    **settings: Any,
) -> Rates:
    """Train with the Trainer: 2 micro-batches of 4 rows to a step, so an epoch of 32 rows has 4 steps."""
    seen = Multipliers(lr)
    arguments = {
        "max_steps": steps,
        "learning_rate": lr,
        "optim": "sgd",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.0,
    }
    peft_plus.Trainer(
        model,
        quiet(folder, **(arguments | settings)),
        train_dataset=rows_of(rows),
        data_collator=default_data_collator,
        callbacks=[seen, *callbacks],
    ).train()
    return seen.rates


def in_session(model: nn.Module, *, steps: int, rows: int = 32, lr: float = 0.1) -> Rates:
    """The same in a bare loop."""
    rates: Rates = []
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    session = peft_plus.Session(model, accelerator, max_steps=steps)
    optimizer = session.optimizer(torch.optim.SGD, lr=lr)
    loader = session.loader(rows_of(rows), batch_size=4, collate_fn=default_data_collator)
    for micro_batch in session.batches(loader):
        with accelerator.accumulate(session.model):
            accelerator.backward(session.loss(micro_batch))
            measure = multipliers(model, lr)
            optimizer.step()
            if accelerator.sync_gradients:
                rates.append(measure())
            optimizer.zero_grad()
    return rates
