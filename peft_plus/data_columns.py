"""The columns of labels and tokens, looked through before training: a bad row far down is found at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from .data_limits import NO_TOKEN, UNSEEN, Limits
from .errors import DataError
from .tasks.base import IGNORED
from .token_rows import Positions

LABELS = ("label", "label_ids", "labels")
"""What transformers' collators take for labels, the first that is there."""
SCANNED = 50_000_000
"""Values of a column that are looked at: about half a second. Batches are checked whatever follows."""
_CHUNK = 10_000
_BLANK_ROWS = 1000
"""Rows without a token whose labels are looked at, one by one."""
_NUMBERS = "The model takes numbers: model.peft_plus.task.preprocess(dataset, tokenizer) makes them."


def columns(dataset: Any) -> list[str]:
    """Names of the columns of a dataset; [] where it does not tell."""
    names = getattr(dataset, "column_names", None)
    if isinstance(names, list):
        return names
    first = dataset[0] if isinstance(dataset, list | tuple) and dataset else None
    return [str(name) for name in first] if isinstance(first, Mapping) else []


def check_inputs(dataset: Any, limits: Limits, name: str) -> None:
    """Whether one of the columns is what the model reads; for data that reach it as they are.

    Raises:
        DataError: there is none; names the columns, and what to do.
    """
    known = columns(dataset) if isinstance(dataset, list | tuple) or is_table(dataset) else []
    if known and limits.inputs and not set(limits.inputs) & set(known):
        raise DataError(
            f"{name} has no column {limits.inputs[0]!r}, which the model reads, only {known}. Make it with "
            "model.peft_plus.task.preprocess(dataset, tokenizer), or rename the column that holds it."
        )


def check_columns(dataset: Any, limits: Limits, name: str, *, training: bool = True) -> None:
    """Look through labels and tokens. Reads no other column, and nothing that is made on the fly.

    Args:
        dataset: a `datasets.Dataset`, or a list of mappings; anything else is left to `check_batch`.
        name: what the user calls it, e.g. `train_dataset`.
        training: whether it is trained on, so that labels must count.
    Raises:
        DataError: names the row, the value, and the fix.
    """
    stored = _as_stored(dataset)
    if stored is not None:
        try:
            return _check(stored, limits, name, training)
        except DataError:  # its row has another number here, or was left out
            pass
    return _check(dataset, limits, name, training)


def _check(dataset: Any, limits: Limits, name: str, training: bool) -> None:
    known = columns(dataset)
    labels = next((column for column in LABELS if column in known), None)
    read = ["input_ids"]
    read += ["token_type_ids"] if limits.segments is not None else []
    read += ["attention_mask"] if limits.rows_of_tokens else []
    if labels is not None:
        counts = _check_values(dataset, labels, None, limits, name)
        if not counts and training and limits.must_count and "shift_labels" not in known:
            raise DataError(_no_label(dataset, labels, limits, name))
    for column in [column for column in read if column in known]:
        _check_values(dataset, column, labels, limits, name)
    if labels is not None and limits.aligned and "input_ids" in known:
        _check_lengths(dataset, labels, name)


def _check_values(dataset: Any, column: str, labels: str | None, limits: Limits, name: str) -> bool:
    """Look through a column.

    Args:
        labels: the column of labels.
    Returns: False for labels that were all read, and none of which counts.
    """
    seen, counts = 0, False
    for start, rows in _chunks(dataset, column):
        try:
            flat = _flat(rows, f"{name}, column {column!r}", start)
        except DataError:
            if column in ("token_type_ids", "attention_mask"):
                return True  # neither is needed, and what is wrong with the rows the collator tells
            raise
        if flat is None:
            return True
        values, row_of = flat.values, flat.row_of
        match column:
            case "input_ids":
                fault = limits.ids_fault(values)
            case "token_type_ids":
                fault = limits.segments_fault(values)
            case "attention_mask":
                fault = None
            case _:
                fault = _labels_fault(limits, values, rows)
                counts = counts or limits.any_counts(values, row_of)
        if fault is not None:
            (index, *_), why = fault
            raise DataError(f"{name}[{start + row_of[index]}][{column!r}]: {values[index].item()!r} {why}.")
        if column == "input_ids" and limits.positions is not None and "position_ids" not in columns(dataset):
            _check_positions(flat, limits.positions, start, name)
        if column in ("input_ids", "attention_mask") and limits.rows_of_tokens:
            why = NO_TOKEN if column == "input_ids" else UNSEEN
            blank = (start + int(row) for row in _blank(flat, len(rows), mask=column == "attention_mask"))
            bad = next((row for row in islice(blank, _BLANK_ROWS) if _learns(dataset, row, labels)), None)
            if bad is not None:
                raise DataError(f"{name}[{bad}] {why}")
        seen += values.size
        if seen > SCANNED:
            return True
    return counts or not seen


