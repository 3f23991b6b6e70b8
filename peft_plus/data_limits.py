"""Which labels and token ids a model can take, and whether a batch holds others.

A label out of range is an IndexError on a CPU, after hours perhaps, and on a GPU a device assert that names nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import DataError
from .layers import transformers_model
from .tasks import Task
from .tasks.base import IGNORED


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
    """

    classes: int | None = None
    counts: str = "num_labels"
    per: str = "row"
    reals: bool = False
    vocabulary: int | None = None
    aligned: bool = False

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
            return first, "is a whole number, and the loss of this model takes floats: convert the column"
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
        if self.vocabulary is None or _is_real(ids):
            return None
        wrong = (ids < 0) | (ids >= self.vocabulary)
        if not bool(wrong.any()):
            return None
        return _first(wrong), (
            f"is outside the model's vocabulary of {self.vocabulary}. Tokenise with the model's own tokenizer, or call "
            "model.resize_token_embeddings(len(tokenizer)) before get_model"
        )


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
    vocabulary = _embeddings(base) if config.get_text_config() is config else None
    if own_loss:
        return Limits(vocabulary=vocabulary)
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
    """Look at the labels and token ids of a collated batch. On the CPU, where collators work.

    Args:
        rows: the dataset's rows in it, where they are known.
    Raises:
        DataError: names the row, the value, and the fix.
    """
    ids, labels = batch.get("input_ids"), batch.get("labels")
    faults: list[tuple[str, Any]] = []
    if isinstance(ids, Tensor) and ids.device.type == "cpu":
        faults.append(("input_ids", limits.ids_fault(ids)))
    if isinstance(labels, Tensor) and labels.device.type == "cpu":
        choices = ids.shape[1] if limits.counts == "choices" and isinstance(ids, Tensor) and ids.dim() == 3 else None
        several = limits.classes is not None and _is_real(labels) and labels.dim() > 1  # a 0/1 vector for each row
        if not several:
            faults.append(("labels", limits.labels_fault(labels, choices)))
    for column, fault in faults:
        if fault is not None:
            index, why = fault
            value = batch[column][index].item()
            row = int(index[0]) if index else 0
            where = f"{name}[{rows[row]}]" if row < len(rows) else f"row {row} of a batch of {name}"
            raise DataError(f"{where}, {column!r}: {value!r} {why}.")


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
