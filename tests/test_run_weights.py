"""`run.gradient`, `weight`, `keep` and `restore`: whole, exact, and the same after a kill."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainerCallback, default_data_collator

from peft_plus import EngagementError, MethodError, Plugin, PluginError, Run, Session, get_model

from .bad_inputs import built, rows, same, trainer, weights
from .models import tiny
from .scale import distance

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")


# ---- keep and restore ----------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Returns(Plugin):
    """Copies the weights when told, and puts them back at other steps; block 1 trains in the first steps alone.

    Args:
        at: `evaluation` or `step`: the hook in which it acts.
    """

    name: ClassVar[str] = "returns"

    keeps: dict[int, str] = field(default_factory=lambda: {1: "a", 3: "b"})
    returns: dict[int, str] = field(default_factory=lambda: {2: "a", 5: "b", 6: "a"})
    at: str = "step"
    rests_from: int = 4

    def may_train(self, run, param):
        return param.depth != 1 or run.step < self.rests_from

    def on_step_end(self, run):
        if self.at == "step":
            self._act(run)

    def on_evaluate(self, run):
        if self.at == "evaluation":
            self._act(run)

    def _act(self, run: Run) -> None:
        for name in ("a", "b"):
            begins = [step for step, given in self.keeps.items() if given == name]
            assert run.kept(name) == (run.step > begins[0])
        if run.step in self.keeps:
            run.keep(self.keeps[run.step])
        if run.step in self.returns:
            run.restore(self.returns[run.step])


class Steps(TrainerCallback):
    """The weights right before a step, and right after its update."""

    def __init__(self) -> None:
        self.before: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self.before.append(weights(model))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self.after.append(weights(model))


def run_of(folder: Path, method: Any, *, at: str = "step", **given: Any) -> Any:
    """A Trainer over 8 steps that evaluates, and saves, after each."""
    torch.manual_seed(0)
    model = get_model(tiny("bert", hidden_dropout_prob=0.1), method)
    settings: dict[str, Any] = {"max_steps": 8, "seed": 3, "optim": "adamw_torch", "learning_rate": 1e-2}
    if at == "evaluation":
        settings |= {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": rows()[:4]}
    return trainer(model, folder, **{**settings, **given})


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("at", ["step", "evaluation"])
@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_what_comes_back_is_what_was_kept_bit_for_bit(tuner: str, at: str, tmp_path: Path) -> None:
    steps = Steps()
    run = run_of(tmp_path, [tuner, Returns(at=at)], at=at, callbacks=[steps])
    run.train()
    after = [weights(run.model), *steps.after]  # after[s]: of s steps
    assert equal(steps.before[2], after[1])
    assert equal(steps.before[5], after[3])  # also what was frozen meanwhile
    assert equal(steps.before[6], after[1])
    assert all(equal(steps.before[step], after[step]) for step in (1, 3, 4, 7))
    assert not equal(after[1], after[2])


@pytest.mark.parametrize("at", ["step", "evaluation"])
def test_resumed_at_every_step_it_ends_bit_identical(at: str, tmp_path: Path) -> None:
    def made(**saving: Any) -> Any:
        return run_of(tmp_path, ["lora", Returns(at=at)], at=at, **saving)

    whole = made(save_strategy="steps", save_steps=1)
    whole.train()
    end = weights(whole.model)
    for step in range(1, 8):
        again = made()
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert same(again.model, end), step


def test_a_checkpoint_of_the_step_holds_the_weights_that_were_put_back(tmp_path: Path) -> None:
    steps = Steps()
    saving = {"save_strategy": "steps", "save_steps": 1}
    run_of(tmp_path, ["full", Returns(at="evaluation")], at="evaluation", callbacks=[steps], **saving).train()
    saved = peft_plus_weights(tmp_path / "checkpoint-5")
    assert all(torch.equal(saved[name], tensor) for name, tensor in steps.after[2].items())


def peft_plus_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("stop", [None, 2, 4, 5])
def test_a_session_does_it_too_and_goes_on_bit_identical(stop: int | None, tmp_path: Path) -> None:
    def run(folder: Path, stop: int | None = None, resume: bool = False) -> nn.Module:
        torch.manual_seed(0)
        model = get_model(tiny("bert", hidden_dropout_prob=0.1), ["lora", Returns(at="evaluation")])
        session = Session(model, Accelerator(cpu=True), max_steps=8)
        optimizer = session.optimizer(torch.optim.AdamW, lr=1e-2)
        loader = session.loader(rows(), 4, collate_fn=default_data_collator)
        if resume:
            assert session.resume(folder)
        else:
            torch.manual_seed(1)
        for batch in session.batches(loader):
            session.accelerator.backward(session.loss(batch))
            optimizer.step()
            optimizer.zero_grad()
            session.evaluated({"eval_loss": 1.0})
            if session.step == stop:
                session.save(folder)
                break
        return model

    whole = run(tmp_path)
    if stop is not None:
        run(tmp_path, stop)
        assert same(run(tmp_path, resume=True), weights(whole))


@pytest.mark.parametrize(
    ("hook", "call", "says"),
    [
        (
            "on_step_end",
            "restore",
            r"on_step_end at step 1: ValueError: run\.restore\('x'\): nothing is kept under that",
        ),
        (
            "on_pre_optimizer_step",
            "keep",
            r"run\.keep\('x'\): weights are kept and put back in on_stage_begin",
        ),
        (
            "lr_scale",
            "restore",
            r"lr_scale at step 0: RuntimeError: run\.restore\('x'\): weights are kept and put back",
        ),
    ],
)
def test_a_call_at_the_wrong_time_or_for_nothing_is_told(hook: str, call: str, says: str, tmp_path: Path) -> None:
    def act(self: Any, run: Run, *_: Any) -> None:
        getattr(run, call)("x")

    act.__signature__ = __import__("inspect").signature(getattr(Plugin, hook))  # type: ignore[attr-defined]
    plugin = type("Early", (Plugin,), {"name": "early", hook: act})()
    with pytest.raises(PluginError, match=says):
        trainer(built(["full", plugin]), tmp_path).train()


# ---- the proof of engagement -----------------------------------------------------------------------------------------


class TakesBack(Plugin):
    """Block 1 trains in steps 2 and 3 alone, and what was before them comes back."""

    name = "takes_back"

    def may_train(self, run, param):
        return param.depth != 1 or run.step in (2, 3)

    def on_step_end(self, run):
        if run.step == 2:
            run.keep("before")
        if run.step == 4:
            run.restore("before")


def test_a_group_whose_training_was_taken_back_did_move(tmp_path: Path) -> None:
    model = built(["full", TakesBack()])
    start = weights(model)
    trainer(model, tmp_path, optim="adamw_torch").train()
    block = [name for name in start if "layer.0." in name]
    assert all(torch.equal(model.get_parameter(name), start[name]) for name in block)
    (row,) = [row for row in model.peft_plus.engagement["train"] if row.group == (1, "base")]
    assert (row.steps, row.moved, row.tensors) == (2, len(block), len(block))


class Meddle(TrainerCallback):
    """Changes one bit of a frozen weight, once, before plugins hear of the step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        if state.global_step == self.step:
            bits = model.get_parameter(NAME).detach().view(-1)[:1].view(torch.int32)
            bits ^= 1


