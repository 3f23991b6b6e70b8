"""What a loop knows of its data before training, for a size, and for a pass of its own over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, Sampler

from ..errors import MethodError
from ..lengths import lengths_of
from ..random_state import rng_state, set_rng_state

ROWS, TOKENS = 64, 1 << 15
"""The most that a batch of that pass holds. Sorted by length, more bring nothing, and cost memory."""
_ROWS_OF_UNKNOWN_LENGTH = 8


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The data of a stage.

    Attributes:
        dataset: what the rows come from; None where it is not known.
        loader: (order, rows of a batch) → this process's share of the collated batches, on the model's device.
        collator: makes batches of rows.
        collate: the same, where rows hold columns that no model takes.
        redrawn_by: the plugin that makes other rows of the same examples in each epoch; empty where none does.
    """

    dataset: Any = None
    loader: Callable[[Sampler[int], int], Iterable[Mapping[str, Any]]] | None = None
    collator: Any = None
    collate: Any = None
    redrawn_by: str = ""

    @property
    def examples(self) -> int | None:
        """Rows; None where the data have no length."""
        dataset = self.dataset
        return len(dataset) if hasattr(dataset, "__len__") and not _is_stream(dataset) else None

    @cached_property
    def lengths(self) -> np.ndarray | None:
        """Tokens of each row, shape (examples,); None where they are not known without making each row."""
        there = isinstance(self.dataset, list | tuple) or hasattr(self.dataset, "column_names")
        if self.examples is None or not there:
            return None
        random = rng_state()
        try:
            return lengths_of(self.dataset, "trunk_cache")
        except MethodError:  # images, or text that the collator tokenises: the first batch will tell
            return None
        finally:
            set_rng_state(random)

    @property
    def tokens(self) -> int | None:
        """Of all rows."""
        return None if self.lengths is None else int(self.lengths.sum())

    @property
    def masks_words(self) -> bool:
        """Whether the collator draws other inputs each time."""
        return bool(getattr(self.collator, "mlm", False))

    def batches(self, rows: int | None = None) -> Iterable[Mapping[str, Any]]:
        """Every row once, the longest first, so that what does not fit into memory fails at once.

        Args:
            rows: of a batch; by default as many as bring something.
        Raises:
            MethodError: the data are read as a stream.
        """
        if self.examples is None or self.loader is None:
            raise MethodError(
                "trunk_cache(fill='before') goes through the data before training, and these are read as a stream. "
                "Use fill='first_epoch'."
            )
        lengths = self.lengths
        if lengths is None or not len(lengths):
            return self.loader(_Fixed(range(self.examples)), rows or _ROWS_OF_UNKNOWN_LENGTH)
        rows = rows or min(ROWS, max(1, TOKENS // max(1, int(lengths.max()))))
        return self.loader(_Fixed(np.argsort(-lengths, kind="stable").tolist()), rows)


def _is_stream(dataset: Any) -> bool:
    return isinstance(dataset, IterableDataset)


class _Fixed(Sampler[int]):
    """Indices in an order that is given."""

    def __init__(self, order: Iterable[int]) -> None:
        self._order = list(order)

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[int]:
        return iter(self._order)
