"""Scripted plasticities, models that stand still and a count of its own say which block is frozen when."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from peft_plus import MethodError, Param, PluginError, Run, get_model
from peft_plus.stage_start import run_at_start
from peft_plus_freezing import plasticity_freeze
from peft_plus_freezing.plasticity_freeze import PlasticityFreeze, similarity_loss, slope
from tests.bare_loop import BareLoop, check_frozen_rests, check_resume, on_nf4
from tests.models import batch, tiny
from tests.multipliers import in_session, in_trainer

QUICK = {"every": 1, "window": 2, "patience": 2}
DEEP = {"num_hidden_layers": 5}


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


# ---- the formula ---------------------------------------------------------------------------------------------------


def test_a_similarity_loss_worked_out_by_hand() -> None:
    """G = I against G̃' = [[1, 1], [1, 2]] with rows divided by √2 and √5."""
    one, other = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    by_hand = ((1 - 2**-0.5) ** 2 + 0.5 + 0.2 + (1 - 2 * 5**-0.5) ** 2) / 4
    assert similarity_loss(one, other) == pytest.approx(by_hand, rel=1e-6)
    assert by_hand == pytest.approx((4 - 2**0.5 - 4 / 5**0.5) / 4)
    assert similarity_loss(one, one) == 0


@pytest.mark.parametrize("shape", [(2, 3), (5, 4, 6), (3, 2, 4, 4)])
def test_it_is_that_of_the_paper(shape: tuple[int, ...]) -> None:
    one, other = torch.randn(shape), torch.randn(shape)
    grams = []
    for activations in (one, other):
        flat = activations.double().numpy().reshape(shape[0], -1)
        gram = np.zeros((shape[0], shape[0]))
        for i in range(shape[0]):
            for j in range(shape[0]):
                gram[i, j] = flat[i] @ flat[j]
        grams.append(gram / np.sqrt((gram**2).sum(axis=1, keepdims=True)))
    expected = np.linalg.norm(grams[0] - grams[1]) ** 2 / shape[0] ** 2
    assert similarity_loss(one, other) == pytest.approx(expected, rel=1e-5)
    assert similarity_loss(one * 3, other) == pytest.approx(expected, rel=1e-5), "the scale of a model's output is free"


def test_the_slope_is_numpys() -> None:
    draw = np.random.default_rng(0)
    for length in (2, 3, 10):
        values = draw.normal(size=length).tolist()
        assert slope(values) == pytest.approx(np.polyfit(range(length), values, 1)[0])
    assert slope([3.0, 3.0, 3.0]) == 0


# ---- scripted ------------------------------------------------------------------------------------------------------


class Scripted(Run):
    """Blocks put out rows that only a script compares."""

    def hidden(self, batch: Any, depth: int, weights: Any = None) -> Tensor:
        assert weights is None or set(weights) == set(self.params_to(depth))
        return torch.zeros(2, 1, 1)

    def params_to(self, depth: int) -> list[str]:
        plugin = self.model.plugin
        return [p.name for p in self.params if plugin.lowest <= p.depth <= depth]  # type: ignore[union-attr]


class Model(nn.Module):
    def __init__(self, plugin: PlasticityFreeze) -> None:
        super().__init__()
        self.layer = nn.ParameterList(nn.Parameter(torch.ones(2)) for _ in range(6))
        object.__setattr__(self, "plugin", plugin)

    def forward(self, x: Tensor) -> None:
        raise AssertionError


def scripted(plugin: PlasticityFreeze, *, head: bool = True) -> Scripted:
    """Four blocks of one parameter each, between embeddings and, if it trains, a head."""
    depths = range(6 if head else 5)
    model = Model(plugin)
    return Scripted(
        model=model,
        task=None,  # type: ignore[arg-type]
        num_blocks=4,
        params=tuple(Param(f"layer.{depth}", (2,), depth, "base") for depth in depths),
        depths=tuple(reversed(depths)),
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        batch={"x": torch.zeros(2)},
    )


