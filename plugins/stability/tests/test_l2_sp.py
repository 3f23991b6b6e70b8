"""L2-SP against autograd of the penalty, written down over all weights, and against ΔW formed whole."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from peft_plus import get_model
from peft_plus.stage_start import run_at_start
from peft_plus_stability.l2_sp import L2SP, squared_distance
from tests.bare_loop import on_nf4
from tests.consistency import Grab, accumulated, distance, gradients, model_and_batch, trainer_of
from tests.models import rows_of, tiny

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")


def penalty_gradients(method: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], Any]:
    """What the term adds to the gradient once the weights are away from their start; start, weights and model."""
    torch.manual_seed(0)
    model = get_model(model_and_batch("bert", "SEQ_CLS")[0], [method, L2SP(alpha=0.3, beta=0.2)])
    plugin = model.peft_plus.plugins[0]
    run = run_at_start(model.peft_plus, model, model.peft_plus.stages[0])
    plugin.on_stage_begin(run)
    start = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.requires_grad:
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=draw))
    term = plugin.loss_terms(run, {}, None)["l2_sp"]
    assert term.per == "step"
    term.sum.backward()
    now = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    return gradients(model), start, now, model


def test_the_gradient_is_alpha_times_the_way_from_the_start_and_beta_times_the_head() -> None:
    added, start, now, model = penalty_gradients("full")
    for name, param in model.peft_plus.params.items():
        wanted = 0.2 * now[name] if param.part == "head" else 0.3 * (now[name] - start[name])
        assert torch.allclose(added[name], wanted, atol=1e-6), name


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_it_counts_once_for_a_step_whatever_the_micro_batches(micro_batches: int, tmp_path: Path) -> None:
    """At the start only the head is pulled."""
    got = []
    for method in ("full", ["full", L2SP(beta=0.2)]):
        model, data = model_and_batch("bert", "SEQ_CLS", rows=8)
        grab = Grab()
        settings = {**accumulated(8, micro_batches), "max_steps": 1}
        trainer_of(get_model(model, method), rows_of(data), tmp_path, [grab], **settings).train()
        got.append(grab.gradients)
    start = dict(model_and_batch("bert", "SEQ_CLS", rows=8)[0].named_parameters())
    added = {name: got[1][name] - got[0][name] for name in got[0]}
    for name, gradient in added.items():
        wanted = 0.2 * start[name] if name.startswith("classifier") else torch.zeros_like(gradient)
        assert torch.allclose(gradient, wanted, atol=1e-5), name


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=4, lora_alpha=12),
        peft.LoraConfig(r=4, lora_alpha=12, use_rslora=True),
        peft.LoraConfig(r=2, target_modules=["word_embeddings", "query"]),
    ],
)
def test_a_low_rank_change_is_penalised_as_a_whole(config: Any) -> None:
    """Against autograd of α/2 ‖ΔW‖², ΔW formed by PEFT."""
    added, _, _, model = penalty_gradients(copy.deepcopy(config))
    model.zero_grad()
    total = torch.zeros(())
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            delta = module.get_delta_weight("default")
            total = total + delta.square().sum()
    (0.15 * total).backward()
    wanted = {n: t.grad for n, t in model.named_parameters() if "lora_" in n and t.grad is not None}
    assert wanted
    assert distance({n: added[n] for n in wanted}, wanted) < 1e-5


def test_other_adapters_are_pulled_to_their_start() -> None:
    added, start, now, model = penalty_gradients("ia3")
    vectors = [n for n, p in model.peft_plus.params.items() if p.part == "adapter"]
    assert vectors
    for name in vectors:
        assert torch.allclose(added[name], 0.3 * (now[name] - start[name]), atol=1e-6), name


def test_the_distance_of_many_weights_is_that_of_one_long_vector() -> None:
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=draw) for shape in ((3, 40), (7,), (2, 2, 2))]
    starts = [torch.randn(weight.shape, generator=draw) for weight in weights]
    whole, begun = (torch.cat([t.flatten() for t in tensors]).double() for tensors in (weights, starts))
    assert squared_distance(weights, starts).item() == pytest.approx((whole - begun).square().sum().item(), rel=1e-5)
    assert squared_distance(weights).item() == pytest.approx(whole.square().sum().item(), rel=1e-5)


def test_zero_is_the_plain_run_bit_for_bit(tmp_path: Path) -> None:
    ends = []
    for method in ("lora", ["lora", L2SP(alpha=0.0, beta=0.0)]):
        torch.manual_seed(0)
        model, data = model_and_batch("bert", "SEQ_CLS")
        run = trainer_of(get_model(model, method), rows_of(data), tmp_path, max_steps=3)
        run.train()
        ends.append(list(run.model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_resumed_at_every_step_it_ends_bit_identical(tmp_path: Path) -> None:
    def made() -> Any:
        model, data = model_and_batch("bert", "SEQ_CLS")
        saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
        return trainer_of(get_model(model, ["full", L2SP()]), rows_of(data), tmp_path, **saving)

    whole = made()
    whole.train()
    for step in range(1, 4):
        again = made()
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True))


def test_frozen_depths_are_not_pulled_and_cost_nothing(tmp_path: Path) -> None:
    model, data = model_and_batch("bert", "SEQ_CLS")
    grab = Grab()
    method = {"full": {}, "gradual_unfreeze": {"every": 100}, "l2_sp": {}}
    trainer_of(get_model(model, method), rows_of(data), tmp_path, [grab], max_steps=1).train()
    assert all("layer." not in name for name in grab.gradients)


def test_on_a_quantised_base_and_in_half_precision_it_is_finite(tmp_path: Path) -> None:
    _, data = model_and_batch("bert", "SEQ_CLS")
    run = trainer_of(on_nf4(["lora", L2SP()], tmp_path / "base"), rows_of(data), tmp_path, max_steps=2)
    run.train()
    half = get_model(tiny("bert").bfloat16(), ["full", L2SP()])
    trainer_of(half, rows_of(data), tmp_path, max_steps=2).train()
    assert half.peft_plus.plugins[0].start["bert.pooler.dense.weight"].dtype == torch.float32


@pytest.mark.parametrize("setting", ["alpha", "beta"])
def test_a_negative_strength_is_refused(setting: str) -> None:
    with pytest.raises(ValueError, match=f"{setting}=-1"):
        L2SP(**{setting: -1.0})
