"""Lengths, from whatever the data are: equal to counting by hand."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from peft_plus import MethodError
from peft_plus.lengths import lengths_of

IDS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]
COUNTS = [3, 1, 2, 4]


def stored() -> Dataset:
    return Dataset.from_dict({"input_ids": IDS, "label": [0, 1, 0, 1]})


@pytest.mark.parametrize(
    "data",
    [
        stored(),
        stored().with_format("torch"),
        stored().with_transform(lambda rows: {"label": rows["label"]}),
        stored().select([3, 2, 1, 0]).select([3, 2, 1, 0]),
        stored().add_column("length", COUNTS).remove_columns("input_ids"),
        stored().to_list(),
        [{"input_ids": torch.tensor(ids)} for ids in IDS],
        [{"input_ids": np.array(ids)} for ids in IDS],
        [{"length": torch.tensor(count)} for count in COUNTS],
        torch.utils.data.Subset(stored(), [0, 1, 2, 3]),
    ],
    ids=["lists", "torch", "transform", "selected", "length", "rows", "tensors", "arrays", "numbers", "subset"],
)
def test_counted(data: Any) -> None:
    found = lengths_of(data, "length_buckets")
    assert found.tolist() == COUNTS
    assert found.dtype == np.int64


def test_a_column_of_lengths_counts_before_the_tokens() -> None:
    assert lengths_of(stored().add_column("length", [9, 8, 7, 6]), "length_buckets").tolist() == [9, 8, 7, 6]


def test_of_several_texts_the_longest_counts() -> None:
    texts = [[[1, 2], [3]], [[4], [5, 6, 7]], [[8], [9]]]
    for data in (Dataset.from_dict({"input_ids": texts}), [{"input_ids": text} for text in texts]):
        assert lengths_of(data, "length_buckets").tolist() == [2, 3, 1]
    assert lengths_of([{"input_ids": torch.zeros(2, 5)}], "length_buckets").tolist() == [5]


def test_more_rows_than_are_read_at_once() -> None:
    counts = (np.arange(25_000) * 7) % 13
    data = Dataset.from_dict({"input_ids": [[0] * int(n) for n in counts]})
    assert np.array_equal(lengths_of(data, "length_buckets"), counts)
    assert np.array_equal(lengths_of(data.select(range(0, 25_000, 2)), "length_buckets"), counts[::2])


def test_stored_lists_are_not_gone_through_in_python() -> None:
    """A hundred times faster than reading the rows."""
    data = Dataset.from_dict({"input_ids": [[0] * 64] * 20_000})

    def seconds(function: Any) -> float:
        start = time.process_time()
        function()
        return time.process_time() - start

    fast = min(seconds(lambda: lengths_of(data, "length_buckets")) for _ in range(3))
    assert seconds(lambda: [len(row["input_ids"]) for row in data.select(range(2_000))]) * 10 > 30 * fast


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Dataset.from_dict({"text": ["a"], "label": [0]}), "neither 'length' nor 'input_ids', only text, label"),
        ([{"pixel_values": torch.zeros(3)}], "neither 'length' nor 'input_ids', only pixel_values"),
        ([torch.zeros(3)], "an example is a Tensor"),
        (Dataset.from_dict({"length": [1.5, 2.0]}), "'length' holds double; expected whole numbers"),
        (Dataset.from_dict({"input_ids": ["a b"]}), "'input_ids' holds string; expected lists"),
        (Dataset.from_dict({"input_ids": [[1], None]}), "1 examples have no 'input_ids'"),
        (Dataset.from_dict({"input_ids": [[[1]], []]}), "an example has an empty list of texts"),
    ],
)
def test_data_without_lengths_are_refused(data: Any, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        lengths_of(data, "length_buckets")
