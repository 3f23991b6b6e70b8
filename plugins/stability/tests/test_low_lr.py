"""The ceilings by hand, and the rates at which weights really move."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peft_plus import MethodError, Param, Run, get_model
from peft_plus_stability.low_lr import LowLR
from tests.consistency import Grab, trainer_of
from tests.models import batch, rows_of, tiny
from tests.multipliers import in_session, in_trainer

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")

BASE, ADAPTER, HEAD = (Param(part, (1,), 1, part) for part in ("base", "adapter", "head"))


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def at(rate: float) -> Run:
    return Run(model=nn.Identity(), task=None, num_blocks=3, base_lr=rate)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "rate", "wanted"),
    [
        ({}, 1e-3, (2e-5, 2e-4, 1e-3)),
        ({}, 1e-4, (2e-5, 1e-4, 1e-4)),
        ({}, 1e-5, (1e-5, 1e-5, 1e-5)),  # no rate is raised
        ({"pretrained": None, "head": 5e-4}, 1e-3, (1e-3, 2e-4, 5e-4)),
    ],
)
def test_the_rate_is_the_lower_of_base_rate_and_ceiling(
    settings: dict[str, Any], rate: float, wanted: tuple[float, ...]
) -> None:
    plugin, run = LowLR(**settings), at(rate)
    got = [rate * plugin.lr_scale(run, param) for param in (BASE, ADAPTER, HEAD)]
    assert got == pytest.approx(wanted, rel=1e-12)


def test_parts_of_one_key_have_one_rate() -> None:
    for plugin in (LowLR(), LowLR(head=2e-4), LowLR(pretrained=None, adapter=None, head=1e-3)):
        rates: dict[Any, set[float]] = {}
        for param in (BASE, ADAPTER, HEAD):
            rates.setdefault(plugin.lr_key(param), set()).add(plugin.lr_scale(at(1e-2), param))
        assert all(len(found) == 1 for found in rates.values())


def test_the_schedule_applies_on_top_of_the_ceiling(tmp_path: Path) -> None:
    """The ceiling bounds the base rate, and the linear decay then takes it down, too."""
    method = {"lora": {}, "low_lr": {"adapter": 0.02}}
    rates = in_trainer(get_model(tiny("bert"), method), tmp_path, steps=4, lr_scheduler_type="linear")
    for step, found in enumerate(rates):
        wanted = {depth: (1.0 if depth == 4 else 0.2) * (1 - step / 4) for depth in (1, 2, 3, 4)}
        assert found == pytest.approx(wanted, rel=1e-3)


def test_in_a_bare_loop_too() -> None:
    rates = in_session(get_model(tiny("bert"), {"lora": {}, "low_lr": {"adapter": 0.02, "head": 0.05}}), steps=2)
    assert rates[1] == pytest.approx({1: 0.2, 2: 0.2, 3: 0.2, 4: 0.5}, rel=1e-3)


def test_full_fine_tuning_is_held_back_but_for_the_head(tmp_path: Path) -> None:
    """Every weight's own update under plain SGD, by its name."""
    model = get_model(tiny("bert"), {"full": {}, "low_lr": {"pretrained": 0.02}})
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    grab = Grab()
    settings = {"max_steps": 1, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0}
    trainer_of(model, rows_of(batch("bert")), tmp_path, [grab], **settings).train()
    for name, weight in model.named_parameters():
        rate = 0.1 if name.startswith("classifier") else 0.02
        wanted = start[name] - rate * grab.gradients[name]
        torch.testing.assert_close(weight.detach(), wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "told"), [({}, "adapter: 0.0002, head: none"), ({"adapter": None}, "adapter: none")]
)
def test_ceilings_that_change_nothing_are_told(
    settings: dict[str, Any], told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = rows_of(batch("bert", rows=16))
    trained = []
    for method in ({"lora": {}}, {"lora": {}, "low_lr": settings}):
        torch.manual_seed(0)
        model = get_model(tiny("bert", hidden_dropout_prob=0.1), method)
        with caplog.at_level(logging.WARNING):
            trainer_of(model, rows, tmp_path, max_steps=3, learning_rate=1e-4).train()
        trained.append([p.detach().clone() for p in model.parameters()])
    assert caplog.text.count("low_lr changes nothing: the learning rate 0.0001 lies above no ceiling") == 1
    assert told in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


def test_a_ceiling_that_holds_is_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = get_model(tiny("bert"), {"lora": {}, "low_lr": {}})
    with caplog.at_level(logging.WARNING):
        trainer_of(model, rows_of(batch("bert", rows=16)), tmp_path, max_steps=1, learning_rate=1e-3).train()
    assert "low_lr" not in caplog.text


@pytest.mark.parametrize(
    "settings",
    [
        {"pretrained": 0.0},
        {"adapter": -1e-4},
        {"head": float("nan")},
        {"head": float("inf")},
        {"pretrained": None, "adapter": None},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match=f"low_lr.*peft-plus-stability.*{next(iter(settings))}="):
        get_model(tiny("bert"), {"lora": {}, "low_lr": settings})
