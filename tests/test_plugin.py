"""The contract: what is refused when a plugin is written, and what a run tells one."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from peft_plus import LossTerm, MethodError, Param, Plugin, PluginError, Run, Stage, get_model
from peft_plus.plugin import API, HOOKS

from .models import tiny

# ---- written wrongly ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("may_trian", "may_train"),
        ("lr_scales", "lr_scale"),
        ("loss_term", "loss_terms"),
        ("plan_stage", "plan_stages"),
        ("next_changes", "next_change"),
        ("May_Train", "may_train"),
    ],
)
def test_a_misspelt_hook_is_an_error_when_the_class_is_made(written, meant):
    with pytest.raises(TypeError, match=rf"Typo\.{written}.*Did you mean '{meant}'\?"):
        type("Typo", (Plugin,), {written: lambda self, run, param: True})


@pytest.mark.parametrize("wrap", [staticmethod, classmethod, lambda f: f], ids=["static", "class", "plain"])
def test_a_public_helper_is_an_error_of_whatever_kind(wrap):
    with pytest.raises(TypeError, match=r"compute.*neither a hook nor private"):
        type("Helpful", (Plugin,), {"compute": wrap(lambda self: None)})


@pytest.mark.parametrize(
    ("hook", "function"),
    [
        ("may_train", lambda self, param, run: True),
        ("may_train", lambda self, run: True),
        ("may_train", lambda self, run, param, extra: True),
        ("may_train", lambda self, run, parameter: True),
        ("lr_scale", lambda self, *args: 1.0),
        ("loss_terms", lambda self, run, batch: {}),
        ("plan_stages", lambda self: ()),
    ],
)
def test_a_hook_with_other_parameters_is_an_error(hook, function):
    with pytest.raises(TypeError, match=rf"{hook}\(.*the hook's parameters are \(self, "):
        type("Odd", (Plugin,), {hook: function})


@pytest.mark.parametrize("name", ["hooks", "settings"])
def test_the_contracts_own_methods_cannot_be_replaced(name):
    with pytest.raises(TypeError, match=f"`{name}` belongs to the contract"):
        type("Greedy", (Plugin,), {name: lambda self: ()})


def test_what_a_plugin_may_have():
    @dataclass(kw_only=True)
    class Fine(Plugin):
        name: ClassVar[str] = "fine"
        table: ClassVar[Mapping[str, int]] = {"a": 1}
        rate: float = 1.0
        seen: int = field(init=False, default=0)

        def __post_init__(self) -> None:
            self.seen = 1

        @property
        def double(self) -> float:
            return 2 * self.rate

        def _helper(self) -> float:
            return self.double

        def lr_scale(self, run: Run, param: Param) -> float:
            return self._helper()

    plugin = Fine(rate=3.0)
    assert plugin.hooks() == ("lr_scale",)
    assert plugin.settings() == {"rate": 3.0}  # without the state
    assert plugin.lr_scale(None, None) == 6.0
    with pytest.raises(TypeError):
        Fine(seen=5)
    with pytest.raises(TypeError):
        Fine(3.0)


def test_hooks_are_inherited_and_no_hook_is_asked_that_nobody_wrote():
    class Upper(Plugin):
        def may_train(self, run, param):
            return False

    class Lower(Upper):
        def next_change(self, run):
            return None

    assert Plugin.hooks() == ()
    assert Upper.hooks() == ("may_train",)
    assert Lower.hooks() == ("may_train", "next_change")


def test_every_hook_is_documented():
    assert set(HOOKS) == {n for n, v in vars(Plugin).items() if callable(v) and not n.startswith("_")} - {
        "hooks",
        "settings",
    }
    assert all((getattr(Plugin, hook).__doc__ or "").strip() for hook in HOOKS)


# ---- named in a method -------------------------------------------------------------------------------------------


def made(**attributes: Any) -> type[Plugin]:
    return dataclass(kw_only=True)(type("Made", (Plugin,), {"name": "made", "__annotations__": {}, **attributes}))


def test_settings_without_the_decorator_are_refused():
    class Bare(Plugin):
        name: ClassVar[str] = "bare"
        rate: float = 1.0

    with pytest.raises(PluginError, match=r"Bare annotates settings but is no dataclass.*@dataclass\(kw_only=True\)"):
        get_model(tiny("bert"), ["lora", Bare()])


@pytest.mark.parametrize("api", [0, API + 1, "1"])
def test_another_version_of_the_contract_is_refused(api):
    with pytest.raises(PluginError, match=rf"version {api} of the plugin contract.*version {API}"):
        get_model(tiny("bert"), ["lora", made(api=api)()])


def test_a_plugin_without_a_name_is_refused():
    with pytest.raises(PluginError, match="has no `name`"):
        get_model(tiny("bert"), ["lora", made(name="")()])


def test_a_class_instead_of_an_object_is_refused():
    with pytest.raises(MethodError, match=r"Made is a class.*Made\(\)"):
        get_model(tiny("bert"), ["lora", made()])


def test_an_unknown_need_is_refused():
    with pytest.raises(PluginError, match="'wings'"):
        get_model(tiny("bert"), ["lora", made(needs=("wings",))()])


def test_settings_that_json_cannot_hold_are_refused():
    @dataclass(kw_only=True)
    class Heavy(Plugin):
        name: ClassVar[str] = "heavy"
        weight: Any = None

    with pytest.raises(MethodError, match=r"heavy.*plain values"):
        get_model(tiny("bert"), ["lora", Heavy(weight=torch.zeros(2))])


def test_the_model_gets_a_copy_and_the_users_object_stays():
    @dataclass(kw_only=True)
    class Stateful(Plugin):
        name: ClassVar[str] = "stateful"
        rates: list = field(default_factory=lambda: [1])
        count: int = field(init=False, default=0)

    mine = Stateful()
    first, second = (get_model(tiny("bert"), ["lora", mine]).peft_plus.plugins[0] for _ in range(2))
    first.count = 7
    first.rates.append(2)
    assert (mine.count, second.count, mine.rates, second.rates) == (0, 0, [1], [1])


# ---- what a run tells --------------------------------------------------------------------------------------------


def run_at(step: int = 0, **settings: Any) -> Run:
    return Run(model=nn.Identity(), task=None, num_blocks=3, step=step, **settings)  # type: ignore[arg-type]


def numbers(generator: torch.Generator) -> list[float]:
    return torch.rand(16, generator=generator).tolist()


def test_equal_keys_give_equal_streams():
    assert numbers(run_at(3, seed=1).generator("a", 2)) == numbers(run_at(3, seed=1).generator("a", 2))


DIFFERENT: list[Callable[[], torch.Generator]] = [
    lambda: run_at().generator("a", 0),
    lambda: run_at().generator("a", 1),
    lambda: run_at().generator("b", 0),
    lambda: run_at().generator("a"),
    lambda: run_at().generator("a0"),
    lambda: run_at().generator("a", 0, 0),
    lambda: run_at(1).generator("a", 0),
    lambda: run_at(seed=1).generator("a", 0),
    lambda: run_at(stage=Stage(name="probe")).generator("a", 0),
    lambda: run_at(stage=Stage(name="train")).generator("a", 0),
    # Keys that read the same when they are only joined:
    lambda: run_at().generator("x", 11, 1),
    lambda: run_at().generator("x", 1, 11),
    lambda: run_at(seed=1, step=11).generator(),
    lambda: run_at(seed=11, step=1).generator(),
    lambda: run_at(seed=111).generator(),
]


def test_any_other_key_step_stage_or_seed_gives_another_stream():
    streams = [tuple(numbers(make())) for make in DIFFERENT]
    assert len(set(streams)) == len(streams)


def test_the_streams_are_independent_of_each_other_and_of_the_global_one():
    state = torch.random.get_rng_state()
    drawn = torch.stack([torch.rand(1000, generator=run_at().generator("a", i)) for i in range(20)])
    assert torch.equal(state, torch.random.get_rng_state())
    correlations = torch.corrcoef(drawn) - torch.eye(20)
    assert correlations.abs().max() < 0.15
    assert abs(float(drawn.mean()) - 0.5) < 0.01


def test_a_stream_is_the_same_in_another_process():
    """Nothing of it hangs on Python's own hash, which differs in each."""
    code = (
        "import torch; from torch import nn; from peft_plus import Run, Stage;"
        "run = Run(model=nn.Identity(), task=None, num_blocks=3, step=4, seed=9, stage=Stage(name='s'));"
        "print(torch.rand(4, generator=run.generator('k', 2)).tolist())"
    )
    here = torch.rand(4, generator=run_at(4, seed=9, stage=Stage(name="s")).generator("k", 2)).tolist()
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert there.strip().splitlines()[-1] == str(here)


