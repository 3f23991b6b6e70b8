"""The columns of labels and token ids, looked through before training: a bad row far down is found at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from .data_limits import Limits
from .errors import DataError
from .tasks.base import IGNORED

LABELS = ("label", "label_ids", "labels")
"""What transformers' collators take for labels, the first that is there."""
SCANNED = 50_000_000
"""Values of a column that are looked at: about half a second. Batches are checked whatever follows."""
_CHUNK = 10_000
_NUMBERS = "The model takes numbers: model.peft_plus.task.preprocess(dataset, tokenizer) makes them."


def columns(dataset: Any) -> list[str]:
    """Names of the columns of a dataset; [] where it does not tell."""
    names = getattr(dataset, "column_names", None)
    if isinstance(names, list):
        return names
    first = dataset[0] if isinstance(dataset, list | tuple) and dataset else None
    return [str(name) for name in first] if isinstance(first, Mapping) else []


def check_columns(dataset: Any, limits: Limits, name: str) -> None:
    """Look through labels and token ids. Reads no other column, and nothing that is made on the fly.

    Args:
        dataset: a `datasets.Dataset`, or a list of mappings; anything else is left to `check_batch`.
        name: what the user calls it, e.g. `train_dataset`.
    Raises:
        DataError: names the row, the value, and the fix.
    """
    stored = _as_stored(dataset)
    if stored is not None:
        try:
            return _check(stored, limits, name)
        except DataError:  # its row has another number here, or was left out
            pass
    return _check(dataset, limits, name)


def _check(dataset: Any, limits: Limits, name: str) -> None:
    known = columns(dataset)
    labels = next((column for column in LABELS if column in known), None)
    for column in filter(None, (labels, "input_ids" if "input_ids" in known else None)):
        _check_values(_chunks(dataset, column), column, limits, name)
    if labels is not None and limits.aligned and "input_ids" in known:
        _check_lengths(dataset, labels, name)


def _check_values(chunks: Iterator[tuple[int, Any]], column: str, limits: Limits, name: str) -> None:
    seen = 0
    for start, rows in chunks:
        values, row_of = _flat(rows, f"{name}, column {column!r}", start)
        if values is None:
            return
        fault = limits.ids_fault(values) if column == "input_ids" else _labels_fault(limits, values, rows)
        if fault is not None:
            (index, *_), why = fault
            raise DataError(f"{name}[{start + row_of[index]}][{column!r}]: {values[index].item()!r} {why}.")
        seen += values.size
        if seen > SCANNED:
            return


def _labels_fault(limits: Limits, values: np.ndarray, rows: Any) -> tuple[Any, str] | None:
    if limits.per == "row" and len(values) != len(rows):  # several for each row: which loss they get, the model decides
        return None
    return limits.labels_fault(values)


def _check_lengths(dataset: Any, labels: str, name: str) -> None:
    """Labels for tokens must be as many as the tokens."""
    for (start, ids), (_, own) in zip(_chunks(dataset, "input_ids"), _chunks(dataset, labels), strict=True):
        for row, (tokens, many) in enumerate(zip(_lengths(ids), _lengths(own), strict=True)):
            if tokens != many:
                raise DataError(
                    f"{name}[{start + row}] has {tokens} input_ids and {many} labels; each token needs one label, "
                    f"{IGNORED} where there is none."
                )
        if start > SCANNED // 100:
            return


# ---- reading -----------------------------------------------------------------------------------------------------


def _chunks(dataset: Any, column: str) -> Iterator[tuple[int, Any]]:
    """The values of a column piece by piece, each with the number of its first row."""
    if isinstance(dataset, list | tuple):
        yield 0, [row.get(column) if isinstance(row, Mapping) else None for row in dataset]
    elif is_table(dataset):
        plain = dataset.select_columns([column]).with_format("arrow")
        for start in range(0, len(plain), _CHUNK):
            yield start, plain[start : start + _CHUNK][column]


def is_table(dataset: Any) -> bool:
    """Whether its columns are stored as they are read, and not made on the fly."""
    from datasets import Dataset

    return isinstance(dataset, Dataset) and dataset.format["type"] != "custom"


def _as_stored(dataset: Any) -> Any:
    """What lies below a shuffled or selected dataset, all rows in their first order: read about 80 times faster."""
    from datasets import Dataset

    if not is_table(dataset) or dataset._indices is None or len(dataset.data) > 4 * len(dataset):
        return None
    return Dataset(dataset.data, info=dataset.info, fingerprint=f"{dataset._fingerprint}-stored")


def _flat(rows: Any, where: str, start: int) -> tuple[Any, Any]:
    """All numbers of some rows one after another, and the row of each; (None, None) where they are no numbers."""
    if isinstance(rows, list):
        return _flat_list(rows, where, start)
    if rows.null_count:
        row = start + rows.is_null().to_pylist().index(True)
        raise DataError(f"{where}, row {row}: there is no value. Fill it, or drop the row.")
    array, row_of = rows.combine_chunks(), np.arange(len(rows))
    while pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        row_of = np.repeat(row_of, _sizes(array))
        array = array.flatten()
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        raise DataError(f"{where}, row {start}: {array[0].as_py()!r} is text. {_NUMBERS}")
    if not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type) or pa.types.is_boolean(array.type)):
        return None, None
    if array.null_count:
        row = start + int(row_of[array.is_null().to_pylist().index(True)])
        raise DataError(f"{where}, row {row}: a value is missing. Fill it, or drop the row.")
    return array.to_numpy(zero_copy_only=False), row_of


def _flat_list(rows: list[Any], where: str, start: int) -> tuple[Any, Any]:
    try:
        arrays = [np.asarray(row) for row in rows]
    except (ValueError, TypeError):  # ragged inside a row, or on another device
        return None, None
    bad = next((i for i, array in enumerate(arrays) if array.dtype.kind not in "biuf"), None)
    if bad is not None:
        raise DataError(f"{where}, row {start + bad}: {rows[bad]!r} is no number. {_NUMBERS}")
    flat = np.concatenate([array.reshape(-1) for array in arrays]) if arrays else np.empty(0)
    return flat, np.repeat(np.arange(len(arrays)), [array.size for array in arrays])


def _lengths(rows: Any) -> Any:
    return [np.asarray(row).size for row in rows] if isinstance(rows, list) else _sizes(rows.combine_chunks())


def _sizes(lists: Any) -> np.ndarray:
    """How many values each row of an arrow array of lists has."""
    if pa.types.is_fixed_size_list(lists.type):
        return np.full(len(lists), lists.type.list_size)
    if not (pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type)):
        return np.ones(len(lists), dtype=int)
    return lists.value_lengths().to_numpy(zero_copy_only=False)
