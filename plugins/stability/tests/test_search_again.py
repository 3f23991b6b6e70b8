"""`search` called again: what failed is made anew, what is stale is not taken, and nothing is tried twice."""

from __future__ import annotations

import functools
import json
import logging
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from torch import nn

from peft_plus import MethodError, Seeds, TrainingError
from peft_plus.errors import DivergenceError
from peft_plus_stability import study
from peft_plus_stability.search import search
from peft_plus_stability.trials import Trials

from .test_search import SPACE, Scripted, bowl, params

X = {"x": FloatDistribution(-1.0, 1.0)}


class Breaks:
    """A factory that breaks at some calls, until it is mended.

    Attributes:
        calls: (x, number of the run), in order.
        at: which of them break, counted from 0.
    """

    def __init__(self, *at: int) -> None:
        self.calls: list[tuple[float, int]] = []
        self.at = set(at)

    def __call__(self, seeds: Seeds, *, x: float, **rest: Any) -> Any:
        self.calls.append((x, seeds.number))
        if len(self.calls) - 1 in self.at:
            raise OSError("disk full")
        return bowl(seeds, x=x, **rest)


def xs(trials: Trials) -> list[float]:
    return [trial.params["x"] for trial in trials.trials]


# ---- what failed ---------------------------------------------------------------------------------------------------


def test_what_failed_is_made_again_in_order_with_its_parameters(tmp_path: Path) -> None:
    factory = Breaks(1, 3)
    first = search(factory, SPACE, 5, out=tmp_path)
    assert [trial.state for trial in first.trials] == ["complete", "failed", "complete", "failed", "complete"]
    assert (tmp_path / "trial-1" / "error.txt").exists()
    again = search(factory, SPACE, 5, out=tmp_path)
    assert [x for x, _ in factory.calls[5:]] == [xs(first)[1], xs(first)[3]]
    assert params(again) == params(first)
    assert [(trial.number, trial.state, trial.error) for trial in again.trials] == [
        (k, "complete", "") for k in range(5)
    ]
    assert [again.trials[k] for k in (0, 2, 4)] == [first.trials[k] for k in (0, 2, 4)]
    for trial in again.trials:
        assert trial.value == trial.params["x"] ** 2 + (trial.params["kind"] == "b") * 0.5
    assert not (tmp_path / "trial-1" / "error.txt").exists()
    assert Trials.load(tmp_path) == again
    assert search(factory, SPACE, 5, out=tmp_path) == again
    assert len(factory.calls) == 7


def test_where_all_failed_the_next_call_begins_again(tmp_path: Path) -> None:
    factory = Breaks(0, 1)
    with pytest.raises(TrainingError, match=r"2 of 2 failed, the first by OSError: disk full.*Mend the cause and call"):
        search(factory, X, 2, out=tmp_path)
    found = search(factory, X, 2, out=tmp_path)
    assert [trial.state for trial in found.trials] == ["complete"] * 2
    assert factory.calls[2:] == factory.calls[:2]


def test_what_fails_again_is_told_once_and_counts_once(tmp_path: Path) -> None:
    factory = Breaks(1, 3, 5)
    search(factory, X, 3, out=tmp_path)
    again = search(factory, X, 4, out=tmp_path)
    assert [trial.state for trial in again.trials] == ["complete", "failed", "complete", "complete"]
    assert len(factory.calls) == 5  # trial 1 for the second time, and a new one
    search(factory, X, 1, out=tmp_path)  # which does not ask for trial 1
    assert len(factory.calls) == 5
    third = search(factory, X, 4, out=tmp_path)
    assert (len(third.trials), third.trials[1].state) == (4, "failed")
    assert search(factory, X, 4, out=tmp_path).trials[1].state == "complete"


def test_failures_do_not_change_what_the_other_trials_try(tmp_path: Path) -> None:
    """Within the first ten, where the sampler looks at no result."""
    factory = Breaks(2, 5, 6)
    search(factory, X, 4, out=tmp_path / "broken")
    search(factory, X, 7, out=tmp_path / "broken")
    assert xs(search(factory, X, 9, out=tmp_path / "broken")) == xs(search(bowl, X, 9, out=tmp_path / "whole"))


