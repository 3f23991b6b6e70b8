"""What `adaptive` chooses for data made by hand, and what it does while a metric goes its way."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import TrainerCallback, default_data_collator

import peft_plus
from peft_plus import MethodError, get_model, registry
from peft_plus_stability.adaptive import Adaptive, epochs_for, probe_gain
from tests.consistency import model_and_batch
from tests.models import rows_of, tiny
from tests.training import quiet

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")


def run(
    folder: Path, plugin: Any, *, tuner: str = "lora", rows: int = 12, evaluates: bool = True, **settings: Any
) -> Any:
    torch.manual_seed(0)
    model, data = model_and_batch("bert", "SEQ_CLS", rows=rows)
    args = quiet(folder, **{"per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_steps": -1, **settings})
    return peft_plus.Trainer(
        get_model(model, [tuner, plugin]),
        args,
        train_dataset=rows_of(data),
        eval_dataset=rows_of(data)[:4] if evaluates else None,
        data_collator=default_data_collator,
    )


@pytest.mark.parametrize(("steps", "epochs"), [(1, 20), (30, 20), (60, 10), (100, 6), (200, 3), (5_000, 3)])
def test_few_steps_want_many_epochs(steps: int, epochs: int) -> None:
    assert epochs_for(steps) == epochs


def test_the_budget_follows_the_data_and_each_choice_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = run(tmp_path, Adaptive(), gradient_accumulation_steps=2)
    with caplog.at_level(logging.WARNING):
        made.train()
    assert made.args.num_train_epochs == 20
    assert made.args.warmup_steps == 0.1
    assert made.args.learning_rate == 1e-2
    assert "20 epochs of 2 steps: 12 examples; 600 steps are wanted" in caplog.text
    assert "learning rate 0.01, yours: only fresh weights train" in caplog.text
    assert "early stopping after 6 evaluations: there is data to evaluate on" in caplog.text
    assert "0 blocks frozen: no probe" in caplog.text


def test_what_is_given_is_not_chosen(tmp_path: Path) -> None:
    made = run(tmp_path, Adaptive(epochs=1.0, learning_rate=3e-3, frozen_blocks=1), evaluates=False)
    made.train()
    assert (made.args.num_train_epochs, made.args.learning_rate) == (1.0, 3e-3)
    plugin = made.model.peft_plus.plugins[0]
    assert plugin.chosen == {"freeze": {"blocks": 1}}
    assert any("1 blocks frozen: as you said" in reason for reason in plugin.reasons)
    (row,) = [row for row in made.model.peft_plus.engagement["train"] if row.group[0] == 2][:1]
    assert row.steps
    assert all(row.group[0] != 1 for row in made.model.peft_plus.engagement["train"] if row.steps)


def test_pretrained_weights_get_their_own_rate(tmp_path: Path) -> None:
    made = run(tmp_path, Adaptive(epochs=1.0), tuner="full")
    made.train()
    assert made.args.learning_rate == 2e-5


def test_a_probe_tells_what_is_known_from_noise() -> None:
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, 200)
    known = draw.normal(size=(200, 8)) + 6 * labels[:, None]
    assert probe_gain(known, labels) == pytest.approx(1.0)
    assert abs(probe_gain(draw.normal(size=(200, 8)), labels)) < 0.25
    assert probe_gain(known[:20], np.array([0] * 17 + [1] * 3)) is None
    assert probe_gain(known[:20], np.zeros(20)) is None


def test_where_a_probe_solves_it_the_lower_half_rests(tmp_path: Path) -> None:
    """Rows of one class hold other tokens than those of the other, and the first block tells them apart."""
    made = run(tmp_path, Adaptive(epochs=1.0), rows=40)
    for row in made.train_dataset:
        row["labels"] = row["labels"] % 2
        row["input_ids"] = torch.where(row["attention_mask"] == 1, 20 + 30 * row["labels"], row["input_ids"])
    made.train()
    plugin = made.model.peft_plus.plugins[0]
    assert plugin.chosen["freeze"] == {"blocks": 1}
    assert any("a linear probe wins 100%" in reason for reason in plugin.reasons)


class Scripted(peft_plus.Trainer):
    """Evaluates to a script."""

    losses: tuple[float, ...] = ()

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, **kwargs)
        epoch = round(float(self.state.epoch or 0))
        output.metrics["eval_loss"] = self.losses[min(epoch, len(self.losses)) - 1]
        return output


class Rates(TrainerCallback):
    """The rate of each update."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.weights: dict[int, Any] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.weights[state.global_step] = {n: p.detach().clone() for n, p in model.named_parameters()}


def scripted(folder: Path, losses: tuple[float, ...], **settings: Any) -> tuple[Any, Rates]:
    torch.manual_seed(0)
    model, data = model_and_batch("bert", "SEQ_CLS", rows=4)
    rates = Rates()
    made = Scripted(
        get_model(model, ["lora", Adaptive(patience=1)]),
        quiet(folder, per_device_train_batch_size=4, learning_rate=1e-2, **settings),
        train_dataset=rows_of(data),
        eval_dataset=rows_of(data),
        data_collator=default_data_collator,
        callbacks=[rates],
    )
    made.losses = losses
    return made, rates


def test_the_rate_falls_on_a_plateau_and_the_run_ends_with_its_best_weights(tmp_path: Path) -> None:
    made, rates = scripted(tmp_path, (1.0, 0.5, 0.6, 0.7, 0.4, 0.5, 0.6, 0.7))
    made.train()
    plugin = made.model.peft_plus.plugins[0]
    assert made.state.global_step == 8
    assert plugin.lowered == 5
    best = rates.weights[5]
    assert all(torch.equal(tensor, best[name]) for name, tensor in made.model.named_parameters())


def test_a_resumed_run_ends_bit_identical(tmp_path: Path) -> None:
    losses = (1.0, 0.5, 0.6, 0.7, 0.4, 0.5, 0.6, 0.7)
    whole, _ = scripted(tmp_path, losses, save_strategy="epoch")
    whole.train()
    for step in (3, 6):
        again, _ = scripted(tmp_path, losses, save_strategy="epoch")
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        pairs = zip(again.model.parameters(), whole.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), step


def test_a_technique_that_is_not_installed_is_named_with_its_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = registry.entries

    def without(kind: Any) -> Any:
        return {name: entry for name, entry in entries(kind).items() if name != "freeze"}

    made = run(tmp_path, Adaptive(frozen_blocks=1))
    monkeypatch.setattr(registry, "entries", without)
    with pytest.raises(MethodError, match=r"'freeze'.*pip install peft-plus-freezing"):
        made.train()


def test_beside_what_it_chooses_itself_it_is_refused() -> None:
    with pytest.raises(MethodError, match="cannot run together"):
        get_model(tiny("bert"), ["lora", Adaptive(), "early_stop"])
    assert isinstance(get_model(tiny("bert"), ["lora", "adaptive"]), nn.Module)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("epochs", 0.0), ("learning_rate", -1.0), ("warmup_fraction", 1.0), ("frozen_blocks", -1), ("patience", 0),
     ("lr_factor", 0.0)],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{setting}="):
        Adaptive(**{setting: value})
