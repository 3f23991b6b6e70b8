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
from peft_plus_freezing.gradual_unfreeze import GradualUnfreeze, thawed
from tests.models import batch, tiny


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
