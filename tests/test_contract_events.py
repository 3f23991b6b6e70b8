"""When a run tells its plugins what, under a Trainer and in a bare loop, and how one of them ends it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from accelerate import Accelerator
from torch import nn
from transformers import TrainerCallback, default_data_collator

import peft_plus
from peft_plus import MethodError, Plugin, Run, Session, get_model, with_plugins

from .bad_inputs import built, rows, same, trainer, weights
from .models import tiny
from .tokenizers import tiny_tokenizer
from .training import quiet

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")


class Diary(Plugin):
    """Writes down what it is told, in order."""

    name = "diary"

    def __init__(self) -> None:
        self.lines: list[Any] = []

    def lr_scale(self, run, param):
        self._write("rate", run)
        return 1.0

    def on_pre_optimizer_step(self, run):
        self._write("before", run)

    def on_step_end(self, run):
        self._write("after", run)

    def on_evaluate(self, run):
        assert run.last_evaluation_step == run.step
        self._write(sorted(name for name in run.last_metrics if name.endswith("loss")), run)

    def _write(self, what: Any, run: Run) -> None:
        if not self.lines or self.lines[-1] != (what, run.step):  # lr_scale is asked for each group
            self.lines.append((what, run.step))


# ---- when ------------------------------------------------------------------------------------------------------------


def test_a_step_tells_in_this_order_and_an_evaluation_of_two_sets_once(tmp_path: Path) -> None:
    sets = {"dev": rows()[:4], "test": rows()[4:8]}
    model = built(["full", Diary()])
    trainer(model, tmp_path, max_steps=3, eval_dataset=sets, eval_strategy="steps", eval_steps=2).train()
    both = ["eval_dev_loss", "eval_test_loss"]
    assert model.peft_plus.plugins[0].lines == [
        *(("before", 0), ("rate", 0), ("after", 1)),
        *(("before", 1), ("rate", 1), ("after", 2), (both, 2)),
        *(("before", 2), ("rate", 2), ("after", 3), (both, 3)),  # the last step is always evaluated
    ]


class Asks(TrainerCallback):
    """Evaluates on its own account."""

    trainer: Any = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.evaluate()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            self.trainer.evaluate()


def test_an_evaluation_by_a_callback_counts_once_the_run_has_begun(tmp_path: Path) -> None:
    model, asks = built(["full", Diary()]), Asks()
    asks.trainer = trainer(model, tmp_path, max_steps=3, eval_dataset=rows()[:4], callbacks=[asks])
    asks.trainer.train()
    told = [line for line in model.peft_plus.plugins[0].lines if isinstance(line[0], list)]
    assert told == [(["eval_loss"], 1)]  # the callback comes before the step is counted by the core


def test_a_session_tells_the_same() -> None:
    model = built(["full", Diary()])
    session = Session(model, Accelerator(cpu=True), max_steps=2)
    optimizer = session.optimizer(torch.optim.SGD, lr=0.1)
    for batch in session.batches(session.loader(rows(), 4, collate_fn=default_data_collator)):
        session.accelerator.backward(session.loss(batch))
        optimizer.step()
        optimizer.zero_grad()
        if session.step == 1:
            session.evaluated({"eval_loss": 0.5})
    assert model.peft_plus.plugins[0].lines == [
        *(("before", 0), ("rate", 0), ("after", 1), (["eval_loss"], 1)),
        *(("before", 1), ("rate", 1), ("after", 2)),
    ]


def test_an_evaluation_within_an_accumulated_step_is_an_error() -> None:
    """Weights put back there would get gradients of others."""
    session = Session(built(["full", Diary()]), Accelerator(cpu=True, gradient_accumulation_steps=2), max_steps=1)
    session.optimizer(torch.optim.SGD, lr=0.1)
    loader = session.loader(rows(), 4, collate_fn=default_data_collator)
    batches = session.batches(loader)
    session.accelerator.backward(session.loss(next(batches)))
    with pytest.raises(MethodError, match=r"session.evaluated\(…\) in the middle of a step"):
        session.evaluated({"eval_loss": 0.5})


# ---- state -----------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Moody(Plugin):
    """Its rate follows what gradients and evaluations told it: state that changes before, after and between steps."""

    name: ClassVar[str] = "moody"

    norm: float = field(init=False, default=0.0)
    losses: list[float] = field(init=False, default_factory=list)

    def on_pre_optimizer_step(self, run):
        gradients = [g for p in run.params if (g := run.gradient(p)) is not None]
        self.norm = 0.5 * self.norm + run.mean(float(torch.stack([g.norm() for g in gradients]).norm()))

    def on_evaluate(self, run):
        self.losses.append(run.last_metrics["eval_loss"])

    def may_train(self, run, param):
        return param.depth != 1 or len(self.losses) % 3 != 1

    def lr_scale(self, run, param):
        return 1 / (1 + self.norm + sum(self.losses))


@pytest.mark.parametrize("start", [False, True])
def test_state_that_changes_at_any_event_survives_a_kill_at_every_step(start: bool, tmp_path: Path) -> None:
    """An evaluation before the first step is repeated by a resumed run, and counts once all the same."""

    def made(**saving: Any) -> Any:
        torch.manual_seed(0)
        model = get_model(tiny("bert", hidden_dropout_prob=0.1), ["lora", Moody()])
        settings = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": start, "eval_dataset": rows()[:4]}
        return trainer(model, tmp_path, seed=3, optim="adamw_torch", learning_rate=1e-2, **settings, **saving)

    whole = made(save_strategy="steps", save_steps=1)
    whole.train()
    end, moody = weights(whole.model), whole.model.peft_plus.plugins[0]
    assert len(moody.losses) == 3 + start
    for step in range(1, 6):
        again = made()
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert same(again.model, end), step
        assert again.model.peft_plus.plugins[0] == moody


# ---- stop ------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Enough(Plugin):
    """Ends the run.

    Args:
        hook: in which hook.
        when: at which `run.step`.
    """

    name: ClassVar[str] = "enough"

    hook: str = "on_step_end"
    when: int = 3

    def on_pre_optimizer_step(self, run):
        self._look(run, "on_pre_optimizer_step")

    def on_step_end(self, run):
        self._look(run, "on_step_end")

    def on_evaluate(self, run):
        self._look(run, "on_evaluate")

    def _look(self, run: Run, hook: str) -> None:
        if hook == self.hook and run.step == self.when:
            run.stop("three steps are enough")


HOOKS = [("on_pre_optimizer_step", 2), ("on_step_end", 3), ("on_evaluate", 3)]


@pytest.mark.parametrize(("hook", "when"), HOOKS)
@pytest.mark.parametrize("kind", [peft_plus.Trainer, with_plugins(transformers.Seq2SeqTrainer)])
def test_a_trainer_ends_after_the_step(
    kind: Any, hook: str, when: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = quiet(
        tmp_path,
        kind=transformers.Seq2SeqTrainingArguments,
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.1,
        eval_strategy="steps",
        eval_steps=1,
    )
    model = built(["full", Enough(hook=hook, when=when)])
    data = {"train_dataset": rows(), "eval_dataset": rows()[:4], "data_collator": default_data_collator}
    run = kind(model, args, **data)
    with caplog.at_level(logging.WARNING, "peft_plus"):
        run.train()
    assert run.state.global_step == 3
    assert "three steps are enough" in caplog.text
    assert {row.steps for row in model.peft_plus.engagement["train"]} == {3}  # what moved was proved all the same
    run.train()  # and again, from the first step on
    assert run.state.global_step == 3


def test_an_sft_trainer_ends_after_the_step(tmp_path: Path) -> None:
    import trl
    from datasets import Dataset

    model = get_model(tiny("llama", "CAUSAL_LM"), ["lora", Enough()], task="CAUSAL_LM")
    args = quiet(tmp_path, kind=trl.SFTConfig, max_steps=6, per_device_train_batch_size=2, bf16=False)
    data = Dataset.from_list([{"text": text} for text in ("the cat is good", "the dog is bad", "york", "paris")] * 4)
    run = with_plugins(trl.SFTTrainer)(
        model=model, args=args, train_dataset=data, processing_class=tiny_tokenizer("decoder")
    )
    run.train()
    assert run.state.global_step == 3


def session_run(folder: Path, hook: str, when: int, *, resume: bool = False) -> tuple[Session, nn.Module]:
    model = built(["full", Enough(hook=hook, when=when)])
    session = Session(model, Accelerator(cpu=True, gradient_accumulation_steps=2), epochs=3)
    optimizer = session.optimizer(torch.optim.SGD, lr=0.1)
    loader = session.loader(rows(), 2, collate_fn=default_data_collator)
    if resume:
        assert session.resume(folder)
    for batch in session.batches(loader):
        with session.accelerator.accumulate(session.model):
            session.accelerator.backward(session.loss(batch))
            optimizer.step()
            optimizer.zero_grad()
        if session.accelerator.sync_gradients:
            session.evaluated({"eval_loss": 0.5})
            session.save(folder)
    return session, model


@pytest.mark.parametrize(("hook", "when"), HOOKS)
def test_a_sessions_batches_end_after_the_step_and_a_resumed_one_makes_no_other(
    hook: str, when: int, tmp_path: Path
) -> None:
    session, model = session_run(tmp_path, hook, when)
    assert session.step == 3
    assert {row.steps for row in model.peft_plus.engagement["train"]} == {3}
    again, resumed = session_run(tmp_path, hook, when, resume=True)
    assert again.step == 3
    assert same(resumed, weights(model))


@pytest.mark.parametrize(("hook", "when"), HOOKS)
def test_a_run_killed_when_it_had_stopped_makes_no_other_step(hook: str, when: int, tmp_path: Path) -> None:
    def made() -> Any:
        settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "seed": 3}
        return trainer(built(["full", Enough(hook=hook, when=when)]), tmp_path, eval_dataset=rows()[:4], **settings)

    whole = made()
    whole.train()
    end = weights(whole.model)
    for step in (2, 3):
        again = made()
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert again.state.global_step == 3
        assert same(again.model, end)


@dataclass(kw_only=True)
class Twice(Plugin):
    """Two equal stages."""

    name: ClassVar[str] = "twice"

    def plan_stages(self, stages):
        return [peft_plus.Stage(name="one"), peft_plus.Stage(name="two")]


def test_a_stage_that_is_stopped_is_followed_by_the_next(tmp_path: Path) -> None:
    model = built(["full", Enough(), Twice()])
    outputs = peft_plus.fit(
        model,
        quiet(tmp_path, max_steps=6, per_device_train_batch_size=4, learning_rate=0.1),
        train_dataset=rows(),
        data_collator=default_data_collator,
    )
    assert [output.global_step for output in outputs] == [3, 3]


# ---- at and mean -----------------------------------------------------------------------------------------------------


def test_a_run_at_another_step_draws_what_it_draws_there() -> None:
    def draw(run: Run) -> float:
        return float(torch.rand((), generator=run.generator("mine")))

    run = Run(model=nn.Identity(), task=None, num_blocks=3, step=7, seed=1)  # type: ignore[arg-type]
    there = run.at(4)
    assert (there.step, run.step) == (4, 7)
    assert draw(there) == draw(Run(model=nn.Identity(), task=None, num_blocks=3, step=4, seed=1))  # type: ignore[arg-type]
    assert draw(there) != draw(run)
    there.log(x=1.0)
    there.stop("from there")
    assert (run.logged, run.stop_reasons) == ({"x": 1.0}, ["from there"])


def test_the_mean_on_one_process_is_the_number() -> None:
    make: Callable[..., Any] = Run
    assert make(model=nn.Identity(), task=None, num_blocks=3).mean(0.1) == 0.1
