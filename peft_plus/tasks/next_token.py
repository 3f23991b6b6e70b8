"""Losses and scores over tokens: shifting for models that predict the next one, perplexity, accuracy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import IGNORED, keep_last, labels_of


def shifted_count(batch: Mapping[str, Any], where: str, virtual: bool = False) -> Tensor:
    """Labels that a next-token loss averages over, shape ().

    The first label has nothing before it that could predict it — except under `virtual` tokens, which PEFT puts in
    front: the last of them predicts it, and the model's own loss counts it.
    """
    if batch.get("shift_labels") is not None:
        return (batch["shift_labels"] != IGNORED).sum()
    labels = labels_of(batch, where)
    return ((labels if virtual else labels[..., 1:]) != IGNORED).sum()


def has_virtual(output: Any, batch: Mapping[str, Any]) -> bool:
    """Whether a prompt tuner lengthened the sequence. Decided by shapes alone."""
    logits, labels = getattr(output, "logits", None), batch.get("labels")
    return logits is not None and labels is not None and logits.ndim == 3 and logits.shape[1] > labels.shape[1]


def shifted_logits(output: Any, batch: Mapping[str, Any], where: str) -> tuple[Tensor, Tensor]:
    """(logits (B, T − 1, V), mask (B, T − 1)), logits[:, t] predicting labels[:, t + 1].

    Where the batch brings `shift_labels`, which are shifted already: (B, T, V) and (B, T).
    """
    if batch.get("shift_labels") is not None:
        targets = batch["shift_labels"]
        return keep_last(output.logits, targets.shape[1], where), targets != IGNORED
    labels = labels_of(batch, where)
    return keep_last(output.logits, labels.shape[1], where)[:, :-1], labels[:, 1:] != IGNORED


def token_scores(logits: Tensor, labels: Tensor, *, shift: bool) -> tuple[Tensor, Tensor]:
    """What evaluation needs of the logits, without the vocabulary: per label, −log p and whether it came first.

    Args:
        logits: (B, positions, V), positions ≥ T.
        labels: (B, T); −100 gives 0 in both results.
    Returns: both fp32, (B, T), or (B, T − 1) when shifted.
    """
    kept = keep_last(logits, labels.shape[1], "metrics")
    if shift:
        kept, labels = kept[:, :-1], labels[:, 1:]
    known = labels != IGNORED
    targets = labels.clamp(min=0)
    nll = torch.nn.functional.cross_entropy(kept.float().transpose(1, 2), targets, reduction="none")
    return nll * known, (kept.argmax(-1) == targets).float() * known


def reduce_logits(logits: Any, labels: Any, *, shift: bool) -> tuple[Tensor, Tensor]:
    """`token_scores` in the form of Trainer's `preprocess_logits_for_metrics`."""
    return token_scores(logits[0] if isinstance(logits, tuple | list) else logits, labels, shift=shift)


def token_metrics(predictions: Any, labels: Any, *, shift: bool, where: str) -> dict[str, float]:
    """Perplexity and accuracy over every label that is not −100.

    Args:
        predictions: logits (N, T, V), or the pair that `reduce_logits` gave, each (N, T) or (N, T − 1).
        labels: (N, T).
    """
    labels = np.asarray(labels)
    parts = predictions if isinstance(predictions, tuple | list) else (predictions,)
    first = np.asarray(parts[0])
    if first.ndim == 3:
        # Row by row: a copy in fp32 of all logits at once may not fit.
        virtual = first.shape[1] - labels.shape[1]
        rows = [
            token_scores(torch.as_tensor(x[None, virtual:]), torch.as_tensor(y[None]), shift=shift)
            for x, y in zip(first, labels, strict=True)
        ]
        nll, right = (torch.cat(column).numpy() for column in zip(*rows, strict=True))
    elif first.ndim == 2 and len(parts) == 2:
        nll, right = first, np.asarray(parts[1])
    else:
        raise ValueError(
            f"{where}: predictions of shape {first.shape} are not logits (N, T, V). Generated tokens "
            "(`predict_with_generate`) have no perplexity: score them with a metric of your own."
        )
    known = (labels[:, 1:] if shift else labels) != IGNORED
    number = int(known.sum())
    if number == 0:
        raise ValueError(f"{where}: not one label in the evaluation set (all are −100).")
    mean = float(nll[known].astype(np.float64).sum() / number)
    perplexity = math.exp(mean) if mean < 700 else math.inf
    return {"perplexity": perplexity, "accuracy": float(right[known].sum() / number)}


def grouped(sequences: Iterable[Sequence[int]], length: int) -> list[list[int]]:
    """All sequences end to end, cut into blocks of `length` tokens; the last one holds what is left."""
    flat = [token for sequence in sequences for token in sequence]
    return [flat[i : i + length] for i in range(0, len(flat), length)]
