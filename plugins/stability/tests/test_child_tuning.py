"""Masks, gradients and Fisher information against plain torch; what lies outside the child against its own bits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainerCallback, default_data_collator

from peft_plus import MethodError, Param, Run, Session, get_model
from peft_plus_stability.child_tuning import ChildTuning, largest
from tests.bad_inputs import built, rows, same, trainer, weights
from tests.bare_loop import BareLoop, check_resume
from tests.consistency import lively
from tests.models import batch, rows_of, tiny

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")

ADAMW: dict[str, Any] = {"optim": "adamw_torch", "weight_decay": 0.1, "learning_rate": 1e-2}


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Updates(TrainerCallback):
    """The weights around each update."""

    def __init__(self) -> None:
        self.pairs: list[list[dict[str, Tensor]]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.pairs.append([weights(model)])

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.pairs[-1].append(weights(model))


def run_at(step: int, seed: int = 0) -> Run:
    return Run(model=nn.Identity(), task=None, num_blocks=1, step=step, seed=seed)  # type: ignore[arg-type]


def param(name: str, *shape: int, part: Any = "base") -> Param:
    return Param(name, shape, 1, part)


# ---- F -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.2, 0.3, 0.9])
def test_the_mean_of_the_masked_gradients_is_the_gradient(p: float) -> None:
    """Within five standard errors of each element; the masks of two steps, of two parameters, of two runs differ."""
    plugin, gradient, steps = ChildTuning(p=p), torch.randn(40, 5), 1000
    masked = torch.stack([plugin.edit_gradient(run_at(step), param("w", 40, 5), gradient) for step in range(steps)])
    error = gradient.abs() * ((1 - p) / p / steps) ** 0.5
    assert ((masked.mean(0) - gradient).abs() <= 5 * error + 1e-6).all()
    inside = masked != 0
    assert torch.equal(masked[inside], (gradient / p).expand_as(masked)[inside])
    assert float(inside.float().mean()) == pytest.approx(p, abs=0.01)
    other = plugin.edit_gradient(run_at(0), param("v", 40, 5), gradient)
    elsewhere = plugin.edit_gradient(run_at(0, seed=1), param("w", 40, 5), gradient)
    assert not any(torch.equal(masked[0] != 0, x != 0) for x in (masked[1], other, elsewhere))


@pytest.mark.parametrize("asked_before", [True, False])
def test_what_moves_is_what_has_a_gradient(asked_before: bool) -> None:
    """The mask of one step is one, also where another process, or a resumed one, asks in another order."""
    plugin, gradient = ChildTuning(), torch.ones(30, 4)
    masks = []
    for step in (0, 1, 0):
        masks.append(plugin.edit_gradient(run_at(step), param("w", 30, 4), gradient) > 0)
        if asked_before:
            plugin.moves(run_at(step), param("v", 30, 4))
        assert torch.equal(plugin.moves(run_at(step), param("w", 30, 4)), masks[-1])
    assert torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[1])
    assert torch.equal(ChildTuning().moves(run_at(1), param("w", 30, 4)), masks[1])


@pytest.mark.parametrize("tuner", ["full", "lora"])
@pytest.mark.parametrize("variant", ["F", "D"])
def test_outside_the_child_nothing_moves_by_one_bit_and_the_head_moves_whole(
    variant: str, tuner: str, tmp_path: Path
) -> None:
    updates = Updates()
    model = get_model(lively("bert"), {tuner: {}, "child_tuning": {"variant": variant}})
    trainer(model, tmp_path, callbacks=[updates], **ADAMW).train()
    plugin, params = model.peft_plus.plugins[0], model.peft_plus.params
    stage = model.peft_plus.stages[0]
    inside = total = 0
    for step, (before, after) in enumerate(updates.pairs):
        run = Run(model=model, task=model.peft_plus.task, num_blocks=3, step=step, seed=42, stage=stage)
        for name, one in params.items():
            moved = before[name] != after[name]
            mask = None if one.part == "head" else plugin.moves(run, one)
            if mask is None:
                assert one.part == "head" or (variant == "D" and name not in plugin.child), name
                continue
            assert not moved[~mask].any(), (step, name)
            inside, total = inside + int(moved[mask].sum()), total + int(mask.sum())
        head = [n for n, one in params.items() if one.part == "head" and n.endswith("weight")]
        assert all((before[n] != after[n]).all() for n in head)
    assert inside > 0.5 * total  # the rest had no gradient, and nothing to decay


@pytest.mark.parametrize("variant", ["F", "D"])
def test_one_update_by_hand(variant: str, tmp_path: Path) -> None:
    """Plain AdamW on the masked gradient."""
    model = get_model(lively("bert"), {"full": {}, "child_tuning": {"variant": variant, "p": 0.4}})
    twin: Any = lively("bert").train()
    data = rows_of(batch("bert", rows=4))
    trainer(model, tmp_path, data, max_steps=1, max_grad_norm=0.0, **{**ADAMW, "weight_decay": 0.0}).train()
    plugin, params = model.peft_plus.plugins[0], model.peft_plus.params
    run = Run(model=model, task=model.peft_plus.task, num_blocks=3, seed=42, stage=model.peft_plus.stages[0])
    twin(**default_data_collator(data)).loss.backward()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.0)
    for name, tensor in twin.named_parameters():
        mask = plugin.moves(run, params[name]) if params[name].part != "head" else None
        if mask is not None:
            tensor.grad = tensor.grad * mask / (0.4 if variant == "F" else 1.0)
    optimizer.step()  # a gradient of 0 in the first step, without decay, moves nothing
    for name, tensor in model.named_parameters():
        assert torch.allclose(tensor, twin.get_parameter(name), rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("variant", ["F", "D"])
@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_p_one_is_the_plain_optimizer_bit_for_bit(tuner: str, variant: str, tmp_path: Path) -> None:
    ends = []
    for method in ({tuner: {}}, {tuner: {}, "child_tuning": {"variant": variant, "p": 1.0}}):
        torch.manual_seed(0)
        model = get_model(tiny("bert", hidden_dropout_prob=0.1), method)
        trainer(model, tmp_path, **ADAMW).train()
        ends.append(model)
    assert same(ends[1], weights(ends[0]))


# ---- D -------------------------------------------------------------------------------------------------------------


def fisher_by_hand(model: nn.Module, data: Any) -> dict[str, Tensor]:
    """One `loss.backward()` for each example."""
    model.eval()
    sums = {name: torch.zeros_like(tensor) for name, tensor in model.named_parameters() if tensor.requires_grad}
    for row in data:
        model.zero_grad()
        model(**default_data_collator([row])).loss.backward()
        for name, tensor in model.named_parameters():
            if tensor.grad is not None:
                sums[name] += tensor.grad.detach() ** 2
    return {name: total / len(data) for name, total in sums.items() if "classifier" not in name}


@pytest.mark.parametrize("limit", [None, 10])
@pytest.mark.parametrize("p", [0.1, 0.3])
def test_the_child_is_the_share_with_the_most_fisher_information(p: float, limit: int | None, tmp_path: Path) -> None:
    method = {"full": {}, "child_tuning": {"variant": "D", "p": p, "fisher_examples": limit}}
    model = get_model(lively("bert"), method)
    wanted = fisher_by_hand(lively("bert"), rows()[:limit])
    trainer(model, tmp_path, max_steps=1).train()
    child = model.peft_plus.plugins[0].child
    told = {name: value for name, value in wanted.items() if value.any()}
    assert child.keys() == told.keys()
    everything = torch.cat([value.flatten() for value in told.values()]).sort(descending=True).values
    keep = round(p * len(everything))
    assert sum(int(mask.sum()) for mask in child.values()) == keep
    edge = float(everything[keep - 1])
    for name, mask in child.items():  # rounding may decide at the edge alone
        assert (told[name][mask] >= edge * (1 - 1e-3)).all(), name
        assert (told[name][~mask] <= edge * (1 + 1e-3)).all(), name


def test_ties_come_in_and_zeros_never_do() -> None:
    values = {"a": torch.tensor([3.0, 1.0, 0.0]), "b": torch.tensor([[1.0, 2.0]]), "idle": torch.zeros(4)}
    found = {name: mask.tolist() for name, mask in largest(values, share=0.6).items()}
    assert found == {"a": [True, True, False], "b": [[True, True]]}
    found = {name: mask.tolist() for name, mask in largest(values, share=0.4).items()}
    assert found == {"a": [True, False, False], "b": [[False, True]]}
    found = {name: mask.tolist() for name, mask in largest(values, share=1.0).items()}
    assert found == {"a": [True, True, False], "b": [[True, True]]}
    assert largest({"idle": torch.zeros(4)}, share=0.5) == {}


def test_under_lora_the_matrices_that_tell_nothing_train_whole(tmp_path: Path) -> None:
    """While B is 0 no gradient reaches A, in any example; ranked with B it would be outside for ever."""
    model = get_model(lively("bert"), {"lora": {}, "child_tuning": {"variant": "D"}})
    before = weights(model)
    trainer(model, tmp_path, **ADAMW).train()
    child = model.peft_plus.plugins[0].child
    assert child
    assert all("lora_B" in name for name in child)
    moved = {name: tensor != before[name] for name, tensor in model.named_parameters() if "lora_" in name}
    assert all(where.all() for name, where in moved.items() if "lora_A" in name)
    share = [float(where.float().mean()) for name, where in moved.items() if name in child]
    assert 0 < sum(share) / len(share) < 0.5


def test_the_estimate_leaves_the_run_as_it_would_have_been(tmp_path: Path) -> None:
    """With a child of everything that has any Fisher information: the same dropout, the same order of the data."""
    ends = []
    for method in ({"lora": {}}, {"lora": {}, "child_tuning": {"variant": "D", "p": 1 - 1e-9}}):
        torch.manual_seed(0)
        model = get_model(lively("bert", hidden_dropout_prob=0.1), method)
        trainer(model, tmp_path, optim="sgd", train_sampling_strategy="random").train()
        ends.append(model)
    assert same(ends[1], weights(ends[0]))


def test_a_second_run_looks_at_its_own_data(tmp_path: Path) -> None:
    model = get_model(lively("bert"), {"full": {}, "child_tuning": {"variant": "D"}})
    trainer(model, tmp_path, max_steps=1).train()
    first = copy.deepcopy(model.peft_plus.plugins[0].child)
    trainer(model, tmp_path, rows_of(batch("bert", rows=8, seed=9)), max_steps=1).train()
    second = model.peft_plus.plugins[0].child
    assert not all(torch.equal(first[name], second[name]) for name in first.keys() & second.keys())


def test_data_that_are_a_stream_are_refused_before_the_first_step(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield from rows()

    model = built({"full": {}, "child_tuning": {"variant": "D"}})
    with pytest.raises(MethodError, match=r"'child_tuning'.*read as a stream"):
        trainer(model, tmp_path, Stream(), train_sampling_strategy="random").train()


# ---- loops ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_a_resumed_run_draws_the_same_children(tuner: str) -> None:
    def fresh() -> Any:
        torch.manual_seed(0)
        return get_model(tiny("bert"), [tuner, "child_tuning"])

    check_resume(fresh, steps=6)


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_a_resumed_run_keeps_the_child_that_the_data_chose(tuner: str, tmp_path: Path) -> None:
    def made(**given: Any) -> Any:
        torch.manual_seed(0)
        model = get_model(lively("bert"), {tuner: {}, "child_tuning": {"variant": "D"}})
        return trainer(model, tmp_path, **ADAMW, **given)

    whole = made(save_strategy="steps", save_steps=2)
    whole.train()
    for step in (2, 4):
        again = made()
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert same(again.model, weights(whole.model)), step


@pytest.mark.parametrize("variant", ["F", "D"])
def test_a_session_is_as_the_trainer(variant: str, tmp_path: Path) -> None:
    method = {"full": {}, "child_tuning": {"variant": variant}}
    trained = get_model(lively("bert"), method)
    trainer(trained, tmp_path, max_grad_norm=0.0, lr_scheduler_type="constant").train()
    model = get_model(lively("bert"), method)
    session = Session(model, Accelerator(cpu=True), max_steps=6)
    optimizer = session.optimizer(torch.optim.SGD, lr=0.1)
    loader = session.loader(rows(), 4, shuffle=False, collate_fn=default_data_collator)
    for micro_batch in session.batches(loader):
        session.accelerator.backward(session.loss(micro_batch))
        optimizer.step()
        optimizer.zero_grad()
    assert same(model, weights(trained))


def test_beside_a_freezing_schedule_what_rests_has_no_child() -> None:
    model = get_model(tiny("bert"), {"full": {}, "freeze": {"blocks": 2}, "child_tuning": {}})
    before = weights(model)
    BareLoop(model, steps=3).run()
    names = [n for n in before if "layer.0." in n or "layer.1." in n or "embeddings" in n]
    assert all(torch.equal(model.get_parameter(n), before[n]) for n in names)


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_a_head_alone_has_no_child() -> None:
    with pytest.raises(MethodError, match=r"'child_tuning'.*'linear_probe' trains the head alone"):
        get_model(tiny("bert"), ["linear_probe", "child_tuning"])


@pytest.mark.parametrize(
    "settings",
    [
        {"p": 0.0},
        {"p": 1.1},
        {"p": float("nan")},
        {"variant": "E"},
        {"variant": "D", "fisher_examples": 0},
        {"fisher_examples": 10},
        {"fisher_examples": None},
    ],
)
def test_settings_out_of_range_or_out_of_place_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match=f"child_tuning.*{list(settings)[-1]}"):
        get_model(tiny("bert"), {"lora": {}, "child_tuning": settings})
