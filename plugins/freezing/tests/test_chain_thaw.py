"""Chain-thaw: the order of the stages, their rates, and the best weights at each stage's end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import default_data_collator

import peft_plus
from peft_plus import MethodError, get_model
from peft_plus_freezing.chain_thaw import order
from tests.bare_loop import BareLoop, on_nf4
from tests.evaluated_loop import EvaluatedLoop, changed, check_evaluated_resume, weights
from tests.models import tiny
from tests.multipliers import in_session, in_trainer, rows_of
from tests.test_effects import depth_of
from tests.training import quiet


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def thawing(tuner: str = "full", **settings: Any) -> Any:
    return get_model(tiny("bert"), {tuner: {}, "chain_thaw": settings})


def depths(names: set[str]) -> set[int]:
    return {depth_of(name, 3) for name in names}


STAGES = [{4}, {0}, {1}, {2}, {3}, {0, 1, 2, 3, 4}]


@pytest.mark.parametrize(
    ("depths", "stages"),
    [
        ((4, 3, 2, 1, 0), [[4], [0], [1], [2], [3], [4, 3, 2, 1, 0]]),
        ((4, 3, 2, 1), [[4], [1], [2], [3], [4, 3, 2, 1]]),  # adapters: nothing in the embeddings
        ((3, 2, 1), [[3], [1], [2], [3, 2, 1]]),  # no head: the last block comes first
        ((4, 2), [[4], [2], [4, 2]]),
    ],
)
def test_the_order_is_last_first_to_penultimate_all(depths: tuple[int, ...], stages: list[list[int]]) -> None:
    assert order(depths) == stages


def test_what_rests_in_a_stage_stays_to_the_bit() -> None:
    loop = EvaluatedLoop(thawing(steps=2), steps=14).run()
    stages = [*(stage for stage in STAGES for _ in range(2)), STAGES[-1], STAGES[-1]]  # the last one goes on
    assert [depths(moved) for moved in loop.moved] == stages
    changes = [(change.step, {depth for depth, _ in change.groups}) for change in loop.model.peft_plus.timeline]
    assert changes == [(2 * i, stage) for i, stage in enumerate(STAGES)]


@pytest.mark.parametrize("tuner", ["lora", "ia3"])
@pytest.mark.parametrize("train", ["trainer", "session"])
def test_the_rate_is_that_of_the_run_first_and_a_tenth_later(tuner: str, train: str, tmp_path: Any) -> None:
    model = thawing(tuner, steps=1).double()  # tiny gradients: in fp32 their updates are lost in rounding
    if train == "trainer":
        rates = in_trainer(model, tmp_path, steps=5, lr_scheduler_type="constant")
    else:
        rates = in_session(model, steps=5)
    assert [set(found) for found in rates] == [{4}, {1}, {2}, {3}, {1, 2, 3, 4}]
    factors = [factor for found in rates for factor in found.values()]
    assert factors == pytest.approx([1.0] + [0.1] * 7, rel=1e-6)


def test_a_stage_ends_when_the_metric_stalls_with_its_best_weights_and_the_last_ends_the_run() -> None:
    """Patience 2. An improvement sets the counter back: torchMoji's is not, and would end the first stage at 4."""
    values = [1.0, 1.1, 0.9, 0.95, 0.95]  # the head: best at 3, ends at 5
    values += [0.8, 0.85, 0.85]  # embeddings: best at 6, ends at 8
    values += [0.9, 0.9]  # block 1 does not beat 0.8: back to where it began, ends at 10
    values += [0.7, 0.6, 0.65, 0.7]  # block 2: best at 12, ends at 14
    values += [0.6, 0.6]  # block 3: equal is no improvement, ends at 16
    values += [0.5, 0.55, 0.5]  # all: best at 17, ends at 19
    script = dict(enumerate(values, start=1))
    loop = EvaluatedLoop(thawing(patience=2), steps=40, values=script)
    seen = {}
    while not loop.engine.stopped:
        loop.step()
        seen[loop.finished] = weights(loop.model)
    ends, bests = [5, 8, 10, 14, 16, 19], [3, 6, 6, 12, 12, 17]
    assert loop.finished == ends[-1]
    bounds = [0, *ends]
    for stage, begin, end, best in zip(STAGES, bounds, ends, bests, strict=False):
        assert [depths(moved) for moved in loop.moved[begin:end]] == [stage] * (end - begin)
        assert not changed(seen[end], loop.measured[best]), f"the stage that ended at {end}"
    assert changed(loop.measured[19], seen[19])


