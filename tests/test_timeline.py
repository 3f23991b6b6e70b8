"""Who trained when, as text."""

from __future__ import annotations

import pytest

from peft_plus.timeline import Change, draw, label

HEAD, TOP, LOW, WORDS = (3, "head"), (2, "base"), (1, "base"), (0, "base")


@pytest.mark.parametrize(
    ("group", "text"),
    [
        ((0, "base"), "embeddings"),
        ((0, "adapter"), "embeddings adapter"),
        ((1, "base"), "block 1"),
        ((2, "adapter"), "block 2 adapter"),
        ((3, "head"), "head"),
        ((3, "base"), "top"),
        ((3, "adapter"), "top adapter"),
    ],
)
def test_labels(group, text):
    assert label(group, num_blocks=2) == text


def test_a_schedule():
    changes = [
        Change("train", 0, 8, frozenset({HEAD})),
        Change("train", 2, 8, frozenset({HEAD, TOP})),
        Change("train", 4, 8, frozenset({HEAD, TOP, LOW})),
    ]
    lines = draw(changes, 2, width=8).splitlines()
    assert lines[0].strip() == "train: 8"  # cut at the width of the bars
    assert [line.strip() for line in lines[1:]] == ["head  ████████", "block 2  ··██████", "block 1  ····████"]


def test_the_order_is_from_the_head_down_and_columns_line_up():
    changes = [Change("train", 0, 4, frozenset({WORDS, HEAD, LOW, TOP}))]
    lines = draw(changes, 2, width=12).splitlines()
    assert [line[: line.index("█")].strip() for line in lines[1:]] == ["head", "block 2", "block 1", "embeddings"]
    assert len({line.index("█") for line in lines[1:]}) == 1


def test_thawing_and_freezing_again():
    changes = [
        Change("train", 0, 6, frozenset({HEAD, TOP})),
        Change("train", 3, 6, frozenset({HEAD})),
        Change("train", 5, 6, frozenset({HEAD, TOP})),
    ]
    assert draw(changes, 2, width=6).splitlines()[2].strip() == "block 2  ███··█"


def test_more_steps_than_columns_and_fewer():
    changes = [Change("train", 0, 100, frozenset({HEAD})), Change("train", 50, 100, frozenset({HEAD, TOP}))]
    assert draw(changes, 2, width=10).splitlines()[2].strip() == "block 2  ·····█████"
    changes = [Change("train", 0, 2, frozenset({HEAD})), Change("train", 1, 2, frozenset({HEAD, TOP}))]
    assert draw(changes, 2, width=6).splitlines()[2].strip() == "block 2  ···███"


def test_stages_stand_side_by_side():
    changes = [
        Change("probe", 0, 4, frozenset({HEAD})),
        Change("train", 0, 2, frozenset({HEAD})),
        Change("train", 1, 2, frozenset({HEAD, TOP})),
    ]
    ruler, head, block = draw(changes, 2, width=16).splitlines()
    assert ruler.split() == ["probe:", "4", "steps", "train:", "2", "steps"]
    assert head.strip() == f"head  {'█' * 16}  {'█' * 16}"
    assert block.strip() == f"block 2  {'·' * 16}  {'·' * 8}{'█' * 8}"
    assert ruler.index("train:") == head.rindex("█" * 16)


def test_nothing_recorded_draws_nothing_and_does_not_fail():
    assert draw([], 2).strip() == ""
