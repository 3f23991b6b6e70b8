"""γ blocks at a time: uniform draws that hold for K steps, memory for γ blocks alone, γ = L is full training."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch
from scipy.stats import chi2
from torch import nn

from peft_plus import MethodError, Param, Run, Stage, get_model
from peft_plus_freezing.lisa import LISA, drawn
from tests.bare_loop import BareLoop, check_resume, on_nf4
from tests.models import tiny
from tests.multipliers import in_session, in_trainer


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def run_at(step: int, blocks: int = 12, seed: int = 0, **fields: Any) -> Run:
    return Run(
        model=nn.Identity(),
        task=None,  # type: ignore[arg-type]
        num_blocks=blocks,
        depths=tuple(range(blocks + 1, -1, -1)),
        stage=Stage(),
        step=step,
        max_steps=10_000,
        seed=seed,
        **fields,
    )


def at(depth: int) -> Param:
    return Param(f"layer.{depth}", (2, 2), depth, "base")


def on(plugin: LISA, run: Run) -> frozenset[int]:
    return frozenset(d for d in run.depths if 1 <= d <= run.num_blocks and plugin.may_train(run, at(d)))


# ---- the draws -----------------------------------------------------------------------------------------------------


def test_each_block_comes_up_as_often_as_any_other() -> None:
    """Each period is a draw without replacement; over 3,000 of them each block's share is γ/L (chi-square, 1e-4)."""
    plugin, periods = LISA(layers=3, period_steps=20), 3000
    draws = [on(plugin, run_at(20 * period)) for period in range(periods)]
    assert {len(draw) for draw in draws} == {3}
    counts = [sum(depth in draw for draw in draws) for depth in range(1, 13)]
    expected = periods * 3 / 12
    # Counts without replacement vary by (1 − γ/L) · L/(L − 1) of what independent ones would.
    spread = sum((count - expected) ** 2 for count in counts) / expected / ((1 - 3 / 12) * 12 / 11)
    assert spread < chi2.ppf(1 - 1e-4, 11)
    pairs = {tuple(sorted(draw)) for draw in draws}
    assert len(pairs) == 220  # all of "12 choose 3" occur: blocks are not tied to each other


def test_a_draw_holds_for_k_steps_from_the_first_step_on() -> None:
    """Also the first: others draw at step 0 and again at step 1."""
    plugin = LISA(layers=2, period_steps=5)
    draws = [on(plugin, run_at(step)) for step in range(50)]
    periods = [draws[5 * period : 5 * period + 5] for period in range(10)]
    assert all(len(set(period)) == 1 for period in periods)
    assert len({period[0] for period in periods}) > 5


def test_a_draw_depends_on_seed_and_stage_alone() -> None:
    """So it is the same on every process: what differs there is the batch and its place in the step."""
    plugin = LISA()
    first = run_at(60, processes=2, batch={"input_ids": torch.zeros(2)}, first_example=0)
    second = run_at(60, processes=2, batch={"input_ids": torch.ones(2)}, first_example=2)
    assert on(plugin, first) == on(plugin, second) == on(plugin, run_at(79))
    assert len({on(plugin, run_at(60, seed=seed)) for seed in range(20)}) > 10


@pytest.mark.parametrize(("layers", "period_steps"), [(1, 1), (2, 3), (3, 7), (4, 2), (5, 1)])
def test_looking_ahead_agrees_with_asking_at_every_step(layers: int, period_steps: int) -> None:
    plugin = LISA(layers=layers, period_steps=period_steps)
    answers = [on(plugin, run_at(step, blocks=5)) for step in range(200)]
    for step in range(60):
        later = [s for s in range(step + 1, 200) if answers[s] != answers[step]]
        assert plugin.next_change(run_at(step, blocks=5)) == (later[0] if later else None)


def test_all_blocks_are_drawn_where_there_are_no_more() -> None:
    assert drawn([3, 1], 2, torch.Generator()) == {1, 3}
    assert drawn([], 2, torch.Generator()) == set()


# ---- a run ---------------------------------------------------------------------------------------------------------


def depth_of(name: str) -> int:
    block = re.search(r"\.layer\.(\d)\.", name)
    return int(block[1]) + 1 if block else 0 if "embeddings" in name else 4


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_only_what_trains_has_a_gradient_moves_and_takes_memory(tuner: str) -> None:
    """The optimizer holds state for γ blocks and what is always on, in every step; all else stands still by the bit."""
    model = get_model(tiny("bert"), {tuner: {}, "lisa": {"layers": 2, "period_steps": 2}})
    trainable = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    loop = BareLoop(model, steps=12)
    plugin = model.peft_plus.plugins[0]
    seen, bytes_held = set(), []
    while loop.finished < loop.steps:
        before = {name: tensor.detach().clone() for name, tensor in trainable.items()}
        blocks = on(plugin, loop.engine.run.at(loop.finished))
        loop.step()
        seen.add(blocks)
        moved = {depth_of(n) for n, tensor in trainable.items() if not torch.equal(tensor, before[n])}
        assert moved == {*blocks, 4} | ({0} if tuner == "full" else set())
        held = {name for name, tensor in trainable.items() if loop.optimizer.state.get(tensor)}
        used = {name for name in trainable if depth_of(name) in moved and "pooler" not in name}
        assert held - {name for name in held if "pooler" in name} == used
        bytes_held.append(
            sum(v.numel() * v.element_size() for s in loop.optimizer.state.values() for v in s.values() if v.dim())
        )
    loop.engine.prove(None)
    assert len(seen) > 1
    parts = {d: sum(t.numel() for n, t in trainable.items() if depth_of(n) == d) for d in range(5)}
    assert set(bytes_held) == {8 * (parts[0] + parts[4] + 2 * parts[1])}  # AdamW: two numbers of four bytes each


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_all_blocks_is_full_training_bit_for_bit(tuner: str) -> None:
    ended = []
    for method in ({tuner: {}}, {tuner: {}, "lisa": {"layers": 3, "period_steps": 1}}):
        torch.manual_seed(0)
        ended.append(BareLoop(get_model(tiny("bert"), method), steps=6).run().model.state_dict())
    assert all(torch.equal(ended[0][name], ended[1][name]) for name in ended[0])


