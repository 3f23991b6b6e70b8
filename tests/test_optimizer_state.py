"""What freezing does to the optimizer's state: kept by default, dropped where a plugin says so. Oracle: plain torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import default_data_collator

from peft_plus import MethodError, Plugin, PluginError, Session, attach, get_model
from peft_plus.compose import resolve

from .bad_inputs import rows, same, trainer, weights
from .models import tiny

STEPS = 9
RESTS = (3, 4, 6)
"""Steps in which block 2 is frozen: it comes back twice."""


pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")


@pytest.fixture(autouse=True)
def _no_settings_of_an_earlier_optimizer() -> None:
    """What transformers tells bitsandbytes of one model's embeddings holds, by position, for every later optimizer."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    bitsandbytes.optim.GlobalOptimManager.get_instance().initialize()


@dataclass(kw_only=True)
class Blinks(Plugin):
    """Block 2 rests in some steps, and so does its optimizer's state."""

    name: ClassVar[str] = "blinks"

    def may_train(self, run, param):
        return param.depth != 2 or run.step not in RESTS


@dataclass(kw_only=True)
class Forgets(Blinks):
    name: ClassVar[str] = "forgets"
    on_freeze: ClassVar[Any] = "drop_state"


@dataclass(kw_only=True)
class ForgetsAhead(Forgets):
    """Tells ahead when it changes, so that it is asked at those steps alone."""

    name: ClassVar[str] = "forgets_ahead"

    def next_change(self, run):
        return next((step for step in range(run.step + 1, STEPS) if (step in RESTS) != (run.step in RESTS)), None)


@dataclass(kw_only=True)
class ByState(Plugin):
    """The same by state, which changes at the end of a step."""

    name: ClassVar[str] = "by_state"
    on_freeze: ClassVar[Any] = "drop_state"

    frozen: bool = field(init=False, default=False)

    def may_train(self, run, param):
        return param.depth != 2 or not self.frozen

    def on_step_end(self, run):
        self.frozen = run.step in RESTS


def adamw8bit() -> Callable[..., Any]:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit


OPTIMIZERS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "AdamW": (lambda: torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "AdamW, fused": (lambda: torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1, "fused": True}),
    "SGD": (lambda: torch.optim.SGD, {"lr": 1e-1, "momentum": 0.9}),
    "AdamW, 8 bits": (adamw8bit, {"lr": 1e-2, "weight_decay": 0.1}),
}


def wide() -> nn.Module:
    """bitsandbytes keeps 8-bit state for tensors of 4,096 and more values: 64 × 64 here."""
    return tiny("bert", hidden_size=64, intermediate_size=128)


def by_hand(name: str, *, fresh: bool) -> dict[str, torch.Tensor]:
    """Block 2 has an optimizer of its own, which after each rest is a new one, or the old one again."""
    make, settings = OPTIMIZERS[name]
    model = wide().train()
    block = [tensor for own, tensor in model.named_parameters() if "layer.1." in own]
    rest = [tensor for own, tensor in model.named_parameters() if "layer.1." not in own]
    always, at_times = make()(rest, **settings), make()(block, **settings)
    data = rows()
    for step in range(STEPS):
        if fresh and step in RESTS:
            at_times = make()(block, **settings)
        for tensor in block:
            tensor.requires_grad_(step not in RESTS)
        start = 4 * step % len(data)
        model(**default_data_collator(data[start : start + 4])).loss.backward()
        always.step()
        if step not in RESTS:
            at_times.step()
        model.zero_grad()
    return weights(model)


