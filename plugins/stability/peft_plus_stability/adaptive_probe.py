"""What `adaptive` reads off the data before a run: their balance, what a linear probe can do, and how long to train."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score

from peft_plus import Run
from peft_plus.seed_runs.statistics import largest_share

WANTED_STEPS = 600
"""Optimizer steps that a run should have, at least, as far as `MOST_EPOCHS` allow."""
FEWEST_EPOCHS, MOST_EPOCHS = 3, 20
SKEWED = 0.8
"""The share of the largest class from which on the others decide how much data there are."""
SOLVED = 0.9
"""The share of what a linear probe could win over the largest class, from which on the lower half is left frozen."""
PROBED = 1_000
FOLDS = 5


@dataclass(frozen=True)
class Seen:
    """What a pass over the data found.

    Attributes:
        rows: how many there are.
        labels: the classes of all rows that have one, (≤ rows,); empty where there is nothing to classify.
        features: what the last block makes of a sample, averaged over its tokens, (≤ 1000, width); None without probe.
        of: the classes of the sample, (≤ 1000,).
    """

    rows: int
    labels: np.ndarray
    features: np.ndarray | None = None
    of: np.ndarray | None = None


def look_at(run: Run, *, probe: bool) -> Seen:
    """One pass over the data. The sample is drawn from all of them alike, whatever their order."""
    classifies = run.task.name == "SEQ_CLS" and run.task.distribution == "categorical"
    draw = run.generator("adaptive")
    rows, labels, features, of = 0, list[int](), list[torch.Tensor](), list[int]()
    for batch in run.examples(16):
        tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
        rows += len(tensors[0])
        own = batch.get("labels")
        if not classifies or not isinstance(own, torch.Tensor) or own.dim() != 1 or own.is_floating_point():
            continue
        places: dict[int, int] = {}
        for row, label in enumerate(own.tolist()):
            if label < 0:
                continue
            labels.append(label)
            if probe and run.num_blocks:
                place = _place(len(labels), draw)
                if place is not None:
                    places[place] = row  # a later row of this batch may take it over
        if places:
            found = _features(run, batch, list(places.values()))
            missing = max(places) + 1 - len(features)
            features += [found[0]] * missing
            of += [0] * missing
            for (place, row), feature in zip(places.items(), found, strict=True):
                features[place], of[place] = feature, int(own[row])
    if not features:
        return Seen(rows, np.array(labels, dtype=int))
    return Seen(rows, np.array(labels, dtype=int), torch.stack(features).numpy(), np.array(of))


def _place(number: int, draw: torch.Generator) -> int | None:
    """Where in the sample the `number`-th row (from 1) goes, or None: Vitter's reservoir, algorithm R."""
    if number <= PROBED:
        return number - 1
    place = int(torch.randint(number, (1,), generator=draw))
    return place if place < PROBED else None


def _features(run: Run, batch: Mapping[str, Any], rows: list[int]) -> torch.Tensor:
    """(rows, width), fp32, on the CPU."""
    size = len(batch["labels"])
    own = {
        name: value[rows] if isinstance(value, torch.Tensor) and value.dim() and len(value) == size else value
        for name, value in batch.items()
    }
    hidden = run.hidden(own, run.num_blocks).float()
    mask = own.get("attention_mask")
    if mask is None:
        return hidden.mean(1).cpu()
    hidden = hidden[:, -mask.shape[1] :]  # without a prompt's virtual tokens
    weights = mask.to(hidden.device).float()[..., None]
    return ((hidden * weights).sum(1) / weights.sum(1).clamp(min=1)).cpu()


def share_of(labels: np.ndarray) -> float | None:
    """The share of the largest class, in (0, 1]; None without labels."""
    return largest_share(labels) if len(labels) else None


def counted(rows: int, share: float | None) -> int:
    """As how many examples the data count.

    Where the largest class holds 80 % or more: twice as many as the other classes hold together, which is what a set
    would have in which it holds half. With two classes that is twice the rarer one. At least 1.

    Args:
        rows: how many there are.
        share: of the largest class; None where there are no classes. One that holds all of them counts in full.
    """
    if share is None or not SKEWED <= share < 1:
        return rows
    return max(1, round(2 * (1 - share) * rows))


def epochs_for(steps: float) -> int:
    """Passes over the data so that there are about 600 steps, from 3 to 20.

    Args:
        steps: of one pass, > 0, or what it counts as.
    """
    return min(MOST_EPOCHS, max(FEWEST_EPOCHS, round(WANTED_STEPS / max(steps, 1.0))))


def probe_gain(features: np.ndarray, labels: np.ndarray) -> float | None:
    """What a linear probe wins of what there is to win over the largest class: (accuracy − share) / (1 − share).

    By five-fold cross-validated logistic regression on standardised features.

    Args:
        features: (n, width).
        labels: (n,).
    Returns: at most 1, and less than 0 where it is worse than the largest class; None where a class has fewer than five
        examples, or there is only one.
    """
    counts = np.unique(labels, return_counts=True)[1]
    if len(counts) < 2 or counts.min() < FOLDS:
        return None
    scaled = (features - features.mean(0)) / (features.std(0) + 1e-6)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # how well it does after 500 iterations is the question
        accuracy = cross_val_score(LogisticRegression(max_iter=500), scaled, labels, cv=folds).mean()
    share = counts.max() / counts.sum()
    return float((accuracy - share) / (1 - share))
