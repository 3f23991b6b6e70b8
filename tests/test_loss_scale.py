"""An optimizer step's gradient is that of one big batch, whatever the accumulation; a plain run is PEFT's.

Every expected gradient comes from a copy of the model and a few lines of plain torch over the recorded batches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import default_data_collator

import peft_plus
from peft_plus import get_model, with_plugins

from .models import NUM_CHOICES, PAD, VOCAB, tiny
from .scale import (
    PROBLEMS,
    Gradients,
    Recorder,
    arguments,
    distance,
    expected,
    model_of,
    rows_of,
    run,
    summed_loss,
    windows,
)


def check_windows(recorder: Recorder, accumulation: int, gradient: Callable[[Sequence[Any]], Gradients]) -> None:
    parts = windows(recorder.batches, accumulation)
    assert len(parts) == len(recorder.gradients)
    for part, got in zip(parts, recorder.gradients, strict=True):
        assert distance(got, gradient(part)) < 1e-6


CASES = [
    *((name, "SEQ_CLS") for name in ("bert", "roberta", "distilbert", "deberta-v2", "llama")),
    ("bert", "multi_label_classification"),
    ("bert", "regression"),
    ("bert", "TOKEN_CLS"),
    ("bert", "QUESTION_ANS"),
    ("bert", "MULTIPLE_CHOICE"),
    ("bert", "MASKED_LM"),
    ("t5", "SEQ_2_SEQ_LM"),
    ("bart", "SEQ_2_SEQ_LM"),
    ("llama", "CAUSAL_LM"),
    ("gpt2", "CAUSAL_LM"),
]


# ---- (a) the task's gradient -------------------------------------------------------------------------------------


@pytest.mark.parametrize("planned", [True, False], ids=["get_model", "no_plan"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(("name", "task"), CASES)
def test_accumulation_gives_the_gradient_of_one_big_batch(name, task, accumulation, planned, tmp_path):
    model = model_of(name, task)
    untouched = copy.deepcopy(model)
    if planned:
        model = get_model(model, "full")
    size = 16 // accumulation
    recorder = run(
        model,
        rows_of(name, task),
        tmp_path,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
    )
    assert len(recorder.gradients) == 1
    check_windows(recorder, accumulation, lambda part: expected(untouched, part, task))


@pytest.mark.parametrize(("name", "task"), CASES)
def test_the_last_window_may_be_short(name, task, tmp_path):
    """10 examples in batches of 4, two to an update: windows of 8 and 2."""
    model = model_of(name, task)
    untouched = copy.deepcopy(model)
    recorder = run(
        get_model(model, "full"),
        rows_of(name, task, 10),
        tmp_path,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
    )
    by_epoch = [recorder.batches[:3], recorder.batches[3:]]
    assert [[len(next(iter(b.values()))) for b in epoch] for epoch in by_epoch] == [[4, 4, 2]] * 2
    parts = [part for epoch in by_epoch for part in windows(epoch, 2)]
    assert len(recorder.gradients) == 4
    for part, got in zip(parts, recorder.gradients, strict=True):
        assert distance(got, expected(untouched, part, task)) < 1e-6


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    ("name", "task"),
    [case for case in CASES if case[1] not in (*PROBLEMS, "QUESTION_ANS")],
)
def test_label_smoothing(name, task, accumulation, tmp_path):
    model = model_of(name, task)
    untouched = copy.deepcopy(model)
    recorder = run(
        get_model(model, "full"),
        rows_of(name, task),
        tmp_path,
        per_device_train_batch_size=16 // accumulation,
        gradient_accumulation_steps=accumulation,
        label_smoothing_factor=0.2,
    )
    check_windows(recorder, accumulation, lambda part: expected(untouched, part, task, 0.2))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(
    ("name", "task"),
    [("bert", "TOKEN_CLS"), ("bert", "MASKED_LM"), ("t5", "SEQ_2_SEQ_LM"), ("llama", "CAUSAL_LM"), ("bert", "SEQ_CLS")],
)
def test_a_micro_batch_without_labels_adds_nothing(name, task, smoothing, tmp_path):
    model = model_of(name, task)
    untouched = copy.deepcopy(model)
    rows = rows_of(name, task, 4)
    rows[2]["labels"] = torch.full_like(rows[2]["labels"], -100)
    recorder = run(
        get_model(model, "full"),
        rows,
        tmp_path,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        label_smoothing_factor=smoothing,
    )
    assert len(recorder.gradients) == 1
    check_windows(recorder, 4, lambda part: expected(untouched, part, task, smoothing))


@pytest.mark.parametrize("tuner", ["prompt_tuning", "prefix_tuning", "lora"])
def test_every_token_a_label_under_virtual_tokens(tuner, tmp_path):
    """Nothing predicts a row's first token but a virtual one in front: only there it counts."""
    settings = {"r": 4, "init_lora_weights": False} if tuner == "lora" else {"num_virtual_tokens": 3}
    model = get_model(model_of("llama", "CAUSAL_LM"), tuner, task="CAUSAL_LM", **settings)
    untouched = copy.deepcopy(model).train()
    recorder = run(
        model, rows_of("llama", "CAUSAL_LM"), tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=4
    )
    total, labels = torch.zeros(()), 0
    for data in recorder.batches:
        logits = untouched(**{k: v for k, v in data.items() if k != "labels"}).logits
        wanted = data["labels"] if tuner == "prompt_tuning" else data["labels"][:, 1:]
        scores = logits[:, -1 - wanted.shape[1] : -1]
        total = total + F.cross_entropy(scores.flatten(0, 1), wanted.flatten(), reduction="sum")
        labels += int((wanted != -100).sum())
    (total / labels).backward()
    expected = {n: p.grad for n, p in untouched.named_parameters() if p.grad is not None}
    assert expected
    assert distance(recorder.gradients[0], expected) < 1e-6


