"""The rates of a run against torch's scheduler, driven by hand over the same metrics."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import TrainerCallback, default_data_collator

import peft_plus
from peft_plus import MethodError, get_model
from peft_plus_stability.plateau import Plateau
from tests.evaluated_loop import changed, scripted_trainer, weights
from tests.models import tiny
from tests.multipliers import rows_of
from tests.training import StopAt, quiet

RATE = 1e-3
VALUES = [0.5, 0.5, 0.625, 0.625, 0.625, 0.625, 0.625, 0.625]


class Rates(TrainerCallback):
    """The rate of the first group in each update."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any, **_: Any) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


def trainer_of(
    folder: Path, plugins: Sequence[Any], values: Sequence[float], *callbacks: Any, **settings: Any
) -> tuple[Any, Rates]:
    torch.manual_seed(0)
    rates = Rates()
    model = get_model(tiny("bert"), ["lora", *plugins])
    trainer = scripted_trainer(model, folder, values, rates, *callbacks, **{"max_steps": 16, **settings})
    return trainer, rates


def by_hand(values: Sequence[float], *, mode: str, steps: int = 16, **settings: Any) -> list[float]:
    """Two steps at each rate, then an evaluation."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=RATE)
    scheduler = ReduceLROnPlateau(optimizer, mode=mode, **settings)  # type: ignore[arg-type]
    found = []
    for value in values[: steps // 2]:
        found += [optimizer.param_groups[0]["lr"]] * 2
        scheduler.step(value)
    return found


@pytest.mark.parametrize(
    ("settings", "theirs"),
    [
        ({}, {"mode": "max", "factor": 0.5, "patience": 2, "threshold": 1e-4}),
        ({"patience": 0, "factor": 0.1}, {"mode": "max", "factor": 0.1, "patience": 0, "threshold": 1e-4}),
        ({"greater_is_better": False}, {"mode": "min", "factor": 0.5, "patience": 2, "threshold": 1e-4}),
        ({"patience": 1, "threshold": 0.5}, {"mode": "max", "factor": 0.5, "patience": 1, "threshold": 0.5}),
        (
            {"patience": 0, "factor": 0.1, "min_lr": 3e-4},
            {"mode": "max", "factor": 0.1, "patience": 0, "threshold": 1e-4, "min_lr": 3e-4},
        ),
    ],
)
def test_the_rates_are_those_of_torchs_scheduler(
    settings: dict[str, Any], theirs: dict[str, Any], tmp_path: Path
) -> None:
    trainer, rates = trainer_of(tmp_path, [Plateau(metric="score", **settings)], VALUES)
    trainer.train()
    expected = by_hand(VALUES, **theirs)
    assert rates.seen == pytest.approx(expected, rel=1e-12)
    assert len({*rates.seen}) > 1


def test_by_default_it_reads_the_loss_of_the_evaluation(tmp_path: Path) -> None:
    """Without `metric_for_best_model`, which transformers fills in only where the user names the schedule."""
    rates = Rates()
    args = quiet(
        tmp_path, eval_strategy="steps", eval_steps=1, learning_rate=10.0, max_steps=6, optim="sgd", max_grad_norm=0.0
    )
    trainer = peft_plus.Trainer(
        get_model(tiny("bert"), ["full", Plateau(patience=0, threshold=0.0)]),
        args,
        train_dataset=rows_of(16),
        eval_dataset=rows_of(8),
        data_collator=default_data_collator,
        callbacks=[rates],
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    expected, rate, best = [], 10.0, math.inf
    for loss in losses:
        expected.append(rate)
        rate, best = (rate if loss < best else rate / 2), min(loss, best)
    assert rates.seen == pytest.approx(expected)
    assert rate < 10.0


def test_what_it_replaces_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="peft_plus"):
        trainer_of(tmp_path, [Plateau(metric="score")], VALUES, metric_for_best_model="loss")
    for told in ("metric_for_best_model 'loss' → 'score'", "greater_is_better False → True", "'reduce_lr_on_plateau'"):
        assert told in caplog.text


def test_other_plugins_multiply_the_rate_that_it_leaves(tmp_path: Path) -> None:
    plain, alone = trainer_of(tmp_path, [Plateau(metric="score", patience=0)], VALUES)
    plain.train()
    both = {"full": {}, "llrd": {"decay": 0.5}, "plateau": {"metric": "score", "patience": 0}}
    rates = Rates()
    trainer = scripted_trainer(get_model(tiny("bert"), both), tmp_path, VALUES, rates, max_steps=16)
    trainer.train()
    assert rates.seen == alone.seen  # schedulers never see the multipliers
    assert len({*rates.seen}) > 1


@pytest.mark.parametrize("stop", [4, 6, 7, 12])
def test_stopped_and_resumed_it_ends_bit_identical(stop: int, tmp_path: Path) -> None:
    plugin, settings = Plateau(metric="score", patience=1), {"save_strategy": "steps", "save_steps": stop}
    whole, rates = trainer_of(tmp_path / "whole", [plugin], VALUES, **settings)
    whole.train()
    trainer_of(tmp_path / "cut", [plugin], VALUES, StopAt(stop), **settings)[0].train()
    resumed, after = trainer_of(tmp_path / "cut", [plugin], VALUES[stop // 2 :], **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{stop}"))
    assert after.seen == rates.seen[stop:]
    assert not changed(weights(resumed.model), weights(whole.model))


def test_a_run_that_never_evaluates_is_refused_before_its_first_step(tmp_path: Path) -> None:
    trainer, rates = trainer_of(tmp_path, [Plateau()], VALUES)
    trainer.args.eval_strategy = "no"
    with pytest.raises(MethodError, match=r"'plateau' .*never evaluates: set eval_strategy and eval_dataset"):
        trainer.train()
    assert rates.seen == []


def test_a_metric_that_no_evaluation_returns_is_refused_before_the_first_step(tmp_path: Path) -> None:
    trainer, rates = trainer_of(tmp_path, [Plateau(metric="f1")], VALUES)
    trainer.compute_metrics = None
    with pytest.raises(MethodError, match=r"metric_for_best_model='f1' will never come"):
        trainer.train()
    assert rates.seen == []


def test_another_schedule_beside_it_is_refused() -> None:
    with pytest.raises(MethodError, match=r"'plateau' .* sets lr_scheduler_type=.* and plugin 'warm_restarts'"):
        get_model(tiny("bert"), ["full", Plateau(), "warm_restarts"])


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("factor", 0.0),
        ("factor", 1.0),
        ("patience", -1),
        ("threshold", -1e-4),
        ("threshold", math.nan),
        ("min_lr", -1.0),
    ],
)
def test_a_setting_out_of_range_is_refused(setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{setting}="):
        Plateau(**{setting: value})