NAME = "bert.encoder.layer.0.output.dense.weight"


@pytest.mark.parametrize("step", [5, 6, 7])
def test_what_moves_a_frozen_weight_is_caught_before_and_after_weights_come_back(step: int, tmp_path: Path) -> None:
    """Block 1 rests from step 4; weights come back after the fifth and the sixth step."""
    run = run_of(tmp_path, ["full", Returns()], callbacks=[Meddle(step)])
    with pytest.raises(EngagementError, match=f"1 frozen tensors moved.*{re.escape(NAME)}"):
        run.train()


# ---- gradient and weight -------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Looks(Plugin):
    """Keeps the gradients and the weights of each step."""

    name: ClassVar[str] = "looks"

    seen: list[Any] = field(init=False, default_factory=list)

    def may_train(self, run, param):
        return param.depth != 3

    def on_pre_optimizer_step(self, run):
        gradients = {p.name: g.clone() for p in run.params if (g := run.gradient(p)) is not None}
        assert not any(g.requires_grad for g in gradients.values())
        self.seen.append((run.step, gradients, {p.name: run.weight(p).clone() for p in run.params}))

    def state_dict(self):
        return {}


def big_batch(model: nn.Module, data: list[dict[str, Tensor]], *, frozen: str) -> dict[str, Tensor]:
    """The gradients of the mean over a whole step's rows, in plain torch."""
    model.zero_grad()
    batch = default_data_collator(data)
    nn.functional.cross_entropy(model(**batch).logits, batch["labels"]).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None and frozen not in n}


@pytest.mark.parametrize("loop", ["trainer", "session"])
def test_under_accumulation_they_are_those_of_one_big_batch(loop: str, tmp_path: Path) -> None:
    """Three micro-batches to a step; in the last step of the epoch one alone is left."""
    data, method = rows()[:16], ["full", Looks()]
    start = tiny("bert")
    model = get_model(tiny("bert"), method)
    if loop == "trainer":
        settings = {"gradient_accumulation_steps": 3, "max_grad_norm": 0.0, "max_steps": 2}
        trainer(model, tmp_path, data, **settings).train()
    else:
        session = Session(model, Accelerator(cpu=True, gradient_accumulation_steps=3), epochs=1)
        optimizer = session.optimizer(torch.optim.SGD, lr=0.1)
        for batch in session.batches(session.loader(data, 4, collate_fn=default_data_collator, shuffle=False)):
            with session.accelerator.accumulate(session.model):
                session.accelerator.backward(session.loss(batch))
                optimizer.step()
                optimizer.zero_grad()
    first, second = model.peft_plus.plugins[0].seen
    assert (first[0], second[0]) == (0, 1)
    for (_, gradients, now), part in ((first, data[:12]), (second, data[12:])):
        start.load_state_dict(now)
        expected = big_batch(start, part, frozen="layer.2.")
        assert gradients.keys() == expected.keys()
        assert distance(gradients, expected) < 1e-5


