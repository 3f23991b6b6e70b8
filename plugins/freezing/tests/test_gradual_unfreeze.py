"""The trainable set of every phase, and that looking ahead agrees with asking step by step."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments, default_data_collator

import peft_plus
from peft_plus import MethodError, Param, Run, get_model
from peft_plus_freezing.gradual_unfreeze import GradualUnfreeze, thaw_steps, thawed
from tests.bare_loop import check_resume
from tests.evaluated_loop import EvaluatedLoop
from tests.models import batch, tiny
from tests.test_effects import depth_of


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def run_at(step: int, depths: tuple[int, ...], steps_per_epoch: int = 4) -> Run:
    return Run(
        model=nn.Identity(),
        task=None,  # type: ignore[arg-type]
        num_blocks=3,
        depths=depths,
        step=step,
        max_steps=100,
        steps_per_epoch=steps_per_epoch,
    )


def at(depth: int) -> Param:
    return Param(f"layer.{depth}", (2, 2), depth, "base")


def test_the_table_of_phases():
    depths = (4, 3, 2, 1, 0)
    table = [[4], [4, 3], [4, 3, 2], [4, 3, 2, 1], [4, 3, 2, 1, 0], [4, 3, 2, 1, 0]]
    assert [list(thawed(depths, phase)) for phase in range(6)] == table
    # A tuner that reaches only some depths loses no phase on the others.
    assert [list(thawed((4, 2), phase)) for phase in range(3)] == [[4], [4, 2], [4, 2]]


@pytest.mark.parametrize("every", [1, 2, 3, 7, "epoch"])
@pytest.mark.parametrize("depths", [(4, 3, 2, 1, 0), (3, 2, 1), (4, 1), (4,), (0,)])
def test_looking_ahead_agrees_with_asking_at_every_step(every, depths):
    plugin = GradualUnfreeze(every=every)
    answers = [tuple(plugin.may_train(run_at(step, depths), at(d)) for d in range(5)) for step in range(60)]
    for step in range(40):
        later = [s for s in range(step + 1, 60) if answers[s] != answers[step]]
        assert plugin.next_change(run_at(step, depths)) == (later[0] if later else None)


def test_once_thawed_always_thawed():
    plugin = GradualUnfreeze(every=3)
    for depth in range(5):
        answers = [plugin.may_train(run_at(step, (4, 3, 2, 1, 0)), at(depth)) for step in range(30)]
        assert answers == sorted(answers)
        assert answers.index(True) == 3 * (4 - depth)


def test_an_epoch_without_length_is_refused():
    plugin = GradualUnfreeze()
    for ask in (lambda r: plugin.may_train(r, at(1)), plugin.next_change):
        with pytest.raises(ValueError, match="every=<optimizer steps>"):
            ask(run_at(0, (4, 3), steps_per_epoch=0))


@pytest.mark.parametrize("every", [0, -1])
def test_an_interval_below_one_is_refused(every):
    with pytest.raises(ValueError, match=f"every={every}"):
        GradualUnfreeze(every=every)


@pytest.mark.parametrize("every", ["epochs", 2.0, True, None, [1]])
def test_an_interval_of_another_kind_is_refused_by_name(every):
    with pytest.raises(MethodError, match=r"gradual_unfreeze.*every"):
        get_model(tiny("bert"), {"lora": {}, "gradual_unfreeze": {"every": every}})


@pytest.mark.parametrize("tuner", ["linear_probe", "prompt_tuning", "p_tuning", "prefix_tuning"])
def test_a_tuner_without_layers_is_refused(tuner):
    with pytest.raises(MethodError, match=rf"gradual_unfreeze.*peft-plus-freezing.*{tuner}"):
        get_model(tiny("bert"), [tuner, "gradual_unfreeze"])


class Flags(TrainerCallback):
    """Which blocks may train in each epoch, by the names of the parameters."""

    def __init__(self) -> None:
        self.epochs: list[set[str]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        names = {n for n, p in model.named_parameters() if p.requires_grad}
        if state.global_step % 2 == 0:
            self.epochs.append(names)
        assert names == self.epochs[-1]


def places(names: set[str]) -> set[str]:
    found = {re.search(r"(encoder|decoder)?\.?(?:layer|layers|block)\.\d", n) for n in names}
    rest = {n for n in names if not re.search(r"(?:layer|layers|block)\.\d", n)}
    return {m[0].strip(".") for m in found if m} | {"embeddings" for n in rest if "embed" in n or "shared" in n}


@pytest.mark.parametrize(
    ("name", "task", "blocks"),
    [
        ("bert", "SEQ_CLS", [["encoder.layer.2"], ["encoder.layer.1"], ["encoder.layer.0"]]),
        ("llama", "CAUSAL_LM", [["layers.2"], ["layers.1"], ["layers.0"]]),
        ("t5", "SEQ_2_SEQ_LM", [[f"{side}.block.{i}" for side in ("encoder", "decoder")] for i in (2, 1, 0)]),
        ("bart", "SEQ_2_SEQ_LM", [[f"{side}.layers.{i}" for side in ("encoder", "decoder")] for i in (2, 1, 0)]),
    ],
)
def test_one_block_more_in_each_epoch_and_the_embeddings_last(name, task, blocks, tmp_path):
    """8 examples in batches of 4: two updates to an epoch. Both stacks of an encoder-decoder thaw in parallel."""
    model = get_model(tiny(name, task), ["full", "gradual_unfreeze"])
    flags = Flags()
    data = batch(name, task, rows=8)
    peft_plus.Trainer(
        model,
        TrainingArguments(
            str(tmp_path),
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            num_train_epochs=6,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
        ),
        train_dataset=[{key: value[i] for key, value in data.items()} for i in range(8)],
        data_collator=default_data_collator,
        callbacks=[flags],
    ).train()
    wanted: list[set[str]] = [set()]
    for block in [*blocks, ["embeddings"]]:
        wanted.append(wanted[-1] | set(block))
    if name == "bart":  # its head is the embeddings, so the topmost that can train alone is block 3
        wanted = wanted[1:]
    wanted += wanted[-1:] * (6 - len(wanted))
    assert [places(names) for names in flags.epochs] == wanted
    assert all(flags.epochs)  # something trains from the start


# ---- directions, fractions, several at a time ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "depths", "table"),
    [
        ({"direction": "bottom_up"}, (4, 3, 2, 1, 0), [{4}, {4, 0}, {4, 0, 1}, {4, 0, 1, 2}, {4, 0, 1, 2, 3}]),
        ({"direction": "bottom_up"}, (3, 2, 1), [{1}, {1, 2}, {1, 2, 3}]),  # no head: the lowest comes first
        ({"blocks": 2}, (4, 3, 2, 1, 0), [{4}, {4, 3, 2}, {4, 3, 2, 1, 0}]),
        ({"blocks": 2}, (3, 2, 1), [{3, 2}, {3, 2, 1}]),
        ({"blocks": 3, "direction": "bottom_up"}, (4, 3, 2, 1, 0), [{4}, {4, 0, 1, 2}, {4, 0, 1, 2, 3}]),
        ({"keep": "newest"}, (4, 3, 2, 1, 0), [{4}, {4, 3}, {4, 2}, {4, 1}, {4, 0}]),
        ({"keep": "newest"}, (3, 2, 1), [{3}, {2}, {1}]),
        ({"keep": "newest", "direction": "bottom_up", "blocks": 2}, (4, 3, 2, 1, 0), [{4}, {4, 0, 1}, {4, 2, 3}]),
    ],
)
def test_the_table_of_every_direction(settings: dict[str, Any], depths: tuple[int, ...], table: list[set[int]]) -> None:
    found = [set(thawed(depths, phase, head=4, **settings)) for phase in range(len(table) + 2)]
    assert found == [*table, table[-1], table[-1]]
    plugin = GradualUnfreeze(every=3, **settings)
    for step in range(3 * len(table) + 4):
        trained = {depth for depth in depths if plugin.may_train(run_at(step, depths), at(depth))}
        assert trained == table[min(step // 3, len(table) - 1)]


@pytest.mark.parametrize("direction", ["top_down", "bottom_up"])
@pytest.mark.parametrize("keep", ["all", "newest"])
@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("when", [{"every": 7}, {"every": "epoch"}, {"at": [0.1, 0.25, 0.255, 0.9]}])
def test_looking_ahead_agrees_in_every_direction(direction: Any, keep: Any, blocks: int, when: dict[str, Any]) -> None:
    for depths in ((4, 3, 2, 1, 0), (3, 2, 1), (4, 1)):
        plugin = GradualUnfreeze(direction=direction, keep=keep, blocks=blocks, **when)
        answers = [tuple(plugin.may_train(run_at(step, depths), at(d)) for d in range(5)) for step in range(120)]
        for step in range(99):
            told = plugin.next_change(run_at(step, depths))
            later = next((s for s in range(step + 1, 120) if answers[s] != answers[step]), None)
            assert told == later


@pytest.mark.parametrize(
    ("fractions", "max_steps", "steps"),
    [
        ([0.1, 0.2, 0.3], 30, [3, 6, 9]),  # 0.1 · 30 is 3.0000000000000004 in binary
        ([0.5], 5, [3]),
        ([1e-6, 0.999], 10, [1, 10]),
        ([1 / 3, 2 / 3], 300, [100, 200]),
    ],
)
def test_fractions_are_the_first_steps_by_which_they_have_passed(
    fractions: list[float], max_steps: int, steps: list[int]
) -> None:
    assert thaw_steps(fractions, max_steps) == steps
    run = run_at(0, (4, 3, 2, 1, 0))
    run.max_steps = max_steps
    plugin = GradualUnfreeze(at=fractions)
    trained = [sum(plugin.may_train(run.at(step), at(depth)) for depth in range(5)) for step in range(max_steps)]
    assert trained == [1 + sum(step >= begin for begin in steps) for step in range(max_steps)]


def test_only_the_newest_train_and_the_others_rest_without_state() -> None:
    model = get_model(tiny("bert"), {"full": {}, "gradual_unfreeze": {"every": 2, "keep": "newest", "blocks": 2}})
    loop = EvaluatedLoop(model, steps=6)
    held = []
    for _ in range(6):
        loop.step()
        held.append({depth_of(name, 3) for name in loop.held()})
    trained = [{4}, {4}, {2, 3, 4}, {2, 3, 4}, {0, 1, 4}, {0, 1, 4}]
    assert [{depth_of(name, 3) for name in moved} for moved in loop.moved] == trained
    assert held == trained


@pytest.mark.parametrize(
    "settings",
    [
        {"every": 2, "direction": "bottom_up", "keep": "newest"},
        {"at": [0.2, 0.5], "blocks": 2},
    ],
    ids=str,
)
def test_resumed_after_any_step_the_end_is_bit_identical(settings: dict[str, Any]) -> None:
    check_resume(lambda: get_model(tiny("bert"), {"full": {}, "gradual_unfreeze": settings}), steps=9)


def test_what_newest_rests_needs_no_other_optimizer_elsewhere() -> None:
    """Adagrad makes all its states at the start; nothing that only thaws takes any away."""
    assert GradualUnfreeze().on_freeze == GradualUnfreeze(every="stall").on_freeze == "keep"
    assert GradualUnfreeze(keep="newest").on_freeze == "drop_state"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"at": [0.5, 0.5]}, "at=.*strictly rising"),
        ({"at": [0.5, 0.2]}, "strictly rising"),
        ({"at": [0.0, 0.2]}, "each > 0 and < 1"),
        ({"at": [0.5, 1.0]}, "each > 0 and < 1"),
        ({"at": [float("nan")]}, "each > 0 and < 1"),
        ({"at": 0.5}, "give a list of fractions"),
        ({"at": []}, "give a list of fractions"),
        ({"at": ["a"]}, "give a list of fractions"),
        ({"at": [0.5], "every": 3}, "both say when to thaw"),
        ({"blocks": 0}, "blocks=0"),
        ({"blocks": 6}, "blocks=6, but this model trains at 5 depths. Give 5 or fewer"),
        ({"at": [0.1, 0.2, 0.3, 0.4, 0.5]}, "holds 5 thaws, but after the first phase only 4 are left. Drop 1"),
        ({"direction": "up"}, "direction='up'"),
        ({"keep": "none"}, "keep='none'"),
        ({"at": [0.5], "patience": 2}, "patience=2 goes only with every='stall'"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=rf"'gradual_unfreeze' \(peft-plus-freezing .*{message}|{message}"):
        get_model(tiny("bert"), {"full": {}, "gradual_unfreeze": settings})
