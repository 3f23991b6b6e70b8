"""What plugins are asked before anything trains: do the settings fit the model, and what never trains."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from accelerate import Accelerator
from torch import Tensor
from transformers import default_data_collator

import peft_plus
from peft_plus import MethodError, Plugin, PluginError, Session, get_model
from peft_plus.effects import Effects

from .bad_inputs import built, rows, same, trainer, weights
from .models import tiny
from .training import quiet

SEEN: list[Any] = []
"""Runs that a plugin was given in `on_build`: each model has a copy of the plugin."""


@dataclass(kw_only=True)
class Picky(Plugin):
    """Wants a block that the model may not have."""

    name: ClassVar[str] = "picky"

    block: int = 2
    fails: bool = False

    def on_build(self, run):
        SEEN.append(run)
        if self.fails:
            raise KeyError("lost")
        if self.block > run.num_blocks:
            raise ValueError(f"block={self.block}: the model has {run.num_blocks} blocks.")


@dataclass(kw_only=True)
class Leaves(Plugin):
    """Some depths never train."""

    name: ClassVar[str] = "leaves"

    out: tuple[int, ...] = (0, 1)

    def ever_trains(self, run, param):
        return param.depth not in self.out


@dataclass(kw_only=True)
class Noting(Plugin):
    """Looks at every run that it is given, and freezes nothing."""

    name: ClassVar[str] = "noting"

    began: list[Any] = field(init=False, default_factory=list)
    asked: list[Any] = field(init=False, default_factory=list)

    def ever_trains(self, run, param):
        self.began.append((param.name, run.step, run.optimizer, len(run.params), run.depths, run.seed))
        return True

    def may_train(self, run, param):
        self.asked.append((tuple(p.name for p in run.params), run.depths))
        return True

    def next_change(self, run):
        return None

    def state_dict(self):
        return {}


# ---- on_build ----------------------------------------------------------------------------------------------------


def test_on_build_is_asked_once_with_all_that_may_train() -> None:
    """lp_ft's first stage trains the head alone, its last one everything."""
    SEEN.clear()
    model = get_model(tiny("bert"), ["full", Picky(), peft_plus_lp_ft()])
    (run,) = SEEN
    assert run.model is model
    assert [p.name for p in run.params] == [name for name, _ in model.named_parameters()]
    assert run.depths == (4, 3, 2, 1, 0)
    assert run.layers.blocks[2] == ("bert.encoder.layer.2",)
    assert run.task is model.peft_plus.task
    assert (run.step, run.max_steps, run.optimizer, run.num_blocks) == (0, 0, None, 3)
    assert (len(run.stages), run.stage.name) == (2, run.stages[0].name)


def peft_plus_lp_ft() -> Plugin:
    from peft_plus_probing.lp_ft import LPFT

    return LPFT()


@pytest.mark.parametrize("attached", [False, True])
def test_a_setting_that_does_not_fit_is_a_method_error_and_leaves_no_plan(attached: bool) -> None:
    model = get_model(tiny("bert"), "full") if attached else tiny("bert")
    before = vars(model).get("peft_plus")
    with pytest.raises(MethodError, match=r"^plugin 'picky' \(tests\.\w+\): block=4: the model has 3 blocks\.$"):
        peft_plus.attach(model, [Picky(block=4)])
    assert vars(model).get("peft_plus") is before


def test_a_plugin_that_breaks_when_it_looks_is_named() -> None:
    with pytest.raises(PluginError, match=r"'picky' .*failed in on_build at step 0: KeyError"):
        get_model(tiny("bert"), ["full", Picky(fails=True)])


# ---- ever_trains -------------------------------------------------------------------------------------------------


def settings(folder: Path) -> Any:
    return quiet(
        folder,
        max_steps=5,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        weight_decay=0.1,
        seed=1,
        logging_strategy="no",
    )


