"""Rates by name: the multipliers by hand, and what the weights of real runs moved by."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_plus import MethodError, Param, Run, from_pretrained, get_model
from peft_plus_stability.lr_patterns import LRPatterns
from tests.bare_loop import BareLoop
from tests.consistency import Grab, trainer_of
from tests.models import batch, rows_of, tiny

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")

PATTERNS = {r"lora_B": 16, r"\.layer\.0\.": 0.5, r"classifier": 2.0}


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def multiplier(name: str) -> float:
    """What `PATTERNS` means, without a regular expression."""
    return (16 if "lora_B" in name else 1) * (0.5 if ".layer.0." in name else 1) * (2 if "classifier" in name else 1)


def rates_of(model: Any) -> dict[str, float]:
    (plugin,) = model.peft_plus.plugins
    run = Run(model=model, task=model.peft_plus.task, num_blocks=3)
    return {name: plugin.lr_scale(run, param) for name, param in model.peft_plus.params.items()}


def test_multipliers_of_all_patterns_that_are_found_multiply() -> None:
    rates = rates_of(get_model(tiny("bert"), {"lora": {}, "lr_patterns": {"patterns": PATTERNS}}))
    assert rates == {name: multiplier(name) for name in rates}
    assert set(rates.values()) == {1.0, 16.0, 8.0, 0.5, 2.0}


def test_parameters_of_one_key_have_one_rate() -> None:
    plugin = LRPatterns(patterns={"a": 2.0, "b": 0.5, "c": 3.0})
    run = Run(model=nn.Identity(), task=None, num_blocks=3)  # type: ignore[arg-type]
    rates: dict[Any, set[float]] = {}
    for name in ("x", "a", "b", "ab", "ba", "abc", "c", "ca"):
        param = Param(name, (1,), 1, "base")
        rates.setdefault(plugin.lr_key(param), set()).add(plugin.lr_scale(run, param))
    assert len(rates) == 7
    assert all(len(found) == 1 for found in rates.values())


def test_each_weight_moves_by_its_own_rate(tmp_path: Path) -> None:
    """Plain SGD: start − rate · gradient, and the linear schedule on top."""
    model = get_model(tiny("bert"), {"lora": {}, "lr_patterns": {"patterns": PATTERNS}})
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    grab = Grab()
    settings = {"max_steps": 1, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0}
    trainer_of(model, rows_of(batch("bert")), tmp_path, [grab], **settings).train()
    moved = set()
    for name, gradient in grab.gradients.items():
        wanted = start[name] - 0.1 * multiplier(name) * gradient
        torch.testing.assert_close(model.get_parameter(name).detach(), wanted, rtol=1e-6, atol=1e-9)
        moved |= {multiplier(name)} if gradient.any() else set()
    assert moved == {16.0, 8.0, 2.0}  # A has no gradient while B is 0


def test_in_a_loop_of_other_groups_too() -> None:
    """By depth and step, over a plugin that makes groups of its own."""
    method = {"lora": {}, "llrd": {"decay": 0.5}, "lr_patterns": {"patterns": {r"layer\.1\.": 0.25}}}
    model = get_model(tiny("bert"), method)
    loop = BareLoop(model, steps=2, optimizer=torch.optim.SGD, weight_decay=0.0, lr=0.1).run()
    wanted = {1: 0.125, 2: 0.25 * 0.25, 3: 0.5, 4: 1.0}
    for rates in loop.rates:
        assert rates == pytest.approx(wanted, rel=1e-3)


def test_multipliers_of_one_are_the_plain_run_bit_for_bit(tmp_path: Path) -> None:
    trained: list[list[Tensor]] = []
    for method in ({"lora": {}}, {"lora": {}, "lr_patterns": {"patterns": {"lora_B": 1.0, "layer": 1}}}):
        torch.manual_seed(0)
        model = get_model(tiny("bert", hidden_dropout_prob=0.1), method)
        trainer_of(model, rows_of(batch("bert", rows=16)), tmp_path, max_steps=4).train()
        trained.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


def test_a_reloaded_adapter_has_the_same_rates(tmp_path: Path) -> None:
    """The folder does not keep the order of the patterns."""
    model = get_model(tiny("bert"), {"lora": {}, "lr_patterns": {"patterns": PATTERNS}}, task="SEQ_CLS")
    model.save_pretrained(str(tmp_path))
    again = from_pretrained(tiny("bert"), str(tmp_path), is_trainable=True)
    assert rates_of(again) == rates_of(model)


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "told"),
    [
        ({}, r"patterns=\{\}: give at least one"),
        ({"lora_(": 2.0}, r"'lora_\(', an invalid regular expression"),
        ({"lora": 0.0}, r"patterns=\{'lora': 0\.0\}: give a multiplier > 0\..*`freeze`"),
        ({"lora": -1.0}, "multiplier > 0"),
        ({"lora": float("nan")}, "multiplier > 0"),
        ({"lora": float("inf")}, "multiplier > 0"),
        ({"lora": "fast"}, "'fast'}: give a text and a number"),
        ({"lora": True}, "give a text and a number"),
        ({3: 2.0}, "give a text and a number"),
    ],
)
def test_settings_out_of_range_are_refused(patterns: dict[str, Any], told: str) -> None:
    with pytest.raises(MethodError, match=f"lr_patterns.*{told}"):
        get_model(tiny("bert"), {"lora": {}, "lr_patterns": {"patterns": patterns}})


def test_a_pattern_that_is_found_nowhere_is_an_error_with_names_to_choose_from() -> None:
    with pytest.raises(
        MethodError, match=r"lr_patterns.*'lora_C' is found in no name.*'base_model\..*lora_A.*classifier"
    ):
        get_model(tiny("bert"), {"lora": {}, "lr_patterns": {"patterns": {"lora_B": 2.0, "lora_C": 2.0}}})


def test_a_pattern_of_frozen_weights_alone_is_an_error_that_says_so() -> None:
    with pytest.raises(MethodError, match=r"lr_patterns.*'LayerNorm' is found only in weights that never train"):
        get_model(tiny("bert"), {"lora": {}, "lr_patterns": {"patterns": {"LayerNorm": 2.0}}})


def test_a_pattern_that_would_run_for_ever_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reloaded folder may bring it."""
    monkeypatch.setattr("peft_plus.patterns.SECONDS", 2.0)
    evil = r"([a-z_.0-9]*)*([a-z_.0-9]*)*#"
    assert re.compile(evil)
    began = time.monotonic()
    with pytest.raises(MethodError, match=r"lr_patterns.*take more than 2 seconds.*Write simpler ones"):
        get_model(tiny("bert"), {"lora": {}, "lr_patterns": {"patterns": {evil: 2.0}}})
    assert time.monotonic() - began < 60
