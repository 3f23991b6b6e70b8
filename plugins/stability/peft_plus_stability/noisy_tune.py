"""NoisyTune: a little noise on the pretrained weights before training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from peft_plus import Plugin
from peft_plus.layers import find_heads
from peft_plus.tasks import infer_task


@dataclass(kw_only=True)
class NoisyTune(Plugin):
    """Perturb each pretrained tensor once, by its own spread, before anything trains.

    W ← W + U(−intensity/2, intensity/2) · std(W) (Wu et al. 2022, arXiv:2202.12024), embeddings and a pretrained
    head included. A head that the task draws fresh is left alone, and so is a tensor without spread. It draws from
    torch's global generator when the model is built, so `set_seed` before `get_model` rules it.

    Args:
        intensity: λ ≥ 0, in units of a tensor's standard deviation; 0 changes nothing.
    Raises:
        ValueError: `intensity` is negative.
    """

    name: ClassVar[str] = "noisy_tune"
    source: ClassVar[str] = "Wu et al. 2022, arXiv:2202.12024"
    needs: ClassVar[tuple[str, ...]] = ("base",)

    intensity: float = 0.15

    def __post_init__(self) -> None:
        if not 0 <= self.intensity < math.inf:
            raise ValueError(f"intensity={self.intensity}: give λ ≥ 0.")

    @torch.no_grad()
    def prepare_base(self, model: nn.Module) -> nn.Module:
        if self.intensity > 0:
            fresh = find_heads(model) if infer_task(model).new_head else ()
            for name, tensor in model.named_parameters():  # a tied one comes once
                if not any(name == head or name.startswith(f"{head}.") for head in fresh):
                    tensor.copy_(noised(tensor, intensity=self.intensity))
        return model


def noised(weight: Tensor, *, intensity: float) -> Tensor:
    """W + U(−λ/2, λ/2) · std(W), the std with n − 1; W itself where it has fewer than two elements or no spread.

    Args:
        weight: W, any shape.
        intensity: λ ≥ 0.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if weight.numel() < 2 or not wide.std() > 0:
        return weight
    noise = (torch.rand(weight.shape, device=weight.device, dtype=wide.dtype) - 0.5) * intensity * wide.std()
    return (wide + noise).to(weight.dtype)
