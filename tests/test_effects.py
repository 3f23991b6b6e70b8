"""Who trains when and at which rate, seen from outside: bits of every weight before and after every update.

Depths are read off the parameters' names here, and rates are measured as update ÷ gradient; nothing is asked of the
code under test.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments, default_data_collator

import peft_plus
from peft_plus import EngagementError, MethodError, Plugin, PluginError, Run, get_model
from peft_plus import rates as rates_module
from peft_plus.effects import Effects

from .models import batch, tiny
from .training import quiet

Snapshot = dict[str, Tensor]


# ---- depths by hand ----------------------------------------------------------------------------------------------


def depth_of(name: str, blocks: int) -> int:
    """0 = embeddings, 1..L = blocks, L + 1 = what lies above; by name, for BERT, Llama, T5 and BART."""
    block = re.search(r"\.(?:layer|layers|block)\.(\d+)\.", name)
    if block and not ("layer_norm" in name and "encoder.final" in name):
        return int(block[1]) + 1
    if re.search(r"shared|embed|embeddings", name):
        return 0
    if "encoder.final_layer_norm" in name:
        return blocks
    return blocks + 1


def by_depth(names: Sequence[str], blocks: int = 3) -> dict[int, set[str]]:
    groups: dict[int, set[str]] = {}
    for name in names:
        groups.setdefault(depth_of(name, blocks), set()).add(name)
    return groups


def expected_trainable(names: Sequence[str], phase: int, blocks: int = 3) -> set[str]:
    groups = by_depth(names, blocks)
    return set().union(*(groups[d] for d in sorted(groups, reverse=True)[: phase + 1]))


# ---- runs --------------------------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> Snapshot:
    return {n: t.detach().clone() for n, t in model.named_parameters()}


def changed(before: Snapshot, after: Snapshot) -> set[str]:
    return {n for n, t in before.items() if not torch.equal(t.view(torch.uint8), after[n].view(torch.uint8))}


class Watch(TrainerCallback):
    """What moved in each update, which tensors had a non-zero gradient, and the gradients themselves."""

    def __init__(self) -> None:
        self.moved: list[set[str]] = []
        self.fed: list[set[str]] = []
        self.updates: list[Snapshot] = []
        self.gradients: list[Snapshot] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self._before = snapshot(model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        held = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        self.gradients.append(held)
        self.fed.append({n for n, g in held.items() if bool(g.any())})

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        now = snapshot(model)
        self.moved.append(changed(self._before, now))
        self.updates.append({n: now[n] - self._before[n] for n in now})


class Switch(TrainerCallback):
    """What a DPO or GRPO trainer does for its reference model: leaves the flags as PEFT likes them."""

    def __init__(self, event: str, how: str = "disable_adapter") -> None:
        def act(args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            if how == "disable_adapter":
                with model.disable_adapter():
                    pass
            else:
                model.set_adapter("default")

        setattr(self, event, act)


def arguments(folder: Any, **settings: Any) -> TrainingArguments:
    defaults = {
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "remove_unused_columns": False,
        "logging_strategy": "no",
    }
    return quiet(folder, **{**defaults, **settings})


def rows_of(name: str, task: str, number: int) -> list[dict[str, Tensor]]:
    data = batch(name, task, rows=number)
    return [{key: value[i] for key, value in data.items()} for i in range(number)]


def trainer_of(
    model: nn.Module,
    name: str,
    task: str,
    folder: Any,
    *,
    rows: int = 40,
    callbacks: Sequence[TrainerCallback] = (),
    extra: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Any:
    return peft_plus.Trainer(
        model,
        arguments(folder, **settings),
        train_dataset=rows_of(name, task, rows),
        data_collator=default_data_collator,
        callbacks=list(callbacks),
        **(extra or {}),
    )


def unfreeze(base: nn.Module, tuner: str, every: Any, **more: Any) -> nn.Module:
    tuner_settings = {"lora": {"r": 4}}.get(tuner, {})
    return get_model(base, {tuner: tuner_settings, "gradual_unfreeze": {"every": every}, **more})


def check_schedule(watch: Watch, names: Sequence[str], phases: Sequence[int], blocks: int = 3) -> None:
    """In update s exactly the top phases[s] + 1 depths moved; each of them did, and nothing below by one bit."""
    assert len(watch.moved) == len(phases)
    for step, phase in enumerate(phases):
        allowed = expected_trainable(names, phase, blocks)
        assert watch.moved[step] <= allowed, f"step {step}: frozen weights moved"
        groups = by_depth(sorted(allowed), blocks)
        for depth, group in groups.items():
            assert watch.moved[step] & group, f"step {step}: depth {depth} is thawed but did not move"


# ---- gradual_unfreeze --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "rmsprop", "adamw_bnb_8bit"])
def test_each_group_moves_exactly_when_it_says_under_every_optimizer(optim, tmp_path):
    # bitsandbytes keeps 8-bit state for tensors of 4,096 and more values: 64 × 64 here.
    model = unfreeze(tiny("bert", hidden_size=64, intermediate_size=128), "full", 2)
    watch = Watch()
    trainer = trainer_of(
        model,
        "bert",
        "SEQ_CLS",
        tmp_path,
        callbacks=[watch],
        optim=optim,
        weight_decay=0.1,
        max_steps=10,
        learning_rate=0.1 if optim == "sgd" else 1e-2,
    )
    trainer.train()
    check_schedule(watch, sorted(snapshot(model)), [0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    if optim != "sgd":  # a step of these does not shrink with the gradient, so whatever was fed moved
        for moved, fed in zip(watch.moved, watch.fed, strict=True):
            assert fed <= moved
    if optim == "adamw_bnb_8bit":
        kinds = {s["state1"].dtype for s in trainer.optimizer.state.values()}
        assert torch.uint8 in kinds


ARCHITECTURES = [("bert", "SEQ_CLS"), ("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM"), ("bart", "SEQ_2_SEQ_LM")]


@pytest.mark.parametrize("tuner", ["full", "lora"])
@pytest.mark.parametrize(("name", "task"), ARCHITECTURES)
def test_encoder_decoder_and_both_with_checkpointing(name, task, tuner, tmp_path):
    model = unfreeze(tiny(name, task), tuner, 2)
    watch = Watch()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    trainer_of(
        model,
        name,
        task,
        tmp_path,
        callbacks=[watch],
        weight_decay=0.1,
        max_steps=10,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": False},
    ).train()
    top = len(by_depth(names)) - 1
    check_schedule(watch, names, [min(step // 2, top) for step in range(10)])
    depths = sorted(by_depth(names), reverse=True)
    recorded = [(change.step, {depth for depth, _ in change.groups}) for change in model.peft_plus.timeline]
    assert recorded == [(2 * phase, set(depths[: phase + 1])) for phase in range(top + 1)]


def test_checkpointing_does_not_change_the_run(tmp_path):
    trained = []
    for checkpointing in (False, True):
        model = unfreeze(tiny("bert"), "full", 1)
        settings = {"activation_checkpointing": checkpointing}
        if checkpointing:
            settings["activation_checkpointing_kwargs"] = {"use_reentrant": False}
        trainer_of(model, "bert", "SEQ_CLS", tmp_path, max_steps=6, **settings).train()
        trained.append(snapshot(model))
    assert not changed(*trained)


@pytest.mark.parametrize(("accumulation", "per_epoch"), [(1, 3), (2, 2)])
def test_every_epoch(accumulation, per_epoch, tmp_path):
    """12 examples in batches of 4: three updates to an epoch, or two with two batches to an update, the last short."""
    model = unfreeze(tiny("bert"), "full", "epoch")
    watch = Watch()
    trainer_of(
        model,
        "bert",
        "SEQ_CLS",
        tmp_path,
        rows=12,
        callbacks=[watch],
        num_train_epochs=6,
        gradient_accumulation_steps=accumulation,
    ).train()
    phases = [min(epoch, 4) for epoch in range(6) for _ in range(per_epoch)]
    check_schedule(watch, sorted(snapshot(model)), phases)
    assert [c.step for c in model.peft_plus.timeline] == [per_epoch * p for p in range(5)]


def test_epochs_need_data_with_a_length(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(rows_of("bert", "SEQ_CLS", 8))

    model = unfreeze(tiny("bert"), "full", "epoch")
    trainer = peft_plus.Trainer(
        model, arguments(tmp_path, max_steps=2), train_dataset=Stream(), data_collator=default_data_collator
    )
    with pytest.raises(PluginError, match=r"'gradual_unfreeze' \(peft-plus-freezing .*every=<optimizer steps>"):
        trainer.train()


def test_a_frozen_weight_holds_no_optimizer_state(tmp_path):
    model = unfreeze(tiny("bert"), "full", 2)
    trainer = trainer_of(model, "bert", "SEQ_CLS", tmp_path, max_steps=3, optim="adamw_torch")
    trainer.train()
    held = {id(p) for p in trainer.optimizer.state}
    names = {n for n, p in model.named_parameters() if id(p) in held}
    assert names == expected_trainable(sorted(snapshot(model)), 1)


# ---- PEFT switches adapters in the middle of a run ----------------------------------------------------------------

EVENTS = ["on_step_begin", "on_substep_end", "on_step_end"]


@pytest.mark.parametrize("how", ["disable_adapter", "set_adapter"])
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("late", [False, True], ids=["in_the_constructor", "added_later"])
def test_switching_adapters_thaws_nothing(event, how, late, tmp_path):
    """Not one bit differs from the undisturbed run, with clipping: a thawed layer's gradient would enter its norm."""
    trained = []
    for disturb in (False, True):
        torch.manual_seed(1)
        model = unfreeze(tiny("bert"), "lora", 2)
        for n, p in model.named_parameters():
            if "lora_B" in n:  # at 0, A gets no gradient, and the norm would not notice
                nn.init.normal_(p, std=0.5)
        watch = Watch()
        switches = [Switch(event, how)] if disturb else []
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        trainer = trainer_of(
            model,
            "bert",
            "SEQ_CLS",
            tmp_path,
            rows=24,
            callbacks=[watch, *([] if late else switches)],
            max_steps=5,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_grad_norm=0.1,
            weight_decay=0.1,
            optim="sgd",
        )
        for callback in switches if late else ():
            trainer.add_callback(callback)
        trainer.train()
        check_schedule(watch, names, [0, 0, 1, 1, 2])
        trained.append(snapshot(model))
    assert not changed(*trained)


