"""EMA: an exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from peft_plus import Plugin, Run


@dataclass(kw_only=True)
class EMA(Plugin):
    """Evaluate, save and end with a moving average of the weights; train as without it.

    θ̄ ← βₜ θ̄ + (1 − βₜ) θ after each optimizer step, θ̄ = θ at first (Polyak & Juditsky 1992,
    doi:10.1137/0330046, for the idea of averaging). βₜ = min(decay, (1 + t) / (10 + t)) at step t with `warmup`, as
    TensorFlow's `ExponentialMovingAverage` does it, so that a short run's average forgets its start; else `decay`.

    Costs a pass over all that trains after each step, and a copy of it, at least in fp32. A model's running statistics
    (batch norm) stay those of the weights that train.

    Args:
        decay: β in [0, 1); 0 gives the last weights, bit for bit.
        warmup: whether βₜ grows toward `decay`, from 2/11 at the first step.
    Raises:
        ValueError: `decay` is out of its range.
    """

    name: ClassVar[str] = "ema"
    source: ClassVar[str] = "Tarvainen & Valpola 2017, arXiv:1703.01780; Polyak & Juditsky 1992, doi:10.1137/0330046"

    decay: float = 0.99
    warmup: bool = True

    average: dict[str, Tensor] = field(init=False, default_factory=dict)
    """Parameter → θ̄."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay}: give β in [0, 1).")

    def on_stage_begin(self, run: Run) -> None:
        self.average = {
            param.name: weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
            for param in (run.params if self.decay > 0 else ())
            for weight in (run.weight(param),)
        }

    def on_step_end(self, run: Run) -> None:
        if self.decay == 0:
            return
        weights = [run.weight(param) for param in run.params]
        names = [param.name for param in run.params]
        averages = [self.average[name].to(weight.device) for name, weight in zip(names, weights, strict=True)]
        follow(averages, weights, decay=decay_at(run.step, decay=self.decay, warmup=self.warmup))
        self.average = dict(zip(names, averages, strict=True))

    def eval_weights(self, run: Run) -> Mapping[str, Tensor] | None:
        return self.average or None


def decay_at(step: int, *, decay: float, warmup: bool) -> float:
    """βₜ = min(decay, (1 + t) / (10 + t)), or `decay` without warm-up.

    Args:
        step: t ≥ 1, finished optimizer steps.
        decay: in [0, 1).
    """
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


@torch.no_grad()
def follow(averages: list[Tensor], weights: list[Tensor], *, decay: float) -> None:
    """θ̄ ← β θ̄ + (1 − β) θ, in place, for all tensors of one dtype and device at once.

    Args:
        averages, weights: equal lengths and shapes; dtypes may differ.
        decay: β.
    """
    groups: dict[object, tuple[list[Tensor], list[Tensor]]] = {}
    for average, weight in zip(averages, weights, strict=True):
        mine, theirs = groups.setdefault((average.dtype, average.device), ([], []))
        mine.append(average)
        theirs.append(weight.to(average.dtype))
    for mine, theirs in groups.values():
        torch._foreach_lerp_(mine, theirs, 1 - decay)
