"""The mean of weights: of tensors, and of low-rank changes as one low-rank change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def plain_mean(tensors: Sequence[Tensor]) -> Tensor:
    """Σ tₖ / K, summed in fp64 and rounded once, so that K copies give the tensor itself; integers must be equal.

    Raises:
        ValueError: they are integers, and differ.
    """
    if not tensors[0].is_floating_point():
        if any(not torch.equal(tensors[0], tensor) for tensor in tensors):
            raise ValueError("integers that differ have no mean")
        return tensors[0]
    dtype, total = tensors[0].dtype, torch.zeros(tensors[0].shape, dtype=torch.float64)
    for tensor in tensors:
        dtype, total = torch.promote_types(dtype, tensor.dtype), total + tensor
    return (total / len(tensors)).to(dtype)


@dataclass(frozen=True)
class LowRank:
    """ΔW = BA, and what was cut off it.

    Attributes:
        a: A, (r, …).
        b: B, (out, r, …) with 1 for every further dimension.
        lost: ‖what was cut off‖², Frobenius.
        total: ‖ΔW before‖².
    """

    a: Tensor
    b: Tensor
    lost: float
    total: float


@torch.no_grad()
def low_rank_mean(factors: Sequence[tuple[Tensor, Tensor, float]], *, rank: int | None = None) -> LowRank:
    """The mean of sₖ · BₖAₖ, which (mean B)(mean A) is not.

    Side by side the factors are exact: Σ sₖ BₖAₖ / K = [s₁B₁ … s_K B_K] / K · [A₁; …; A_K], of rank Σ rₖ. A lower rank
    keeps the largest singular values, the best there is in Frobenius norm (Eckart & Young 1936). They are those of
    R_B R_Aᵀ, where B = Q_B R_B and Aᵀ = Q_A R_A, so that ΔW itself is never formed.

    Args:
        factors: for each change A (rₖ, …), B (out, rₖ, …) and s. Ranks may differ, the other dimensions may not.
        rank: of the result at most, ≥ 1; None for what is exact: Σ rₖ, or less where ΔW has fewer rows or columns.
    Returns: in fp32 at least, with scaling 1.
    """
    dtype = torch.float32
    for a, b, _ in factors:
        dtype = torch.promote_types(dtype, torch.promote_types(a.dtype, b.dtype))
    first_a, first_b, _ = factors[0]
    wide_a = torch.cat([a.double().flatten(1) for a, _, _ in factors])
    wide_b = torch.cat([b.double().flatten(1) * (s / len(factors)) for _, b, s in factors], 1)
    most = min(len(wide_a), len(wide_b), wide_a.shape[1])
    wanted = min(most, rank or most)
    total = float(((wide_b.T @ wide_b) * (wide_a @ wide_a.T)).sum().clamp(min=0))
    lost = 0.0
    if wanted < len(wide_a):
        wide_a, wide_b, lost = _cut(wide_a, wide_b, wanted)
    return LowRank(
        wide_a.reshape(-1, *first_a.shape[1:]).to(dtype),
        wide_b.reshape(len(first_b), -1, *first_b.shape[2:]).to(dtype),
        lost,
        total,
    )


def _cut(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Factors of the best approximation of BA of that rank, each with half of the singular values; what it loses."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, values, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    half = values[:rank].sqrt()
    return half[:, None] * (v[:rank] @ q_a.T), q_b @ u[:, :rank] * half, float(values[rank:].square().sum())


def relative_error(parts: Sequence[LowRank]) -> float:
    """‖what was cut off‖ / ‖ΔW‖ over all weights together, in [0, 1]; 0 for none."""
    total = sum(part.total for part in parts)
    return min(1.0, math.sqrt(sum(part.lost for part in parts) / total)) if total > 0 else 0.0
