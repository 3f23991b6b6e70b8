"""Surgical fine-tuning: auto-RGN and auto-SNR."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from peft_plus import Param, Plugin, Run

from .sampled_elements import sampled

logger = logging.getLogger(__name__)

EPSILON = 1e-8


@dataclass(kw_only=True)
class Surgical(Plugin):
    """Measure which depths the data want to change, and let these learn fastest.

    For `measure_steps` optimizer steps every rate is 0, so that the weights stand still while gradients are measured;
    then each depth gets a multiplier of the base rate until the next measurement (Lee et al. 2023, arXiv:2210.11466,
    §5). "rgn": the relative gradient norm ‖g‖ / (‖θ‖ + 1e-8), a mean over the steps, ÷ that of the depth where it is
    largest. "snr": 1 where the signal-to-noise ratio, the mean over the elements of mean(g)² / (var(g) + 1e-8) over the
    steps, reaches `threshold` times that of the depth where it is largest, elsewhere 0. g and θ are all that trains at
    a depth; in the paper's code it is each tensor for itself, for which LoRA's B = 0 would be infinitely relative. A
    freshly drawn head, which the paper's models do not have, would dwarf all else: it keeps the base rate.

    Args:
        criterion: "rgn" or "snr".
        every: when it is measured again: "epoch", every so many optimizer steps, or "once".
        measure_steps: over how many optimizer steps it is measured, ≥ 1, for "snr" ≥ 2.
        threshold: in [0, 1], only for "snr".
        sampled_elements: from how many elements of each tensor the SNR is taken, ≥ 1; all of tensors with no more.
        measure_head: whether what lies above the last block is measured with the rest; if not, it keeps the base rate.
            None: only where the task has a pretrained head.
    Raises:
        ValueError: a setting is out of its range or goes only with "snr"; measuring takes the whole interval or the
            whole run; `every` is "epoch" and the data has no length; all weights of a depth are 0, so that they have
            no relative norm.
    """

    name: ClassVar[str] = "surgical"
    source: ClassVar[str] = "Lee et al. 2023, arXiv:2210.11466, §5"
    needs: ClassVar[tuple[str, ...]] = ("layers",)
    conflicts: ClassVar[tuple[str, ...]] = ("lisa", "chain_thaw")

    criterion: Literal["rgn", "snr"] = "rgn"
    every: Literal["epoch", "once"] | int = "epoch"
    measure_steps: int = 5
    threshold: float = 0.95
    sampled_elements: int = 4096
    measure_head: bool | None = None

    steps: int = field(init=False, default=0)
    """Finished steps of the run that this state is of."""
    norms: dict[int, list[float]] = field(init=False, default_factory=dict)
    """Depth → the relative gradient norms measured so far."""
    gradients: dict[str, list[Tensor]] = field(init=False, default_factory=dict)
    """Parameter → elements of the gradients measured so far."""
    rates: dict[int, float] = field(init=False, default_factory=dict)
    """Depth → multiplier."""

    def __post_init__(self) -> None:
        least = 2 if self.criterion == "snr" else 1
        if self.measure_steps < least:
            raise ValueError(f"measure_steps={self.measure_steps}: {self.criterion!r} needs at least {least}.")
        if isinstance(self.every, int) and self.every <= self.measure_steps:
            raise ValueError(
                f"every={self.every}: measuring takes {self.measure_steps} steps, so nothing would train. Give a "
                "larger number, or 'epoch' or 'once'."
            )
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold}: give a share of the largest SNR in [0, 1].")
        if self.sampled_elements < 1:
            raise ValueError(f"sampled_elements={self.sampled_elements}: give a number of elements ≥ 1.")
        for setting in ("threshold", "sampled_elements"):
            if self.criterion != "snr" and getattr(self, setting) != getattr(type(self), setting):
                raise ValueError(f"{setting}={getattr(self, setting)} goes only with criterion='snr'.")

    def on_build(self, run: Run) -> None:
        if self.criterion == "rgn" and not run.rehearsal:
            norms: dict[int, float] = {}
            for param in self._measured(run):
                norms[param.depth] = norms.get(param.depth, 0.0) + float(run.weight(param).norm())
            zero = sorted(depth for depth, norm in norms.items() if norm == 0)
            if zero:
                raise ValueError(
                    f"all that trains at depth {', '.join(map(str, zero))} starts at 0, so it has no relative gradient "
                    "norm. Use criterion='snr', or a tuner that does not start at 0."
                )

    def on_pre_optimizer_step(self, run: Run) -> None:
        self._begin(run.step)
        if not self._measures(run, run.step):
            return
        if self.criterion == "rgn":
            for depth, norm in relative_norms(run, self._measured(run)).items():
                self.norms.setdefault(depth, []).append(norm)
            return
        for param in self._measured(run):
            gradient = run.gradient(param)
            if gradient is not None:
                self.gradients.setdefault(param.name, []).append(sampled(gradient, self.sampled_elements))

    def on_step_end(self, run: Run) -> None:
        self._begin(run.step - 1)
        self.steps = run.step
        if self._measures(run, run.step - 1) and not self._measures(run, run.step):
            self._decide(run)

    def lr_scale(self, run: Run, param: Param) -> float:
        return 0.0 if self._measures(run, run.step) else self.rates.get(param.depth, 1.0)

    def lr_key(self, param: Param) -> tuple[Any, ...]:
        return (param.depth,)

    def _begin(self, step: int) -> None:
        """What an earlier run found out does not count in this one, of which `step` steps are finished."""
        if step < self.steps:
            self.steps, self.norms, self.gradients, self.rates = step, {}, {}, {}

    def _measured(self, run: Run) -> list[Param]:
        head = not run.task.new_head if self.measure_head is None else self.measure_head
        return [param for param in run.params if head or param.depth <= run.num_blocks]

    def _measures(self, run: Run, step: int) -> bool:
        """Whether the step after `step` finished ones is one in which gradients are measured."""
        interval = self._interval(run)
        place = step % interval if interval else step
        start = step - place
        return place < self.measure_steps and (start == 0 or start + self.measure_steps < run.max_steps)

    def _interval(self, run: Run) -> int:
        """Optimizer steps from one measurement to the next; 0 for one alone."""
        if run.max_steps <= self.measure_steps:
            raise ValueError(
                f"measure_steps={self.measure_steps}: this run has {run.max_steps} steps, so nothing would train. Give "
                "fewer, or a longer run."
            )
        if self.every == "once":
            return 0
        if isinstance(self.every, int):
            return self.every
        if not run.steps_per_epoch:
            raise ValueError("every='epoch' needs data with a length; give every=<optimizer steps> or every='once'.")
        if run.steps_per_epoch <= self.measure_steps:
            raise ValueError(
                f"measure_steps={self.measure_steps}: an epoch has {run.steps_per_epoch} steps, so nothing would "
                "train. Give fewer, or every=<optimizer steps>, or every='once'."
            )
        return run.steps_per_epoch

    def _decide(self, run: Run) -> None:
        if self.criterion == "rgn":
            self.rates = rgn_rates({depth: sum(norms) / len(norms) for depth, norms in self.norms.items()})
        else:
            self.rates = snr_rates(depth_snr(self.gradients, run.params), threshold=self.threshold)
        self.norms, self.gradients = {}, {}
        if len(self.rates) < 2 and self.every == "once":
            logger.warning(
                "surgical: at step %d gradients came from %d of the %d depths that may train, so there is nothing to "
                "compare, and all keep the learning rate. Measure again when more of them train: set every=.",
                *(run.step, len(self.rates), len(run.depths)),
            )
        table = ", ".join(f"{depth}: {rate:.3g}" for depth, rate in sorted(self.rates.items(), reverse=True))
        logger.info("surgical: from step %d on, depth: share of the learning rate = %s", run.step, table)


def relative_norms(run: Run, params: Sequence[Param]) -> dict[int, float]:
    """Depth → ‖g‖ / (‖θ‖ + 1e-8), over all of the parameters there that have a gradient in this step."""
    gradients: dict[int, list[Tensor]] = {}
    weights: dict[int, list[Tensor]] = {}
    for param in params:
        gradient = run.gradient(param)
        if gradient is not None:
            gradients.setdefault(param.depth, []).append(gradient.float().norm().cpu())
            weights.setdefault(param.depth, []).append(run.weight(param).float().norm().cpu())
    return {
        depth: float(torch.stack(parts).norm()) / (float(torch.stack(weights[depth]).norm()) + EPSILON)
        for depth, parts in gradients.items()
    }


def rgn_rates(ratios: Mapping[int, float]) -> dict[int, float]:
    """Depth → ratio ÷ the largest ratio; 1 everywhere where all are 0."""
    largest = max(ratios.values(), default=0.0)
    return {depth: ratio / largest if largest else 1.0 for depth, ratio in ratios.items()}


def snr(gradients: Tensor) -> Tensor:
    """mean(g)² / (var(g) + 1e-8) over the steps, the variance with n − 1.

    Args:
        gradients: (steps ≥ 2, elements).
    Returns: (elements,).
    """
    return gradients.mean(0) ** 2 / (gradients.var(0) + EPSILON)


def depth_snr(gradients: Mapping[str, Sequence[Tensor]], params: Sequence[Param]) -> dict[int, float]:
    """Depth → mean of the SNR over all its elements.

    Args:
        gradients: parameter → one tensor for each step, shape (n,). Elements left out are taken to be like these.
            Parameters with fewer than two steps say nothing.
        params: the parameters, with their shapes.
    """
    totals: dict[int, float] = {}
    counts: dict[int, int] = {}
    for param in params:
        steps = gradients.get(param.name, ())
        if len(steps) > 1:
            elements = math.prod(param.shape)
            ratio = float(snr(torch.stack([step.cpu() for step in steps])).mean())
            totals[param.depth] = totals.get(param.depth, 0.0) + ratio * elements
            counts[param.depth] = counts.get(param.depth, 0) + elements
    return {depth: total / counts[depth] for depth, total in totals.items()}


def snr_rates(ratios: Mapping[int, float], *, threshold: float) -> dict[int, float]:
    """Depth → 1 where the ratio is at least `threshold` × the largest, else 0."""
    largest = max(ratios.values(), default=0.0)
    return {depth: float(ratio >= threshold * largest) for depth, ratio in ratios.items()}
