"""Means of weights against dense matrices and SciPy's singular values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from peft_plus_stability.weight_mean import low_rank_mean, plain_mean, relative_error

Factors = list[tuple[Tensor, Tensor, float]]


def drawn(*ranks: int, inner: tuple[int, ...] = (), rows: int = 24, columns: int = 18) -> Factors:
    draw = torch.Generator().manual_seed(len(ranks))
    return [
        (
            torch.randn(r, columns, *inner, generator=draw),
            torch.randn(rows, r, *(1 for _ in inner), generator=draw),
            0.3 + r,
        )
        for r in ranks
    ]


def dense(a: Tensor, b: Tensor, scaling: float = 1.0) -> np.ndarray:
    return scaling * b.double().flatten(1).numpy() @ a.double().flatten(1).numpy()


def dense_mean(factors: Factors) -> np.ndarray:
    return sum(dense(*one) for one in factors) / len(factors)


@pytest.mark.parametrize("ranks", [(2,), (2, 5, 3), (9, 9, 9), (20, 4)])
@pytest.mark.parametrize("inner", [(), (3, 3)])
def test_it_is_the_mean_of_the_products(ranks: tuple[int, ...], inner: tuple[int, ...]) -> None:
    """Also where the ranks add up to more than the weight has columns."""
    factors = drawn(*ranks, inner=inner)
    mean = low_rank_mean(factors)
    assert np.allclose(dense(mean.a, mean.b), dense_mean(factors), atol=1e-5)
    assert mean.a.shape[1:] == factors[0][0].shape[1:]
    assert mean.b.shape[2:] == factors[0][1].shape[2:]
    assert len(mean.a) == mean.b.shape[1] == min(sum(ranks), 24, 18 * math.prod(inner))
    assert relative_error([mean]) < 1e-7


def test_the_mean_of_the_factors_would_be_something_else() -> None:
    factors = drawn(4, 4, 4)
    wanted = dense_mean(factors)
    wrong = dense(*(torch.stack([one[i] for one in factors]).mean(0) for i in (0, 1)), factors[0][2])
    assert np.linalg.norm(wrong - wanted) > 0.5 * np.linalg.norm(wanted)
    mean = low_rank_mean(factors)
    assert np.linalg.norm(dense(mean.a, mean.b) - wanted) < 1e-6 * np.linalg.norm(wanted)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_a_lower_rank_is_the_best_approximation_and_tells_what_it_loses(rank: int) -> None:
    factors = drawn(3, 5, 4)
    wanted = dense_mean(factors)
    u, values, v = scipy.linalg.svd(wanted)
    best = u[:, :rank] * values[:rank] @ v[:rank]
    mean = low_rank_mean(factors, rank=rank)
    assert len(mean.a) == mean.b.shape[1] == rank
    assert np.allclose(dense(mean.a, mean.b), best, atol=1e-4)
    assert relative_error([mean]) == pytest.approx(np.linalg.norm(wanted - best) / np.linalg.norm(wanted), rel=1e-5)


def test_the_error_is_that_of_all_weights_together() -> None:
    parts = [low_rank_mean(drawn(*ranks), rank=2) for ranks in ((3, 5), (4, 4, 4))]
    gaps = [dense(part.a, part.b) - dense_mean(drawn(*r)) for part, r in zip(parts, ((3, 5), (4, 4, 4)), strict=True)]
    whole = [dense_mean(drawn(*r)) for r in ((3, 5), (4, 4, 4))]
    wanted = math.sqrt(sum(np.linalg.norm(g) ** 2 for g in gaps) / sum(np.linalg.norm(w) ** 2 for w in whole))
    assert relative_error(parts) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("rank", [None, 2])
def test_changes_that_are_nothing_stay_nothing(rank: int | None) -> None:
    mean = low_rank_mean([(a, torch.zeros_like(b), s) for a, b, s in drawn(3, 3)], rank=rank)
    assert not dense(mean.a, mean.b).any()
    assert relative_error([mean]) == relative_error([]) == 0.0


def test_halves_are_averaged_in_full_precision() -> None:
    factors = [(a.bfloat16(), b.bfloat16(), s) for a, b, s in drawn(2, 3)]
    mean = low_rank_mean(factors)
    assert mean.a.dtype == mean.b.dtype == torch.float32
    assert np.allclose(dense(mean.a, mean.b), dense_mean(factors), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("copies", [1, 3, 7])
def test_the_mean_of_copies_is_the_tensor_bit_for_bit(dtype: torch.dtype, copies: int) -> None:
    tensor = torch.randn(50, generator=torch.Generator().manual_seed(0)).to(dtype)
    mean = plain_mean([tensor] * copies)
    assert mean.dtype == dtype
    assert torch.equal(mean, tensor) or (dtype == torch.float64 and torch.allclose(mean, tensor, rtol=1e-15))


def test_integers_have_a_mean_only_where_they_are_equal() -> None:
    assert torch.equal(plain_mean([torch.arange(3)] * 2), torch.arange(3))
    with pytest.raises(ValueError, match="integers that differ"):
        plain_mean([torch.arange(3), torch.arange(3) + 1])


def test_unlike_precisions_give_the_wider_one() -> None:
    mean = plain_mean([torch.tensor([1.0]), torch.tensor([2.0], dtype=torch.bfloat16)])
    assert mean.dtype == torch.float32
    assert mean.item() == 1.5
