"""Plugins that break the contract or raise: named with distribution, hook and step, before training where it can be
known; the model is as after the last finished step, and a new run works.

Refused when the method is read, and tested in test_refusals and test_plugin: a plugin that does not import, is no
dataclass, speaks another version of the contract, has another's name, is named twice, has settings that cannot be
saved, or misspells a hook.
"""

from __future__ import annotations

import inspect
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig
from torch.utils.data import SequentialSampler
from transformers import default_data_collator

import peft_plus
from peft_plus import LossTerm, MethodError, Plugin, PluginError, Session, Stage
from peft_plus.find_checkpoint import newest_whole

from .bad_inputs import Watched, after, built, free, holds, refused, rows, same, stopped, trainer, weights
from .models import tiny
from .test_refusals import Install, install  # noqa: F401

HERE = re.escape(__name__)


@dataclass(kw_only=True)
class Steady(Plugin):
    """Uses every hook of a run, and changes little."""

    name: ClassVar[str] = "steady"

    seen: int = field(init=False, default=0)

    def sampler(self, run, dataset):
        return SequentialSampler(dataset)

    def may_train(self, run, param):
        return run.step >= 1 or "layer.0." not in param.name

    def next_change(self, run):
        return run.step + 1

    def lr_scale(self, run, param):
        return 0.5

    def lr_key(self, param):
        return (param.depth,)

    def loss_terms(self, run, batch, output):
        return {"small": LossTerm(output.logits.square().sum() * 1e-2, 1, per="step")}

    def on_step_end(self, run):
        self.seen = run.step


def raising(hook: str, step: int, *, foreseen: bool = False) -> Plugin:
    """A `Steady` whose `hook` raises once `step` steps are finished; with `foreseen`, also where it is asked ahead."""

    def broken(self: Any, *args: Any) -> Any:
        run = next((a for a in args if isinstance(a, peft_plus.Run)), None)
        ahead = hook in ("may_train", "next_change") and not foreseen
        if (self.seen if run is None or ahead else run.step) >= step:
            raise ZeroDivisionError("no luck")
        return getattr(Steady, hook)(self, *args)

    expected = vars(Steady).get(hook) or getattr(Plugin, hook)
    broken.__signature__ = inspect.signature(expected)  # type: ignore[attr-defined]
    return dataclass(kw_only=True)(type("Broken", (Steady,), {hook: broken, "__module__": __name__}))()


# ---- raises in a hook --------------------------------------------------------------------------------------------

