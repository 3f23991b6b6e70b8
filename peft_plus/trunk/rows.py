"""The rows of a batch as the trunk sees them: a name for each that depends on nothing but its content.

So stored features are found again in whatever order, batch or padding an example comes, whoever collates it; and an
example that changed is not found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_NOT_FOR_THE_TRUNK = (
    *("labels", "start_positions", "end_positions", "shift_labels", "next_sentence_label", "num_items_in_batch"),
    *("return_dict", "use_cache", "logits_to_keep", "output_hidden_states", "output_attentions", "fused_lm_head"),
)
"""Arguments of a model that change nothing below its head, or are refused elsewhere."""

_MAIN = ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features")
"""Arguments that tell how many rows there are, the first of them that is given."""

KEY = 16
"""Bytes of a row's name."""


@dataclass(frozen=True)
class Rows:
    """A batch, row by row.

    Attributes:
        keys: the name of each row.
        spans: the real tokens of each row: first, and one past the last. None where all are kept.
    """

    keys: Sequence[bytes]
    spans: Sequence[tuple[int, int]] | None

    def spans_in(self, features: Tensor) -> Sequence[tuple[int, int]]:
        """The real tokens of each row in the features of the batch, (rows, tokens, …)."""
        return self.spans or [(0, features.shape[1])] * len(features)

    def real_tokens(self, features: Tensor) -> list[Tensor]:
        """The features of each row, without its padding."""
        return [row[first:end] for row, (first, end) in zip(features, self.spans_in(features), strict=True)]


class UnknownRows(ValueError):
    """The batch cannot be told apart by rows."""


def rows_of(
    batch: Mapping[str, Any], *, by_place: bool = True, whole: bool = False, encoder_only: bool = False
) -> Rows:
    """Name the rows of a batch.

    Args:
        batch: the arguments of the model.
        by_place: whether padding on the left moves a row's positions, so that it counts as another row.
        whole: whether padding is part of a row, so that a row that is padded otherwise is another one.
        encoder_only: the trunk is an encoder's, and what the decoder is given does not count.
    Raises:
        UnknownRows: an argument is no tensor, or carries a gradient.
    """
    settings, tensors = [], {}
    for name in sorted(batch):
        value = batch[name]
        if value is None or name in _NOT_FOR_THE_TRUNK or (encoder_only and name.startswith("decoder_")):
            continue
        if isinstance(value, Tensor) and value.dim():
            tensors[name] = value
        elif isinstance(value, bool | int | float | str):
            settings.append(f"{name}={value!r}")
        else:
            raise UnknownRows(f"the model is given {name!r}, a {type(value).__name__}, which has no rows")
    arrays = _arrays(tensors)
    count = row_count(arrays)
    mask = arrays.get("attention_mask")
    if mask is not None and (whole or mask.ndim != 2):  # of more dimensions: who may look at whom
        mask = None
    placed = by_place and "position_ids" not in arrays
    spans = None if mask is None else [_span(mask[row if len(mask) == count else 0]) for row in range(count)]
    by_token = {name for name, value in tensors.items() if is_by_token(name, value)}
    start = " ".join(settings).encode()
    keys = []
    for row in range(count):
        digest = hashlib.blake2b(start, digest_size=KEY)
        first, end = spans[row] if spans is not None else (0, 0)
        if placed and first:
            digest.update(first.to_bytes(4, "little"))
        for name, array in arrays.items():
            values = array[row] if len(array) == count else array  # which may be for all rows together
            if mask is not None and name in by_token and array.ndim >= 2 and array.shape[1] == mask.shape[1]:
                values = values[first:end] if len(array) == count else values[:, first:end]
            digest.update(f"{name}{values.dtype}{values.shape}".encode())
            digest.update(np.ascontiguousarray(values).data)
        keys.append(digest.digest())
    return Rows(keys, spans)


def row_count(batch: Mapping[str, Any]) -> int:
    """How many rows a batch has."""
    sized: Iterator[Any] = (batch[name] for name in (*_MAIN, *batch) if getattr(batch.get(name), "ndim", 0))
    return len(next(sized, ()))


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Each tensor as an array of rows; several texts of an example (multiple choice) are rows of their own."""
    ids = tensors.get("input_ids")
    several = ids is not None and ids.dim() == 3
    arrays = {}
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            raise UnknownRows(f"{name!r} carries a gradient")
        flat = tensor.flatten(0, 1) if several and tensor.dim() >= 3 else tensor
        flat = flat.detach().cpu()
        arrays[name] = (flat.view(torch.int16) if flat.dtype is torch.bfloat16 else flat).numpy()
    return arrays


def is_by_token(name: str, value: Tensor) -> bool:
    """Whether its second dimension may be the tokens': the channels of an image may be as many as these."""
    return not value.is_floating_point() or name in ("attention_mask", "inputs_embeds")


def _span(mask: np.ndarray) -> tuple[int, int]:
    """From the first to one past the last real token of a row; all of them where none is real."""
    real = np.flatnonzero(mask)
    return (int(real[0]), int(real[-1]) + 1) if len(real) else (0, len(mask))
