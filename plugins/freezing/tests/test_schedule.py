"""A written schedule trains as the plugin it was asked of, bit for bit; the command prints it ready for use."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from torch import nn
from typer.testing import CliRunner

from peft_plus import MethodError, Param, PluginError, Run, attach, freezing_schedule, get_model
from peft_plus.build import outline
from peft_plus.cli import app
from peft_plus.schedule import as_yaml, words
from peft_plus_freezing.freeze_plan import FreezePlan
from peft_plus_freezing.freezeout import FreezeOut
from tests.evaluated_loop import EvaluatedLoop, changed, weights
from tests.models import tiny


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@dataclass(kw_only=True)
class RatesAlone(FreezeOut):
    """FreezeOut's rates without its freezing."""

    name: ClassVar[str] = "rates_alone"

    def may_train(self, run: Run, param: Param) -> bool:
        return True

    def next_change(self, run: Run) -> int | None:
        return None


def built(tuner: str, *plugins: Any) -> Any:
    torch.manual_seed(0)  # of the adapters
    return attach(get_model(tiny("bert"), tuner), list(plugins) if len(plugins) > 1 else plugins[0])


@pytest.mark.parametrize("tuner", ["full", "lora"])
@pytest.mark.parametrize(
    "method",
    [
        {"gradual_unfreeze": {"every": 2}},
        {"gradual_unfreeze": {"direction": "bottom_up", "keep": "newest"}},
        {"gradual_unfreeze": {"at": [0.2, 0.5], "blocks": 2}},
        {"lisa": {"layers": 1, "period_steps": 2}},
        {"chain_thaw": {"steps": 2}},
        {"freeze": {"blocks": 1}, "gradual_unfreeze": {"every": 3}},
        {"freeze": {"all_but": ["re:bias$|lora_B", "head"]}},
        {"freeze_plan": {"phases": [{"train": ["head", "attention"], "steps": 3}, {"train": "blocks 1-2"}]}},
        {"freeze_plan": {"phases": [{"train": "head", "steps": 3}, {"train": "head", "lr_scale": 0.5}]}},
        {"llrd": {}},
    ],
    ids=str,
)
def test_a_plan_with_the_written_phases_trains_to_the_same_bits(method: dict[str, Any], tuner: str) -> None:
    original = built(tuner, method)
    phases = freezing_schedule(original, max_steps=12, steps_per_epoch=4, seed=0)
    assert json.loads(json.dumps(phases)) == phases
    rates = {name: settings for name, settings in method.items() if name == "llrd"}
    planned = built(tuner, {"freeze_plan": {"phases": phases}, **rates})
    first, second = (EvaluatedLoop(model, steps=12).run() for model in (original, planned))
    assert not changed(weights(original), weights(planned))
    assert first.moved == second.moved
    assert first.held() == second.held()
    assert [c.groups for c in original.peft_plus.timeline] == [c.groups for c in planned.peft_plus.timeline]


def test_the_freezing_of_freezeout(caplog: pytest.LogCaptureFixture) -> None:
    original = built("full", {"freezeout": {"t0": 0.5}})
    phases = freezing_schedule(original, max_steps=12, steps_per_epoch=4, seed=0)
    assert caplog.messages == ["freezeout sets rates that no phase can hold; what is written leaves them out."]
    assert len(phases) == 5
    planned = built("full", RatesAlone(t0=0.5), FreezePlan(phases=phases))
    for model in (original, planned):
        EvaluatedLoop(model, steps=12).run()
    assert not changed(weights(original), weights(planned))


def test_it_reads_as_people_write() -> None:
    model = built("full", {"gradual_unfreeze": {"every": 2}})
    assert freezing_schedule(model, max_steps=100) == [
        {"train": ["head"], "steps": 2},
        {"train": ["block 3", "head"], "steps": 2},
        {"train": ["blocks 2-3", "head"], "steps": 2},
        {"train": ["blocks 1-3", "head"], "steps": 2},
        {"train": ["all"]},
    ]
    assert all(tensor.requires_grad for tensor in model.parameters()), "nothing was changed"