HOOKS: dict[str, tuple[int, int, str]] = {
    # hook: raises when so many steps are finished, how many updates were made, where
    "may_train": (3, 3, "at step 3"),
    "next_change": (3, 3, "at step 3"),
    "lr_scale": (3, 3, "at step 3"),
    "loss_terms": (3, 3, "at step 3"),
    "on_pre_optimizer_step": (3, 3, "at step 3"),
    "on_step_end": (4, 4, "at step 4"),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_raises_in_the_middle(hook: str, tmp_path: Path) -> None:
    step, updates, where = HOOKS[hook]
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    expected = after(updates, built(["lora", Steady()]), tmp_path, optim="adamw_torch")
    model = built(["lora", raising(hook, step)])
    run = trainer(model, tmp_path, **settings)
    refused(
        run.train,
        PluginError,
        rf"plugin 'steady' \({HERE}\) failed in {hook} {where}: ZeroDivisionError: no luck",
        f"after {updates} finished steps",
    )
    assert same(model, expected)
    assert holds(stopped(tmp_path), expected)
    assert free(model)
    assert not model._forward_hooks
    rates = {group["lr"] for group in run.optimizer.param_groups}
    assert len(rates) == 1  # no plugin's factor stayed in a group
    kept = newest_whole(tmp_path, processes=1, own_layout=False)
    assert kept is not None
    assert kept.folder.name == "checkpoint-2"
    # A new run of the same model, without the plugin, works from where it stands.
    peft_plus.attach(model, [])
    trainer(model, tmp_path / "again", max_steps=2).train()
    assert not same(model, expected)


@pytest.mark.parametrize("hook", ["sampler", "ever_trains", "state_dict", "lr_key", "may_train", "lr_scale"])
def test_a_hook_raises_before_the_first_pass_or_update(hook: str, tmp_path: Path) -> None:
    model = built(["lora", raising(hook, 0)])
    before, watch = weights(model), Watched(model)
    refused(trainer(model, tmp_path).train, PluginError, rf"plugin 'steady' \({HERE}\) failed in {hook}", "no luck")
    assert watch.passes == (hook == "lr_scale")
    assert same(model, before)
    assert free(model)


@pytest.mark.parametrize("hook", ["may_train", "next_change"])
def test_what_raises_when_asked_ahead_raises_before_the_first_pass(hook: str, tmp_path: Path) -> None:
    model = built(["lora", raising(hook, 3, foreseen=True)])
    before, watch = weights(model), Watched(model)
    refused(trainer(model, tmp_path).train, PluginError, rf"failed in {hook} at step 3: ZeroDivisionError: no luck")
    assert not watch.passes
    assert same(model, before)
    assert free(model)


def test_plan_stages_raises_before_the_weights_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("bert").save_pretrained(tmp_path / "base")

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(peft_plus.loading, "load", never)

    class Planner(Plugin):
        name = "planner"

        def plan_stages(self, stages):
            raise KeyError("probe")

    def call() -> Any:
        return peft_plus.get_model(str(tmp_path / "base"), ["lora", Planner()], task="SEQ_CLS", num_labels=2)

    refused(call, PluginError, rf"plugin 'planner' \({HERE}\) failed in plan_stages: KeyError: 'probe'")


@pytest.mark.parametrize("hook", ["may_train", "lr_scale", "loss_terms", "on_step_end"])
def test_a_session_names_them_too(hook: str) -> None:
    def run(method: Any, steps: int) -> Any:
        model = built(method)
        session = Session(model, Accelerator(cpu=True), max_steps=steps)
        optimizer = session.optimizer(torch.optim.SGD, lr=0.1)
        loader = session.loader(rows(), 4, collate_fn=default_data_collator)

        def go() -> None:
            for batch in session.batches(loader):
                with session.accelerator.accumulate(session.model):
                    session.accelerator.backward(session.loss(batch))
                    optimizer.step()
                    optimizer.zero_grad()

        return model, go

    step, updates, where = HOOKS[hook]
    good, go = run(["lora", Steady()], updates)
    go()
    model, go = run(["lora", raising(hook, step)], 6)
    refused(go, PluginError, rf"plugin 'steady' \({HERE}\) failed in {hook} {where}: ZeroDivisionError: no luck")
    assert same(model, weights(good))
    peft_plus.attach(model, [])
    for tensor in model.parameters():  # the pass that broke off left some
        tensor.grad = None
    assert free(model)


# ---- answers that are none ---------------------------------------------------------------------------------------


def answering(hook: str, answer: Any) -> Plugin:
    def answers(self: Any, *args: Any) -> Any:
        return answer

    answers.__signature__ = inspect.signature(getattr(Plugin, hook))  # type: ignore[attr-defined]
    return dataclass(kw_only=True)(type("Odd", (Steady,), {hook: answers, "__module__": __name__, "name": "odd"}))()


ANSWERS: list[tuple[str, Any, tuple[str, ...]]] = [
    ("may_train", 1, ("may_train returned 1 for .* at step 0", "a bool")),
    ("may_train", None, ("may_train returned None", "a bool")),
    ("next_change", 0, ("next_change answered 0 at step 0", "a later step")),
    ("next_change", 1.5, ("next_change answered 1.5", "a later step")),
    ("next_change", "never", ("next_change answered 'never'", "None for never")),
    ("next_change", True, ("next_change answered True", "a later step")),
    ("state_dict", None, ("state_dict returned None", "mapping")),
    ("state_dict", {"lock": threading.Lock()}, ("could not be saved", "lock", "without pickle")),
    ("sampler", [0, 1, 2], (r"sampler returned \[0, 1, 2\]", "torch.utils.data.Sampler")),
]


@pytest.mark.parametrize(("hook", "answer", "says"), ANSWERS)
def test_an_answer_of_another_type(hook: str, answer: Any, says: tuple[str, ...], tmp_path: Path) -> None:
    """Before the first pass. What `loss_terms` may answer is in test_bad_numbers."""
    model = built(["lora", answering(hook, answer)])
    before, watch = weights(model), Watched(model)
    refused(trainer(model, tmp_path).train, PluginError, rf"plugin 'odd' \({HERE}\)", *says)
    assert watch.passes == 0
    assert same(model, before)
    assert free(model)


@pytest.mark.parametrize("answer", [float("nan"), float("inf"), -0.5, "0.5", None])
def test_a_rate_that_is_none(answer: Any, tmp_path: Path) -> None:
    """Asked at the first update: nothing was changed by then."""
    model = built(["lora", answering("lr_scale", answer)])
    before = weights(model)
    run = trainer(model, tmp_path)
    says = (rf"plugin 'odd' \({HERE}\): lr_scale returned {answer!r} for .* at step 0", "a number ≥ 0")
    refused(run.train, PluginError, *says)
    assert same(model, before)
    assert {group["lr"] for group in run.optimizer.param_groups} == {0.1}


STAGES: list[tuple[Any, tuple[str, ...]]] = [
    (None, ("returned None from plan_stages", "a list of Stages")),
    ([], (r"returned \[\] from plan_stages", "at least one")),
    ("two", ("returned 'two' from plan_stages",)),
    ([Stage(), "tune"], ("'tune'", "a list of Stages")),
    ([Stage(name="a"), Stage(name="a")], (r"Two stages of the plan have one name: \['a', 'a'\]",)),
    ([Stage(train="body")], ("planned the stage 'train' with train='body'", "'all' or 'head'")),  # type: ignore[arg-type]
    ([Stage(args=["lr"])], (r"with args=\['lr'\]", "mapping of TrainingArguments")),  # type: ignore[arg-type]
    ([Stage(plugins=("llrd",))], (r"with plugins=\['llrd'\], which this method does not name", r"\['planner'\]")),
]


@pytest.mark.parametrize(("answer", "says"), STAGES)
def test_stages_that_are_none(answer: Any, says: tuple[str, ...]) -> None:
    class Planner(Plugin):
        name = "planner"

        def plan_stages(self, stages):
            return answer

    base = tiny("bert")
    refused(lambda: peft_plus.get_model(base, ["lora", Planner()]), PluginError, *says)
    assert not hasattr(base, "peft_config")


def planning(**settings: Any) -> Plugin:
    class Planner(Plugin):
        name = "planner"

        def plan_stages(self, stages):
            return [Stage(name="first"), Stage(name="second", args=settings)]

    return Planner()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"learning_rat": 0.1}, ("stage 'second' sets 'learning_rat'", "Did you mean 'learning_rate'?")),
        ({"learning_rate": -1.0}, ("learning_rate=-1.0", "> 0")),
        ({"max_steps": 0}, ("max_steps=0", "≥ 1")),
    ],
)
def test_the_second_stages_arguments_are_checked_before_the_first_trains(
    settings: dict[str, Any], says: tuple[str, ...], tmp_path: Path
) -> None:
    model = built(["lora", planning(**settings)])
    before, args = weights(model), trainer(built(), tmp_path).args
    refused(lambda: peft_plus.fit(model, args, train_dataset=rows()), MethodError, *says)
    assert same(model, before)


