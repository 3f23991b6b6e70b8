"""Losses, averages and children on a base of four bits: what trains is beside it, and it rests bit for bit."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_plus import Run, Stage, get_model
from tests.consistency import Grab, distance, gradients, kl_both_ways, lively, sampler_order, trainer_of, two_passes
from tests.models import NUM_LABELS, batch, rows_of

from .test_ema import Weights

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")

DATA = batch("bert")
DATA["input_ids"] = DATA["input_ids"].clamp(min=10)  # words all


def built(method: dict[str, Any], folder: Path, *, dropout: float = 0.0) -> Any:
    """Equal weights whatever the plugins; lively blocks below a head of size 1, so that the predictions feel all."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lively("bert", "FEATURE_EXTRACTION", hidden_size=64).save_pretrained(folder)
    method = {"lora": {"r": 4}, **method}
    model = get_model(folder, method, task="SEQ_CLS", num_labels=NUM_LABELS, quantization="nf4")
    tensors = dict(model.named_parameters())
    for name, param in model.peft_plus.params.items():
        if param.part == "head" and len(param.shape) > 1:
            nn.init.normal_(tensors[name])
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return model


def packed(model: nn.Module) -> dict[str, Tensor]:
    """The weights in four bits, with the scales of their blocks."""
    there = {n: p for n, p in model.named_parameters() if type(p).__name__ == "Params4bit"}
    codes = {name: p.detach().clone() for name, p in there.items()}
    return codes | {f"{n}, scales": p.quant_state.absmax.clone() for n, p in there.items()}  # type: ignore[attr-defined]


