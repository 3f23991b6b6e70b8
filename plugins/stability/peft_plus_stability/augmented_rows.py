"""Tokenised rows that are another draw in each epoch, and always the same one for (seed, epoch, index)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.random import Generator, default_rng
from torch import Tensor
from torch.utils.data import Dataset

from .token_edits import Ints, amount, delete, insert, replace, runs_of, swap

BY_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "special_tokens_mask")
"""Columns with a value for each token, which follow the edits."""


@dataclass(frozen=True, kw_only=True)
class RowForm:
    """What rows look like, and what of them stays.

    Attributes:
        special: token ids that are never touched, and that end a run of words.
        fixed: whether all rows are equally long, so that they must stay it.
        longest: how many tokens a row may have; None for any number.
        pad: column → what stands at padding.
        left: whether padding goes to the left of a row that has none yet.
    """

    special: frozenset[int]
    fixed: bool
    longest: int | None
    pad: Mapping[str, int]
    left: bool


@dataclass(eq=False)
class AugmentedRows(Dataset[Any]):
    """Map-style data whose rows are edited with probability `share`, by one of the operations.

    Args:
        dataset: map-style; rows are mappings.
        key: of the random streams.
        alpha, share, operations: see `EDA`.
        form: of the rows.
        nearest: `ids` → token ids, sorted, shape (n,); `table` → the neighbours of each, shape (n, k). Read when a row
            is made, so that it may be filled later.
    """

    dataset: Any
    key: int
    alpha: float
    share: float
    operations: Sequence[str]
    form: RowForm
    nearest: Mapping[str, Tensor]
    epoch: int = field(init=False, default=0)

    def set_epoch(self, epoch: int) -> None:
        """Before an epoch: which one."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._drawn(self.dataset[index], index)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        many = getattr(self.dataset, "__getitems__", None)
        rows = many(list(indices)) if many else [self.dataset[index] for index in indices]
        return [self._drawn(row, index) for row, index in zip(rows, indices, strict=True)]

    def _drawn(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        random = default_rng((self.key, self.epoch, int(index) % len(self)))
        if random.random() >= self.share:
            return dict(row)
        columns = {name: np.asarray(row[name]) for name in BY_TOKEN if row.get(name) is not None}
        edited = self._edited(columns, str(random.choice(self.operations)), random)
        return {name: _like(value, edited[name]) if name in edited else value for name, value in row.items()}

    def _edited(self, columns: dict[str, Ints], operation: str, random: Generator) -> dict[str, Ints]:
        ids, mask = columns["input_ids"], columns.get("attention_mask")
        real = np.ones(len(ids), bool) if mask is None else mask != 0
        ordinary = real & ~np.isin(ids, list(self.form.special))
        runs = runs_of(ids, ordinary=ordinary, segments=columns.get("token_type_ids"))
        if not runs:
            return {}
        count = amount(int(ordinary.sum()), self.alpha)
        match operation:
            case "swap":
                order, new = swap(ids, runs, count, random)
            case "delete":
                order, new = delete(ids, runs, self.alpha, random)
            case "replace":
                order, new = replace(ids, runs, count, random, self._neighbour)
            case _:
                count = min(count, self._room(real))
                order, new = insert(ids, runs, count, random, self._neighbour)
        edited = {name: values[order] for name, values in columns.items()} | {"input_ids": new}
        return self._fitted(edited, real) if len(order) != len(ids) else edited

    def _neighbour(self, token: int, random: Generator) -> int | None:
        ids, table = self.nearest["ids"], self.nearest["table"]
        place = int(torch.searchsorted(ids, token))
        if place == len(ids) or int(ids[place]) != token:
            return None
        return int(table[place, int(random.integers(table.shape[1]))])

    def _room(self, real: np.ndarray[Any, Any]) -> int:
        """How many tokens may be inserted."""
        padding = int((~real).sum())
        if self.form.fixed or padding:
            return padding
        return len(real) if self.form.longest is None else max(0, self.form.longest - len(real))

    def _fitted(self, edited: dict[str, Ints], real: np.ndarray[Any, Any]) -> dict[str, Ints]:
        """Rows that are padded, or must be as long as all others, get their length back."""
        if not self.form.fixed and real.all():
            return edited
        longer = len(edited["input_ids"]) - len(real)
        left = self.form.left if real.all() else not real[0]
        if longer > 0:  # there is so much padding
            padding = np.flatnonzero(edited["attention_mask"] == 0)
            gone = padding[:longer] if left else padding[-longer:]
            return {name: np.delete(values, gone) for name, values in edited.items()}
        return {
            name: np.pad(values, (-longer, 0) if left else (0, -longer), constant_values=self.form.pad[name])
            for name, values in edited.items()
        }


def _like(original: Any, values: Ints) -> Any:
    """The values as whatever the row held."""
    if isinstance(original, Tensor):
        return torch.as_tensor(values, dtype=original.dtype)
    if isinstance(original, np.ndarray):
        return values.astype(original.dtype)
    return values.tolist()
