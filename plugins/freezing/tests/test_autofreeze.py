"""A table worked out by hand, and an independent count on real gradients, say from which block on training goes on."""

from __future__ import annotations

import re
import statistics
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from peft_plus import MethodError, Param, PluginError, Run, get_model
from peft_plus_freezing.autofreeze import AutoFreeze, changed, depth_norms, first_to_train
from peft_plus_freezing.sampled_elements import sampled
from tests.bare_loop import BareLoop, check_frozen_rests, check_resume, on_nf4
from tests.models import tiny
from tests.multipliers import in_session, in_trainer


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


# ---- by hand -------------------------------------------------------------------------------------------------------


class Four(nn.Module):
    """Four blocks of two numbers each, between embeddings and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ParameterList(nn.Parameter(torch.ones(2)) for _ in range(6))


def four(max_steps: int = 8) -> Run:
    params = tuple(Param(f"layer.{depth}", (2,), depth, "base") for depth in range(6))
    return Run(
        model=Four(),
        task=None,  # type: ignore[arg-type]
        num_blocks=4,
        params=params,
        depths=(5, 4, 3, 2, 1, 0),
        max_steps=max_steps,
    )


def finish_step(plugin: AutoFreeze, run: Run, gradients: dict[int, tuple[float, float] | None]) -> list[int]:
    """One more optimizer step; returns the depths that train after it."""
    for depth, tensor in enumerate(run.model.layer):  # type: ignore[arg-type]
        gradient = gradients.get(depth) if plugin.may_train(run, run.params[depth]) else None
        tensor.grad = None if gradient is None else torch.tensor(gradient, dtype=torch.float32)
    plugin.on_pre_optimizer_step(run)
    run.step += 1
    plugin.on_step_end(run)
    return [param.depth for param in run.params if plugin.may_train(run, param)]


HAND: list[tuple[list[dict[int, Any]], list[int]]] = [
    # Gradients of blocks 1 to 4 in two steps, and what trains afterwards.
    # Δ: (3,-1) 4      (0,2) 2       (5,5) 10      (1,0) 1: the first interval says nothing yet.
    (
        [{1: (1, 0), 2: (2, 2), 3: (4, 6), 4: (2, 0)}, {1: (2, -1), 2: (-2, 0), 3: (1, -1), 4: (-1, 0)}],
        [0, 1, 2, 3, 4, 5],
    ),
    # ‖Δ‖ 4.4: η .1    3: η .5       8: η .2       3: η 2: median .35, so it goes on from block 2.
    ([{1: (4, 0), 2: (3, 0), 3: (4, 0), 4: (3, 3)}, {1: (0, 0.4), 2: (0, 0), 3: (0, -4), 4: (0, -3)}], [2, 3, 4, 5]),
    # Frozen           3: η 0        12: η .5      6: η 1: median .5, so from block 3.
    ([{1: (9, 9), 2: (1, 1), 3: (6, 6), 4: (3, 0)}, {1: (9, 9), 2: (1, 0), 3: (0, 0), 4: (3, 0)}], [3, 4, 5]),
    # Frozen           Frozen        6: η .5       6: η 0: median .25, and it stays at block 3.
    ([{3: (3, 3), 4: (6, 0)}, {3: (0, 0), 4: (0, 0)}], [3, 4, 5]),
]


def test_the_table_worked_out_by_hand() -> None:
    """Signs cancel within an interval: what counts is the norm of the sum, not the sum of the norms."""
    plugin, run = AutoFreeze(interval_steps=2), four()
    for (first, second), trains in HAND:
        before = [param.depth for param in run.params if plugin.may_train(run, param)]
        assert finish_step(plugin, run, first) == before
        assert finish_step(plugin, run, second) == trains
    assert plugin.next_change(run) is NotImplemented
    finish_step(plugin, run, {3: (6, 0), 4: (1, 0)})
    assert finish_step(plugin, run, {}) == [4, 5]  # η 0 and .83
    assert plugin.next_change(run) is None


def test_the_parts_of_the_formula() -> None:
    params = four().params
    sums = {"layer.1": torch.tensor([3.0, -4.0]), "layer.2": torch.tensor([-1.0])}
    assert depth_norms(sums, params) == {1: 7.0, 2: 2.0}  # one element of two stands for both
    assert [changed(4, 3), changed(4, 6), changed(4, 0), changed(0, 0)] == [0.25, 0.5, 1.0, 0.0]
    scores = {1: 0.1, 2: 0.4, 3: 0.3, 4: 0.9}
    starts = [first_to_train(scores, percentile=p) for p in (0, 30, 33.4, 50, 66.6, 67, 100)]
    assert starts == [1, 2, 2, 2, 2, 4, 4]
    assert first_to_train({3: 0.0, 4: 0.0}, percentile=50) == 3


def test_the_threshold_is_numpys_percentile() -> None:
    draw = np.random.default_rng(0)
    for _ in range(200):
        scores = dict(enumerate(draw.random(draw.integers(1, 13)).tolist(), start=1))
        percentile = float(draw.integers(0, 101))
        limit = np.percentile(list(scores.values()), percentile)
        assert scores[first_to_train(scores, percentile=percentile)] >= limit - 1e-12
        assert all(scores[d] < limit for d in range(1, first_to_train(scores, percentile=percentile)))


def test_what_another_plugin_keeps_frozen_is_not_judged() -> None:
    """Nothing is frozen for good before it had a gradient in two whole intervals."""
    plugin, run = AutoFreeze(interval_steps=1), four()
    for _ in range(3):
        assert finish_step(plugin, run, {3: (1, 1), 4: (2, 2)}) == [0, 1, 2, 3, 4, 5]
    assert finish_step(plugin, run, {1: (1, 1), 2: (1, 1), 3: (1, 1), 4: (2, 2)}) == [0, 1, 2, 3, 4, 5]
    assert finish_step(plugin, run, {1: (1, 1), 2: (2, 2), 3: (1, 1), 4: (3, 3)}) == [2, 3, 4, 5]


@pytest.mark.parametrize("skipped", [False, True])
def test_a_second_run_starts_anew(skipped: bool) -> None:
    """Also where a gradient scaler leaves out its first update, so that nobody is told of the gradients."""
    plugin, run = AutoFreeze(interval_steps=2), four()
    for steps, _ in HAND:
        for gradients in steps:
            finish_step(plugin, run, gradients)
    again = four()
    assert all(plugin.may_train(again, param) for param in again.params)
    if skipped:
        again.step += 1
        plugin.on_step_end(again)
    else:
        finish_step(plugin, again, HAND[0][0][0])
    assert all(plugin.may_train(again, param) for param in again.params)
    assert set(plugin.sums) == (set() if skipped else {f"layer.{depth}" for depth in (1, 2, 3, 4)})
    assert not plugin.before


# ---- a sample of the elements ----------------------------------------------------------------------------------------


def test_a_sample_spreads_over_rows_and_columns_alike() -> None:
    places = sampled(torch.arange(768 * 3072).reshape(768, 3072), 4096).long()
    assert places.unique().numel() == 4096
    for line, number in ((places // 3072, 768), (places % 3072, 3072)):
        counts = torch.bincount(line * 64 // number, minlength=64)
        assert counts.min() >= 48  # 64 would be perfectly even
        assert counts.max() <= 80
    small = torch.randn(3, 5)
    assert torch.equal(sampled(small, 15), small.flatten())
    assert sampled(small, 15).data_ptr() != small.data_ptr()


def test_the_norm_of_a_sample_is_close_to_the_whole() -> None:
    """By the laws of sampling: √(π/2 − 1) / √4096 = 1.2 % for one normal tensor."""
    errors = []
    for seed in range(20):
        whole = torch.randn(300, 400, generator=torch.Generator().manual_seed(seed))
        estimate = depth_norms({"w": sampled(whole, 4096)}, [Param("w", (300, 400), 1, "base")])[1]
        errors.append(estimate / float(whole.abs().sum()) - 1)
    assert abs(statistics.mean(errors)) < 0.01
    assert statistics.pstdev(errors) < 0.02


# ---- a run, counted by someone else ----------------------------------------------------------------------------------


def block_of(name: str) -> int:
    found = re.search(r"\.layer\.(\d+)\.", name)
    return int(found[1]) + 1 if found else 0


class Count:
    """Sums whole gradients and finds the start as the paper's code does, from the names alone."""

    def __init__(self, interval: int, blocks: int) -> None:
        self.interval, self.blocks = interval, blocks
        self.sums: dict[str, Tensor] = {}
        self.before: dict[int, float] = {}
        self.start, self.steps, self.starts = 1, 0, [1]

    def step(self, model: nn.Module) -> None:
        for name, tensor in model.named_parameters():
            if block_of(name) and tensor.grad is not None:
                self.sums[name] = self.sums.get(name, 0) + tensor.grad.clone()
        self.steps += 1
        if self.steps % self.interval == 0:
            now = dict.fromkeys(range(1, self.blocks + 1), 0.0)
            for name, total in self.sums.items():
                now[block_of(name)] += torch.norm(total, p=1).item()
            if self.before:
                ratios = {d: abs(self.before[d] - now[d]) / self.before[d] for d in range(self.start, self.blocks + 1)}
                limit = np.percentile(list(ratios.values()), 50)
                self.start = min(d for d, ratio in ratios.items() if ratio >= limit)
            self.before, self.sums = now, {}
        self.starts.append(self.start)


