"""Child-Tuning: each step, or the whole run, moves a part of the weights only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from peft_plus import Param, Plugin, Run


@dataclass(kw_only=True)
class ChildTuning(Plugin):
    """Update a child network alone: drawn anew in each step, or chosen once by the data.

    "F": m ~ Bernoulli(p) for each element and step, and the gradient is g · m / p, whose mean is g (Xu et al. 2021,
    arXiv:2109.05687). "D": before the first step the Fisher information of each element is estimated, the mean of the
    squared gradients of single examples, and the `p` share with the most of it trains, with the gradient as it is. What
    is outside the child rests bit for bit, whatever decay and momentum would do. The head is always inside.

    A tensor whose Fisher information is 0 throughout, as LoRA's A while B is 0, tells nothing about itself and stays
    inside whole.

    Args:
        variant: "F" (task-free) or "D" (task-driven).
        p: share of the elements that train, in (0, 1]; 1 is the plain run bit for bit.
        fisher_examples: how many examples, the first of the data, the estimate is over, ≥ 1; None for all; only for
            "D". Each takes a pass of its own.
    Raises:
        ValueError: a setting is out of its range or goes only with "D"; the data cannot be read before the first step.
    """

    name: ClassVar[str] = "child_tuning"
    source: ClassVar[str] = "Xu et al. 2021, arXiv:2109.05687"
    needs: ClassVar[tuple[str, ...]] = ("body",)

    variant: Literal["F", "D"] = "F"
    p: float = 0.3
    fisher_examples: int | None = 1024

    child: dict[str, Tensor] = field(init=False, default_factory=dict)
    """Parameter → which of its elements train, for "D"."""

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError(f"p={self.p}: give a share in (0, 1].")
        if self.fisher_examples is not None and self.fisher_examples < 1:
            raise ValueError(f"fisher_examples={self.fisher_examples}: give a number ≥ 1, or None for all.")
        if self.variant == "F" and self.fisher_examples != type(self).fisher_examples:
            raise ValueError(f"fisher_examples={self.fisher_examples} goes only with variant='D'.")
        self._drawn: tuple[str, int, Tensor] | None = None  # the last mask of "F": `moves` comes after `edit_gradient`

    def on_stage_begin(self, run: Run) -> None:
        self.child = {}
        if self.variant == "D" and self.p < 1:
            self.child = largest(fisher(run, limit=self.fisher_examples), share=self.p)

    def edit_gradient(self, run: Run, param: Param, gradient: Tensor) -> Tensor:
        mask = self._mask(run, param, gradient.device)
        if mask is None:
            return gradient
        inside = gradient / self.p if self.variant == "F" else gradient
        return torch.where(mask, inside, torch.zeros((), dtype=gradient.dtype, device=gradient.device))

    def moves(self, run: Run, param: Param) -> Tensor | None:
        if self._drawn is not None and self._drawn[:2] == (param.name, run.step):
            mask, self._drawn = self._drawn[2], None
            return mask
        return self._mask(run, param, None)

    def _mask(self, run: Run, param: Param, device: torch.device | None) -> Tensor | None:
        """The child's elements in this step; None where all train."""
        if param.part == "head" or self.p == 1:
            return None
        if self.variant == "D":
            if device is not None and param.name in self.child:
                self.child[param.name] = self.child[param.name].to(device)  # a resumed one lies in memory
            return self.child.get(param.name)
        # On the CPU, so that it is the same wherever the weights are.
        mask = (torch.rand(param.shape, generator=run.generator("child_tuning", param.name)) < self.p).to(device)
        self._drawn = (param.name, run.step, mask)
        return mask


def fisher(run: Run, *, limit: int | None) -> dict[str, Tensor]:
    """The diagonal of the empirical Fisher information of all that trains but the head.

    F = 1/n Σ (∂ log p(y | x) / ∂θ)² over single examples, in eval mode (Xu et al. 2021, arXiv:2109.05687).

    Args:
        limit: over how many examples; None for all.
    Returns: parameter → fp32, its shape.
    """
    names = [param.name for param in run.params if param.part != "head"]
    sums: dict[str, Tensor] = {}
    number = 0
    for batch in run.examples(1, limit=limit):
        gradients = run.task_gradients(batch)
        number += 1
        for name in names:
            square = gradients[name].float().square()
            sums[name] = sums[name].add_(square) if name in sums else square
    return {name: total / number for name, total in sums.items()}


def largest(values: Mapping[str, Tensor], *, share: float) -> dict[str, Tensor]:
    """Masks of the elements that are among the largest over all tensors.

    Args:
        values: name → tensor, ≥ 0. A tensor that is 0 throughout is left out.
        share: of the elements of the others, in (0, 1]; of equal ones at its edge all come in, but for zeros, which
            never do.
    Returns: name → bool tensor.
    """
    told = {name: value for name, value in values.items() if bool(value.any())}
    if not told:
        return {}
    everything = torch.cat([value.flatten() for value in told.values()])
    keep = max(1, round(share * everything.numel()))
    edge = everything.kthvalue(everything.numel() - keep + 1).values
    return {name: (value >= edge) & (value > 0) for name, value in told.items()}
