"""Clipped gradients against torch's own clipping, and the percentile against numpy's."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback, default_data_collator

from peft_plus import MethodError, Plugin, Session, get_model
from peft_plus_stability.clip import Clip, total_norm
from tests.bad_inputs import built, rows, same, trainer, weights
from tests.bare_loop import BareLoop, check_resume
from tests.consistency import lively
from tests.models import batch, tiny

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")

SGD: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Clipped:
    """A plain loop over a `BareLoop`'s batches, with torch's own clipping, by SGD.

    Args:
        percentile: of the norms so far, else the largest norm, else the largest element.
    """

    def __init__(self, *, percentile: float = 0.0, norm: float = 0.0, value: float = 0.0, window: int = 10**6) -> None:
        model = tiny("bert").train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self.norms: list[float] = []
        self.limits: list[float] = []
        for step in range(8):
            model(**batch("bert", seed=step)).loss.backward()
            self.norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))))
            self.limits.append(norm or float(np.percentile(self.norms[-window:], percentile)))
            if value:
                torch.nn.utils.clip_grad_value_(model.parameters(), value)
            else:
                torch.nn.utils.clip_grad_norm_(model.parameters(), self.limits[-1])
            optimizer.step()
            optimizer.zero_grad()
        self.weights = weights(model)


def close(model: Any, wanted: dict[str, Tensor]) -> bool:
    return all(torch.allclose(tensor, wanted[n], rtol=1e-5, atol=1e-7) for n, tensor in model.named_parameters())


def bare(model: Any, steps: int = 8) -> BareLoop:
    return BareLoop(model, steps=steps, optimizer=torch.optim.SGD, lr=0.1, weight_decay=0.0)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("percentile", [10.0, 37.0, 100.0])
def test_the_percentile_of_the_norms_so_far(percentile: float, window: int | None) -> None:
    hand = Clipped(percentile=percentile, window=window or 10**6)
    loop = bare(get_model(tiny("bert"), ["full", Clip(percentile=percentile, window=window)])).run()
    plugin = loop.model.peft_plus.plugins[0]
    assert plugin.norms.tolist() == pytest.approx(hand.norms[-(window or 8) :], rel=1e-5)
    assert loop.engine.run.logged["clip_threshold"] == pytest.approx(hand.limits[-1], rel=1e-5)
    assert close(loop.model, hand.weights)
    if percentile < 100:
        assert any(norm > limit * 1.01 for norm, limit in zip(hand.norms, hand.limits, strict=True))


@pytest.mark.parametrize("limits", [{"norm": 0.5}, {"value": 0.01}])
def test_a_fixed_norm_and_a_largest_element(limits: dict[str, float]) -> None:
    ((by, threshold),) = limits.items()
    loop = bare(get_model(tiny("bert"), {"full": {}, "clip": {"by": by, "threshold": threshold}})).run()
    assert close(loop.model, Clipped(**limits).weights)
    assert not close(loop.model, Clipped(norm=1e6).weights)


@pytest.mark.parametrize("settings", [{"by": "norm"}, {"by": "value"}, {"percentile": 100.0}])
@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_gradients_within_the_limit_stay_as_they_are_bit_for_bit(tuner: str, settings: Any) -> None:
    """No norm is above the largest so far, itself among them."""
    loops = []
    for method in ({tuner: {}}, {tuner: {}, "clip": {"threshold": 1e6, **settings} if "by" in settings else settings}):
        torch.manual_seed(0)
        loops.append(BareLoop(get_model(tiny("bert"), method), steps=6).run())
    assert same(loops[1].model, weights(loops[0].model))


def test_steps_without_a_gradient_do_not_pull_the_limit_to_zero() -> None:
    loop = bare(get_model(tiny("bert"), ["full", Clip(percentile=10.0)]))
    loop.step()
    plugin, norms = loop.model.peft_plus.plugins[0], loop.model.peft_plus.plugins[0].norms.clone()
    for tensor in loop.engine.effects.tensors.values():
        tensor.grad = torch.zeros_like(tensor)
    loop.engine.before_update()
    loop.engine.after_update()
    assert torch.equal(plugin.norms, norms)
    assert plugin.factor == 1


def test_the_norm_is_exact_in_low_precision() -> None:
    parts = [torch.full((1000,), 0.1), torch.full((3,), 2.0)]
    wanted = float(np.sqrt(1000 * float(parts[0].bfloat16()[0]) ** 2 + 12))
    assert total_norm([part.bfloat16() for part in parts]) == pytest.approx(wanted, rel=1e-5)
    assert total_norm([]) == 0


# ---- beside other clipping -----------------------------------------------------------------------------------------


class Norms(TrainerCallback):
    """Of each step's gradient when the Trainer is done with it."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.seen.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])))


