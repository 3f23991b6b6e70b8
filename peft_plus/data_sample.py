"""A few rows of the training data as a digest: tells other data of the same length from the same data."""

from __future__ import annotations

import hashlib
from typing import Any

from .data_columns import is_table

_ROWS = 16


def data_sample(dataset: Any) -> str | None:
    """SHA-256 over some evenly spaced rows, the first 16 digits of it; None where looking could draw or compute rows.

    Args:
        dataset: a `datasets.Dataset` without a transform of its own, or a list of rows.
    """
    count = len(dataset) if isinstance(dataset, (list, tuple)) or is_table(dataset) else 0
    if not count:
        return None
    chosen = sorted({place * (count - 1) // (_ROWS - 1) for place in range(_ROWS)})
    if isinstance(dataset, (list, tuple)):
        rows = [dataset[place] for place in chosen]
    else:
        rows = dataset.with_format("arrow")[chosen].to_pylist()
    return hashlib.sha256(repr(_plain(rows)).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """Tensors and arrays as lists, mappings by key; what has no value of its own as the name of its type."""
    if isinstance(value, dict):
        return sorted((str(key), _plain(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    return type(value).__qualname__  # its repr may hold an address
