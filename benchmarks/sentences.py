"""Models and the sentences that benchmarks train them on: real ones, and tiny ones that show that a benchmark runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Case:
    """One model and its data.

    Attributes:
        title: of the model.
        task: PEFT's name of it.
        base: makes the model without LoRA.
        sentences: tokenised, all there are.
        collate: pads a batch to its longest row.
        examples, batch_size: how many are trained on, and at a time.
    """

    title: str
    task: str
    base: Callable[[], Any]
    sentences: Any
    collate: Any
    examples: int
    batch_size: int


def minilm(examples: int, batch_size: int) -> Case:
    """Classification of movie sentences by MiniLM-L6."""
    from transformers import AutoModelForSequenceClassification

    from examples import inputs

    def base() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(inputs.minilm(), num_labels=2)

    return Case("MiniLM-L6", "SEQ_CLS", base, *tokenised(base, inputs.minilm(), "SEQ_CLS"), examples, batch_size)


def smollm2(examples: int, batch_size: int) -> Case:
    """Movie sentences as text for SmolLM2-135M."""
    from transformers import AutoModelForCausalLM

    from examples import inputs

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(inputs.smollm2())

    data = tokenised(base, inputs.smollm2(), "CAUSAL_LM")
    return Case("SmolLM2-135M", "CAUSAL_LM", base, *data, examples, batch_size)


def tokenised(base: Callable[[], Any], folder: Any, task: str) -> tuple[Any, Any]:
    """All movie sentences in a fixed random order, and the collator of the task."""
    from transformers import AutoTokenizer

    from examples import inputs
    from peft_plus import get_model

    model = get_model(base(), "lora", task=task)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = model.peft_plus.task.preprocess(inputs.sentences("movies").shuffle(seed=0), tokenizer)
    return data, model.peft_plus.task.collator(tokenizer, model)


def tiny(task: str, examples: int, batch_size: int) -> Case:
    """A tiny random model and made-up sentences of uneven length."""
    import torch
    from datasets import Dataset
    from torch.nn.utils.rnn import pad_sequence
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    draw = np.random.default_rng(0)
    texts = [draw.integers(5, 100, length).tolist() for length in draw.integers(3, 40, 96)]
    labels = [text[0] % 2 for text in texts] if task == "SEQ_CLS" else texts

    def base() -> Any:
        if task == "SEQ_CLS":
            return BertForSequenceClassification(BertConfig(**shape, intermediate_size=64))
        return LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=64))

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        ids = pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
        targets = (
            torch.tensor([row["labels"] for row in rows]) if task == "SEQ_CLS" else ids.masked_fill(ids == 0, -100)
        )
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": targets}

    data = Dataset.from_dict({"input_ids": texts, "labels": labels})
    return Case(f"tiny {task}", task, base, data, collate, examples, batch_size)


MODELS: Mapping[str, Callable[[int, int], Case]] = {"minilm": minilm, "smollm2": smollm2}
"""Name → what makes the case of so many examples and such a batch."""


def arguments(case: Case, folder: str, seed: int, *, epochs: int = 1, **more: Any) -> Any:
    """TrainingArguments that write, log and show nothing."""
    from transformers import TrainingArguments

    return TrainingArguments(
        folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=case.batch_size,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **more,
    )
