"""CAUSAL_LM: the next token, of a text or of what follows a prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..plugin import LossTerm
from .base import IGNORED, Task, check_positive, own_loss, require_pad, summed
from .next_token import (
    has_virtual,
    reduce_logits,
    shifted_count,
    shifted_logits,
    token_metrics,
)
from .source import Source, truncation

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(kw_only=True)
class CausalLM(Task):
    """Next-token prediction.

    Prompt and completion are tokenised apart, as they will be when the model is asked to complete a prompt. The first
    token of a row is never a label: without a prompt tuner nothing predicts it, and with one the objective stays equal.

    Attributes:
        text: column of whole texts; None = `text`, unless there are `prompt` and `completion`.
        prompt, completion: columns; None = found under these names.
        completion_only: the prompt's tokens are no labels.
        append_eos: close every row with the eos token, which is a label, even where it is also the pad token.
        max_length: tokens per row, ≥ 1; None = the tokenizer's own limit. What is beyond is cut, eos included.
    """

    name: ClassVar[str] = "CAUSAL_LM"
    peft_task_type: ClassVar[str | None] = "CAUSAL_LM"
    new_head: ClassVar[bool] = False

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    completion_only: bool = True
    append_eos: bool = True
    max_length: int | None = None

    def __post_init__(self) -> None:
        check_positive(self.max_length, "max_length", self.name)
        if self.text is not None and (self.prompt is not None or self.completion is not None):
            raise ValueError(f"{self.name}: rows are either `text` or `prompt` + `completion`, not both.")

    @property
    def predicts_next(self) -> bool:
        """True."""
        return True

    def auto_class(self, config: PretrainedConfig) -> type:
        """AutoModelForCausalLM."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def _encode(self, source: Source, tokenizer: Any) -> Any:
        if self.append_eos and tokenizer.eos_token_id is None:
            raise ValueError(f"{self.name}: the tokenizer has no eos token. Set one, or use `append_eos=False`.")
        prompt, completion = self._columns(source)
        limit = truncation(tokenizer, self.max_length).get("max_length")
        end = [tokenizer.eos_token_id] if self.append_eos else []

        def encode(columns: dict[str, list[Any]], rows: list[int]) -> dict[str, Any]:
            heads: list[list[int]] = [[] for _ in rows]
            if prompt is not None:
                texts = source.texts(columns[prompt], rows, prompt)
                heads = [without_end(ids, tokenizer.eos_token_id) for ids in plain(tokenizer(texts))]
            texts = source.texts(columns[completion], rows, completion)
            bodies = plain(tokenizer(texts, add_special_tokens=prompt is None))
            encoding: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "labels": []}
            for row, head, body in zip(rows, heads, bodies, strict=True):
                ids = [*head, *(without_end(body, tokenizer.eos_token_id) if end else body), *end][:limit]
                masked = min(len(ids), max(1, len(head) if self.completion_only else 1))
                labels = [IGNORED] * masked + ids[masked:]
                if len(labels) == masked:
                    raise ValueError(
                        f"{source.where}, row {row}: no token is left to learn ({len(head)} prompt tokens, {len(body)} "
                        f"after it, max_length={limit}). Shorten the prompt, raise `max_length`, or remove the row."
                    )
                for key, value in (("input_ids", ids), ("attention_mask", [1] * len(ids)), ("labels", labels)):
                    encoding[key].append(value)
            return encoding

        return source.map(encode)

    def _columns(self, source: Source) -> tuple[str | None, str]:
        """(prompt column or None, column of what is learned)."""
        pair = {"prompt", "completion"} <= set(source.columns) and self.text is None
        if pair or self.prompt is not None or self.completion is not None:
            prompt = source.find("prompt", self.prompt, ("prompt",))
            return prompt, source.find("completion", self.completion, ("completion",))
        return None, source.find("text", self.text, ("text", "content"))

    def collator(self, tokenizer: Any, model: Any = None) -> Callable[..., Any]:
        """DataCollatorForSeq2Seq: pads the labels as given.

        (The one for language modelling makes labels of the inputs and would drop a real eos that doubles as pad.)
        """
        from transformers import DataCollatorForSeq2Seq

        require_pad(tokenizer, self.name)
        return DataCollatorForSeq2Seq(tokenizer)

    def count(self, batch: Mapping[str, Any]) -> Tensor | int:
        """Labels but the first of each row, which only a virtual token could predict; or all `shift_labels`."""
        return shifted_count(batch, self.name, virtual=self.virtual_tokens)

    def loss(self, output: Any, batch: Mapping[str, Any]) -> LossTerm:
        """Mean × count. Under virtual tokens the model also counts a row's first label, and so does this."""
        count = shifted_count(batch, self.name, virtual=has_virtual(output, batch))
        return summed(own_loss(output, batch, self.name), count)

    def logits(self, output: Any, batch: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """[(logits (B, T − 1, V), mask (B, T − 1))]: logits[:, t] predicts labels[:, t + 1]."""
        return [shifted_logits(output, batch, self.name)]

    def preprocess_logits_for_metrics(self, logits: Any, labels: Any) -> tuple[Tensor, Tensor]:
        """−log p and hit per label, (B, T − 1) each, so that evaluation does not hold the vocabulary."""
        return reduce_logits(logits, labels, shift=True)

    def metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        """Perplexity and accuracy of the next token."""
        return token_metrics(predictions, labels, shift=True, where=self.name)


def plain(encoding: Any) -> list[list[int]]:
    """Token ids of each row."""
    return [list(ids) for ids in encoding["input_ids"]]


def without_end(ids: list[int], eos: int | None) -> list[int]:
    """Some tokenizers close every text with eos: not wanted in the middle, nor twice at the end."""
    return ids[:-1] if ids and eos is not None and ids[-1] == eos else ids
