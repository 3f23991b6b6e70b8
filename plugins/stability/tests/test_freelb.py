"""FreeLB against plain torch: a second model, the same first noise through `inputs_embeds`, ascent by hand."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import default_data_collator

from peft_plus import MethodError, PluginError, Run, Session, Stage, get_model
from peft_plus_stability.freelb import FreeLB, ascend, real_tokens
from tests.consistency import (
    TASKS,
    Grab,
    accumulated,
    distance,
    gradients,
    model_and_batch,
    sampler_order,
    trainer_of,
    two_passes,
)
from tests.models import rows_of, tiny

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")
LARGE = {"steps": 3, "step_size": 0.4, "init_magnitude": 2.0}


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def first_noise(data: Mapping[str, Tensor], width: int, magnitude: float, seed: int = 42) -> Tensor:
    """δ₀ by its formula: U(−1, 1) · magnitude / √(real tokens · width), each example from its own stream."""
    ids = data["input_ids"]
    texts = ids.reshape(-1, ids.shape[-1])
    mask = data.get("attention_mask", torch.ones_like(ids)).reshape(texts.shape).float()
    run = Run(model=nn.Linear(1, 1), task=None, num_blocks=0, seed=seed, stage=Stage())  # type: ignore[arg-type]
    noise = torch.zeros(*texts.shape, width)
    per_row = len(texts) // len(ids)
    for i in range(len(texts)):
        generator = run.generator("freelb", i // per_row, i % per_row)
        noise[i].uniform_(-magnitude, magnitude, generator=generator)
    return noise * mask[..., None] / (mask.sum(1) * width).sqrt()[:, None, None]


def loss_of(task: str, data: Mapping[str, Tensor], output: Any) -> Tensor:
    """The task's mean loss of an output."""
    match task:
        case "QUESTION_ANS":
            start = F.cross_entropy(output.start_logits, data["start_positions"])
            return (start + F.cross_entropy(output.end_logits, data["end_positions"])) / 2
        case "regression":
            return F.mse_loss(output.logits.squeeze(), data["labels"].squeeze())
        case "multi_label_classification":
            return F.binary_cross_entropy_with_logits(output.logits, data["labels"])
        case "SEQ_CLS" | "MULTIPLE_CHOICE":
            return F.cross_entropy(output.logits, data["labels"])
    logits, labels = output.logits, data["labels"]
    if task == "CAUSAL_LM":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def by_hand(
    twin: nn.Module, name: str, task: str, data: Mapping[str, Tensor], noise: Tensor, *, steps: int, step_size: float
) -> float:
    """Its gradient is left in `twin`; the mean loss of the passes."""
    rows, total = len(data["input_ids"]), 0.0
    for _ in range(steps):
        noise = noise.detach().requires_grad_()
        loss = loss_of(task, data, two_passes(twin, name, data, noise)[1]) / steps
        loss.backward()
        assert noise.grad is not None
        g = noise.grad.reshape(rows, -1)
        norm = g.norm(dim=1, keepdim=True)
        moved = torch.where(norm > 0, g / norm.clamp(min=1e-30), torch.zeros_like(g))
        noise = noise.detach() + step_size * moved.view_as(noise)
        total += float(loss.detach())
    return total


