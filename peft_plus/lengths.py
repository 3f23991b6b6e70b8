"""How long each example of a dataset is, in tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .errors import MethodError

COLUMNS = ("length", "input_ids")
"""Where a length is looked for, in this order."""

_ROWS_AT_ONCE = 10_000


def lengths_of(dataset: Any, who: str) -> np.ndarray:
    """The length of every example, from its column `length`, else from its `input_ids`.

    Of a `datasets.Dataset` only the offsets of the stored lists are read, in C; other map-style data are gone through
    row by row. An example of several texts (multiple choice) is as long as the longest of them.

    Args:
        dataset: map-style.
        who: wants to know, for the errors.
    Returns: integers, shape (examples,).
    Raises:
        MethodError: there is neither column, or it holds no lengths.
    """
    if hasattr(dataset, "select_columns") and hasattr(dataset, "column_names"):
        name = _column(dataset.column_names, who)
        tables = dataset.select_columns([name]).with_format("arrow").iter(_ROWS_AT_ONCE)
        lengths = [_of_column(name, table.column(0).combine_chunks(), who) for table in tables]
        return np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
    return np.array([_of_row(dataset[row], who) for row in range(len(dataset))], np.int64)


def _column(names: Any, who: str) -> str:
    for name in COLUMNS:
        if name in names:
            return name
    raise MethodError(
        f"{who} must know how long each example is, and the data have neither 'length' nor 'input_ids', only "
        f"{', '.join(map(str, names)) or 'nothing'}. Tokenise them first (model.peft_plus.task.preprocess), or add a "
        "column 'length'."
    )


def _of_column(name: str, column: Any, who: str) -> np.ndarray:
    """One column as an Arrow array → its lengths."""
    import pyarrow as pa

    if column.null_count:
        raise MethodError(f"{who}: {column.null_count} examples have no {name!r}.")
    if name == "length":
        if not pa.types.is_integer(column.type):
            raise MethodError(f"{who}: the column 'length' holds {column.type}; expected whole numbers.")
        return column.to_numpy(zero_copy_only=False).astype(np.int64)
    if not _is_list(column.type):
        raise MethodError(f"{who}: the column 'input_ids' holds {column.type}; expected lists of token ids.")
    lengths = _counts(column)
    if not _is_list(column.type.value_type):
        return lengths
    inner, first = _counts(column.flatten()), np.cumsum(lengths) - lengths
    if not lengths.all():
        raise MethodError(f"{who}: an example has an empty list of texts.")
    return np.maximum.reduceat(inner, first)


def _counts(column: Any) -> np.ndarray:
    import pyarrow.compute

    compute: Any = pyarrow.compute  # its functions are made when it is imported
    return compute.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.int64)


def _is_list(kind: Any) -> bool:
    import pyarrow.types as kinds

    return kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind)


def _of_row(row: Any, who: str) -> int:
    if not isinstance(row, Mapping):
        raise MethodError(
            f"{who} must know how long each example is, and an example is a {type(row).__name__}; expected a "
            "mapping with 'length' or 'input_ids'."
        )
    name = _column(list(row), who)
    if name == "length":
        return int(row[name])
    ids = row[name]
    nested = len(ids) > 0 and hasattr(ids[0], "__len__") and getattr(ids[0], "ndim", 1) > 0
    return max(len(text) for text in ids) if nested else len(ids)