class ReferenceFirst(transformers.Trainer):
    """A preference trainer in short: the reference model's logits first, by switching the adapter off."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.no_grad(), model.disable_adapter():
            reference = model(**inputs).logits
        outputs = model(**inputs)
        loss = (outputs.logits - reference - 1).square().mean()
        return (loss, outputs) if return_outputs else loss


def test_switching_within_the_loss_thaws_nothing(tmp_path):
    model = unfreeze(tiny("bert"), "lora", 2)
    watch = Watch()
    norms: list[float] = []
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.5)

    class Norm(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            norms.extend([logs["grad_norm"]] if "grad_norm" in logs else [])

    trainer = peft_plus.with_plugins(ReferenceFirst)(
        model,
        arguments(tmp_path, max_steps=4, max_grad_norm=1e9, logging_strategy="steps", logging_steps=1),
        train_dataset=rows_of("bert", "SEQ_CLS", 16),
        data_collator=default_data_collator,
        callbacks=[watch, Norm()],
    )
    trainer.train()
    check_schedule(watch, names, [0, 0, 1, 1])
    for norm, gradients, phase in zip(norms, watch.gradients, [0, 0, 1, 1], strict=True):
        held = [gradients[n] for n in expected_trainable(names, phase)]
        assert norm == pytest.approx(float(torch.stack([g.norm() for g in held]).norm()), rel=1e-5)


# ---- resume, best model, second runs -----------------------------------------------------------------------------


def resumable(method: Mapping[str, Any], folder: Path, **settings: Any) -> Any:
    torch.manual_seed(3)
    base = tiny("bert", hidden_dropout_prob=0.1)
    return trainer_of(
        get_model(base, method),
        "bert",
        "SEQ_CLS",
        folder,
        rows=20,
        save_strategy="steps",
        save_steps=1,
        num_train_epochs=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        **settings,
    )


@pytest.mark.parametrize(
    "method",
    [
        {"full": {}, "gradual_unfreeze": {"every": 2}},
        {"lora": {"r": 4, "lora_dropout": 0.1}, "gradual_unfreeze": {"every": "epoch"}, "llrd": {"decay": 0.7}},
        {"lora": {"r": 4}, "gradual_unfreeze": {"every": 2}, "r3f": {"eps": 0.5}},
    ],
    ids=["full", "lora_llrd", "lora_r3f"],
)
def test_a_resumed_run_ends_bit_identical(method, tmp_path):
    """20 examples, 5 batches, two to an update: 3 updates to an epoch, the last one short; resumed at each kind."""
    whole = resumable(method, tmp_path)
    whole.train()
    assert whole.state.global_step == 9
    end = snapshot(whole.model)
    changes = whole.model.peft_plus.timeline
    for step in (2, 3, 7):
        again = resumable(method, tmp_path)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert not changed(end, snapshot(again.model)), f"resumed at step {step}"
        later = [c for c in changes if c.step > step]
        assert [c for c in again.model.peft_plus.timeline if c.step > step] == later


def test_the_best_model_may_be_older_than_a_thawing(tmp_path):
    model = unfreeze(tiny("bert"), "full", 1)
    scores = iter([0.9, 0.1, 0.1, 0.1, 0.1, 0.1])
    after: list[Snapshot] = []

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            after.append(snapshot(model))

    trainer = trainer_of(
        model,
        "bert",
        "SEQ_CLS",
        tmp_path,
        callbacks=[Keep()],
        max_steps=6,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        extra={"eval_dataset": rows_of("bert", "SEQ_CLS", 4), "compute_metrics": lambda _: {"score": next(scores)}},
    )
    start = snapshot(model)
    trainer.train()
    assert trainer.state.best_global_step == 1
    assert not changed(after[0], snapshot(model))
    assert changed(start, snapshot(model)) == changed(start, after[0])
    assert all(row.moved for row in model.peft_plus.engagement["train"])  # proven before the older weights came back


def test_a_second_train_starts_the_schedule_anew(tmp_path):
    model = unfreeze(tiny("bert"), "full", 1)
    names = sorted(snapshot(model))
    watch = Watch()
    trainer = trainer_of(model, "bert", "SEQ_CLS", tmp_path, callbacks=[watch], max_steps=6)
    trainer.train()
    assert all(p.requires_grad for p in model.parameters())
    trainer.train()
    check_schedule(watch, names, [0, 1, 2, 3, 4, 4] * 2)
    assert [c.step for c in model.peft_plus.timeline] == [0, 1, 2, 3, 4]


def test_fit_twice(tmp_path):
    model = unfreeze(tiny("bert"), "lora", 1)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    for _ in range(2):
        watch = Watch()
        peft_plus.fit(
            model,
            arguments(tmp_path, max_steps=5),
            train_dataset=rows_of("bert", "SEQ_CLS", 40),
            data_collator=default_data_collator,
            callbacks=[watch],
        )
        check_schedule(watch, names, [0, 1, 2, 3, 3])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(names)


def test_an_interrupted_run_leaves_the_flags_as_they_were(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, *_, **__):
            raise KeyboardInterrupt

    model = unfreeze(tiny("bert"), "lora", 1)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(KeyboardInterrupt):
        trainer_of(model, "bert", "SEQ_CLS", tmp_path, callbacks=[Stop()], max_steps=5).train()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == names


def test_an_attempt_with_smaller_batches_begins_anew(tmp_path):
    """auto_find_batch_size: memory runs out at step 2, when the second depth is still frozen."""

    class RunsOut(TrainerCallback):
        attempts = 0

        def on_step_end(self, args, state, control, **_):
            if state.global_step == 2 and not self.attempts:
                self.attempts += 1
                raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")

    model = unfreeze(tiny("bert"), "lora", 3, llrd={})
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    ran_out, watch = RunsOut(), Watch()
    settings = {"auto_find_batch_size": True, "per_device_train_batch_size": 8, "max_steps": 8}
    trainer_of(model, "bert", "SEQ_CLS", tmp_path, callbacks=[watch, ran_out], **settings).train()
    assert ran_out.attempts == 1
    check_schedule(watch, names, [0, 0, 0, 0, 0, 1, 1, 1, 2, 2])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(names)


# ---- learning rates ----------------------------------------------------------------------------------------------

DECAY = 0.6


def linear(step: int, total: int) -> float:
    return 1 - step / total


def cosine_after_warmup(step: int, total: int, warmup: int = 3) -> float:
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


class Rates(TrainerCallback):
    """The optimizer's own rates after each update, as schedulers and logs see them."""

    def __init__(self) -> None:
        self.groups: list[list[float]] = []
        self.scheduled: list[list[float]] = []

    def on_step_end(self, args, state, control, optimizer, lr_scheduler, **_):
        self.groups.append([float(g["lr"]) for g in optimizer.param_groups])
        self.scheduled.append([float(x) for x in lr_scheduler.get_last_lr()])


