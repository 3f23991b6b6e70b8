"""Two stages: the probe moves only the head, bit for bit, and fine-tuning starts from exactly its predictions."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, TrainerCallback, TrainingArguments, default_data_collator

import peft_plus
from peft_plus import MethodError, Stage, get_model
from peft_plus_probing.lp_ft import LPFT
from tests.models import batch, tiny
from tests.training import quiet


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Stages(TrainerCallback):
    """Logits and weights at both ends of each stage, and what moved when."""

    def __init__(self, data: Mapping[str, Tensor]) -> None:
        self.data = data
        self.begins: list[tuple[Tensor, dict[str, Tensor]]] = []
        self.ends: list[tuple[Tensor, dict[str, Tensor]]] = []
        self.args: list[TrainingArguments] = []
        self.trainable: list[list[set[str]]] = []
        self.norms: list[float] = []
        self.steps: list[int] = []

    def _look(self, model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        training = model.training
        with torch.no_grad():
            logits = model.eval()(**self.data).logits
        model.train(training)
        return logits, {n: p.detach().clone() for n, p in model.named_parameters()}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self.begins.append(self._look(model))
        self.args.append(args)
        self.trainable.append([])
        self.steps.append(state.max_steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self.trainable[-1].append({n for n, p in model.named_parameters() if p.grad is not None})

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self.ends.append(self._look(model))


def arguments(folder: Any, **settings: Any) -> TrainingArguments:
    defaults = {
        "num_train_epochs": 1,
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 4,
        "weight_decay": 0.1,
    }
    return quiet(folder, **{**defaults, **settings})


def rows_of(name: str, number: int = 8) -> list[dict[str, Tensor]]:
    data = batch(name, rows=number)
    return [{key: value[i] for key, value in data.items()} for i in range(number)]


def fit(model: nn.Module, name: str, folder: Any, callbacks: Sequence[TrainerCallback] = (), **settings: Any) -> Stages:
    watch = Stages(batch(name))
    outputs = peft_plus.fit(
        model,
        arguments(folder, **settings),
        train_dataset=rows_of(name),
        data_collator=default_data_collator,
        callbacks=[watch, *callbacks],
    )
    assert [output.global_step for output in outputs] == watch.steps
    return watch


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    return {n for n in before if not torch.equal(before[n].view(torch.uint8), after[n].view(torch.uint8))}


HEADS = {
    "bert": r"classifier",
    "distilbert": r"pre_classifier|classifier",
    "llama": r"score",
    "bart": r"classification_head",
}


@pytest.mark.parametrize("tuner", ["full", "lora"])
@pytest.mark.parametrize("name", list(HEADS))
def test_the_probe_moves_the_head_alone_and_fine_tuning_starts_there(name, tuner, tmp_path):
    settings = {"target_modules": ["q_lin", "v_lin"]} if (name, tuner) == ("distilbert", "lora") else {}
    model = get_model(tiny(name), {tuner: settings, "lp_ft": {"probe_epochs": 2, "probe_lr": 0.03}})
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    watch = fit(model, name, tmp_path)
    head = {n for n in trainable if re.search(HEADS[name], n)}
    (start_logits, start), (tuned_logits, tuned) = watch.begins
    (probed_logits, probed), (_, end) = watch.ends

    assert changed(start, probed) == head
    assert not torch.equal(start_logits, probed_logits)
    assert torch.equal(tuned_logits, probed_logits)  # eval mode, bit for bit
    assert not changed(probed, tuned)
    assert changed(tuned, end) > head  # then the body too
    assert changed(tuned, end) <= trainable
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    assert all(held == head for held in watch.trainable[0])
    assert any(held - head for held in watch.trainable[1])


def test_each_stage_has_its_own_budget_and_folder(tmp_path):
    model = get_model(tiny("bert"), {"lora": {}, "lp_ft": {"probe_epochs": 2, "probe_lr": 0.03}})
    watch = fit(model, "bert", tmp_path, num_train_epochs=3, save_strategy="epoch")
    assert [(a.num_train_epochs, a.learning_rate) for a in watch.args] == [(2, 0.03), (3, 5e-3)]
    assert watch.steps == [4, 6]
    assert sorted(p.name for p in (tmp_path / "probe").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert len(list((tmp_path / "train").iterdir())) == 3


def test_max_steps_of_the_user_is_for_fine_tuning_only(tmp_path):
    model = get_model(tiny("bert"), {"lora": {}, "lp_ft": {"probe_epochs": 2}})
    given = arguments(tmp_path, max_steps=3)
    watch = Stages(batch("bert"))
    peft_plus.fit(model, given, train_dataset=rows_of("bert"), data_collator=default_data_collator, callbacks=[watch])
    assert watch.steps == [4, 3]
    assert (given.max_steps, given.output_dir) == (3, str(tmp_path))  # the user's object is as it was


def test_half_an_epoch_of_probing(tmp_path):
    watch = fit(get_model(tiny("bert"), {"lora": {}, "lp_ft": {"probe_epochs": 0.5}}), "bert", tmp_path)
    assert watch.steps == [1, 2]


def test_other_plugins_rest_while_probing(tmp_path):
    """The freezing schedule counts from the first step of fine-tuning, and no term is added before."""
    model = get_model(
        tiny("bert"), {"lora": {}, "gradual_unfreeze": {"every": 1}, "r3f": {"eps": 0.5}, "lp_ft": {"probe_epochs": 1}}
    )
    logged: list[dict[str, float]] = []

    class Log(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            logged.append(logs)

    watch = fit(model, "bert", tmp_path, [Log()], max_steps=5, logging_strategy="steps", logging_steps=1)
    blocks = [
        [{int(m[1]) for n in held for m in [re.search(r"layer\.(\d)", n)] if m} for held in stage]
        for stage in watch.trainable
    ]
    assert blocks == [[set(), set()], [set(), {2}, {1, 2}, {0, 1, 2}, {0, 1, 2}]]
    assert ["r3f" in entry for entry in logged if "loss" in entry] == [False] * 2 + [True] * 5
    assert [(c.stage, c.step) for c in model.peft_plus.timeline] == [
        ("probe", 0),
        *(("train", step) for step in range(4)),
    ]
    assert set(model.peft_plus.engagement) == {"probe", "train"}


def test_switching_adapters_while_probing_changes_nothing(tmp_path):
    """PEFT thaws its adapters whenever one is switched off; their gradients must not enter the probe's clip norm."""

    class Switch(TrainerCallback):
        def on_substep_end(self, args, state, control, model, **_):
            with model.disable_adapter():
                pass

    ends = []
    for callbacks in ((), (Switch(),)):
        torch.manual_seed(0)
        model = get_model(tiny("bert"), {"lora": {}, "lp_ft": {"probe_epochs": 2}})
        settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.05}
        watch = fit(model, "bert", tmp_path, callbacks, optim="sgd", **settings)
        ends.append(watch.ends)
    for (_, plain), (_, switched) in zip(*ends, strict=True):
        assert not changed(plain, switched)


