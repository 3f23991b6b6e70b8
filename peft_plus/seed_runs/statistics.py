"""What a handful of results says: intervals, tests, expected maxima. NumPy alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES = 10_000
EXACT_UP_TO = 14
"""Pairs up to which all 2ⁿ signs are gone through; beyond, `FLIPS` are drawn."""
FLIPS = 100_000

_NORMAL = NormalDist()
_Z = _NORMAL.inv_cdf(0.975)


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; NaN where too few runs tell one."""

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
    """The statistic with its 95 % expanded percentile interval (Hesterberg 2015, arXiv:1411.5279, §4.5), redrawn runs.

    The percentiles are Φ(∓√(n/(n−1)) · t₀.₉₇₅,ₙ₋₁) instead of 2.5 and 97.5 %, which are too narrow of few runs: of the
    mean of 5, 10, 20 normal values they hold the truth in 92, 96, 96 % of 400 draws, the plain ones in 84, 90, 92.

    Args:
        statistic: of one argument for each of `values`, which it gets as (resamples, n).
        values: of n runs each; several are redrawn together, run by run. The interval of one run is NaN, and so is all
            of none.
    """
    arrays = [np.asarray(column, dtype=float) for column in values]
    n = len(arrays[0])
    value = float(statistic(*(array[None] for array in arrays))[0]) if n else math.nan
    if n < 2:
        return Estimate(value, math.nan, math.nan)
    drawn = np.random.default_rng(0).integers(0, n, (RESAMPLES, n))
    tail = 100 * _NORMAL.cdf(-math.sqrt(n / (n - 1)) * t_quantile(n - 1))
    redrawn = statistic(*(array[drawn] for array in arrays))
    low, high = np.percentile(redrawn, [tail, 100 - tail], method="inverted_cdf")  # some may be infinite
    return Estimate(value, float(low), float(high))


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t.

    By the expansion of Abramowitz & Stegun, 26.7.5, within 0.5 % from 3 degrees of freedom on; below, as tabulated.

    Args:
        freedom: degrees of freedom, ≥ 1.
    """
    if freedom < 3:
        return {1: 12.706, 2: 4.303}[freedom]
    z, v = _Z, float(freedom)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / v ** (k + 1) for k, term in enumerate(terms))


def spread(values: Sequence[float]) -> Estimate:
    """The standard deviation, with n − 1, and its 95 % interval for values that need not be normal (Bonett 2006).

    exp(½ (ln(c s²) ± z c √((γ − (n−3)/n) / (n−1)))), c = n / (n − z), γ = n Σ(x−m)⁴ / (Σ(x−x̄)²)², where m is the mean
    without the share 1/(2√(n−4)) at either end (doi:10.1016/j.csda.2004.10.018). The bootstrap's is far too narrow: of
    5, 10, 20 normal values it holds the truth in 65, 75, 88 % of the draws, this one in 99, 96, 95 %; where 15 % of the
    runs fail, this one in 94, 74, 90 %.

    Args:
        values: of n runs; the interval of fewer than four is NaN, and so is all of fewer than two.
    """
    x = np.asarray(values, dtype=float)
    n = len(x)
    s = float(x.std(ddof=1)) if n > 1 else math.nan
    if n < 4 or not s > 0:
        return Estimate(s, *((s, s) if s == 0 else (math.nan, math.nan)))
    trimmed = min((n - 1) // 2, int(n / (2 * math.sqrt(n - 4)))) if n > 4 else 1
    middle = float(np.sort(x)[trimmed : n - trimmed].mean())
    kurtosis = n * float(((x - middle) ** 4).sum()) / float(((x - x.mean()) ** 2).sum()) ** 2
    c = n / (n - _Z)
    width = _Z * c * math.sqrt(max(0.0, kurtosis - (n - 3) / n) / (n - 1))
    centre = math.log(c * s * s)
    return Estimate(s, math.exp((centre - width) / 2), math.exp((centre + width) / 2))


def largest_share(labels: np.ndarray) -> float:
    """The share of the largest class, in (0, 1]: what predicting it alone would be right in.

    Args:
        labels: (n,), n ≥ 1.
    """
    return float(np.unique(labels, return_counts=True)[1].max() / len(labels))


def paired_permutation(differences: Sequence[float]) -> float:
    """The two-sided p-value of a paired permutation test: how often signs drawn at random give as large a mean.

    Exact up to 14 pairs; beyond, (1 + hits) / (1 + 100,000) of drawn signs (Phipson & Smyth 2010,
    doi:10.2202/1544-6115.1585).

    Args:
        differences: one for each pair, n ≥ 1, all of them numbers.
    Returns: NaN where one is none.
    """
    values = np.asarray(differences, dtype=float)
    if not np.isfinite(values).all():
        return math.nan
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
