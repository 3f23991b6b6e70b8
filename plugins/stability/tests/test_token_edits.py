"""Edits of a row of tokens, against what can be counted and worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.random import default_rng

from peft_plus_stability.nearest_tokens import nearest_tokens
from peft_plus_stability.token_edits import amount, delete, insert, replace, runs_of, swap

LONG = 200
IDS = np.arange(1000, 1000 + LONG)
RUNS = [np.arange(1, 120), np.arange(121, 199)]
"""Two texts, with special tokens in front of, between and behind them."""
WORDS = np.concatenate(RUNS)
DRAWS = 300


def draws(edit: Any) -> list[Any]:
    """What one edit gives under many seeds."""
    return [edit(default_rng(seed)) for seed in range(DRAWS)]


def thousands(token: int, random: np.random.Generator) -> int:
    """Every token has nine neighbours of its own."""
    return token * 1000 + int(random.integers(1, 10))


@pytest.mark.parametrize(
    ("tokens", "alpha", "number"), [(1, 0.1, 1), (9, 0.1, 1), (19, 0.1, 1), (20, 0.1, 2), (200, 0.1, 20), (3, 1.0, 3)]
)
def test_the_number_of_edits_is_that_of_the_authors_code(tokens: int, alpha: float, number: int) -> None:
    assert amount(tokens, alpha) == number


def test_runs_end_at_special_tokens_padding_and_where_the_text_changes() -> None:
    #               [CLS]          [SEP]          [SEP]  pad
    ids = np.array([5, 20, 21, 22, 6, 30, 31, 32, 6, 0])
    ordinary = np.isin(ids, [5, 6, 0], invert=True)
    found = runs_of(ids, ordinary=ordinary, segments=None)
    assert [run.tolist() for run in found] == [[1, 2, 3], [5, 6, 7]]
    segments = np.array([0, 0, 0, 1, 1, 1, 1, 1, 1, 0])
    found = runs_of(ids, ordinary=ordinary, segments=segments)
    assert [run.tolist() for run in found] == [[1, 2], [3], [5, 6, 7]]
    assert runs_of(ids, ordinary=np.zeros(10, bool), segments=None) == []


def test_a_swap_exchanges_two_tokens_of_one_text() -> None:
    for order, new in draws(lambda random: swap(IDS, RUNS, 1, random)):
        assert order.tolist() == list(range(LONG))
        moved = np.flatnonzero(new != IDS)
        assert len(moved) == 2
        assert any({*moved} <= {*run} for run in RUNS)
        assert new[moved].tolist() == IDS[moved[::-1]].tolist()


def test_many_swaps_move_the_share_of_tokens_that_random_transpositions_do() -> None:
    """A token stays at its place with p ← p (1 − 2/l) + (1 − p) · 2/(l (l − 1)) for each of them."""
    count, words = 20, np.arange(1, 101)
    stays = 1.0
    for _ in range(count):
        stays = stays * (1 - 2 / 100) + (1 - stays) * 2 / (100 * 99)
    moved = [float((new != IDS).sum()) / 100 for _, new in draws(lambda random: swap(IDS, [words], count, random))]
    assert np.mean(moved) == pytest.approx(1 - stays, abs=4 * np.std(moved) / np.sqrt(DRAWS))
    assert np.std(moved) < 0.1


def test_a_text_of_one_token_has_nothing_to_exchange() -> None:
    order, new = swap(IDS, [np.array([4])], 3, default_rng(0))
    assert (order == np.arange(LONG)).all()
    assert (new == IDS).all()


def test_each_token_is_dropped_with_the_same_probability_and_no_special_one() -> None:
    gone = np.zeros(LONG)
    for order, new in draws(lambda random: delete(IDS, RUNS, 0.1, random)):
        assert (new == IDS[order]).all()
        assert (np.diff(order) > 0).all()
        gone += ~np.isin(np.arange(LONG), order)
    assert gone[[0, 120, 199]].tolist() == [0, 0, 0]
    rates = gone[WORDS] / DRAWS
    error = np.sqrt(0.1 * 0.9 / DRAWS)
    assert rates.mean() == pytest.approx(0.1, abs=4 * error / np.sqrt(len(WORDS)))
    assert abs(rates - 0.1).max() < 5 * error


def test_of_each_text_a_token_stays_and_any_may() -> None:
    kept = [order for order, _ in draws(lambda random: delete(IDS, RUNS, 1.0, random))]
    assert all(len(order) == 5 and {0, 120, 199} <= {*order} for order in kept)
    assert len({tuple(order) for order in kept}) > DRAWS / 2


def test_exactly_so_many_tokens_are_replaced_each_by_a_neighbour_of_its_own() -> None:
    hit = np.zeros(LONG)
    for order, new in draws(lambda random: replace(IDS, RUNS, 20, random, thousands)):
        changed = np.flatnonzero(new != IDS)
        assert len(changed) == 20
        assert (new[changed] // 1000 == IDS[changed]).all()
        assert (order == np.arange(LONG)).all()
        hit[changed] += 1
    assert hit[[0, 120, 199]].tolist() == [0, 0, 0]
    assert hit[WORDS].mean() == DRAWS * 20 / len(WORDS)
    assert hit[WORDS].min() > 0


def test_a_token_without_a_neighbour_is_passed_over() -> None:
    def only_even(token: int, random: np.random.Generator) -> int | None:
        return token * 1000 if token % 2 == 0 else None

    for _, new in draws(lambda random: replace(IDS, RUNS, 20, random, only_even)):
        assert (IDS[new != IDS] % 2 == 0).all()
        assert (new != IDS).sum() == 20
    _, new = replace(IDS, RUNS, 20, default_rng(0), lambda *_: None)
    assert (new == IDS).all()


def test_inserted_tokens_are_neighbours_from_the_same_text_and_the_rest_stays_in_order() -> None:
    for order, new in draws(lambda random: insert(IDS, RUNS, 20, random, thousands)):
        added = new >= 1_000_000
        assert added.sum() == 20
        assert (new[~added] == IDS).all()
        assert (order[~added] == np.arange(LONG)).all()
        assert (new[added] // 1000 - 1000 < 120).tolist() == (order[added] < 120).tolist()  # whose neighbour, and where
        assert np.isin(order[added], WORDS).all()
        follows = [order[place:][~added[place:]][0] for place in np.flatnonzero(added)]
        assert order[added].tolist() == follows  # it takes what the row holds for the token behind it


def test_the_nearest_tokens_are_those_of_the_highest_cosine() -> None:
    table = torch.randn(700, 16, generator=torch.Generator().manual_seed(0))
    ids, without = torch.arange(3, 603), {0, 1, 2, 699, 5000}
    found = nearest_tokens(table, ids, 4, without=without)
    unit = table.double().numpy()
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    for token, near in zip(ids.tolist(), found.tolist(), strict=True):
        cosine = unit @ unit[token]
        cosine[[token, 0, 1, 2, 699]] = -2
        assert near == np.argsort(-cosine)[:4].tolist()
    assert nearest_tokens(table, torch.zeros(0, dtype=torch.long), 4).shape == (0, 4)
    assert torch.equal(nearest_tokens(3 * table, ids, 4, without=without), found)


def test_more_neighbours_than_there_are_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="neighbours=9: the vocabulary of 10 leaves 8"):
        nearest_tokens(torch.randn(10, 4), torch.tensor([1]), 9, without=[0])
    assert nearest_tokens(torch.randn(10, 4), torch.tensor([1]), 8, without=[0]).shape == (1, 8)
