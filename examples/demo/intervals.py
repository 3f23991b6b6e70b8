"""How sure one can be: bootstrap intervals over the test examples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A mean over test examples and its 95 % interval."""

    mean: float
    low: float
    high: float


def bootstrap(values: np.ndarray) -> Estimate:
    """The mean of `values` with its 95 % percentile interval (Efron 1979), over redrawn examples.

    Args:
        values: one number for each test example, shape (examples,). For one method: the share of its seeds that were
            right. For two methods: the difference of those shares, which pairs them example by example.
    """
    n = len(values)
    # How often each example is drawn, rather than the draws: the same thing, without a (resamples, examples) gather.
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    low, high = np.percentile(counts @ values / n, [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high))


def verdict(difference: Estimate) -> str:
    """Whether the second method is better than the first, said no more strongly than the interval allows."""
    if difference.low > 0:
        return "The combination helped: the whole interval of the difference lies above 0."
    if difference.high < 0:
        return "The combination hurt: the whole interval of the difference lies below 0."
    return "No evidence that the combination helps: the interval of the difference contains 0."
