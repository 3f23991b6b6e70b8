"""QUESTION_ANS: the span of a context that answers a question."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .answer_spans import answer_of, best_answer, best_spans, context_offsets, span_f1, token_span
from .base import Task, check_positive, keep_last, labels_of, require_pad
from .source import Source, splits

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_WINDOW = 384


@dataclass(kw_only=True)
class QuestionAnswering(Task):
    """Extractive question answering on SQuAD-like data.

    A context longer than the window becomes several rows, `stride` tokens overlapping; where a window does not hold the
    whole answer, or there is none, both positions are 0.

    Prompt and p-tuning: PEFT puts virtual tokens in front and leaves the positions as they are, so that position p is
    learned and read at index p of the lengthened logits. Loss, `metrics` and `answers` keep to that, or an adapter
    would mean something else in plain PEFT; only `logits` gives the real tokens. Another tuner suits this task better.

    Attributes:
        question, context, answers_column: columns; None = `question`, `context`, `answers`.
        max_length: tokens of question and window together, ≥ 1; None = the tokenizer's limit, at most 384.
        stride: tokens that neighbouring windows share, ≥ 0.
        max_answer_length: tokens a predicted answer may have, ≥ 1.
    """

    name: ClassVar[str] = "QUESTION_ANS"
    peft_task_type: ClassVar[str | None] = "QUESTION_ANS"
    new_head: ClassVar[bool] = True

    question: str | None = None
    context: str | None = None
    answers_column: str | None = None
    max_length: int | None = None
    stride: int = 128
    max_answer_length: int = 30

    def __post_init__(self) -> None:
        check_positive(self.max_length, "max_length", self.name)
        check_positive(self.max_answer_length, "max_answer_length", self.name)
        if isinstance(self.stride, bool) or not isinstance(self.stride, int) or self.stride < 0:
            raise ValueError(f"{self.name}: `stride` must be a whole number ≥ 0, got {self.stride!r}.")

    def auto_class(self, config: PretrainedConfig) -> type:
        """AutoModelForQuestionAnswering."""
        from transformers import AutoModelForQuestionAnswering

        return AutoModelForQuestionAnswering

    def _encode(self, source: Source, tokenizer: Any) -> Any:
        column = source.find("answers_column", self.answers_column, ("answers",))
        question, context = self._columns(source)

        def encode(columns: dict[str, list[Any]], rows: list[int]) -> dict[str, Any]:
            wheres = [f"{source.where}, row {row}" for row in rows]
            encoding = self._windows(source, columns[question], columns[context], rows, tokenizer)
            spans = [answer_of(*x) for x in zip(columns[column], columns[context], wheres, strict=True)]
            examples = encoding["overflow_to_sample_mapping"]
            places = [token_span(context_offsets(encoding, w), spans[e]) for w, e in enumerate(examples)]
            kept = {k: list(encoding[k]) for k in tokenizer.model_input_names if k in encoding}
            return {**kept, "start_positions": [p[0] for p in places], "end_positions": [p[1] for p in places]}

        return source.map(encode)

    def _columns(self, source: Source) -> tuple[str, str]:
        return (
            source.find("question", self.question, ("question",)),
            source.find("context", self.context, ("context",)),
        )

    def _windows(
        self, source: Source, questions: list[Any], contexts: list[Any], rows: list[int], tokenizer: Any
    ) -> Any:
        """Question and context window by window, with offsets; window → row in `overflow_to_sample_mapping`."""
        if not tokenizer.is_fast:
            raise ValueError(f"{self.name} maps characters to tokens, which needs a fast tokenizer.")
        if tokenizer.padding_side != "right":
            raise ValueError(
                f"{self.name}: padding on the left moves the tokens away from their positions. Set "
                "`tokenizer.padding_side = 'right'`."
            )
        question, context = self._columns(source)
        questions, contexts = source.texts(questions, rows, question), source.texts(contexts, rows, context)
        length = self.max_length or min(tokenizer.model_max_length, _WINDOW)
        special = tokenizer.num_special_tokens_to_add(pair=True)
        for row, ids in zip(rows, tokenizer(questions, add_special_tokens=False)["input_ids"], strict=True):
            room = length - len(ids) - special
            if room <= self.stride:
                raise ValueError(
                    f"{source.where}, row {row}: the question's {len(ids)} tokens leave {room} of max_length={length} "
                    f"for the context, and it must exceed stride={self.stride}. Raise `max_length` or lower `stride`."
                )
        return tokenizer(
            questions,
            contexts,
            truncation="only_second",
            max_length=length,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )

    def collator(self, tokenizer: Any, model: Any = None) -> Callable[..., Any]:
        """DataCollatorWithPadding."""
        from transformers import DataCollatorWithPadding

        require_pad(tokenizer, self.name)
        if tokenizer.padding_side != "right":
            raise ValueError(f"{self.name}: positions need `tokenizer.padding_side = 'right'`.")
        return DataCollatorWithPadding(tokenizer)

    def count(self, batch: Mapping[str, Any]) -> Tensor | int:
        """Rows: a start and an end each."""
        return labels_of(batch, self.name, "start_positions").shape[0]

    def logits(self, output: Any, batch: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """[(start (B, T), mask (B,)), (end (B, T), mask (B,))]: the classes are the positions of the batch's tokens."""
        tokens = batch["input_ids"] if batch.get("input_ids") is not None else batch["inputs_embeds"]
        length = tokens.shape[1]
        mask = torch.ones(tokens.shape[0], dtype=torch.bool, device=output.start_logits.device)
        return [(keep_last(x, length, self.name), mask) for x in (output.start_logits, output.end_logits)]

    def metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        """Exact match and F1 of token positions, window by window; `answers` and `text_scores` give SQuAD's own.

        Args:
            predictions: (start logits, end logits), each (N, T).
            labels: (start positions, end positions), each (N,).
        """
        if not isinstance(predictions, tuple | list) or not isinstance(labels, tuple | list):
            raise ValueError(f"{self.name}: metrics take (start, end) logits and (start, end) positions.")
        start, end = (np.asarray(x) for x in predictions[:2])
        predicted = list(zip(*(x.tolist() for x in best_spans(start, end)), strict=True))
        truth = list(zip(*(np.asarray(x).reshape(-1).tolist() for x in labels[:2]), strict=True))
        exact = [float(p == t) for p, t in zip(predicted, truth, strict=True)]
        f1 = [span_f1(p, t) for p, t in zip(predicted, truth, strict=True)]
        return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(f1))}

    def answers(
        self, examples: Any, tokenizer: Any, start: Any, end: Any, *, null_threshold: float | None = None
    ) -> list[str]:
        """The predicted answer to each question, the best over its windows.

        Args:
            examples: the dataset as it was before `preprocess`, same order (one `Dataset`).
            start, end: (windows, T) logits, as `Trainer.predict` gives them for the preprocessed rows.
            null_threshold: answer "" where start[0] + end[0] exceeds the best span's score by more than this, in the
                window most in favour of an answer; None = always answer.
        Raises: ValueError: the logits are not for these examples.
        """
        source = splits(examples, self.name)[None]
        question, context = self._columns(source)
        texts, rows = list(source.dataset[context]), list(range(len(source.dataset)))
        encoding = self._windows(source, list(source.dataset[question]), texts, rows, tokenizer)
        start, end = (np.asarray(x) for x in (start, end))
        owners = encoding["overflow_to_sample_mapping"]
        if len(owners) != len(start) or len(start) != len(end):
            raise ValueError(f"{self.name}: {len(owners)} windows but logits for {len(start)} and {len(end)} rows.")
        best: dict[int, tuple[float, int, int]] = {}
        null: dict[int, float] = {}
        for window, owner in enumerate(owners):
            found = best_answer(start[window], end[window], context_offsets(encoding, window), self.max_answer_length)
            if found is not None and (owner not in best or found[0] > best[owner][0]):
                best[owner] = found
            score = float(start[window][0]) + float(end[window][0])
            null[owner] = min(score, null.get(owner, score))
        return [
            ""
            if r not in best or (null_threshold is not None and null[r] - best[r][0] > null_threshold)
            else texts[r][best[r][1] : best[r][2]]
            for r in rows
        ]
