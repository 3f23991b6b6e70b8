"""AutoFreeze."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from peft_plus import Param, Plugin, Run

from .sampled_elements import sampled


@dataclass(kw_only=True)
class AutoFreeze(Plugin):
    """Freeze the lower blocks once their gradients have stopped changing, for good.

    Δ_l = Σ over an interval of the gradients of block l, η_l = |‖Δ'_l‖₁ − ‖Δ_l‖₁| / ‖Δ'_l‖₁ against Δ' of the interval
    before. At the end of each interval from the second on, training starts at the lowest block with η_l ≥ the
    percentile of those that train; what lies below is frozen, the embeddings with it (Liu et al. 2021,
    arXiv:2102.01386, §3). Under LoRA and its like these are the gradients of the adapter's parameters.

    Args:
        percentile: N, in [0, 100]: of the blocks that train, about this share are below the threshold; 0 freezes
            nothing.
        interval_fraction: length of an interval, as a share of the run's optimizer steps, in (0, 0.5).
        interval_steps: the same in optimizer steps ≥ 1, in place of the fraction.
        sampled_elements: of how many elements of each tensor Δ is kept, ≥ 1; tensors with no more are kept whole.
    Raises:
        ValueError: a setting is out of its range, both lengths are given, or the run has no third interval.
    """

    name: ClassVar[str] = "autofreeze"
    source: ClassVar[str] = "Liu et al. 2021, arXiv:2102.01386, §3"
    needs: ClassVar[tuple[str, ...]] = ("layers",)
    conflicts: ClassVar[tuple[str, ...]] = ("lisa",)
    on_freeze: ClassVar[Literal["keep", "drop_state"]] = "drop_state"

    percentile: float = 50.0
    interval_fraction: float = 0.1
    interval_steps: int | None = None
    sampled_elements: int = 4096

    steps: int = field(init=False, default=0)
    """Finished steps of the run that this state is of."""
    lowest: int = field(init=False, default=0)
    """What lies below this depth is frozen."""
    sums: dict[str, Tensor] = field(init=False, default_factory=dict)
    """Parameter → the gradients of this interval so far, summed element by element."""
    before: dict[int, float] = field(init=False, default_factory=dict)
    """Depth → ‖Δ'‖₁."""

    def __post_init__(self) -> None:
        if not 0 <= self.percentile <= 100:
            raise ValueError(f"percentile={self.percentile}: give a number in [0, 100].")
        if not 0 < self.interval_fraction < 0.5:
            raise ValueError(f"interval_fraction={self.interval_fraction}: give a share of the run in (0, 0.5).")
        if self.interval_steps is not None:
            if self.interval_steps < 1:
                raise ValueError(f"interval_steps={self.interval_steps}: give a number of optimizer steps ≥ 1.")
            if self.interval_fraction != type(self).interval_fraction:
                raise ValueError("interval_fraction and interval_steps both say how long an interval is: give one.")
        if self.sampled_elements < 1:
            raise ValueError(f"sampled_elements={self.sampled_elements}: give a number of elements ≥ 1.")

    def may_train(self, run: Run, param: Param) -> bool:
        return param.depth >= self._lowest(run)

    def next_change(self, run: Run) -> int | None:
        interval = self._interval(run)
        if 0 < run.max_steps <= 2 * interval:
            most = (run.max_steps - 1) // 2
            raise ValueError(
                f"an interval is {interval} step{'s' if interval > 1 else ''} long, two are compared before anything "
                f"is frozen, and this run has {run.max_steps}. Give "
                + (f"interval_steps={most} at most, or a longer run." if most else "it three steps or more.")
            )
        blocks = _blocks(run)
        return None if not blocks or self._lowest(run) == blocks[-1] else NotImplemented

    def on_pre_optimizer_step(self, run: Run) -> None:
        self._begin(run.step)
        for param in run.params:
            gradient = run.gradient(param) if 1 <= param.depth <= run.num_blocks else None
            if gradient is not None:
                part = sampled(gradient, self.sampled_elements)
                if param.name in self.sums:
                    part += self.sums[param.name].to(part.device)
                self.sums[param.name] = part

    def on_step_end(self, run: Run) -> None:
        self._begin(run.step - 1)
        self.steps = run.step
        if run.step % self._interval(run):
            return
        norms, before = depth_norms(self.sums, run.params), self.before
        self.sums, self.before = {}, norms
        training = [depth for depth in _blocks(run) if depth >= self.lowest]
        if training and all(depth in norms and depth in before for depth in training):
            start = first_to_train({d: changed(before[d], norms[d]) for d in training}, percentile=self.percentile)
            if start > training[0]:
                self.lowest = start

    def _begin(self, step: int) -> None:
        """What an earlier run found out does not count in this one, of which `step` steps are finished."""
        if step < self.steps:
            self.steps, self.lowest, self.sums, self.before = step, 0, {}, {}

    def _lowest(self, run: Run) -> int:
        return self.lowest if run.step else 0  # before the first step the state may still be that of another run

    def _interval(self, run: Run) -> int:
        return self.interval_steps or max(1, round(run.max_steps * self.interval_fraction))


def depth_norms(sums: Mapping[str, Tensor], params: Sequence[Param]) -> dict[int, float]:
    """Depth → ‖Δ‖₁ over all its tensors.

    Args:
        sums: parameter → elements of its Δ, shape (n,). Where these are not all, they stand for the others.
        params: the parameters, with their shapes.
    """
    norms: dict[int, float] = {}
    for param in params:
        if param.name in sums:
            part = sums[param.name]
            norm = float(part.abs().sum()) * (math.prod(param.shape) / part.numel())
            norms[param.depth] = norms.get(param.depth, 0.0) + norm
    return norms


def changed(before: float, now: float) -> float:
    """η = |before − now| / before: how much a norm has changed, as a share of what it was; ≥ 0."""
    return abs(before - now) / max(before, 1e-30)


def first_to_train(scores: Mapping[int, float], *, percentile: float) -> int:
    """The lowest depth whose score reaches the percentile of all.

    Args:
        scores: depth → η, of the blocks that train.
        percentile: in [0, 100], linear between two scores.
    """
    limit = min(float(np.percentile(list(scores.values()), percentile)), max(scores.values()))
    return min(depth for depth, score in scores.items() if score >= limit)


def _blocks(run: Run) -> list[int]:
    """The blocks at which something may train, from the lowest up."""
    return sorted(depth for depth in run.depths if 1 <= depth <= run.num_blocks)
