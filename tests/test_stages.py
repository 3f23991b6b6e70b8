"""`fit` goes on where it was interrupted, in whichever stage, and ends as if nothing had happened."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import TrainerCallback

import peft_plus
from peft_plus import CheckpointError, MethodError, Plugin, Run, get_model, registry

from .models import batch, tiny
from .training import quiet

ROWS = 12
PROBE_STEPS, STEPS = 4, 6  # an epoch has 3
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


class Broken(Exception):
    """What interrupts a run."""


@dataclass
class BreakAt(TrainerCallback):
    """Breaks a run off after a step of a stage, once what was due there is saved."""

    stage: str
    step: int

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if Path(args.output_dir).name == self.stage and state.global_step == self.step:
            raise Broken


@dataclass(kw_only=True)
class Falling(Plugin):
    """The rate falls with each step of either stage: state that one stage hands to the next."""

    name: ClassVar[str] = "falling"

    left: float = field(init=False, default=1.0)

    def lr_scale(self, run: Run, param: Any) -> float:
        return self.left

    def on_step_end(self, run: Run) -> None:
        self.left *= 0.9


def built() -> Any:
    torch.manual_seed(0)
    lp_ft = registry.load(registry.entries("plugin")["lp_ft"])
    unfreeze = registry.load(registry.entries("plugin")["gradual_unfreeze"])
    lora = LoraConfig(task_type="SEQ_CLS", lora_dropout=0.1)
    return get_model(tiny("bert", **DROPOUT), [lora, lp_ft(probe_epochs=PROBE_STEPS / 3), unfreeze(every=2), Falling()])


def rows() -> list[dict[str, Tensor]]:
    data = batch("bert", rows=ROWS)
    return [{key: value[i] for key, value in data.items()} for i in range(ROWS)]


def fit(model: Any, folder: Any, *, resume: Any = False, callbacks: Any = (), **settings: Any) -> list[Any]:
    given = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 2,
        "logging_strategy": "no",
    }
    return peft_plus.fit(
        model,
        quiet(folder, **{**given, **settings}),
        train_dataset=rows(),
        resume_from_checkpoint=resume,
        callbacks=list(callbacks),
    )


def end(model: Any) -> tuple[Any, ...]:
    plan = model.peft_plus
    weights = {name: tensor.detach().numpy().tobytes() for name, tensor in model.named_parameters()}
    states = {plugin.name: dict(plugin.state_dict()) for plugin in plan.plugins}
    return weights, states, plan.timeline


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = built()
    fit(model, tmp_path_factory.mktemp("whole"))
    return model


@pytest.mark.parametrize(
    ("stage", "step", "skipped"),
    [
        ("probe", 0, 0),
        ("probe", 1, 0),
        ("probe", 3, 0),
        ("train", 0, 0),  # the probe was finished: it makes no step more
        ("train", 1, 0),
        ("train", 2, 1),
        ("train", 5, 1),
    ],
)
def test_a_resumed_fit_ends_bit_identical(stage: str, step: int, skipped: int, whole: Any, tmp_path: Path) -> None:
    with pytest.raises(Broken):
        fit(built(), tmp_path, callbacks=[BreakAt(stage, step)])
    model = built()
    outputs = fit(model, tmp_path, resume=True)
    assert end(model) == end(whole)
    assert [output is None for output in outputs] == [number < skipped for number in range(2)]


def test_what_earlier_stages_did_is_still_shown(whole: Any, tmp_path: Path) -> None:
    with pytest.raises(Broken):
        fit(built(), tmp_path, callbacks=[BreakAt("train", 4)])
    model = built()
    fit(model, tmp_path, resume=True)
    assert model.peft_plus.engagement["probe"] == whole.peft_plus.engagement["probe"]
    assert [row.moved for row in model.peft_plus.engagement["train"]] == [
        row.moved for row in whole.peft_plus.engagement["train"]
    ]
    assert str(model.peft_plus).count("probe") == str(whole.peft_plus).count("probe")


def test_a_finished_fit_makes_no_step_more(whole: Any, tmp_path: Path) -> None:
    fit(built(), tmp_path)
    model = built()
    skipped, last = fit(model, tmp_path, resume=True)
    assert (skipped, last.global_step) == (None, STEPS)
    assert end(model) == end(whole)


def test_a_first_run_may_ask_to_resume(whole: Any, tmp_path: Path, caplog: Any) -> None:
    model = built()
    with caplog.at_level(logging.WARNING):
        fit(model, tmp_path, resume=True)
    assert "There is no checkpoint in" in caplog.text
    assert end(model) == end(whole)


def test_a_damaged_stage_is_not_silently_begun_anew(tmp_path: Path) -> None:
    fit(built(), tmp_path)
    for file in tmp_path.glob("train/checkpoint-*/optimizer.safetensors"):
        file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="is whole"):
        fit(built(), tmp_path, resume=True)
    shutil.rmtree(tmp_path / "train")  # the user's decision: the probe is still there
    first, second = fit(built(), tmp_path, resume=True)
    assert (first.global_step, second.global_step) == (PROBE_STEPS, STEPS)


def test_a_folder_is_no_answer_to_which_stage(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="give True or False"):
        fit(built(), tmp_path, resume=str(tmp_path / "probe" / "checkpoint-2"))
