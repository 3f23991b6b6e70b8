"""One split of the user's data: its columns by name, its rows with an error message that can point at them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..names import nearest

_UNLIMITED = 10**9
"""Tokenizers without a limit of their own report a `model_max_length` far above this."""


@dataclass(frozen=True)
class Source:
    """A split and how to name it in an error.

    Attributes:
        dataset: a `datasets.Dataset` with at least one row, in plain Python format.
        where: e.g. `SEQ_CLS, split 'train'`.
    """

    dataset: Any
    where: str

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in order."""
        return list(self.dataset.column_names)

    def require(self, setting: str, column: str) -> str:
        """`column`, which the user named by `setting`; an error with the nearest match if it is not there."""
        if column not in self.columns:
            raise ValueError(
                f"{self.where}: there is no column {column!r} (setting `{setting}`).{nearest(column, self.columns)} "
                f"The columns are {self.columns}."
            )
        return column

    def find(self, setting: str, given: str | None, candidates: Sequence[str]) -> str:
        """The column that the user named, else the only one of `candidates` that is there."""
        if given is not None:
            return self.require(setting, given)
        there = [c for c in candidates if c in self.columns]
        if len(there) == 1:
            return there[0]
        if there:
            raise ValueError(
                f"{self.where}: columns {there} could each be `{setting}`. Name one: `{setting}={there[0]!r}`."
            )
        close = next(filter(None, (nearest(c, self.columns) for c in candidates)), "")
        raise ValueError(
            f"{self.where}: no column for `{setting}` (looked for {list(candidates)}).{close} The columns are "
            f"{self.columns}. Name it: `{setting}=…`."
        )

    def map(self, encode: Callable[[dict[str, list[Any]], list[int]], dict[str, Any]]) -> Any:
        """A new dataset holding only what `encode(columns, row numbers)` returns, batch by batch."""
        return self.dataset.map(encode, batched=True, with_indices=True, remove_columns=self.columns, desc=self.where)

    def texts(self, values: Iterable[Any], rows: Sequence[int], column: str) -> list[str]:
        """`values` as they are, once each is known to be a string."""
        checked = list(values)
        for row, value in zip(rows, checked, strict=True):
            if not isinstance(value, str):
                raise ValueError(f"{self.where}, row {row}: column {column!r} holds {value!r}, not text.")
        return checked

    def filled(self, encoding: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
        """`encoding` as it is, once each row is known to have tokens (no model takes an empty sequence)."""
        for row, ids in zip(rows, encoding["input_ids"], strict=True):
            if not ids:
                raise ValueError(f"{self.where}, row {row}: the text gives no tokens. Fill it or remove the row.")
        return encoding


def splits(dataset: Any, where: str) -> dict[str | None, Source]:
    """The splits by name; a lone dataset is called None.

    Raises:
        TypeError: neither `Dataset` nor `DatasetDict`.
        ValueError: no split, or a split without rows.
    """
    from datasets import Dataset, DatasetDict

    if isinstance(dataset, Dataset):
        parts: dict[str | None, Any] = {None: dataset}
    elif isinstance(dataset, DatasetDict):
        parts = {str(key): part for key, part in dataset.items()}
    else:
        raise TypeError(
            f"{where}: preprocess takes a datasets.Dataset or DatasetDict, not {type(dataset).__name__}. "
            "Use `Dataset.from_list(rows)` for rows in memory; a streamed dataset must be materialised first."
        )
    if not parts:
        raise ValueError(f"{where}: the DatasetDict has no splits.")
    named = {key: where if key is None else f"{where}, split {key!r}" for key in parts}
    for key, part in parts.items():
        if len(part) == 0:
            raise ValueError(f"{named[key]}: the dataset has no rows, so there is nothing to train or measure on.")
    # Whatever format the user set for reading (torch, numpy), rows are read as plain Python; theirs stays as it is.
    return {key: Source(part.with_format(None), named[key]) for key, part in parts.items()}


def truncation(tokenizer: Any, max_length: int | None) -> dict[str, Any]:
    """Tokenizer arguments that cut at `max_length` tokens, else at the tokenizer's own limit, if it has one."""
    limit = max_length or tokenizer.model_max_length
    return {"truncation": True, "max_length": limit} if limit < _UNLIMITED else {"truncation": False}


def token_columns(encoding: Any) -> dict[str, list[Any]]:
    """What a tokenizer returned, as plain columns."""
    return {key: list(value) for key, value in encoding.items()}
