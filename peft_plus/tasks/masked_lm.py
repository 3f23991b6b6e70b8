"""MASKED_LM: the tokens behind the masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from .base import IGNORED, Task, check_positive, keep_last, labels_of, require_pad
from .next_token import grouped, reduce_logits, token_metrics
from .source import Source, token_columns, truncation

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(kw_only=True)
class MaskedLM(Task):
    """Masked language modelling, e.g. further pretraining on a domain's text. PEFT has no such task type.

    Attributes:
        text: column; None = `text` or `sentence`.
        mlm_probability: share of tokens to predict, in (0, 1]; drawn anew for every batch by the collator.
        group: put texts end to end and cut them into blocks of `max_length` tokens (the last of each 1,000 texts may be
            shorter); False keeps one text per row, cut at `max_length`.
        max_length: tokens per row, ≥ 1; None = the tokenizer's own limit.
    """

    name: ClassVar[str] = "MASKED_LM"
    peft_task_type: ClassVar[str | None] = None
    new_head: ClassVar[bool] = False

    text: str | None = None
    mlm_probability: float = 0.15
    group: bool = False
    max_length: int | None = None

    def __post_init__(self) -> None:
        check_positive(self.max_length, "max_length", self.name)
        if not 0 < self.mlm_probability <= 1:
            raise ValueError(f"{self.name}: `mlm_probability` lies in (0, 1], got {self.mlm_probability!r}.")

    def auto_class(self, config: PretrainedConfig) -> type:
        """AutoModelForMaskedLM."""
        from transformers import AutoModelForMaskedLM

        return AutoModelForMaskedLM

    def _encode(self, source: Source, tokenizer: Any) -> Any:
        text = source.find("text", self.text, ("text", "sentence"))
        cut = truncation(tokenizer, self.max_length)
        if self.group and not cut["truncation"]:
            raise ValueError(f"{self.name}: `group=True` needs `max_length` (the tokenizer has no limit of its own).")

        def encode(columns: dict[str, list[Any]], rows: list[int]) -> dict[str, Any]:
            texts = source.texts(columns[text], rows, text)
            if not self.group:
                return source.filled(token_columns(tokenizer(texts, **cut)), rows)
            # Tokenised one by one without a limit: what is too long for a row goes on in the next one.
            blocks = grouped(
                (tokenizer(t, truncation=False, verbose=False)["input_ids"] for t in texts), cut["max_length"]
            )
            return {"input_ids": blocks, "attention_mask": [[1] * len(b) for b in blocks]}

        return source.map(encode)

    def collator(self, tokenizer: Any, model: Any = None) -> Callable[..., Any]:
        """DataCollatorForLanguageModeling, which masks. A batch may by chance hold no mask: its loss is 0."""
        from transformers import DataCollatorForLanguageModeling

        require_pad(tokenizer, self.name)
        if tokenizer.mask_token_id is None:
            raise ValueError(f"{self.name}: the tokenizer has no mask token; use CAUSAL_LM for this model, or set one.")
        return DataCollatorForLanguageModeling(tokenizer, mlm_probability=self.mlm_probability)

    def logits(self, output: Any, batch: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """[(logits (B, T, V), mask (B, T))]: masked positions count."""
        labels = labels_of(batch, self.name)
        return [(keep_last(output.logits, labels.shape[1], self.name), labels != IGNORED)]

    def preprocess_logits_for_metrics(self, logits: Any, labels: Any) -> tuple[Tensor, Tensor]:
        """−log p and hit per label, (B, T) each, so that evaluation does not hold the vocabulary."""
        return reduce_logits(logits, labels, shift=False)

    def metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        """Perplexity and accuracy of the masked tokens."""
        return token_metrics(predictions, labels, shift=False, where=self.name)
