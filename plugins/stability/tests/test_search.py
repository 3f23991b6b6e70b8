"""`search`: trials by Optuna over a factory of Trainers; what is done is kept, and an interrupted search goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from torch import nn

from peft_plus import MethodError, Seeds
from peft_plus.seed_runs import optional
from peft_plus_stability.search import search
from peft_plus_stability.trials import TrialResult, Trials
from tests.seeds.factories import BreaksOnce, made

SPACE = {"x": FloatDistribution(-1.0, 1.0), "kind": CategoricalDistribution(["a", "b"])}


class Scripted:
    """What the runner asks of a Trainer, over four steps that evaluate a given loss after each; nothing is trained.

    Attributes:
        trained: steps that were made.
    """

    def __init__(self, losses: list[float], **metrics: float) -> None:
        self.args = SimpleNamespace(output_dir="", seed=0, data_seed=0, save_only_model=False)
        self.accelerator = SimpleNamespace(dataloader_config=SimpleNamespace(data_seed=0, use_seedable_sampler=True))
        self.state = SimpleNamespace(global_step=0, max_steps=len(losses), log_history=[])
        self.control = SimpleNamespace(should_training_stop=False)
        self.eval_dataset, self.model = None, nn.Module()
        self._losses, self._metrics, self._callbacks = losses, metrics, []

    def add_callback(self, callback: Any) -> None:
        self._callbacks.append(callback)

    def train(self, resume_from_checkpoint: Any = None) -> None:
        for step, loss in enumerate(self._losses, start=1):
            self.state.global_step = step
            self.state.log_history.append({"eval_loss": loss, "step": step})
            for callback in self._callbacks:
                callback.on_evaluate(self.args, self.state, self.control)
            if self.control.should_training_stop:
                return

    def evaluate(self) -> Mapping[str, float]:
        return {"eval_loss": self._losses[self.state.global_step - 1], **self._metrics}


def bowl(seeds: Seeds, *, x: float, kind: str = "a") -> Any:
    """The loss falls to x² + a constant of the kind; seeds shift it."""
    end = x**2 + (0.0 if kind == "a" else 0.5) + 0.01 * seeds.number
    return Scripted([end + 3, end + 2, end + 1, end])


def params(trials: Trials) -> list[Mapping[str, Any]]:
    return [trial.params for trial in trials.trials]


def test_trials_are_what_the_factory_was_given_and_came_to(tmp_path: Path) -> None:
    given: list[dict[str, Any]] = []

    def noted(seeds: Seeds, **settings: Any) -> Any:
        given.append(settings)
        return bowl(seeds, **settings)

    found = search(noted, SPACE, 6, out=tmp_path)
    assert params(found) == given
    assert all(-1 <= each["x"] <= 1 and each["kind"] in ("a", "b") for each in given)
    for trial in found.trials:
        assert trial.value == pytest.approx(trial.params["x"] ** 2 + (trial.params["kind"] == "b") * 0.5)
    assert found.best.value == min(trial.value for trial in found.trials if trial.value is not None)
    assert [trial.value for trial in found.ranked] == sorted(trial.value or 0.0 for trial in found.trials)
    assert Trials.load(tmp_path) == found


def test_the_value_is_the_mean_over_seeds_and_all_trials_have_the_same(tmp_path: Path) -> None:
    seen: list[tuple[int, int, Path]] = []

    def noted(seeds: Seeds, x: float) -> Any:
        seen.append((seeds.number, seeds.init, seeds.shared))
        return bowl(seeds, x=x)

    found = search(noted, {"x": FloatDistribution(-1.0, 1.0)}, 2, seeds=3, base=7, out=tmp_path)
    shared = tmp_path / "shared"
    assert seen == 2 * [(0, 7, shared), (1, 8, shared), (2, 9, shared)]
    for trial in found.trials:
        own = trial.params["x"] ** 2
        assert trial.values == pytest.approx([own, own + 0.01, own + 0.02])
        assert trial.value == pytest.approx(own + 0.01)


def test_a_search_that_is_cut_off_tries_what_it_would_have_tried(tmp_path: Path) -> None:
    """Also the trial that it was at, of which one run of two is there: it is not made again."""
    whole = search(bowl, SPACE, 14, seeds=2, out=tmp_path / "whole")
    made_now: list[tuple[float, int]] = []
    cut = True

    def bowl_cut(seeds: Seeds, **settings: Any) -> Any:
        if cut and len(made_now) == 23:
            raise KeyboardInterrupt
        made_now.append((settings["x"], seeds.number))
        return bowl(seeds, **settings)

    with pytest.raises(KeyboardInterrupt):
        search(bowl_cut, SPACE, 14, seeds=2, out=tmp_path / "cut")
    assert Trials.load(tmp_path / "cut").trials[-1].state == "running"
    cut = False
    found = search(bowl_cut, SPACE, 14, seeds=2, out=tmp_path / "cut")
    assert params(found) == params(whole)
    assert [trial.value for trial in found.trials] == [trial.value for trial in whole.trials]
    assert len(made_now) == len(set(made_now)) == 28


def test_a_second_call_makes_only_what_is_missing(tmp_path: Path) -> None:
    first = search(bowl, SPACE, 3, out=tmp_path)
    more = search(bowl, SPACE, 5, out=tmp_path)
    assert more.trials[:3] == first.trials
    assert search(bowl, SPACE, 4, out=tmp_path) == more
    assert params(more) == params(search(bowl, SPACE, 5, out=tmp_path / "at once"))


def test_another_seed_of_the_search_tries_other_settings(tmp_path: Path) -> None:
    assert params(search(bowl, SPACE, 2, out=tmp_path / "a")) != params(
        search(bowl, SPACE, 2, base=1, out=tmp_path / "b")
    )


def test_a_space_may_be_functions_of_the_trial(tmp_path: Path) -> None:
    def rank(trial: Any) -> int:
        return 2 ** trial.suggest_int("log2_rank", 1, 3)

    def alpha(trial: Any) -> int:
        return 2 * 2 ** trial.params["log2_rank"]

    def factory(seeds: Seeds, *, rank: int, alpha: int, depth: int) -> Any:
        assert alpha == 2 * rank
        return Scripted([float(rank + depth)] * 4)

    space = {"rank": rank, "alpha": alpha, "depth": IntDistribution(1, 9, step=4)}
    found = search(factory, space, 6, out=tmp_path)
    assert [trial.state for trial in found.trials] == ["complete"] * 6
    assert all(trial.value == trial.params["rank"] + trial.params["depth"] for trial in found.trials)
    assert {trial.params["depth"] for trial in found.trials} <= {1, 5, 9}


def test_a_metric_of_which_more_is_better_is_maximised(tmp_path: Path) -> None:
    def factory(seeds: Seeds, x: float) -> Any:
        return Scripted([1.0] * 4, eval_accuracy=x)

    found = search(factory, {"x": FloatDistribution(0.0, 1.0)}, 25, metric="accuracy", out=tmp_path)
    assert found.greater_is_better
    assert found.best.value == max(trial.params["x"] for trial in found.trials)
    last = [trial.params["x"] for trial in found.trials[-5:]]
    assert sum(last) / 5 > 0.75  # the sampler goes where it is better


def test_a_users_sampler_is_used_as_it_is(tmp_path: Path) -> None:
    grid = optuna.samplers.GridSampler({"x": [-0.5, 0.25]}, seed=0)
    space = {"x": FloatDistribution(-1.0, 1.0)}
    found = search(bowl, space, 9, sampler=grid, out=tmp_path)
    assert sorted(trial.params["x"] for trial in found.trials) == [-0.5, 0.25]  # it has tried all
    assert search(bowl, space, 9, sampler=grid, out=tmp_path) == found
    assert len(search(bowl, space, 3, out=tmp_path).trials) == 3  # another sampler has not


# ---- pruning -------------------------------------------------------------------------------------------------------


def test_a_pruned_trial_stops_in_its_first_run(tmp_path: Path) -> None:
    steps: list[Scripted] = []

    def factory(seeds: Seeds, x: float) -> Any:
        steps.append(Scripted([x] * 4))
        return steps[-1]

    grid = optuna.samplers.GridSampler({"x": [0.1, 0.9]}, seed=1)
    above = optuna.pruners.ThresholdPruner(upper=0.5, n_warmup_steps=2)  # the first that counts
    found = search(factory, {"x": FloatDistribution(0.0, 1.0)}, 2, seeds=2, sampler=grid, pruner=above, out=tmp_path)
    by_x = {trial.params["x"]: trial for trial in found.trials}
    assert (by_x[0.1].state, by_x[0.1].values) == ("complete", (0.1, 0.1))
    assert (by_x[0.9].state, by_x[0.9].values) == ("pruned", (0.9,))
    assert sorted(trainer.state.global_step for trainer in steps) == [2, 4, 4]
    assert found.best == by_x[0.1]
    assert search(factory, {"x": FloatDistribution(0.0, 1.0)}, 2, seeds=2, pruner=above, out=tmp_path) == found


def test_a_pruner_that_is_never_told_anything_is_refused(tmp_path: Path) -> None:
    def factory(seeds: Seeds, x: float) -> Any:
        return Scripted([x])

    with pytest.raises(MethodError, match="no evaluation before its last step tells it"):
        search(factory, {"x": FloatDistribution(0.0, 1.0)}, pruner=optuna.pruners.MedianPruner(), out=tmp_path)


# ---- what goes wrong -----------------------------------------------------------------------------------------------


def test_a_trial_that_fails_is_kept_with_its_error_and_the_search_goes_on(tmp_path: Path) -> None:
    def factory(seeds: Seeds, *, x: float, kind: str) -> Any:
        if kind == "b":
            raise MethodError("kind b | does not fit")
        return bowl(seeds, x=x)

    found = search(factory, SPACE, 8, out=tmp_path)
    failed = [trial for trial in found.trials if trial.state == "failed"]
    assert failed
    assert all(trial.params["kind"] == "b" and trial.value is None for trial in failed)
    assert {trial.error for trial in failed} == {"MethodError: kind b | does not fit"}
    assert "does not fit" in (tmp_path / f"trial-{failed[0].number}" / "error.txt").read_text()
    assert len(found.ranked) + len(failed) == 8
    assert "failed: MethodError: kind b \\| does not fit |" in str(found)


def test_a_value_that_is_not_a_number_is_a_failed_trial(tmp_path: Path) -> None:
    def factory(seeds: Seeds, *, x: float, kind: str) -> Any:
        return Scripted([float("nan") if kind == "b" else x] * 4)

    found = search(factory, SPACE, 6, out=tmp_path)
    assert {t.params["kind"]: t.state for t in found.trials} == {"a": "complete", "b": "failed"}


def test_a_metric_that_was_never_logged_is_told_at_once_and_another_may_be_named(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="the evaluation has no 'f1', only eval_loss"):
        search(bowl, SPACE, 5, metric="f1", out=tmp_path)
    assert len(Trials.load(tmp_path).trials) == 1
    found = search(bowl, SPACE, 2, out=tmp_path)
    assert [trial.state for trial in found.trials] == ["complete"] * 2
    with pytest.raises(MethodError, match="holds trials judged by 'eval_loss', this call has 'f1'"):
        search(bowl, SPACE, 2, metric="f1", out=tmp_path)


def test_another_searchs_folder_is_refused(tmp_path: Path) -> None:
    search(bowl, SPACE, 1, out=tmp_path)
    with pytest.raises(MethodError, match="holds runs with space="):
        search(bowl, {**SPACE, "x": FloatDistribution(-2.0, 1.0)}, 1, out=tmp_path)
    with pytest.raises(MethodError, match="holds runs with seeds=1, this call has 2"):
        search(bowl, SPACE, 1, seeds=2, out=tmp_path)
    with pytest.raises(MethodError, match="holds no trials of search"):
        Trials.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"space": {}}, "space={}"),
        ({"space": {"x": (0, 1)}}, r"space\['x'\]=\(0, 1\): give a distribution"),
        ({"trials": 0}, "trials=0"),
        ({"seeds": 0}, "seeds=0"),
        ({"base": -1}, "base=-1"),
        ({"vary": ["weather"]}, "vary=.*init, order, dropout"),
    ],
)
def test_a_setting_out_of_range_is_refused_before_any_trial(settings: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        search(bowl, **{"space": SPACE, "out": tmp_path / "out", **settings})
    assert not (tmp_path / "out").exists()


def test_a_factory_that_cannot_be_called_is_told(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="'lora' is not callable"):
        search("lora", SPACE, out=tmp_path)  # type: ignore[arg-type]


def test_optuna_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(optional, "find_spec", lambda name: None)
    with pytest.raises(MethodError, match="Search needs optuna, which is not installed: pip install optuna"):
        search(bowl, SPACE, out=tmp_path)


# ---- the report ----------------------------------------------------------------------------------------------------


def test_the_report_holds_all_trials_the_best_first(tmp_path: Path) -> None:
    trials = Trials(
        trials=(
            TrialResult(number=0, params={"x": 0.5}, state="complete", value=0.25, values=(0.25,), seconds=3.0),
            TrialResult(number=1, params={"x": 0.1}, state="complete", value=0.01, values=(0.0, 0.02), seconds=4.0),
            TrialResult(number=2, params={"x": 0.9, "y": "b"}, state="failed", error="ValueError: no\nluck"),
        ),
        metric="eval_loss",
        greater_is_better=False,
    )
    lines = trials.markdown().splitlines()
    assert lines[0] == "3 trials, eval_loss (less is better)."
    assert lines[2] == "| trial | x | y | eval_loss | runs | seconds | |"
    assert lines[4:7] == [
        "| 1 | 0.1 |  | 0.0100 | 2 | 4 |  |",
        "| 0 | 0.5 |  | 0.2500 | 1 | 3 |  |",
        "| 2 | 0.9 | b |  | 0 | 0 | failed: ValueError: no luck |",
    ]
    folder = trials.save(tmp_path)
    assert (folder / "report.md").read_text() == trials.markdown() + "\n"
    told = json.loads((folder / "report.json").read_text())
    assert told["best"] == 1
    assert [trial["params"] for trial in told["trials"]] == [{"x": 0.5}, {"x": 0.1}, {"x": 0.9, "y": "b"}]
    with pytest.raises(ValueError, match="None of the 1 trials is complete"):
        _ = Trials(trials=trials.trials[2:], metric="eval_loss", greater_is_better=False).best


# ---- real Trainers -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_accelerator_at_a_time")
def test_a_trainer_that_was_interrupted_goes_on_in_its_trial(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    breaks = BreaksOnce(3, KeyboardInterrupt)
    settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}

    def factory(seeds: Seeds, *, learning_rate: float, stop: bool) -> Any:
        trainer = made(seeds, learning_rate=learning_rate, **settings)
        if stop:
            trainer.add_callback(breaks)
        return trainer

    def space(stop: bool) -> Any:
        return {"learning_rate": FloatDistribution(1e-4, 1e-1, log=True), "stop": lambda trial: stop}

    pruner = optuna.pruners.MedianPruner(n_startup_trials=1)
    whole = search(factory, space(False), 3, pruner=pruner, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        search(factory, space(True), 3, pruner=pruner, out=tmp_path / "cut")
    found = search(factory, space(True), 3, pruner=pruner, out=tmp_path / "cut")
    assert [trial.value for trial in found.trials] == [trial.value for trial in whole.trials]
    assert [trial.state for trial in found.trials] == [trial.state for trial in whole.trials]
    assert json.loads((tmp_path / "cut" / "trial-0" / "run-0.json").read_text())["resumed"] == 3
    assert "[I 2" not in capsys.readouterr().err  # the lines that Optuna writes
