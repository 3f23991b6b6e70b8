"""What a Trainer is given for a model with a plan: collators found or asked for, impossible arguments refused early."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch
import transformers
from transformers import TrainingArguments

import peft_plus
from peft_plus import MethodError, Plugin, get_model

from .models import batch, tiny
from .tokenizers import tiny_tokenizer

TEXTS = {"text": ["the film was good", "bad", "a fine film"], "label": [0, 1, 2]}


def arguments(folder: Any, **settings: Any) -> TrainingArguments:
    return TrainingArguments(str(folder), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True, **settings)


def tokenised(model: Any) -> datasets.Dataset:
    return model.peft_plus.task.preprocess(datasets.Dataset.from_dict(TEXTS), tiny_tokenizer())


def test_the_tokenizer_that_preprocessed_makes_the_collator(tmp_path):
    model = get_model(tiny("bert"), "lora")
    trainer = peft_plus.Trainer(model, arguments(tmp_path), train_dataset=tokenised(model))
    assert isinstance(trainer.data_collator, transformers.DataCollatorWithPadding)
    trainer.train()


def test_rows_that_another_models_task_tokenised_need_the_tokenizer(tmp_path):
    rows = tokenised(get_model(tiny("bert"), "lora"))
    other = get_model(tiny("bert"), "lora")
    with pytest.raises(MethodError, match=r"differ in length.*Pass processing_class=tokenizer, or a data_collator"):
        peft_plus.Trainer(other, arguments(tmp_path), train_dataset=rows)
    peft_plus.Trainer(other, arguments(tmp_path), train_dataset=rows, processing_class=tiny_tokenizer()).train()


def test_a_trainer_class_with_an_init_of_its_own_keeps_its_collator(tmp_path):
    class Own(transformers.Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, data_collator=transformers.default_data_collator, **kwargs)

    model = get_model(tiny("bert"), "lora")
    trainer = peft_plus.with_plugins(Own)(model, arguments(tmp_path), train_dataset=tokenised(model))
    assert trainer.data_collator is transformers.default_data_collator


def test_the_users_collator_stays(tmp_path):
    model = get_model(tiny("bert"), "lora")
    mine = transformers.DataCollatorWithPadding(tiny_tokenizer(), pad_to_multiple_of=8)
    trainer = peft_plus.Trainer(model, arguments(tmp_path), data_collator=mine, train_dataset=tokenised(model))
    assert trainer.data_collator is mine


def test_prefix_tuning_with_checkpointing_is_refused(tmp_path):
    model = get_model(tiny("bert"), "prefix_tuning")
    with pytest.raises(MethodError, match="prefix_tuning does not work with gradient checkpointing"):
        peft_plus.Trainer(model, arguments(tmp_path, activation_checkpointing=True))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch.compile's own
def test_a_compiled_model_hides_its_plan(tmp_path):
    compiled = torch.compile(get_model(tiny("bert"), ["lora", "llrd"]))
    with pytest.raises(MethodError, match=r"torch_compile=True"):
        peft_plus.Trainer(compiled, arguments(tmp_path))


@pytest.mark.parametrize(("method", "expected"), [("lora", None), (["lora", "gradual_unfreeze"], True)])
def test_ddp_is_told_of_parameters_without_gradient_only_where_something_freezes(method, expected, tmp_path):
    args = arguments(tmp_path)
    peft_plus.Trainer(get_model(tiny("bert"), method), args)
    assert args.ddp_find_unused_parameters is expected


def test_plugins_see_the_last_metrics(tmp_path):
    seen = []

    class Looks(Plugin):
        name = "looks"

        def may_train(self, run, param):
            seen.append(dict(run.last_metrics))
            return True

    model = get_model(tiny("bert"), ["lora", Looks()])
    data = batch("bert")
    rows = [{name: values[i] for name, values in data.items()} for i in range(len(data["labels"]))]
    args = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        eval_strategy="steps",
        eval_steps=1,
    )
    peft_plus.Trainer(model, args, train_dataset=rows * 4, eval_dataset=rows).train()
    assert seen[0] == {}
    assert seen[-1]["eval_loss"] > 0


def test_model_init_is_checked_and_completed_too(tmp_path):
    rows = tokenised(get_model(tiny("bert"), "lora"))
    trainer = peft_plus.Trainer(
        model_init=lambda: get_model(tiny("bert"), "lora"),
        args=arguments(tmp_path),
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
    )
    assert isinstance(trainer.data_collator, transformers.DataCollatorWithPadding)
    trainer.train()
    with pytest.raises(MethodError, match="gradient checkpointing"):
        peft_plus.Trainer(
            model_init=lambda: get_model(tiny("bert"), "prefix_tuning"),
            args=arguments(tmp_path, activation_checkpointing=True),
        )


def test_t5_with_label_smoothing_gets_its_decoder_inputs_from_the_collator(tmp_path):
    model = get_model(tiny("t5", "SEQ_2_SEQ_LM"), "lora", task="SEQ_2_SEQ_LM")
    rows = datasets.Dataset.from_dict({"source": ["good", "bad film"], "target": ["film", "the film was"]})
    data = model.peft_plus.task.preprocess(rows, tiny_tokenizer("seq2seq"))
    peft_plus.Trainer(model, arguments(tmp_path, label_smoothing_factor=0.1), train_dataset=data).train()
