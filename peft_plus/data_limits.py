"""Which labels and tokens a model can take, and whether a batch holds others.

A label out of range is an IndexError on a CPU, after hours perhaps, and on a GPU a device assert that names nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .arguments import plan_of
from .errors import DataError
from .layers import transformers_model
from .tasks import Task
from .tasks.base import IGNORED
from .token_rows import Positions, positions_of, segments_of

_INPUTS = ("input_ids", "inputs_embeds", "encoder_outputs", "pixel_values", "input_values", "input_features")


@dataclass(frozen=True)
class Limits:
    """What a model takes; None where anything goes, or where it is not known.

    Attributes:
        classes: labels are whole numbers 0 … classes − 1, or −100.
        counts: what `classes` is called.
        per: of what there is one label: a row or a token.
        reals: labels are floats.
        vocabulary: `input_ids` are 0 … vocabulary − 1.
        aligned: a row has as many labels as token ids.
        must_count: training data must have a label that the loss counts.
        shifted: nothing predicts a row's first label.
        inputs: columns of which the model needs one, the usual one first.
        rows_of_tokens: a row is a sequence of tokens, and says nothing if none of them is seen.
        positions: how long it may be.
        segments: `token_type_ids` are 0 … segments − 1.
    """

    classes: int | None = None
    counts: str = "num_labels"
    per: str = "row"
    reals: bool = False
    vocabulary: int | None = None
    aligned: bool = False
    must_count: bool = False
    shifted: bool = False
    inputs: tuple[str, ...] = ()
    rows_of_tokens: bool = False
    positions: Positions | None = None
    segments: int | None = None

    def labels_fault(self, labels: np.ndarray | Tensor, classes: int | None = None) -> tuple[Any, str] | None:
        """The index of a label that the model cannot take, and what is wrong with it.

        Args:
            labels: numbers of any shape; the first axis counts rows.
            classes: where the batch tells it.
        """
        classes = self.classes if classes is None else classes
        if 0 in labels.shape:
            return None
        first = (0,) * len(labels.shape)
        if _is_real(labels):
            if classes is not None and not self.reals:
                return first, f"is a float, and classes are whole numbers 0 … {classes - 1}: convert the column"
            wrong = ~(abs(labels) < np.inf)
            return (_first(wrong), "is no finite number. Mend or drop the row") if bool(wrong.any()) else None
        if self.reals:
            fix = "convert the column; for classes build the model with num_labels=2 or more"
            return first, f"is a whole number, and this model does a regression, which takes floats: {fix}"
        if classes is None:
            return None
        wrong = (labels != IGNORED) & ((labels < 0) | (labels >= classes))
        if not bool(wrong.any()):
            return None
        fix = f"Mend the row; a label that is to be ignored is {IGNORED}"
        if int(labels.max()) >= classes and self.counts == "num_labels":
            fix = f"Build the model with num_labels={int(labels.max()) + 1} or more, or mend the row"
        return _first(wrong), f"is outside 0 … {classes - 1} ({self.counts}={classes}). {fix}"

    def ids_fault(self, ids: np.ndarray | Tensor) -> tuple[Any, str] | None:
        """The index of a token id that has no embedding, and what is wrong with it."""
        if self.vocabulary is None or 0 in ids.shape:
            return None
        if _is_real(ids):
            return (0,) * len(ids.shape), "is a float, and token ids are whole numbers: convert the column"
        index = _outside(ids, self.vocabulary)
        why = (
            f"is outside the model's vocabulary of {self.vocabulary}. Tokenise with the model's own tokenizer, or call "
            "model.resize_token_embeddings(len(tokenizer)) before get_model"
        )
        return None if index is None else (index, why)

    def segments_fault(self, segments: np.ndarray | Tensor) -> tuple[Any, str] | None:
        """The index of a segment that has no embedding, and what is wrong with it."""
        if self.segments is None or 0 in segments.shape:
            return None
        index = _outside(segments, self.segments)
        why = (
            f"is outside 0 … {self.segments - 1} (type_vocab_size={self.segments}). Tokenise with the model's own "
            "tokenizer, or drop the column"
        )
        return None if index is None else (index, why)

    def any_counts(self, labels: np.ndarray, row_of: np.ndarray) -> bool:
        """Whether the loss counts one of these labels.

        Args:
            labels: of some whole rows, one after another.
            row_of: the row of each.
        """
        counts = labels != IGNORED
        if self.shifted:
            counts[1:] &= row_of[1:] == row_of[:-1]
            counts[:1] = False
        return bool(counts.any())


def limits_of(model: nn.Module, task: Task, *, own_loss: bool) -> Limits:
    """What this model takes.

    Args:
        own_loss: whether the loss is the user's, so that labels may mean anything.
    """
    base: Any = transformers_model(model)
    config = getattr(base, "config", None)
    if config is None:
        return Limits()
    # A model of several parts may replace placeholder ids by something else before its embedding.
    text = config.get_text_config() is config
    vocabulary = _embeddings(base) if text else None
    if own_loss:
        return Limits(vocabulary=vocabulary)
    limits = _of_labels(base, task, vocabulary)
    if not type(base).__module__.startswith("transformers."):
        return limits  # its forward may cut long rows, or make its own inputs
    takes = inspect.signature(type(base).forward).parameters
    main = base.main_input_name
    if main in takes:
        limits = replace(limits, inputs=(main, *(name for name in _INPUTS if name in takes and name != main)))
    if text and main == "input_ids":
        limits = replace(limits, positions=positions_of(model), segments=segments_of(base))
    # A plugin's term may train on rows without labels.
    alone = not any("loss_terms" in plugin.hooks() for plugin in getattr(plan_of(model), "plugins", ()))
    counted = limits.classes is not None or limits.counts == "choices"
    return replace(
        limits,
        must_count=counted and alone,
        shifted=task.predicts_next and not task.virtual_tokens,
        rows_of_tokens=text and main == "input_ids" and alone and (counted or limits.reals),
    )


def _of_labels(base: Any, task: Task, vocabulary: int | None) -> Limits:
    config = base.config
    match task.name:
        case "SEQ_CLS":
            kind = getattr(config, "problem_type", None)
            if kind == "regression" or (kind is None and config.num_labels == 1):
                return Limits(reals=True, vocabulary=vocabulary)
            classes = config.num_labels if kind in (None, "single_label_classification") else None
            return Limits(classes, reals=kind == "multi_label_classification", vocabulary=vocabulary)
        case "TOKEN_CLS":
            return Limits(config.num_labels, per="token", vocabulary=vocabulary, aligned=True)
        case "MULTIPLE_CHOICE":
            return Limits(counts="choices", vocabulary=vocabulary)
        case "CAUSAL_LM" | "MASKED_LM" | "SEQ_2_SEQ_LM":
            aligned = task.name != "SEQ_2_SEQ_LM"
            return Limits(_outputs(base), "vocabulary", "token", vocabulary=vocabulary, aligned=aligned)
        case _:
            return Limits(vocabulary=vocabulary)


def check_batch(batch: Mapping[str, Any], limits: Limits, name: str, rows: Sequence[int]) -> None:
    """Look at the labels and tokens of a collated batch. On the CPU, where collators work.

    Args:
        rows: the dataset's rows in it, where they are known.
    Raises:
        DataError: names the row, the value, and the fix.
    """
    ids, segments, labels = (_on_cpu(batch, column) for column in ("input_ids", "token_type_ids", "labels"))
    faults: list[tuple[str, Any]] = []
    if ids is not None:
        faults.append(("input_ids", limits.ids_fault(ids)))
    if segments is not None:
        faults.append(("token_type_ids", limits.segments_fault(segments)))
    if labels is not None:
        choices = ids.shape[1] if limits.counts == "choices" and ids is not None and ids.dim() == 3 else None
        if labels.dtype == torch.bool and (limits.classes or limits.reals or choices):
            raise DataError(
                f"{name}: the batch's 'labels' are True and False, which no loss of transformers takes. Convert the "
                "column: whole numbers for classes, floats for several labels in a row."
            )
        several = limits.classes is not None and _is_real(labels) and labels.dim() > 1  # a 0/1 vector for each row
        if not several:
            faults.append(("labels", limits.labels_fault(labels, choices)))
    for column, fault in faults:
        if fault is not None:
            index, why = fault
            value = batch[column][index].item()
            where = _where(name, rows, int(index[0]) if index else 0)
            raise DataError(f"{where}, {column!r}: {value!r} {why}.")
    if ids is not None and ids.dim() > 1:
        _check_rows(ids, batch, limits, name, rows)


def _check_rows(ids: Tensor, batch: Mapping[str, Any], limits: Limits, name: str, rows: Sequence[int]) -> None:
    """Whether each row of a batch is one that the model can read."""
    if limits.rows_of_tokens and not ids.shape[-1]:
        raise DataError(f"{_where(name, rows, 0)} {NO_TOKEN}")
    places, labels, mask = limits.positions, _on_cpu(batch, "labels"), _on_cpu(batch, "attention_mask")
    if places is not None and batch.get("position_ids") is None and ids.shape[-1] + places.virtual > places.size:
        for place, row in enumerate(ids.reshape(-1, ids.shape[-1])):
            if (why := places.fault(row)) is not None:
                raise DataError(f"{_where(name, rows, place * len(ids) * ids.shape[-1] // ids.numel())} {why}.")
    # A mask of floats or of another shape is one that transformers adds to the attention.
    if limits.rows_of_tokens and mask is not None and mask.shape == ids.shape and not _is_real(mask):
        unseen = ~mask.bool().flatten(1).any(1)
        if labels is not None and len(labels) == len(unseen):
            unseen &= (labels != IGNORED).reshape(len(labels), -1).any(1)  # the other rows are padding themselves
        if bool(unseen.any()):
            raise DataError(f"{_where(name, rows, int(unseen.nonzero()[0]))} {UNSEEN}")


NO_TOKEN = "has no token in 'input_ids', so nothing could be learned from it. Drop such rows, or mend their text."
UNSEEN = (
    "has an 'attention_mask' of zeros only, so the model would see none of its tokens. The mask is 1 at tokens, 0 at "
    "padding: mend it, or drop the row."
)


def _where(name: str, rows: Sequence[int], row: int) -> str:
    return f"{name}[{rows[row]}]" if row < len(rows) else f"row {row} of a batch of {name}"


def _on_cpu(batch: Mapping[str, Any], column: str) -> Tensor | None:
    value = batch.get(column)
    return value if isinstance(value, Tensor) and value.device.type == "cpu" else None


def _outside(values: np.ndarray | Tensor, count: int) -> Any:
    """The index of a value that is not 0 … count − 1; None where there is none."""
    if int(values.min()) >= 0 and int(values.max()) < count:
        return None
    return _first((values < 0) | (values >= count))


def _is_real(values: np.ndarray | Tensor) -> bool:
    return values.is_floating_point() if isinstance(values, Tensor) else values.dtype.kind == "f"


def _first(wrong: np.ndarray | Tensor) -> Any:
    """The index of the first True."""
    flat = int(wrong.reshape(-1).nonzero()[0][0])
    return tuple(int(i) for i in np.unravel_index(flat, tuple(wrong.shape))) if len(wrong.shape) else ()


def _embeddings(base: Any) -> int | None:
    try:
        module = base.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    module = getattr(module, "base_layer", module)
    return module.num_embeddings if isinstance(module, torch.nn.Embedding) else None


def _outputs(base: Any) -> int | None:
    module = base.get_output_embeddings()
    module = getattr(module, "base_layer", module)
    return getattr(module, "out_features", None)
