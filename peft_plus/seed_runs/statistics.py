"""What a handful of results says: intervals, tests, expected maxima. NumPy alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
EXACT_UP_TO = 14
"""Pairs up to which all 2ⁿ signs are gone through; beyond, `FLIPS` are drawn."""
FLIPS = 100_000

Statistic = Callable[[np.ndarray], np.ndarray]
"""(resamples, n) → (resamples,)."""


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def mean(samples: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    return samples.mean(-1)


def std(samples: np.ndarray) -> np.ndarray:
    """The standard deviation over the last axis, with n − 1."""
    return samples.std(-1, ddof=1)


def bootstrap(statistic: Callable[..., np.ndarray], *values: Sequence[float]) -> Estimate:
    """The statistic with its 95 % percentile interval (Efron 1979), over redrawn runs.

    Args:
        statistic: of one argument for each of `values`, which it gets as (resamples, n).
        values: of n runs each, n ≥ 2; several are redrawn together, run by run.
    """
    arrays = [np.asarray(column, dtype=float) for column in values]
    n = len(arrays[0])
    drawn = np.random.default_rng(0).integers(0, n, (RESAMPLES, n))
    low, high = np.percentile(statistic(*(array[drawn] for array in arrays)), [2.5, 97.5])
    return Estimate(float(statistic(*(array[None] for array in arrays))[0]), float(low), float(high))


def paired_permutation(differences: Sequence[float]) -> float:
    """The two-sided p-value of a paired permutation test: how often signs drawn at random give as large a mean.

    Exact up to 14 pairs; beyond, (1 + hits) / (1 + 100,000) of drawn signs (Phipson & Smyth 2010,
    doi:10.2202/1544-6115.1585).

    Args:
        differences: one for each pair, n ≥ 2.
    """
    values = np.asarray(differences, dtype=float)
    n, observed = len(values), abs(float(np.mean(differences)))
    slack = 1e-12 * (1 + np.abs(values).max())  # a sum in another order rounds otherwise
    if n <= EXACT_UP_TO:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float(np.mean(np.abs(signs @ values / n) >= observed - slack))
    signs = np.random.default_rng(0).integers(0, 2, (FLIPS, n), dtype=np.int8) * 2 - 1
    hits = int(np.sum(np.abs(signs @ values / n) >= observed - slack))
    return (1 + hits) / (1 + FLIPS)


def expected_best(values: Sequence[float], k: int, *, greater_is_better: bool = True) -> float:
    """The expected best of k runs drawn with replacement from those recorded.

    E[max] = Σᵢ v₍ᵢ₎ · ((i/n)ᵏ − ((i−1)/n)ᵏ), v₍ᵢ₎ in rising order (Dodge et al. 2019, arXiv:1909.03004).

    Args:
        k: ≥ 1.
    """
    sign = 1 if greater_is_better else -1
    rising = np.sort(sign * np.asarray(values, dtype=float))
    share = np.arange(len(rising) + 1) / len(rising)
    return float(sign * np.sum(rising * np.diff(share**k)))
