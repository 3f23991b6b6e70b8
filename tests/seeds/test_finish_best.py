"""Racing and halving when runs fail, are interrupted, or grow in number."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import transformers

from peft_plus import MethodError, Racing, SuccessiveHalving, TrainingError, seeds
from peft_plus.seed_runs.finish_best import race
from peft_plus.seed_runs.racing import best
from peft_plus.seed_runs.results import RunResult, keep_result, read_results
from tests.seeds.factories import BreaksOnce, made, plain
from tests.seeds.told_runs import told

RACING = Racing(fraction=0.3, keep=2)
EARLY = {0: 0.5, 1: 0.9, 2: 0.7, 3: 0.6, 4: 0.8, 5: 0.95}
FINAL = {0: 0.6, 1: 0.8, 2: 0.9, 3: 0.7, 4: 0.85, 5: 0.99}


def test_the_best_are_finished_once_and_their_time_is_that_of_both_parts(tmp_path: Path) -> None:
    call, done = told(tmp_path, early=EARLY, final=FINAL), {}
    assert race(call, RACING, 5, done, 1) == {}
    assert call.asked == [(0, 0.3), (1, 0.3), (2, 0.3), (3, 0.3), (4, 0.3), (1, None), (4, None)]
    assert {k: r.metrics["eval_accuracy"] for k, r in done.items()} == {0: 0.5, 1: 0.8, 2: 0.7, 3: 0.6, 4: 0.85}
    assert {k for k, r in done.items() if r.finished} == {1, 4}
    assert all((r.seconds, r.resumed) == (10.0, 0) for r in done.values() if r.finished)
    assert read_results(tmp_path) == dict(sorted(done.items()))
    race(call, RACING, 5, done, 1)
    assert len(call.asked) == 7


def test_a_run_that_fails_before_it_is_judged_has_lost_until_it_is_made_again(tmp_path: Path) -> None:
    call, done = told(tmp_path, early=EARLY, final=FINAL, failing={1}), {}
    failed = race(call, RACING, 5, done, 1)
    assert failed == {1: "RuntimeError: no luck"}
    assert {k for k, r in done.items() if r.finished} == {2, 4}
    assert "no luck" in (tmp_path / "run-1.error.txt").read_text()
    call.failing.clear()
    call.asked.clear()
    assert race(call, RACING, 5, done, 1) == {}
    assert call.asked == [(1, 0.3), (1, None)]
    assert {k for k, r in done.items() if r.finished} == {1, 2, 4}  # no finished run is lost
    assert not (tmp_path / "run-1.error.txt").exists()


def test_a_run_that_fails_on_its_way_to_the_end_is_made_again_from_where_it_was_judged(tmp_path: Path) -> None:
    call, done = told(tmp_path, early=EARLY, final=FINAL), {}
    for number in range(5):
        keep_result(tmp_path, call.run(number, 0.3), "judged")
    call.asked.clear()
    call.failing.add(4)
    assert race(call, RACING, 5, done, 1) == {4: "RuntimeError: no luck"}
    call.failing.clear()
    assert race(call, RACING, 5, done, 1) == {}
    assert call.asked == [(1, None), (4, None), (4, None)]


def test_more_runs_may_join_later(tmp_path: Path) -> None:
    call, done = told(tmp_path, early=EARLY, final=FINAL), {}
    race(call, RACING, 5, done, 1)
    call.asked.clear()
    race(call, RACING, 6, done, 1)
    assert call.asked == [(5, 0.3), (5, None)]
    assert {k for k, r in done.items() if r.finished} == {1, 4, 5}


def test_a_run_that_ended_by_itself_before_it_is_judged_is_not_made_again(tmp_path: Path) -> None:
    call, done = told(tmp_path, early=EARLY, final=FINAL), {}
    over = RunResult(number=1, seeds={}, metrics={"eval_accuracy": 0.9}, steps=10, max_steps=10)
    keep_result(tmp_path, over, "judged")
    race(call, RACING, 5, done, 1)
    assert done[1] == replace(over, judged=over.metrics)
    assert (1, None) not in call.asked


@pytest.mark.parametrize("greater_is_better", [True, False])
def test_nan_is_worse_than_any_number(greater_is_better: bool) -> None:
    values = {0: 0.1, 1: float("nan"), 2: 0.1}
    assert best(values, 2, greater_is_better=greater_is_better) == [0, 2]
    assert best(values, 1, greater_is_better=greater_is_better) == [0]


@pytest.mark.usefixtures("one_accelerator_at_a_time")
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kind": transformers.Trainer}, r"does not promise: use peft_plus\.Trainer"),
        ({"save_only_model": True}, "leave out save_only_model"),
    ],
)
def test_a_trainer_that_cannot_go_on_is_refused_before_it_is_stopped(settings: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=says):
        seeds(partial(made, **settings), 3, out=tmp_path, racing=Racing(keep=1))
    assert not list(tmp_path.glob("judged-*.json"))


@pytest.mark.usefixtures("one_accelerator_at_a_time")
def test_a_race_that_was_interrupted_is_judged_at_the_same_step(tmp_path: Path) -> None:
    """Its checkpoint of that step lies there already: the kill came between it and the verdict."""
    racing = Racing(fraction=0.5, keep=1)
    wanted = seeds(plain, 2, out=tmp_path / "whole", racing=racing)
    killed = False

    def judged(trainer: Any) -> dict[str, float]:
        nonlocal killed
        if not killed:
            killed = True
            raise RuntimeError("killed before the verdict")
        return trainer.evaluate()

    with pytest.raises(TrainingError, match="killed before the verdict"):
        seeds(plain, 2, out=tmp_path / "cut", racing=racing, evaluate=judged)
    found = seeds(plain, 2, out=tmp_path / "cut", racing=racing, evaluate=judged)
    assert sorted(r.steps for r in wanted.results) == [3, 6]
    for ours, theirs in zip(found.results, wanted.results, strict=True):
        assert ours.steps == theirs.steps
        assert ours.metrics["eval_loss"] == theirs.metrics["eval_loss"]


@pytest.mark.usefixtures("one_accelerator_at_a_time")
@pytest.mark.parametrize("settings", [{}, {"eval_strategy": "steps", "eval_steps": 6}])
def test_halving_without_an_evaluation_on_the_way_is_told(settings: Any, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="no evaluation before its last step tells it"):
        seeds(partial(made, **settings), 3, out=tmp_path, racing=SuccessiveHalving())
    assert len(list(tmp_path.glob("run-*.json"))) == 1


@pytest.mark.usefixtures("one_accelerator_at_a_time")
def test_halving_stops_and_finishes_the_same_runs_after_an_interruption(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    halving = SuccessiveHalving(reduction_factor=2)
    whole = seeds(partial(made, **settings), 4, out=tmp_path / "whole", racing=halving)
    assert "[I 2" not in capsys.readouterr().err  # the lines that Optuna writes
    assert any(not r.finished for r in whole.results)
    breaks = BreaksOnce(3, KeyboardInterrupt)

    def factory(given: Any) -> Any:
        trainer = made(given, **settings)
        trainer.add_callback(breaks)
        return trainer

    with pytest.raises(KeyboardInterrupt):
        seeds(factory, 4, out=tmp_path / "cut", racing=halving)
    cut = seeds(factory, 4, out=tmp_path / "cut", racing=halving)
    assert cut.results[0].resumed == 3
    assert cut.values == whole.values
    for ours, theirs in zip(cut.results, whole.results, strict=True):
        losses = [[step, told["eval_loss"]] for step, told in ours.evaluations]
        assert losses == [[step, told["eval_loss"]] for step, told in theirs.evaluations]