@pytest.mark.parametrize(("name", "task"), TASKS)
def test_loss_and_gradient_against_plain_torch(name: str, task: str, tmp_path: Path) -> None:
    model, data = model_and_batch(name, task)
    twin = copy.deepcopy(model)
    grab = Grab()
    settings: dict[str, Any] = {"max_steps": 1, "max_grad_norm": 0.0, "logging_strategy": "steps", "logging_steps": 1}
    run = trainer_of(get_model(model, ["full", FreeLB(**LARGE)]), rows_of(data), tmp_path, [grab], **settings)
    run.train()
    shuffled = {key: value[sampler_order(len(data["input_ids"]))] for key, value in data.items()}
    noise = first_noise(shuffled, 32, LARGE["init_magnitude"])
    loss = by_hand(twin, name, task, shuffled, noise, steps=3, step_size=LARGE["step_size"])
    assert distance(grab.gradients, gradients(twin)) < 2e-5
    assert run.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("micro_batches", [2, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_micro_batches_and_checkpointing_change_nothing(
    micro_batches: int, checkpointing: bool, tmp_path: Path
) -> None:
    """An example's noise depends on no other example."""
    got = []
    for parts, checkpoints in ((1, False), (micro_batches, checkpointing)):
        model, data = model_and_batch("bert", "SEQ_CLS", rows=8)
        grab = Grab()
        settings = {**accumulated(8, parts), "max_steps": 1, "activation_checkpointing": checkpoints}
        trainer_of(get_model(model, ["full", FreeLB(**LARGE)]), rows_of(data), tmp_path, [grab], **settings).train()
        got.append(grab.gradients)
    assert distance(got[1], got[0]) < 1e-5


@pytest.mark.parametrize("tuner", ["lora", "prompt_tuning", "prefix_tuning", "p_tuning"])
def test_any_tuner_gets_a_gradient_on_the_noise(tuner: str, tmp_path: Path) -> None:
    model, data = model_and_batch("llama", "CAUSAL_LM")
    run = trainer_of(get_model(model, [tuner, FreeLB(**LARGE)], task="CAUSAL_LM"), rows_of(data), tmp_path, max_steps=2)
    run.train()
    assert run.state.log_history[-1]["train_loss"] > 0


def test_one_pass_without_first_noise_is_the_plain_run_bit_for_bit(tmp_path: Path) -> None:
    ends = []
    for method in ("lora", ["lora", FreeLB(steps=1, init_magnitude=0.0)]):
        torch.manual_seed(0)
        model, data = model_and_batch("bert", "SEQ_CLS")
        run = trainer_of(get_model(model, method), rows_of(data), tmp_path, max_steps=3)
        run.train()
        ends.append(dict(run.model.named_parameters()))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_session_gives_the_trainers_gradient(tmp_path: Path) -> None:
    model, data = model_and_batch("bert", "SEQ_CLS")
    twin = copy.deepcopy(model)
    session = Session(get_model(model, ["full", FreeLB(**LARGE)]), Accelerator(cpu=True), max_steps=1)
    optimizer = session.optimizer(torch.optim.SGD, lr=1e-2)
    loader = session.loader(rows_of(data), 4, shuffle=False, collate_fn=default_data_collator)
    got: dict[str, Tensor] = {}
    for batch in session.batches(loader):
        session.accelerator.backward(session.loss(batch))
        got = gradients(session.bare_model)
        optimizer.step()
        optimizer.zero_grad()
    loss = by_hand(twin, "bert", "SEQ_CLS", data, first_noise(data, 32, 2.0), steps=3, step_size=0.4)
    assert distance(got, gradients(twin)) < 2e-5
    assert session.logs()["loss"] == pytest.approx(loss, rel=1e-4)


def test_a_step_has_the_length_that_was_asked_for_and_no_gradient_moves_nothing() -> None:
    draw = torch.Generator().manual_seed(0)
    delta, gradient = torch.randn(6, 5, 4, generator=draw), torch.randn(6, 5, 4, generator=draw)
    gradient[2:4] = 0
    moved = ascend(delta, gradient, rows=3, step_size=0.3, max_norm=None) - delta
    norms = moved.reshape(3, -1).norm(dim=1)
    assert torch.allclose(norms, torch.tensor([0.3, 0.0, 0.3]), atol=1e-6)
    bounded = ascend(delta, gradient, rows=3, step_size=0.3, max_norm=0.5).reshape(3, -1).norm(dim=1)
    assert torch.allclose(bounded, torch.full((3,), 0.5), atol=1e-6)
    short = ascend(1e-3 * delta, gradient, rows=3, step_size=0.1, max_norm=0.5)
    assert torch.equal(short, ascend(1e-3 * delta, gradient, rows=3, step_size=0.1, max_norm=None))


def test_padding_gets_no_noise() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert torch.equal(real_tokens({"attention_mask": mask}, torch.zeros(2, 3, 4))[..., 0], mask.float())
    assert real_tokens({}, torch.zeros(2, 3, 4)).all()


@pytest.mark.parametrize(
    ("setting", "value"),
    [("steps", 0), ("step_size", 0.0), ("init_magnitude", -1.0), ("max_norm", 0.0)],
)
def test_a_setting_out_of_range_is_refused(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{setting}="):
        FreeLB(**{setting: value})


def test_noise_that_a_half_precision_base_would_swallow_is_refused(tmp_path: Path) -> None:
    model, data = model_and_batch("bert", "SEQ_CLS")
    plugin = FreeLB(init_magnitude=1e-4, step_size=1e-4)
    with pytest.raises((PluginError, ValueError), match=r"vanishes in the embeddings in torch.bfloat16"):
        trainer_of(get_model(model.bfloat16(), ["full", plugin]), rows_of(data), tmp_path, max_steps=1).train()


def test_it_is_refused_beside_other_noise() -> None:
    with pytest.raises(MethodError, match="cannot run together"):
        get_model(tiny("bert"), {"full": {}, "freelb": {}, "smart": {}})
