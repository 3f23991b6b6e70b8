"""The recipe's arguments, its rates step by step, and Adam's first step with and without bias correction."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback, default_data_collator

import peft_plus
from peft_plus import MethodError, get_model
from peft_plus_stability.mosbach import Mosbach
from tests.consistency import model_and_batch, trainer_of
from tests.models import rows_of, tiny
from tests.training import quiet

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")


class Watch(TrainerCallback):
    """Rate and weights around each update."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.weights: list[dict[str, Tensor]] = []

    def _look(self, model: Any) -> None:
        self.weights.append({name: tensor.detach().clone() for name, tensor in model.named_parameters()})

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self._look(model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any, **_: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self._look(model)


def run(folder: Path, plugin: Mosbach, rows: int = 8) -> tuple[Any, Watch]:
    watch = Watch()
    model, data = model_and_batch("bert", "SEQ_CLS", rows=rows)
    made = trainer_of(get_model(model, ["full", plugin]), rows_of(data), folder, [watch], max_steps=-1)
    made.train()
    return made, watch


def test_a_trainer_gets_the_papers_arguments(tmp_path: Path) -> None:
    made, watch = run(tmp_path, Mosbach())
    args = made.args
    assert (args.learning_rate, args.num_train_epochs, args.warmup_steps) == (2e-5, 20.0, 0.1)
    assert (args.adam_epsilon, args.weight_decay, args.max_grad_norm) == (1e-6, 0.01, 1.0)
    assert made.state.max_steps == 20 * 2
    wanted = [2e-5 * (t / 4 if t < 4 else (40 - t) / 36) for t in range(40)]
    assert watch.rates == pytest.approx(wanted)


def test_the_first_step_moves_each_weight_by_the_rate(tmp_path: Path) -> None:
    """Without bias correction it would be (1 − β₁) / √(1 − β₂) = 3.16 times that, which an Adam by hand shows."""
    plugin = Mosbach(learning_rate=1e-3, warmup_fraction=0.0, weight_decay=0.0, max_grad_norm=0.0, adam_epsilon=1e-12)
    _, watch = run(tmp_path, plugin)
    before, after = watch.weights[:2]
    name = "bert.encoder.layer.0.output.dense.weight"
    moved = (after[name] - before[name]).abs()
    assert torch.allclose(moved[moved > 0], torch.tensor(1e-3), rtol=1e-2)
    gradient = torch.tensor(0.37)
    first, second = 0.1 * gradient, 0.001 * gradient.square()
    uncorrected = float(first / second.sqrt())
    assert uncorrected == pytest.approx(math.sqrt(10), rel=1e-4)
    corrected = float((first / 0.1) / (second / 0.001).sqrt())
    assert corrected == pytest.approx(1.0)


def test_none_keeps_what_the_user_set(tmp_path: Path) -> None:
    model, data = model_and_batch("bert", "SEQ_CLS")
    method = {"lora": {}, "mosbach": {"learning_rate": None, "epochs": None, "weight_decay": None}}
    args = quiet(tmp_path, learning_rate=3e-3, max_steps=2, weight_decay=0.2)
    made = peft_plus.Trainer(
        get_model(model, method), args, train_dataset=rows_of(data), data_collator=default_data_collator
    )
    assert (made.args.learning_rate, made.args.max_steps, made.args.weight_decay) == (3e-3, 2, 0.2)
    assert made.args.warmup_steps == 0.1
    made.train()


@pytest.mark.parametrize("by_fit", [False, True])
def test_a_number_of_steps_of_the_user_does_not_cut_the_papers_epochs(
    by_fit: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, data = model_and_batch("bert", "SEQ_CLS", rows=8)
    model = get_model(model, ["full", Mosbach(epochs=3.0)])
    args, given = quiet(tmp_path, max_steps=2), {"train_dataset": rows_of(data), "data_collator": default_data_collator}
    with caplog.at_level(logging.INFO, logger="peft_plus"):
        if by_fit:
            (output,) = peft_plus.fit(model, args, **given)
        else:
            output = peft_plus.Trainer(model, args, **given).train()
    assert output.global_step == 3
    assert "max_steps 2 → -1" in caplog.text


def test_of_several_stages_it_shapes_those_that_train_everything() -> None:
    model = get_model(tiny("bert"), ["lora", "lp_ft", Mosbach(learning_rate=1e-3)])
    by_train = {stage.train: stage.args for stage in model.peft_plus.stages}
    assert "warmup_steps" not in by_train["head"]
    assert by_train["all"]["num_train_epochs"] == 20.0


def test_the_papers_rate_on_an_adapter_is_remarked_on(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        get_model(tiny("bert"), ["full", Mosbach()])
        get_model(tiny("bert"), ["lora", Mosbach(learning_rate=1e-3)])
        assert not caplog.text
        get_model(tiny("bert"), ["lora", Mosbach()])
    assert "learning_rate=2e-05 is the paper's for pretrained weights" in caplog.text


def test_another_schedule_beside_it_is_refused() -> None:
    with pytest.raises(MethodError, match=r"'mosbach' .* sets lr_scheduler_type='linear' and plugin 'plateau'"):
        get_model(tiny("bert"), ["full", Mosbach(), "plateau"])


@pytest.mark.parametrize(
    ("setting", "value"),
    [("learning_rate", 0.0), ("epochs", -1.0), ("adam_epsilon", 0.0), ("weight_decay", -0.1), ("max_grad_norm", -1.0),
     ("warmup_fraction", 1.0)],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused(setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{setting}="):
        Mosbach(**{setting: value})
