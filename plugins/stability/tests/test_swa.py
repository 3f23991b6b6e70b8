"""SWA against the mean of a plain run's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from peft_plus import MethodError, get_model
from peft_plus_stability.swa import SWA, is_due, take_in
from tests.consistency import model_and_batch
from tests.models import rows_of, tiny
from tests.training import StopAt

from .test_ema import Weights, run

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")


@pytest.mark.parametrize(
    ("every", "start", "collected"), [(1, 0.5, [3, 4, 5, 6]), (2, 0.0, [2, 4, 6]), (4, 0.0, [4, 6]), (1, 0.9, [6])]
)
def test_the_end_is_the_mean_of_what_was_collected(
    every: int, start: float, collected: list[int], tmp_path: Path
) -> None:
    weights = Weights()
    run("lora", tmp_path, [weights])
    ended = dict(run(["lora", SWA(every=every, start_fraction=start)], tmp_path).model.named_parameters())
    for name in weights.states[0]:
        mean = torch.stack([weights.states[step][name].double() for step in collected]).mean(0)
        assert torch.allclose(ended[name].double(), mean, atol=1e-6), name


def test_it_begins_where_the_fraction_says() -> None:
    """.07 · 100 is a little more than 7 in floating point."""
    due = [t for t in range(1, 101) if is_due(t, 100, start_fraction=0.07, period=1)]
    assert due == list(range(7, 101))
    assert [t for t in range(1, 101) if is_due(t, 100, start_fraction=0.75, period=10)] == [80, 90, 100]
    assert [t for t in range(1, 11) if is_due(t, 10, start_fraction=0.0, period=7)] == [7, 10]


def test_evaluations_are_of_the_mean_once_there_is_one(tmp_path: Path) -> None:
    _, data = model_and_batch("bert", "SEQ_CLS")
    settings = {"eval_dataset": rows_of(data), "eval_strategy": "steps", "eval_steps": 1}
    weights = Weights()
    losses = {
        name: evaluated(run(method, tmp_path, callbacks, **settings))
        for name, method, callbacks in (("plain", "full", [weights]), ("swa", ["full", SWA(every=1)], []))
    }
    assert losses["swa"][:4] == losses["plain"][:4]  # .75 of 6 steps are finished after the fifth
    model, _ = model_and_batch("bert", "SEQ_CLS")
    for step in (5, 6):
        states = weights.states[5 : step + 1]
        model.load_state_dict(
            {name: torch.stack([s[name] for s in states]).mean(0) for name in states[0]}, strict=False
        )
        with torch.no_grad():
            assert losses["swa"][step - 1] == pytest.approx(float(model.eval()(**data).loss), rel=1e-5)
    assert losses["swa"][5] != pytest.approx(losses["plain"][5], rel=1e-4)


def evaluated(trainer: Any) -> list[float]:
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


def test_resumed_at_every_step_it_ends_bit_identical(tmp_path: Path) -> None:
    def made(**more: Any) -> Any:
        settings = {"save_strategy": "steps", "save_steps": 1, **more}
        return run(["lora", SWA(every=1, start_fraction=0.5)], tmp_path, **settings)

    whole = made()
    for step in range(1, 6):
        again = made(resume=str(tmp_path / f"checkpoint-{step}"))
        pairs = zip(again.model.parameters(), whole.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), step


@pytest.mark.parametrize(("stop", "collected"), [(2, [2]), (4, [3, 4])])
def test_a_run_that_is_stopped_ends_with_what_was_collected(stop: int, collected: list[int], tmp_path: Path) -> None:
    weights = Weights()
    run("lora", tmp_path, [weights])
    ended = dict(run(["lora", SWA(every=1, start_fraction=0.5)], tmp_path, [StopAt(stop)]).model.named_parameters())
    for name in weights.states[0]:
        mean = torch.stack([weights.states[step][name].double() for step in collected]).mean(0)
        assert torch.allclose(ended[name].double(), mean, atol=1e-6), name


def test_one_collection_is_the_weights_themselves_bit_for_bit(tmp_path: Path) -> None:
    plain = run("lora", tmp_path)
    ended = run(["lora", SWA(every=6, start_fraction=0.0)], tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), ended.model.parameters(), strict=True))


def test_an_epoch_is_a_period(tmp_path: Path) -> None:
    """4 rows in batches of 2: two steps to an epoch."""
    weights = Weights()
    run("lora", tmp_path, [weights], per_device_train_batch_size=2)
    ended = run(["lora", SWA(start_fraction=0.5)], tmp_path, per_device_train_batch_size=2).model
    for name, tensor in ended.named_parameters():
        if name in weights.states[0]:
            mean = (weights.states[4][name].double() + weights.states[6][name].double()) / 2
            assert torch.allclose(tensor.double(), mean, atol=1e-6), name


def test_a_mean_of_many_is_exact_in_half_precision_too() -> None:
    draw = torch.Generator().manual_seed(0)
    values = [torch.randn(5, generator=draw).bfloat16() for _ in range(50)]
    average = None
    for number, value in enumerate(values, start=1):
        average = take_in(average, value, number)
    assert torch.allclose(average, torch.stack(values).float().mean(0), atol=1e-6)


def test_running_statistics_are_refused() -> None:
    with pytest.raises(MethodError, match="normalises by running statistics"):
        get_model(tiny("resnet"), ["full", SWA()])


@pytest.mark.parametrize(("setting", "value"), [("start_fraction", 1.0), ("start_fraction", -0.1), ("every", 0)])
def test_a_setting_out_of_range_is_refused(setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{setting}="):
        SWA(**{setting: value})
