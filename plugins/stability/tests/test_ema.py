"""EMA against its recurrence, written down by hand over the weights of a plain run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback, default_data_collator

import peft_plus
from peft_plus import Plugin, get_model
from peft_plus_stability.ema import EMA, decay_at, follow
from tests.consistency import arguments, model_and_batch
from tests.models import rows_of

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")


class Weights(TrainerCallback):
    """The weights before the first step and after each."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def _look(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.states.append({name: t.detach().clone() for name, t in model.named_parameters() if t.requires_grad})

    on_train_begin = on_step_end = _look


def run(
    method: Any,
    folder: Path,
    callbacks: Any = (),
    *,
    resume: str | None = None,
    eval_dataset: Any = None,
    **settings: Any,
) -> Any:
    torch.manual_seed(0)
    model, data = model_and_batch("bert", "SEQ_CLS")
    made = peft_plus.Trainer(
        get_model(model, method),
        arguments(folder, **{"max_steps": 6, **settings}),
        train_dataset=rows_of(data),
        eval_dataset=eval_dataset,
        data_collator=default_data_collator,
        callbacks=list(callbacks),
    )
    made.train(resume_from_checkpoint=resume)
    return made


@pytest.mark.parametrize("tuner", ["full", "lora"])
@pytest.mark.parametrize("warmup", [True, False])
def test_the_end_is_the_average_of_the_plain_runs_weights(tuner: str, warmup: bool, tmp_path: Path) -> None:
    weights = Weights()
    run(tuner, tmp_path, [weights])
    average = {name: tensor.double() for name, tensor in weights.states[0].items()}
    for step, state in enumerate(weights.states[1:], start=1):
        beta = min(0.5, (1 + step) / (10 + step)) if warmup else 0.5
        average = {name: beta * average[name] + (1 - beta) * state[name].double() for name in average}
    ended = dict(run([tuner, EMA(decay=0.5, warmup=warmup)], tmp_path).model.named_parameters())
    assert all(torch.allclose(ended[name].double(), average[name], atol=1e-6) for name in average)


def test_decay_zero_ends_with_the_last_weights_bit_for_bit(tmp_path: Path) -> None:
    plain = run("lora", tmp_path)
    ended = run(["lora", EMA(decay=0.0)], tmp_path)
    pairs = zip(plain.model.parameters(), ended.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not ended.model.peft_plus.plugins[0].average  # and no copy is kept for it


@dataclass(kw_only=True)
class Thaw(Plugin):
    """Nothing but the head trains in the first two steps."""

    name: ClassVar[str] = "thaw"

    def may_train(self, run, param):
        return param.part == "head" or run.step >= 2

    def next_change(self, run):
        return 2 if run.step < 2 else None


def test_what_is_frozen_keeps_its_weights_bit_for_bit_and_follows_once_it_trains(tmp_path: Path) -> None:
    seen: list[tuple[bool, bool]] = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            average = next(p for p in model.peft_plus.plugins if p.name == "ema").average
            same = {n: torch.equal(average[n], t) for n, t in model.named_parameters() if n in average}
            seen.append((all(same[n] for n in same if "lora_" in n), any(same[n] for n in same if "classifier" in n)))

    run(["lora", EMA(decay=0.9, warmup=False), Thaw()], tmp_path, [Look()], max_steps=4)
    assert seen[:2] == [(True, False)] * 2
    assert not any(lora for lora, _ in seen[2:])


def test_the_decay_grows_as_tensorflows() -> None:
    assert [decay_at(t, decay=0.99, warmup=True) for t in (1, 10, 2000)] == pytest.approx([2 / 11, 11 / 20, 0.99])
    assert decay_at(1, decay=0.9, warmup=False) == 0.9


def test_a_half_precision_weight_is_averaged_in_fp32() -> None:
    """In bf16 an average of this decay would never move."""
    average, weight = [torch.ones(3)], [torch.full((3,), 1.5, dtype=torch.bfloat16)]
    for _ in range(100):
        follow(average, weight, decay=0.999)
    assert torch.allclose(average[0], torch.tensor(1.5 - 0.5 * 0.999**100), atol=1e-5)


def test_what_is_evaluated_and_saved_is_the_average_and_a_resumed_run_ends_alike(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2}
    whole = run(["lora", EMA(decay=0.8)], tmp_path, **settings)
    saved = load_file(tmp_path / "checkpoint-6" / "adapter_model.safetensors")
    ended = {name: t for name, t in whole.model.named_parameters() if "lora_A" in name}
    for name, tensor in ended.items():
        assert torch.equal(saved[name.replace(".default", "")], tensor)
    again = run(["lora", EMA(decay=0.8)], tmp_path, resume=str(tmp_path / "checkpoint-4"), **settings)
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True))


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=f"decay={decay}"):
        EMA(decay=decay)