def _no_label(dataset: Any, labels: str, limits: Limits, name: str) -> str:
    first = " but for each row's first, which nothing predicts" if limits.shifted else ""
    return (
        f"{name}: the loss counts no label of its {len(dataset)} rows, because all {labels!r} are {IGNORED}{first}. "
        "Nothing could be learned: look at what made them (a prompt that fills max_length, a mask over the wrong part)."
    )


def _check_positions(flat: _Flat, positions: Positions, start: int, name: str) -> None:
    """Whether the rows are as short as the model needs them."""
    if flat.lengths is None:
        return
    ends = np.cumsum(flat.lengths)
    for place in np.flatnonzero(flat.lengths + positions.virtual > positions.size):
        why = positions.fault(flat.values[ends[place] - flat.lengths[place] : ends[place]])
        if why is not None:
            raise DataError(f"{name}[{start + flat.row_of_length[place]}] {why}.")


def _blank(flat: _Flat, count: int, *, mask: bool) -> np.ndarray:
    """The rows of which no value is there, or, in a mask, none that is not 0."""
    none = np.empty(0, int)
    if flat.lengths is None or (mask and flat.values.dtype.kind == "f"):  # which is added to the attention
        return none
    if flat.lengths.all() and (not mask or flat.values.all()):
        return none
    full = np.flatnonzero(flat.lengths)
    seen = np.ones(len(full))
    if mask and len(full):
        starts = np.cumsum(flat.lengths) - flat.lengths
        seen = np.bitwise_or.reduceat(flat.values, starts[full]) != 0
    return np.flatnonzero(np.bincount(flat.row_of_length[full], seen, count) == 0)


def _learns(dataset: Any, row: int, labels: str | None) -> bool:
    """Whether a row has a label that counts; one without any does no harm, as padding does none."""
    return labels is None or bool((np.asarray(dataset[row][labels]) != IGNORED).any())


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


class _Flat(NamedTuple):
    """All numbers of some rows one after another.

    Attributes:
        row_of: the row of each.
        lengths: how many there are in each innermost list; None where the rows are no lists.
        row_of_length: the row of each innermost list.
    """

    values: np.ndarray
    row_of: np.ndarray
    lengths: np.ndarray | None
    row_of_length: np.ndarray


def _flat(rows: Any, where: str, start: int) -> _Flat | None:
    """The numbers of some rows; None where they are none."""
    if isinstance(rows, list):
        return _flat_list(rows, where, start)
    if rows.null_count:
        row = start + rows.is_null().to_pylist().index(True)
        raise DataError(f"{where}, row {row}: there is no value. Fill it, or drop the row.")
    array, row_of, lengths = rows.combine_chunks(), np.arange(len(rows)), None
    row_of_length = row_of
    while pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        row_of_length, lengths = row_of, _sizes(array)
        row_of = np.repeat(row_of, lengths)
        array = array.flatten()
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        raise DataError(f"{where}, row {start}: {array[0].as_py()!r} is text. {_NUMBERS}")
    if not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type) or pa.types.is_boolean(array.type)):
        return None
    if array.null_count:
        row = start + int(row_of[array.is_null().to_pylist().index(True)])
        raise DataError(f"{where}, row {row}: a value is missing. Fill it, or drop the row.")
    return _Flat(array.to_numpy(zero_copy_only=False), row_of, lengths, row_of_length)


def _flat_list(rows: list[Any], where: str, start: int) -> _Flat | None:
    try:
        arrays = [np.asarray(row) for row in rows]
    except (ValueError, TypeError):  # ragged inside a row, or on another device
        return None
    bad = next((i for i, array in enumerate(arrays) if array.dtype.kind not in "biuf"), None)
    if bad is not None:
        raise DataError(f"{where}, row {start + bad}: {rows[bad]!r} is no number. {_NUMBERS}")
    filled = [array.reshape(-1) for array in arrays if array.size]  # an empty list would make floats of all
    values = np.concatenate(filled) if filled else np.empty(0, int)
    sizes = np.array([array.size for array in arrays], int)
    row_of = np.repeat(np.arange(len(arrays)), sizes)
    if not all(array.ndim for array in arrays):
        return _Flat(values, row_of, None, row_of)
    inner = np.array([array.shape[-1] for array in arrays], int)
    many = np.maximum(sizes // np.maximum(inner, 1), 1)  # innermost lists of a row
    return _Flat(values, row_of, np.repeat(inner, many), np.repeat(np.arange(len(arrays)), many))


def _lengths(rows: Any) -> Any:
    return [np.asarray(row).size for row in rows] if isinstance(rows, list) else _sizes(rows.combine_chunks())


def _sizes(lists: Any) -> np.ndarray:
    """How many values each row of an arrow array of lists has."""
    if pa.types.is_fixed_size_list(lists.type):
        return np.full(len(lists), lists.type.list_size)
    if not (pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type)):
        return np.ones(len(lists), dtype=int)
    return lists.value_lengths().to_numpy(zero_copy_only=False)