COEFFICIENT = 0.5
"""Of the router's loss: as large as the task's, so that its scale shows."""


def tiny_mixtral() -> nn.Module:
    """A mixture of experts that adds a router loss to its own."""
    config = transformers.MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
        router_aux_loss_coef=COEFFICIENT,
        pad_token_id=PAD,
    )
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(config)


class WithoutItems(transformers.Trainer):
    """Does not hand the count on, so the model gives the mean over a micro-batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    ("trainer_class", "smoothing"),
    [(transformers.Trainer, 0.0), (transformers.Trainer, 0.2), (WithoutItems, 0.0)],
    ids=["plain", "label_smoothing", "without_items"],
)
def test_a_router_loss_is_the_mean_over_the_micro_batches(trainer_class, smoothing, accumulation, tmp_path):
    """However their numbers of labels differ. transformers adds it whole to each; its label smoother leaves it out."""
    model = tiny_mixtral()
    untouched = copy.deepcopy(model).train()
    recorder = run(
        model,
        rows_of("llama", "CAUSAL_LM"),
        tmp_path,
        trainer_class=with_plugins(trainer_class),
        per_device_train_batch_size=16 // accumulation,
        gradient_accumulation_steps=accumulation,
        label_smoothing_factor=smoothing,
    )
    parts = [summed_loss(untouched, data, "CAUSAL_LM", smoothing) for data in recorder.batches]
    loss = sum(part for part, _ in parts) / sum(labels for _, labels in parts)
    if not smoothing:
        router = [untouched(**data).aux_loss for data in recorder.batches]
        loss = loss + COEFFICIENT * sum(router) / len(router)
    loss.backward()
    expected = {n: p.grad for n, p in untouched.named_parameters() if p.grad is not None}
    assert distance(recorder.gradients[0], expected) < 1e-6


def test_a_lora_model_too(tmp_path):
    for name, task in (("bert", "TOKEN_CLS"), ("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")):
        model = get_model(model_of(name, task), "lora", r=4)
        for tensor in model.parameters():  # B starts at 0, which would hide A's gradient
            if tensor.requires_grad:
                nn.init.normal_(tensor, std=0.1)
        untouched = copy.deepcopy(model.get_base_model())
        recorder = run(
            model, rows_of(name, task), tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=4
        )
        got = {n.removeprefix("base_model.model."): g for n, g in recorder.gradients[0].items()}
        assert distance(got, expected(untouched, recorder.batches, task)) < 1e-6


def test_stock_transformers_is_four_times_too_large(tmp_path):
    """transformers#47688. When this fails they have fixed it, and `scales_by_items` in losses.py may go."""
    model = model_of("bert", "SEQ_CLS")
    untouched = copy.deepcopy(model)
    recorder = run(
        model,
        rows_of("bert", "SEQ_CLS"),
        tmp_path,
        trainer_class=transformers.Trainer,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
    )
    wanted = expected(untouched, recorder.batches, "SEQ_CLS")
    assert distance(recorder.gradients[0], {n: 4 * g for n, g in wanted.items()}) < 1e-6


def test_stock_transformers_miscounts_the_labels_of_gpt2(tmp_path):
    """It counts each row's first label, which GPT-2 never predicts, so its losses come out too small.

    Hence GPT-2 is no case of `test_a_plain_lora_run_is_bit_identical_to_peft`. When this fails they have fixed it.
    """
    model = model_of("gpt2", "CAUSAL_LM")
    untouched = copy.deepcopy(model)
    recorder = run(
        model,
        rows_of("gpt2", "CAUSAL_LM"),
        tmp_path,
        trainer_class=transformers.Trainer,
        per_device_train_batch_size=16,
    )
    labels = recorder.batches[0]["labels"] != -100
    share = float(labels[:, 1:].sum() / labels.sum())
    wanted = expected(untouched, recorder.batches, "CAUSAL_LM")
    assert distance(recorder.gradients[0], {n: share * g for n, g in wanted.items()}) < 1e-6


