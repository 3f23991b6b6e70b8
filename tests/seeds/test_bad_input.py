"""What `seeds` refuses, before any run or after the first, and what it says."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from peft_plus import MethodError, Racing, SeedRuns, SuccessiveHalving, seeds

from .factories import fails_once, made, plain

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"n": 1}, "n=1: a spread needs two runs"),
        ({"base": -1}, "base=-1: give a seed"),
        ({"vary": ("init", "weather")}, "vary=.*: give one or more of init, order, dropout"),
        ({"workers": 0}, "workers=0"),
        ({"racing": Racing(keep=4)}, "leaves none out"),
        ({"racing": SuccessiveHalving(), "workers": 2}, "leave out workers"),
    ],
)
def test_a_setting_out_of_range_is_refused_before_any_run(settings: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        seeds(plain, **{"n": 4, "out": tmp_path / "out", **settings})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("build", "says"),
    [(lambda: Racing(fraction=1.0), "fraction=1.0"), (lambda: Racing(keep=0), "keep=0"),
     (lambda: SuccessiveHalving(min_evaluations=0), "min_evaluations=0"),
     (lambda: SuccessiveHalving(reduction_factor=1), "reduction_factor=1")],
)  # fmt: skip
def test_a_race_out_of_range_is_refused(build: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build()


def test_a_factory_that_gives_no_trainer_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="returned dict; expected a Trainer"):
        seeds(lambda given: {}, 3, out=tmp_path)
    with pytest.raises(MethodError, match="is not callable"):
        seeds("lora", 3, out=tmp_path / "b")  # type: ignore[arg-type]


def test_a_factory_that_cannot_be_sent_is_told_before_any_run(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"factory cannot be sent to another process.*top level of a module"):
        seeds(lambda given: made(given), 3, out=tmp_path, workers=2)


def test_a_metric_that_was_never_logged_costs_no_run(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"the evaluation has no 'f1', only .*eval_accuracy"):
        seeds(plain, 2, metric="f1", out=tmp_path)
    assert len(list(tmp_path.glob("run-*.json"))) == 1  # it stops there, and keeps that one
    kept = (tmp_path / "run-0.json").read_text()
    assert len(seeds(plain, 2, metric="accuracy", out=tmp_path).finished) == 2
    assert (tmp_path / "run-0.json").read_text() == kept
    with pytest.raises(MethodError, match="Run 0: the evaluation has no 'f1'"):
        seeds(plain, 3, metric="f1", out=tmp_path)
    assert not (tmp_path / "run-2.json").exists()


def test_another_calls_folder_is_refused(tmp_path: Path) -> None:
    seeds(plain, 2, out=tmp_path)
    with pytest.raises(MethodError, match="holds runs with base=0, this call has 1"):
        seeds(plain, 2, out=tmp_path, base=1)
    with pytest.raises(MethodError, match="holds runs with factory="):
        seeds(fails_once, 2, out=tmp_path)
    with pytest.raises(MethodError, match="holds runs with description=None, this call has 'longer'"):
        seeds(plain, 2, out=tmp_path, description="longer")
    with pytest.raises(MethodError, match=r"holds no results of peft_plus.seeds"):
        SeedRuns.load(tmp_path / "nothing")


def test_a_factory_with_other_settings_is_another_factory(tmp_path: Path) -> None:
    settings = {"method": {"lora": {"r": 2}}, "eval_steps": 3}
    runs = seeds(partial(made, **settings), 2, out=tmp_path)
    assert seeds(partial(partial(made), **settings), 2, out=tmp_path / "b").values == runs.values
    assert seeds(partial(made, **settings), 2, out=tmp_path) == runs
    with pytest.raises(MethodError, match="holds runs with arguments="):
        seeds(partial(made, **{**settings, "method": {"lora": {"r": 3}}}), 2, out=tmp_path)
    file = tmp_path / "seeds.json"  # an argument that is no plain value counts by its type
    assert seeds(partial(made, model_init=None, folder=tmp_path / "x"), 2, out=tmp_path / "c").values
    assert json.loads(file.read_text())["arguments"] == [[[], settings]]


def test_several_processes_of_one_training_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MethodError, match="not under torchrun"):
        seeds(plain, 2, out=tmp_path)
