"""How much a store will take: said before it is filled, and refused where it is too much."""

from __future__ import annotations

import logging
import shutil

from torch import Tensor

from ..errors import MethodError
from .data import TrainingData
from .rows import Rows
from .store import FeatureStore

logger = logging.getLogger(__name__)


def check_space(store: FeatureStore, data: TrainingData, rows: Rows, features: Tensor, *, block: int) -> None:
    """Say how much the store of all data will take.

    Args:
        data: of which it will be; where their tokens are not known, the first batch tells how many there may be.
        rows, features: the first batch.
        block: whose output it is.
    Raises:
        MethodError: that is more than its limit, or than what is free on the disk.
    """
    each = features[0, 0].numel() * store.dtype.itemsize
    tokens, guess = tokens_of(data, rows, features), ""
    if tokens is None and data.examples is not None:
        tokens, guess = int(data.examples * _real(rows, features) / len(features)), ", as far as the first batch tells"
    if tokens is None:
        logger.info("trunk_cache stores %s per token in %s.", bytes_text(each), store.folder)
        return
    wanted, free = tokens * each, shutil.disk_usage(store.folder).free + store.bytes
    logger.info(
        "trunk_cache stores the output of block %d: %d tokens × %s = %s%s, in %s%s.",
        block,
        tokens,
        bytes_text(each),
        bytes_text(wanted),
        guess,
        store.folder,
        f" ({len(store)} examples are there already)" if len(store) else "",
    )
    if wanted > store.limit:
        raise MethodError(
            f"trunk_cache would store {bytes_text(wanted)}{guess}, more than limit_gb={store.limit / 1e9:g}. "
            + ("Raise it." if store.dtype.itemsize == 2 else "Raise it, or take dtype='bf16', half of fp32.")
        )
    if wanted > free:
        raise MethodError(
            f"trunk_cache would store {bytes_text(wanted)}{guess} in {store.folder}, where {bytes_text(free)} are "
            "free. Give folder= on a larger disk."
        )


def tokens_of(data: TrainingData, rows: Rows, features: Tensor) -> int | None:
    """The real tokens of all data; None where they are not known, also where each example was padded to one length."""
    if data.tokens is None or data.lengths is None or rows.spans is None:
        return None
    padded = _real(rows, features) < features.shape[0] * features.shape[1]
    return None if padded and data.lengths.min() == data.lengths.max() else data.tokens


def _real(rows: Rows, features: Tensor) -> int:
    """The real tokens of a batch."""
    return sum(end - first for first, end in rows.spans_in(features))


def bytes_text(count: float) -> str:
    """Bytes for people."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"