def effective_rates(watch: Watch, step: int, blocks: int = 3) -> dict[int, float]:
    """Depth → −update·gradient / gradient², which for plain SGD is the rate."""
    rates = {}
    for depth, group in by_depth(sorted(watch.gradients[step]), blocks).items():
        pairs = [(watch.updates[step][n], watch.gradients[step][n]) for n in group]
        rates[depth] = float(-sum((u * g).sum() for u, g in pairs) / sum(g.square().sum() for _, g in pairs))
        for update, gradient in pairs:  # one rate for the whole group, not only on average
            torch.testing.assert_close(update, -rates[depth] * gradient, rtol=1e-6, atol=1e-12)
    return rates


@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        ({"lr_scheduler_type": "linear"}, linear),
        ({"lr_scheduler_type": "cosine", "warmup_steps": 3}, cosine_after_warmup),
    ],
    ids=["linear", "cosine_with_warmup"],
)
@pytest.mark.parametrize(("name", "task"), [("bert", "SEQ_CLS"), ("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")])
def test_llrd_measured_from_the_updates(name, task, schedule, factor, tmp_path):
    model = get_model(tiny(name, task).double(), {"full": {}, "llrd": {"decay": DECAY}})
    watch, rates = Watch(), Rates()
    trainer_of(
        model,
        name,
        task,
        tmp_path,
        callbacks=[watch, rates],
        max_steps=8,
        optim="sgd",
        learning_rate=0.05,
        max_grad_norm=0.0,
        **schedule,
    ).train()
    for step in range(8):
        base = 0.05 * factor(step, 8)
        for depth, rate in effective_rates(watch, step).items():
            # The head keeps the base rate, the top block gets base·d, the embeddings base·d^(L+1), L = 3.
            assert rate == pytest.approx(base * DECAY ** (4 - depth), rel=1e-6, abs=1e-15)
        later = 0.05 * factor(step + 1, 8)
        assert rates.groups[step] == rates.scheduled[step]
        assert rates.groups[step] == pytest.approx([later] * len(rates.groups[step]), rel=1e-12, abs=1e-18)