def test_it_trains_bit_for_bit_as_what_was_frozen_by_hand_under_the_plain_trainer(tmp_path: Path) -> None:
    plain = tiny("bert", hidden_dropout_prob=0.1)
    for name, tensor in plain.named_parameters():
        if "embeddings" in name or "layer.0." in name:
            tensor.requires_grad_(False)
    ours = get_model(tiny("bert", hidden_dropout_prob=0.1), ["full", Leaves()])
    for kind, model in ((transformers.Trainer, plain), (peft_plus.Trainer, ours)):
        kind(model, settings(tmp_path), train_dataset=rows(), data_collator=default_data_collator).train()
    assert same(ours, weights(plain))
    assert not same(ours, weights(tiny("bert", hidden_dropout_prob=0.1)))
    assert all(tensor.requires_grad for tensor in ours.parameters())  # as get_model left them


def test_it_is_not_in_the_optimizer_nor_in_what_is_asked_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = built(["full", Leaves(), Noting()])
    run = trainer(model, tmp_path, optim="adamw_torch", seed=5)
    with caplog.at_level(logging.WARNING, "peft_plus"):
        run.train()
    names = [name for name, _ in model.named_parameters()]
    left = [name for name in names if "embeddings" not in name and "layer.0." not in name]
    held = {id(tensor) for group in run.optimizer.param_groups for tensor in group["params"]}
    assert [name for name, tensor in model.named_parameters() if id(tensor) in held] == left
    noting = model.peft_plus.plugins[1]
    at_start = [(name, 0, None, len(names), (4, 3, 2, 1, 0), 5) for name in names]
    assert noting.began[-len(names) :] == at_start  # once for each, after what was asked when the model was built
    assert noting.asked
    assert all(asked == (tuple(left), (4, 3, 2)) for asked in noting.asked)
    assert "never" not in caplog.text


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_a_session_leaves_it_out_too(tuner: str) -> None:
    model = built([tuner, Leaves(out=(0, 1, 4))])
    session = Session(model, Accelerator(cpu=True), max_steps=3)
    optimizer = session.optimizer(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    before = weights(model)
    held = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
    for batch in session.batches(session.loader(rows(), 4, collate_fn=default_data_collator)):
        with session.accelerator.accumulate(session.model):
            session.accelerator.backward(session.loss(batch))
            optimizer.step()
            optimizer.zero_grad()
    moved = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert moved
    assert all("layer.1." in name or "layer.2." in name for name in moved)
    assert {name for name, tensor in model.named_parameters() if id(tensor) in held} >= moved
    assert not any("layer.0." in name for name, tensor in model.named_parameters() if id(tensor) in held)


def test_where_nothing_is_left_the_plugins_are_named(tmp_path: Path) -> None:
    model = built(["full", Leaves(), Upper()])
    says = r"Nothing is left to train in the stage 'train': plugin 'leaves' .* and plugin 'upper' .*'full'.*drop one of"
    with pytest.raises(MethodError, match=says):
        trainer(model, tmp_path).train()


@dataclass(kw_only=True)
class Upper(Plugin):
    """Only the lowest two depths."""

    name: ClassVar[str] = "upper"

    def ever_trains(self, run, param):
        return param.depth < 2


def test_an_answer_that_is_no_bool_is_refused() -> None:
    @dataclass(kw_only=True)
    class Vague(Plugin):
        name: ClassVar[str] = "vague"

        def ever_trains(self, run, param):
            return None

    model = built(["full", Vague()])
    with pytest.raises(PluginError, match=r"'vague'.*ever_trains returned None for bert\."):
        Effects(model, model.peft_plus, model.peft_plus.stages[0])


def test_the_lowest_depth_that_trains_follows(tmp_path: Path) -> None:
    model = built(["full", Leaves()])
    effects = Effects(model, model.peft_plus, model.peft_plus.stages[0])
    effects.apply(peft_plus.Run(model=model, task=model.peft_plus.task, num_blocks=3))
    assert effects.lowest == 2


def test_a_resumed_run_ends_bit_identical(tmp_path: Path) -> None:
    def made() -> Any:
        return trainer(
            built(["lora", Leaves()]), tmp_path, optim="adamw_torch", save_strategy="steps", save_steps=1, seed=3
        )

    whole = made()
    whole.train()
    end: dict[str, Tensor] = weights(whole.model)
    for step in (1, 4):
        again = made()
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert same(again.model, end)
