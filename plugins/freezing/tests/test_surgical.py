"""Rates from gradients: closed forms by hand, and plain torch on the same model at the same weights."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_plus import MethodError, Param, PluginError, Run, get_model
from peft_plus_freezing.surgical import Surgical, depth_snr, relative_norms, rgn_rates, snr, snr_rates
from tests.bare_loop import BareLoop, check_resume, on_nf4
from tests.models import batch, tiny
from tests.multipliers import in_session, in_trainer

ONCE = {"every": "once", "measure_steps": 3}


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


# ---- by hand -------------------------------------------------------------------------------------------------------


class Weights(nn.Module):
    def __init__(self, **values: list[float]) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(value)))


def run_of(model: nn.Module, depths: dict[str, int], **fields: Any) -> Run:
    params = tuple(Param(n, tuple(t.shape), depths[n], "base") for n, t in model.named_parameters())
    task: Any = SimpleNamespace(new_head=False)
    return Run(model=model, task=task, num_blocks=1, params=params, depths=(2, 1, 0), **fields)


def test_relative_gradient_norms_of_whole_depths() -> None:
    """3-4-5 and 6-8-10: norms over all tensors of a depth; one at 0, as LoRA's B, does not make it infinite."""
    model = Weights(a=[6.0], b=[8.0], c=[0.0, 0.0], d=[4.0], unused=[7.0])
    for name, gradient in {"a": [3.0], "b": [0.0], "c": [4.0, 0.0], "d": [-1.0]}.items():
        model.get_parameter(name).grad = torch.tensor(gradient)
    run = run_of(model, {"a": 0, "b": 0, "c": 0, "d": 1, "unused": 2})
    found = relative_norms(run, run.params)
    assert found == pytest.approx({0: 0.5, 1: 0.25})
    assert rgn_rates(found) == pytest.approx({0: 1.0, 1: 0.5})
    assert rgn_rates({0: 0.0, 1: 0.0}) == {0: 1.0, 1: 1.0}
    assert rgn_rates({}) == {}


def test_signal_to_noise_ratios_of_whole_depths() -> None:
    steps = torch.tensor([[1.0, 5.0, 0.0], [3.0, 1.0, 0.0]])
    # mean 2, variance 2; mean 3, variance 8; mean 0, variance 0.
    torch.testing.assert_close(snr(steps), torch.tensor([2.0, 9 / 8, 0.0]))
    params = [Param("a", (3,), 0, "base"), Param("b", (6,), 0, "base"), Param("c", (1,), 1, "base")]
    gradients = {
        "a": [steps[0], steps[1]],
        "b": [torch.tensor([1.0]), torch.tensor([3.0])],  # one element, 2, in the place of six
        "c": [torch.tensor([4.0])],  # seen once only
    }
    found = depth_snr(gradients, params)
    assert found == pytest.approx({0: (2 + 9 / 8 + 0 + 6 * 2) / 9})
    assert snr_rates({0: 1.0, 1: 0.94, 2: 0.95, 3: 0.0}, threshold=0.95) == {0: 1.0, 1: 0.0, 2: 1.0, 3: 0.0}
    assert snr_rates({0: 0.0, 1: 0.0}, threshold=0.95) == {0: 1.0, 1: 1.0}
    assert snr_rates({0: 1.0, 1: 0.0}, threshold=0.0) == {0: 1.0, 1: 1.0}


# ---- plain torch ---------------------------------------------------------------------------------------------------


def depth_of(name: str) -> int:
    block = re.search(r"\.layer\.(\d)\.", name)
    return int(block[1]) + 1 if block else 0 if "embeddings" in name else 4


def gradients_of(model: nn.Module, steps: range) -> list[dict[str, Tensor]]:
    """Of the same batches as a `BareLoop`, at weights that stand still."""
    found = []
    for step in steps:
        model.zero_grad()
        model.train()(**batch("bert", seed=step)).loss.backward()
        found.append({n: t.grad.clone() for n, t in model.named_parameters() if t.grad is not None})
    model.zero_grad()
    return found


