"""Child-Tuning: the mean of its gradient, the Fisher information by a plain loop, and what rests, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback, default_data_collator

from peft_plus import MethodError, get_model
from peft_plus.stage_start import run_at_start
from peft_plus_stability.child_tuning import ChildTuning, largest
from tests.consistency import model_and_batch, trainer_of
from tests.models import rows_of, tiny

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")
ADAMW: dict[str, Any] = {"optim": "adamw_torch", "weight_decay": 0.1, "max_steps": 5}


class Steps(TrainerCallback):
    """The weights before and after each step."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def _look(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.states.append({name: tensor.detach().clone() for name, tensor in model.named_parameters()})

    on_train_begin = on_step_end = _look


def run(method: Any, folder: Path, callbacks: Any = (), **settings: Any) -> Any:
    torch.manual_seed(0)
    model, data = model_and_batch("bert", "SEQ_CLS", rows=8)
    made = trainer_of(get_model(model, method), rows_of(data), folder, callbacks, **{**ADAMW, **settings})
    made.train()
    return made


@pytest.mark.parametrize("p", [0.2, 0.4])
def test_the_mean_of_the_edited_gradient_is_the_gradient(p: float) -> None:
    model = get_model(tiny("bert"), ["full", ChildTuning(p=p)])
    plugin = model.peft_plus.plugins[0]
    there = run_at_start(model.peft_plus, model, model.peft_plus.stages[0], seed=3)
    param = next(param for param in there.params if param.name == "bert.pooler.dense.weight")
    gradient = torch.randn(param.shape, generator=torch.Generator().manual_seed(0))
    number = 4_000
    edits = [plugin.edit_gradient(there.at(step), param, gradient) for step in range(number)]
    mean, error = torch.stack(edits).mean(0), gradient.abs() * ((1 - p) / p / number) ** 0.5
    assert ((mean - gradient).abs() <= 5 * error).all()
    masks = [plugin.moves(there.at(step), param) for step in range(50)]
    assert torch.stack(masks).float().mean().item() == pytest.approx(p, abs=0.01)
    assert all(torch.equal(edit != 0, mask) for edit, mask in zip(edits, masks, strict=False))


@pytest.mark.parametrize("variant", ["F", "D"])
def test_outside_the_child_nothing_moves_whatever_decay_and_momentum(variant: str, tmp_path: Path) -> None:
    steps = Steps()
    made = run(["full", ChildTuning(variant=variant)], tmp_path, [steps])
    plugin, params = made.model.peft_plus.plugins[0], made.model.peft_plus.params
    there = run_at_start(made.model.peft_plus, made.model, made.model.peft_plus.stages[0], seed=42)
    moved_ever = 0
    for step, (before, after) in enumerate(zip(steps.states, steps.states[1:], strict=False)):
        for name, param in params.items():
            mask = plugin.moves(there.at(step), param)
            moved = before[name] != after[name]
            assert mask is None or not (moved & ~mask).any(), (step, name)
            moved_ever += int(moved.sum())
            if param.part == "head":
                assert mask is None
    assert moved_ever > 0


@pytest.mark.parametrize("variant", ["F", "D"])
def test_p_one_is_plain_adamw_bit_for_bit(variant: str, tmp_path: Path) -> None:
    plain, child = run("full", tmp_path), run(["full", ChildTuning(variant=variant, p=1.0)], tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), child.model.parameters(), strict=True))


@pytest.mark.parametrize("limit", [None, 3])
def test_the_child_has_the_largest_fisher_information(limit: int | None, tmp_path: Path) -> None:
    """By a plain loop over single examples, with whole gradients, unclipped."""
    made = run(["full", ChildTuning(variant="D", p=0.25, fisher_examples=limit)], tmp_path)
    model, data = model_and_batch("bert", "SEQ_CLS", rows=8)
    params = get_model(model, "full").peft_plus.params
    fisher = {name: torch.zeros(p.shape) for name, p in params.items() if p.part != "head"}
    model.eval()
    for row in rows_of(data)[:limit]:
        model.zero_grad()
        model(**default_data_collator([row])).loss.backward()
        for name in fisher:
            grad = dict(model.named_parameters())[name].grad
            fisher[name] += 0 if grad is None else grad.square()
    told = {name: value.numpy() for name, value in fisher.items() if value.any()}
    everything = np.sort(np.concatenate([value.ravel() for value in told.values()]))
    edge = everything[-round(0.25 * len(everything))]
    child = made.model.peft_plus.plugins[0].child
    assert child.keys() == told.keys()
    apart = sum(int((child[name].numpy() != (told[name] >= edge)).sum()) for name in told)
    assert apart <= 4  # at the edge, by rounding
    assert sum(int(mask.sum()) for mask in child.values()) == pytest.approx(0.25 * len(everything), rel=0.01)


def test_under_lora_what_tells_nothing_stays_inside_whole(tmp_path: Path) -> None:
    made = run(["lora", ChildTuning(variant="D")], tmp_path)
    child = made.model.peft_plus.plugins[0].child
    assert child
    assert all("lora_B" in name for name in child)


@pytest.mark.parametrize("variant", ["F", "D"])
def test_resumed_at_every_step_it_ends_bit_identical(variant: str, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1}
    whole = run(["lora", ChildTuning(variant=variant)], tmp_path, **settings)
    for step in range(1, 5):
        torch.manual_seed(0)
        model, data = model_and_batch("bert", "SEQ_CLS", rows=8)
        again = trainer_of(
            get_model(model, ["lora", ChildTuning(variant=variant)]), rows_of(data), tmp_path, **ADAMW, **settings
        )
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        pairs = zip(again.model.parameters(), whole.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), step


def test_the_largest_of_hand_made_values() -> None:
    values = {"a": torch.tensor([0.0, 5.0, 1.0]), "b": torch.tensor([[4.0, 0.5], [3.0, 2.0]]), "c": torch.zeros(9)}
    masks = largest(values, share=3 / 7)
    assert masks.keys() == {"a", "b"}
    assert masks["a"].tolist() == [False, True, False]
    assert masks["b"].tolist() == [[True, False], [True, False]]
    assert largest({"c": torch.zeros(2)}, share=0.5) == {}


@pytest.mark.parametrize(
    "settings", [{"p": 0.0}, {"p": 1.1}, {"fisher_examples": 5}, {"variant": "D", "fisher_examples": 0}]
)
def test_a_setting_out_of_range_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"p=|fisher_examples="):
        ChildTuning(**settings)


def test_a_probe_has_no_child() -> None:
    with pytest.raises(MethodError, match="something to train beside the head"):
        get_model(tiny("bert"), {"linear_probe": {}, "child_tuning": {}})
