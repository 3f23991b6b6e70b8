"""A user's own Trainer class: the step's gradient is the one its loss promises, and terms weigh what they say.

Where a class takes something away on which a plan depends, an error says so.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments, default_data_collator

import peft_plus
from peft_plus import MethodError, get_model, with_plugins

from .models import tiny
from .scale import (
    Gradients,
    Pull,
    arguments,
    check_pulled,
    distance,
    expected,
    mean_of,
    model_of,
    rows_of,
    run,
    with_free,
)
from .test_added_terms import PullLogits
from .tokenizers import tiny_tokenizer
from .training import quiet

# ---- its loss ----------------------------------------------------------------------------------------------------


def cross_entropy(outputs: Any, labels: Tensor, reduction: str) -> Tensor:
    """BERT predicts a class, Llama the next token."""
    logits = outputs.logits
    if logits.dim() == 3:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction=reduction)


class HandsAllOn(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class HandsOnByName(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return super().compute_loss(model, inputs, return_outputs, **kwargs)


class ForgetsTheItems(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs)


class ReturnsTheLossAlone(transformers.Trainer):
    """Whatever `return_outputs` says."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)


class Divides(transformers.Trainer):
    """Its own sum, over the step's count."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = cross_entropy(outputs, labels, "sum") / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


class SaysThatItIsAMean(transformers.Trainer):
    """Which the Trainer then divides by the accumulation, though the loss it hands on is scaled already."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)


class CopiesTheTrainer(transformers.Trainer):
    """An older version's code, handing the count to whatever model has `**kwargs`."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            inputs = {**inputs, "num_items_in_batch": num_items_in_batch}
        outputs = model(**inputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]


class Mean(transformers.Trainer):
    """As most tutorials write it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = cross_entropy(outputs, labels, "mean")
        return (loss, outputs) if return_outputs else loss


class MeanOfTheModel(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **_):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class DividesByTheAccumulation(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = cross_entropy(outputs, labels, "mean") / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


class DividesAndSaysSo(DividesByTheAccumulation):
    loss_is_scaled_for_ga = True


class MeanFurtherDown(Mean):
    """Changes nothing of the mean that its base computes."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)


class SaysThatItsHelperIsAMean(transformers.Trainer):
    """Nobody could read that: it hands the count to a helper, which looks away."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.mean(model, inputs, return_outputs, num_items_in_batch)

    def mean(self, model, inputs, return_outputs, count):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class OwnStep(transformers.Trainer):
    """Replaces the step, by the Trainer's rule for what is divided."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        if num_items_in_batch is None:
            loss = loss / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()


MODELS = [("bert", "SEQ_CLS"), ("llama", "CAUSAL_LM")]
BIG_BATCH = (
    HandsAllOn,
    HandsOnByName,
    ForgetsTheItems,
    ReturnsTheLossAlone,
    Divides,
    SaysThatItIsAMean,
    CopiesTheTrainer,
    OwnStep,
)
MEAN_OF_MEANS = (
    Mean,
    MeanOfTheModel,
    MeanFurtherDown,
    SaysThatItsHelperIsAMean,
    DividesByTheAccumulation,
    DividesAndSaysSo,
)


def of_big_batch(model: nn.Module, batches: Sequence[dict[str, Tensor]], task: str) -> Gradients:
    return expected(model, batches, task)


def of_means(model: nn.Module, batches: Sequence[dict[str, Tensor]], task: str) -> Gradients:
    """A loss that never sees the step's count can be no more than the mean of its micro-batches' means."""
    return mean_of([expected(model, [data], task) for data in batches])


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(("name", "task"), MODELS)
@pytest.mark.parametrize(
    ("own", "oracle"),
    [*((own, of_big_batch) for own in BIG_BATCH), *((own, of_means) for own in MEAN_OF_MEANS)],
)
def test_the_gradient_of_an_own_loss(own, oracle, name, task, accumulation, tmp_path):
    trainer_class = with_plugins(own)
    assert issubclass(trainer_class, own)
    untouched = model_of(name, task)
    recorder = run(
        get_model(with_free(model_of(name, task)), ["full", Pull()]),
        rows_of(name, task),
        tmp_path,
        trainer_class=trainer_class,
        per_device_train_batch_size=16 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    (got,) = recorder.gradients
    check_pulled(got)
    assert distance(got, oracle(untouched, recorder.batches, task)) < 1e-6


class HandsTheCountToAHelper(SaysThatItsHelperIsAMean):
    loss_is_scaled_for_ga = None


def made_of_text() -> type[transformers.Trainer]:
    """A class whose source nobody finds."""
    names: dict[str, Any] = {"transformers": transformers}
    exec(
        "class Unreadable(transformers.Trainer):\n"
        "    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):\n"
        "        return model(**inputs).loss\n",
        names,
    )
    return names["Unreadable"]


@pytest.mark.parametrize("own", [HandsTheCountToAHelper, made_of_text()])
def test_a_loss_that_cannot_be_read_is_told_of(own, tmp_path, caplog):
    def told(trainer_class, accumulation, base):
        caplog.clear()
        args = quiet(tmp_path, gradient_accumulation_steps=accumulation)
        with_plugins(trainer_class)(get_model(base, "lora"), args)
        return [record.getMessage() for record in caplog.records if "cannot be read" in record.getMessage()]

    llama = tiny("llama", "CAUSAL_LM")
    (message,) = told(own, 4, copy.deepcopy(llama))
    assert "compute_loss divides by num_items_in_batch" in message
    assert "4 times too large: set loss_is_scaled_for_ga = False" in message
    assert told(own, 1, copy.deepcopy(llama)) == []
    for readable in (Mean, Divides, Tripled, CopiesTheTrainer, SaysThatItsHelperIsAMean, transformers.Trainer):
        for base in (copy.deepcopy(llama), tiny("bert")):
            assert told(readable, 4, base) == []


def test_a_mean_that_draws_random_numbers_is_known_for_one(tmp_path):
    """Two calls of it differ, but not by the count."""

    def noisy(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs.logits + 1e-4 * torch.randn_like(outputs.logits), labels)

    untouched = model_of("bert", "SEQ_CLS")
    recorder = run(
        get_model(model_of("bert", "SEQ_CLS"), "full"),
        rows_of("bert", "SEQ_CLS"),
        tmp_path,
        trainer={"compute_loss_func": noisy},
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
    )
    assert distance(recorder.gradients[0], expected(untouched, recorder.batches, "SEQ_CLS")) < 1e-2


class Tripled(transformers.Trainer):
    """Asks the Trainer for its loss and changes it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch=num_items_in_batch)
        return (3.0 * loss, outputs) if return_outputs else 3.0 * loss