class Chained(peft_plus.Trainer):
    """A scheduler that multiplies whatever rate stands in the group, instead of computing it anew."""

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer or self.optimizer, 0.8)
        return self.lr_scheduler


def test_llrd_does_not_compound_in_a_chained_scheduler(tmp_path):
    model = get_model(tiny("bert").double(), {"full": {}, "llrd": {"decay": DECAY}})
    watch, rates = Watch(), Rates()
    Chained(
        model,
        arguments(tmp_path, max_steps=5, optim="sgd", max_grad_norm=0.0),
        train_dataset=rows_of("bert", "SEQ_CLS", 20),
        data_collator=default_data_collator,
        callbacks=[watch, rates],
    ).train()
    for step in range(5):
        wanted = {d: 1e-2 * 0.8**step * DECAY ** (4 - d) for d in range(5)}
        assert effective_rates(watch, step) == pytest.approx(wanted, rel=1e-6)
        assert rates.groups[step] == pytest.approx([1e-2 * 0.8 ** (step + 1)] * len(rates.groups[step]))


def test_llrd_on_lora(tmp_path):
    model = get_model(tiny("bert").double(), {"lora": {"r": 4}, "llrd": {"decay": DECAY}}).double()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.5)
    watch = Watch()
    settings = {"max_steps": 3, "optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    trainer_of(model, "bert", "SEQ_CLS", tmp_path, callbacks=[watch], **settings).train()
    rates = effective_rates(watch, 2)
    assert rates == pytest.approx({d: 1e-2 * DECAY ** (4 - d) for d in (1, 2, 3, 4)}, rel=1e-9)


def test_llrd_with_the_users_optimizer_keeps_its_groups_and_options(tmp_path):
    model = get_model(tiny("bert").double(), {"full": {}, "llrd": {"decay": DECAY}})
    head = [p for n, p in model.named_parameters() if depth_of(n, 3) == 4]
    rest = [p for n, p in model.named_parameters() if depth_of(n, 3) < 4]
    optimizer = torch.optim.SGD([{"params": head, "lr": 0.2}, {"params": rest, "nesterov": False}], lr=0.1)
    watch, rates = Watch(), Rates()
    trainer_of(
        model,
        "bert",
        "SEQ_CLS",
        tmp_path,
        callbacks=[watch, rates],
        extra={"optimizers": (optimizer, None)},
        max_steps=4,
        max_grad_norm=0.0,
    ).train()
    for step in range(4):
        wanted = {d: 0.1 * linear(step, 4) * DECAY ** (4 - d) for d in range(4)} | {4: 0.2 * linear(step, 4)}
        assert effective_rates(watch, step) == pytest.approx(wanted, rel=1e-6)
    assert sorted(rates.groups[0]) == pytest.approx([0.075] * 4 + [0.15])
    assert {p for g in optimizer.param_groups for p in g["params"]} == set(model.parameters())


def test_llrd_refuses_a_scheduler_made_for_other_groups(tmp_path):
    model = get_model(tiny("bert"), {"full": {}, "llrd": {}})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    trainer = trainer_of(model, "bert", "SEQ_CLS", tmp_path, extra={"optimizers": (optimizer, scheduler)}, max_steps=2)
    with pytest.raises(MethodError, match=r"llrd.*optimizers=\(optimizer, None\)"):
        trainer.train()


def test_freezing_alone_takes_the_users_optimizer_and_scheduler(tmp_path):
    model = unfreeze(tiny("bert"), "full", 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    watch = Watch()
    extra = {"optimizers": (optimizer, scheduler)}
    trainer_of(model, "bert", "SEQ_CLS", tmp_path, callbacks=[watch], extra=extra, max_steps=5).train()
    check_schedule(watch, sorted(snapshot(model)), [0, 1, 2, 3, 4])


def test_an_optimizer_made_while_layers_were_frozen_is_refused(tmp_path):
    model = unfreeze(tiny("bert"), "full", 1)
    some = [p for n, p in model.named_parameters() if "layer.0" not in n]
    trainer = trainer_of(
        model, "bert", "SEQ_CLS", tmp_path, extra={"optimizers": (torch.optim.AdamW(some), None)}, max_steps=2
    )
    with pytest.raises(MethodError, match=r"layer\.0.*made while they were frozen"):
        trainer.train()


def test_an_optimizer_that_computes_its_own_rate_is_refused():
    from transformers.optimization import Adafactor

    model = get_model(tiny("bert"), {"full": {}, "llrd": {}})
    plan = model.peft_plus
    effects = Effects(model, plan, plan.stages[0])
    optimizer = Adafactor(model.parameters(), relative_step=True, lr=None)
    rates = rates_module.Rates(plan, plan.stages[0], effects.param_of)
    rates.split(optimizer)
    names = {id(p): n for n, p in model.named_parameters()}
    depths = [{depth_of(names[id(p)], 3) for p in group["params"]} for group in optimizer.param_groups]
    assert all(len(found) == 1 for found in depths)
    assert set().union(*depths) == {0, 1, 2, 3, 4}
    with pytest.raises(MethodError, match=r"llrd.*relative_step=False"):
        rates.scale(optimizer, Run(model=model, task=plan.task, num_blocks=3))


@dataclass(kw_only=True)
class Mute(Plugin):
    """Rate 0 below a depth."""

    name: ClassVar[str] = "mute"

    below: int = 2

    def lr_scale(self, run, param):
        return 0.0 if param.depth < self.below else 1.0


def test_rates_of_two_plugins_multiply_and_zero_is_no_claim_to_move(tmp_path):
    model = get_model(tiny("bert").double(), ["full", peft_plus_llrd(), Mute()])
    watch = Watch()
    settings = {"max_steps": 2, "optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    trainer_of(model, "bert", "SEQ_CLS", tmp_path, callbacks=[watch], **settings).train()
    assert effective_rates(watch, 1) == pytest.approx(
        {0: 0.0, 1: 0.0, 2: 1e-2 * DECAY**2, 3: 1e-2 * DECAY, 4: 1e-2}, rel=1e-6, abs=1e-15
    )
    steps = {row.group[0]: row.steps for row in model.peft_plus.engagement["train"]}
    assert steps == {0: 0, 1: 0, 2: 2, 3: 2, 4: 2}


def peft_plus_llrd() -> Plugin:
    from peft_plus_stability.llrd import LLRD

    return LLRD(decay=DECAY)


def test_a_rate_that_is_no_rate_is_refused(tmp_path):
    @dataclass(kw_only=True)
    class Backwards(Plugin):
        name: ClassVar[str] = "backwards"

        def lr_scale(self, run, param):
            return -1.0

    model = get_model(tiny("bert"), ["full", Backwards()])
    with pytest.raises(peft_plus.PluginError, match=r"backwards.*-1\.0"):
        trainer_of(model, "bert", "SEQ_CLS", tmp_path, max_steps=1).train()


# ---- proof of engagement -----------------------------------------------------------------------------------------


def test_a_group_that_no_gradient_reaches_fails_the_run_and_saves_it(tmp_path):
    base = tiny("bert")
    base.bert.encoder.layer[1].register_forward_hook(
        lambda module, inputs, output: output.detach() if isinstance(output, Tensor) else (output[0].detach(),)
    )
    model = get_model(base, "full")
    with pytest.raises(EngagementError, match=r"block 2, block 1, embeddings: declared trainable.*unproven"):
        trainer_of(model, "bert", "SEQ_CLS", tmp_path, max_steps=3).train()
    saved = load_file(tmp_path / "unproven" / "model.safetensors")
    assert not changed({n: saved[n] for n in snapshot(model)}, snapshot(model))
    assert json.loads((tmp_path / "unproven" / "peft_plus.json").read_text())["tuner"] == "full"


def test_a_rate_too_small_for_bf16_fails_the_run(tmp_path):
    base = tiny("bert").bfloat16()
    with torch.no_grad():
        for tensor in base.parameters():
            tensor.add_(0.5)  # next to 0 any rate moves a weight
    model = get_model(base, "full")
    with pytest.raises(EngagementError, match=r"head.*too small for its dtype"):
        trainer_of(model, "bert", "SEQ_CLS", tmp_path, max_steps=2, learning_rate=1e-9, optim="sgd").train()


def test_a_rate_of_zero_claims_nothing(tmp_path):
    model = get_model(tiny("bert"), "full")
    at_rest = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.0})}
    trainer_of(model, "bert", "SEQ_CLS", tmp_path, max_steps=2, extra=at_rest).train()
    assert {row.steps for row in model.peft_plus.engagement["train"]} == {0}


