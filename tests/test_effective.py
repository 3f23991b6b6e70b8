"""`effective_weight`: passes compute with it, gradients flow through it, and nobody else ever sees it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback, default_data_collator

from peft_plus import LossTerm, Plugin, PluginError, Session, get_model

from .bad_inputs import rows, same, trainer, weights
from .consistency import Grab, distance, gradients, model_and_batch, sampler_order, trainer_of
from .models import rows_of, tiny

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")


@dataclass(kw_only=True)
class Scaled(Plugin):
    """Computes with `factor` · w in the place of the matrices in the blocks."""

    name: ClassVar[str] = "scaled"

    factor: float = 0.5
    shape: bool = False

    def effective_weight(self, run, param, value):
        if self.shape:
            return value[:1]
        inside = len(param.shape) > 1 and 1 <= param.depth <= run.num_blocks
        return self.factor * value if inside else value


@dataclass(kw_only=True)
class Again(Plugin):
    """A second pass, whose logits count."""

    name: ClassVar[str] = "again"

    def loss_terms(self, run, batch, output):
        other = run.forward(batch).logits
        assert torch.equal(other, output.logits)
        return {"again": LossTerm(other.square().sum(), len(other), per="example")}


def gradients_of(method: Any, folder: Path, name: str, task: str, **settings: Any) -> tuple[dict[str, Tensor], Any]:
    model, data = model_and_batch(name, task)
    grab = Grab()
    run = trainer_of(
        get_model(model, method, task=task), rows_of(data), folder, [grab], max_steps=1, max_grad_norm=0.0, **settings
    )
    run.train()
    return grab.gradients, run.model


def by_hand(name: str, task: str, factor: float) -> dict[str, Tensor]:
    """The gradient at `factor` · w, times `factor` (the chain rule), by a model that holds the scaled weights."""
    model, data = model_and_batch(name, task)
    order = sampler_order(len(next(iter(data.values()))))
    params = get_model(model, "full", task=task).peft_plus.params
    scaled = {n for n, p in params.items() if len(p.shape) > 1 and 1 <= p.depth <= model.peft_plus.layers.num_blocks}
    with torch.no_grad():
        for n, tensor in model.named_parameters():
            if n in scaled:
                tensor.mul_(factor)
    model.train()
    model(**{key: value[order] for key, value in data.items()}).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: g * (factor if n in scaled else 1) for n, g in grads.items()}


@pytest.mark.parametrize("checkpointing", [None, True, False])
@pytest.mark.parametrize(("name", "task"), [("bert", "SEQ_CLS"), ("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")])
def test_gradients_are_those_of_the_chain_rule(
    name: str, task: str, checkpointing: bool | None, tmp_path: Path
) -> None:
    """Also where activation checkpointing computes again in the backward, reentrant or not."""
    settings: dict[str, Any] = {}
    if checkpointing is not None:
        settings = {
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"use_reentrant": checkpointing},
        }
    got, _ = gradients_of(["full", Scaled()], tmp_path, name, task, **settings)
    assert distance(got, by_hand(name, task, 0.5)) < 1e-5


def test_a_factor_of_one_is_the_plain_run_bit_for_bit(tmp_path: Path) -> None:
    runs = [trainer(get_model(tiny("bert"), method), tmp_path) for method in ("full", ["full", Scaled(factor=1.0)])]
    for run in runs:
        run.train()
    assert same(runs[1].model, weights(runs[0].model))


def test_a_second_pass_computes_with_the_same_weights(tmp_path: Path) -> None:
    gradients_of(["full", Scaled(), Again()], tmp_path, "bert", "SEQ_CLS")


class Looks(TrainerCallback):
    """Evaluates by hand after each step, and after each backward."""

    def __init__(self, model: Any, data: Any) -> None:
        self.model, self.data, self.seen = model, data, []

    def look(self, *_: Any, **__: Any) -> None:
        assert all(isinstance(p, torch.nn.Parameter) for p in self.model.parameters())
        with torch.no_grad():
            self.seen.append(self.model(**self.data).logits)

    on_pre_optimizer_step = on_step_end = on_substep_end = look


def test_nobody_else_sees_the_other_weights(tmp_path: Path) -> None:
    """Not an evaluation, not a checkpoint, not a callback, not the optimizer; after an error neither."""
    data = model_and_batch("bert", "SEQ_CLS")[1]
    plain, scaled = (get_model(model_and_batch("bert", "SEQ_CLS")[0], m) for m in ("full", ["full", Scaled()]))
    looks = [Looks(model, data) for model in (plain, scaled)]
    settings: dict[str, Any] = {"max_steps": 1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    for model, look in zip((plain, scaled), looks, strict=True):
        trainer_of(model, rows_of(data), tmp_path, [look], **settings).train()
    assert torch.equal(looks[0].seen[0], looks[1].seen[0])  # before the first update
    assert len(looks[0].seen) == 3
    assert all(isinstance(p, torch.nn.Parameter) for p in scaled.parameters())


def test_a_session_gives_the_trainers_gradients_and_an_evaluation_in_its_body_sees_the_weights(tmp_path: Path) -> None:
    model = get_model(tiny("bert"), ["full", Scaled()])
    run = trainer(model, tmp_path, optim="sgd", max_grad_norm=0.0)
    run.train()
    again = get_model(tiny("bert"), ["full", Scaled()])
    session = Session(again, Accelerator(cpu=True), max_steps=6)
    optimizer = session.optimizer(torch.optim.SGD, lr=0.1)
    schedule = session.scheduler("linear")
    loader = session.loader(rows(), 4, shuffle=False, collate_fn=default_data_collator)
    for batch in session.batches(loader):
        session.accelerator.backward(session.loss(batch))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        assert all(isinstance(p, torch.nn.Parameter) for p in again.parameters())
    assert distance(weights(again), weights(model)) < 1e-6


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_between_backward_and_step_a_loop_finds_the_weights_that_train(reentrant: bool | None) -> None:
    """Else clipping would leave out their gradients."""
    model, data = model_and_batch("bert", "SEQ_CLS")
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model = get_model(model, ["full", Scaled()])
    session = Session(model, Accelerator(cpu=True, gradient_accumulation_steps=2), max_steps=2)
    optimizer = session.optimizer(torch.optim.SGD, lr=0.1)
    loader = session.loader(rows_of(data), 2, shuffle=False, collate_fn=default_data_collator)
    for micro_batch in session.batches(loader):
        with session.accelerator.accumulate(session.model):
            loss = session.loss(micro_batch)
            assert not all(isinstance(p, torch.nn.Parameter) for p in model.parameters())
            session.accelerator.backward(loss)
            assert all(isinstance(p, torch.nn.Parameter) for p in model.parameters())
            if session.accelerator.sync_gradients:
                norm = session.accelerator.clip_grad_norm_(session.model.parameters(), 1e-3)
                own = torch.stack([gradient.square().sum() for gradient in gradients(model).values()]).sum().sqrt()
                assert norm is not None
                assert norm > 1e-2
                assert float(own) == pytest.approx(1e-3, rel=1e-2)
            optimizer.step()
            optimizer.zero_grad()


def test_a_tied_weight_is_exchanged_wherever_it_stands(tmp_path: Path) -> None:
    @dataclass(kw_only=True)
    class Embeddings(Plugin):
        name: ClassVar[str] = "embeddings"

        def effective_weight(self, run, param, value):
            return 3 * value if "embed_tokens" in param.name else value

    data = model_and_batch("llama", "CAUSAL_LM")[1]
    expected = tiny("llama", "CAUSAL_LM", tie_word_embeddings=True)
    with torch.no_grad():
        expected.get_input_embeddings().weight.mul_(3)
        loss = float(expected(**data).loss)
    model = get_model(tiny("llama", "CAUSAL_LM", tie_word_embeddings=True), ["full", Embeddings()], task="CAUSAL_LM")
    with torch.no_grad():
        assert float(model(**data).loss) != pytest.approx(loss, rel=1e-4)
    run = trainer_of(model, rows_of(data), tmp_path, max_steps=1, logging_strategy="steps", logging_steps=1)
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)


def test_a_wrong_answer_is_told(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"effective_weight returned \(1, 32\) torch.float32 on cpu for .*; expected"):
        gradients_of(["full", Scaled(shape=True)], tmp_path, "bert", "SEQ_CLS")


@dataclass(kw_only=True)
class HeadLater(Plugin):
    """The head is frozen in the first step."""

    name: ClassVar[str] = "head_later"

    def may_train(self, run, param):
        return run.step > 0 or param.part != "head"


@dataclass(kw_only=True)
class ScaledHead(Plugin):
    name: ClassVar[str] = "scaled_head"

    def effective_weight(self, run, param, value):
        assert value.requires_grad == (run.step > 0 or param.part != "head")
        return 0.5 * value if param.part == "head" and len(param.shape) > 1 else value


def test_a_frozen_weight_is_exchanged_too(tmp_path: Path) -> None:
    expected, data = model_and_batch("bert", "SEQ_CLS")
    with torch.no_grad():
        expected.get_parameter("classifier.weight").mul_(0.5)
        loss = float(expected(**data).loss)
    model = get_model(model_and_batch("bert", "SEQ_CLS")[0], ["full", HeadLater(), ScaledHead()])
    before = model.get_parameter("classifier.weight").detach().clone()
    run = trainer_of(model, rows_of(data), tmp_path, max_steps=2, logging_strategy="steps", logging_steps=1)
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert not torch.equal(model.get_parameter("classifier.weight"), before)


@dataclass(kw_only=True)
class Breaks(Plugin):
    """Fails in its third step."""

    name: ClassVar[str] = "breaks"

    def loss_terms(self, run, batch, output):
        if run.step == 2:
            raise RuntimeError("no more")
        return {}


def test_what_is_rescued_from_a_run_that_broke_off_is_the_weights_themselves(tmp_path: Path) -> None:
    broken = get_model(tiny("bert"), ["full", Scaled(), Breaks()])
    with pytest.raises(PluginError, match="no more"):
        trainer(broken, tmp_path).train()
    whole = get_model(tiny("bert"), ["full", Scaled()])
    trainer(whole, tmp_path / "whole", save_strategy="steps", save_steps=2).train()
    saved = load_file(tmp_path / "stopped" / "model.safetensors")
    wanted = load_file(tmp_path / "whole" / "checkpoint-2" / "model.safetensors")
    assert saved.keys() == wanted.keys()
    assert all(torch.equal(saved[name], wanted[name]) for name in wanted)