def test_finished_runs_of_a_failed_trial_are_kept(tmp_path: Path) -> None:
    factory = Breaks(1)
    search(factory, X, 2, seeds=2, out=tmp_path)
    found = search(factory, X, 2, seeds=2, out=tmp_path)
    assert [number for _, number in factory.calls] == [0, 1, 0, 1, 1]
    assert len(set(factory.calls)) == 4
    assert [len(trial.values) for trial in found.trials] == [2, 2]


def test_an_interrupted_second_attempt_is_gone_on_with(tmp_path: Path) -> None:
    factory, cut = Breaks(0, 1), {4}

    def cut_off(seeds: Seeds, *, x: float) -> Any:
        if len(factory.calls) in cut:
            cut.clear()
            raise KeyboardInterrupt
        return factory(seeds, x=x)

    first = search(cut_off, X, 3, out=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        search(cut_off, X, 3, out=tmp_path)
    assert [trial.state for trial in Trials.load(tmp_path).trials] == ["complete", "running", "complete"]
    found = search(cut_off, X, 3, out=tmp_path)
    assert xs(found) == xs(first)
    assert [trial.state for trial in found.trials] == ["complete"] * 3


@pytest.mark.filterwarnings("ignore:BruteForceSampler is experimental")
@pytest.mark.parametrize("kind", ["grid", "brute force"])
def test_samplers_that_end_make_again_what_failed_and_go_on(kind: str, tmp_path: Path) -> None:
    def sampler() -> Any:
        if kind == "grid":
            return optuna.samplers.GridSampler({"x": [-0.5, 0.0, 0.5]})
        return optuna.samplers.BruteForceSampler()

    space = {"x": FloatDistribution(-0.5, 0.5, step=0.5)}
    factory = Breaks(0, 1, 4)
    with pytest.raises(TrainingError):
        search(factory, space, 2, sampler=sampler(), out=tmp_path)
    for states in (["complete", "complete", "failed"], ["complete"] * 3):
        found = search(factory, space, 9, sampler=sampler(), out=tmp_path)
        assert [trial.state for trial in found.trials] == states
        assert sorted(xs(found)) == [-0.5, 0.0, 0.5]


def test_functions_of_the_trial_give_what_they_gave(tmp_path: Path) -> None:
    ranks: list[int] = []

    def factory(seeds: Seeds, *, rank: int, alpha: int) -> Any:
        ranks.append(rank)
        if len(ranks) == 2:
            raise OSError("disk full")
        return Scripted([float(alpha)] * 4)

    space = {
        "rank": lambda trial: 2 ** trial.suggest_int("log2_rank", 1, 30),
        "alpha": lambda trial: 2 ** trial.params["log2_rank"],
    }
    search(factory, space, 3, out=tmp_path)
    search(factory, space, 3, out=tmp_path)
    assert ranks[3] == ranks[1]


def test_a_trial_that_diverged_is_not_made_again(tmp_path: Path) -> None:
    """It would diverge again; its other runs could not give it a mean."""
    calls: list[float] = []

    class Diverges(Scripted):
        def train(self, resume_from_checkpoint: Any = None) -> None:
            raise DivergenceError("The loss is NaN.")

    def factory(seeds: Seeds, *, x: float) -> Any:
        calls.append(x)
        return {1: Diverges([1.0]), 2: Scripted([float("nan")] * 4)}.get(len(calls), Scripted([x, x]))

    median = optuna.pruners.MedianPruner()
    found = search(factory, X, 3, seeds=2, pruner=median, out=tmp_path)
    assert [trial.state for trial in found.trials] == ["failed", "failed", "complete"]
    assert [trial.error for trial in found.trials[:2]] == [
        "TrainingError: The loss is NaN.",
        "TrainingError: eval_loss is not a number.",
    ]
    assert search(factory, X, 3, seeds=2, pruner=median, out=tmp_path) == found
    assert len(calls) == 4


# ---- what every trial would say ------------------------------------------------------------------------------------


def no_trainer(seeds: Seeds, **settings: Any) -> Any:
    return None


def no_metrics(trainer: Any) -> Any:
    return 3


class SharedModel:
    """A factory of Trainers of one model."""

    def __init__(self) -> None:
        self.model = nn.Module()

    def __call__(self, seeds: Seeds, *, x: float) -> Any:
        trainer = Scripted([x])
        trainer.model = self.model
        return trainer


def trained(seeds: Seeds, *, x: float) -> Any:
    trainer = Scripted([x])
    trainer.state.global_step = 1
    return trainer


@pytest.mark.parametrize(
    ("factory", "evaluate", "says", "trials"),
    [
        (no_trainer, None, r"factory \S+\.no_trainer returned NoneType; expected a Trainer", 1),
        (trained, None, "has trained for 1 steps", 1),
        (bowl, no_metrics, "evaluate returned 3", 1),
        (SharedModel(), None, "the model that run 0 trained", 2),
    ],
)
def test_what_the_runner_says_of_the_factory_ends_the_search(
    factory: Any, evaluate: Any, says: str, trials: int, tmp_path: Path
) -> None:
    with pytest.raises(MethodError, match=says):
        search(factory, X, 5, evaluate=evaluate, out=tmp_path)
    assert len(Trials.load(tmp_path).trials) == trials
    assert Trials.load(tmp_path).trials[-1].error.startswith("CallError: ")


def test_a_factory_that_was_mended_is_taken_up(tmp_path: Path) -> None:
    broken = True

    def factory(seeds: Seeds, *, x: float) -> Any:
        return None if broken else bowl(seeds, x=x)

    with pytest.raises(MethodError):
        search(factory, X, 2, out=tmp_path)
    broken = False
    found = search(factory, X, 2, out=tmp_path)
    assert xs(found) == xs(search(bowl, X, 2, out=tmp_path / "whole"))
    assert [trial.state for trial in found.trials] == ["complete"] * 2


def test_what_the_trainer_says_may_be_due_to_the_settings(tmp_path: Path) -> None:
    class Refuses(Scripted):
        def train(self, resume_from_checkpoint: Any = None) -> None:
            raise MethodError("warmup_steps does not fit")

    def factory(seeds: Seeds, *, x: float) -> Any:
        return Refuses([x]) if x < 0 else Scripted([x])

    found = search(factory, X, 6, out=tmp_path)
    assert {(trial.params["x"] < 0, trial.state) for trial in found.trials} == {(True, "failed"), (False, "complete")}


def test_a_name_that_the_factory_does_not_take_is_told_before_any_trial(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(MethodError, match=r"bowl with rate: .*'x'"):
        search(bowl, {"rate": FloatDistribution(0, 1)}, out=out)
    with pytest.raises(MethodError, match=r"bowl with x, rate: .* unexpected keyword argument 'rate'"):
        search(bowl, {**X, "rate": FloatDistribution(0, 1)}, out=out)
    assert not out.exists()


def test_a_name_that_the_factory_within_does_not_take_ends_the_search(tmp_path: Path) -> None:
    @functools.wraps(bowl)
    def around(*given: Any, **settings: Any) -> Any:
        return bowl(*given, **settings)

    with pytest.raises(MethodError, match=r"unexpected keyword argument 'rate'"):
        search(around, {**X, "rate": FloatDistribution(0, 1)}, out=tmp_path)
    assert len(Trials.load(tmp_path).trials) == 1


def test_a_name_that_something_else_does_not_take_may_be_due_to_the_settings(tmp_path: Path) -> None:
    def factory(seeds: Seeds, *, x: float, kind: str) -> Any:
        return bowl(seeds, x=x) if kind == "a" else bowl(seeds, rank=x)  # type: ignore[call-arg]

    found = search(factory, SPACE, 6, out=tmp_path)
    assert {(trial.params["kind"], trial.state) for trial in found.trials} == {("a", "complete"), ("b", "failed")}


# ---- what is tried -------------------------------------------------------------------------------------------------


def test_a_users_seeded_sampler_does_not_repeat_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for sampler in (optuna.samplers.RandomSampler, optuna.samplers.TPESampler):
        out = tmp_path / sampler.__name__
        caplog.clear()
        with caplog.at_level(logging.INFO, "peft_plus_stability"):
            first = search(bowl, X, 2, sampler=sampler(seed=0), out=out)
            assert "seeded anew" not in caplog.text
            found = search(bowl, X, 4, sampler=sampler(seed=0), out=out)
        assert found.trials[:2] == first.trials
        assert len(set(xs(found))) == 4
        assert caplog.text.count(f"{sampler.__name__} is seeded anew") == 1


# ---- what is stale -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("away", ["another metric", "no database", "no database, another seed"])
def test_runs_of_a_study_that_was_thrown_away_are_not_taken_for_new_ones(away: str, tmp_path: Path) -> None:
    """Trial 0 has one run of two on disk when its study goes; the new one has its x in one case only."""
    factory = Breaks(1)
    with pytest.raises(TrainingError):
        search(factory, X, 1, seeds=2, sampler=optuna.samplers.RandomSampler(seed=1), out=tmp_path)
    assert [file.name for file in (tmp_path / "trial-0").glob("run-*.json")] == ["run-0.json"]
    if away != "another metric":
        (tmp_path / "trials.db").unlink()

    def changed(seeds: Seeds, *, x: float) -> Any:
        factory(seeds, x=x)
        return Scripted([2 + x] * 4, eval_f1=2 + x)

    changed.__qualname__ = Breaks.__qualname__  # what is compared
    sampler = optuna.samplers.RandomSampler(seed=1 if away == "no database" else 2)
    metric = "eval_f1" if away == "another metric" else "eval_loss"
    found = search(changed, X, 1, metric=metric, seeds=2, sampler=sampler, out=tmp_path)
    (before, _), (_, _), (now, _), (_, _) = factory.calls
    assert [number for _, number in factory.calls] == [0, 1, 0, 1]
    assert (before == now) == (away == "no database")
    assert found.trials[0].values == (2 + now, 2 + now)


class CutOff:
    """Breaks off in its third call, as Ctrl-C does.

    Attributes:
        calls: number of each run.
    """

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, seeds: Seeds, *, x: float) -> Any:
        self.calls.append(seeds.number)
        if len(self.calls) == 3:
            raise KeyboardInterrupt
        return Scripted([x**2 + seeds.number], eval_f1=seeds.number / 10)


def cut_off_in_the_third_run(folder: Path) -> CutOff:
    """The factory of a search for one trial of three runs, of which two are made."""
    factory = CutOff()
    with pytest.raises(KeyboardInterrupt):
        search(factory, X, 1, seeds=3, out=folder)
    return factory


def test_finished_runs_are_judged_by_the_metric_that_the_next_call_names(tmp_path: Path) -> None:
    factory = cut_off_in_the_third_run(tmp_path)
    found = search(factory, X, 1, seeds=3, metric="f1", out=tmp_path)
    assert factory.calls == [0, 1, 2, 2]
    assert found.trials[0].values == (0.0, 0.1, 0.2)


def test_a_call_that_is_refused_leaves_the_study_as_it_was(tmp_path: Path) -> None:
    factory = cut_off_in_the_third_run(tmp_path)
    with pytest.raises(MethodError, match="holds runs with seeds=3, this call has 4"):
        search(factory, X, 1, metric="f1", seeds=4, out=tmp_path)
    assert search(factory, X, 1, seeds=3, out=tmp_path).trials[0].state == "complete"
    assert factory.calls == [0, 1, 2, 2]


def test_a_call_that_was_killed_before_its_study_began_is_no_obstacle(tmp_path: Path) -> None:
    search(bowl, X, 1, out=tmp_path)
    optuna.delete_study(study_name="search", storage=f"sqlite:///{tmp_path / 'trials.db'}")
    with pytest.raises(MethodError, match="holds no trials of search"):
        Trials.load(tmp_path)
    assert search(bowl, X, 2, metric="eval_loss", greater_is_better=True, out=tmp_path).greater_is_better


def test_a_kill_while_a_study_is_replaced_loses_no_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = search(bowl, X, 3, out=tmp_path)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "os", SimpleNamespace(replace=killed))
    with pytest.raises(KeyboardInterrupt):
        search(bowl, X, 4, greater_is_better=True, out=tmp_path)
    monkeypatch.undo()
    assert params(Trials.load(tmp_path)) == params(before)
    after = search(bowl, X, 4, greater_is_better=True, out=tmp_path)
    assert params(after)[:3] == params(before)
    assert sorted(file.name for file in tmp_path.glob("*trials.db*")) == ["trials.db"]


