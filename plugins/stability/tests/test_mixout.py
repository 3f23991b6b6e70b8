"""Mixout against the paper's formula, by autograd, and against a plain model that holds the mixed weights."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import TrainerCallback

from peft_plus import MethodError, get_model
from peft_plus.stage_start import run_at_start
from peft_plus_stability.mixout import Mixout, mixout
from tests.bare_loop import on_nf4
from tests.consistency import Grab, accumulated, distance, gradients, model_and_batch, trainer_of
from tests.models import rows_of, tiny

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")


def drawn(shape: tuple[int, ...] = (50, 40)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


@pytest.mark.parametrize("p", [0.3, 0.7, 0.9])
def test_value_is_the_papers_and_the_gradient_has_its_full_size(p: float) -> None:
    """The reference code's backward lacks 1/(1 − p): at p = .3 its gradient is 1.4286 times too small."""
    weight, start = drawn()
    mask = torch.empty_like(weight).bernoulli_(1 - p, generator=torch.Generator().manual_seed(1))
    weight.requires_grad_()
    mixed = mixout(weight, start, mask, p=p)
    assert torch.allclose(mixed, ((1 - mask) * start + mask * weight - p * start) / (1 - p), atol=1e-5)
    mixed.sum().backward()
    assert torch.allclose(weight.grad, mask / (1 - p))


def test_zero_is_the_weight_itself_and_one_the_start() -> None:
    weight, start = drawn()
    mask = torch.zeros_like(weight)
    assert mixout(weight, start, mask, p=0.0) is weight
    assert torch.equal(mixout(weight, start, mask, p=1.0), start)


def test_its_mean_is_the_weight() -> None:
    weight, start = drawn((4, 3))
    generator = torch.Generator().manual_seed(1)
    masks = torch.empty(200_000, 4, 3).bernoulli_(0.3, generator=generator)
    mean = mixout(weight, start, masks, p=0.7).mean(0)
    error = (0.7 / 0.3 * (weight - start) ** 2 / 200_000).sqrt()  # of one mean
    assert ((mean - weight).abs() < 5 * error + 1e-6).all()


class Steps(TrainerCallback):
    """The weights as each step begins, and its gradients."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.weights.append({name: tensor.detach().clone() for name, tensor in model.named_parameters()})

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.gradients.append(gradients(model))


def tie(model: Any) -> None:
    """One parameter in two modules."""
    first, second = (layer.attention.self.query for layer in model.bert.encoder.layer[:2])
    second.weight = first.weight


CASES: dict[str, tuple[Any, str, Any]] = {
    "full": ("full", "bert", None),
    "LoRA": ("lora", "bert", None),
    "LoRA of the embeddings": (LoraConfig(target_modules=["word_embeddings", "query"]), "bert", None),
    "a tied weight": ("full", "bert", tie),
    "blocks that share their weights": ("full", "albert", None),
}
REENTRANT: dict[str, tuple[bool | None, ...]] = {
    # Reentrant checkpointing goes back through a weight once for each block that uses it, which autograd refuses.
    "a tied weight": (None, False),
    "blocks that share their weights": (None,),  # transformers' ALBERT does no checkpointing
}


@pytest.mark.parametrize(
    ("case", "reentrant"), [(c, reentrant) for c in CASES for reentrant in REENTRANT.get(c, (None, True, False))]
)
def test_a_step_computes_with_the_mixed_weights(case: str, reentrant: bool | None, tmp_path: Path) -> None:
    """The gradients of the third step are those of a plain model that holds w̃, times m / (1 − p).

    Also where activation checkpointing computes again in the backward, reentrant or not.
    """
    method, name, change = CASES[case]
    model, data = model_and_batch(name, "SEQ_CLS", rows=4)
    if change is not None:
        change(model)
    model = get_model(model, [method, Mixout(p=0.6)])
    twin, steps = copy.deepcopy(model), Steps()
    settings: dict[str, Any] = {"max_steps": 3, "max_grad_norm": 0.0}
    if reentrant is not None:
        settings |= {
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"use_reentrant": reentrant},
        }
    trainer_of(model, rows_of(data), tmp_path, [steps], **settings).train()
    plugin = model.peft_plus.plugins[0]
    run = run_at_start(model.peft_plus, model, model.peft_plus.stages[0], seed=42, step=2)
    start, before, factors = steps.weights[0], steps.weights[2], {}
    mixed = dict(before)
    for name in plugin.start:
        mask = torch.empty_like(start[name]).bernoulli_(0.4, generator=run.generator("mixout", name))
        mixed[name] = ((1 - mask) * start[name] + mask * before[name] - 0.6 * start[name]) / 0.4
        factors[name] = mask / 0.4
    assert any(not torch.equal(mixed[name], before[name]) for name in factors)
    with torch.no_grad():
        for name, tensor in twin.named_parameters():
            tensor.copy_(mixed[name])
    order = _third(4)
    twin.train()(**{key: value[order] for key, value in data.items()}).loss.backward()
    wanted = {name: g * factors.get(name, 1.0) for name, g in gradients(twin).items()}
    assert distance(steps.gradients[2], wanted) < 1e-5


def _third(rows: int) -> Tensor:
    """The rows of the third epoch, one step long."""
    seen: list[Tensor] = []

    class Identity(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            seen.append(x)
            return {"loss": self.w * x.sum()}

    with tempfile.TemporaryDirectory() as folder:
        data = [{"x": torch.tensor(float(i))} for i in range(rows)]
        trainer_of(Identity(), data, folder, max_steps=3, per_device_train_batch_size=rows).train()
    return seen[2].long()


def mixed_in(model: Any) -> set[str]:
    plan = model.peft_plus
    plan.plugins[0].on_stage_begin(run_at_start(plan, model, plan.stages[0]))
    return set(plan.plugins[0].start)


def test_what_mixes_are_matrices_that_were_there_before() -> None:
    mixing = mixed_in(get_model(tiny("bert"), ["full", Mixout()]))
    assert all(name.endswith(".weight") and "LayerNorm" not in name for name in mixing)
    assert not any("embeddings" in name or name.startswith("classifier") for name in mixing)
    assert any("pooler" in name for name in mixing)
    assert len([name for name in mixing if "layer.0." in name]) == 6


@pytest.mark.parametrize("name", ["albert", "t5", "llama", "vit"])
def test_no_embedding_mixes_wherever_it_lies(name: str) -> None:
    """ALBERT is flat, T5 has one in its first blocks, ViT's are no modules."""
    model = get_model(tiny(name), ["full", Mixout()])
    mixing = mixed_in(model)
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert mixing == {n for n in linear if not n.startswith(("classifier", "classification_head", "score"))}