def test_a_stages_arguments_are_not_ignored(tmp_path: Path) -> None:
    class Planner(Plugin):
        name = "planner"

        def plan_stages(self, stages):
            return [Stage(args={"max_steps": 1})]

    made = trainer(built(["lora", Planner()]), tmp_path)
    made.train()
    assert made.state.global_step == 1
    bare = peft_plus.Trainer(built(["lora", Planner()]), train_dataset=rows(), data_collator=default_data_collator)
    refused(bare.train, MethodError, "The method sets max_steps", r"Trainer\(model, args")


class OutOfRange(SequentialSampler):
    def __iter__(self) -> Any:
        return iter(range(len(self.data_source) - 2, len(self.data_source) + 10))


def test_an_order_that_asks_for_rows_that_are_not_there(tmp_path: Path) -> None:
    class Order(Plugin):
        name = "order"

        def sampler(self, run, dataset):
            return OutOfRange(dataset)

    model = built(["lora", Order()])
    watch = Watched(model)
    says = (r"train_dataset\[24\] was asked for, and it has 24 rows", "the plugin that sets the order")
    refused(trainer(model, tmp_path).train, peft_plus.DataError, *says)
    assert watch.passes == 0


# ---- at build ----------------------------------------------------------------------------------------------------


def test_state_that_cannot_be_copied() -> None:
    @dataclass(kw_only=True)
    class Locked(Plugin):
        name: ClassVar[str] = "locked"
        lock: Any = field(init=False, default_factory=threading.Lock)

    base = tiny("bert")
    refused(
        lambda: peft_plus.get_model(base, ["lora", Locked()]),
        PluginError,
        rf"plugin 'locked' \({HERE}\) cannot be copied: TypeError",
        "keep plain values",
    )
    assert not hasattr(base, "peft_config")