def by_hand(criterion: str, model: nn.Module, steps: range, head: bool) -> dict[int, float]:
    measured = gradients_of(model, steps)
    weights = dict(model.named_parameters())
    depths: dict[int, list[str]] = {}
    for name in measured[0]:
        if head or depth_of(name) < 4:
            depths.setdefault(depth_of(name), []).append(name)

    def flat(tensors: Any, names: list[str]) -> Tensor:
        return torch.cat([tensors[name].detach().flatten() for name in names]).double()

    values: dict[int, float] = {}
    for depth, names in depths.items():
        each = torch.stack([flat(gradients, names) for gradients in measured])
        if criterion == "rgn":
            values[depth] = float((each.norm(dim=1) / flat(weights, names).norm()).mean())
        else:
            variance = ((each - each.mean(0)) ** 2).sum(0) / (len(measured) - 1)
            values[depth] = float((each.mean(0) ** 2 / (variance + 1e-8)).mean())
    largest = max(values.values())
    if criterion == "rgn":
        return {depth: value / largest for depth, value in values.items()}
    return {depth: float(value >= 0.95 * largest) for depth, value in values.items()}


@pytest.mark.parametrize(("tuner", "head"), [("full", False), ("full", True), ("lora", False), ("ia3", False)])
@pytest.mark.parametrize("criterion", ["rgn", "snr"])
def test_rates_and_updates_are_those_of_plain_torch(criterion: str, tuner: str, head: bool) -> None:
    """A fresh head keeps the base rate, unless it is to be measured as the paper does."""
    settings: dict[str, Any] = {"criterion": criterion, "every": 6, "measure_steps": 3}
    settings |= {"measure_head": True} if head else {}
    model = get_model(tiny("bert"), {tuner: {}, "surgical": settings})
    loop = BareLoop(model, steps=12, optimizer=torch.optim.SGD, lr=0.5, weight_decay=0.0)
    for start in (0, 6):
        rates = by_hand(criterion, copy.deepcopy(model), range(start, start + 3), head)
        assert max(rates.values()) == 1.0
        assert min(rates.values()) < 0.9
        for _ in range(6):
            loop.step()
        assert model.peft_plus.plugins[0].rates == pytest.approx(rates, rel=1e-4)
        rates.setdefault(4, 1.0)
        assert loop.rates[start : start + 3] == [dict.fromkeys(rates, 0.0)] * 3
        for found in loop.rates[start + 3 : start + 6]:
            assert found == pytest.approx(rates, rel=3e-2, abs=2e-3)


def test_a_pretrained_head_is_measured() -> None:
    model = get_model(tiny("llama", "CAUSAL_LM"), {"full": {}, "surgical": ONCE})
    loop = BareLoop(model, steps=4, data=("llama", "CAUSAL_LM"))
    for _ in range(3):
        loop.step()
    assert set(model.peft_plus.plugins[0].rates) == {0, 1, 2, 3, 4}


def test_a_sample_of_the_elements_comes_close() -> None:
    found, sizes = [], []
    for more in ({}, {"sampled_elements": 10**6}):
        base = tiny("bert", hidden_size=128, intermediate_size=256)
        model = get_model(base, {"full": {}, "surgical": ONCE | {"criterion": "snr"} | more})
        loop = BareLoop(model, steps=6)
        loop.step()
        loop.step()
        gradients = model.peft_plus.plugins[0].gradients
        found.append(depth_snr(gradients, loop.engine.run.params))
        sizes.append({part.numel() for parts in gradients.values() for part in parts})
        loop.step()
        assert not model.peft_plus.plugins[0].gradients  # let go once they are judged
    assert max(sizes[0]) == 4096 < max(sizes[1])
    assert found[0] == pytest.approx(found[1], rel=0.5)  # means with heavy tails


# ---- while it measures, everything stands still --------------------------------------------------------------------


