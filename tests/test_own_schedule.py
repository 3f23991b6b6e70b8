"""A plugin that is a learning-rate schedule: alone in its stage, over a constant rate, in whatever loop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainerCallback, default_data_collator, get_constant_schedule

import peft_plus
from peft_plus import MethodError, Plugin, Session, get_model

from .bad_inputs import built, rows, same, trainer, weights
from .models import tiny
from .training import quiet

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")


@dataclass(kw_only=True)
class Falls(Plugin):
    """The rate falls by half in each step."""

    name: ClassVar[str] = "falls"
    schedule: ClassVar[bool] = True

    def lr_scale(self, run, param):
        return 0.5**run.step


@dataclass(kw_only=True)
class Rises(Falls):
    name: ClassVar[str] = "rises"


class Rates(TrainerCallback):
    """The rates in the optimizer during each update, and between updates."""

    def __init__(self) -> None:
        self.during: list[set[float]] = []
        self.between: list[set[float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any, **_: Any) -> None:
        def look(inner: Any, *_: Any) -> None:
            self.during.append({group["lr"] for group in inner.param_groups})

        optimizer.optimizer.register_step_pre_hook(look)

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any, **_: Any) -> None:
        self.between.append({group["lr"] for group in optimizer.param_groups})


@pytest.mark.parametrize("given", [{}, {"lr_scheduler_type": "constant"}, {"warmup_steps": 0}], ids=str)
def test_a_constant_scheduler_runs_under_it_and_it_is_said_once(
    given: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rates = Rates()
    run = trainer(built(["full", Falls()]), tmp_path, callbacks=[rates], **given)
    asked = run.args.lr_scheduler_type
    with caplog.at_level(logging.INFO, "peft_plus"):
        run.train()
    assert rates.during == [{0.1 * 0.5**step} for step in range(6)]
    assert rates.between == [{0.1}] * 6
    told = [record for record in caplog.records if "lr_scheduler_type is 'constant' instead" in record.message]
    assert len(told) == ("lr_scheduler_type" not in given)
    assert run.args.lr_scheduler_type == asked


def test_resumed_it_ends_bit_identical(tmp_path: Path) -> None:
    def made() -> Any:
        saving = {"save_strategy": "steps", "save_steps": 1, "seed": 3}
        return trainer(built(["full", Falls()]), tmp_path, optim="adamw_torch", **saving)

    whole = made()
    whole.train()
    end = weights(whole.model)
    again = made()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(again.model, end)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type='cosine'"),
        ({"lr_scheduler_type": "constant_with_warmup"}, "lr_scheduler_type='constant_with_warmup'"),
        ({"warmup_steps": 3}, "warmup_steps=3"),
        ({"warmup_steps": 0.1}, "warmup_steps=0.1"),
        ({"warmup_steps": 1, "lr_scheduler_type": "constant"}, "warmup_steps=1"),
    ],
)
def test_another_scheduler_is_refused_before_training(given: dict[str, Any], says: str, tmp_path: Path) -> None:
    model = built(["full", Falls()])
    before = weights(model)
    with pytest.raises(MethodError, match=rf"'falls' .* is a learning-rate schedule itself, and {says} puts another"):
        trainer(model, tmp_path, **given).train()
    assert same(model, before)
    with pytest.raises(MethodError, match=says):
        peft_plus.fit(model, quiet(tmp_path, max_steps=2, **given), train_dataset=rows())
    trainer(built("full"), tmp_path, **given).train()  # nothing else minds


@pytest.mark.parametrize("make", [get_constant_schedule, torch.optim.lr_scheduler.LinearLR])
def test_a_scheduler_that_was_passed_is_refused(make: Callable[..., Any], tmp_path: Path) -> None:
    model = built(["full", Falls()])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(MethodError, match=r"'falls' .*a scheduler was given.*optimizers=\(optimizer, None\)"):
        trainer(model, tmp_path, optimizers=(optimizer, make(optimizer))).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer(model, tmp_path, optimizers=(optimizer, None)).train()


def run_session(make: Callable[[Session], Any]) -> None:
    session = Session(built(["full", Falls()]), Accelerator(cpu=True), max_steps=4)
    optimizer = session.optimizer(torch.optim.SGD, lr=0.1)
    scheduler = make(session)
    for batch in session.batches(session.loader(rows(), 4, collate_fn=default_data_collator)):
        session.accelerator.backward(session.loss(batch))
        optimizer.step()
        if scheduler is not None:
            scheduler.step(*[1.0] * isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau))
        optimizer.zero_grad()


def test_a_session_refuses_one_by_name() -> None:
    with pytest.raises(MethodError, match=r"'falls' .*session\.scheduler\('linear'\) puts another one under it"):
        run_session(lambda session: session.scheduler("linear"))
    run_session(lambda session: None)
    run_session(lambda session: session.scheduler("constant"))


@pytest.mark.parametrize(
    "make",
    [
        lambda session: session.scheduler(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5),
        lambda session: torch.optim.lr_scheduler.ReduceLROnPlateau(session.optimizers[0].optimizer, patience=0),
    ],
    ids=["exponential", "plateau"],
)
def test_one_of_ones_own_is_found_by_what_it_does(make: Callable[[Session], Any]) -> None:
    says = r"'falls' .*at step [12] it has changed the rate from 0\.1 to 0\.0[15].*'constant'"
    with pytest.raises(MethodError, match=says):
        run_session(make)


def test_two_in_one_stage_conflict_before_anything_loads() -> None:
    says = r"plugin 'falls' \(tests.*\) and plugin 'rises' \(tests.*\) are both learning-rate schedules.*Drop one"
    with pytest.raises(MethodError, match=says):
        get_model("nowhere/to-be-found", ["full", Falls(), Rises()], task="SEQ_CLS", num_labels=2)
    with pytest.raises(MethodError, match=says):
        peft_plus.attach(get_model(tiny("bert"), "full"), [Falls(), Rises()])


def test_in_stages_of_their_own_they_do_not() -> None:
    @dataclass(kw_only=True)
    class Apart(Plugin):
        name: ClassVar[str] = "apart"

        def plan_stages(self, stages):
            return [peft_plus.Stage(name="one", plugins=("falls",)), peft_plus.Stage(name="two", plugins=("rises",))]

    get_model(tiny("bert"), ["full", Falls(), Rises(), Apart()])
