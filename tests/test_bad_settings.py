"""Bad settings of a run: arguments, metrics, optimizers, models. Found before the first pass, and nothing is changed.

Refused by Trainer and tested elsewhere: a compiled model, prefix tuning with checkpointing, a second tuner
(test_arguments), a folder that cannot be written (test_trainer_checkpoint), Session's own arguments (test_session).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from torch.utils.data import IterableDataset
from transformers import AutoModelForSequenceClassification, EarlyStoppingCallback, TrainerCallback

import peft_plus
from peft_plus import DataError, EngagementError, MethodError, PluginError, Session, TrainingError, attach, get_model

from .bad_inputs import Watched, after, built, free, holds, refused, rows, same, stopped, trainer, weights
from .models import config, tiny

NAN = float("nan")

# ---- numbers -----------------------------------------------------------------------------------------------------

ARGUMENTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a rate of zero": ({"learning_rate": 0.0}, ("learning_rate=0.0", "> 0")),
    "a negative rate": ({"learning_rate": -1e-4}, ("learning_rate=-0.0001", "> 0")),
    "a rate that is no number": ({"learning_rate": NAN}, ("learning_rate=nan", "> 0")),
    "an infinite rate": ({"learning_rate": float("inf")}, ("learning_rate=inf", "finite")),
    "no steps": ({"max_steps": 0}, ("max_steps=0", "≥ 1", "num_train_epochs")),
    "no epochs": ({"max_steps": -1, "num_train_epochs": 0}, ("num_train_epochs=0", "> 0", "max_steps")),
    "negative epochs": ({"max_steps": -1, "num_train_epochs": -1}, ("num_train_epochs=-1", "> 0")),
    "no rows in a batch": ({"per_device_train_batch_size": 0}, ("per_device_train_batch_size=0", "≥ 1")),
    "no micro-batches": ({"gradient_accumulation_steps": 0}, ("gradient_accumulation_steps=0", "≥ 1")),
    "a clipping norm that is no number": ({"max_grad_norm": NAN}, ("max_grad_norm=nan", "0 for no clipping")),
    "an infinite weight decay": ({"weight_decay": float("inf")}, ("weight_decay=inf", "finite")),
    "a rate that is text": ({"learning_rate": "1e-3"}, ("learning_rate='1e-3'", "> 0")),
    "a weight decay that is text": ({"weight_decay": "0.1"}, ("weight_decay='0.1'", "finite number")),
    "no rows to evaluate in a batch": ({"per_device_eval_batch_size": 0}, ("per_device_eval_batch_size=0", "≥ 1")),
    "a beta of Adam above 1": ({"optim": "adamw_torch", "adam_beta1": 1.5}, ("adam_beta1=1.5", "below 1")),
    "an epsilon of zero": ({"optim": "adamw_torch", "adam_epsilon": 0.0}, ("adam_epsilon=0.0", "> 0")),
    "too much label smoothing": ({"label_smoothing_factor": 1.0}, ("label_smoothing_factor=1.0", "below 1")),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case: str, tmp_path: Path) -> None:
    given, says = ARGUMENTS[case]
    model = built()
    before = weights(model)
    refused(lambda: trainer(model, tmp_path, **given), MethodError, "TrainingArguments", *says)
    refused(
        lambda: peft_plus.fit(
            model, trainer(built(), tmp_path).args.__class__(**_arguments(tmp_path, given)), train_dataset=rows()
        ),
        MethodError,
        *says,
    )
    assert same(model, before)


def _arguments(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    return {"output_dir": str(folder), "max_steps": 2, "use_cpu": True, "report_to": [], **given}


def test_arguments_that_were_changed_after_the_trainer_was_built(tmp_path: Path) -> None:
    run = trainer(built(), tmp_path)
    run.args.learning_rate = NAN
    refused(run.train, MethodError, "learning_rate=nan")


def test_settings_of_adam_are_adams_own(tmp_path: Path) -> None:
    trainer(built(), tmp_path, max_steps=1, adam_epsilon=0.0, adam_beta1=1.5).train()  # SGD


def test_the_rate_of_an_optimizer_of_ones_own_is_its_own(tmp_path: Path) -> None:
    given = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1}), "learning_rate": 0.0}
    trainer(built(), tmp_path, max_steps=1, **given).train()


# ---- metrics -----------------------------------------------------------------------------------------------------

EVALUATES = {"eval_strategy": "steps", "eval_steps": 2}
BEST = {**EVALUATES, "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}

METRICS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a metric that nobody computes": (
        {**BEST, "metric_for_best_model": "f1"},
        ("metric_for_best_model='f1' will never come", "compute_metrics=model.peft_plus.task.compute_metrics"),
    ),
    "a metric with the prefix that nobody computes": (
        {**EVALUATES, "metric_for_best_model": "eval_accuracy"},
        ("'eval_accuracy' will never come", "loss, runtime"),
    ),
    "the loss of several sets": (
        {**BEST, "metric_for_best_model": "loss", "eval_dataset": {"a": rows(), "b": rows()}},
        ("several sets", "e.g. 'eval_a_loss'"),
    ),
    "a metric of one of several sets that nobody computes": (
        {**BEST, "metric_for_best_model": "a_f1", "eval_dataset": {"a": rows(), "b": rows()}},
        ("'a_f1' will never come",),
    ),
    "the best model without an evaluation": (
        {"load_best_model_at_end": True, "save_strategy": "no"},
        ("best model is to be kept", "eval_strategy='no' never evaluates", "eval_strategy='steps'"),
    ),
    "the best checkpoint without an evaluation": (
        {"save_strategy": "best", "metric_for_best_model": "loss"},
        ("best model is to be kept", "never evaluates"),
    ),
    "early stopping without an evaluation": (
        {"callbacks": [EarlyStoppingCallback()], "metric_for_best_model": "loss"},
        ("EarlyStoppingCallback stops by an evaluation", "eval_strategy='steps'"),
    ),
    "early stopping without a metric": (
        {"callbacks": [EarlyStoppingCallback()], **EVALUATES},
        ("EarlyStoppingCallback needs", "metric_for_best_model"),
    ),
    "early stopping by a metric that nobody computes": (
        {"callbacks": [EarlyStoppingCallback()], **EVALUATES, "metric_for_best_model": "f1"},
        ("'f1' will never come",),
    ),
}


@pytest.mark.parametrize("case", METRICS)
def test_a_metric_that_never_comes(case: str, tmp_path: Path) -> None:
    given, says = METRICS[case]
    given = {"eval_dataset": rows(), **given}
    model = built()
    before, watch = weights(model), Watched(model)
    refused(trainer(model, tmp_path, **given).train, MethodError, *says)
    assert watch.passes == 0
    assert same(model, before)


@pytest.mark.parametrize(
    "given",
    [
        {"metric_for_best_model": "loss"},
        {"metric_for_best_model": "eval_loss"},
        {"metric_for_best_model": "samples_per_second"},
        {"metric_for_best_model": "eval_b_loss", "eval_dataset": {"a": rows(count=4), "b": rows(count=4)}},
        {"metric_for_best_model": "accuracy", "compute_metrics": lambda prediction: {"accuracy": 0.5}},
    ],
)
def test_metrics_that_do_come(given: dict[str, Any], tmp_path: Path) -> None:
    given = {"eval_dataset": rows(count=4), **BEST, **given, "max_steps": 2}
    assert trainer(built(), tmp_path, **given).train().global_step == 2


class Several(TrainerCallback):
    """Notes what was logged."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        self.metrics = metrics