@pytest.mark.parametrize(("left_out", "depth"), [("embeddings", 0), ("head", 4)])
def test_embeddings_and_head_can_be_left_out(left_out: str, depth: int) -> None:
    """Then they never train at all: the optimizer does not even know them."""
    model = get_model(tiny("bert"), {"full": {}, "lisa": {"period_steps": 1, left_out: False}})
    names = {n for n, _ in model.named_parameters() if depth_of(n) == depth}
    before = {n: t.detach().clone() for n, t in model.named_parameters()}
    loop = BareLoop(model, steps=6).run()
    known = {id(t) for group in loop.optimizer.param_groups for t in group["params"]}
    for name, tensor in model.named_parameters():
        assert (id(tensor) in known) == (name not in names)
        assert name not in names or torch.equal(tensor, before[name])
    assert loop.engine.run.depths == tuple(d for d in (4, 3, 2, 1, 0) if d != depth)


def test_a_fresh_head_left_out_is_told(caplog: pytest.LogCaptureFixture) -> None:
    get_model(tiny("bert"), {"lora": {}, "lisa": {"head": False}})
    assert "nothing will ever train it" in caplog.text
    caplog.clear()
    get_model(tiny("llama", "CAUSAL_LM"), {"full": {}, "lisa": {"head": False}})
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_under_trainer_and_session_with_accumulation(tmp_path: Any) -> None:
    """Optimizer steps count, not micro-batches; the draws are those of the run's own seed."""
    wanted = {}
    for seed in (1, 42):
        plugin = LISA(layers=1, period_steps=2)
        wanted[seed] = [on(plugin, run_at(step, blocks=3, seed=seed)) | {0, 4} for step in range(8)]
    method = {"full": {}, "lisa": {"layers": 1, "period_steps": 2}}
    in_a_trainer = in_trainer(get_model(tiny("bert"), method), tmp_path, steps=8, seed=1)
    in_a_session = in_session(get_model(tiny("bert"), method), steps=8)
    assert [set(rates) for rates in in_a_trainer] == wanted[1]
    assert [set(rates) for rates in in_a_session] == wanted[42]


@pytest.mark.parametrize("tuner", ["full", "lora", "ia3"])
def test_resumed_after_any_step_the_end_is_bit_identical(tuner: str) -> None:
    check_resume(lambda: get_model(tiny("bert"), {tuner: {}, "lisa": {"layers": 1, "period_steps": 3}}))


def test_with_a_thaw_it_trains_what_both_want() -> None:
    method = {"full": {}, "gradual_unfreeze": {"every": 3}, "lisa": {"layers": 2, "period_steps": 1}, "llrd": {}}
    model = get_model(tiny("bert"), method)
    loop = BareLoop(model, steps=15, optimizer=torch.optim.SGD, weight_decay=0.0, lr=0.1).run()
    plugin = model.peft_plus.plugins[1]
    for step, rates in enumerate(loop.rates):
        both = ({0, 4} | on(plugin, run_at(step, blocks=3))) & set(range(4 - step // 3, 5))
        assert set(rates) == both


def test_on_a_quantised_base_the_adapters_take_turns(tmp_path: Any) -> None:
    model = on_nf4({"lora": {"r": 4}, "lisa": {"layers": 1, "period_steps": 1}}, tmp_path)
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    loop = BareLoop(model, steps=8).run()
    assert {change.groups for change in model.peft_plus.timeline} == {
        frozenset({(depth, "adapter"), (4, "head")}) for depth in (1, 2, 3)
    }
    moved = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert moved == set(loop.engine.effects.tensors)


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tuner", "blocks"), [({"full": {}}, 3), ({"lora": {"layers_to_transform": [0, 2]}}, 2)])
def test_more_blocks_than_there_are_is_refused(tuner: dict[str, Any], blocks: int) -> None:
    with pytest.raises(ValueError, match=rf"layers={blocks + 1}: .* in {blocks} of the model's 3 blocks"):
        get_model(tiny("bert"), {**tuner, "lisa": {"layers": blocks + 1}})
    get_model(tiny("bert"), {**tuner, "lisa": {"layers": blocks}})


@pytest.mark.parametrize("settings", [{"layers": 0}, {"period_steps": 0}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(MethodError, match=rf"lisa.*peft-plus-freezing.*{name}=0"):
        get_model(tiny("bert"), {"lora": {}, "lisa": settings})


@pytest.mark.parametrize("tuner", ["linear_probe", "prompt_tuning"])
def test_a_tuner_without_layers_is_refused(tuner: str) -> None:
    with pytest.raises(MethodError, match=rf"lisa.*{tuner}"):
        get_model(tiny("bert"), [tuner, "lisa"])
