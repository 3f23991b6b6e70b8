"""FreeLB against plain torch: a second model, the same first noise through `inputs_embeds`, ascent by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import default_data_collator

from peft_plus import LossTerm, MethodError, Plugin, PluginError, Run, Session, Stage, get_model
from peft_plus_stability.freelb import FreeLB, ascend, real_tokens
from tests.bare_loop import on_nf4
from tests.consistency import (
    TASKS,
    Grab,
    accumulated,
    distance,
    gradients,
    lively,
    model_and_batch,
    sampler_order,
    trainer_of,
    two_passes,
)
from tests.models import batch, rows_of, tiny

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


def noised_pass(twin: nn.Module, name: str, data: Mapping[str, Tensor], noise: Tensor) -> Any:
    """The output with `noise` on the embeddings; the clean pass beside it must not draw random numbers."""
    if twin.training:
        inputs = {key: value for key, value in data.items() if key not in ("input_ids", "labels")}
        embeddings: Any = twin.get_input_embeddings()  # type: ignore[operator]
        return twin(inputs_embeds=embeddings(data["input_ids"]) + noise, **inputs)
    return two_passes(twin, name, data, noise)[1]


def by_hand(
    twin: nn.Module,
    name: str,
    task: str,
    data: Mapping[str, Tensor],
    noise: Tensor,
    *,
    steps: int,
    step_size: float,
    before_pass: Callable[[], Any] = lambda: None,
    term: Callable[[Any], Tensor] = lambda _: torch.zeros(()),
) -> float:
    """Its gradient is left in `twin`; the mean loss of the passes.

    Args:
        term: of a pass's output, to be added to its loss.
    """
    rows, total = len(data["input_ids"]), 0.0
    for _ in range(steps):
        noise = noise.detach().requires_grad_()
        before_pass()
        output = noised_pass(twin, name, data, noise)
        loss = (loss_of(task, data, output) + term(output)) / steps
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


@pytest.mark.parametrize("settings", [{"steps": 1}, {"steps": 3, "step_size": 0.0}], ids=["one pass", "no step"])
def test_without_noise_it_is_the_plain_run_bit_for_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    ends = []
    for method in ("lora", ["lora", FreeLB(**settings, init_magnitude=0.0)]):
        torch.manual_seed(0)
        model, data = model_and_batch("bert", "SEQ_CLS")
        run = trainer_of(get_model(model, method), rows_of(data), tmp_path, max_steps=3)
        run.train()
        ends.append(dict(run.model.named_parameters()))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_step_size_of_zero_leaves_the_first_noise_in_one_pass(tmp_path: Path) -> None:
    model, data = model_and_batch("bert", "SEQ_CLS")
    twin, draws, grab = copy.deepcopy(model), Draws(model), Grab()
    plugin = FreeLB(steps=3, step_size=0.0, init_magnitude=2.0)
    run = trainer_of(
        get_model(model, ["full", plugin]), rows_of(data), tmp_path, [grab], max_steps=1, max_grad_norm=0.0
    )
    run.train()
    shuffled = {key: value[sampler_order(4)] for key, value in data.items()}
    by_hand(twin, "bert", "SEQ_CLS", shuffled, first_noise(shuffled, 32, 2.0), steps=1, step_size=0.0)
    assert distance(grab.gradients, gradients(twin)) < 2e-5
    assert len(draws.states) == 1


def test_a_session_gives_the_trainers_gradient(tmp_path: Path) -> None:
    model, data = model_and_batch("bert", "SEQ_CLS")
    twin = copy.deepcopy(model)
    session = Session(get_model(model, ["full", FreeLB(**LARGE)]), Accelerator(cpu=True), max_steps=1)
    optimizer = session.optimizer(torch.optim.SGD, lr=1e-2)
    loader = session.loader(rows_of(data), 4, shuffle=False, collate_fn=default_data_collator)
    got: dict[str, Tensor] = {}
    for micro_batch in session.batches(loader):
        session.accelerator.backward(session.loss(micro_batch))
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
    [("steps", 0), ("step_size", -0.1), ("init_magnitude", -1.0), ("max_norm", 0.0)],
)
def test_a_setting_out_of_range_is_refused(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{setting}="):
        FreeLB(**{setting: value})


def test_noise_that_a_half_precision_base_would_swallow_is_refused(tmp_path: Path) -> None:
    model, data = model_and_batch("bert", "SEQ_CLS")
    plugin = FreeLB(init_magnitude=1e-4, step_size=1e-4)
    with pytest.raises(PluginError, match=r"'freelb'.*vanishes in the embeddings in torch.bfloat16"):
        trainer_of(get_model(model.bfloat16(), ["full", plugin]), rows_of(data), tmp_path, max_steps=1).train()


def test_it_is_refused_beside_other_noise() -> None:
    with pytest.raises(MethodError, match="cannot run together"):
        get_model(tiny("bert"), {"full": {}, "freelb": {}, "smart": {}})


# ---- what the passes share -----------------------------------------------------------------------------------------


class Draws:
    """The random state with which each training pass began."""

    def __init__(self, model: nn.Module) -> None:
        self.states: list[Tensor] = []
        model.register_forward_pre_hook(
            lambda *_: self.states.append(torch.get_rng_state()) if model.training else None
        )


def dropping() -> tuple[nn.Module, dict[str, Tensor]]:
    model = lively("bert", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2)
    return model, batch("bert")


def test_all_passes_see_the_same_dropout_and_the_run_goes_on_as_after_one(tmp_path: Path) -> None:
    ends: list[Tensor] = []
    for method in (["full", FreeLB(**LARGE)], "full"):
        model, data = dropping()
        twin = copy.deepcopy(model).train()
        draws, grab = Draws(model), Grab()
        trainer_of(get_model(model, method), rows_of(data), tmp_path, [grab], max_steps=1, max_grad_norm=0.0).train()
        ends.append(torch.get_rng_state())
        if method != "full":
            assert len(draws.states) == 3
            assert all(torch.equal(state, draws.states[0]) for state in draws.states)
            shuffled = {key: value[sampler_order(4)] for key, value in data.items()}
            noise = first_noise(shuffled, 32, 2.0)
            again = partial(torch.set_rng_state, draws.states[0])
            by_hand(twin, "bert", "SEQ_CLS", shuffled, noise, steps=3, step_size=0.4, before_pass=again)
            assert distance(grab.gradients, gradients(twin)) < 2e-5
    assert torch.equal(ends[0], ends[1])


@dataclass(kw_only=True)
class Again(Plugin):
    """A pass of its own within each pass, whose logits count."""

    name: ClassVar[str] = "again"

    def loss_terms(self, run: Run, batch: Mapping[str, Any], output: Any) -> Mapping[str, LossTerm]:
        other = run.forward(batch).logits
        assert torch.equal(other, output.logits)
        return {"again": LossTerm(other.square().sum(), len(other), per="example")}


def test_the_noise_ascends_on_what_other_plugins_add_too(tmp_path: Path) -> None:
    model, data = model_and_batch("bert", "SEQ_CLS")
    twin, grab = copy.deepcopy(model), Grab()
    model = get_model(model, ["full", FreeLB(**LARGE), Again()])
    trainer_of(model, rows_of(data), tmp_path, [grab], max_steps=1, max_grad_norm=0.0).train()
    shuffled = {key: value[sampler_order(4)] for key, value in data.items()}
    noise = first_noise(shuffled, 32, 2.0)
    by_hand(
        twin,
        "bert",
        "SEQ_CLS",
        shuffled,
        noise,
        steps=3,
        step_size=0.4,
        term=lambda output: output.logits.square().sum() / len(output.logits),
    )
    assert distance(grab.gradients, gradients(twin)) < 2e-5


def test_without_first_noise_half_of_it_is_the_plain_loss(tmp_path: Path) -> None:
    """K = 2: the mean of the clean loss and of that of one normalised step."""
    model, data = model_and_batch("bert", "SEQ_CLS")
    twin, grab = copy.deepcopy(model), Grab()
    plugin = FreeLB(steps=2, step_size=0.4, init_magnitude=0.0)
    trainer_of(
        get_model(model, ["full", plugin]), rows_of(data), tmp_path, [grab], max_steps=1, max_grad_norm=0
    ).train()
    shuffled = {key: value[sampler_order(4)] for key, value in data.items()}
    nothing = torch.zeros(4, 8, 32).requires_grad_()
    clean = F.cross_entropy(two_passes(twin, "bert", shuffled, nothing)[1].logits, shuffled["labels"])
    clean.backward()
    plain = gradients(twin)
    assert nothing.grad is not None
    step = torch.stack([0.4 * g / g.norm() for g in nothing.grad])
    twin.zero_grad()
    F.cross_entropy(two_passes(twin, "bert", shuffled, step)[1].logits, shuffled["labels"]).backward()
    wanted = {name: (gradient + plain[name]) / 2 for name, gradient in gradients(twin).items()}
    assert distance(grab.gradients, wanted) < 2e-5


@pytest.mark.parametrize("size", [1e-3, 1e-25, 1e-38])
def test_small_gradients_make_whole_steps(size: float) -> None:
    """The square of 1e-25 is 0 in fp32."""
    draw = torch.Generator().manual_seed(0)
    gradient = torch.randn(2, 5, 4, generator=draw)
    moved = ascend(torch.zeros(2, 5, 4), size * gradient, rows=2, step_size=0.3, max_norm=None)
    wanted = 0.3 * gradient / gradient.reshape(2, -1).norm(dim=1)[:, None, None]
    torch.testing.assert_close(moved, wanted, rtol=0, atol=1e-6 if size > 1e-30 else 0.05)


# ---- frozen, cached, checkpointed, quantised -------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [{}, {"trunk_cache": {}}], ids=["plain", "cached"])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_it_ascends_through_frozen_blocks(cache: Any, reentrant: bool | None, tmp_path: Path) -> None:
    """Also where nobody else needs their graph: what trains is block 3 and the head."""
    model, data = model_and_batch("bert", "SEQ_CLS")
    twin, grab = copy.deepcopy(model), Grab()
    settings: dict[str, Any] = {"max_steps": 3, "max_grad_norm": 0.0}
    if reentrant is not None:
        settings["activation_checkpointing"] = True
        settings["activation_checkpointing_kwargs"] = {"use_reentrant": reentrant}
    model = get_model(model, {"full": {}, "freeze": {"blocks": 2}, "freelb": LARGE, **cache})
    trainer_of(model, rows_of(data), tmp_path, [grab], **settings).train()
    shuffled = {key: value[sampler_order(4)] for key, value in data.items()}
    by_hand(twin, "bert", "SEQ_CLS", shuffled, first_noise(shuffled, 32, 2.0), steps=3, step_size=0.4)
    assert any("layer.2." in name for name in grab.gradients)
    assert not any("layer.1." in name or "embeddings" in name for name in grab.gradients)
    assert distance(grab.gradients, {n: g for n, g in gradients(twin).items() if n in grab.gradients}) < 2e-5


@pytest.mark.parametrize(("name", "first"), [("bert", "embeddings.LayerNorm"), ("t5", "encoder.block.0")])
def test_above_a_frozen_model_each_step_has_its_length(name: str, first: str, tmp_path: Path) -> None:
    """Seen by the module behind the input embeddings."""
    model = get_model(lively(name), {"linear_probe": {}, "freelb": LARGE})
    seen: list[Tensor] = []
    module = next(module for place, module in model.named_modules() if place.endswith(first))
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    trainer_of(model, rows_of(batch(name)), tmp_path, max_steps=1).train()
    assert len(seen) == 3
    for earlier, later in pairwise(seen):
        moved = (later - earlier).reshape(4, -1).norm(dim=1)
        torch.testing.assert_close(moved, torch.full((4,), 0.4), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2])
def test_on_a_base_of_four_bits(steps: int, tmp_path: Path) -> None:
    grab = Grab()
    settings = {"steps": steps, "step_size": 0.4, "init_magnitude": 2.0}
    models = []
    for method in ({"lora": {}, "freelb": settings}, "lora"):
        torch.manual_seed(0)
        models.append(on_nf4(method, tmp_path / "base"))
    data = batch("bert")
    trainer_of(models[0], rows_of(data), tmp_path, [grab], max_steps=1, max_grad_norm=0.0, optim="sgd").train()
    shuffled = {key: value[sampler_order(4)] for key, value in data.items()}
    noise = first_noise(shuffled, 64, 2.0)
    by_hand(models[1].eval(), "bert", "SEQ_CLS", shuffled, noise, steps=steps, step_size=0.4)
    wanted = gradients(models[1])
    assert sum(float(g.norm()) for n, g in wanted.items() if "lora_B" in n) > 0
    assert distance(grab.gradients, wanted) < 1e-3


def test_under_a_prompt_the_noise_falls_on_the_texts_own_tokens(tmp_path: Path) -> None:
    """δ by hand through PEFT's own `inputs_embeds`; the prompt's gradient is that of the noised passes."""
    torch.manual_seed(0)
    data = batch("llama", "CAUSAL_LM")
    model = get_model(lively("llama", "CAUSAL_LM"), {"prompt_tuning": {"num_virtual_tokens": 3}, "freelb": LARGE})
    twin, grab = copy.deepcopy(model), Grab()
    trainer_of(model, rows_of(data), tmp_path, [grab], max_steps=1, max_grad_norm=0.0).train()
    shuffled = {key: value[sampler_order(4)] for key, value in data.items()}
    noise = first_noise(shuffled, 32, 2.0)
    inputs = {key: value for key, value in shuffled.items() if key != "input_ids"}
    for _ in range(3):
        noise = noise.detach().requires_grad_()
        embedded = twin.get_base_model().get_input_embeddings()(shuffled["input_ids"]) + noise
        (twin.eval()(inputs_embeds=embedded, **inputs).loss / 3).backward()
        assert noise.grad is not None
        noise = noise.detach() + torch.stack([0.4 * g / g.norm() for g in noise.grad])
    wanted = gradients(twin)
    assert wanted
    assert distance(grab.gradients, wanted) < 2e-5


def test_a_run_resumed_after_any_step_ends_the_same_bit_for_bit(tmp_path: Path) -> None:
    def run(resume: str | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = get_model(dropping()[0], {"lora": {}, "freelb": LARGE})
        settings: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
        settings["gradient_accumulation_steps"] = 2
        trainer = trainer_of(model, rows_of(batch("bert", rows=20)), tmp_path, **settings)
        trainer.train(resume_from_checkpoint=resume)
        return {n: p.detach().clone() for n, p in model.named_parameters()}

    whole = run(None)
    for step in (1, 2, 3):
        again = run(str(tmp_path / f"checkpoint-{step}"))
        assert all(torch.equal(whole[n], again[n]) for n in whole), step


def test_what_has_no_embeddings_of_its_own_to_noise_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"'freelb'.*ResNetForImageClassification has no input embeddings"):
        trainer_of(get_model(tiny("resnet"), ["full", "freelb"]), rows_of(batch("resnet")), tmp_path).train()
    model, data = tiny("bert"), batch("bert")
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    data["inputs_embeds"] = embeddings(data.pop("input_ids")).detach()
    with pytest.raises(PluginError, match=r"'freelb'.*inputs_embeds.*Give `input_ids`"):
        trainer_of(get_model(model, ["full", "freelb"]), rows_of(data), tmp_path).train()
