"""Mixout: dropout toward the weights that training began with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from peft_plus import Param, Plugin, Run


@dataclass(kw_only=True)
class Mixout(Plugin):
    """In each step, compute with the starting value of a share of the weights, chosen anew.

    w̃ = w₀ + m · (w − w₀) / (1 − p), m ~ Bernoulli(1 − p) for each element, so that the mean of w̃ is w (Lee et al. 2020,
    arXiv:1909.11299, eq. 6). The matrices of blocks and pooler mix, not embeddings, biases, norms or the new head; of a
    tuner the matrices that it put into the model, e.g. LoRA's two factors, which are pulled to their start. The mask is
    drawn once for an optimizer step, alike on all processes.

    Costs a mask and a few additions over the mixed weights for each micro-batch, and a copy of them.

    Args:
        p: probability of the starting value, in [0, 1); 0 gives the plain run bit for bit. The paper uses .7 to .9 for
            full fine-tuning.
        head: whether the head's matrices mix, too.
    Raises:
        ValueError: `p` is out of its range; nothing that trains would mix.
    """

    name: ClassVar[str] = "mixout"
    source: ClassVar[str] = "Lee et al. 2020, arXiv:1909.11299"

    p: float = 0.7
    head: bool = False

    start: dict[str, Tensor] = field(init=False, default_factory=dict)
    """Parameter → w₀."""

    def __post_init__(self) -> None:
        if not 0 <= self.p < 1:
            raise ValueError(f"p={self.p}: give a probability in [0, 1). At 1 nothing would ever train.")

    def on_build(self, run: Run) -> None:
        if not self._mixed(run):
            raise ValueError("no matrix that trains would mix. Use a tuner with matrices in the blocks, or head=True.")

    def on_stage_begin(self, run: Run) -> None:
        self.start = {param.name: run.weight(param).clone() for param in self._mixed(run)} if self.p > 0 else {}

    def effective_weight(self, run: Run, param: Param, value: Tensor) -> Tensor:
        if param.name not in self.start or not value.requires_grad:  # what is frozen for now does not mix
            return value
        start = self.start[param.name] = self.start[param.name].to(value.device)
        generator = run.generator("mixout", param.name, device=value.device)
        mask = torch.empty_like(start).bernoulli_(1 - self.p, generator=generator)
        return mixout(value, start, mask, p=self.p)

    def _mixed(self, run: Run) -> list[Param]:
        """The parameters that mix."""
        modules = run.model.modules()
        embeddings = {id(tensor) for m in modules if isinstance(m, nn.Embedding) for tensor in m.parameters()}
        tensors = dict(run.model.named_parameters())

        def mixes(param: Param) -> bool:
            if param.part == "base":
                inside = param.depth > 0 or run.num_blocks == 0  # a model without a list of blocks is flat
                return inside and id(tensors[param.name]) not in embeddings
            return param.part == "adapter" or self.head

        return [param for param in run.params if len(param.shape) > 1 and mixes(param)]


def mixout(weight: Tensor, start: Tensor, mask: Tensor, *, p: float) -> Tensor:
    """w₀ + m · (w − w₀) / (1 − p), which is ((1 − m) w₀ + m w − p w₀) / (1 − p).

    (Lee et al. 2020, arXiv:1909.11299, eq. 6.) Its gradient is m / (1 − p).

    Args:
        weight, start: w and w₀, equal shapes.
        mask: m, zeros and ones of that shape.
        p: in [0, 1]; 0 gives w itself, 1 gives w₀.
    """
    if p == 0:
        return weight
    return start if p == 1 else start + mask * (weight - start) / (1 - p)
