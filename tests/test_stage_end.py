"""What plugins are asked when a stage has ended: after the proof, before the weights to end with, once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback, default_data_collator

import peft_plus
from peft_plus import PluginError, Session, get_model

from .models import tiny
from .multipliers import rows_of
from .training import StopAt, quiet

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")


@dataclass(kw_only=True)
class Back(peft_plus.Plugin):
    """Ends with the weights of a step, and notes when it was asked."""

    name: ClassVar[str] = "back"
    asked: ClassVar[list[int]] = []
    """Steps, outside the instance, which is copied."""

    step: int = 2
    seen: int = field(init=False, default=0)

    def on_step_end(self, run: peft_plus.Run) -> None:
        self.seen += 1
        if run.step == self.step:
            run.keep("back")

    def on_stage_end(self, run: peft_plus.Run) -> None:
        self.asked.append(run.step)
        run.restore("back")


@pytest.fixture(autouse=True)
def _forget() -> None:
    Back.asked.clear()


def trained(
    folder: Path, *plugins: Any, callbacks: list[TrainerCallback] | None = None, resume: Any = None, **settings: Any
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    trainer = peft_plus.Trainer(
        get_model(tiny("bert"), ["lora", *plugins]),
        quiet(folder, **{"max_steps": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant", **settings}),
        train_dataset=rows_of(16),
        data_collator=default_data_collator,
        callbacks=callbacks or [],
    )
    trainer.train(resume_from_checkpoint=resume)
    return {name: tensor.detach().clone() for name, tensor in trainer.model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_weights_put_back_at_the_end_stay(tmp_path: Path) -> None:
    """Also where they are older than what moved since: the proof came before."""
    two = trained(tmp_path, max_steps=2)
    assert same(trained(tmp_path, Back()), two)
    assert Back.asked == [4]


def test_what_thawed_after_the_weights_that_come_back_is_proven_all_the_same(tmp_path: Path) -> None:
    """What thaws at step 3 has not moved in the weights of step 2, and is said to have trained."""

    @dataclass(kw_only=True)
    class Later(peft_plus.Plugin):
        name: ClassVar[str] = "later"

        def may_train(self, run: peft_plus.Run, param: peft_plus.Param) -> bool:
            return param.part == "head" or run.step >= 3

    two = trained(tmp_path, Later(), max_steps=2)
    assert same(trained(tmp_path, Later(), Back(), max_steps=6), two)


def test_a_run_that_is_resumed_at_its_end_asks_again(tmp_path: Path) -> None:
    whole = trained(tmp_path, Back(), save_strategy="steps", save_steps=2)
    again = trained(tmp_path, Back(), save_strategy="steps", save_steps=2, resume=str(tmp_path / "checkpoint-4"))
    assert same(whole, again)
    assert Back.asked == [4, 4]


def test_a_run_that_is_stopped_asks_and_its_checkpoint_goes_on_with_the_weights_that_train(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 3}
    whole = trained(tmp_path / "whole", Back(step=1), **settings)
    cut = trained(tmp_path / "cut", Back(step=1), callbacks=[StopAt(3)], **settings)
    assert same(cut, trained(tmp_path / "one", max_steps=1))
    assert same(
        whole, trained(tmp_path / "cut", Back(step=1), resume=str(tmp_path / "cut" / "checkpoint-3"), **settings)
    )
    assert Back.asked == [4, 3, 4]


def test_a_run_that_breaks_off_is_not_asked(tmp_path: Path) -> None:
    class Breaks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        trained(tmp_path, Back(), callbacks=[Breaks()])
    assert Back.asked == []


def test_a_plugin_that_fails_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"plugin 'back' .*failed in on_stage_end at step 4: ValueError: .*'back'"):
        trained(tmp_path, Back(step=9))


def test_eval_weights_come_after_it(tmp_path: Path) -> None:
    @dataclass(kw_only=True)
    class Zero(peft_plus.Plugin):
        name: ClassVar[str] = "zero"

        def eval_weights(self, run: peft_plus.Run) -> dict[str, Tensor]:
            return {param.name: torch.zeros(param.shape) for param in run.params if param.part == "head"}

    after = trained(tmp_path, Back(), Zero())
    two = trained(tmp_path, max_steps=2)
    heads = {name for name in after if "classifier" in name and "original" not in name}
    assert heads
    assert all(not after[name].any() if name in heads else torch.equal(after[name], two[name]) for name in after)


def test_a_session_asks_when_its_loop_has_ended(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_model(tiny("bert"), ["lora", Back()])
    session = Session(model, Accelerator(cpu=True), max_steps=4)
    optimizer = session.optimizer(torch.optim.AdamW, lr=1e-2)
    loader = session.loader(rows_of(16), batch_size=4, collate_fn=default_data_collator)
    seen = []
    for batch in session.batches(loader):
        session.accelerator.backward(session.loss(batch))
        optimizer.step()
        optimizer.zero_grad()
        seen.append({name: tensor.detach().clone() for name, tensor in model.named_parameters()})
    assert Back.asked == [4]
    assert same({name: tensor.detach() for name, tensor in model.named_parameters()}, seen[1])