@pytest.mark.parametrize("value", [[0.5, 0.1], "fair", None, np.float32(0.5), torch.tensor(0.5), np.int64(3), NAN])
def test_metrics_that_are_only_logged_may_be_what_a_checkpoint_can_hold(value: Any, tmp_path: Path) -> None:
    told = Several()
    given = {"eval_dataset": rows(count=4), **EVALUATES, "max_steps": 2, "callbacks": [told], "save_strategy": "steps"}
    trainer(built(), tmp_path, compute_metrics=lambda prediction: {"mine": value}, **given).train()
    assert "eval_mine" in told.metrics


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), torch.tensor(0.5), np.int64(3), True])
def test_any_number_can_choose_the_best_model(value: Any, tmp_path: Path) -> None:
    given = {"eval_dataset": rows(count=4), **BEST, "max_steps": 2, "metric_for_best_model": "f1"}
    metrics = {"f1": value, "macro_f1": [0.5, 0.1]}
    assert trainer(built(), tmp_path, compute_metrics=lambda prediction: metrics, **given).train().global_step == 2


def test_arrays_in_a_log_that_is_not_saved(tmp_path: Path) -> None:
    given = {"eval_dataset": rows(count=4), **EVALUATES, "max_steps": 2, "save_strategy": "no"}
    trainer(built(), tmp_path, compute_metrics=lambda prediction: {"each": np.ones(3)}, **given).train()