class Counting(TrainerCallback):
    def __init__(self, count: Count) -> None:
        self._count = count

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self._count.step(model)


def depths_from(starts: list[int], blocks: int, all_depths: list[int]) -> list[set[int]]:
    return [{d for d in all_depths if start == 1 or d >= start} for start in starts[:-1]]


DEEP = {"num_hidden_layers": 6}


@pytest.mark.parametrize("tuner", ["full", "lora", "ia3"])
def test_it_trains_from_where_the_papers_count_says(tuner: str, tmp_path: Any) -> None:
    model = get_model(tiny("bert", **DEEP), {tuner: {}, "autofreeze": {"interval_steps": 1}})
    depths = sorted({param.depth for param in model.peft_plus.params.values()})
    count = Count(1, 6)
    rates = in_trainer(model, tmp_path, Counting(count), steps=12, optim="adamw_torch", lr=1e-3)
    assert count.start > 1
    assert [set(found) - {0} for found in rates] == [found - {0} for found in depths_from(count.starts, 6, depths)]
    trained = [(change.step, min(d for d, _ in change.groups)) for change in model.peft_plus.timeline]
    starts = depths_from(count.starts, 6, depths)
    wanted = [(s, min(starts[s])) for s in range(12) if s == 0 or starts[s] != starts[s - 1]]
    assert trained == wanted