def test_the_best_of_another_stage_is_not_taken_where_no_value_is_a_number() -> None:
    nan = float("nan")
    loop = EvaluatedLoop(thawing(patience=1), steps=3, values={1: nan, 2: nan})
    for step in (1, 2):
        loop.step()
        assert not changed(loop.measured[step], weights(loop.model))


def test_state_of_what_rests_is_dropped() -> None:
    loop = EvaluatedLoop(thawing(steps=1), steps=7)
    held = []
    for _ in range(7):
        loop.step()
        held.append(depths(loop.held()))
    assert held == [*STAGES, STAGES[-1]]
    assert {int(state["step"]) for state in loop.optimizer.state.values()} == {2, 3}  # block 3 came right before


def test_resumed_after_any_step_the_end_is_bit_identical() -> None:
    values = {1: 1.0, 2: 1.0, 4: 0.5, 5: 0.6, 6: 0.4, 7: 0.5, 8: 0.5, 9: 0.5, 10: 0.3, 11: 0.4}
    whole = check_evaluated_resume(lambda: thawing(patience=1), steps=20, values=values)
    assert whole.finished == 11


def test_under_a_trainer_it_ends_by_itself(tmp_path: Any) -> None:
    scores = iter([0.5, 0.4, 0.6, 0.5, 0.4, 0.3, 0.9, 0.8])
    model = thawing("lora", metric="score", patience=1)
    trainer = peft_plus.Trainer(
        model,
        quiet(tmp_path, eval_strategy="steps", eval_steps=1, max_steps=30),
        train_dataset=rows_of(40),
        eval_dataset=rows_of(4),
        data_collator=default_data_collator,
        compute_metrics=lambda _: {"score": next(scores)},
    )
    trainer.train()
    changes = [(change.step, {depth for depth, _ in change.groups}) for change in model.peft_plus.timeline]
    assert changes == [(0, {4}), (2, {1}), (4, {2}), (5, {3}), (6, {1, 2, 3, 4})]
    assert trainer.state.global_step == 8


def test_epochs_in_place_of_the_metric() -> None:
    model = thawing("lora", epochs=0.5)
    EvaluatedLoop(model, steps=10).run()
    assert [change.step for change in model.peft_plus.timeline] == [0, 2, 4, 6, 8]


def test_adapters_on_nf4(tmp_path: Any) -> None:
    loop = EvaluatedLoop(on_nf4({"lora": {}, "chain_thaw": {"steps": 1}}, tmp_path), steps=5).run()
    assert [depths(moved) for moved in loop.moved] == [{4}, {1}, {2}, {3}, {1, 2, 3, 4}]


def test_frozen_depths_take_no_stage() -> None:
    model = get_model(tiny("bert"), {"full": {}, "freeze": {"blocks": 2}, "chain_thaw": {"steps": 1}, "llrd": {}})
    loop = EvaluatedLoop(model, steps=3).run()
    assert [depths(moved) for moved in loop.moved] == [{4}, {3}, {3, 4}]


def test_a_run_without_any_evaluation_warns(caplog: pytest.LogCaptureFixture) -> None:
    BareLoop(thawing(), steps=2).run()
    assert "chain_thaw saw no evaluation in these 2 steps, so phase 1 of 6 did not end" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patience": 0}, "patience=0"),
        ({"min_delta": -1.0}, "min_delta=-1.0"),
        ({"min_delta": float("nan")}, "min_delta=nan"),
        ({"steps": 0}, "steps=0"),
        ({"epochs": 0.0}, "epochs=0.0"),
        ({"steps": 1, "epochs": 1.0}, "steps=1 and epochs=1 both end a stage"),
        ({"steps": 1, "metric": "f1"}, "metric='f1' goes only without steps and epochs"),
        ({"epochs": 1, "patience": 3}, "patience=3 goes only without steps and epochs"),
        ({"later_lr_scale": 0}, "later_lr_scale=0"),
    ],
)
def test_settings_out_of_range_or_without_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=rf"'chain_thaw' \(peft-plus-freezing .*{message}"):
        thawing(**settings)


@pytest.mark.parametrize("tuner", ["linear_probe", "prompt_tuning"])
def test_a_tuner_without_layers_is_refused(tuner: str) -> None:
    with pytest.raises(MethodError, match=rf"chain_thaw.*{tuner}"):
        thawing(tuner)
