"""A few elements in the place of a whole tensor, always the same ones."""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN = 0.6180339887498949
"""(√5 − 1) / 2: its multiples modulo 1 are spread evenly, and follow no row or column."""


def sampled(tensor: Tensor, count: int) -> Tensor:
    """`count` elements of a tensor, or all where it has no more: the same positions for every tensor of one size.

    Args:
        tensor: any shape.
        count: ≥ 1.
    Returns: shape (min(count, elements),), fp32, a copy.
    """
    flat = tensor.reshape(-1)
    if flat.numel() > count:
        steps = torch.arange(count, dtype=torch.float64) * GOLDEN % 1
        flat = flat[(steps * flat.numel()).long().to(flat.device)]
    return flat.to(torch.float32, copy=True)