def test_a_run_without_the_metric_is_kept_for_another_and_made_again_for_it(tmp_path: Path) -> None:
    calls: list[float] = []
    logs: dict[str, float] = {}

    def factory(seeds: Seeds, *, x: float) -> Any:
        calls.append(x)
        return Scripted([x**2], **logs)

    for _ in range(2):
        with pytest.raises(MethodError, match=r"the evaluation has no 'f1'.*Finished runs are kept"):
            search(factory, X, 1, metric="f1", out=tmp_path / "one")
    assert len(calls) == 2
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert search(factory, X, 1, out=tmp_path / "two").trials[0].values == (calls[0] ** 2,)
    assert len(calls) == 2
    logs["eval_f1"] = 0.5  # the cause is mended
    assert search(factory, X, 1, metric="f1", out=tmp_path / "one").trials[0].values == (0.5,)
    assert len(calls) == 3


def test_what_is_better_may_be_said_later(tmp_path: Path) -> None:
    def factory(seeds: Seeds, *, x: float) -> Any:
        return Scripted([0.0], eval_distance=abs(x - 0.2))

    first = search(factory, X, 12, metric="distance", out=tmp_path)
    assert first.greater_is_better
    then = search(factory, X, 40, metric="distance", greater_is_better=False, out=tmp_path)
    assert params(then)[:12] == params(first)
    assert [trial.value for trial in then.trials[:12]] == [trial.value for trial in first.trials]
    turned = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path / 'trials.db'}")
    assert turned.direction.name == "MINIMIZE"
    late = [abs(x - 0.2) for x in xs(then)[-20:]]
    assert sum(late) / len(late) < 0.3, "TPE looks where the distance is small; by chance it is .52 on average"