def test_draws_depend_on_the_runs_seed() -> None:
    model = built("full", {"lisa": {"layers": 1, "period_steps": 1}})
    written = [freezing_schedule(model, max_steps=30, seed=seed) for seed in (0, 0, 1)]
    assert written[0] == written[1] != written[2]


def param(name: str, depth: int) -> Param:
    return Param(name, (2,), depth, "base")


def test_names_stand_where_only_part_of_a_place_trains() -> None:
    params = [param("a.x", 1), param("a.y", 1), param("b.x", 2), param("c.b.x", 3), param("z", 4)]
    assert words({"a.x", "c.b.x"}, params, 3) == ["block 3", "a.x"]
    assert words({"a.x", "a.y", "b.x", "z"}, params, 3) == ["blocks 1-2", "head"]
    params.append(param("b.y", 2))
    assert words({"b.x"}, params, 3) == ["re:^b\\.x$"]  # `b.x` would mean `c.b.x` too
    params.append(param("y", 4))
    assert words({"y"}, params, 3) == ["re:^y$"]


def test_what_the_run_decides_cannot_be_written() -> None:
    for method in ({"gradual_unfreeze": {"every": "stall"}}, {"chain_thaw": {}}):
        (name,) = method
        with pytest.raises(
            MethodError, match=rf"plugin '{name}' \(peft-plus-freezing .* decides by what the run brings"
        ):
            freezing_schedule(built("full", method), max_steps=10)
    phases = [{"train": "head", "steps": 3}, {"train": "blocks", "patience": 1}, {"train": "all"}]
    with pytest.raises(MethodError, match=r"'freeze_plan' .* what trains after step 3"):
        freezing_schedule(built("full", {"freeze_plan": {"phases": phases}}), max_steps=10)