IMPORTS = {
    "a syntax error": ("def broken(:\n", "SyntaxError"),
    "a missing dependency": (
        "import not_installed_anywhere\n",
        "ModuleNotFoundError: No module named 'not_installed_any",
    ),
    "a name that peft_plus does not have": ("from peft_plus import Plugins\n", "ImportError|AttributeError"),
    "an exit": ("raise SystemError('no licence')\n", "SystemError: no licence"),
    "a misspelt hook": (
        "from peft_plus import Plugin\nclass Thing(Plugin):\n    name='thing'\n    def may_trian(self, run): ...\n",
        "may_trian is neither a hook nor private.*Did you mean 'may_train'",
    ),
    "a hook with other parameters": (
        "from peft_plus import Plugin\nclass Thing(Plugin):\n    name='thing'\n    def may_train(self, run): ...\n",
        r"the hook's parameters are \(self, run, param\)",
    ),
}


@pytest.mark.parametrize("case", IMPORTS)
def test_a_plugin_that_does_not_import(case: str, install: Install) -> None:  # noqa: F811
    code, says = IMPORTS[case]
    module = "broken_" + re.sub(r"\W", "_", case)
    install(f"peft-plus-{module.replace('_', '-')}", "thing", module, code)
    base = tiny("bert")
    refused(
        lambda: peft_plus.get_model(base, [LoraConfig(task_type="SEQ_CLS"), "thing"]),
        PluginError,
        f"The plugin 'thing' of peft-plus-{module.replace('_', '-')} 1.2 does not import",
        says,
        "pip install -U",
    )
    assert not hasattr(base, "peft_config")


def test_a_plan_that_was_deleted_after_the_trainer_was_built(tmp_path: Path) -> None:
    model = built(["lora", "llrd"])
    run = trainer(model, tmp_path)
    del model.peft_plus
    before = weights(model)
    refused(run.train, MethodError, "model.peft_plus is gone", "attach")
    assert same(model, before)
    trainer(model, tmp_path, max_steps=1).train()  # a Trainer built after it trains the model as plain PEFT would
    model.save_pretrained(tmp_path / "saved")


def test_attached_twice_the_second_plan_counts(tmp_path: Path) -> None:
    model = built(["lora", "llrd"])
    peft_plus.attach(model, "gradual_unfreeze")
    assert [plugin.name for plugin in model.peft_plus.plugins] == ["gradual_unfreeze"]
    trainer(model, tmp_path, max_steps=2).train()
    assert {row.group[0] for row in model.peft_plus.engagement["train"] if row.steps} == {4}