def test_trials_that_were_pruned_the_other_way_are_no_trials_of_this_call(tmp_path: Path) -> None:
    def factory(seeds: Seeds, *, x: float) -> Any:
        return Scripted([x + k for k in range(4)])

    pruner = optuna.pruners.MedianPruner(n_startup_trials=1, n_warmup_steps=0)
    found = search(factory, X, 8, pruner=pruner, out=tmp_path)
    assert "pruned" in {trial.state for trial in found.trials}
    with pytest.raises(MethodError, match=r"were pruned because less of 'eval_loss' was better.*give another out"):
        search(factory, X, 9, greater_is_better=True, pruner=pruner, out=tmp_path)
    assert len(Trials.load(tmp_path).trials) == 8
    assert not Trials.load(tmp_path).greater_is_better


def test_a_folder_of_other_parameters_is_not_taken(tmp_path: Path) -> None:
    search(bowl, X, 2, out=tmp_path)
    cut = True

    def cut_off(seeds: Seeds, *, x: float) -> Any:
        if cut:
            raise KeyboardInterrupt
        return bowl(seeds, x=x)

    with pytest.raises(KeyboardInterrupt):
        search(cut_off, X, 1, out=tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "trial-0")
    shutil.copytree(tmp_path / "trial-1", tmp_path / "other" / "trial-0")
    cut = False
    found = search(cut_off, X, 1, out=tmp_path / "other")
    assert found.trials[0].value == found.trials[0].params["x"] ** 2