def test_what_cannot_be_asked_says_why() -> None:
    with pytest.raises(MethodError, match=r"has no plan\. Make it with get_model"):
        freezing_schedule(nn.Linear(2, 2), max_steps=10)
    with pytest.raises(MethodError, match="max_steps=0"):
        freezing_schedule(built("full", {"llrd": {}}), max_steps=0)
    with pytest.raises(PluginError, match="give every=<optimizer steps>"):
        freezing_schedule(built("full", {"gradual_unfreeze": {}}), max_steps=10)
    phases = [{"train": "head", "steps": 3}, {"train": "block 1"}]
    both = {"freeze_plan": {"phases": phases}, "gradual_unfreeze": {"every": 100}}
    with pytest.raises(MethodError, match="Nothing trains from step 3 on"):
        freezing_schedule(built("full", both), max_steps=10)
    staged = get_model(tiny("bert"), ["lora", "lp_ft", "llrd"])
    with pytest.raises(MethodError, match=r"has the stages 'probe', 'train'\. Say which: stage='train'"):
        freezing_schedule(staged, max_steps=10)
    with pytest.raises(MethodError, match="has the stages 'probe', 'train', and stage='head' names none of them"):
        freezing_schedule(staged, max_steps=10, stage="head")
    assert freezing_schedule(staged, max_steps=10, stage="probe") == [{"train": ["head"]}]


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(name="folder", scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny("bert").save_pretrained(folder)
    (folder / "model.safetensors").unlink()  # no weights are needed
    return folder


def run(*arguments: Any) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["schedule", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def options(folder: Path) -> list[Any]:
    return ["--model", folder, "--task", "SEQ_CLS", "--steps", 300, "--steps-per-epoch", 100]


def test_the_command_prints_a_method_that_is_ready(folder: Path) -> None:
    code, out, _ = run("gradual_unfreeze", "every=50", "--tuner", "lora", *options(folder))
    assert code == 0
    assert out == (
        "freeze_plan:\n"
        "  phases:\n"
        "    - train: [head]\n"
        "      steps: 50\n"
        "    - train: [block 3, head]\n"
        "      steps: 50\n"
        "    - train: [blocks 2-3, head]\n"
        "      steps: 50\n"
        "    - train: [all]\n"
    )
    model = get_model(tiny("bert"), {"lora": {}, **yaml.safe_load(out)})
    assert freezing_schedule(model, max_steps=300) == yaml.safe_load(out)["freeze_plan"]["phases"]


@pytest.mark.parametrize(
    "method",
    [
        ["lisa", "layers=1", "--seed", 7],
        ["freezeout", "t0=0.5"],
        ["gradual_unfreeze", "keep=newest", "at=[0.2, 0.5]"],
        ["freeze", 'patterns=["*.bias", "re:layer[.]1"]', "embeddings=true", "gradual_unfreeze", "--tuner", "full"],
        ["ia3", "gradual_unfreeze"],
    ],
    ids=str,
)
def test_yaml_and_json_say_what_the_function_says(method: list[Any], folder: Path) -> None:
    code, out, _ = run(*method, *options(folder))
    also, text, _ = run(*method, *options(folder), "--json")
    assert code == also == 0
    assert yaml.safe_load(out) == json.loads(text)


def test_any_phases_survive_the_yaml() -> None:
    phases = [
        {"train": ["all", "block -1", "re:^a\\.\"b' #: x$", "layer.[0-1].*", "bert.pooler.dense.bias"], "steps": 3},
        {"train": ["blocks 1-2"], "patience": 2, "restore_best": True, "lr_scale": 0.1, "metric": "null"},
    ]
    assert yaml.safe_load(as_yaml(phases)) == {"freeze_plan": {"phases": phases}}


def test_an_outline_has_the_plan_of_the_model_without_its_weights(folder: Path) -> None:
    for tuner in ("full", "lora"):
        made: Any = outline(str(folder), {tuner: {}, "llrd": {}}, task="SEQ_CLS")
        real = get_model(tiny("bert"), [tuner, "llrd"]).peft_plus
        assert made.peft_plus.params == real.params
        assert made.peft_plus.layers == real.layers
        assert all(tensor.is_meta for tensor in made.parameters())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["gradual_unfreez"], 2, "Did you mean 'gradual_unfreeze'?"),
        (["every=3", "gradual_unfreeze"], 2, "'every=3' is a setting, but of what?"),
        (["gradual_unfreeze", "every=3", "every=4"], 2, "'every' of 'gradual_unfreeze' is given twice"),
        (["lisa", "lisa"], 2, "'lisa' is named twice"),
        (["gradual_unfreeze", "evry=3"], 2, "Did you mean 'every'?"),
        (["gradual_unfreeze", "every=stall"], 2, "decides by what the run brings"),
        (["gradual_unfreeze", "blocks=9"], 2, "blocks=9, but this model trains at 5 depths"),
        (["lora", "gradual_unfreeze", "--tuner", "ia3"], 2, "at most one tuner"),
        (["lora", "init_lora_weights=pissa", "gradual_unfreeze"], 2, "cannot be built without weights"),
        (["gradual_unfreeze", "--steps-per-epoch", 0], 1, "needs data with a length"),
        (["gradual_unfreeze", "--model", "/no/such/folder"], 2, "The folder '/no/such/folder' does not exist"),
        (["gradual_unfreeze", "--task", "SEQ_CL"], 2, "Did you mean 'SEQ_CLS'?"),
        (["gradual_unfreeze", "--steps", 0], 2, "max_steps=0"),
    ],
    ids=str,
)
def test_bad_arguments_are_explained(arguments: list[Any], code: int, message: str, folder: Path) -> None:
    got, out, err = run(*options(folder), *arguments)
    assert (got, out) == (code, "")
    assert message in err
