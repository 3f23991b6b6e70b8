"""Where a run ends, against transformers' callback over the same metrics, and with which weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from transformers import EarlyStoppingCallback

from peft_plus import MethodError, Plugin, PluginError, Run, Session, get_model
from peft_plus_stability.early_stop import EarlyStop
from tests.evaluated_loop import (
    EvaluatedLoop,
    changed,
    check_evaluated_resume,
    evaluated_session,
    scripted_trainer,
    weights,
)
from tests.models import tiny
from tests.multipliers import rows_of
from tests.training import StopAt

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")

NAN, INF = float("nan"), float("inf")


def built(*method: Any) -> Any:
    torch.manual_seed(0)  # of LoRA's A
    return get_model(tiny("bert"), list(method))


def fresh(**settings: Any) -> Any:
    return built("full", EarlyStop(**settings))


def looped(values: Mapping[int, Any], *, steps: int = 12, **settings: Any) -> EvaluatedLoop:
    return EvaluatedLoop(fresh(**settings), steps=steps, values=values).run()


def plain(values: Mapping[int, Any], steps: int) -> EvaluatedLoop:
    """The same run without the plugin, which ends when its steps are done."""
    return EvaluatedLoop(built("full"), steps=steps, values=values).run()


# ---- where it ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "values", "end"),
    [
        ({"patience": 1}, [1.0, 0.9, 0.9, 0.1], 3),
        ({"patience": 2}, [1.0, 0.9, 0.95, 0.8, 0.9, 0.8, 0.1], 6),
        ({"patience": 1, "min_delta": 0.25}, [1.0, 0.75, 0.1], 2),  # better by just as much is no improvement
        ({"patience": 2, "min_delta": 0.25}, [1.0, 0.875, 0.625, 0.5, 0.5, 0.1], 5),  # small gains count together
        ({"patience": 1, "metric": "accuracy"}, [0.5, 0.6, 0.6, 0.7], 3),
        ({"patience": 1, "metric": "accuracy", "greater_is_better": False}, [0.5, 0.6, 0.1], 2),
        ({"patience": 1, "greater_is_better": True}, [0.5, 0.6, 0.6], 3),
        ({"patience": 2}, [NAN, 1.0, NAN, 0.5, NAN, NAN, 0.1], 6),
        ({"patience": 2}, [NAN, NAN, 0.1], 2),
        ({"patience": 1}, [INF, 1.0, INF, 0.1], 3),
        ({"patience": 2}, [1.0, 1.0, 0.9, 0.9], 12),  # to the end of the run
    ],
)
def test_where_a_run_of_scripted_metrics_ends(settings: dict[str, Any], values: list[float], end: int) -> None:
    name = settings.get("metric", "eval_loss")
    loop = looped({step: {name: value} for step, value in enumerate(values, start=1)}, **settings)
    assert loop.finished == end
    assert loop.engine.stopped == (end < 12)


@pytest.mark.parametrize("patience", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_it_ends_where_transformers_callback_ends(seed: int, patience: int, tmp_path: Path) -> None:
    values = np.random.default_rng(seed).integers(0, 6, 12) / 8  # with ties
    ends = []
    theirs = scripted_trainer(
        built("lora"), tmp_path, values.tolist(), EarlyStoppingCallback(patience), max_steps=24,
        metric_for_best_model="score",
    )  # fmt: skip
    ours = scripted_trainer(
        built("lora", EarlyStop(metric="score", patience=patience)), tmp_path, values.tolist(), max_steps=24
    )
    for trainer in (theirs, ours):
        trainer.train()
        ends.append(trainer.state.global_step)
    assert ends[0] == ends[1]


def test_several_data_sets_are_one_evaluation(tmp_path: Path) -> None:
    model = built("lora", EarlyStop(metric="eval_b_score", patience=2))
    trainer = scripted_trainer(model, tmp_path, [0.1, 0.5, 0.2, 0.6, 0.9, 0.6, 0.9, 0.6, 0.9, 0.6], max_steps=10)
    trainer.eval_dataset = {"a": rows_of(4), "b": rows_of(4)}
    trainer.train()
    assert trainer.state.global_step == 8


def test_the_reason_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        looped({2: 1.0, 4: 0.25, 6: 0.5, 8: NAN}, patience=2)
    assert (
        "at step 8: early_stop: eval_loss was best at step 4 (0.25), whose weights are back, and 2 evaluations since"
        in caplog.text
    )


# ---- with which weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_the_weights_are_those_that_a_plain_run_had_at_the_best_evaluation(tuner: str) -> None:
    values = {2: 1.0, 4: 0.5, 5: 0.7, 7: 0.6}
    model = built(tuner, EarlyStop(patience=2))
    loop = EvaluatedLoop(model, steps=12, values=values).run()
    other = EvaluatedLoop(built(tuner), steps=4, values=values).run()
    assert loop.finished == 7
    assert not changed(weights(loop.model), weights(other.model))
    assert changed(weights(loop.model), loop.measured[7])


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ({2: 1.0, 4: 0.5, 6: 0.7, 8: 0.6}, 4),  # an evaluation after the last step
        ({2: 1.0, 4: 0.5, 6: 0.7}, 4),  # and none
        ({2: 1.0, 4: 0.5, 8: 0.25}, 8),
        ({6: 0.5}, 6),  # steps since then that nobody judged
        ({}, 8),
    ],
)
def test_a_run_that_comes_to_its_end_has_the_best_weights_too(values: dict[int, float], best: int) -> None:
    loop = looped(values, steps=8, patience=5)
    assert loop.finished == 8
    assert not changed(weights(loop.model), weights(plain(values, best).model))


def test_another_plugin_that_ends_the_run_does_not_lose_them() -> None:
    @dataclass(kw_only=True)
    class Ends(Plugin):
        name: ClassVar[str] = "ends"

        def on_step_end(self, run: Run) -> None:
            if run.step == 5:
                run.stop("enough")

    values = {2: 0.5, 4: 0.7}
    loop = EvaluatedLoop(built("full", EarlyStop(), Ends()), steps=12, values=values).run()
    assert loop.finished == 5
    assert not changed(weights(loop.model), weights(plain(values, 2).model))


def test_without_restoring_it_ends_with_the_last_weights_and_is_the_plain_run_until_then() -> None:
    values = {2: 1.0, 4: 0.5, 5: 0.7, 7: 0.6}
    loop = looped(values, patience=2, restore_best=False)
    assert loop.finished == 7
    assert not changed(weights(loop.model), weights(plain(values, 7).model))
    assert not loop.engine.run.kept("early_stop")


def test_where_the_metric_never_was_a_number_the_last_weights_stay(caplog: pytest.LogCaptureFixture) -> None:
    values = {1: NAN, 2: NAN}
    with caplog.at_level(logging.WARNING):
        loop = looped(values, patience=2)
    assert not changed(weights(loop.model), weights(plain(values, 2).model))
    assert "eval_loss was never a number, and 2 evaluations since" in caplog.text


# ---- interrupted ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [{2: 1.0, 4: 0.5, 5: 0.7, 7: 0.6}, {2: 0.5, 4: 0.7}])
def test_interrupted_at_any_step_it_ends_bit_identical(values: dict[int, float]) -> None:
    whole = check_evaluated_resume(lambda: fresh(patience=2), steps=8, values=values)
    assert whole.finished in (7, 8)


def trainer_of(folder: Path, values: list[float], *callbacks: Any, **settings: Any) -> Any:
    model = built("lora", EarlyStop(metric="score", patience=2))
    return scripted_trainer(model, folder, values, *callbacks, **{"max_steps": 12, **settings})


@pytest.mark.parametrize("stop", [2, 3, 4, 6, 8])
def test_a_trainer_stopped_and_resumed_ends_bit_identical(stop: int, tmp_path: Path) -> None:
    values = [0.5, 0.75, 0.25, 0.5, 0.9, 0.9]  # best at step 4, and its end at step 8
    settings = {"save_strategy": "steps", "save_steps": 1}
    whole = trainer_of(tmp_path / "whole", values, **settings)
    whole.train()
    assert whole.state.global_step == 8
    best = trainer_of(tmp_path / "best", values, StopAt(4))
    best.train()
    trainer_of(tmp_path / "cut", values, StopAt(stop), **settings).train()
    resumed = trainer_of(tmp_path / "cut", values[stop // 2 :], **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{stop}"))
    assert resumed.state.global_step == 8
    assert not changed(weights(resumed.model), weights(whole.model))
    assert not changed(weights(whole.model), weights(best.model))


def test_the_checkpoint_of_its_last_step_holds_the_best_weights(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, [0.5, 0.75, 0.25, 0.5], save_strategy="steps", save_steps=2)
    trainer.train()
    saved = built("lora")
    saved.load_adapter(str(tmp_path / "checkpoint-8"), "saved")
    own = {name: tensor for name, tensor in trainer.model.named_parameters() if "lora_B.default" in name}
    other = {name.replace(".saved", ".default"): t for name, t in saved.named_parameters() if "lora_B.saved" in name}
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)


def test_loading_the_best_checkpoint_beside_it_does_no_harm(tmp_path: Path) -> None:
    values = [0.5, 0.75, 0.25, 0.5]
    plainly = trainer_of(tmp_path / "plain", values)
    plainly.train()
    loaded = trainer_of(
        tmp_path / "loaded", values, load_best_model_at_end=True, metric_for_best_model="score", save_strategy="steps",
        save_steps=2,
    )  # fmt: skip
    loaded.train()
    assert loaded.state.best_model_checkpoint.endswith("checkpoint-4")
    assert not changed(weights(loaded.model), weights(plainly.model))


# ---- a loop of one's own -------------------------------------------------------------------------------------------


def session_run(values: Mapping[int, float], plugin: EarlyStop, steps: int = 8) -> tuple[Session, Any, dict[int, Any]]:
    model = built("lora", plugin)
    session, seen = evaluated_session(model, rows_of(16), values, steps=steps)
    return session, model, seen


@pytest.mark.parametrize(("values", "end", "best"), [({2: 0.5, 3: 0.7, 4: 0.6}, 4, 2), ({2: 0.7, 5: 0.5}, 8, 5)])
def test_a_session_ends_and_has_the_best_weights(values: dict[int, float], end: int, best: int) -> None:
    session, model, seen = session_run(values, EarlyStop(patience=2))
    assert session.step == end
    assert not changed(weights(model), seen[best])


def test_a_session_that_never_told_of_an_evaluation_is_told(caplog: pytest.LogCaptureFixture) -> None:
    session_run({}, EarlyStop(), steps=2)
    assert "early_stop saw no evaluation in these 2 steps" in caplog.text
    assert "session.evaluated(metrics)" in caplog.text


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_a_trainer_that_never_evaluates_is_refused_before_its_first_step(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, [])
    trainer.args.eval_strategy = "no"
    with pytest.raises(MethodError, match=r"'early_stop' .*waits for evaluations.*set eval_strategy and eval_dataset"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_metric_that_is_not_there_ends_the_run_at_the_first_evaluation(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, [0.5] * 6)
    trainer.model.peft_plus.plugins[0].metric = "f1"
    with pytest.raises(PluginError, match=r"'early_stop' .*at step 2.*no 'f1', only .*eval_score.*: set metric="):
        trainer.train()


def test_it_is_refused_beside_weights_of_their_own_for_evaluation() -> None:
    says = r"'early_stop' .* puts back the weights that were best .* 'ema' .* or let the first put nothing back"
    with pytest.raises(MethodError, match=says):
        built("lora", "ema", EarlyStop())
    built("lora", "ema", EarlyStop(restore_best=False))


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"patience": 0}, "patience=0"), ({"min_delta": -0.1}, "min_delta=-0.1"), ({"min_delta": NAN}, "min_delta=nan")],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        EarlyStop(**settings)