def lowest_after(plugin: PlasticityFreeze, run: Run, monkeypatch: Any, values: Sequence[float]) -> list[int]:
    """The lowest depth that trains after each measurement; the first of a block only takes the reference."""
    script = iter(values)
    monkeypatch.setattr(plasticity_freeze, "similarity_loss", lambda one, other: next(script))
    found = []
    for _ in range(50):
        run.step += 1
        try:
            plugin.on_step_end(run)
        except StopIteration:
            break
        found.append(min(param.depth for param in run.params if plugin.may_train(run, param)))
    return found


BY_HAND = [
    # Averages 4, 3, 1.5, 1, 1: slopes −1, −1.5, −.5. The third is at most half the second.
    ({"tolerance": 0.5, "patience": 1}, [4, 2, 1, 1, 1], [0, 0, 0, 0, 2, 2]),
    # It takes two of them in a row: −.5, 0.
    ({"tolerance": 0.5, "patience": 2}, [4, 2, 1, 1, 1], [0, 0, 0, 0, 0, 2]),
    # Averages 4, 3, 2, 3, 4, 4: a rise is as steep as a fall, so only the last is flat.
    ({"tolerance": 0.5, "patience": 1}, [4, 2, 2, 4, 4, 4], [0, 0, 0, 0, 0, 0, 2]),
    # A steep one in between starts the count anew. Averages 4, 2, 0, 0, 1, 2, 2, 2.
    ({"tolerance": 0.2, "patience": 2}, [4, 0, 0, 0, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0, 0, 0, 2]),
    # Three blocks that never change: the first needs window + patience − 1 = 2 measurements after its reference, as
    # do the others, whose reference is taken when the one before freezes. The head keeps training.
    ({"tolerance": 0.0, "patience": 1}, [0] * 9, [0, 0, 2, 2, 3, 3, 4, 4, 5]),
    # The second block is measured by the steepest slope of the first, 2: averages 6, 4, 4 and 1, 1.25.
    ({"tolerance": 0.2, "patience": 1}, [6, 2, 6, 1, 1.5], [0, 0, 0, 2, 2, 3]),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "values", "expected"), BY_HAND)