def test_a_changed_loss_changes_no_term(tmp_path):
    untouched = model_of("bert", "TOKEN_CLS")
    recorder = run(
        get_model(with_free(model_of("bert", "TOKEN_CLS")), ["full", Pull()]),
        rows_of("bert", "TOKEN_CLS"),
        tmp_path,
        trainer_class=with_plugins(Tripled),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
    )
    (got,) = recorder.gradients
    check_pulled(got)
    wanted = {n: 3 * g for n, g in expected(untouched, recorder.batches, "TOKEN_CLS").items()}
    assert distance(got, wanted) < 1e-6


def test_a_term_sees_the_logits_behind_an_own_loss(tmp_path):
    untouched = model_of("bert", "SEQ_CLS")
    recorder = run(
        get_model(model_of("bert", "SEQ_CLS"), ["full", PullLogits()]),
        rows_of("bert", "SEQ_CLS"),
        tmp_path,
        trainer_class=with_plugins(Mean),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
    )
    wanted = expected(untouched, recorder.batches, "SEQ_CLS")
    untouched.train()
    sums = [untouched(**{k: v for k, v in data.items() if k != "labels"}).logits.sum() for data in recorder.batches]
    (sum(sums) / 16).backward()
    for name, parameter in untouched.named_parameters():
        if parameter.grad is not None:
            wanted[name] = wanted[name] + parameter.grad
    assert distance(recorder.gradients[0], wanted) < 1e-6


# ---- a function of its own -----------------------------------------------------------------------------------------


class LossObject:
    """A loss object, whose class says nothing of how it is called."""

    def __init__(self, reduction: str) -> None:
        self.reduction = reduction

    def __call__(self, outputs: Any, labels: Tensor, **kwargs: Any) -> Tensor:
        return weighted(self.reduction, outputs, labels, **kwargs)


def weighted(reduction: str, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    loss = F.cross_entropy(outputs.logits.flatten(0, -2), labels.flatten(), reduction=reduction)
    return loss if reduction == "mean" else loss / num_items_in_batch


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "made",
    [
        LossObject,
        lambda reduction: partial(weighted, reduction),
        lambda reduction: lambda *a, **k: weighted(reduction, *a, **k),
    ],
    ids=["object", "partial", "lambda"],
)
def test_whether_a_loss_function_is_a_mean_is_measured(made, reduction, tmp_path):
    recorder = run(
        get_model(model_of("bert", "TOKEN_CLS"), "full"),
        rows_of("bert", "TOKEN_CLS"),
        tmp_path,
        trainer={"compute_loss_func": made(reduction)},
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
    )
    wanted = expected(model_of("bert", "TOKEN_CLS"), recorder.batches, "TOKEN_CLS")
    assert distance(recorder.gradients[0], wanted) < 1e-6