# ---- one call at a time --------------------------------------------------------------------------------------------

WAITS = """
import sys, time
from optuna.distributions import FloatDistribution
from peft_plus_stability.search import search

def factory(seeds, *, x):
    print("works", flush=True)
    time.sleep(300)

search(factory, {"x": FloatDistribution(-1.0, 1.0)}, 3, out=sys.argv[1])
"""


@pytest.mark.slow
def test_another_process_in_the_folder_is_told_and_its_death_blocks_nobody(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WAITS, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "works\n"
            factory = Breaks()
            factory_name = {"factory": f"{__name__}.{Breaks.__qualname__}"}
            with pytest.raises(MethodError, match=f"{re.escape(str(tmp_path))} already .process {process.pid} on host"):
                search(factory, X, 3, out=tmp_path)
            assert factory.calls == []
            assert [trial.state for trial in Trials.load(tmp_path).trials] == ["running"]
        finally:
            process.send_signal(signal.SIGKILL)
    settings = json.loads((tmp_path / "search.json").read_text())
    (tmp_path / "search.json").write_text(json.dumps(settings | factory_name))
    assert [trial.state for trial in search(factory, X, 3, out=tmp_path).trials] == ["complete"] * 3


def test_a_search_within_the_factory_of_the_same_search_is_refused(tmp_path: Path) -> None:
    def factory(seeds: Seeds, *, x: float) -> Any:
        search(bowl, X, 1, out=tmp_path)

    with pytest.raises(MethodError, match="already"):
        search(factory, X, 1, out=tmp_path)


def test_several_processes_of_one_launch_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MethodError, match="single process"):
        search(bowl, X, 1, out=tmp_path)