def test_in_a_session_with_accumulation_it_freezes_for_good() -> None:
    model = get_model(tiny("bert", **DEEP), {"full": {}, "autofreeze": {"interval_fraction": 0.1}})
    rates = in_session(model, steps=20)
    lowest = [min(found) for found in rates]
    assert lowest == sorted(lowest)
    assert lowest[:4] == [0] * 4  # two intervals of two steps
    assert lowest[-1] > 1


def test_what_is_frozen_stands_still_and_takes_no_memory() -> None:
    model = get_model(tiny("bert", **DEEP), {"full": {}, "autofreeze": {"interval_steps": 1}})
    loop = BareLoop(model, steps=10)
    assert {0, 1} <= check_frozen_rests(loop)


def test_its_memory_is_a_sample_of_each_tensor() -> None:
    model = get_model(tiny("bert"), {"full": {}, "autofreeze": {"interval_steps": 3, "sampled_elements": 50}})
    loop = BareLoop(model, steps=8)
    loop.step()
    sums = model.peft_plus.plugins[0].sums
    blocks = {n: t for n, t in loop.engine.effects.tensors.items() if ".layer." in n}
    assert {name: part.numel() for name, part in sums.items()} == {n: min(50, t.numel()) for n, t in blocks.items()}


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_resumed_after_any_step_the_end_is_bit_identical(tuner: str) -> None:
    method = {tuner: {}, "autofreeze": {"interval_steps": 2}}
    whole = check_resume(lambda: get_model(tiny("bert", **DEEP), method), lr=3e-3)
    assert whole.model.peft_plus.plugins[0].lowest > 1