def trained(model: Any, folder: Path, callbacks: Any = (), *, rests: Collection[str] = (), **settings: Any) -> Any:
    """Two steps of plain SGD, after which all that is packed or frozen is as it was, and all else but `rests` not."""
    before, start = packed(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    assert len(before) == 2 * (3 * 6 + 1)  # codes and scales: six matrices in each of three blocks, and the pooler
    defaults = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    run = trainer_of(model, rows_of(DATA), folder, callbacks, **{**defaults, **settings})
    run.train()
    after = packed(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == set(model.peft_plus.params) - set(rests)
    assert {p.part for p in model.peft_plus.params.values()} == {"adapter", "head"}
    return run


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """What trains, before the first step of LoRA alone and after each."""
    folder, weights = tmp_path_factory.mktemp("plain"), Weights()
    trained(built({}, folder), folder, [weights])
    return weights.states


def at_end(model: nn.Module, names: Any) -> dict[str, Tensor]:
    tensors = dict(model.named_parameters())
    return {name: tensors[name].detach() for name in names}


# ---- losses ----------------------------------------------------------------------------------------------------------

TERMS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "r3f": ({"eps": 0.5}, {"r3f": 1}),
    "r4f": ({"eps": 0.5}, {"r4f": 1}),
    "smart": ({"eps": 0.1, "step_size": 0.1, "sigma": 0.1}, {"smart": 1, "smart_bregman": 2}),
    "r_drop": ({}, {"r_drop": 1}),
    "token_cutoff": ({"share": 0.5}, {"token_cutoff": 1, "token_cutoff_consistency": 1}),
}
"""Plugin → settings, and each of its terms with the first step in which it is more than 0."""


@pytest.mark.parametrize("plugin", TERMS)
def test_a_loss_term_reaches_every_adapter(plugin: str, plain: list[dict[str, Tensor]], tmp_path: Path) -> None:
    """A term that lost its gradient in a packed layer would leave those below as LoRA alone trains them."""
    settings, terms = TERMS[plugin]
    model = built({plugin: settings}, tmp_path, dropout=0.2 if plugin == "r_drop" else 0.0)
    run = trained(model, tmp_path, logging_strategy="steps", logging_steps=1)
    for term, first in terms.items():
        logged = [entry[term] for entry in run.state.log_history if term in entry]
        assert len(logged) == 2
        assert all(math.isfinite(value) for value in logged)
        assert [value > 1e-5 for value in logged] == [step >= first for step in (1, 2)], (term, logged)
    adapters = [name for name in plain[-1] if "lora" in name]
    assert len(adapters) == 2 * len([name for name in adapters if "lora_B" in name]) > 0
    end = at_end(model, adapters)
    for name in adapters:
        alone = plain[-1][name] - plain[0][name]
        assert float((end[name] - plain[-1][name]).norm() / alone.norm()) > 1e-2, name


def test_r3f_has_the_gradient_of_plain_torch(tmp_path: Path) -> None:
    twin, grab = built({}, tmp_path).eval(), Grab()
    trained(built({"r3f": {"eps": 0.5, "weight": 0.7}}, tmp_path), tmp_path, [grab])
    data = {key: value[sampler_order(4)] for key, value in DATA.items()}
    streams = Run(model=nn.Linear(1, 1), task=None, num_blocks=0, seed=42, stage=Stage())  # type: ignore[arg-type]
    noise = torch.zeros(4, 8, 64)
    for i, row in enumerate(noise):
        row.uniform_(-0.5, 0.5, generator=streams.generator("r3f", i, 0))
    clean, noised = two_passes(twin, "bert", data, noise)
    loss = F.cross_entropy(clean.logits, data["labels"])
    (loss + 0.7 * kl_both_ways(clean.logits, noised.logits).mean()).backward()
    wanted = gradients(twin)
    assert sum(float(g.norm()) for name, g in wanted.items() if "lora_B" in name) > 1e-2
    assert distance(grab.gradients, wanted) < 1e-3


# ---- averages --------------------------------------------------------------------------------------------------------


def test_ema_is_of_what_lies_beside_the_base(plain: list[dict[str, Tensor]], tmp_path: Path) -> None:
    model = built({"ema": {}}, tmp_path)
    trained(model, tmp_path)
    assert set(model.peft_plus.plugins[0].average) == set(plain[0])
    end = at_end(model, plain[0])
    for name, start in plain[0].items():
        first = 2 / 11 * start.double() + 9 / 11 * plain[1][name].double()
        wanted = 3 / 12 * first + 9 / 12 * plain[2][name].double()
        assert torch.allclose(end[name].double(), wanted, atol=1e-6), name


def test_swa_is_of_what_lies_beside_the_base(plain: list[dict[str, Tensor]], tmp_path: Path) -> None:
    model = built({"swa": {"every": 1, "start_fraction": 0.0}}, tmp_path)
    trained(model, tmp_path)
    assert set(model.peft_plus.plugins[0].average) == set(plain[0])
    end = at_end(model, plain[0])
    for name in plain[0]:
        wanted = (plain[1][name].double() + plain[2][name].double()) / 2
        assert torch.allclose(end[name].double(), wanted, atol=1e-6), name


# ---- children --------------------------------------------------------------------------------------------------------


def test_a_drawn_child_moves_by_the_gradient_over_its_share(plain: list[dict[str, Tensor]], tmp_path: Path) -> None:
    """Seen in B after the first step, which begins at 0: each element is 0 or 1/p times that of LoRA alone."""
    weights = Weights()
    trained(built({"child_tuning": {"p": 0.4}}, tmp_path), tmp_path, [weights])
    rested, number = 0, 0
    for name, alone in plain[1].items():
        if "lora_B" in name:
            got = weights.states[1][name]
            inside = got != 0
            assert torch.allclose(got[inside], alone[inside] / 0.4, rtol=1e-4, atol=1e-9), name
            rested, number = rested + int((~inside & (alone != 0)).sum()), number + int((alone != 0).sum())
    assert rested / number == pytest.approx(0.6, abs=4 * (0.24 / number) ** 0.5)


def test_a_chosen_child_is_where_the_fisher_information_of_the_adapter_is_largest(tmp_path: Path) -> None:
    twin = built({}, tmp_path).eval()
    squares: dict[str, Tensor] = {}
    for i in range(4):
        twin.zero_grad()
        twin(**{key: value[i : i + 1] for key, value in DATA.items()}).loss.backward()
        for name, gradient in gradients(twin).items():
            if "lora_B" in name:  # A has none while B is 0
                squares[name] = squares.get(name, torch.zeros(())) + gradient.square()
    every = torch.cat([square.flatten() for square in squares.values()])
    edge = every.sort(descending=True).values[round(0.3 * len(every)) - 1]
    model = built({"child_tuning": {"variant": "D", "p": 0.3}}, tmp_path)
    outside = [name for name, square in squares.items() if float(square.max()) < edge]
    trained(model, tmp_path, rests=[*outside, *(name.replace("lora_B", "lora_A") for name in outside)])
    end = at_end(model, squares)
    close = 0
    for name, square in squares.items():
        sure = (square / edge - 1).abs() > 1e-3  # of the others rounding decides
        close += int((~sure).sum())
        assert torch.equal((end[name] != 0)[sure], (square > edge)[sure]), name
    assert close < 0.01 * len(every)
