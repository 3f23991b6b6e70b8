"""`every="stall"`: scripted metrics give exactly the phases worked out by hand, also when a run is interrupted."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from peft_plus import MethodError, Param, PluginError, Run, get_model
from peft_plus_freezing.gradual_unfreeze import GradualUnfreeze
from tests.evaluated_loop import check_evaluated_resume, scripted_trainer
from tests.models import tiny
from tests.multipliers import rows_of
from tests.training import StopAt

NAN = float("nan")


def made(**settings: Any) -> GradualUnfreeze:
    return GradualUnfreeze(every="stall", **settings)


def run_of(step: int = 0, max_steps: int = 100) -> Run:
    return Run(
        model=nn.Identity(),
        task=None,  # type: ignore[arg-type]
        num_blocks=3,
        depths=(4, 3, 2, 1, 0),
        step=step,
        max_steps=max_steps,
    )


def finish_step(plugin: GradualUnfreeze, run: Run) -> int:
    """One more optimizer step; returns how many depths train after it."""
    run.step += 1
    plugin.on_step_end(run)
    return sum(plugin.may_train(run, Param("w", (2, 2), depth, "base")) for depth in run.depths)


def evaluate(run: Run, **metrics: float) -> None:
    run.last_metrics, run.last_evaluation_step = metrics, run.step


@pytest.mark.parametrize(
    ("settings", "values", "phases"),
    [
        ({}, [1.0, 0.9, 0.9, 0.8, 0.85, 0.7], [0, 0, 1, 1, 2, 2]),
        ({"patience": 2}, [1.0, 1.0, 1.0, 0.5, 0.6, 0.6, 0.6], [0, 0, 1, 1, 1, 2, 2]),
        ({"min_delta": 0.25}, [1.0, 0.75, 0.5, 0.5], [0, 1, 1, 2]),  # better by just as much is no improvement
        ({"metric": "accuracy"}, [0.5, 0.6, 0.6, 0.7, 0.1], [0, 0, 1, 1, 2]),
        ({"metric": "accuracy", "greater_is_better": False}, [0.5, 0.6, 0.4], [0, 1, 1]),
        ({"greater_is_better": True}, [0.5, 0.6, 0.4], [0, 0, 1]),
        ({}, [NAN, 1.0, NAN, 0.5], [1, 1, 2, 2]),
        ({}, [float("inf"), 1.0, 1.0], [0, 0, 1]),
        ({}, [1.0] * 8, [0, 1, 2, 3, 4, 4, 4, 4]),  # five depths: nothing is left after the fourth thaw
    ],
)
def test_the_phases_of_scripted_metrics(settings: dict[str, Any], values: list[float], phases: list[int]) -> None:
    plugin, run = made(**settings), run_of()
    found = []
    assert finish_step(plugin, run) == 1
    for value in values:
        evaluate(run, **{settings.get("metric", "eval_loss"): value})
        found.append(finish_step(plugin, run) - 1)
        assert finish_step(plugin, run) - 1 == found[-1]  # an evaluation counts once, whatever many steps follow
    assert found == phases


def test_a_metric_may_be_named_as_compute_metrics_names_it() -> None:
    plugin, run = made(metric="f1"), run_of()
    for value in (0.5, 0.5):
        evaluate(run, eval_f1=value)
        finish_step(plugin, run)
    assert (plugin.best, plugin.phase) == (0.5, 1)


def test_it_cannot_tell_ahead_until_everything_is_thawed() -> None:
    plugin, run = made(), run_of()
    told = []
    for _ in range(8):
        evaluate(run, eval_loss=1.0)
        finish_step(plugin, run)
        told.append(plugin.next_change(run))
    assert told == [NotImplemented] * 4 + [None] * 4


def test_a_missing_metric_is_an_error_that_says_what_there_is() -> None:
    plugin, run = made(metric="f1"), run_of()
    evaluate(run, eval_loss=1.0, eval_accuracy=0.5)
    with pytest.raises(ValueError, match="has no 'f1', only eval_accuracy, eval_loss: set metric="):
        finish_step(plugin, run)


def test_without_any_evaluation_it_warns_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    for evaluated in (True, False):
        plugin, run = made(), run_of(max_steps=3)
        for _ in range(3):
            assert not caplog.records
            finish_step(plugin, run)
            if evaluated:
                evaluate(run, eval_loss=1.0)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "saw no evaluation in these 3 steps" in caplog.text


def test_a_second_run_starts_frozen() -> None:
    plugin, run = made(), run_of()
    for _ in range(4):
        evaluate(run, eval_loss=1.0)
        finish_step(plugin, run)
    again = run_of()
    assert [plugin.may_train(again, Param("w", (2, 2), depth, "base")) for depth in again.depths] == [True] + [
        False
    ] * 4
    assert finish_step(plugin, again) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": "stall", "patience": 0}, "patience=0"),
        ({"every": "stall", "min_delta": -0.1}, "min_delta=-0.1"),
        ({"every": "stall", "min_delta": NAN}, "min_delta=nan"),
        ({"every": 3, "patience": 2}, "patience=2 goes only with every='stall'"),
        ({"metric": "eval_f1"}, "metric='eval_f1' goes only with every='stall'"),
        ({"greater_is_better": False}, "greater_is_better=False goes only with every='stall'"),
    ],
)
def test_settings_out_of_range_or_without_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradualUnfreeze(**settings)
    with pytest.raises(MethodError, match=rf"gradual_unfreeze.*{message}"):
        get_model(tiny("bert"), {"lora": {}, "gradual_unfreeze": settings})


# ---- under a Trainer -----------------------------------------------------------------------------------------------


def timeline(model: Any) -> list[tuple[int, int]]:
    """From which step on how many depths trained."""
    return [(change.step, len({depth for depth, _ in change.groups})) for change in model.peft_plus.timeline]


class Moved(TrainerCallback):
    """How many depths had a gradient in each update."""

    def __init__(self) -> None:
        self.depths: list[int] = []

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        params = model.peft_plus.params
        grads = {params[name].depth for name, tensor in model.named_parameters() if tensor.grad is not None}
        self.depths.append(len(grads))


def trainer_of(folder: Any, values: Sequence[float], *callbacks: TrainerCallback, **settings: Any) -> Any:
    model = get_model(tiny("bert"), {"full": {}, "gradual_unfreeze": {"every": "stall", "metric": "score"}})
    return scripted_trainer(model, folder, values, *callbacks, max_steps=10, **settings)


def test_a_depth_thaws_two_updates_after_the_evaluation_that_stalled(tmp_path: Any) -> None:
    """Evaluated after updates 2, 4, …, and seen at the end of the next one."""
    moved = Moved()
    trainer = trainer_of(tmp_path, [0.5, 0.5, 0.6, 0.6, 0.7], moved)
    trainer.train()
    assert moved.depths == [1, 1, 1, 1, 1, 2, 2, 2, 2, 3]
    assert timeline(trainer.model) == [(0, 1), (5, 2), (9, 3)]


def test_metrics_of_several_datasets_are_one_evaluation(tmp_path: Any) -> None:
    """The Trainer reports each dataset on its own; the metric is that of the first, and the second does not hide it."""
    moved = Moved()
    trainer = trainer_of(tmp_path, [0.5, 0.1, 0.6, 0.1, 0.6, 0.1, 0.7, 0.1, 0.8, 0.1], moved)
    trainer.eval_dataset = {"a": rows_of(4), "b": rows_of(4)}
    trainer.model.peft_plus.plugins[0].metric = "eval_a_score"
    trainer.train()
    assert moved.depths == [1, 1, 1, 1, 1, 1, 1, 2, 2, 2]


def test_a_metric_that_never_comes_stops_the_run_at_the_first_evaluation(tmp_path: Any) -> None:
    trainer = trainer_of(tmp_path, [0.5] * 5)
    trainer.model.peft_plus.plugins[0].metric = "f1"
    with pytest.raises(PluginError, match=r"'gradual_unfreeze' .* at step 3: ValueError: .*no 'f1', only .*eval_score"):
        trainer.train()


# ---- interrupted ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [4, 5, 9])
def test_a_trainer_stopped_and_resumed_ends_bit_identical(stop: int, tmp_path: Any) -> None:
    """Step 4 was evaluated and then saved, and what it means is found out only after the resume."""
    values = [0.5, 0.5, 0.6, 0.6, 0.7]
    settings = {"save_strategy": "steps", "save_steps": stop}
    whole = trainer_of(tmp_path / "whole", values, **settings)
    whole.train()
    trainer_of(tmp_path / "cut", values, StopAt(stop), **settings).train()
    resumed = trainer_of(tmp_path / "cut", values[stop // 2 :], **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{stop}"))
    pairs = zip(resumed.model.state_dict().values(), whole.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert timeline(resumed.model) == timeline(whole.model) == [(0, 1), (5, 2), (9, 3)]


def test_resumed_after_any_step_the_end_is_bit_identical() -> None:
    """Also right after an evaluation that is saved but not yet looked at."""
    values = {2: 1.0, 4: 1.0, 5: 0.5, 7: 0.6, 9: 0.6}

    def fresh() -> Any:
        return get_model(tiny("bert"), ["full", GradualUnfreeze(every="stall")])

    whole = check_evaluated_resume(fresh, steps=12, values=values)
    assert timeline(whole.model) == [(0, 1), (5, 2), (8, 3), (10, 4)]