def test_percentile_zero_is_the_plain_run_bit_for_bit() -> None:
    method = {"full": {}, "autofreeze": {"percentile": 0.0, "interval_steps": 1}}
    ended = [BareLoop(get_model(tiny("bert"), m), steps=6).run().model.state_dict() for m in ({"full": {}}, method)]
    assert all(torch.equal(ended[0][name], ended[1][name]) for name in ended[0])


def test_with_a_thaw_and_another_rate() -> None:
    """It judges once everything is thawed; until then, nothing is frozen for good."""
    method = {"full": {}, "gradual_unfreeze": {"every": 1}, "autofreeze": {"interval_steps": 2}, "llrd": {"decay": 0.9}}
    loop = BareLoop(get_model(tiny("bert"), method), steps=14, optimizer=torch.optim.SGD, lr=0.1, weight_decay=0).run()
    lowest = [min(rates) for rates in loop.rates]
    assert lowest[:8] == [4, 3, 2, 1, 0, 0, 0, 0]  # block 1 is there from step 4 on: intervals 4–5 and 6–7
    assert lowest[8:] == sorted(lowest[8:])
    assert loop.rates[3][1] == pytest.approx(0.9**3, rel=1e-2)


def test_on_a_quantised_base_it_judges_the_adapters(tmp_path: Any) -> None:
    model = on_nf4({"lora": {"r": 4}, "autofreeze": {"interval_steps": 1}}, tmp_path)
    loop = BareLoop(model, steps=6).run()
    assert model.peft_plus.plugins[0].lowest > 1
    assert loop.engine.run.depths == (4, 3, 2, 1)


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"percentile": 101.0}, "percentile=101"),
        ({"percentile": float("nan")}, "percentile=nan"),
        ({"interval_fraction": 0.5}, "interval_fraction=0.5"),
        ({"interval_fraction": 0.0}, "interval_fraction=0"),
        ({"interval_steps": 0}, "interval_steps=0"),
        ({"interval_steps": 5, "interval_fraction": 0.2}, "give one"),
        ({"sampled_elements": 0}, "sampled_elements=0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoFreeze(**settings)
    with pytest.raises(MethodError, match=rf"autofreeze.*peft-plus-freezing.*{message}"):
        get_model(tiny("bert"), {"lora": {}, "autofreeze": settings})


def test_a_run_that_ends_before_anything_could_freeze_is_refused() -> None:
    model = get_model(tiny("bert"), {"lora": {}, "autofreeze": {"interval_steps": 3}})
    with pytest.raises(PluginError, match=r"'autofreeze' .*interval is 3 steps .* run has 6. Give interval_steps=2 at"):
        BareLoop(model, steps=6)
    BareLoop(model, steps=7)
    model = get_model(tiny("bert"), {"lora": {}, "autofreeze": {}})
    with pytest.raises(PluginError, match=r"'autofreeze' .*interval is 1 step .* run has 2. Give it three steps"):
        BareLoop(model, steps=2)
    BareLoop(model, steps=3)


def test_beside_lisa_it_is_refused() -> None:
    with pytest.raises(MethodError, match=r"autofreeze.*lisa"):
        get_model(tiny("bert"), ["lora", "autofreeze", "lisa"])


@pytest.mark.parametrize("tuner", ["linear_probe", "prompt_tuning"])
def test_a_tuner_without_layers_is_refused(tuner: str) -> None:
    with pytest.raises(MethodError, match=rf"autofreeze.*{tuner}"):
        get_model(tiny("bert"), [tuner, "autofreeze"])
