"""Intervals, tests and expected maxima against SciPy, and against going through all cases."""

from __future__ import annotations

import math
import operator
from itertools import product

import numpy as np
import pytest
from scipy import stats

from peft_plus.seed_runs import Racing, simulate_racing
from peft_plus.seed_runs.statistics import (
    Estimate,
    bootstrap,
    expected_best,
    mean,
    paired_permutation,
    spread,
    std,
    t_quantile,
)

VALUES = np.random.default_rng(3).normal(0.8, 0.05, 20).tolist()
OTHERS = np.random.default_rng(4).normal(0.78, 0.05, 20).tolist()


@pytest.mark.parametrize(("ours", "theirs"), [(mean, np.mean), (std, lambda x, axis: np.std(x, axis=axis, ddof=1))])
def test_bootstrap_intervals_are_scipys_at_the_expanded_level_up_to_what_was_drawn(ours, theirs) -> None:
    got, n = bootstrap(ours, VALUES), len(VALUES)
    tail = stats.norm.cdf(-np.sqrt(n / (n - 1)) * stats.t.ppf(0.975, n - 1))
    drawn = {"method": "percentile", "n_resamples": 20_000, "rng": 1, "confidence_level": 1 - 2 * tail}
    wanted = stats.bootstrap((VALUES,), theirs, **drawn).confidence_interval
    width = wanted.high - wanted.low
    assert got.value == pytest.approx(theirs(np.array(VALUES), axis=-1))
    assert abs(got.low - wanted.low) < 0.05 * width
    assert abs(got.high - wanted.high) < 0.05 * width


@pytest.mark.parametrize("n", [5, 10, 13])
def test_a_permutation_test_of_few_pairs_is_scipys_exact_one(n: int) -> None:
    a, b = VALUES[:n], OTHERS[:n]
    wanted = stats.permutation_test(
        (a, b),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        n_resamples=np.inf,
        vectorized=True,
    ).pvalue
    assert paired_permutation(np.subtract(a, b).tolist()) == pytest.approx(wanted)


def test_a_permutation_test_of_many_pairs_comes_near_the_exact_one() -> None:
    differences = np.subtract(VALUES[:16], OTHERS[:16])
    signs = np.array(list(product([1, -1], repeat=16)))
    exact = np.mean(np.abs(signs @ differences / 16) >= abs(differences.mean()) - 1e-12)
    assert paired_permutation(differences.tolist()) == pytest.approx(exact, abs=0.005)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 19, 199])
def test_quantiles_of_t_are_scipys(freedom: int) -> None:
    assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=2e-3)


@pytest.mark.parametrize(("n", "least"), [(5, 0.95), (10, 0.93), (20, 0.92)])
def test_the_interval_of_a_spread_holds_the_truth_as_often_as_it_says(n: int, least: float) -> None:
    """Normal values; the share has a standard error of 1 % itself."""
    draws = np.random.default_rng(7).normal(0.8, 0.05, (500, n))
    inside = [(one := spread(row.tolist())).low <= 0.05 <= one.high for row in draws]
    assert np.mean(inside) >= least
    assert spread(draws[0].tolist()).value == pytest.approx(np.std(draws[0], ddof=1))


def test_a_spread_of_equal_values_is_none_and_that_of_a_few_has_no_interval() -> None:
    assert spread([0.5] * 6) == Estimate(0.0, 0.0, 0.0)
    few = spread([0.5, 0.7, 0.6])
    assert few.value == pytest.approx(0.1)
    assert np.isnan([few.low, few.high]).all()
    assert np.isnan(bootstrap(mean, [0.5]).low)


def test_what_is_no_number_has_no_p() -> None:
    for n in (6, 20):
        assert np.isnan(paired_permutation([0.1] * (n - 1) + [float("nan")]))


def test_equal_runs_differ_by_nothing() -> None:
    assert paired_permutation([0.0, 0.0, 0.0]) == 1.0


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("greater_is_better", [True, False])
def test_the_expected_best_is_the_mean_over_all_draws(k: int, greater_is_better: bool) -> None:
    values = VALUES[:5]
    pick = max if greater_is_better else min
    wanted = np.mean([pick(drawn) for drawn in product(values, repeat=k)])
    assert expected_best(values, k, greater_is_better=greater_is_better) == pytest.approx(wanted)


def test_racing_finds_at_half_the_budget_what_whole_runs_find_where_the_start_tells_the_end() -> None:
    """Runs whose start correlates with their end at .9: 26 started and 3 finished cost half of 20 whole ones."""
    draw = np.random.default_rng(0)
    early = draw.normal(size=20_000)
    final = (0.9 * early + np.sqrt(1 - 0.9**2) * draw.normal(size=20_000)).tolist()
    racing = Racing(fraction=0.3, keep=3)
    assert racing.cost(26) == pytest.approx(26 * 0.3 + 3 * 0.7)
    assert racing.cost(26) < 10
    found, plain, share = simulate_racing(early.tolist(), final, racing=racing, n=26, whole=20)
    assert found >= plain
    assert share > 0.5
    blind, same, _ = simulate_racing(draw.permutation(early).tolist(), final, racing=racing, n=26, whole=20)
    assert same == plain
    assert blind == pytest.approx(expected_best(final, 3), abs=0.05)  # a start that tells nothing: three whole runs


def test_racing_that_keeps_all_but_one_loses_nothing_by_a_perfect_start() -> None:
    values = VALUES[:10]
    racing = Racing(fraction=0.5, keep=9)
    found, _, _ = simulate_racing(values, values, racing=racing, draws=2_000)
    assert found == pytest.approx(expected_best(values, 10), abs=0.002)


@pytest.mark.parametrize("greater_is_better", [True, False])
def test_a_run_that_diverged_is_worse_than_any_in_a_race(greater_is_better: bool) -> None:
    values = [float("nan"), 0.1, 0.2, 0.3]
    racing = Racing(fraction=0.5, keep=1)
    given = {"racing": racing, "greater_is_better": greater_is_better, "whole": 1}
    found, median, share = simulate_racing(values, values, **given)
    worst = [-1e9 if greater_is_better else 1e9, *values[1:]]
    assert (median, share) == simulate_racing(worst, worst, **given)[1:]
    best = [expected_best(values[1:], k, greater_is_better=greater_is_better) for k in range(1, 5)]
    chances = [math.comb(4, k) * 0.75**k * 0.25 ** (4 - k) for k in range(1, 5)]  # of k that did not diverge
    assert found == pytest.approx(sum(map(operator.mul, best, chances)) / sum(chances), abs=0.003)
    assert math.isnan(simulate_racing(values[:1] * 2, values[:1] * 2, racing=racing)[0])


def test_less_can_be_better() -> None:
    found, plain, _ = simulate_racing(
        VALUES, VALUES, racing=Racing(fraction=0.2, keep=2), greater_is_better=False, draws=2_000
    )
    assert found <= plain
    assert found == pytest.approx(expected_best(VALUES, 20, greater_is_better=False), abs=0.002)