class Meddle(TrainerCallback):
    """Changes one bit of one weight, once."""

    def __init__(self, name: str, step: int = 1) -> None:
        self.name, self.step = name, step

    def on_step_end(self, args, state, control, model, **_):
        if state.global_step == self.step:
            bits = model.get_parameter(self.name).detach().view(-1)[:1].view(torch.int32)
            bits ^= 1


@pytest.mark.parametrize(
    ("tuner", "name"),
    [
        ("full", "bert.encoder.layer.0.output.dense.weight"),
        ("lora", "base_model.model.bert.encoder.layer.0.output.dense.weight"),
        ("lora", "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.default.weight"),
    ],
)
def test_a_callback_that_moves_a_frozen_weight_by_one_bit_is_caught(tuner, name, tmp_path):
    model = unfreeze(tiny("bert"), tuner, 100)
    with pytest.raises(EngagementError, match=f"1 frozen tensors moved.*{re.escape(name)}"):
        trainer_of(model, "bert", "SEQ_CLS", tmp_path, max_steps=3, callbacks=[Meddle(name)]).train()
    assert (tmp_path / "unproven").is_dir()


def test_the_table_tells_what_trained(tmp_path, caplog):
    model = unfreeze(tiny("bert"), "full", 2)
    with caplog.at_level(logging.INFO, "peft_plus"):
        trainer_of(model, "bert", "SEQ_CLS", tmp_path, max_steps=5).train()
    rows = {row.group: row for row in model.peft_plus.engagement["train"]}
    assert {group: row.steps for group, row in rows.items()} == {
        (4, "head"): 5,
        (4, "base"): 5,
        (3, "base"): 3,
        (2, "base"): 1,
        (1, "base"): 0,
        (0, "base"): 0,
    }
    assert rows[(1, "base")].moved == 0
    assert rows[(3, "base")].moved > 0
    assert sum(row.tensors for row in rows.values()) == len(list(model.parameters()))
    assert re.search(r"block 3\s+3\s+\d+/\d+", caplog.text)


