"""Which way a metric is better, and by how much."""

from __future__ import annotations

import pytest

from peft_plus.watched_metric import better, rises


@pytest.mark.parametrize(
    ("metric", "upward"),
    [
        ("eval_loss", False),
        ("eval_smoothloss", False),
        ("rmse", False),
        ("eval_perplexity", False),
        ("dev-wer", False),
        ("accuracy", True),
        ("eval_f1", True),
        ("eval_mcc", True),
        ("interest", True),  # a word of another metric is in it, but is not a word of its name
        ("answered", True),
    ],
)
def test_the_best_run_is_not_the_worst_where_nobody_says_the_direction(metric: str, upward: bool) -> None:
    assert rises(metric, None) is upward
    assert rises(metric, True)
    assert not rises(metric, False)


def test_what_is_no_number_improves_on_nothing() -> None:
    assert not better(float("nan"), None, greater_is_better=True)
    assert better(0.5, None, greater_is_better=True)
    assert better(0.4, 0.5, greater_is_better=False)
    assert not better(0.45, 0.5, greater_is_better=False, min_delta=0.1)