@pytest.mark.parametrize(
    ("step", "per_epoch", "epoch"), [(0, 3, 0), (2, 3, 0), (3, 3, 1), (5, 3, 1), (6, 3, 2), (7, 1, 7), (9, 0, 0)]
)
def test_the_epoch_follows_from_the_step(step, per_epoch, epoch):
    assert run_at(step, steps_per_epoch=per_epoch).epoch == epoch


def test_what_is_logged_waits_for_the_next_line():
    run = run_at()
    run.log(a=1.0, b=2.0)
    run.log(a=3.0)
    assert run.logged == {"a": 3.0, "b": 2.0}
    assert run_at().logged == {}


def test_params_and_terms_are_values():
    param = Param("w", (2,), 1, "base")
    assert {param, Param("w", (2,), 1, "base")} == {param}
    with pytest.raises(dataclasses.FrozenInstanceError):
        param.depth = 2  # type: ignore[misc]
    term = LossTerm(torch.zeros(()), 1)
    assert term.per == "label"


@pytest.mark.parametrize("wrong", ["0.9", None, True])
def test_types_are_checked_before_the_class_compares_values(wrong):
    @dataclass(kw_only=True)
    class Compares(Plugin):
        name: ClassVar[str] = "compares"
        decay: float = 0.5

        def __post_init__(self) -> None:
            if self.decay < 0:
                raise ValueError("negative")

    with pytest.raises(MethodError, match=r"plugin 'compares': decay=.* expected float"):
        Compares(decay=wrong)
    with pytest.raises(ValueError, match="negative"):
        Compares(decay=-1.0)