def test_a_trainer_leaves_the_clipping_to_it_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By default a Trainer clips to 1 first, and no threshold above it would ever matter."""
    model, plain, seen = get_model(lively("bert"), ["full", Clip(by="norm", threshold=3.0)]), lively("bert"), Norms()
    with caplog.at_level(logging.INFO, logger="peft_plus"):
        run = trainer(model, tmp_path, **SGD)
    assert "max_grad_norm 1.0 → 0.0" in caplog.text
    run.train()
    trainer(plain, tmp_path, max_grad_norm=3.0, callbacks=[seen], **SGD).train()
    assert max(seen.seen) == pytest.approx(3.0, rel=1e-5)
    assert close(model, weights(plain))


def test_percentiles_are_of_whole_norms_under_a_trainer(tmp_path: Path) -> None:
    model, seen = get_model(lively("bert"), ["full", Clip()]), Norms()
    run = trainer(model, tmp_path, callbacks=[seen], gradient_accumulation_steps=2, max_steps=3, **SGD)
    run.train()
    plugin = model.peft_plus.plugins[0]
    assert plugin.norms.tolist() == pytest.approx(seen.seen, rel=1e-5)
    logged = [entry["grad_norm"] for entry in run.state.log_history if "grad_norm" in entry]
    assert logged == pytest.approx(seen.seen, rel=1e-3)
    assert logged[0] > 1  # which the Trainer itself would have clipped


def test_two_plugins_that_clip_are_named() -> None:
    with pytest.raises(MethodError, match=r"'mosbach' .* sets max_grad_norm=1.0 and plugin 'clip' .*max_grad_norm=0.0"):
        get_model(tiny("bert"), ["full", "mosbach", "clip"])
    get_model(tiny("bert"), {"full": {}, "mosbach": {"max_grad_norm": None}, "clip": {}})


class Doubles(Plugin):
    name = "doubles"

    def edit_gradient(self, run, param, gradient):
        return 2 * gradient


@pytest.mark.parametrize("first", [True, False])
def test_the_norm_is_that_before_plugins_edit_whatever_their_order(first: bool) -> None:
    order = [Doubles(), Clip(by="norm", threshold=0.5)] if first else [Clip(by="norm", threshold=0.5), Doubles()]
    model = get_model(tiny("bert"), ["full", *order])
    bare(model, steps=1).run()
    twin = tiny("bert").train()
    twin(**batch("bert", seed=0)).loss.backward()
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
    for tensor in twin.parameters():
        tensor.data -= 0.1 * 2 * tensor.grad
    assert close(model, weights(twin))


def test_in_a_session() -> None:
    model, hand = built(["full", Clip()]), built("full")
    session = Session(model, Accelerator(cpu=True), max_steps=6)
    optimizer = session.optimizer(torch.optim.SGD, lr=0.1)
    loader = session.loader(rows(), 4, shuffle=False, collate_fn=default_data_collator)
    for micro_batch in session.batches(loader):
        session.accelerator.backward(session.loss(micro_batch))
        optimizer.step()
        optimizer.zero_grad()
    norms: list[float] = []
    plain = torch.optim.SGD(hand.parameters(), lr=0.1)
    for step in range(6):
        hand.train()(**default_data_collator(rows()[4 * step : 4 * step + 4])).loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(hand.parameters(), float("inf"))))
        torch.nn.utils.clip_grad_norm_(hand.parameters(), float(np.percentile(norms, 10)))
        plain.step()
        plain.zero_grad()
    assert close(model, weights(hand))


@pytest.mark.parametrize("window", [None, 3])
def test_resumed_after_any_step_it_ends_as_the_uninterrupted_run(window: int | None) -> None:
    def fresh() -> Any:
        torch.manual_seed(0)
        return get_model(tiny("bert"), ["lora", Clip(percentile=40.0, window=window)])

    whole = check_resume(fresh, steps=6)
    assert len(whole.model.peft_plus.plugins[0].norms) == (window or 6)


def test_a_second_run_begins_anew(tmp_path: Path) -> None:
    model = built(["lora", Clip()])
    for _ in range(2):
        trainer(model, tmp_path).train()
        assert len(model.peft_plus.plugins[0].norms) == 6


# ---- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"percentile": 0.0},
        {"percentile": 100.1},
        {"percentile": float("nan")},
        {"by": "norm", "threshold": 0.0},
        {"by": "value", "threshold": float("inf")},
        {"by": "median"},
        {"window": 0},
        {"by": "norm", "percentile": 20.0},
        {"by": "value", "window": 5},
        {"threshold": 2.0},
    ],
)
def test_settings_out_of_range_or_out_of_place_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match=f"clip.*{list(settings)[-1]}"):
        get_model(tiny("bert"), {"lora": {}, "clip": settings})
