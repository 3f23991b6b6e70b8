"""What plugins are asked before a stage's first step: to set state up, to look at the data, for another base."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import default_data_collator

import peft_plus
from peft_plus import MethodError, Plugin, Session, attach, get_model
from peft_plus.stages import Stage

from .bad_inputs import built, rows, same, trainer, weights
from .models import tiny
from .training import quiet

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")


@dataclass(kw_only=True)
class Looks(Plugin):
    """Looks at the data, and notes when it was asked."""

    name: ClassVar[str] = "looks"

    limit: int | None = None
    wants_evaluation: bool = False
    begun: int = field(init=False, default=0)
    seen: dict[str, Tensor] = field(init=False, default_factory=dict)
    squares: dict[str, Tensor] = field(init=False, default_factory=dict)

    def on_stage_begin(self, run):
        if self.wants_evaluation and run.evaluates is False:
            raise ValueError("this needs evaluations: set eval_strategy.")
        self.begun += 1
        batches = list(run.examples(limit=self.limit))
        self.seen = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        for batch in batches:
            for name, gradient in run.task_gradients(batch).items():
                self.squares[name] = self.squares.get(name, torch.zeros(())) + gradient.square()


@pytest.mark.parametrize("limit", [None, 5])
def test_examples_and_their_gradients_are_those_of_a_plain_loop(limit: int | None, tmp_path: Path) -> None:
    model = built(["full", Looks(limit=limit)])
    expected: dict[str, Tensor] = {}
    plain = built("full").eval()
    for row in rows()[:limit]:
        plain.zero_grad()
        plain(**default_data_collator([row])).loss.backward()
        for name, tensor in plain.named_parameters():
            expected[name] = expected.get(name, torch.zeros(())) + (0 if tensor.grad is None else tensor.grad.square())
    trainer(model, tmp_path).train()
    plugin = model.peft_plus.plugins[0]
    assert torch.equal(plugin.seen["input_ids"], torch.stack([row["input_ids"] for row in rows()[:limit]]))
    assert plugin.squares.keys() == expected.keys()
    assert all(torch.allclose(plugin.squares[name], expected[name], rtol=1e-4, atol=1e-9) for name in expected)


def test_looking_changes_nothing_of_the_run(tmp_path: Path) -> None:
    ends = []
    for method in ("lora", ["lora", Looks()]):
        torch.manual_seed(0)
        model = get_model(tiny("bert", hidden_dropout_prob=0.1), method)
        trainer(model, tmp_path, train_sampling_strategy="random").train()
        ends.append(model)
    assert same(ends[1], weights(ends[0]))


def test_a_resumed_run_is_not_asked_again(tmp_path: Path) -> None:
    trainer(built(["lora", Looks()]), tmp_path, save_strategy="steps", save_steps=3).train()
    again = built(["lora", Looks()])
    trainer(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.peft_plus.plugins[0].begun == 1  # as the checkpoint says


def test_a_second_run_of_one_model_begins_anew(tmp_path: Path) -> None:
    model = built(["lora", Looks()])
    for _ in range(2):
        trainer(model, tmp_path).train()
    assert model.peft_plus.plugins[0].begun == 2


def test_a_session_asks_too() -> None:
    model = built(["lora", Looks(limit=3)])
    session = Session(model, Accelerator(cpu=True), max_steps=1)
    optimizer = session.optimizer(torch.optim.SGD, lr=1e-2)
    loader = session.loader(rows(), 4, collate_fn=default_data_collator)
    for batch in session.batches(loader):
        session.accelerator.backward(session.loss(batch))
        optimizer.step()
        optimizer.zero_grad()
    assert len(model.peft_plus.plugins[0].seen["labels"]) == 3


def test_what_does_not_fit_the_run_is_refused_before_its_first_step(tmp_path: Path) -> None:
    model = built(["lora", Looks(wants_evaluation=True)])
    with pytest.raises(MethodError, match=r"plugin 'looks' .*this needs evaluations: set eval_strategy"):
        trainer(model, tmp_path).train()
    evaluated = {"eval_strategy": "epoch", "eval_dataset": rows()[:4]}
    trainer(model, tmp_path, **evaluated).train()


# ---- arguments of a single stage -----------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Arguments(Plugin):
    """Sets training arguments."""

    name: ClassVar[str] = "arguments"

    learning_rate: float = 0.25

    def plan_stages(self, stages):
        args = {"learning_rate": self.learning_rate}
        return [Stage(name=s.name, train=s.train, plugins=s.plugins, args={**s.args, **args}) for s in stages]


def test_a_trainer_takes_the_arguments_that_a_method_sets_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = quiet(tmp_path, max_steps=1, learning_rate=0.5)
    with caplog.at_level(logging.INFO, logger="peft_plus"):
        run = peft_plus.Trainer(
            built(["full", Arguments()]), given, train_dataset=rows(), data_collator=default_data_collator
        )
    assert "learning_rate 0.5 → 0.25" in caplog.text
    run.train()
    assert run.args.learning_rate == 0.25
    assert given.learning_rate == 0.5  # the user's own stay as they were


def test_a_trainer_built_without_arguments_refuses_to_train_past_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = peft_plus.Trainer(built(["full", Arguments()]), train_dataset=rows(), data_collator=default_data_collator)
    with pytest.raises(MethodError, match="The method sets learning_rate, and this Trainer was built without it"):
        run.train()


def test_two_plugins_that_set_one_argument_apart_are_named() -> None:
    other = type("Other", (Arguments,), {"name": "other"})
    with pytest.raises(MethodError, match=r"'arguments' .* sets learning_rate=0.25 and plugin 'other' .*=0.5"):
        built(["full", Arguments(), other(learning_rate=0.5)])
    built(["full", Arguments(), other()])  # alike


# ---- other base weights --------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Doubled(Plugin):
    """Doubles the word embeddings."""

    name: ClassVar[str] = "doubled"
    needs: ClassVar[tuple[str, ...]] = ("base",)

    def prepare_base(self, model):
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(2)
        return model


def test_the_base_is_prepared_once_whichever_way_the_model_is_built(tmp_path: Path) -> None:
    plain = tiny("bert").get_input_embeddings().weight
    base = tiny("bert")
    base.save_pretrained(tmp_path)
    named = get_model(tmp_path, ["full", Doubled()], task="SEQ_CLS", num_labels=base.config.num_labels)
    for model in (get_model(tiny("bert"), ["full", Doubled()]), attach(tiny("bert"), [Doubled()]), named):
        assert torch.equal(model.get_input_embeddings().weight, 2 * plain)


def test_a_tuner_that_would_lose_the_other_base_is_refused_before_loading(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"needs base weights that train.*'lora' keeps the base as it was loaded"):
        get_model(tmp_path / "nothing", ["lora", Doubled()], task="SEQ_CLS", num_labels=2)