def with_session(name: str, plugins: list[Plugin]) -> tuple[nn.Module, Any]:
    make, settings = OPTIMIZERS[name]
    model = get_model(wide(), ["full", *plugins])
    session = Session(model, Accelerator(cpu=True), max_steps=STEPS)
    optimizer = session.optimizer(make(), **settings)
    loader = session.loader(rows(), 4, collate_fn=default_data_collator, shuffle=False)
    for batch in session.batches(loader):
        with session.accelerator.accumulate(session.model):
            session.accelerator.backward(session.loss(batch))
            optimizer.step()
            optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("plugin", [Forgets(), ForgetsAhead(), ByState()], ids=lambda p: p.name)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_dropped_state_is_that_of_a_fresh_optimizer(name: str, plugin: Plugin) -> None:
    model, _ = with_session(name, [plugin])
    assert same(model, by_hand(name, fresh=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_by_default_the_state_stays(name: str) -> None:
    model, _ = with_session(name, [Blinks()])
    kept = by_hand(name, fresh=False)
    assert same(model, kept)
    assert not same(model, by_hand(name, fresh=True))


def test_one_that_drops_is_enough() -> None:
    model, _ = with_session("AdamW", [Blinks(), Forgets()])
    assert same(model, by_hand("AdamW", fresh=True))


class Held(Plugin):
    """Counts, in each step, the tensors of block 2 that have a state."""

    name = "held"

    def on_pre_optimizer_step(self, run):
        block = [run.model.get_parameter(param.name) for param in run.params if param.depth == 2]
        run.log(**{f"held_{run.step}": float(sum(bool(run.optimizer.state.get(tensor)) for tensor in block))})


def test_the_state_is_gone_as_soon_as_the_step_begins(tmp_path: Path) -> None:
    """Under a Trainer, whose optimizer is wrapped."""
    run = trainer(get_model(tiny("bert"), ["full", Forgets(), Held()]), tmp_path, max_steps=STEPS, optim="adamw_torch")
    run.train()
    logged: dict[str, float] = {}
    for line in run.state.log_history:
        logged |= line
    tensors = sum("layer.1." in name for name, _ in run.model.named_parameters())
    assert {step: logged[f"held_{step}"] for step in range(STEPS)} == {
        step: tensors if step in (1, 2, 8) else 0.0 for step in range(STEPS)
    }


@pytest.mark.parametrize("plugin", [ForgetsAhead(), ByState()], ids=lambda p: p.name)
def test_resumed_at_every_step_it_ends_bit_identical_optimizer_and_all(plugin: Plugin, tmp_path: Path) -> None:
    """A checkpoint of the step at which a rest begins still holds the state that the run has dropped by then."""

    def made(**saving: Any) -> Any:
        model = get_model(tiny("bert", hidden_dropout_prob=0.1), ["full", copy.deepcopy(plugin)])
        return trainer(model, tmp_path, max_steps=STEPS, seed=3, optim="adamw_torch", learning_rate=1e-2, **saving)

    whole = made(save_strategy="steps", save_steps=1)
    whole.train()
    end, state = weights(whole.model), whole.optimizer.state_dict()
    for step in range(2, STEPS - 1):  # from before the first rest to after the last
        again = made()
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert same(again.model, end), step
        held = again.optimizer.state_dict()["state"]
        assert held.keys() == state["state"].keys()
        assert all(torch.equal(value, state["state"][n][key]) for n, own in held.items() for key, value in own.items())


def test_an_optimizer_that_makes_its_states_once_is_refused() -> None:
    model = get_model(tiny("bert"), ["full", Forgets()])
    session = Session(model, Accelerator(cpu=True), max_steps=2)
    with pytest.raises(MethodError, match=r"'forgets'.*Adagrad makes all states at its start.*AdamW"):
        session.optimizer(torch.optim.Adagrad, lr=1e-2)


def test_an_optimizer_that_does_not_let_go_is_named() -> None:
    class Holds(torch.optim.AdamW):
        """Like one that puts the states of several together whenever it is asked."""

        @property
        def state(self):
            return {**self.__dict__["state"]}

        @state.setter
        def state(self, value):
            self.__dict__["state"] = value

        def step(self, closure=None):
            for group in self.param_groups:
                for tensor in group["params"]:
                    self.__dict__["state"][tensor] = {"step": torch.ones(())}
                    tensor.data.mul_(0.9)

    model = get_model(tiny("bert"), ["full", Forgets()])
    session = Session(model, Accelerator(cpu=True), max_steps=STEPS)
    optimizer = session.optimizer(Holds, lr=1e-2)
    with pytest.raises(MethodError, match=r"'forgets'.*Holds does not let go of that of 'bert\."):  # noqa: PT012
        for batch in session.batches(session.loader(rows(), 4, collate_fn=default_data_collator)):
            session.accelerator.backward(session.loss(batch))
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (
            {"on_freeze": "forget", "may_train": Blinks.may_train},
            r"on_freeze='forget'; expected 'keep' or 'drop_state'",
        ),
        ({"on_freeze": "drop_state"}, r"sets `on_freeze` but has no may_train"),
        ({"schedule": True}, r"sets `schedule` but has no lr_scale"),
    ],
)
def test_a_class_variable_that_means_nothing_is_refused(wrong: dict[str, Any], says: str) -> None:
    plugin = type("Wrong", (Plugin,), {"name": "wrong", **wrong})()
    with pytest.raises(PluginError, match=says):
        resolve(["full", plugin])
    with pytest.raises(PluginError, match=says):
        attach(get_model(tiny("bert"), "full"), [plugin])
