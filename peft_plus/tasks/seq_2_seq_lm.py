"""SEQ_2_SEQ_LM: a target text from a source text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from .base import IGNORED, Task, check_positive, keep_last, labels_of, require_pad
from .next_token import reduce_logits, token_metrics
from .source import Source, token_columns, truncation

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PAIRS = (
    ("source", "target"),
    ("input", "output"),
    ("document", "summary"),
    ("article", "highlights"),
    ("text", "summary"),
)


@dataclass(kw_only=True)
class Seq2SeqLM(Task):
    """A target text from a source text.

    Attributes:
        source, target: columns; None = found by name (source + target, document + summary, …).
        prefix: put in front of every source as it is, e.g. `"summarize: "`.
        max_length, max_target_length: tokens, ≥ 1; None = the tokenizer's own limit.
    """

    name: ClassVar[str] = "SEQ_2_SEQ_LM"
    peft_task_type: ClassVar[str | None] = "SEQ_2_SEQ_LM"
    new_head: ClassVar[bool] = False

    source: str | None = None
    target: str | None = None
    prefix: str = ""
    max_length: int | None = None
    max_target_length: int | None = None

    def __post_init__(self) -> None:
        check_positive(self.max_length, "max_length", self.name)
        check_positive(self.max_target_length, "max_target_length", self.name)
        if (self.source is None) != (self.target is None):
            raise ValueError(f"{self.name}: name both `source` and `target`, or neither.")

    def auto_class(self, config: PretrainedConfig) -> type:
        """AutoModelForSeq2SeqLM."""
        from transformers import AutoModelForSeq2SeqLM

        return AutoModelForSeq2SeqLM

    def _encode(self, source: Source, tokenizer: Any) -> Any:
        text, target = self._columns(source)
        cut = truncation(tokenizer, self.max_length)
        cut_target = truncation(tokenizer, self.max_target_length)

        def encode(columns: dict[str, list[Any]], rows: list[int]) -> dict[str, Any]:
            texts = [self.prefix + t for t in source.texts(columns[text], rows, text)]
            targets = source.texts(columns[target], rows, target)
            encoding = source.filled(token_columns(tokenizer(texts, **cut)), rows)
            labels = tokenizer(text_target=targets, **cut_target)["input_ids"]
            limit = cut_target.get("max_length")
            encoding["labels"] = [closed(list(ids), tokenizer.eos_token_id, limit) for ids in labels]
            for row, ids in zip(rows, encoding["labels"], strict=True):
                if not ids:
                    raise ValueError(
                        f"{source.where}, row {row}: the target gives no tokens. Fill it or remove the row."
                    )
            return encoding

        return source.map(encode)

    def _columns(self, source: Source) -> tuple[str, str]:
        if self.source is not None and self.target is not None:
            return source.require("source", self.source), source.require("target", self.target)
        found = [p for p in PAIRS if set(p) <= set(source.columns)]
        if len(found) != 1:
            why = f"columns {found} could each be" if found else f"no columns for (looked for {list(PAIRS)})"
            raise ValueError(
                f"{source.where}: {why} `source` and `target`. The columns are {source.columns}. Name them: "
                "`source=…, target=…`."
            )
        return found[0]

    def collator(self, tokenizer: Any, model: Any = None) -> Callable[..., Any]:
        """DataCollatorForSeq2Seq. With the model it also makes `decoder_input_ids`: a loss of one's own needs them."""
        from transformers import DataCollatorForSeq2Seq

        require_pad(tokenizer, self.name)
        return DataCollatorForSeq2Seq(tokenizer, model=model)

    def logits(self, output: Any, batch: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """[(logits (B, T, V), mask (B, T))], T the target's length."""
        labels = labels_of(batch, self.name)
        return [(keep_last(output.logits, labels.shape[1], self.name), labels != IGNORED)]

    def preprocess_logits_for_metrics(self, logits: Any, labels: Any) -> tuple[Tensor, Tensor]:
        """−log p and hit per label, (B, T) each, so that evaluation does not hold the vocabulary."""
        return reduce_logits(logits, labels, shift=False)

    def metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        """Perplexity and accuracy of the target's tokens, each given the true ones before it."""
        return token_metrics(predictions, labels, shift=False, where=self.name)


def closed(ids: list[int], eos: int | None, limit: int | None) -> list[int]:
    """`ids` with an eos if the tokenizer put none and there is room: a model must learn where to stop."""
    full = limit is not None and len(ids) >= limit
    return ids if eos is None or eos in ids or full else [*ids, eos]