def test_they_are_clipped_where_the_loop_clips(tmp_path: Path) -> None:
    model = get_model(tiny("bert"), ["full", Looks()])
    trainer(model, tmp_path, max_grad_norm=0.01, max_steps=2).train()
    for _, gradients, _ in model.peft_plus.plugins[0].seen:
        assert float(sum(g.double().square().sum() for g in gradients.values()) ** 0.5) == pytest.approx(0.01, rel=1e-3)


class Overflow(TrainerCallback):
    """Step 1 overflows."""

    def __init__(self, model: nn.Module) -> None:
        self.now = -1
        model.get_parameter("classifier.weight").register_hook(
            lambda g: torch.full_like(g, float("inf")) if self.now == 1 else g
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.now = state.global_step


@pytest.mark.parametrize("norm", [0.0, 1.0])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_behind_a_gradient_scaler_they_are_unscaled_and_skipped_steps_are_not_asked(
    optim: str, norm: float, tmp_path: Path
) -> None:
    seen = []
    for scaler in (False, True):
        model = get_model(tiny("bert"), ["full", Looks()])
        run = trainer(model, tmp_path, max_grad_norm=norm, max_steps=4, optim=optim, learning_rate=1e-3)
        if scaler:
            scale = run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            # What clipping calls first where fp16 is asked for.
            run.accelerator.unscale_gradients = lambda run=run, scale=scale: scale.unscale_(run.optimizer.optimizer)
            run.add_callback(Overflow(model))
        run.train()
        seen.append(model.peft_plus.plugins[0].seen)
    plain, scaled = seen
    assert [step for step, *_ in scaled] == [0, 2, 3]
    assert distance(scaled[0][1], plain[0][1]) < 1e-5


@pytest.mark.parametrize("fused", [False, True])
def test_a_session_behind_a_gradient_scaler(fused: bool) -> None:
    """A fused optimizer is stepped also where gradients overflowed, and leaves all as it is."""
    seen = []
    for scaler in (False, True):
        model = get_model(tiny("bert"), ["full", Looks()])
        accelerator = Accelerator(cpu=True)
        if scaler:
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        session = Session(model, accelerator, max_steps=4)
        overflow = Overflow(model)
        optimizer = session.optimizer(torch.optim.AdamW, lr=1e-3, fused=fused)
        for batch in session.batches(session.loader(rows(), 4, collate_fn=default_data_collator, shuffle=False)):
            overflow.now = session.step if scaler else -1
            before = weights(model)
            accelerator.backward(session.loss(batch))
            optimizer.step()
            optimizer.zero_grad()
            assert same(model, before) == (scaler and overflow.now == 1)
        seen.append(model.peft_plus.plugins[0].seen)
    plain, scaled = seen
    assert [step for step, *_ in scaled] == [0, 2, 3]
    assert distance(scaled[0][1], plain[0][1]) < 1e-5


class Scaled:
    """A bare loop of six steps behind a gradient scaler, whose second update overflows."""

    def __init__(self, folder: Path, accumulation: int) -> None:
        self.folder = folder
        self.model = get_model(tiny("bert"), ["full", Returns()])
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        self.session = Session(self.model, self.accelerator, max_steps=6)
        self.optimizer = self.session.optimizer(torch.optim.AdamW, lr=1e-3)

    def train(self, resume: bool = False) -> None:
        session, overflow = self.session, Overflow(self.model)
        loader = session.loader(rows(), 2, collate_fn=default_data_collator, shuffle=False)
        if resume:
            assert session.resume(self.folder / "checkpoint-2")
        for batch in session.batches(loader):
            with self.accelerator.accumulate(session.model):
                overflow.now = session.step
                self.accelerator.backward(session.loss(batch))
                with pytest.raises(MethodError, match="in the middle of a step"):
                    session.evaluated({"eval_loss": 1.0})  # also right after a step that was skipped
                self.optimizer.step()
                self.optimizer.zero_grad()
            if self.accelerator.sync_gradients:
                session.evaluated({"eval_loss": 1.0})
                session.save(self.folder)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_that_a_scaler_skipped_is_whole_for_evaluations_and_checkpoints(
    accumulation: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    whole = Scaled(tmp_path / "whole", accumulation)
    start = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    whole.train()
    assert [(tmp_path / "whole" / f"checkpoint-{step}").is_dir() for step in range(1, 8)] == [True] * 6 + [False]
    resumed = Scaled(tmp_path / "whole", accumulation)
    resumed.model.load_state_dict(start)
    resumed.train(resume=True)
    assert resumed.session.step == 6
    assert same(resumed.model, weights(whole.model))


def test_a_run_that_nobody_trains_offers_them_too() -> None:
    """As a plugin's own tests make it."""
    model = built("full")
    params = tuple(model.peft_plus.params.values())
    run = Run(model=model, task=model.peft_plus.task, num_blocks=3, params=params)
    before = weights(model)
    run.keep("start")
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.zero_()
    assert not run.weight(params[0]).any()
    assert run.gradient(params[0]) is None
    run.restore("start")
    assert same(model, before)
    assert run.kept("start")
    assert not run.kept("end")