def test_a_schedule_longer_than_the_run_warns(tmp_path, caplog):
    model = unfreeze(tiny("bert"), "lora", 2)
    with caplog.at_level(logging.WARNING, "peft_plus"):
        trainer_of(model, "bert", "SEQ_CLS", tmp_path, max_steps=4).train()
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("peft_plus")]
    assert message.startswith(
        "In these 4 steps the schedule (gradual_unfreeze) never trains: block 2 adapter, block 1 adapter. "
    )
    caplog.clear()
    with caplog.at_level(logging.WARNING, "peft_plus"):
        trainer_of(model, "bert", "SEQ_CLS", tmp_path, max_steps=7).train()
    assert not [r for r in caplog.records if r.name.startswith("peft_plus")]


@pytest.mark.parametrize("trains", [False, True], ids=["frozen_by_hand", "thawed_by_hand"])
def test_flags_changed_by_hand_are_refused_with_the_fix(trains, tmp_path):
    model = unfreeze(tiny("bert"), "lora", 2)
    name = next(n for n, p in model.named_parameters() if p.requires_grad is not trains)
    model.get_parameter(name).requires_grad_(trains)
    said = "made trainable after the plan" if trains else "frozen by hand"
    with pytest.raises(MethodError, match=rf"{said}.*{re.escape(name)}.*peft_plus\.attach"):
        trainer_of(model, "bert", "SEQ_CLS", tmp_path, max_steps=2).train()
    peft_plus.attach(model, {"gradual_unfreeze": {"every": 1}})
    watch = Watch()
    trainer_of(model, "bert", "SEQ_CLS", tmp_path, max_steps=5, callbacks=[watch]).train()
    assert (name in set().union(*watch.moved)) is trains