def momentum(parameters: Any, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, momentum=0.9, **settings)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, momentum])
def test_weights_stand_still_whatever_the_optimizer_decays(optimizer: Any) -> None:
    model = get_model(tiny("bert"), {"full": {}, "surgical": {"every": 5, "measure_steps": 2}})
    loop = BareLoop(model, steps=10, optimizer=optimizer, weight_decay=0.5)
    for step in range(10):
        before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
        loop.step()
        moved = any(not torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())
        assert moved == (step % 5 >= 2)
    loop.engine.prove(None)
    rows = model.peft_plus.engagement[model.peft_plus.stages[0].name]
    assert {row.steps for row in rows} == {6}  # updates at rate 0 are no training


def test_depths_at_rate_zero_are_not_expected_to_move() -> None:
    model = get_model(tiny("bert"), {"full": {}, "surgical": ONCE | {"criterion": "snr", "threshold": 1.0}})
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    BareLoop(model, steps=6).run()
    moved = {depth_of(n) for n, tensor in model.named_parameters() if not torch.equal(tensor, before[n])}
    assert len(moved) == 2  # one, and the head
    assert {d for d, rate in model.peft_plus.plugins[0].rates.items() if rate} | {4} == moved


# ---- when ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "steps", "measured"),
    [
        ("once", 12, [0, 1]),
        ("epoch", 12, [0, 1, 4, 5, 8, 9]),
        (5, 12, [0, 1, 5, 6]),  # a third measurement would end with the run
        (5, 13, [0, 1, 5, 6, 10, 11]),
    ],
)
def test_when_it_measures(every: Any, steps: int, measured: list[int]) -> None:
    model = get_model(tiny("bert"), {"lora": {}, "surgical": {"every": every, "measure_steps": 2}})
    loop = BareLoop(model, steps=steps, per_epoch=4, optimizer=torch.optim.SGD, weight_decay=0.0).run()
    assert [step for step, rates in enumerate(loop.rates) if not any(rates.values())] == measured


def test_under_trainer_and_session_with_accumulation(tmp_path: Any) -> None:
    """An epoch of 32 rows has 4 steps of 2 micro-batches: 2 of them measure, on the gradients of whole steps."""
    method = {"full": {}, "surgical": {"measure_steps": 2}}
    for train in (
        lambda model: in_trainer(model, tmp_path, steps=8, lr_scheduler_type="constant"),
        lambda model: in_session(model, steps=8),
    ):
        model = get_model(tiny("bert"), method)
        rates = train(model)
        assert [not any(found.values()) for found in rates] == [True, True, False, False] * 2
        assert rates[2] == pytest.approx(rates[3], rel=2e-2, abs=2e-3)
        assert rates[7] == pytest.approx(model.peft_plus.plugins[0].rates | {4: 1.0}, rel=2e-2, abs=2e-3)
        assert max(rates[2].values()) == pytest.approx(1.0, rel=1e-2)
        assert rates[2] != pytest.approx(rates[6], rel=2e-2)


@pytest.mark.parametrize("criterion", ["rgn", "snr"])
def test_resumed_after_any_step_the_end_is_bit_identical(criterion: str) -> None:
    """Also in the middle of a measurement."""
    settings = {"criterion": criterion, "measure_steps": 3}
    check_resume(lambda: get_model(tiny("bert"), {"full": {}, "surgical": settings}), steps=10)


@pytest.mark.parametrize("skipped", [False, True])
def test_a_second_run_starts_anew(skipped: bool) -> None:
    model = Weights(a=[3.0], b=[4.0])
    plugin, first = Surgical(every="once", measure_steps=2), run_of(model, {"a": 0, "b": 1}, max_steps=9)

    def step(run: Run, gradient: float | None) -> None:
        if gradient is not None:
            for tensor in model.parameters():
                tensor.grad = torch.tensor([gradient])
            plugin.on_pre_optimizer_step(run)
        run.step += 1
        plugin.on_step_end(run)

    for _ in range(3):
        step(first, 1.0)
    assert plugin.rates == pytest.approx({0: 1.0, 1: 0.75})
    second = run_of(model, {"a": 0, "b": 1}, max_steps=9)
    step(second, None if skipped else 1.0)
    assert not plugin.rates
    assert plugin.lr_scale(second, second.params[0]) == 0.0
    step(second, None)
    assert plugin.lr_scale(second, second.params[0]) == 1.0


