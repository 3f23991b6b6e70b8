"""`eval_weights`: what is evaluated, saved and kept at the end; training goes on with its own, also after a kill."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import default_data_collator

from peft_plus import MethodError, Plugin, PluginError, Session, get_model

from .bad_inputs import rows, same, trainer, weights
from .models import tiny

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")


@dataclass(kw_only=True)
class Mean(Plugin):
    """The mean of the weights after each step so far."""

    name: ClassVar[str] = "mean"

    wrong: bool = False
    total: dict[str, Tensor] = field(init=False, default_factory=dict)
    number: int = field(init=False, default=0)

    def on_stage_begin(self, run):
        self.total, self.number = {param.name: torch.zeros(param.shape) for param in run.params}, 0

    def on_step_end(self, run):
        self.number += 1
        for param in run.params:
            self.total[param.name] = self.total[param.name] + run.weight(param)

    def eval_weights(self, run):
        if self.wrong:
            return {"nobody": torch.zeros(())}
        return {name: total / self.number for name, total in self.total.items()} if self.number else None


def run_of(method: Any, folder: Path, **given: Any) -> Any:
    torch.manual_seed(0)
    model = get_model(tiny("bert", hidden_dropout_prob=0.1), method)
    settings: dict[str, Any] = {"seed": 3, "optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 6}
    settings |= {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": rows()[:4]}
    return trainer(model, folder, **{**settings, **given})


def steps_of(folder: Path) -> list[dict[str, Tensor]]:
    """The weights after each step of the plain run."""
    states = []
    run = run_of("full", folder, save_strategy="steps", save_steps=1)
    run.train()
    for step in range(1, 7):
        states.append(load_file(folder / f"checkpoint-{step}" / "model.safetensors"))
    return states


def mean_of(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([state[name] for state in states]).sum(0) / len(states) for name in states[0]}


def close(one: Any, other: dict[str, Tensor]) -> bool:
    return all(torch.allclose(one[name], tensor, atol=1e-7) for name, tensor in other.items())


def test_evaluation_checkpoint_and_end_have_the_means_and_training_goes_on_with_its_own(tmp_path: Path) -> None:
    states = steps_of(tmp_path / "plain")
    run = run_of(["full", Mean()], tmp_path / "mean", save_strategy="steps", save_steps=2)
    run.train()
    assert close(run.model.state_dict(), mean_of(states))
    for step in (2, 4, 6):
        expected = mean_of(states[:step])
        saved = load_file(tmp_path / "mean" / f"checkpoint-{step}" / "model.safetensors")
        assert close(saved, expected), step
        model = tiny("bert")
        model.load_state_dict(saved)
        logged = next(e["eval_loss"] for e in run.state.log_history if e["step"] == step and "eval_loss" in e)
        batch = default_data_collator(rows()[:4])
        with torch.no_grad():
            assert logged == pytest.approx(float(model.eval()(**batch).loss), rel=1e-5)


def test_it_trains_as_the_plain_run_bit_for_bit(tmp_path: Path) -> None:
    losses = []
    for method in ("lora", ["lora", Mean()]):
        run = run_of(method, tmp_path)
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("tuner", ["full", "lora"])
@pytest.mark.parametrize("best", [False, True])
def test_resumed_at_every_step_it_ends_bit_identical(tuner: str, best: bool, tmp_path: Path) -> None:
    more = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "eval_steps": 1} if best else {}

    def made() -> Any:
        return run_of([tuner, Mean()], tmp_path, save_strategy="steps", save_steps=1, **more)

    whole = made()
    whole.train()
    end = weights(whole.model)
    for step in range(1, 6):
        again = made()
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert same(again.model, end), step


def test_the_best_model_is_the_one_that_was_evaluated(tmp_path: Path) -> None:
    more = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    run = run_of(["lora", Mean()], tmp_path, save_strategy="steps", save_steps=2, **more)
    run.train()
    best = run.state.best_model_checkpoint
    assert best.endswith("checkpoint-2")
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric, rel=1e-6)


@pytest.mark.parametrize("stop", [None, 1, 4])
def test_a_session_does_it_too(stop: int | None, tmp_path: Path) -> None:
    def run(stop: int | None = None, resume: bool = False) -> tuple[nn.Module, list[float]]:
        torch.manual_seed(0)
        model = get_model(tiny("bert", hidden_dropout_prob=0.1), ["lora", Mean()])
        session = Session(model, Accelerator(cpu=True), max_steps=6)
        optimizer = session.optimizer(torch.optim.AdamW, lr=1e-2)
        loader = session.loader(rows(), 4, collate_fn=default_data_collator)
        if resume:
            assert session.resume(tmp_path)
        else:
            torch.manual_seed(1)
        losses = []
        for batch in session.batches(loader):
            session.accelerator.backward(session.loss(batch))
            optimizer.step()
            optimizer.zero_grad()
            before = weights(model)
            with session.eval_weights():
                assert session.step == 1 or not same(model, before)
                losses.append(model(**default_data_collator(rows()[:4])).loss.item())
            assert same(model, before)
            if session.step == stop:
                session.save(tmp_path)
                break
        return model, losses

    whole, _ = run()
    if stop is not None:
        run(stop)
        assert same(run(resume=True)[0], weights(whole))


def test_a_wrong_answer_and_a_second_owner_are_told(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="eval_weights must return a mapping"):
        run_of(["full", Mean(wrong=True)], tmp_path).train()
    other = type("Other", (Mean,), {"name": "other"})
    with pytest.raises(MethodError, match="both say which weights are evaluated and saved"):
        get_model(tiny("bert"), ["full", Mean(), other()])
    best = type("Best", (Plugin,), {"name": "best", "restores_best": True})
    for pair in (Mean(), best()), (best(), Mean()):
        with pytest.raises(MethodError, match=r"'best' .* puts back the weights that were best .*'mean'"):
            get_model(tiny("bert"), ["full", *pair])


def test_an_evaluation_told_of_too_early_is_an_error() -> None:
    """Weights put back within would be overwritten without a word."""
    model = get_model(tiny("bert"), ["lora", Mean()])
    session = Session(model, Accelerator(cpu=True), max_steps=2)
    optimizer = session.optimizer(torch.optim.AdamW, lr=1e-2)
    loader = session.loader(rows(), 4, collate_fn=default_data_collator)
    batch = next(session.batches(loader))
    session.accelerator.backward(session.loss(batch))
    optimizer.step()
    with session.eval_weights(), pytest.raises(MethodError, match=r"after `with session.eval_weights"):
        session.evaluated({"eval_loss": 1.0})