def test_a_plugin_that_answers_with_no_bool_is_refused(tmp_path):
    @dataclass(kw_only=True)
    class Vague(Plugin):
        name: ClassVar[str] = "vague"

        def may_train(self, run, param):
            return torch.tensor(True)

    model = get_model(tiny("bert"), ["full", Vague()])
    with pytest.raises(peft_plus.PluginError, match=r"vague.*expected a bool"):
        trainer_of(model, "bert", "SEQ_CLS", tmp_path, max_steps=1).train()


def test_a_plugin_that_looks_back_is_refused(tmp_path):
    @dataclass(kw_only=True)
    class Late(Plugin):
        name: ClassVar[str] = "late"

        def may_train(self, run, param):
            return True

        def next_change(self, run):
            return run.step

    model = get_model(tiny("bert"), ["full", Late()])
    with pytest.raises(peft_plus.PluginError, match="next_change answered 0 at step 0"):
        trainer_of(model, "bert", "SEQ_CLS", tmp_path, max_steps=1).train()


@dataclass(kw_only=True)
class Blink(Plugin):
    """Every other step, and without telling ahead."""

    name: ClassVar[str] = "blink"

    def may_train(self, run, param):
        return run.step % 2 == 0 or param.part == "head"


def test_a_plugin_without_foresight_is_asked_at_every_step(tmp_path):
    model = get_model(tiny("bert"), ["lora", Blink()])
    watch = Watch()
    trainer_of(model, "bert", "SEQ_CLS", tmp_path, max_steps=4, callbacks=[watch], weight_decay=0.1).train()
    for step, moved in enumerate(watch.moved):
        assert any("lora" in n for n in moved) is (step % 2 == 0)
        assert any("classifier" in n for n in moved)


