"""Consistency losses by hand: two passes of a plain model and their distance, for every kind of task."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback, TrainingArguments, default_data_collator

import peft_plus

from .models import MASK, NUM_LABELS, PAD, batch, tiny
from .training import quiet

TASKS = [
    ("bert", "SEQ_CLS"),
    ("bert", "multi_label_classification"),
    ("bert", "regression"),
    ("bert", "TOKEN_CLS"),
    ("bert", "QUESTION_ANS"),
    ("bert", "MASKED_LM"),
    ("bert", "MULTIPLE_CHOICE"),
    ("llama", "CAUSAL_LM"),
    ("llama", "SEQ_CLS"),
    ("t5", "SEQ_2_SEQ_LM"),
    ("bart", "SEQ_2_SEQ_LM"),
]


def lively(name: str, task: str | None = None, **overrides: Any) -> nn.Module:
    """A tiny model with weights ten times the usual size, whose predictions feel the noise."""
    model = tiny(name, task, **overrides)
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2, generator=draw)
    return model


def model_and_batch(name: str, task: str, rows: int = 4) -> tuple[nn.Module, dict[str, Tensor]]:
    """A lively model and a batch for it; `task` may also be a `problem_type` of SEQ_CLS."""
    if task == "multi_label_classification":
        data = batch(name, rows=rows)
        data["labels"] = torch.randint(0, 2, (rows, NUM_LABELS), generator=torch.Generator().manual_seed(0)).float()
        return lively(name, problem_type=task), data
    if task == "regression":
        data = batch(name, rows=rows)
        data["labels"] = data["labels"].float()
        return lively(name, problem_type=task, num_labels=1), data
    data = batch(name, task, rows=rows)
    if (name, task) == ("llama", "SEQ_CLS"):  # given `inputs_embeds` it cannot find the last token before the padding
        data["input_ids"] = data["input_ids"].clamp(min=MASK + 1)
        data["attention_mask"] = torch.ones_like(data["attention_mask"])
    return lively(name, task), data


def two_passes(model: nn.Module, name: str, data: Mapping[str, Tensor], noise: Tensor) -> tuple[Any, Any]:
    """The outputs of both passes, the second through `inputs_embeds`.

    Args:
        noise: of the embeddings' shape, in whatever rows.
    """
    inputs = {k: v for k, v in data.items() if k not in ("labels", "start_positions", "end_positions")}
    if name in ("t5", "bart"):
        labels = data["labels"]
        start = model.config.decoder_start_token_id
        before = labels[:, :-1].masked_fill(labels[:, :-1] == -100, PAD)
        inputs["decoder_input_ids"] = torch.cat([torch.full_like(labels[:, :1], start), before], 1)
        embeddings = model.get_encoder().embed_tokens
    else:
        embeddings = model.get_input_embeddings()
    ids = inputs.pop("input_ids")
    embedded = embeddings(ids)
    noised = model(inputs_embeds=embedded + noise.view(embedded.shape), **inputs)
    return model(input_ids=ids, **inputs), noised


def kl_both_ways(a: Tensor, b: Tensor) -> Tensor:
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    there = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    return there + F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)


def summed_distance(task: str, data: Mapping[str, Tensor], clean: Any, noised: Any) -> tuple[Tensor, int]:
    """Σ of the distances, and over how many of them."""
    match task:
        case "QUESTION_ANS":
            start = kl_both_ways(clean.start_logits, noised.start_logits)
            end = kl_both_ways(clean.end_logits, noised.end_logits)
            return (start + end).sum() / 2, len(start)
        case "regression":
            return (clean.logits - noised.logits).square().sum(), clean.logits.numel()
        case "multi_label_classification":
            pairs = [torch.stack([x.logits, torch.zeros_like(x.logits)], -1) for x in (clean, noised)]
            return kl_both_ways(*pairs).sum(), clean.logits.numel()
        case "SEQ_CLS" | "MULTIPLE_CHOICE":
            return kl_both_ways(clean.logits, noised.logits).sum(), len(clean.logits)
    a, b, labels = clean.logits, noised.logits, data["labels"]
    if task == "CAUSAL_LM":
        a, b, labels = a[:, :-1], b[:, :-1], labels[:, 1:]
    known = labels != -100
    return kl_both_ways(a, b)[known].sum(), int(known.sum())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def distance(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    zero = torch.zeros(())
    gap = sum((got.get(n, zero) - wanted.get(n, zero)).double().square().sum() for n in got.keys() | wanted.keys())
    return float((gap / sum(g.double().square().sum() for g in wanted.values())).sqrt())


def arguments(folder: Any, **settings: Any) -> TrainingArguments:
    defaults = {
        "learning_rate": 1e-2,
        "logging_strategy": "no",
        "max_steps": 2,
        "per_device_train_batch_size": 4,
    }
    return quiet(folder, **{**defaults, **settings})


def accumulated(rows: int, micro_batches: int) -> dict[str, Any]:
    """Settings that make one step of so many rows in so many micro-batches, and leave its gradient as it is."""
    return {
        "per_device_train_batch_size": rows // micro_batches,
        "gradient_accumulation_steps": micro_batches,
        "max_grad_norm": 0.0,
    }


def trainer_of(model: nn.Module, rows: Sequence[Any], folder: Any, callbacks: Any = (), **settings: Any) -> Any:
    return peft_plus.Trainer(
        model,
        arguments(folder, **settings),
        train_dataset=list(rows),
        data_collator=default_data_collator,
        callbacks=list(callbacks),
    )


class Grab(TrainerCallback):
    """The gradient of the first update, and the collated batches."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self.gradients = self.gradients or gradients(model)


def sampler_order(number: int) -> Tensor:
    """The rows as the Trainer's sampler hands them out, seen through a run of its own."""
    seen: list[Tensor] = []

    class Identity(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            seen.append(x)
            return {"loss": self.w * x.sum()}

    with tempfile.TemporaryDirectory() as folder:
        rows = [{"x": torch.tensor(float(i))} for i in range(number)]
        trainer_of(Identity(), rows, folder, max_steps=1, per_device_train_batch_size=number).train()
    return seen[0].long()
