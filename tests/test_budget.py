"""`plan_budget`: what plugins choose by the data is what the Trainer runs with."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
from transformers import TrainerCallback

from peft_plus import MethodError, Plugin, PluginError, Run

from .bad_inputs import built, rows, trainer
from .evaluated_loop import evaluated_session


@dataclass(kw_only=True)
class Budget(Plugin):
    """Answers with what it is given, and notes what it is asked with.

    Attributes:
        times: how often it was asked; `asked` goes back with a checkpoint.
    """

    name: ClassVar[str] = "budget"
    times: ClassVar[list[float]] = []

    answer: Any = None
    asked: list[tuple[int, float, int, bool | None]] = field(init=False, default_factory=list)

    def plan_budget(self, run: Run) -> Mapping[str, Any]:
        seen = sum(len(batch["input_ids"]) for batch in run.examples(3))
        self.times.append(run.base_lr)
        self.asked.append((seen, run.base_lr, run.steps_per_epoch, run.evaluates))
        return self.answer


@dataclass(kw_only=True)
class Other(Budget):
    name: ClassVar[str] = "other"


def chosen(model: Any) -> Budget:
    return next(plugin for plugin in model.peft_plus.plugins if isinstance(plugin, Budget))


def test_the_run_has_the_arguments_that_the_data_asked_for_and_the_users_are_not_touched(tmp_path: Path) -> None:
    model = built(["full", Budget(answer={"num_train_epochs": 2.0, "learning_rate": 0.5})])
    run = trainer(model, tmp_path, rows(count=8), max_steps=-1, num_train_epochs=7, eval_dataset=rows()[:4])
    given = run.args
    run.train()
    assert (run.args.num_train_epochs, run.args.learning_rate) == (2.0, 0.5)
    assert run.state.max_steps == run.state.global_step == 2 * 8 // given.train_batch_size
    assert (given.num_train_epochs, given.learning_rate) != (2.0, 0.5)
    assert chosen(model).asked == [(8, given.learning_rate, 8 // given.train_batch_size, True)]


def test_a_second_run_is_asked_anew_from_what_the_user_gave(tmp_path: Path) -> None:
    model = built(["full", Budget(answer={"learning_rate": 0.5})])
    run = trainer(model, tmp_path, max_steps=1)
    rate = run.args.learning_rate
    run.train()
    run.train()
    assert [asked[1] for asked in chosen(model).asked] == [rate, rate]
    run.args = copy.copy(run.args)  # other arguments, from here on the user's
    run.args.learning_rate = 0.25
    run.train()
    assert chosen(model).asked[-1][1] == 0.25


def test_what_the_user_changes_between_two_runs_counts(tmp_path: Path) -> None:
    model = built(["full", Budget(answer={"learning_rate": 0.5})])
    run = trainer(model, tmp_path, max_steps=1)
    given = run.args
    run.train()
    run.args.max_steps, run.args.weight_decay, run.args.output_dir = 3, 0.25, str(tmp_path / "other")
    run.train()
    assert (run.state.global_step, run.args.weight_decay, run.args.output_dir) == (3, 0.25, str(tmp_path / "other"))
    run.args.learning_rate = 0.125
    run.train()
    assert [asked[1] for asked in chosen(model).asked] == [given.learning_rate, given.learning_rate, 0.125]
    assert run.args.learning_rate == 0.5  # the plugin's choice still counts
    assert (given.max_steps, given.weight_decay) == (1, 0.0)


class Breaks(TrainerCallback):
    """Ends the first run after its third step, as Ctrl-C does."""

    def __init__(self) -> None:
        self.done = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3 and not self.done:
            self.done = True
            raise KeyboardInterrupt


def test_a_run_that_broke_off_goes_on_with_what_was_chosen_for_it(tmp_path: Path) -> None:
    Budget.times.clear()
    model = built(["full", Budget(answer={"learning_rate": 0.125})])
    run = trainer(model, tmp_path, max_steps=4, save_strategy="steps", save_steps=2, callbacks=[Breaks()])
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.args.save_total_limit = 1  # still the user's
    run.train(resume_from_checkpoint=True)
    assert len(Budget.times) == 1
    assert run.args.learning_rate == 0.125
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    run.train()
    assert len(Budget.times) == 2


class FailsAtTheEnd(TrainerCallback):
    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        raise OSError("the dashboard is down")


def test_a_run_that_ended_is_not_under_way_whatever_failed_after_it(tmp_path: Path) -> None:
    Budget.times.clear()
    model = built(["full", Budget(answer={"learning_rate": 0.125})])
    run = trainer(model, tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    run.add_callback(FailsAtTheEnd)  # after ours
    with pytest.raises(OSError, match="dashboard"):
        run.train()
    run.remove_callback(FailsAtTheEnd)
    run.args.max_steps = 3
    run.train(resume_from_checkpoint=True)
    assert len(Budget.times) == 2
    assert run.state.global_step == 3


def test_two_that_choose_differently_are_named(tmp_path: Path) -> None:
    model = built(["full", Budget(answer={"num_train_epochs": 2.0}), Other(answer={"num_train_epochs": 3.0})])
    says = r"'budget' .*chooses num_train_epochs=2.0 and plugin 'other' .*=3.0. Drop one"
    with pytest.raises(MethodError, match=says):
        trainer(model, tmp_path).train()


def test_two_that_choose_alike_are_no_contradiction(tmp_path: Path) -> None:
    model = built(["full", Budget(answer={"learning_rate": 0.5}), Other(answer={"learning_rate": 0.5})])
    run = trainer(model, tmp_path, max_steps=1)
    run.train()
    assert run.args.learning_rate == 0.5


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        (None, PluginError, "'budget' .* returned None from plan_budget; expected a mapping"),
        ({"epochs": 3}, MethodError, "epochs"),
    ],
)
def test_a_wrong_answer_is_told(answer: Any, error: type[Exception], says: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=says):
        trainer(built(["full", Budget(answer=answer)]), tmp_path).train()


def test_a_session_whose_budget_is_the_loops_does_not_ask() -> None:
    model = built(["full", Budget(answer={"num_train_epochs": 2.0})])
    evaluated_session(model, rows(), {}, steps=1)
    assert chosen(model).asked == []