def test_two_gates_must_agree(tmp_path):
    model = get_model(tiny("bert"), ["lora", Blink(), "gradual_unfreeze"])
    watch = Watch()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    trainer_of(model, "bert", "SEQ_CLS", tmp_path, rows=8, num_train_epochs=3, callbacks=[watch]).train()
    for step, moved in enumerate(watch.moved):
        allowed = expected_trainable(names, step // 2)
        assert moved <= {n for n in allowed if step % 2 == 0 or "classifier" in n}
        assert moved


def test_copies_of_one_model_do_not_share_their_plans(tmp_path):
    model = unfreeze(tiny("bert"), "lora", 1)
    twin = copy.deepcopy(model)
    trainer_of(twin, "bert", "SEQ_CLS", tmp_path, max_steps=5).train()
    assert twin.peft_plus.timeline
    assert not model.peft_plus.timeline


def test_the_timeline_of_a_resumed_run_is_whole(tmp_path):
    method = {"lora": {}, "gradual_unfreeze": {"every": 2}}
    first = get_model(tiny("bert"), method)
    trainer_of(first, "bert", "SEQ_CLS", tmp_path, max_steps=8, save_strategy="steps", save_steps=5).train()
    second = get_model(tiny("bert"), method)
    again = trainer_of(second, "bert", "SEQ_CLS", tmp_path, max_steps=8, save_strategy="steps", save_steps=5)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert [c for c in second.peft_plus.timeline if c.step != 5] == first.peft_plus.timeline


def test_a_step_in_which_nothing_that_the_loss_uses_may_train_says_so(tmp_path):
    model = get_model(tiny("bert", "FEATURE_EXTRACTION"), {"full": {}, "gradual_unfreeze": {"every": 2}})
    extra = {
        "compute_loss_func": lambda output, labels, num_items_in_batch=None: output.last_hidden_state.square().mean()
    }
    trainer = trainer_of(model, "bert", "FEATURE_EXTRACTION", tmp_path, max_steps=2, extra=extra)
    with pytest.raises(MethodError, match=r"At step 0 only top may train, and the loss uses none of it"):
        trainer.train()


def test_a_pooler_that_the_loss_does_not_use_is_a_warning(tmp_path, caplog):
    model = get_model(tiny("bert", "FEATURE_EXTRACTION"), "full")
    extra = {
        "compute_loss_func": lambda output, labels, num_items_in_batch=None: output.last_hidden_state.square().mean()
    }
    trainer_of(model, "bert", "FEATURE_EXTRACTION", tmp_path, max_steps=2, extra=extra).train()
    assert "No gradient ever reached top" in caplog.text