def broken_metrics(prediction: Any) -> dict[str, float]:
    raise KeyError("label 3")


FIRST_EVALUATION: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a metric of another name": (
        {"compute_metrics": lambda prediction: {"accuracy": 0.5}, **BEST, "metric_for_best_model": "f1"},
        ("metric_for_best_model='f1' is not among", "at step 2", "eval_accuracy", "choose another"),
    ),
    "a metric that raises": (
        {"compute_metrics": broken_metrics, **EVALUATES},
        ("compute_metrics .broken_metrics. failed: KeyError: 'label 3'", "trainer.evaluate"),
    ),
    "a metric that returns a number": (
        {"compute_metrics": lambda prediction: 0.5, **EVALUATES},
        ("compute_metrics .*<lambda>. returned 0.5", "mapping"),
    ),
    "a best metric that is text": (
        {"compute_metrics": lambda prediction: {"f1": "good"}, **BEST, "metric_for_best_model": "f1"},
        ("compute_metrics .*<lambda>. returned 'f1': 'good'", "metric_for_best_model", "a single number"),
    ),
    "a best metric of one of several sets that is a list": (
        {
            "eval_dataset": {"a": rows(count=4)},
            "compute_metrics": lambda prediction: {"f1": [0.5, 0.1]},
            **BEST,
            "metric_for_best_model": "eval_a_f1",
        },
        (r"returned 'f1': \[0.5, 0.1\]", "a single number"),
    ),
    "a metric that no checkpoint can hold": (
        {"compute_metrics": lambda prediction: {"each": np.ones(3)}, **EVALUATES, "save_strategy": "steps"},
        ("returned 'each': array", "ndarray", "tolist"),
    ),
    "a metric that returns nothing": ({"compute_metrics": lambda prediction: None, **EVALUATES}, ("returned None",)),
    "a bad row to evaluate on": (
        {"eval_dataset": [*rows()[:5], {"input_ids": rows()[0]["input_ids"], "labels": 0}], **EVALUATES},
        (r"eval_dataset\[", "Rows differ in their columns"),
    ),
}


@pytest.mark.parametrize("case", FIRST_EVALUATION)
def test_what_only_the_first_evaluation_can_tell_loses_nothing(case: str, tmp_path: Path) -> None:
    """Two steps are done when it comes."""
    given, says = FIRST_EVALUATION[case]
    expected = after(2, built("ia3"), tmp_path)
    model = built("ia3")
    run = trainer(model, tmp_path, **{"eval_dataset": rows(count=4), "per_device_eval_batch_size": 16, **given})
    error = {"a bad row to evaluate on": DataError, "a metric that raises": TrainingError}.get(case, MethodError)
    refused(run.train, error, *says, "after 2 finished steps")
    assert same(model, expected)
    assert holds(stopped(tmp_path), expected)
    assert free(model)
    assert run.compute_metrics is given.get("compute_metrics")


