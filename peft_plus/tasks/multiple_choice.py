"""MULTIPLE_CHOICE: which of several continuations fits a prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .base import Task, check_positive, first_array, labels_of, require_pad
from .source import Source, token_columns, truncation

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(kw_only=True)
class MultipleChoice(Task):
    """One of several choices per row; every row of a dataset has equally many. PEFT has no such task type.

    Attributes:
        prompt: column; None = found by name.
        choices: a column of lists, or several columns; None = `choices`, `endings`, or `ending0`, `ending1`, … .
        stem: column put in front of every choice, with a space (SWAG's `sent2`).
        label: column with the right choice's number, from 0; None = `label` or `labels`.
        max_length: tokens per choice, ≥ 1; None = the tokenizer's own limit.
    """

    name: ClassVar[str] = "MULTIPLE_CHOICE"
    peft_task_type: ClassVar[str | None] = None
    new_head: ClassVar[bool] = True

    prompt: str | None = None
    choices: str | Sequence[str] | None = None
    stem: str | None = None
    label: str | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        check_positive(self.max_length, "max_length", self.name)

    def auto_class(self, config: PretrainedConfig) -> type:
        """AutoModelForMultipleChoice."""
        from transformers import AutoModelForMultipleChoice

        return AutoModelForMultipleChoice

    def _encode(self, source: Source, tokenizer: Any) -> Any:
        prompt = source.find("prompt", self.prompt, ("prompt", "context", "question", "ctx"))
        label = source.find("label", self.label, ("label", "labels"))
        stem = None if self.stem is None else source.require("stem", self.stem)
        columns_of = self._choice_columns(source)
        cut = truncation(tokenizer, self.max_length)
        width = len(choices_of(source.dataset[0], columns_of))

        def encode(columns: dict[str, list[Any]], rows: list[int]) -> dict[str, Any]:
            prompts = source.texts(columns[prompt], rows, prompt)
            stems = [s + " " for s in source.texts(columns[stem], rows, stem)] if stem else [""] * len(rows)
            listed = [choices_of({c: columns[c][i] for c in columns_of}, columns_of) for i in range(len(rows))]
            labels = []
            for i, row in enumerate(rows):
                where = f"{source.where}, row {row}"
                check_choices(listed[i], width, where)
                labels.append(choice_id(columns[label][i], width, where))
            first = [p for p in prompts for _ in range(width)]
            second = [s + c for s, row_choices in zip(stems, listed, strict=True) for c in row_choices]
            flat = token_columns(tokenizer(first, second, **cut))
            nested = {k: [v[i : i + width] for i in range(0, len(v), width)] for k, v in flat.items()}
            return {**nested, "labels": labels}

        return source.map(encode)

    def _choice_columns(self, source: Source) -> list[str]:
        """One column of lists, or two and more columns of text."""
        if isinstance(self.choices, str):
            return [source.require("choices", self.choices)]
        if self.choices is not None:
            return [source.require("choices", c) for c in self.choices]
        for stem in ("ending", "choice"):
            numbered = [f"{stem}{i}" for i in range(len(source.columns)) if f"{stem}{i}" in source.columns]
            if len(numbered) > 1 and numbered[0] == f"{stem}0":
                return numbered
        return [source.find("choices", None, ("choices", "endings"))]

    def collator(self, tokenizer: Any, model: Any = None) -> Callable[..., Any]:
        """DataCollatorForMultipleChoice."""
        from transformers import DataCollatorForMultipleChoice

        require_pad(tokenizer, self.name)
        return DataCollatorForMultipleChoice(tokenizer)

    def count(self, batch: Mapping[str, Any]) -> Tensor | int:
        """Rows: one decision each."""
        return labels_of(batch, self.name).shape[0]

    def logits(self, output: Any, batch: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """[(logits (B, choices), mask (B,))]; every row counts."""
        return [(output.logits, torch.ones(output.logits.shape[0], dtype=torch.bool, device=output.logits.device))]

    def metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        """Accuracy."""
        predicted = np.asarray(first_array(predictions)).argmax(-1)
        return {"accuracy": float((predicted == np.asarray(labels)).mean())}


def choices_of(row: Mapping[str, Any], columns: Sequence[str]) -> Any:
    """The choices of one row, whichever way they are stored."""
    return row[columns[0]] if len(columns) == 1 else [row[c] for c in columns]


def check_choices(choices: Any, width: int, where: str) -> None:
    """Two or more texts, as many as in the first row."""
    if not isinstance(choices, list) or len(choices) < 2 or any(not isinstance(c, str) for c in choices):
        raise ValueError(f"{where}: choices are a list of two or more texts, got {choices!r}.")
    if len(choices) != width:
        raise ValueError(
            f"{where}: {len(choices)} choices, but row 0 has {width}. A batch needs equally many in each row."
        )


def choice_id(value: Any, width: int, where: str) -> int:
    """The right choice's number; some datasets write it as a string."""
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < width:
        raise ValueError(f"{where}: label {value!r} is not the number of a choice, 0..{width - 1}.")
    return number