def test_all_micro_batches_of_a_step_mix_alike(tmp_path: Path) -> None:
    got = []
    for parts in (1, 4):
        model, data = model_and_batch("bert", "SEQ_CLS", rows=8)
        steps = Steps()
        settings = {**accumulated(8, parts), "max_steps": 2, "optim": "sgd"}
        trainer_of(get_model(model, ["full", Mixout()]), rows_of(data), tmp_path, [steps], **settings).train()
        got.append(steps.gradients[1])
    assert distance(got[1], got[0]) < 1e-4


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_p_zero_is_the_plain_run_bit_for_bit(tuner: str, tmp_path: Path) -> None:
    ends = []
    for method in (tuner, [tuner, Mixout(p=0.0)]):
        torch.manual_seed(0)
        model, data = model_and_batch("bert", "SEQ_CLS")
        run = trainer_of(get_model(model, method), rows_of(data), tmp_path, max_steps=3)
        run.train()
        ends.append(dict(run.model.named_parameters()))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_resumed_at_every_step_it_ends_bit_identical(tmp_path: Path) -> None:
    def made() -> Any:
        torch.manual_seed(0)
        model, data = model_and_batch("bert", "SEQ_CLS")
        return trainer_of(
            get_model(model, ["lora", Mixout()]),
            rows_of(data),
            tmp_path,
            max_steps=5,
            save_strategy="steps",
            save_steps=1,
        )

    whole = made()
    whole.train()
    for step in range(1, 5):
        again = made()
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        pairs = zip(again.model.named_parameters(), whole.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for (_, a), b in pairs), step


def test_on_a_quantised_base_the_adapters_mix(tmp_path: Path) -> None:
    model = on_nf4(["lora", Mixout()], tmp_path / "base")
    _, data = model_and_batch("bert", "SEQ_CLS")
    grab = Grab()
    trainer_of(model, rows_of(data), tmp_path, [grab], max_steps=2).train()
    assert model.peft_plus.plugins[0].start
    assert all("lora_" in name for name in model.peft_plus.plugins[0].start)


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_a_probability_out_of_range_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match=f"p={p}"):
        Mixout(p=p)


def test_where_nothing_would_mix_it_is_refused() -> None:
    with pytest.raises(MethodError, match="no matrix that trains would mix"):
        get_model(tiny("bert"), ["linear_probe", Mixout()])
    get_model(tiny("bert"), ["linear_probe", Mixout(head=True)])
