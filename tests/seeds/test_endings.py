"""Runs that diverge, that stop by themselves, or that go on from one another."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import TrainerCallback

import peft_plus
from peft_plus import MethodError, Racing, SeedRuns, SuccessiveHalving, TrainingError, get_model, seeds
from peft_plus.seed_runs.lock import only_one
from tests.models import tiny

from .factories import made, plain

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")


class Spoils(TrainerCallback):
    """Puts NaN into a weight that trains, so that the next loss is none."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == self._step:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))


def diverging(given: Any, *, step: int = 2) -> Any:
    """Run 1 diverges."""
    trainer = made(given)
    if given.number == 1:
        trainer.add_callback(Spoils(step))
    return trainer


def test_a_run_that_diverges_is_a_failed_run_with_a_result(tmp_path: Path) -> None:
    runs = seeds(diverging, 3, metric="accuracy", out=tmp_path)
    assert [bool(result.diverged) for result in runs.results] == [False, True, False]
    assert "The loss of step 2 is nan" in runs.results[1].diverged
    assert "stopped" not in runs.results[1].diverged, "what it names is gone"
    assert runs.results[1].steps == 2
    report = runs.report(majority=0.0)
    assert (report.n, report.no_number) == (3, (1,))
    assert report.failed is not None
    assert report.failed >= 1 / 3
    assert not list(tmp_path.glob("run-*/")), "what it saved before it stopped is of no use any more"
    assert SeedRuns.load(tmp_path).results == runs.results


def fragile(given: Any) -> Any:
    """Run 1's metrics cannot be computed while it trains."""
    trainer = made(given, eval_strategy="steps", eval_steps=1)
    computes = trainer.compute_metrics

    def metrics(prediction: Any) -> dict[str, float]:
        if given.number == 1 and trainer.state.global_step:
            raise ZeroDivisionError("no prediction of class 1")
        return computes(prediction)

    trainer.compute_metrics = metrics
    return trainer


@pytest.mark.parametrize("racing", [None, SuccessiveHalving()], ids=["whole", "halved"])
def test_a_run_whose_metrics_fail_takes_no_other_along(racing: Any, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"1 of 3 runs failed.*ZeroDivisionError: no prediction of class 1"):
        seeds(fragile, 3, metric="accuracy", racing=racing, out=tmp_path)
    assert sorted(file.name for file in tmp_path.glob("run-*.*")) == ["run-0.json", "run-1.error.txt", "run-2.json"]


def test_a_call_does_not_make_a_diverged_run_again(tmp_path: Path) -> None:
    made_now: list[int] = []

    def factory(given: Any) -> Any:
        made_now.append(given.number)
        return diverging(given)

    first = seeds(factory, 2, out=tmp_path)
    assert seeds(factory, 2, out=tmp_path) == first
    assert made_now == [0, 1]


@pytest.mark.parametrize("step", [1, 4])
def test_a_race_loses_a_run_that_diverges_before_or_after_it_is_judged(step: int, tmp_path: Path) -> None:
    runs = seeds(
        partial(diverging, step=step), 3, metric="eval_loss", out=tmp_path, racing=Racing(fraction=0.5, keep=2)
    )
    assert runs.results[1].diverged or not runs.results[1].finished
    assert runs.report().n >= 1


@pytest.mark.parametrize("method", ["full", "lora"])
def test_runs_that_would_go_on_from_one_another_are_refused(method: str, tmp_path: Path) -> None:
    """The model is built outside the factory, so the second run would begin where the first one ended."""
    shared = get_model(tiny("bert"), method)

    def factory(given: Any) -> Any:
        trainer = made(given)
        return type(trainer)(
            shared, trainer.args, train_dataset=trainer.train_dataset, eval_dataset=trainer.eval_dataset
        )

    with pytest.raises(MethodError, match=r"returned, for run 1, the model that run 0 trained.*inside the factory"):
        seeds(factory, 3, out=tmp_path)
    assert len(list(tmp_path.glob("run-*.json"))) == 1


def test_a_base_below_several_adapters_is_a_shared_model_too(tmp_path: Path) -> None:
    base = tiny("bert")

    def factory(given: Any) -> Any:
        trainer = made(given)
        model = get_model(base, "full")
        return type(trainer)(
            model, trainer.args, train_dataset=trainer.train_dataset, eval_dataset=trainer.eval_dataset
        )

    with pytest.raises(MethodError, match="the model that run 0 trained"):
        seeds(factory, 2, out=tmp_path)


def test_a_model_that_transformers_builds_anew_is_fresh_each_time(tmp_path: Path) -> None:
    runs = seeds(
        partial(made, kind=transformers.Trainer, model_init=lambda: tiny("bert")), 2, metric="accuracy", out=tmp_path
    )
    assert len(runs.finished) == 2


def stopping(given: Any, made_now: list[int], after: int) -> Any:
    """Ends by itself after a step."""

    class Stops(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == after:
                control.should_training_stop = True

    made_now.append(given.number)
    trainer = made(given)
    trainer.add_callback(Stops())
    return trainer


@pytest.mark.parametrize("after", [2, 3, 5])
def test_a_run_that_ended_by_itself_before_it_is_judged_is_finished(after: int, tmp_path: Path) -> None:
    """Of six steps, judged at the third: those that ended before or there are whole, and no step is made twice."""
    made_now: list[int] = []
    factory = partial(stopping, made_now=made_now, after=after)
    runs = seeds(factory, 3, metric="eval_loss", out=tmp_path, racing=Racing(fraction=0.5, keep=1))
    if after <= 3:
        assert made_now == [0, 1, 2]
        assert all(result.finished for result in runs.results)
        assert [result.steps for result in runs.results] == [after] * 3
        assert runs.report().stopped == 0
    else:
        assert len(made_now) == 4
        assert sorted(result.steps for result in runs.results) == [3, 3, 5]
        assert runs.report().stopped == 2


def test_a_race_of_early_stop_makes_no_step_twice(tmp_path: Path) -> None:
    """The real technique, which never sees an improvement."""

    def factory(given: Any) -> Any:
        trainer = made(
            given,
            method={"lora": {}, "early_stop": {"metric": "worse", "patience": 1, "restore_best": False}},
            eval_strategy="steps",
            eval_steps=1,
        )
        counts = iter(range(100, 0, -1))
        trainer.compute_metrics = lambda prediction: {"worse": float(next(counts))}
        return trainer

    runs = seeds(factory, 3, metric="worse", out=tmp_path, racing=Racing(fraction=0.5, keep=1))
    assert [(result.steps, result.finished) for result in runs.results] == [(2, True)] * 3
    assert runs.report().cost == pytest.approx(1 / 3)


def test_two_calls_in_one_folder_do_not_work_at_a_time(tmp_path: Path) -> None:
    with only_one(tmp_path), pytest.raises(MethodError, match="Another call works in"):
        peft_plus.seeds(plain, 2, out=tmp_path)
