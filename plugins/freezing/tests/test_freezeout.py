"""The closed form of the paper, layer by layer, and that what is past its end stands still."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from peft_plus import MethodError, Param, Run, get_model
from peft_plus_freezing.freezeout import FreezeOut, annealed, share
from tests.bare_loop import BareLoop, check_resume, on_nf4
from tests.models import tiny
from tests.multipliers import in_session, in_trainer

FULL = (4, 3, 2, 1, 0)
CUBIC = {0: 0.512, 1: 0.614125, 2: 0.729, 3: 0.857375, 4: 1.0}
"""(.8 + .2 · l / 4)³ = .8³, .85³, .9³, .95³, 1, written out."""


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def run_at(step: int, depths: tuple[int, ...] = FULL, max_steps: int = 20) -> Run:
    return Run(
        model=nn.Identity(),
        task=None,  # type: ignore[arg-type]
        num_blocks=3,
        depths=depths,
        step=step,
        max_steps=max_steps,
    )


def at(depth: int) -> Param:
    return Param(f"layer.{depth}", (2, 2), depth, "base")


def test_the_shares_of_five_layers() -> None:
    assert {d: share(d, FULL, t0=0.8, scale="cubic") for d in FULL} == pytest.approx(CUBIC, rel=1e-12)
    assert [share(d, FULL, t0=0.5, scale="linear") for d in FULL] == [1.0, 0.875, 0.75, 0.625, 0.5]
    assert [share(d, FULL, t0=0.5, scale="squared") for d in FULL] == [1.0, 0.875**2, 0.75**2, 0.625**2, 0.25]
    # A tuner that reaches only some depths: they are the layers, the lowest first, the highest to the end.
    assert [share(d, (3, 1), t0=0.5, scale="linear") for d in (3, 1)] == [1.0, 0.5]
    assert share(4, (4,), t0=0.5, scale="linear") == 1.0


def test_the_rate_of_the_paper_with_and_without_its_scale() -> None:
    for scale_lr in (True, False):
        plugin = FreezeOut(scale_lr=scale_lr)
        for step in range(21):
            for depth, alpha in CUBIC.items():
                rate = (1 / (2 * alpha) if scale_lr else 0.5) * (1 + math.cos(math.pi * step / (20 * alpha)))
                wanted = rate if step < 20 * alpha else 0.0
                assert plugin.lr_scale(run_at(step), at(depth)) == pytest.approx(wanted, abs=1e-12)
                assert plugin.may_train(run_at(step), at(depth)) == (step <= 20 * alpha)


def test_scaled_rates_sum_to_the_same_in_every_layer() -> None:
    """What the factor 1 / α_l is for: all layers travel equally far, but for the gradients."""
    run_of = [run_at(step, max_steps=2000) for step in range(2000)]
    sums = [sum(FreezeOut().lr_scale(run, at(depth)) for run in run_of) for depth in FULL]
    assert sums == pytest.approx([1000.0] * 5, rel=1e-3)
    assert annealed(0, 10.0) == 1.0
    assert annealed(10, 10.0) == annealed(11, 10.0) == 0.0


@pytest.mark.parametrize("scale", ["cubic", "squared", "linear"])
@pytest.mark.parametrize("t0", [0.1, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("depths", [FULL, (3, 2, 1), (4, 1), (4,)])
def test_looking_ahead_agrees_with_asking_at_every_step(scale: Any, t0: float, depths: tuple[int, ...]) -> None:
    plugin = FreezeOut(t0=t0, scale=scale)
    for max_steps in (3, 10, 37):
        answers = [
            [plugin.may_train(run_at(s, depths, max_steps), at(d)) for d in depths] for s in range(max_steps + 1)
        ]
        assert all(row[0] for row in answers)  # the topmost trains to the end
        for step in range(max_steps):
            later = [s for s in range(step + 1, max_steps + 1) if answers[s] != answers[step]]
            assert plugin.next_change(run_at(step, depths, max_steps)) == (later[0] if later else None)


def expected(steps: int, depths: tuple[int, ...] = FULL) -> list[dict[int, float]]:
    """The rates of each update; a layer frozen has none."""
    found = []
    for step in range(steps):
        rates = {}
        for layer, depth in enumerate(sorted(depths)):
            alpha = (0.8 + 0.2 * layer / (len(depths) - 1)) ** 3
            if step <= steps * alpha:
                rates[depth] = (1 + math.cos(math.pi * step / (steps * alpha))) / (2 * alpha)
        found.append(rates)
    return found


def test_under_trainer_and_session_with_accumulation(tmp_path: Any) -> None:
    for rates in (
        in_trainer(get_model(tiny("bert"), ["full", "freezeout"]), tmp_path, steps=10),
        in_session(get_model(tiny("bert"), ["full", "freezeout"]), steps=10),
    ):
        assert rates == [pytest.approx(wanted, rel=2e-2, abs=1e-3) for wanted in expected(10)]


@pytest.mark.parametrize("tuner", ["full", "lora", "ia3"])
def test_what_is_past_its_end_stands_still_and_takes_no_memory(tuner: str) -> None:
    model = get_model(tiny("bert"), [tuner, "freezeout"])
    depths = model.peft_plus.params
    loop, held = BareLoop(model, steps=20), []
    tensors = dict(loop.engine.effects.tensors)
    while loop.finished < 20:
        before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        loop.step()
        training = set(expected(20, loop.engine.run.depths)[loop.finished - 1])
        moved = {depths[n].depth for n, t in tensors.items() if not torch.equal(t, before[n])}
        assert moved == training
        held.append({depths[n].depth for n, t in tensors.items() if loop.optimizer.state.get(t)})
        assert held[-1] == training
    loop.engine.prove(None)
    assert len(held[0]) == len(loop.engine.run.depths)
    assert held[-1] == {4}


def test_on_a_quantised_base_the_adapters_end_one_by_one(tmp_path: Any) -> None:
    model = on_nf4({"lora": {"r": 4}, "freezeout": {}}, tmp_path)
    BareLoop(model, steps=10).run()
    ends = {depth: math.floor(10 * (0.8 + 0.2 * layer / 3) ** 3) + 1 for layer, depth in enumerate((1, 2, 3))}
    assert [(change.step, min(depth for depth, _ in change.groups)) for change in model.peft_plus.timeline] == [
        (0, 1),
        (ends[1], 2),
        (ends[2], 3),
        (ends[3], 4),
    ]


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_resumed_after_any_step_the_end_is_bit_identical(tuner: str) -> None:
    check_resume(lambda: get_model(tiny("bert"), [tuner, "freezeout"]))


def test_a_resumed_run_does_not_warn_that_what_has_ended_would_never_train(caplog: pytest.LogCaptureFixture) -> None:
    method = {"full": {}, "freezeout": {}}
    begun = BareLoop(get_model(tiny("bert"), method), steps=12)
    while begun.finished < 8:
        begun.step()
    BareLoop(get_model(tiny("bert"), method), steps=12, start=8, state=begun.state())
    assert not caplog.messages


def test_another_rate_multiplies() -> None:
    model = get_model(tiny("bert"), {"full": {}, "freezeout": {}, "llrd": {"decay": 0.5}})
    loop = BareLoop(model, steps=10, optimizer=torch.optim.SGD, lr=0.5, weight_decay=0.0).run()
    for rates, wanted in zip(loop.rates, expected(10), strict=True):
        assert rates == pytest.approx({d: rate * 0.5 ** (4 - d) for d, rate in wanted.items()}, rel=2e-2, abs=1e-3)


def test_two_schedules_of_the_rate_are_refused() -> None:
    with pytest.raises(MethodError, match=r"freezeout.*slanted_triangular|slanted_triangular.*freezeout"):
        get_model(tiny("bert"), ["lora", "freezeout", "slanted_triangular"])


@pytest.mark.parametrize("t0", [0.0, -0.1, 1.1, float("nan")])
def test_settings_out_of_range_are_refused(t0: float) -> None:
    with pytest.raises(ValueError, match="t0="):
        FreezeOut(t0=t0)
    with pytest.raises(MethodError, match=r"freezeout.*peft-plus-freezing.*t0"):
        get_model(tiny("bert"), {"lora": {}, "freezeout": {"t0": t0}})
    with pytest.raises(MethodError, match=r"freezeout.*scale"):
        get_model(tiny("bert"), {"lora": {}, "freezeout": {"scale": "quartic"}})
