"""Explicit phases: each step trains what its phase says, by metric too, and the best weights come back to the bit."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import pytest
import torch
import trl
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback, default_data_collator

import peft_plus
from peft_plus import MethodError, PluginError, get_model
from peft_plus_freezing.freeze_plan import FreezePlan
from tests.bare_loop import BareLoop, on_nf4
from tests.evaluated_loop import EvaluatedLoop, changed, check_evaluated_resume, scripted_trainer, weights
from tests.models import tiny
from tests.multipliers import in_session, in_trainer, rows_of
from tests.test_effects import depth_of
from tests.tokenizers import tiny_tokenizer
from tests.training import StopAt, quiet

NAN = float("nan")
Phases = Sequence[Mapping[str, Any]]


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def planned(phases: Phases, tuner: str = "full", **more: Any) -> Any:
    return get_model(tiny("bert"), {tuner: {}, "freeze_plan": {"phases": phases}, **more})


def depths(names: set[str]) -> set[int]:
    return {depth_of(name, 3) for name in names}


def timeline(model: Any) -> list[tuple[int, set[int]]]:
    return [(change.step, {depth for depth, _ in change.groups}) for change in model.peft_plus.timeline]


STEPS = [
    {"train": "head", "steps": 2},
    {"train": ["block -1", "head"], "epochs": 0.5},  # 2 steps of the 4 in an epoch
    {"train": ["layer.0.attention.*", "re:\\bclassifier[.]"], "steps": 1},
    {"train": "blocks"},
]


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_each_step_trains_what_its_phase_says(tuner: str) -> None:
    if tuner == "lora":
        loop = EvaluatedLoop(planned(STEPS, "lora"), steps=8).run()
    else:
        loop = EvaluatedLoop(planned(STEPS), steps=8).run()
        inside = {n for n in weights(loop.model) if "layer.0.attention" in n or n.startswith("classifier")}
        assert loop.moved[4] <= inside
        assert {"layer.0" in n for n in loop.moved[4]} == {True, False}
    assert [depths(moved) for moved in loop.moved] == [{4}, {4}, {3, 4}, {3, 4}, {1, 4}, *[{1, 2, 3}] * 3]
    assert timeline(loop.model) == [(0, {4}), (2, {3, 4}), (4, {1, 4}), (5, {1, 2, 3})]


def test_what_no_phase_names_is_not_in_the_optimizer() -> None:
    loop = BareLoop(planned(STEPS), steps=1)
    held = {id(t) for group in loop.optimizer.param_groups for t in group["params"]}
    names = {n for n, t in loop.model.named_parameters() if id(t) in held}
    assert depths(names) == {1, 2, 3, 4}
    assert not [n for n in names if "pooler" in n and depth_of(n, 3) == 0]


def test_state_of_what_rests_is_dropped_and_a_thaw_starts_afresh() -> None:
    phases = [{"train": "head", "steps": 2}, {"train": "block 3", "steps": 2}, {"train": ["block 3", "head"]}]
    loop = EvaluatedLoop(planned(phases), steps=6)
    held = []
    for _ in range(6):
        loop.step()
        held.append(depths(loop.held()))
    assert held == [{4}, {4}, {3}, {3}, {3, 4}, {3, 4}]
    ages = {
        depth_of(n, 3): int(loop.optimizer.state[t]["step"])
        for n, t in loop.model.named_parameters()
        if n in loop.held()
    }
    assert ages == {3: 4, 4: 2}


@pytest.mark.parametrize("loop", ["trainer", "session"])
def test_the_rate_is_scaled_by_phase_in_every_loop(loop: str, tmp_path: Any) -> None:
    phases = [
        {"train": "head", "steps": 1},
        {"train": ["block 3", "head"], "steps": 1, "lr_scale": 0.1},
        {"train": "all"},
    ]
    model = planned(phases, llrd={"decay": 0.5})
    if loop == "trainer":
        rates = in_trainer(model, tmp_path, steps=3, lr_scheduler_type="constant")
    else:
        rates = in_session(model, steps=3)
    wanted = [{4: 1.0}, {3: 0.05, 4: 0.1}, {d: 0.5 ** (4 - d) for d in range(5)}]
    for found, expected in zip(rates, wanted, strict=True):
        assert found == pytest.approx(expected, rel=1e-3)


def test_one_phase_of_everything_is_the_plain_run_to_the_bit() -> None:
    plain = get_model(tiny("bert"), "full")
    model = planned([{"train": "all"}])
    for one in (plain, model):
        BareLoop(one, steps=4).run()
    assert not changed(weights(plain), weights(model))


# ---- phases that a metric ends -------------------------------------------------------------------------------------


def by_metric(**more: Any) -> Phases:
    return [
        {"train": "head", "patience": 2, **more},
        {"train": "block 3", "patience": 1, **more},
        {"train": "all"},
    ]


@pytest.mark.parametrize(
    ("values", "ends"),
    [
        ([1.0, 0.9, 0.9, 0.95, 0.8, 0.8, 0.7], [4, 6]),  # patience 2, then the value at the boundary is the first
        ([1.0, 0.9, 0.9, 0.8, 0.9, 0.8, 0.8, 0.8, 0.8], [6, 7]),
        ([NAN, NAN, NAN, 1.0, 1.0], [2, 3]),  # no number is no improvement, and no best either
        ([NAN, NAN, 1.0, 1.0, 1.0], [2, 4]),
        ([1.0, 0.9, 0.8, 0.7, 0.6], []),
        ([float("inf"), 1.0, 1.0, 1.0, 0.5, 0.5], [4, 6]),
    ],
)
def test_a_metric_ends_phases_as_worked_out_by_hand(values: list[float], ends: list[int]) -> None:
    script = dict(enumerate(values, start=1))
    loop = EvaluatedLoop(planned(by_metric()), steps=len(values) + 2, values=script).run()
    trained = [{4}, {3}, {0, 1, 2, 3, 4}]
    assert timeline(loop.model) == list(zip([0, *ends], trained[: len(ends) + 1], strict=True))
    bounds = [0, *ends, len(loop.moved)]
    for phase, (begin, end) in enumerate(itertools.pairwise(bounds)):
        assert [depths(moved) for moved in loop.moved[begin:end]] == [trained[phase]] * (end - begin)


def test_min_delta_and_direction() -> None:
    phases = [{"train": "head", "patience": 1, "metric": "f1", "min_delta": 0.1}, {"train": "all"}]
    script = {step: {"eval_f1": value} for step, value in enumerate([0.5, 0.61, 0.7, 0.9], start=1)}
    loop = EvaluatedLoop(planned(phases), steps=5, values=script).run()
    assert timeline(loop.model)[1][0] == 3
    phases = [{"train": "head", "patience": 1, "metric": "f1", "greater_is_better": False}, {"train": "all"}]
    loop = EvaluatedLoop(planned(phases), steps=5, values=script).run()
    assert timeline(loop.model)[1][0] == 2


def test_the_best_weights_come_back_to_the_bit_and_carry_their_value_on() -> None:
    """Best at 2; ends at 4. Then 5 does not beat what 2 had: block 3 goes back to where it was before."""
    loop = EvaluatedLoop(
        planned(by_metric(restore_best=True)), steps=7, values={1: 1.0, 2: 0.5, 3: 0.9, 4: 0.9, 5: 0.6}
    )
    for _ in range(4):
        loop.step()
    assert changed(loop.measured[2], loop.measured[4])
    assert not changed(loop.measured[2], weights(loop.model))
    loop.step()
    assert depths(changed(loop.measured[2], loop.measured[5])) == {3}
    assert not changed(loop.measured[2], weights(loop.model))
    loop.run()
    assert timeline(loop.model) == [(0, {4}), (4, {3}), (5, {0, 1, 2, 3, 4})]


def test_an_evaluation_before_the_first_step_is_what_the_first_phase_must_beat() -> None:
    for _ in range(2):  # also in a second run, which knows nothing of the first
        model = planned([{"train": "head", "patience": 1, "restore_best": True}, {"train": "all"}])
        start = weights(model)
        loop = EvaluatedLoop(model, steps=3, values={1: 0.6})
        loop.engine.evaluated({"eval_loss": 0.5})
        loop.engine.evaluation_ended()
        loop.step()
        assert changed(start, loop.measured[1])
        assert not changed(start, weights(model))


def test_a_metric_that_comes_with_the_second_evaluation_of_a_step_is_found() -> None:
    model = planned([{"train": "head", "patience": 1, "metric": "f1"}, {"train": "all"}])
    loop = EvaluatedLoop(model, steps=6)
    for value in (0.5, 0.4):
        loop.step()
        for metrics in ({"test_f1": 1.0}, {"eval_f1": value}, {"test_f1": 1.0}):
            loop.engine.evaluated(metrics)
            loop.engine.evaluation_ended()
    loop.run()
    assert timeline(model) == [(0, {4}), (2, {0, 1, 2, 3, 4})]


def test_what_a_phase_of_steps_trained_is_not_undone_by_an_older_best() -> None:
    """The value 0.5 of the first phase says nothing about where the third one begins."""
    metric = {"patience": 1, "restore_best": True}
    phases = [{"train": "head", **metric}, {"train": "blocks", "steps": 2}, {"train": "head", **metric}]
    loop = EvaluatedLoop(planned(phases), steps=9, values={1: 0.5, 2: 0.6, 5: 0.9, 6: 0.8, 7: 0.85}).run()
    assert loop.finished == 7
    assert not changed(loop.measured[6], weights(loop.model))
    assert depths(changed(loop.measured[1], loop.measured[6])) == {1, 2, 3, 4}


def test_without_restoring_the_weights_stay_as_they_are() -> None:
    loop = EvaluatedLoop(planned(by_metric()), steps=5, values={1: 0.5, 2: 0.9, 3: 0.9})
    for _ in range(3):
        loop.step()
    assert not changed(loop.measured[3], weights(loop.model))


def test_a_last_phase_with_an_end_ends_the_run(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    by_steps = EvaluatedLoop(planned([{"train": "head", "steps": 2}, {"train": "all", "steps": 3}]), steps=20).run()
    assert by_steps.finished == 5
    phases = [{"train": "head", "steps": 2}, {"train": "blocks", "patience": 1, "restore_best": True}]
    loop = EvaluatedLoop(planned(phases), steps=20, values={3: 1.0, 5: 0.5, 7: 0.6}).run()
    assert loop.finished == 7
    assert not changed(loop.measured[5], weights(loop.model))
    assert "phase 2 of 2 ends at step 7, eval_loss stopped at 0.5; its best weights are back" in caplog.text


def test_a_second_run_starts_at_the_first_phase() -> None:
    model = planned(by_metric())
    for _ in range(2):
        loop = EvaluatedLoop(model, steps=6, values={1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0}).run()
        assert [depths(moved) for moved in loop.moved] == [{4}] * 3 + [{3}] + [{0, 1, 2, 3, 4}] * 2
    loop = EvaluatedLoop(model, steps=3).run()
    assert [depths(moved) for moved in loop.moved] == [{4}] * 3


@pytest.mark.parametrize("restore", [False, True])
def test_resumed_after_any_step_the_end_is_bit_identical(restore: bool) -> None:
    values = {1: 1.0, 2: 0.5, 3: 0.9, 4: 0.9, 6: 0.4, 7: 0.45, 9: 0.3, 10: 0.35}
    phases = [
        {"train": "head", "patience": 2, "restore_best": restore},
        {"train": ["block 3", "head"], "patience": 1, "restore_best": restore, "lr_scale": 0.5},
        {"train": "blocks", "steps": 2},
        {"train": "all", "patience": 1, "restore_best": restore},
    ]
    whole = check_evaluated_resume(lambda: planned(phases), steps=14, values=values)
    assert timeline(whole.model) == [(0, {4}), (4, {3, 4}), (7, {1, 2, 3}), (9, {0, 1, 2, 3, 4})]
    assert whole.finished == 10


# ---- under a Trainer -----------------------------------------------------------------------------------------------


def trainer_of(folder: Any, values: Sequence[float], *callbacks: TrainerCallback, **settings: Any) -> Any:
    torch.manual_seed(0)  # of the adapters
    phases = [
        {"train": "head", "patience": 1, "metric": "score", "restore_best": True},
        {"train": ["blocks 2-3", "head"], "patience": 1, "metric": "score", "restore_best": True},
    ]
    return scripted_trainer(planned(phases, "lora"), folder, values, *callbacks, max_steps=20, **settings)


def test_a_phase_begins_right_after_the_evaluation_that_stalled_and_the_last_one_ends_the_run(tmp_path: Any) -> None:
    trainer = trainer_of(tmp_path, [0.5, 0.4, 0.6, 0.7, 0.6])
    trainer.train()
    assert timeline(trainer.model) == [(0, {4}), (4, {2, 3, 4})]
    assert trainer.state.global_step == 10


@pytest.mark.parametrize("stop", [3, 4, 8])
def test_a_trainer_stopped_and_resumed_ends_bit_identical(stop: int, tmp_path: Any) -> None:
    """Step 4 ends a phase: its checkpoint holds the weights that were put back."""
    values = [0.5, 0.4, 0.6, 0.7, 0.6]
    settings = {"save_strategy": "steps", "save_steps": stop}
    whole = trainer_of(tmp_path / "whole", values, **settings)
    whole.train()
    trainer_of(tmp_path / "cut", values, StopAt(stop), **settings).train()
    resumed = trainer_of(tmp_path / "cut", values[stop // 2 :], **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{stop}"))
    assert not changed(weights(whole.model), weights(resumed.model))
    assert timeline(resumed.model) == timeline(whole.model)
    assert resumed.state.global_step == whole.state.global_step == 10


def test_trls_sft_trainer_goes_from_phase_to_phase(tmp_path: Any) -> None:
    datasets.disable_progress_bars()
    tokenizer = tiny_tokenizer("decoder")
    phases = [{"train": "block 3", "steps": 1}, {"train": "blocks 1-2"}]
    base = tiny("llama", "CAUSAL_LM", vocab_size=len(tokenizer))
    model = get_model(base, {"lora": {}, "freeze_plan": {"phases": phases}})
    before = weights(model)
    trainer = peft_plus.with_plugins(trl.SFTTrainer)(
        model=model,
        args=quiet(tmp_path, kind=trl.SFTConfig, max_steps=3, learning_rate=1e-2, bf16=False),
        train_dataset=Dataset.from_list([{"text": "the cat is good"}, {"text": "a dog in paris is bad"}] * 4),
        processing_class=tokenizer,
    )
    trainer.train()
    assert timeline(model) == [(0, {3}), (1, {1, 2})]
    assert depths(changed(before, weights(model))) == {1, 2, 3}
    datasets.enable_progress_bars()


def test_an_evaluation_without_the_metric_stops_the_run(tmp_path: Any) -> None:
    trainer = trainer_of(tmp_path, [0.5] * 5)
    trainer.compute_metrics = lambda _: {"f1": 1.0}
    with pytest.raises(
        PluginError, match=r"'freeze_plan' .* in on_step_end at step 3: .*has no 'score', only .*eval_f1"
    ):
        trainer.train()


# ---- what does not fit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([], r"phases=\[\]: give a list of phases"),
        ([{"train": "head", "step": 2}], r"phases\[0\] has no key 'step'. Did you mean 'steps'"),
        ([{"train": "head"}, {"train": "all"}], r"phases\[0\] has no end"),
        ([{"train": "block 4"}], r"phases\[0\]: train: 'block 4' is past the depth of this model, which has 3 blocks"),
        ([{"train": "head", "steps": 1}, {"train": ["all", "hed"]}], r"phases\[1\]: train: 'hed' matches nothing"),
        ([{"train": "head", "steps": {1, 2}}], "expected int or None|cannot be saved"),
        ([{"train": {"head"}}], "cannot be saved with the model"),
    ],
)
def test_bad_phases_are_refused_with_the_plugins_name(phases: Any, message: str) -> None:
    with pytest.raises(MethodError, match=rf"plugin 'freeze_plan' \(peft-plus-freezing .*({message})"):
        planned(phases)


def test_beside_another_schedule_each_puts_its_own_best_weights_back() -> None:
    phases = [{"train": "all", "patience": 9, "metric": "b_loss", "restore_best": True}]
    model = planned(phases, chain_thaw={"metric": "a_loss", "patience": 2})
    values = {1: {"a_loss": 1, "b_loss": 9}, 2: {"a_loss": 9, "b_loss": 1}, 3: {"a_loss": 9, "b_loss": 9}}
    loop = EvaluatedLoop(model, values=values, steps=3).run()
    assert changed(loop.measured[1], loop.measured[2])
    assert not changed(loop.measured[1], weights(model)), "the best by a_loss, though b_loss was best later"


def test_the_phases_are_required() -> None:
    with pytest.raises(MethodError, match=r"'freeze_plan' .* needs the setting 'phases'"):
        get_model(tiny("bert"), ["lora", "freeze_plan"])


def test_a_phase_to_which_another_plugin_leaves_nothing_is_refused_before_the_first_step() -> None:
    model = planned([{"train": "head", "steps": 2}, {"train": "block 1"}], gradual_unfreeze={"every": 100})
    with pytest.raises(
        MethodError, match=r"Nothing trains from step 2 on, by what .*freeze_plan.* and .*gradual_unfreeze"
    ):
        BareLoop(model, steps=5)


@pytest.mark.parametrize(
    "phases",
    [
        [{"train": "block 1", "steps": 2}, {"train": "head"}],
        [{"train": "all", "steps": 2}, {"train": "block 1"}],
        [{"train": "head", "patience": 1}, {"train": "block 1"}],
    ],
    ids=["at once", "later", "by a metric"],
)
def test_a_phase_of_what_freeze_leaves_out_is_refused_when_the_model_is_built(phases: list[dict[str, Any]]) -> None:
    with pytest.raises(MethodError, match="'block 1' matches nothing that trains; what trains lies in: block 2"):
        planned(phases, freeze={"blocks": 1})


def test_a_phase_by_metric_to_which_another_plugin_leaves_nothing_says_so_when_it_comes(tmp_path: Any) -> None:
    phases = [{"train": "head", "patience": 1, "min_delta": 99.0}, {"train": "block 1"}]
    model = planned(phases, gradual_unfreeze={"every": 100})
    args = quiet(tmp_path, max_steps=9, eval_strategy="steps", eval_steps=1)
    trainer = peft_plus.Trainer(
        model, args, train_dataset=rows_of(8), eval_dataset=rows_of(4), data_collator=default_data_collator
    )
    with pytest.raises(MethodError, match=r"Nothing trains from step 2 on, by what .*freeze_plan.* say\."):
        trainer.train()


def test_a_run_too_short_for_its_phases_warns(caplog: pytest.LogCaptureFixture) -> None:
    BareLoop(planned([{"train": "head", "steps": 4}, {"train": "head", "lr_scale": 0.1}]), steps=4).run()
    assert caplog.messages == [
        "freeze_plan: the run ends at step 4 in phase 1 of 2, so the rest was not reached. Train for longer, or "
        "shorten the phases."
    ]
    caplog.clear()
    BareLoop(planned([{"train": "head", "steps": 3}, {"train": "head", "lr_scale": 0.1}]), steps=4).run()
    assert not caplog.messages


def test_a_run_without_any_evaluation_warns(caplog: pytest.LogCaptureFixture) -> None:
    BareLoop(planned(by_metric()), steps=3).run()
    assert "freeze_plan saw no evaluation in these 3 steps, so phase 1 of 3 did not end" in caplog.text


def test_epochs_without_a_length_are_refused_with_what_to_write() -> None:
    model = planned([{"train": "head", "epochs": 1}, {"train": "all"}])
    with pytest.raises(PluginError, match="a phase of epochs=1 needs data with a length; give steps= instead"):
        BareLoop(model, steps=3, per_epoch=0)


def test_packed_base_weights_are_refused_and_adapters_train_by_phase(tmp_path: Any) -> None:
    phases = [{"train": "head", "steps": 1}, {"train": ["block 3", "head"]}]
    loop = EvaluatedLoop(on_nf4({"lora": {}, "freeze_plan": {"phases": phases}}, tmp_path), steps=3).run()
    assert [depths(moved) for moved in loop.moved] == [{4}, {3, 4}, {3, 4}]
    with pytest.raises(MethodError, match="packed into 4 or 8 bits it gets no gradient at all"):
        on_nf4({"lora": {}, "freeze_plan": {"phases": [{"train": "*.base_layer.weight"}]}}, tmp_path)


def test_an_object_works_as_well_and_is_saved(tmp_path: Any) -> None:
    model: nn.Module = get_model(tiny("bert"), ["lora", FreezePlan(phases=[{"train": "head"}])])
    model.save_pretrained(tmp_path)
    again = peft_plus.from_pretrained(tiny("bert"), tmp_path, is_trainable=True)
    assert again.peft_plus.plugins[0].settings() == {"phases": [{"train": "head"}]}


def test_a_run_that_ends_in_a_phase_that_was_better_before_gets_its_best_weights_back(tmp_path: Any) -> None:
    """The metric is scripted: best at step 4 of 8, worse ever after, and patience outlasts the run."""
    model = planned([{"train": "all", "patience": 10, "restore_best": True}])
    kept: dict[int, dict[str, torch.Tensor]] = {}

    class Scripted(peft_plus.Trainer):
        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            step = self.state.global_step
            kept[step] = {n: t.detach().clone() for n, t in model.named_parameters()}
            metrics = {"eval_loss": {2: 1.4, 4: 1.0, 6: 1.3, 8: 1.2}[step]}
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            self._engine.evaluation_ended()
            return metrics

    args = quiet(tmp_path, max_steps=8, eval_strategy="steps", eval_steps=2, learning_rate=0.1)
    Scripted(
        model, args, train_dataset=rows_of(8), eval_dataset=rows_of(4), data_collator=default_data_collator
    ).train()
    assert not all(torch.equal(kept[8][name], kept[4][name]) for name in kept[4])
    assert all(torch.equal(tensor, kept[4][name]) for name, tensor in model.named_parameters())
