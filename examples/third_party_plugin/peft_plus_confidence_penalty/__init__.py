"""The confidence penalty: a classifier pays for being too sure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from peft_plus import LossTerm, Plugin, Run


@dataclass(kw_only=True)
class ConfidencePenalty(Plugin):
    """Reward predictions for staying uncertain: subtract their entropy from the loss.

    loss = task loss − weight · H(p), H(p) = −Σ p log p, p = softmax(logits), as a mean over what the task's loss
    averages over (Pereyra et al. 2017, arXiv:1701.06548, §3).

    Args:
        weight: β ≥ 0, in units of the loss per nat of entropy; 0 changes nothing.
    Raises:
        ValueError: `weight` is negative, or the task predicts no classes.
    """

    name: ClassVar[str] = "confidence_penalty"
    source: ClassVar[str] = "Pereyra et al. 2017, arXiv:1701.06548"

    weight: float = 0.1

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"weight={self.weight}: give β ≥ 0.")

    def loss_terms(self, run: Run, batch: Mapping[str, Any], output: Any) -> Mapping[str, LossTerm]:
        if self.weight == 0:
            return {}
        if run.task.distribution != "categorical":
            raise ValueError(f"confidence_penalty needs a task with one class per label, not {run.task.name!r}.")
        pairs = run.task.logits(output, batch)
        entropies = [(entropy(logits) * mask).sum() / mask.sum().clamp(min=1) for logits, mask in pairs]
        count = run.task.count(batch)
        return {"confidence_penalty": LossTerm(-self.weight * torch.stack(entropies).mean() * count, count)}


def entropy(logits: Tensor) -> Tensor:
    """H(p) = −Σ p log p of p = softmax(logits), in fp32 and in nats.

    Args:
        logits: (..., classes).
    Returns: (...), between 0 and log(classes).
    """
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)
