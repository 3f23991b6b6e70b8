"""Training data that can say which row is bad: a dataset and a collator with the user's own inside."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .data_limits import Limits, check_batch
from .errors import DataError

_REMEMBERED = 256
"""Batches of which the rows are known: more than any accumulation and prefetching hold at a time."""
_SHOWN = 8


class Rows(Dataset[Any]):
    """A map-style dataset whose errors name the row, and which knows the rows of the batches that it gave last.

    Args:
        dataset: with `__getitem__` and `__len__`; the user's own.
        name: what the user calls it, e.g. `train_dataset`.
    """

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self._name = dataset, name
        self.begin()

    def begin(self) -> None:
        """Before an epoch is iterated."""
        self._given: deque[tuple[int, ...]] = deque(maxlen=_REMEMBERED)
        self._batches = 0

    def of_batch(self, number: int = -1) -> tuple[int, ...]:
        """The rows of a batch of this epoch, counted from 0, or of the latest; () where they are not known.

        Only what this process read is known: with workers, each of them knows its own.
        """
        back = -1 if number < 0 else number - self._batches  # batches are fetched ahead of their use
        return self._given[back] if -len(self._given) <= back < 0 else ()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_") or attribute == "dataset":  # not there yet while this is unpickled
            raise AttributeError(attribute)
        return getattr(self.dataset, attribute)

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except Exception as error:
            count = len(self.dataset)
            if isinstance(index, int) and not -count <= index < count:
                raise DataError(
                    f"{self._name}[{index}] was asked for, and it has {count} rows: the sampler, or the plugin that "
                    "sets the order of the data, counts wrongly."
                ) from error
            raise DataError(
                f"{self._name}[{index}] could not be read: {type(error).__name__}: {error}. Mend or drop the row."
            ) from error

    def __getitems__(self, indices: Sequence[Any]) -> Any:
        self._given.append(tuple(indices))
        self._batches += 1
        many = getattr(self.dataset, "__getitems__", None)
        if not many:
            return [self[index] for index in indices]
        try:
            return many(list(indices))
        except Exception as error:
            for index in indices:
                self[index]  # one of them raises, and is named
            raise DataError(
                f"{self._name}: rows {_listed(indices)} could not be read together: {type(error).__name__}: {error}."
            ) from error


class Collate:
    """A collator whose errors name the rows, and whose batches hold what the model can take.

    Args:
        collate: the user's: a list of rows → a batch.
        limits: what the model takes.
        rows: where the rows come from; None where they have no numbers.
        name: what the user calls the data.
    """

    def __init__(self, collate: Any, limits: Limits, rows: Rows | None, name: str) -> None:
        self._collate, self.limits, self._rows, self._name = collate, limits, rows, name
        self.hands_on = hands_on(collate)

    def __call__(self, rows: list[Any]) -> Any:
        known = self._rows.of_batch() if self._rows is not None else ()
        where = f"{self._name}[{_listed(known)}]" if known else f"{len(rows)} rows of {self._name}"
        try:
            batch = self._collate(rows)
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"{_called(self._collate)} could not make a batch of {where}: {type(error).__name__}: {error}. "
                f"{_look(rows)} Pass a data_collator that fits these rows, or mend them."
            ) from error
        if not isinstance(batch, Mapping):
            raise DataError(
                f"{_called(self._collate)} made a {type(batch).__name__} of {where}; expected a mapping of the model's "
                "arguments, such as {'input_ids': …, 'labels': …}."
            )
        if not batch:
            raise DataError(
                f"The batch of {where} is empty. {_look(rows)} The Trainer drops what the model's forward does not "
                "take: rename the columns, or set remove_unused_columns=False with a data_collator of your own."
            )
        check_batch(batch, self.limits, self._name, known)
        return batch


def name_rows(loader: Any, limits: Limits, name: str) -> Rows | None:
    """Put `Rows` and `Collate` into a loader that is made already.

    Returns: what knows the rows of the batches, or None where they have no numbers.
    """
    inner = getattr(loader, "base_dataloader", loader)  # what Accelerate's own reads from
    if not isinstance(inner, DataLoader) or isinstance(inner.collate_fn, Collate):
        return None
    rows = None
    if not isinstance(inner.dataset, IterableDataset) and hasattr(inner.dataset, "__getitem__"):
        rows = Rows(inner.dataset, name)
        object.__setattr__(inner, "dataset", rows)  # a DataLoader refuses it, for its sampler's sake; ours is as long
    inner.collate_fn = Collate(inner.collate_fn, limits, rows, name)
    return rows


def hands_on(collate: Any) -> bool:
    """Whether a collator is known to hand on labels and token ids as the rows hold them."""
    inner = getattr(collate, "data_collator", collate)  # transformers' RemoveColumnsCollator
    home = getattr(inner, "__module__", None) or ""
    return home.startswith("transformers.") and "LanguageModeling" not in type(inner).__name__


def _called(collate: Any) -> str:
    inner = getattr(collate, "data_collator", collate)  # transformers' RemoveColumnsCollator
    return f"The collator {getattr(inner, '__name__', type(inner).__name__)}"


def _look(rows: list[Any]) -> str:
    """What the rows look like, where they differ."""
    mappings = [row for row in rows if isinstance(row, Mapping)]
    if len(mappings) < len(rows) or not rows:
        return f"The rows are {', '.join(sorted({type(row).__name__ for row in rows}))}."
    keys = {tuple(sorted(map(str, row))) for row in mappings}
    if len(keys) > 1:
        return f"Rows differ in their columns: {' and '.join(str(list(k)) for k in sorted(keys)[:2])}."
    lengths = {
        str(name): sorted({len(row[name]) for row in mappings})
        for name in mappings[0]
        if all(isinstance(row[name], Sequence | Tensor) and _has_length(row[name]) for row in mappings)
    }
    ragged = ", ".join(f"{name!r} {sizes[0]} to {sizes[-1]}" for name, sizes in lengths.items() if len(sizes) > 1)
    return f"Lengths differ: {ragged}." if ragged else f"The columns are {sorted(map(str, mappings[0]))}."


def _has_length(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.dim() > 0


def _listed(rows: Sequence[Any]) -> str:
    return ", ".join(map(str, rows[:_SHOWN])) + (", …" if len(rows) > _SHOWN else "")
