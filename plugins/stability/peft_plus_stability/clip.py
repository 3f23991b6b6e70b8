"""Clipping gradients: by a percentile of their norms so far, by a fixed norm, or element by element."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from peft_plus import Param, Plugin, Run, Stage


@dataclass(kw_only=True)
class Clip(Plugin):
    """Keep a single batch from moving the weights far.

    "percentile" is AutoClip (Seetharaman et al. 2020, arXiv:2007.14469): g ← g · min(1, η / ‖g‖), η being the
    `percentile`-th percentile of the norms of all steps so far, this one among them, interpolated linearly. "norm": the
    same with η = `threshold`. "value": each element into [−threshold, threshold]. ‖·‖ runs over all that has a
    gradient, before any plugin edits it. A gradient within the limit stays as it is, bit for bit.

    It takes the place of the Trainer's `max_grad_norm`, which it sets to 0: that clips first, so that no larger norm
    would ever be seen here. In a loop of your own, leave `clip_grad_norm_` out.

    Args:
        by: "percentile", "norm" or "value".
        percentile: p in (0, 100]; only for "percentile".
        threshold: η > 0, in units of the gradient; only for "norm" and "value".
        window: over how many of the last norms the percentile is taken, ≥ 1; None for all, as in the paper.
    Raises:
        ValueError: a setting is out of its range, or goes with another `by`.
    """

    name: ClassVar[str] = "clip"
    source: ClassVar[str] = "Seetharaman et al. 2020, arXiv:2007.14469"

    by: Literal["percentile", "norm", "value"] = "percentile"
    percentile: float = 10.0
    threshold: float = 1.0
    window: int | None = None

    norms: Tensor = field(init=False, default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    """Of the steps so far, (steps,); without those that were 0, which say nothing about what is too large."""
    factor: float = field(init=False, default=1.0)
    """By what the gradients of the step at work are multiplied."""

    def __post_init__(self) -> None:
        if not 0 < self.percentile <= 100:
            raise ValueError(f"percentile={self.percentile}: give p in (0, 100].")
        if not 0 < self.threshold < math.inf:
            raise ValueError(f"threshold={self.threshold}: give a size > 0.")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window}: give a number of steps ≥ 1, or None for all.")
        others = ("threshold",) if self.by == "percentile" else ("percentile", "window")
        for name in others:
            if getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"{name}={getattr(self, name)} does not go with by={self.by!r}.")

    def plan_stages(self, stages: Sequence[Stage]) -> Sequence[Stage]:
        return [replace(stage, args={**stage.args, "max_grad_norm": 0.0}) for stage in stages]

    def on_stage_begin(self, run: Run) -> None:
        self.norms, self.factor = torch.zeros(0, dtype=torch.float64), 1.0

    def on_pre_optimizer_step(self, run: Run) -> None:
        if self.by == "value":
            return
        norm = total_norm([gradient for param in run.params if (gradient := run.gradient(param)) is not None])
        limit = self.threshold
        if self.by == "percentile" and norm > 0:
            self.norms = torch.cat([self.norms, torch.tensor([norm], dtype=torch.float64)])
            self.norms = self.norms[-self.window :] if self.window else self.norms
            limit = float(torch.quantile(self.norms, self.percentile / 100))
        self.factor = limit / norm if norm > limit else 1.0
        if self.by == "percentile" and norm > 0:
            run.log(clip_threshold=limit)

    def edit_gradient(self, run: Run, param: Param, gradient: Tensor) -> Tensor:
        if self.by == "value":
            return gradient.clamp(-self.threshold, self.threshold)
        return gradient if self.factor == 1 else gradient * self.factor


def total_norm(gradients: Sequence[Tensor]) -> float:
    """√Σ‖g‖² over all gradients, in fp32 and the sum in double precision."""
    return math.sqrt(sum(float(gradient.float().norm()) ** 2 for gradient in gradients))