def test_a_mean_over_no_labels_adds_nothing(tmp_path):
    """It is NaN, and stands first, where nothing is known of the function yet."""
    rows = rows_of("bert", "TOKEN_CLS", 4)
    rows[0]["labels"] = torch.full_like(rows[0]["labels"], -100)
    recorder = run(
        get_model(model_of("bert", "TOKEN_CLS"), "full"),
        rows,
        tmp_path,
        trainer={"compute_loss_func": LossObject("mean")},
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        train_sampling_strategy="sequential",
    )
    assert int((recorder.batches[0]["labels"] != -100).sum()) == 0
    wanted = expected(model_of("bert", "TOKEN_CLS"), recorder.batches, "TOKEN_CLS")
    assert distance(recorder.gradients[0], wanted) < 1e-6


def test_a_loss_function_that_is_not_told_the_count_returns_a_mean(tmp_path):
    def compute(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return weighted("mean" if num_items_in_batch is None else "sum", outputs, labels, num_items_in_batch)

    recorder = run(
        get_model(model_of("bert", "TOKEN_CLS"), "full"),
        rows_of("bert", "TOKEN_CLS"),
        tmp_path,
        trainer_class=with_plugins(ForgetsTheItems),
        trainer={"compute_loss_func": compute},
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
    )
    wanted = expected(model_of("bert", "TOKEN_CLS"), recorder.batches, "TOKEN_CLS")
    assert distance(recorder.gradients[0], wanted) < 1e-6


# ---- the rest of the class -----------------------------------------------------------------------------------------

METHOD = {
    "lora": {"r": 4, "init_lora_weights": False},
    "gradual_unfreeze": {"every": 2},
    "llrd": {},
    "r3f": {"eps": 0.3},
}


class OverridesTheRest(transformers.Trainer):
    """Everything but the loss, each as the Trainer would do it."""

    def create_optimizer(self, model=None):
        groups = [{"params": [p for p in self.model.parameters() if p.requires_grad], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=self.args.learning_rate)  # and returns nothing

    def get_train_dataloader(self):
        loader = torch.utils.data.DataLoader(self.train_dataset, 4, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)

    def log(self, logs, start_time=None):
        self.seen = {**getattr(self, "seen", {}), **logs}
        super().log(logs, start_time)

    def evaluate(self, *args, **kwargs):
        return {**super().evaluate(*args, **kwargs), "own": 1.0}


def trained(trainer_class: type[Any], folder: Any) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    rows = rows_of("bert", "SEQ_CLS")
    model = get_model(model_of("bert", "SEQ_CLS"), METHOD)
    trainer = trainer_class(
        model,
        arguments(
            folder,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            num_train_epochs=4,
            learning_rate=1e-2,
            optim="adamw_torch",
            train_sampling_strategy="sequential",
            eval_strategy="steps",
            eval_steps=3,
            logging_steps=1,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=default_data_collator,
    )
    trainer.train()
    return trainer, {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def test_a_class_that_overrides_all_but_the_loss_trains_the_same(tmp_path):
    _, wanted = trained(peft_plus.Trainer, tmp_path / "ours")
    trainer, got = trained(with_plugins(OverridesTheRest), tmp_path / "own")
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert trainer.seen["r3f"] > 0
    assert trainer.evaluate()["own"] == 1.0


class WithSettingsOfItsOwn(transformers.Trainer):
    def __init__(self, class_weights: list[float], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.class_weights = class_weights


def test_an_init_of_its_own_gets_the_tasks_collator_too(tmp_path):
    model = get_model(tiny("bert"), "lora")
    data = Dataset.from_dict({"text": ["the film was good", "bad", "a fine film"], "label": [0, 1, 2]})
    rows = model.peft_plus.task.preprocess(data, tiny_tokenizer())
    trainer = with_plugins(WithSettingsOfItsOwn)([1.0, 2.0], model, quiet(tmp_path, max_steps=1), train_dataset=rows)
    assert isinstance(trainer.data_collator, transformers.DataCollatorWithPadding)
    trainer.train()


# ---- a subclass of ours ----------------------------------------------------------------------------------------------


def train_as(trainer_class: type[Any], method: Any, folder: Any) -> None:
    rows = rows_of("bert", "SEQ_CLS")
    run(get_model(model_of("bert", "SEQ_CLS"), method), rows, folder, trainer_class=trainer_class)


def test_a_subclass_of_ours_that_calls_super(tmp_path):
    class Mine(peft_plus.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)

    recorder = run(
        get_model(model_of("bert", "TOKEN_CLS"), "full"),
        rows_of("bert", "TOKEN_CLS"),
        tmp_path,
        trainer_class=Mine,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
    )
    wanted = expected(model_of("bert", "TOKEN_CLS"), recorder.batches, "TOKEN_CLS")
    assert distance(recorder.gradients[0], wanted) < 1e-6


def test_a_subclass_of_ours_with_a_mean_of_its_own(tmp_path):
    class Mine(peft_plus.Trainer):
        compute_loss = Mean.compute_loss

    recorder = run(
        get_model(model_of("llama", "CAUSAL_LM"), "full"),
        rows_of("llama", "CAUSAL_LM"),
        tmp_path,
        trainer_class=Mine,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
    )
    wanted = of_means(model_of("llama", "CAUSAL_LM"), recorder.batches, "CAUSAL_LM")
    assert distance(recorder.gradients[0], wanted) < 1e-6


def test_a_subclass_of_ours_that_replaces_the_loss_does_not_lose_the_terms(tmp_path):
    """Its own loss is its own affair, but a plugin's term must not vanish without a word."""

    class Mine(peft_plus.Trainer):
        compute_loss = MeanOfTheModel.compute_loss

    with pytest.raises(MethodError, match="compute_loss"):
        train_as(Mine, ["full", PullLogits()], tmp_path)


def test_a_step_that_asks_for_no_loss_does_not_lose_the_terms(tmp_path):
    class Mine(transformers.Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = model(**inputs).loss
            loss.backward()
            return loss.detach()

    train_as(with_plugins(Mine), "full", tmp_path)
    with pytest.raises(MethodError, match=r"'pull_logits'.*never went through compute_loss.*super\(\).training_step"):
        train_as(with_plugins(Mine), ["full", PullLogits()], tmp_path)


def test_a_subclass_of_ours_that_replaces_the_step_or_the_optimizer_is_told(tmp_path):
    class OwnOptimizer(peft_plus.Trainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            return self.optimizer

    class OwnStepOfOurs(peft_plus.Trainer):
        training_step = OwnStep.training_step

    for mine, method in ((OwnOptimizer, "create_optimizer"), (OwnStepOfOurs, "training_step")):
        with pytest.raises(
            MethodError, match=rf"{mine.__name__}\.{method} never calls.*with_plugins\({mine.__name__}\)"
        ):
            train_as(mine, ["lora", "llrd"], tmp_path)


def test_with_plugins_takes_trainers_only():
    assert with_plugins(transformers.Trainer) is with_plugins(transformers.Trainer)
    assert with_plugins(peft_plus.Trainer) is peft_plus.Trainer
    with pytest.raises(TypeError, match=r"transformers\.Trainer"):
        with_plugins(nn.Module)


# ---- Seq2SeqTrainer --------------------------------------------------------------------------------------------------


def test_seq2seq_trainer_generates_and_goes_on_freezing(tmp_path):
    """Evaluation with generated answers in the middle of training changes nothing of what trains."""
    rows = [{"input_ids": [5, 6, 7, 2], "labels": [8, 9, 2]}, {"input_ids": [5, 7, 2], "labels": [9, 2]}] * 4
    frozen: list[bool] = []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
            frozen.append(not any(p.requires_grad for n, p in model.named_parameters() if "block.0" in n))

    model = get_model(tiny("t5", "SEQ_2_SEQ_LM"), METHOD)
    trainer = with_plugins(Seq2SeqTrainer)(
        model,
        arguments(
            tmp_path,
            kind=Seq2SeqTrainingArguments,
            predict_with_generate=True,
            generation_max_length=4,
            per_device_train_batch_size=2,
            max_steps=6,
            learning_rate=1e-3,
            eval_strategy="steps",
            eval_steps=1,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tiny_tokenizer("seq2seq"), model),
        processing_class=tiny_tokenizer("seq2seq"),
        compute_metrics=lambda prediction: {"answers": len(prediction.predictions)},
        callbacks=[Watch()],
    )
    trainer.train()
    assert frozen == [True] * 4 + [False] * 2
    assert [entry["eval_answers"] for entry in trainer.state.log_history if "eval_answers" in entry] == [8] * 6