def test_where_every_gradient_overflowed_the_base_rate_remains() -> None:
    plugin, run = Surgical(every="once", measure_steps=1), run_of(Weights(a=[3.0]), {"a": 0}, max_steps=9)
    run.step += 1
    plugin.on_step_end(run)
    assert plugin.lr_scale(run, run.params[0]) == 1.0


def test_with_a_thaw_and_another_rate() -> None:
    """What thaws with an epoch is measured in its first steps; rates multiply."""
    method = {"full": {}, "gradual_unfreeze": {}, "surgical": {"measure_steps": 2}, "llrd": {"decay": 0.5}}
    model = get_model(tiny("bert"), method)
    loop = BareLoop(model, steps=16, optimizer=torch.optim.SGD, lr=0.5, weight_decay=0.0)
    for epoch in range(4):
        for _ in range(4):
            loop.step()
        rates = model.peft_plus.plugins[1].rates
        assert set(rates) == set(range(4 - epoch, 4))
        rates = rates | {4: 1.0}
        wanted = {depth: rate * 0.5 ** (4 - depth) for depth, rate in rates.items()}
        assert loop.rates[-1] == pytest.approx(wanted, rel=2e-2, abs=2e-3)


def test_on_a_quantised_base_it_measures_the_adapters(tmp_path: Any) -> None:
    model = on_nf4({"lora": {"r": 4}, "surgical": ONCE}, tmp_path)
    BareLoop(model, steps=5).run()
    rates = model.peft_plus.plugins[0].rates
    assert set(rates) == {1, 2, 3}
    assert max(rates.values()) == 1.0


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"measure_steps": 0}, "measure_steps=0"),
        ({"criterion": "snr", "measure_steps": 1}, "measure_steps=1: 'snr' needs at least 2"),
        ({"every": 5}, "every=5: measuring takes 5 steps"),
        ({"criterion": "snr", "threshold": 1.1}, "threshold=1.1"),
        ({"criterion": "snr", "sampled_elements": 0}, "sampled_elements=0"),
        ({"threshold": 0.5}, "threshold=0.5 goes only with criterion='snr'"),
        ({"sampled_elements": 7}, "sampled_elements=7 goes only with criterion='snr'"),
        ({"criterion": "gradnorm"}, "criterion"),
        ({"every": "stall"}, "every"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=rf"surgical.*peft-plus-freezing.*{message}"):
        get_model(tiny("bert"), {"lora": {}, "surgical": settings})


def test_a_run_or_an_epoch_that_only_measures_is_refused() -> None:
    model = get_model(tiny("bert"), {"lora": {}, "surgical": ONCE})
    with pytest.raises(PluginError, match=r"'surgical' .*measure_steps=3: this run has 3 steps"):
        BareLoop(model, steps=3).step()
    model = get_model(tiny("bert"), {"lora": {}, "surgical": {}})
    with pytest.raises(PluginError, match=r"'surgical' .*measure_steps=5: an epoch has 5 steps.*every='once'"):
        BareLoop(model, steps=20, per_epoch=5).step()
    with pytest.raises(PluginError, match=r"'surgical' .*data with a length; give every=<optimizer steps>"):
        BareLoop(model, steps=20, per_epoch=0).step()


def test_weights_that_all_start_at_zero_have_no_relative_norm() -> None:
    base = tiny("bert")
    for name, tensor in base.named_parameters():
        if ".layer.1." in name:
            nn.init.zeros_(tensor)
    with pytest.raises(MethodError, match=r"surgical.*depth 2 starts at 0.*criterion='snr'"):
        get_model(base, ["full", "surgical"])
    get_model(base, {"full": {}, "surgical": {"criterion": "snr"}})


@pytest.mark.parametrize("tuner", ["linear_probe", "prompt_tuning"])
def test_a_tuner_without_layers_is_refused(tuner: str) -> None:
    with pytest.raises(MethodError, match=rf"surgical.*{tuner}"):
        get_model(tiny("bert"), [tuner, "surgical"])