def test_what_is_saved_loads_in_plain_peft(tmp_path):
    model = get_model(tiny("bert"), {"lora": {}, "lp_ft": {"probe_epochs": 1}})
    fit(model, "bert", tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    data = batch("bert")
    again = peft.PeftModel.from_pretrained(tiny("bert"), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(**data).logits, model.eval()(**data).logits)
    record = json.loads((tmp_path / "adapter" / "peft_plus.json").read_text())
    assert [(p["name"], p["settings"]) for p in record["plugins"]] == [("lp_ft", {"probe_epochs": 1, "probe_lr": 1e-3})]


def test_full_reloads_with_plain_transformers(tmp_path):
    model = get_model(tiny("bert"), {"full": {}, "lp_ft": {"probe_epochs": 1}})
    fit(model, "bert", tmp_path)
    model.save_pretrained(tmp_path / "model")
    data = batch("bert")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert torch.equal(again(**data).logits, model.eval()(**data).logits)


def test_a_single_trainer_cannot_run_two_stages(tmp_path):
    model = get_model(tiny("bert"), ["lora", "lp_ft"])
    trainer = peft_plus.Trainer(
        model, arguments(tmp_path), train_dataset=rows_of("bert"), data_collator=default_data_collator
    )
    with pytest.raises(MethodError, match=r"2 stages \(probe, train\).*peft_plus\.fit"):
        trainer.train()


@pytest.mark.parametrize(
    ("name", "task", "method", "why"),
    [
        ("llama", "CAUSAL_LM", ["lora", "lp_ft"], "freshly initialised head.*CAUSAL_LM"),
        ("t5", "SEQ_2_SEQ_LM", ["full", "lp_ft"], "freshly initialised head.*SEQ_2_SEQ_LM"),
        ("bert", "MASKED_LM", ["lora", "lp_ft"], "freshly initialised head.*MASKED_LM"),
        ("bert", "SEQ_CLS", ["linear_probe", "lp_ft"], "linear_probe.*trains the head alone"),
    ],
)
def test_what_has_no_head_or_no_body_is_refused(name, task, method, why):
    with pytest.raises(MethodError, match=rf"lp_ft.*peft-plus-probing.*{why}"):
        get_model(tiny(name, task), method)


@pytest.mark.parametrize("setting", ["probe_epochs", "probe_lr"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_settings_out_of_range_are_refused(setting, value):
    with pytest.raises(ValueError, match=f"{setting}="):
        LPFT(**{setting: value})


def test_the_plan_puts_the_probe_before_whatever_is_there():
    plugin = LPFT(probe_epochs=2.0, probe_lr=0.1)
    given = (Stage(name="a"), Stage(name="b"))
    probe, *rest = plugin.plan_stages(given)
    assert tuple(rest) == given
    assert (probe.name, probe.train, probe.plugins) == ("probe", "head", ())
    assert probe.args == {"num_train_epochs": 2.0, "learning_rate": 0.1, "max_steps": -1}


def test_one_optimizer_for_both_stages_is_refused(tmp_path):
    model = get_model(tiny("bert"), ["lora", "lp_ft"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(MethodError, match=r"2 stages, each with an optimizer of its own.*optimizer_cls_and_kwargs"):
        peft_plus.fit(model, arguments(tmp_path), optimizers=(optimizer, None))
