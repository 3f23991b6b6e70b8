"""The task of a model that nobody named one for: what can be told from logits and labels alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from torch import Tensor

from ..plugin import LossTerm
from .base import IGNORED, Task, keep_last, labels_of, own_loss, summed
from .next_token import has_virtual, shifted_count, shifted_logits

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(kw_only=True)
class GenericTask(Task):
    """Loss and logits of any model with `labels`; everything else needs the task's name and says so.

    Attributes:
        shifts_labels: the model's own loss compares logits[t] with labels[t + 1] (causal language models).
    """

    name: ClassVar[str] = ""
    peft_task_type: ClassVar[str | None] = None
    new_head: ClassVar[bool] = False

    shifts_labels: bool

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> Task:
        """Raises ValueError: a config does not tell a task."""
        raise ValueError('a config alone does not tell the task. Name it: `task="SEQ_CLS"`, …')

    @property
    def predicts_next(self) -> bool:
        """As the model's own loss does."""
        return self.shifts_labels

    def auto_class(self, config: PretrainedConfig) -> type:
        """Raises ValueError."""
        self._refuse("a model class")

    def preprocess(self, dataset: Any, tokenizer: Any) -> Any:
        """Raises ValueError."""
        self._refuse("preprocessing")

    def collator(self, tokenizer: Any, model: Any = None) -> Callable[..., Any]:
        """Raises ValueError."""
        self._refuse("a collator")

    def metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        """Raises ValueError."""
        self._refuse("metrics")

    def count(self, batch: Mapping[str, Any]) -> Tensor | int:
        """Labels that are not −100, but the first of each row where the model shifts; float labels: every number."""
        labels = self._labels(batch)
        if self.shifts_labels:
            return shifted_count(batch, "", virtual=self.virtual_tokens)
        return labels.numel() if labels.is_floating_point() else (labels != IGNORED).sum()

    def loss(self, output: Any, batch: Mapping[str, Any]) -> LossTerm:
        """The model's own mean × count."""
        virtual = self.shifts_labels and has_virtual(output, batch)
        count = shifted_count(batch, "", virtual=True) if virtual else self.count(batch)
        return summed(own_loss(output, batch, self.name), count)

    def logits(self, output: Any, batch: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """One pair, masked by the labels: (B, C) with (B,), or (B, T, V) with (B, T), shifted where the model does."""
        labels, logits = self._labels(batch), getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            self._refuse("logits (the output has no `logits`)")
        if self.shifts_labels:
            return [shifted_logits(output, batch, "")]
        if labels.is_floating_point():
            return [(logits, torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device))]
        if labels.ndim == 2 and logits.ndim == 3:
            logits = keep_last(logits, labels.shape[1], "")
        if logits.shape[:-1] != labels.shape:
            self._refuse(f"a mask (logits {tuple(logits.shape)} do not fit labels {tuple(labels.shape)})")
        return [(logits, labels != IGNORED)]

    def _labels(self, batch: Mapping[str, Any]) -> Tensor:
        if self.shifts_labels and batch.get("shift_labels") is not None:
            return batch["shift_labels"]
        if batch.get("labels") is None:
            self._refuse(f"labels (the batch has only {sorted(batch)})")
        return labels_of(batch, "")

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(f'no task was named, so there is no way to know {what}. Name it: `task="SEQ_CLS"`, …')