def test_the_logged_loss_is_the_mean_over_the_step(tmp_path):
    model = model_of("bert", "TOKEN_CLS")
    untouched = copy.deepcopy(model)
    recorder = Recorder()
    trainer = peft_plus.Trainer(
        get_model(model, "full"),
        arguments(
            tmp_path,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            logging_steps=1,
        ),
        train_dataset=rows_of("bert", "TOKEN_CLS"),
        data_collator=recorder.collate,
    )
    trainer.train()
    with torch.no_grad():
        parts = [summed_loss(untouched, b, "TOKEN_CLS") for b in recorder.batches]
    wanted = float(sum(loss for loss, _ in parts) / sum(n for _, n in parts))
    assert trainer.state.log_history[0]["loss"] == pytest.approx(wanted, rel=1e-3)


# ---- (b) a drop-in -----------------------------------------------------------------------------------------------

SMOOTHED = ("SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM")
DROP_IN = [
    ("bert", "SEQ_CLS"),
    ("bert", "TOKEN_CLS"),
    ("bert", "regression"),
    ("bert", "QUESTION_ANS"),
    ("llama", "CAUSAL_LM"),
    ("llama", "SEQ_CLS"),
    ("t5", "SEQ_2_SEQ_LM"),
    ("bart", "SEQ_2_SEQ_LM"),
]


def lora_of(name: str, task: str, *, plan: bool) -> nn.Module:
    dropout = {"hidden_dropout_prob": 0.1} if name == "bert" else {"attention_dropout": 0.1} if name == "llama" else {}
    if task == "regression":
        base = tiny(name, problem_type=task, num_labels=1, **dropout)
    else:
        base = tiny(name, task, **dropout)
    torch.manual_seed(1)
    kind = "SEQ_CLS" if task == "regression" else task
    config = peft.LoraConfig(r=4, lora_dropout=0.1, task_type=kind)
    return get_model(base, config) if plan else peft.get_peft_model(base, config)


def five_steps(trainer_class: type[Any], model: nn.Module, name: str, task: str, folder: Any, **settings: Any):
    rows = rows_of(name, task, 20)
    trainer = trainer_class(
        model,
        arguments(
            folder,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=8,
            optim="adamw_torch",
            learning_rate=1e-2,
            weight_decay=0.1,
            max_grad_norm=1.0,
            lr_scheduler_type="linear",
            logging_steps=1,
            **settings,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=default_data_collator,
    )
    trainer.train()
    weights = {n: t.detach().clone() for n, t in model.state_dict().items()}
    return weights, trainer.evaluate()["eval_loss"], [x["loss"] for x in trainer.state.log_history if "loss" in x]


@pytest.mark.parametrize("plan", [True, False], ids=["get_model", "plain_peft"])
@pytest.mark.parametrize(
    ("name", "task", "smoothing"),
    [(*case, smoothing) for case in DROP_IN for smoothing in (0.0, 0.2) if not smoothing or case[1] in SMOOTHED],
)
def test_a_plain_lora_run_is_bit_identical_to_peft(name, task, smoothing, plan, tmp_path):
    theirs = five_steps(
        transformers.Trainer,
        lora_of(name, task, plan=False),
        name,
        task,
        tmp_path / "theirs",
        label_smoothing_factor=smoothing,
    )
    ours = five_steps(
        peft_plus.Trainer,
        lora_of(name, task, plan=plan),
        name,
        task,
        tmp_path / "ours",
        label_smoothing_factor=smoothing,
    )
    assert ours[0].keys() == theirs[0].keys()
    different = [n for n, t in ours[0].items() if not torch.equal(t, theirs[0][n])]
    assert not different
    assert ours[1:] == theirs[1:]


class Line(nn.Module):
    """A model that transformers has never seen: no config, no labels under that name."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 1)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        guess = self.line(x)[:, 0]
        return {"loss": (guess - y).square().mean(), "guess": guess}


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_stranger_model_trains_as_under_transformers(accumulation, tmp_path):
    draw = torch.Generator().manual_seed(0)
    rows = [{"x": torch.randn(3, generator=draw), "y": torch.randn((), generator=draw)} for _ in range(16)]
    trained = []
    for trainer_class in (transformers.Trainer, peft_plus.Trainer):
        torch.manual_seed(0)
        model = Line()
        settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulation, "learning_rate": 0.1}
        run(model, rows, tmp_path, trainer_class=trainer_class, **settings)
        trained.append(model.line.weight.detach().clone())
    assert torch.equal(*trained)


def test_the_rows_are_as_ragged_as_the_tests_need():
    counts = {int((row["labels"] != -100).sum()) for row in rows_of("bert", "TOKEN_CLS")}
    assert len(counts) >= 4
    assert rows_of("bert", "MULTIPLE_CHOICE")[0]["input_ids"].shape[0] == NUM_CHOICES
    assert all(int(row["labels"].max()) < VOCAB for row in rows_of("llama", "CAUSAL_LM"))
