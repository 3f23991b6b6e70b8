"""The rate at each step of a run against the paper's formula."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, default_data_collator

import peft_plus
from peft_plus import MethodError, get_model
from peft_plus_stability.warm_restarts import WarmRestarts
from tests.evaluated_loop import changed, weights
from tests.models import tiny
from tests.multipliers import rows_of
from tests.training import StopAt, quiet

RATE = 1e-2


class Rates(TrainerCallback):
    """The rate of the first group in each update."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any, **_: Any) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


def trainer_of(folder: Path, plugin: WarmRestarts, *callbacks: Any, **settings: Any) -> tuple[Any, Rates]:
    torch.manual_seed(0)
    rates = Rates()
    args = quiet(folder, **{"learning_rate": RATE, "max_steps": 24, **settings})
    trainer = peft_plus.Trainer(
        get_model(tiny("bert"), ["lora", plugin]),
        args,
        train_dataset=rows_of(16),
        data_collator=default_data_collator,
        callbacks=[rates, *callbacks],
    )
    return trainer, rates


def formula(step: int, *, steps: int, cycles: int, warmup: int = 0) -> float:
    """η = ½ η_max (1 + cos(π T_cur / T_i)), T_i being the length of a cycle and T_cur the steps since it began."""
    if step < warmup:
        return RATE * step / warmup
    length = (steps - warmup) / cycles
    since = math.fmod(step - warmup, length)
    return 0.5 * RATE * (1 + math.cos(math.pi * since / length))


@pytest.mark.parametrize("cycles", [1, 2, 3, 4])
@pytest.mark.parametrize("warmup", [0, 4])
def test_the_rate_falls_along_a_cosine_and_starts_again_at_full_height(
    cycles: int, warmup: int, tmp_path: Path
) -> None:
    steps = 24 + warmup
    trainer, rates = trainer_of(tmp_path, WarmRestarts(cycles=cycles), warmup_steps=warmup, max_steps=steps)
    trainer.train()
    expected = [formula(step, steps=steps, cycles=cycles, warmup=warmup) for step in range(steps)]
    assert rates.seen == pytest.approx(expected, rel=1e-9)
    assert sum(rate == RATE for rate in rates.seen) == cycles


@pytest.mark.parametrize("stop", [7, 8, 9])
def test_stopped_and_resumed_it_ends_bit_identical(stop: int, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": stop}
    whole, rates = trainer_of(tmp_path / "whole", WarmRestarts(), **settings)
    whole.train()
    trainer_of(tmp_path / "cut", WarmRestarts(), StopAt(stop), **settings)[0].train()
    resumed, after = trainer_of(tmp_path / "cut", WarmRestarts(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{stop}"))
    assert after.seen == rates.seen[stop:]
    assert not changed(weights(resumed.model), weights(whole.model))


def test_a_plugin_that_is_a_schedule_itself_is_refused_beside_it(tmp_path: Path) -> None:
    model = get_model(tiny("bert"), ["lora", "slanted_triangular", WarmRestarts()])
    args = quiet(tmp_path, max_steps=2)
    trainer = peft_plus.Trainer(model, args, train_dataset=rows_of(8), data_collator=default_data_collator)
    with pytest.raises(MethodError, match=r"'slanted_triangular' .*lr_scheduler_type='cosine_with_restarts'"):
        trainer.train()


def test_no_cycle_is_refused() -> None:
    with pytest.raises(ValueError, match="cycles=0"):
        WarmRestarts(cycles=0)