def test_series_worked_out_by_hand(
    settings: dict[str, Any], values: list[float], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = PlasticityFreeze(every=1, window=2, **settings)
    assert lowest_after(plugin, scripted(plugin), monkeypatch, values)[: len(expected)] == expected


@pytest.mark.parametrize(("head", "last"), [(True, 5), (False, 4)])
def test_the_topmost_depth_trains_to_the_end(head: bool, last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = PlasticityFreeze(**QUICK)
    run = scripted(plugin, head=head)
    monkeypatch.setattr(plasticity_freeze, "similarity_loss", lambda one, other: 0.0)
    for _ in range(100):
        run.step += 1
        plugin.on_step_end(run)
    assert plugin.lowest == last
    assert not plugin.reference, "nothing is kept for nothing"


def test_a_reference_serves_as_long_as_refresh_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of step s hold the number s."""
    plugin = PlasticityFreeze(every=2, window=6, patience=99, refresh=3)
    run = scripted(plugin)
    compared = []

    def hidden(batch: Any, depth: int, weights: Any = None) -> Tensor:
        if weights is not None:
            compared.append((run.step, {name: int(weight[0]) for name, weight in weights.items()}))
        return torch.zeros(2, 1, 1)

    monkeypatch.setattr(run, "hidden", hidden)
    for step in range(1, 17):
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.fill_(step)
        run.step = step
        plugin.on_step_end(run)
    ages = [
        (step, {"layer.0": old, "layer.1": old})
        for step, old in zip(range(4, 17, 2), (2, 2, 2, 8, 8, 8, 14), strict=True)
    ]
    assert compared == ages


def test_every_process_decides_by_the_mean_of_all_that_have_two_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = PlasticityFreeze(**QUICK)
    run = scripted(plugin)
    monkeypatch.setattr(plasticity_freeze, "similarity_loss", lambda one, other: 3.0)
    others = iter([5.0, 1.0, 0.0, 0.0])  # what another process measured, and whether it could
    monkeypatch.setattr(run, "mean", lambda value: (value + next(others)) / 2)
    for _ in range(3):
        run.step += 1
        plugin.on_step_end(run)
    assert plugin.measured == [4.0, 3.0]


def test_batches_of_one_row_are_left_out_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plugin = PlasticityFreeze(**QUICK)
    run = scripted(plugin)
    monkeypatch.setattr(run, "hidden", lambda *args, **kwargs: torch.zeros(1, 1, 1))
    for _ in range(20):
        run.step += 1
        plugin.on_step_end(run)
    assert plugin.lowest == 0
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    assert "Step 2: a micro-batch of one row" in caplog.text


def rate(run: Run, value: float) -> None:
    run.optimizer.param_groups[0]["lr"] = value  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("fraction", "rates", "expected"),
    [
        # Frozen at step 4 (a reference, and window + patience − 1 measurements), the next one at 7, all at rate 1.
        (0.1, [1.0] * 8 + [0.5] + [0.1] * 5, [0, 0, 0, 2, 2, 2, 3, 3, 3, 0, 0, 0, 2, 2]),
        (0.5, [1.0] * 8 + [0.5] + [0.1] * 5, [0, 0, 0, 2, 2, 2, 3, 3, 0, 0, 0, 2, 2, 2]),
        (None, [1.0] * 8 + [1e-9] * 6, [0, 0, 0, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5]),
        (0.1, [1e-9] * 3 + [1e-3] * 5 + [1e-3 * 0.1] * 2, [0, 0, 0, 2, 2, 2, 3, 3, 0, 0]),
    ],
)
def test_everything_thaws_once_the_rate_has_fallen_far_enough_since_the_first_freeze(
    fraction: float | None, rates: list[float], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = PlasticityFreeze(**QUICK, thaw_lr_fraction=fraction)
    run = scripted(plugin)
    monkeypatch.setattr(plasticity_freeze, "similarity_loss", lambda one, other: 0.0)
    found = []
    for value in rates:
        rate(run, value)
        run.step += 1
        plugin.on_step_end(run)
        found.append(plugin.lowest)
    assert found == expected


def test_an_optimizer_with_a_rate_of_its_own_never_thaws(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = PlasticityFreeze(**QUICK)
    run = scripted(plugin)
    rate(run, None)  # type: ignore[arg-type]
    assert max(lowest_after(plugin, run, monkeypatch, [0.0] * 9)) == 4


def test_a_second_run_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = PlasticityFreeze(**QUICK)
    found = lowest_after(plugin, scripted(plugin), monkeypatch, [0.0] * 4)
    again = scripted(plugin)
    assert plugin.lowest == 2
    assert all(plugin.may_train(again, param) for param in again.params)
    assert lowest_after(plugin, again, monkeypatch, [0.0] * 4) == found


# ---- on models -----------------------------------------------------------------------------------------------------


def test_a_model_that_stands_still_has_plasticity_zero_and_freezes_block_by_block() -> None:
    model: Any = get_model(tiny("bert", **DEEP), {"full": {}, "plasticity_freeze": {"every": 2, "window": 3}})
    plan = model.peft_plus
    plugin: PlasticityFreeze = plan.plugins[0]
    run = run_at_start(plan, model, plan.stages[0])
    run.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.train()
    found, logged = [], []
    for step in range(1, 60):
        run.step, run.batch = step, batch("bert", seed=step)
        plugin.on_step_end(run)
        found.append(plugin.lowest)
        logged.append(run.logged.pop("plasticity", None))
    assert {value for value in logged if value is not None} == {0.0}
    # A reference at step 2, then window + patience − 1 = 7 measurements to each block.
    assert [step for step in range(1, 59) if found[step] != found[step - 1]] == [15, 29, 43, 57]
    assert found[-1] == 5
    assert all(module.training for module in model.modules()), "measuring left the model as it was"


def test_padding_says_nothing() -> None:
    model: Any = get_model(tiny("bert"), ["full", "plasticity_freeze"])
    plan = model.peft_plus
    plugin: PlasticityFreeze = plan.plugins[0]
    run = run_at_start(plan, model, plan.stages[0])
    run.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    short, found = batch("bert"), []
    longer = {n: nn.functional.pad(x, (0, 7)) if x.dim() > 1 else x for n, x in short.items()}
    for rows in (short, longer):
        plugin._thaw()
        plugin.steps, run.step, run.batch = 19, 20, rows
        plugin.on_step_end(run)
        before = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        run.step = 40
        plugin.on_step_end(run)
        found += plugin.measured
        model.load_state_dict(before)
    assert found[0] > 1e-4
    assert found[1] == pytest.approx(found[0], rel=1e-4)


class Count:
    """Measures whole models by hooks of its own, and decides by the paper's rule."""

    def __init__(self, model: Any, *, window: int, patience: int, tolerance: float) -> None:
        self.blocks = model.get_base_model().bert.encoder.layer if hasattr(model, "get_base_model") else None
        self.blocks = self.blocks or model.bert.encoder.layer
        self.window, self.patience, self.tolerance = window, patience, tolerance
        self.front, self.steepest = 0, 0.0
        self.starts: list[int] = [0]
        self.old: Any = None

    def output(self, model: Any, rows: Any) -> Tensor:
        kept = []
        handle = self.blocks[self.front].register_forward_hook(lambda m, a, output: kept.append(output))
        modes = [module.training for module in model.modules()]
        with torch.no_grad():
            model.eval()(**rows)
        handle.remove()
        for module, mode in zip(model.modules(), modes, strict=True):
            module.training = mode
        hidden = kept[0] if isinstance(kept[0], Tensor) else kept[0][0]
        return hidden * rows["attention_mask"][..., None]

    def step(self, model: Any, rows: Any) -> None:
        if self.front == len(self.blocks):
            self.starts.append(self.starts[-1])
            return
        now = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if self.old is None:
            self.values: list[float] = []
            self.means: list[float] = []
            self.flat = 0
        else:
            outputs = [self.output(model, rows)]
            model.load_state_dict(self.old)
            outputs.append(self.output(model, rows))
            model.load_state_dict(now)
            grams = [(o.flatten(1) @ o.flatten(1).T) for o in outputs]
            grams = [gram / gram.norm(dim=1, keepdim=True) for gram in grams]
            self.values.append(float((grams[0] - grams[1]).pow(2).sum()) / len(grams[0]) ** 2)
            self.means.append(float(np.mean(self.values[-self.window :])))
            if len(self.means) >= self.window:
                steep = abs(np.polyfit(range(self.window), self.means[-self.window :], 1)[0])
                self.steepest = max(self.steepest, steep)
                self.flat = self.flat + 1 if steep <= self.tolerance * self.steepest else 0
                if self.flat == self.patience:
                    self.front += 1
                    self.values, self.means, self.flat = [], [], 0
        self.old = now
        self.starts.append(self.front + 1 if self.front else 0)


class Counting(TrainerCallback):
    """Looks at the micro-batch that the model saw last in each step."""

    def __init__(self, model: nn.Module, count: Count) -> None:
        self._count, self._rows = count, {}
        self._hook = model.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled():
            self._rows = dict(kwargs)

    def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
        self._count.step(model, self._rows)


SETTINGS = {"every": 1, "window": 2, "patience": 1, "tolerance": 0.6}


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_it_trains_from_where_a_count_of_its_own_says(tuner: str, tmp_path: Any) -> None:
    model: Any = get_model(tiny("bert", **DEEP), {tuner: {}, "plasticity_freeze": SETTINGS})
    count = Count(model, window=2, patience=1, tolerance=0.6)
    settings = {"optim": "adamw_torch", "lr": 3e-3, "lr_scheduler_type": "constant"}
    rates = in_trainer(model, tmp_path, Counting(model, count), steps=14, **settings)
    assert count.starts[-1] > 2
    depths = sorted({param.depth for param in model.peft_plus.params.values()})
    wanted = [{depth for depth in depths if depth >= start} for start in count.starts[:-1]]
    assert [set(found) - {0} for found in rates] == [found - {0} for found in wanted]


@pytest.mark.parametrize("loop", ["trainer", "session"])
def test_it_freezes_in_every_loop(loop: str, tmp_path: Any) -> None:
    model: Any = get_model(tiny("bert", **DEEP), {"lora": {}, "plasticity_freeze": SETTINGS})
    if loop == "trainer":
        settings = {"activation_checkpointing": True, "lr_scheduler_type": "constant"}
        rates = in_trainer(model, tmp_path, steps=14, optim="sgd", lr=0.3, **settings)
    else:
        rates = in_session(model, steps=14, lr=0.3)
    lowest = [min(found) for found in rates]
    assert lowest == sorted(lowest)
    assert lowest[0] == 1
    assert lowest[-1] > 2


def test_a_linear_schedule_thaws_near_its_end(tmp_path: Any) -> None:
    model: Any = get_model(tiny("bert", **DEEP), {"full": {}, "plasticity_freeze": {**QUICK, "tolerance": 0.9}})
    in_trainer(model, tmp_path, steps=40, optim="adamw_torch", lr=1e-3, lr_scheduler_type="linear")
    starts = [(change.step, min(depth for depth, _ in change.groups)) for change in model.peft_plus.timeline]
    thaws = [step for step, lowest in starts[1:] if lowest == 0]
    assert len(thaws) == 1
    first = starts[1][0]
    assert (40 - thaws[0]) / (40 - first) <= 0.1 < (41 - thaws[0]) / (40 - first)


def test_what_is_frozen_stands_still_and_takes_no_memory() -> None:
    model: Any = get_model(tiny("bert", **DEEP), {"full": {}, "plasticity_freeze": SETTINGS})
    loop = BareLoop(model, steps=16)
    params, plugin = model.peft_plus.params, model.peft_plus.plugins[0]

    def look() -> None:
        depths = {params[name].depth for name in plugin.reference}
        assert all(plugin.lowest <= depth <= plugin.front for depth in depths), "one block's weights"

    assert {0, 1} <= check_frozen_rests(loop, look)


@pytest.mark.parametrize(("tuner", "refresh"), [("full", 1), ("lora", 2)])
def test_resumed_after_any_step_the_end_is_bit_identical(tuner: str, refresh: int) -> None:
    method = {tuner: {}, "plasticity_freeze": {**SETTINGS, "refresh": refresh}}
    whole = check_resume(lambda: get_model(tiny("bert", **DEEP), method), lr=3e-3)
    plugin: Any = whole.model.peft_plus.plugins[0]
    assert plugin.lowest > 1


def test_measuring_changes_nothing_as_long_as_nothing_freezes() -> None:
    """Not even the random draws of dropout."""
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    method = {"full": {}, "plasticity_freeze": {**QUICK, "tolerance": 0.0}}
    ended = []
    for one in ({"full": {}}, method):
        torch.manual_seed(0)
        ended.append(BareLoop(get_model(tiny("bert", **dropout), one), steps=6).run().model.state_dict())
    assert all(torch.equal(ended[0][name], ended[1][name]) for name in ended[0])


def test_a_block_that_another_plugin_keeps_frozen_is_not_judged() -> None:
    """It stands still, which says nothing."""
    method = {"full": {}, "gradual_unfreeze": {"every": 4}, "plasticity_freeze": {**SETTINGS, "tolerance": 0.9}}
    model: Any = get_model(tiny("bert"), method)
    loop = BareLoop(model, steps=26)
    plugin = next(plugin for plugin in model.peft_plus.plugins if plugin.name == "plasticity_freeze")
    while loop.finished < 12:  # block 1 thaws at step 12
        loop.step()
        assert (plugin.front, plugin.lowest) == (0, 0)
    while loop.finished < loop.steps:
        loop.step()
    assert plugin.lowest >= 2


def test_on_a_quantised_base_it_judges_what_the_adapters_make_of_it(tmp_path: Any) -> None:
    model = on_nf4({"lora": {"r": 4}, "plasticity_freeze": SETTINGS}, tmp_path)
    BareLoop(model, steps=14).run()
    assert model.peft_plus.plugins[0].lowest > 1


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "every=0: give a number ≥ 1"),
        ({"window": 1}, "window=1: give a number ≥ 2"),
        ({"patience": 0}, "patience=0"),
        ({"refresh": 0}, "refresh=0"),
        ({"window": 5, "refresh": 2}, "window=5, refresh=2"),
        ({"tolerance": 1.0}, "tolerance=1.0"),
        ({"tolerance": float("nan")}, "tolerance=nan"),
        ({"thaw_lr_fraction": 1.0}, "thaw_lr_fraction=1.0"),
        ({"thaw_lr_fraction": 0.0}, "thaw_lr_fraction=0.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlasticityFreeze(**settings)
    with pytest.raises(MethodError, match=rf"plasticity_freeze.*peft-plus-freezing.*{message}"):
        get_model(tiny("bert"), {"lora": {}, "plasticity_freeze": settings})


def test_a_run_too_short_to_freeze_anything_is_refused() -> None:
    model = get_model(tiny("bert"), {"lora": {}, "plasticity_freeze": {"every": 2, "window": 2, "patience": 1}})
    with pytest.raises(PluginError, match=r"nothing can freeze before step 6, and this run has 6 steps"):
        BareLoop(model, steps=6)
    BareLoop(model, steps=7)


def test_batches_of_one_row_are_refused(tmp_path: Any) -> None:
    model = get_model(tiny("bert"), {"lora": {}, "plasticity_freeze": QUICK})
    with pytest.raises(PluginError, match="batches have one row: give two"):
        in_trainer(model, tmp_path, steps=8, per_device_train_batch_size=1)


def test_an_encoder_decoder_is_refused_when_it_is_built() -> None:
    with pytest.raises(MethodError, match=r"plasticity_freeze.*encoder-decoder has two at each depth"):
        get_model(tiny("t5", "SEQ_2_SEQ_LM"), ["lora", "plasticity_freeze"])


def test_a_batch_that_is_not_the_models_is_named() -> None:
    plugin = PlasticityFreeze(**QUICK)
    run = scripted(plugin)
    run.batch, run.step = {"prompt": torch.zeros(2)}, 1
    plugin.on_step_end(run)
    run.step = 2
    with pytest.raises(ValueError, match=r"the batch \(prompt\) holds none of the model's arguments"):
        plugin.on_step_end(run)


def test_beside_lisa_it_is_refused() -> None:
    with pytest.raises(MethodError, match=r"plasticity_freeze.*lisa"):
        get_model(tiny("bert"), ["lora", "plasticity_freeze", "lisa"])


@pytest.mark.parametrize("tuner", ["linear_probe", "prompt_tuning"])
def test_a_tuner_without_layers_is_refused(tuner: str) -> None:
    with pytest.raises(MethodError, match=rf"plasticity_freeze.*{tuner}"):
        get_model(tiny("bert"), [tuner, "plasticity_freeze"])
