"""FEATURE_EXTRACTION: the hidden states themselves; the loss is the user's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from torch import Tensor

from ..plugin import LossTerm
from .base import Distribution, Task, check_positive, keep_last, require_pad
from .seq_cls import text_columns
from .source import Source, token_columns, truncation

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(kw_only=True)
class FeatureExtraction(Task):
    """Hidden states of a text or a pair of texts.

    Attributes:
        text, text_pair: columns; None = found by name, as in SEQ_CLS.
        keep: columns of numbers that go along untouched, for a loss of one's own; all others are left out.
        max_length: tokens per row, ≥ 1; None = the tokenizer's own limit.
    """

    name: ClassVar[str] = "FEATURE_EXTRACTION"
    peft_task_type: ClassVar[str | None] = "FEATURE_EXTRACTION"
    new_head: ClassVar[bool] = False

    text: str | None = None
    text_pair: str | None = None
    keep: Sequence[str] = ()
    max_length: int | None = None

    def __post_init__(self) -> None:
        check_positive(self.max_length, "max_length", self.name)
        if isinstance(self.keep, str):
            raise ValueError(f"{self.name}: `keep` is a list of columns: `keep=[{self.keep!r}]`.")

    def auto_class(self, config: PretrainedConfig) -> type:
        """AutoModel."""
        from transformers import AutoModel

        return AutoModel

    def _encode(self, source: Source, tokenizer: Any) -> Any:
        text, pair = text_columns(source, self.text, self.text_pair)
        kept = [source.require("keep", c) for c in self.keep]
        for column in kept:
            if isinstance(source.dataset[0][column], str):
                raise ValueError(
                    f"{source.where}: column {column!r} (setting `keep`) holds text; a batch is of numbers."
                )
        cut = truncation(tokenizer, self.max_length)

        def encode(columns: dict[str, list[Any]], rows: list[int]) -> dict[str, Any]:
            texts = [source.texts(columns[c], rows, c) for c in (text, pair) if c is not None]
            encoding = source.filled(token_columns(tokenizer(*texts, **cut)), rows)
            return {**encoding, **{c: columns[c] for c in kept}}

        return source.map(encode)

    def collator(self, tokenizer: Any, model: Any = None) -> Callable[..., Any]:
        """DataCollatorWithPadding."""
        from transformers import DataCollatorWithPadding

        require_pad(tokenizer, self.name)
        return DataCollatorWithPadding(tokenizer)

    def count(self, batch: Mapping[str, Any]) -> Tensor | int:
        """Rows, which is what a loss over embeddings usually averages over."""
        return batch["input_ids"].shape[0]

    def loss(self, output: Any, batch: Mapping[str, Any]) -> LossTerm:
        """There is none: raises ValueError."""
        self._refuse("loss")

    def logits(self, output: Any, batch: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """[(last hidden state (B, T, H), mask (B, T))]: real tokens count."""
        tokens = batch["input_ids"]
        mask = batch.get("attention_mask")
        hidden = keep_last(output.last_hidden_state, tokens.shape[1], self.name)
        return [(hidden, torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool())]

    @property
    def distribution(self) -> Distribution:
        """Real: hidden states are compared by distance."""
        return "real"

    def metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        """There are none: raises ValueError."""
        self._refuse("metrics")

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(
            f"{self.name}: a feature extractor has no {what} of its own. Give the trainer yours "
            "(`compute_loss_func=…`, `compute_metrics=…`), or name the task that is learned (`task=`)."
        )