class Breaks(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise OSError("the dashboard is down")


@pytest.mark.parametrize("saves", [False, True])
def test_a_callback_of_the_users_that_raises_keeps_its_error(saves: bool, tmp_path: Path) -> None:
    expected = after(3, built(), tmp_path)
    model = built()
    saving = {"save_strategy": "steps", "save_steps": 1} if saves else {}
    refused(trainer(model, tmp_path, callbacks=[Breaks()], **saving).train, OSError, "^the dashboard is down")
    assert same(model, expected)
    assert holds(stopped(tmp_path), expected)


def test_what_a_checkpoint_holds_is_not_saved_twice(tmp_path: Path) -> None:
    given = {"compute_metrics": broken_metrics, "eval_strategy": "steps", "eval_steps": 4}
    run = trainer(built(), tmp_path, eval_dataset=rows(count=4), save_strategy="steps", save_steps=2, **given)
    refused(run.train, TrainingError, "compute_metrics", "after 4 finished steps")
    assert (tmp_path / "stopped").is_dir()  # the checkpoint of step 4 would have come after the evaluation


# ---- optimizers --------------------------------------------------------------------------------------------------


def test_an_optimizer_of_another_model(tmp_path: Path) -> None:
    model, other = built(), built()
    before = weights(model)
    optimizer = torch.optim.SGD([t for t in other.parameters() if t.requires_grad], lr=0.1)
    run = trainer(model, tmp_path, optimizers=(optimizer, None))
    refused(run.train, MethodError, "parameters may train but are not in the optimizer", "optimizer_cls_and_kwargs")
    assert same(model, before)
    assert free(model)


def test_an_optimizer_over_the_head_alone(tmp_path: Path) -> None:
    model = built()
    optimizer = torch.optim.SGD([t for n, t in model.named_parameters() if "classifier" in n], lr=0.1)
    refused(
        trainer(model, tmp_path, optimizers=(optimizer, None)).train, MethodError, "12 parameters may train", "lora_A"
    )


def test_a_sessions_optimizer_over_the_head_alone() -> None:
    model = built()
    head = [t for n, t in model.named_parameters() if "classifier" in n]
    session = Session(model, Accelerator(cpu=True), max_steps=2)
    refused(lambda: session.optimizer(torch.optim.SGD, params=head, lr=0.1), MethodError, "not in the optimizer")


def test_an_optimizer_that_does_nothing_fails_the_proof(tmp_path: Path) -> None:
    class Idle(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            return None

    run = trainer(built(), tmp_path, optimizer_cls_and_kwargs=(Idle, {"lr": 0.1}))
    refused(run.train, EngagementError, "declared trainable, yet no tensor of it moved")


# ---- models and methods ------------------------------------------------------------------------------------------


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(rows())


def test_a_schedule_in_epochs_for_data_without_a_length(tmp_path: Path) -> None:
    model = built(["lora", "gradual_unfreeze"])
    before, watch = weights(model), Watched(model)
    says = ("plugin 'gradual_unfreeze' .peft-plus-freezing", "every='epoch'", "every=<optimizer steps>")
    run = trainer(model, tmp_path, Stream())
    refused(run.train, PluginError, *says)
    assert run.optimizer is None
    session = Session(model, Accelerator(cpu=True), max_steps=2)
    refused(lambda: session.loader(Stream(), 4), PluginError, *says)
    assert watch.passes == 0
    assert same(model, before)


def test_a_model_without_memory() -> None:
    with torch.device("meta"):
        hollow = AutoModelForSequenceClassification.from_config(config("bert", num_labels=2))
    for method in ("lora", "full", ["lora", "llrd"]):
        refused(lambda m=method: get_model(hollow, m), MethodError, "meta device", "bert.embeddings", "from_pretrained")
    assert not hasattr(hollow, "peft_config")
    refused(lambda: attach(hollow, "llrd"), MethodError, "meta device")
    assert not hasattr(hollow, "peft_plus")


def test_a_misspelt_model_kwarg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("bert").save_pretrained(tmp_path)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(transformers.PreTrainedModel, "_load_pretrained_model", never)

    def call(**given: Any) -> Any:
        return lambda: get_model(tmp_path, "lora", task="SEQ_CLS", num_labels=3, model_kwargs=given)

    refused(
        call(atn_implementation="eager"), MethodError, "'atn_implementation'", "Did you mean 'attn_implementation'?"
    )
    refused(call(revison="main"), MethodError, "'revison'", "Did you mean 'revision'?", "No weights were loaded")
    refused(call(qqq=1), MethodError, "model_kwargs holds 'qqq'", "neither from_pretrained nor BertForSequence")


def test_a_wrapped_model(tmp_path: Path) -> None:
    model = built(["lora", "llrd"])
    wrapped = torch.nn.DataParallel(model)
    refused(
        lambda: peft_plus.Trainer(wrapped, trainer(model, tmp_path).args), MethodError, "DataParallel", "hides its plan"
    )
    refused(lambda: Session(wrapped, Accelerator(cpu=True), max_steps=1), MethodError, "DataParallel", "hides its plan")


def test_weights_that_were_frozen_or_added_by_hand(tmp_path: Path) -> None:
    model = built()
    name, tensor = next((n, t) for n, t in model.named_parameters() if "lora_A" in n)
    tensor.requires_grad_(False)
    refused(trainer(model, tmp_path).train, MethodError, "1 parameters of the plan were frozen by hand", name, "attach")
    tensor.requires_grad_(True)
    model.get_input_embeddings().weight.requires_grad_(True)
    refused(trainer(model, tmp_path).train, MethodError, "made trainable after the plan", "attach")
