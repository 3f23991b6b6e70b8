"""The rows of a batch: how many there are, and the same ones several times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import DataError

_BY_ROW = ("input_ids", "inputs_embeds", "labels")
"""What has one entry for each row, where a batch holds it; images and the like may be laid end to end."""


def number_of_rows(batch: Any) -> int:
    """How many rows a batch has: as many as its token ids, else as its first tensor; 0 where it has none."""
    if not isinstance(batch, Mapping):
        return 0
    known = [batch[name] for name in _BY_ROW if name in batch]
    return next((len(value) for value in (*known, *batch.values()) if isinstance(value, Tensor) and value.dim()), 0)


def repeated(batch: Mapping[str, Any], copies: int) -> Mapping[str, Any]:
    """The batch so many times, one whole batch after another.

    Shapes (rows, …) → (copies · rows, …); a tensor of shape (1, …) holds for every row and stays. The bounds of packed
    texts, `cu_seq_lens_q` and `cu_seq_lens_k`, go on over the copies.

    Raises:
        DataError: a tensor has another length, so that nobody can say which row its parts belong to.
    """
    if copies == 1:
        return batch
    rows = number_of_rows(batch)

    def longer(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return value * copies if len(value) == rows else value
        if not isinstance(value, Tensor) or not value.dim():
            return value
        if len(value) == rows:
            return torch.cat([value] * copies)
        if len(value) == 1:
            return value
        if name.startswith("cu_seq_lens"):  # where texts laid end to end begin: the copies follow one another
            return torch.cat([value, *(value[1:] + copy * value[-1] for copy in range(1, copies))])
        raise DataError(
            f"{name} has shape {tuple(value.shape)} in a batch of {rows} rows, so its rows cannot be repeated, as the "
            "technique must. Collate it with one entry for each row, or choose a technique without copies of the batch."
        )

    return {name: longer(name, value) for name, value in batch.items()}
