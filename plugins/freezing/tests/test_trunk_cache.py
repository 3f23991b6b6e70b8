"""A run with `trunk_cache` against the same run without it, under each kind of loop: the same weights, bit for bit."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, IterableDataset
from transformers import DataCollatorForLanguageModeling, TrainerCallback, default_data_collator

import peft_plus
from peft_plus import MethodError, Param, Plugin, PluginError, Run, Session, get_model, with_plugins
from peft_plus.trunk import FeatureStore
from peft_plus_freezing.trunk_cache import TrunkCache
from tests.models import NUM_LABELS, PAD, tiny
from tests.tokenizers import tiny_tokenizer
from tests.training import quiet
from tests.trunk.architectures import DROPOUT, batch_of, model_of, task_of

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")

Weights = dict[str, Tensor]

LORA = {"r": 2, "init_lora_weights": False, "target_modules": "all-linear"}
OWN = {
    "gpt2": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    "mixtral": {"target_modules": ["q_proj"]},
}
FROZEN = {"blocks": 2}


def built(name: str, method: Mapping[str, Any], task: str | None = None, **overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    task = task or task_of(name)
    given = dict(method)
    if "lora" in given:
        given["lora"] = {**LORA, **OWN.get(name, {}), **given["lora"]}
    return get_model(model_of(name, task, **overrides), given, task=None if name == "vit" else task)


def rows_of(name: str, number: int, *, ragged: bool = False, **settings: Any) -> list[dict[str, Tensor]]:
    data = batch_of(name, rows=number, **settings)
    rows = [{key: value[i] for key, value in data.items()} for i in range(number)]
    if ragged:
        for place, row in enumerate(rows):
            kept = min(int(row["attention_mask"].sum()), 3 + place * 5 % 13)
            for key, value in row.items():
                row[key] = value[:kept] if value.dim() == 1 else value
    return rows


def padding(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Collate rows of different length."""
    return {
        key: pad_sequence([row[key] for row in rows], batch_first=True, padding_value=PAD)
        if rows[0][key].dim()
        else torch.stack([row[key] for row in rows])
        for key in rows[0]
    }


def weights(model: nn.Module) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def differing(one: Weights, other: Weights) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def distance(one: Weights, other: Weights) -> float:
    return float(sum((one[n] - other[n]).double().square().sum() for n in one) ** 0.5)


class Computed(TrainerCallback):
    """How many rows the first block computes in each step, of those that are no trial."""

    def __init__(self, model: nn.Module) -> None:
        self.steps: list[int] = []
        block: Any = model.get_submodule(model.peft_plus.layers.blocks[1][0])  # type: ignore[union-attr]
        first = next(m for m in block.modules() if any(True for _ in m.parameters(recurse=False)))
        first.register_forward_hook(self._count)

    def _count(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.steps:
            self.steps[-1] += len(output)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.steps.append(0)


def trainer_of(
    model: nn.Module,
    rows: Any,
    folder: Any,
    *callbacks: TrainerCallback,
    collate: Any = None,
    evaluated: Any = None,
    **settings: Any,
) -> Any:
    defaults = {
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 3,
        "train_sampling_strategy": "sequential",
        "logging_strategy": "no",
        "remove_unused_columns": False,
    }
    return peft_plus.Trainer(
        model,
        quiet(folder, **{**defaults, **settings}),
        train_dataset=rows,
        eval_dataset=evaluated,
        data_collator=collate or default_data_collator,
        callbacks=list(callbacks),
    )


def trained(
    name: str,
    folder: Any,
    *,
    cache: Mapping[str, Any] | None,
    method: Mapping[str, Any] | None = None,
    task: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    number: int = 16,
    left: bool = False,
    **settings: Any,
) -> tuple[Weights, list[int]]:
    """The weights after a run, and how many rows were computed in each step; `cache=None` is the run without it."""
    method = dict(method or {"lora": {}, "freeze": FROZEN})
    if cache is not None:
        method["trunk_cache"] = dict(cache)
    model = built(name, method, task, **(overrides or {}))
    computed = Computed(model)
    rows = rows_of(name, number, task=task, left=left)
    trainer_of(model, rows, folder, computed, **settings).train()
    return weights(model), computed.steps


# ---- the same run --------------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {"activation_checkpointing": True},
    "reentrant": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    "bf16": {"bf16": True},
    "clipped, decayed": {"max_grad_norm": 0.1, "weight_decay": 0.1},
}


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        *(("bert", variant) for variant in VARIANTS),
        *(("llama", "plain"), ("llama", "bf16"), ("gpt2", "plain"), ("t5", "plain"), ("t5", "accumulation")),
        *(("vit", "plain"), ("opt", "checkpointing"), ("bart", "plain"), ("modernbert", "plain")),
    ],
)
def test_the_run_ends_with_the_bits_of_the_run_without_it(name: str, variant: str, tmp_path: Path) -> None:
    settings = VARIANTS[variant]
    plain, _ = trained(name, tmp_path, cache=None, **settings)
    cached, computed = trained(name, tmp_path, cache={}, **settings)
    assert differing(cached, plain) == []
    first = 2 if variant == "accumulation" else 4
    assert len(computed) == 3 * first
    assert min(computed[:first]) > 0
    assert computed[first:] == [0] * 2 * first
    assert list(tmp_path.iterdir()) == []  # the run has finished, and nobody named a folder


@pytest.mark.parametrize("task", ["SEQ_CLS", "CAUSAL_LM"])
def test_gpt2_with_padding_on_the_left(task: str, tmp_path: Path) -> None:
    plain, _ = trained("gpt2", tmp_path, cache=None, task=task, left=True)
    cached, computed = trained("gpt2", tmp_path, cache={}, task=task, left=True)
    assert differing(cached, plain) == []
    assert computed[4:] == [0] * 8


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
@pytest.mark.parametrize("variant", ["plain", "bf16"])
def test_filled_before_training_the_run_is_the_same_up_to_rounding_and_computes_nothing(
    name: str, variant: str, tmp_path: Path
) -> None:
    """Under autocast too: the pass that fills the store goes through it as training does."""
    settings = {"optim": "sgd", **VARIANTS[variant]}
    plain, _ = trained(name, tmp_path, cache=None, **settings)
    cached, computed = trained(name, tmp_path, cache={"fill": "before"}, **settings)
    start = weights(built(name, {"lora": {}, "freeze": FROZEN}))
    assert distance(cached, plain) < (1e-5 if variant == "plain" else 0.05) * distance(plain, start)
    assert computed[1:] == [0] * 11
    assert computed[0] <= 8  # the trial of the first batch


def test_filling_before_draws_nothing_of_what_training_draws(tmp_path: Path) -> None:
    """One batch of all, in the order of the data: even the rounding is the same, and so is the dropout."""
    overrides = DROPOUT["bert"]
    found = [
        trained(
            "bert",
            tmp_path,
            cache={"fill": fill},
            overrides=overrides,
            number=4,
            num_train_epochs=4,
            train_sampling_strategy="random",
        )[0]
        for fill in ("first_epoch", "before")
    ]
    assert distance(*found) < 1e-5


def test_full_training_above_the_trunk(tmp_path: Path) -> None:
    method = {"full": {}, "freeze": FROZEN}
    for settings in ({}, {"bf16": True}):
        plain, _ = trained("bert", tmp_path, cache=None, method=method, **settings)
        cached, computed = trained("bert", tmp_path, cache={}, method=method, **settings)
        assert differing(cached, plain) == []
        assert computed[4:] == [0] * 8


def test_an_nf4_base(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path / "base")
    found = []
    for more in ({}, {"trunk_cache": {}}):
        torch.manual_seed(0)
        method = {"lora": {**LORA, "target_modules": ["query", "value"]}, "freeze": FROZEN, **more}
        model = get_model(str(tmp_path / "base"), method, task="SEQ_CLS", num_labels=NUM_LABELS, quantization="nf4")
        computed = Computed(model)
        trainer_of(model, rows_of("bert", 16), tmp_path / "out", computed).train()
        found.append({name: t for name, t in weights(model).items() if t.is_floating_point()})
    assert differing(*found) == []
    assert computed.steps[4:] == [0] * 8


def test_rounded_to_bf16_the_loss_stays_within_a_ten_thousandth(tmp_path: Path) -> None:
    losses = []
    for more in ({}, {"trunk_cache": {"dtype": "bf16"}}):
        model = built("bert", {"lora": {"init_lora_weights": True}, "freeze": FROZEN, **more})
        trainer = trainer_of(model, rows_of("bert", 16), tmp_path, logging_strategy="steps", logging_steps=1)
        losses.append(trainer.train().training_loss)
    assert losses[0] != losses[1]
    assert abs(losses[0] - losses[1]) < 1e-4


def test_noise_in_the_embeddings_still_goes_through_the_whole_model(tmp_path: Path) -> None:
    method = {"lora": {}, "freeze": FROZEN, "r3f": {"eps": 0.3}}
    plain, _ = trained("bert", tmp_path, cache=None, method=method)
    cached, computed = trained("bert", tmp_path, cache={}, method=method)
    without, _ = trained("bert", tmp_path, cache={})
    assert differing(cached, plain) == []
    assert differing(cached, without) != []
    assert computed[4:] == [4] * 8  # the pass with the noise alone


class Evaluated(TrainerCallback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_evaluate(self, *_: Any, metrics: Mapping[str, float], **__: Any) -> None:
        self.losses.append(metrics["eval_loss"])


def test_evaluations_meanwhile_are_those_of_the_run_without_it(tmp_path: Path) -> None:
    found = []
    for more in ({}, {"trunk_cache": {}}):
        model = built("bert", {"lora": {}, "freeze": FROZEN, **more})
        seen = Evaluated()
        other = rows_of("bert", 8, seed=7)
        settings = {"eval_strategy": "steps", "eval_steps": 1, "evaluated": other}
        trainer_of(model, rows_of("bert", 16), tmp_path, seen, **settings).train()
        found.append((seen.losses, weights(model)))
    assert found[0][0] == found[1][0]
    assert len(set(found[0][0])) == 12
    assert differing(found[0][1], found[1][1]) == []


# ---- a bare loop, and TRL ------------------------------------------------------------------------------------------


def session_run(
    model: nn.Module,
    folder: Path,
    *,
    rows: Any,
    accumulation: int = 1,
    save_at: int = 0,
    stop_at: int = 0,
    precision: str = "no",
    **settings: Any,
) -> Weights:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation, mixed_precision=precision)
    session = Session(model, accelerator, epochs=3)
    optimizer = session.optimizer(torch.optim.AdamW, lr=1e-2)
    loader = session.loader(rows, batch_size=4, collate_fn=padding, **settings)
    if not save_at and folder.exists():
        session.resume(folder)
    for inputs in session.batches(loader):
        with accelerator.accumulate(session.model):
            accelerator.backward(session.loss(inputs))
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            if session.step == save_at:
                session.save(folder)
            if session.step == stop_at:
                break
    return weights(model)


@pytest.mark.parametrize(("accumulation", "precision"), [(1, "no"), (2, "no"), (1, "bf16")])
def test_a_session_ends_with_the_bits_of_the_run_without_it(accumulation: int, precision: str, tmp_path: Path) -> None:
    found, computed = [], None
    for more in ({}, {"trunk_cache": {}}):
        model = built("bert", {"lora": {}, "freeze": FROZEN, **more})
        computed = Computed(model)
        computed.steps.append(0)
        rows = rows_of("bert", 16, ragged=True)
        how = {"accumulation": accumulation, "precision": precision, "shuffle": False}
        found.append(session_run(model, tmp_path / "none", rows=rows, **how))
    assert differing(*found) == []
    assert computed is not None
    assert computed.steps[0] <= 16 + 12
    assert list(tmp_path.iterdir()) == []


def test_a_session_is_filled_before_its_first_step() -> None:
    model = built("bert", {"lora": {}, "freeze": FROZEN, "trunk_cache": {"fill": "before"}})
    session = Session(model, Accelerator(cpu=True), epochs=1)
    optimizer = session.optimizer(torch.optim.AdamW, lr=1e-2)
    loader = session.loader(rows_of("bert", 16, ragged=True), batch_size=4, collate_fn=padding)
    steps = []
    for inputs in session.batches(loader):
        computed = Computed(model)
        computed.steps.append(0)
        session.accelerator.backward(session.loss(inputs))
        optimizer.step()
        optimizer.zero_grad()
        steps.append(computed.steps[0])
    assert steps[1:] == [0, 0, 0]


@pytest.mark.filterwarnings("ignore:`(label_smoothing_factor|compute_loss_func)` is deprecated:FutureWarning")
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("fill", ["first_epoch", "before"])
def test_supervised_fine_tuning_of_trl_also_packed(packing: bool, fill: str, tmp_path: Path) -> None:
    import datasets
    import trl

    texts = ["the cat is good", "a dog in paris is bad and good", "what works on the dog", "where is york"] * 2
    datasets.disable_progress_bars()
    found = []
    for more in ({}, {"trunk_cache": {"fill": fill}}):
        tokenizer = tiny_tokenizer("decoder")
        lora = {"lora": {"target_modules": ["q_proj", "v_proj"]}}
        model = built("llama", {**lora, "freeze": FROZEN, **more}, "CAUSAL_LM", vocab_size=len(tokenizer))
        computed = Computed(model)
        args = quiet(
            tmp_path,
            kind=trl.SFTConfig,
            per_device_train_batch_size=1 if packing else 2,
            num_train_epochs=3,
            learning_rate=1e-2,
            bf16=False,
            packing=packing,
            max_length=16,
            train_sampling_strategy="sequential",
        )
        trainer = with_plugins(trl.SFTTrainer)(
            model=model,
            args=args,
            train_dataset=datasets.Dataset.from_dict({"text": texts}),
            processing_class=tokenizer,
            callbacks=[computed],
        )
        trainer.train()
        found.append(weights(model))
        steps = len(computed.steps) // 3
    assert computed.steps[steps:] == [0] * 2 * steps
    if fill == "before":
        assert sum(computed.steps[1:]) == 0
        assert distance(*found) < 1e-4
    else:
        assert differing(*found) == []
    datasets.enable_progress_bars()


# ---- schedules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "depths"),
    [
        # Five depths: head 4, blocks 3 to 1, embeddings 0. Epochs of 4 steps. From the start all of 3 blocks could be
        # served until 6 (3 · (6 − 4) = 6), two until 12 (2 · (12 − 4) = 16), one until 18 (14).
        ({"every": 6}, [(0, 2), (12, 1), (18, 0)]),
        ({"at": [0.25, 0.9]}, [(0, 2)]),  # blocks 3 and 2 thaw at 6 and 22: 2 · (22 − 4) = 36, 1 · 20 = 20
        ({"every": "epoch"}, [(0, 2), (8, 0)]),  # 2 · (8 − 4) = 8, 1 · (12 − 4) = 8; then 1 · (12 − 8 − 4) = 0
    ],
)
def test_a_schedule_is_handed_over_exactly_where_a_block_thaws(
    schedule: dict[str, Any], depths: list[tuple[int, int]], tmp_path: Path
) -> None:
    method = {"full": {}, "gradual_unfreeze": schedule}
    served: list[tuple[int, int]] = []

    class Depth(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            engine = trainer._engine
            depth = engine.trunk._cache.depth
            if not served or served[-1][1] != depth:
                served.append((state.global_step, depth))

    found = []
    for more in ({}, {"trunk_cache": {}}):
        model = built("bert", {**method, **more})
        callbacks = [Depth()] if more else []
        trainer = trainer_of(model, rows_of("bert", 16), tmp_path, *callbacks, num_train_epochs=6, optim="sgd")
        trainer.train()
        found.append(weights(model))
    assert differing(*found) == []
    assert served[: len(depths)] == depths
    assert list(tmp_path.iterdir()) == []


class Rewinds(Plugin):
    """All trains for four steps, then the head alone; at step 10 all weights become again what they were at step 2."""

    name = "rewinds"

    def may_train(self, run: Run, param: Param) -> bool:
        return run.step < 4 or param.depth == run.num_blocks + 1

    def next_change(self, run: Run) -> int | None:
        return 4 if run.step < 4 else None

    def on_step_end(self, run: Run) -> None:
        if run.step == 2:
            run.keep("early")
        if run.step == 10:
            run.restore("early")


def test_weights_that_are_put_back_below_the_store_are_computed_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = []
    for more in ([], [TrunkCache()]):
        torch.manual_seed(0)
        model = get_model(model_of("bert"), ["full", Rewinds(), *more], task="SEQ_CLS")
        trainer_of(model, rows_of("bert", 16), tmp_path, num_train_epochs=4).train()
        found.append(weights(model))
    assert differing(*found) == []
    assert "The frozen blocks 1 to 3 were changed, so their output is stored anew" in caplog.text


def test_a_stage_in_which_everything_trains_goes_on_without_a_store(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A probe of the head, whose trunk is the whole stack, and then fine-tuning of all."""
    found = []
    for more in ({}, {"trunk_cache": {}}):
        method = {"full": {}, "lp_ft": {"probe_epochs": 3, "probe_lr": 0.05}, **more}
        model = built("bert", method)
        args = quiet(tmp_path, per_device_train_batch_size=4, num_train_epochs=1, train_sampling_strategy="sequential")
        peft_plus.fit(model, args, train_dataset=rows_of("bert", 16), data_collator=default_data_collator)
        found.append(weights(model))
    assert differing(*found) == []
    assert "trunk_cache has nothing to store: the embeddings or something in front of them trains" in caplog.text


def test_what_freezes_later_is_served_from_then_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All trains at first; which block freezes when is known only when it does."""
    with caplog.at_level(logging.INFO):
        method = {"full": {}, "autofreeze": {"interval_steps": 4, "percentile": 90}}
        _, computed = trained("bert", tmp_path, cache={}, method=method, num_train_epochs=8)
    assert "trunk_cache waits: the embeddings or something in front of them trains now" in caplog.text
    assert min(computed) == 0


# ---- interrupted ---------------------------------------------------------------------------------------------------


class Killed(Exception):
    """The process is gone."""


class KillAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._step:
            raise Killed


class StopAfter(TrainerCallback):
    """Ends the run as one does whose time on a cluster is over."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._step:
            control.should_training_stop = True


SCHEDULES: dict[str, dict[str, Any]] = {
    "static": {"lora": {}, "freeze": FROZEN},
    "gradual": {"full": {}, "gradual_unfreeze": {"every": 7}},
    "left": {"lora": {}, "freeze": FROZEN},
}
STEPS = 20


def long_run(
    schedule: str, folder: Path, *callbacks: TrainerCallback, save_steps: int = STEPS, resume: Any = None
) -> Weights:
    """Five epochs of four steps in random order, of rows of different length, with dropout above the trunk."""
    name = "llama" if schedule == "left" else "bert"
    model = built(name, {**SCHEDULES[schedule], "trunk_cache": {}}, **DROPOUT[name])
    rows = rows_of(name, 16, ragged=schedule != "left", left=schedule == "left", length=16)
    trainer = trainer_of(
        model,
        [*rows[:14], *rows[:2]],  # two examples come twice
        folder,
        *callbacks,
        collate=default_data_collator if schedule == "left" else padding,
        train_sampling_strategy="random",
        num_train_epochs=5,
        save_strategy="steps",
        save_steps=save_steps,
    )
    trainer.train(resume_from_checkpoint=resume)
    return weights(model)


@contextmanager
def killed() -> Iterator[None]:
    """A run that breaks off here leaves what a killed process leaves: nothing is sealed on the way out."""
    close = FeatureStore.close

    def drop(self: FeatureStore, *, remove: bool = False) -> None:
        self._open = None
        close(self, remove=remove)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureStore, "close", drop)
        with pytest.raises(Killed):
            yield


@pytest.mark.parametrize(
    ("schedule", "late", "steps"),
    [
        ("static", 0, (3, 4, 17)),
        ("static", 3, (1, 6)),
        ("gradual", 0, (7, 14, 16)),
        ("gradual", 6, (9, 11)),
        ("left", 3, (9,)),
    ],
)
def test_killed_after_any_step_and_resumed_the_run_ends_bit_identical(
    schedule: str, late: int, steps: Sequence[int], tmp_path: Path
) -> None:
    """`late`: it went on for some steps after the checkpoint, over the end of an epoch and a thaw, and stored more."""
    whole = long_run(schedule, tmp_path / "whole")
    for step in steps:
        folder = tmp_path / f"{step}"
        with killed():
            long_run(schedule, folder, KillAfter(step + late + 1), save_steps=step)
        resumed = long_run(schedule, folder, save_steps=step, resume=str(folder / f"checkpoint-{step}"))
        assert differing(resumed, whole) == [], f"resumed at step {step}"
        assert not (folder / "_trunk").exists()


def test_stopped_by_a_callback_it_keeps_what_a_resumed_run_needs(tmp_path: Path) -> None:
    whole = long_run("static", tmp_path / "whole")
    long_run("static", tmp_path / "cut", StopAfter(9), save_steps=9)
    assert any((tmp_path / "cut" / "_trunk").rglob("*.rows"))
    assert differing(long_run("static", tmp_path / "cut", save_steps=9, resume=True), whole) == []
    assert not (tmp_path / "cut" / "_trunk").exists()


@pytest.mark.parametrize("step", [2, 17])
def test_resumed_without_its_store_it_ends_within_rounding(step: int, tmp_path: Path) -> None:
    whole = long_run("static", tmp_path / "whole")
    long_run("static", tmp_path / "cut", StopAfter(step), save_steps=step)
    shutil.rmtree(tmp_path / "cut" / "_trunk")
    resumed = long_run("static", tmp_path / "cut", save_steps=step, resume=True)
    start = weights(built("bert", {"lora": {}, "freeze": FROZEN}))
    assert distance(resumed, whole) < 1e-3 * distance(whole, start)


def test_a_session_that_was_interrupted_ends_bit_identical(tmp_path: Path) -> None:
    """Its store moves beside the first checkpoint; before, it lies in a temporary folder."""
    method = {"lora": {}, "freeze": FROZEN, "trunk_cache": {}}
    rows = rows_of("bert", 16, ragged=True)
    whole = session_run(built("bert", method, **DROPOUT["bert"]), tmp_path / "none", rows=rows)
    for step in (1, 4, 6, 10):
        folder = tmp_path / f"{step}"
        session_run(built("bert", method, **DROPOUT["bert"]), folder, rows=rows, save_at=step, stop_at=step + 1)
        assert any((folder / "_trunk").rglob("*.rows"))
        resumed = session_run(built("bert", method, **DROPOUT["bert"]), folder, rows=rows)
        assert differing(resumed, whole) == [], f"resumed at step {step}"
        assert not (folder / "_trunk").exists()


# ---- a store with a name -------------------------------------------------------------------------------------------


def test_another_seed_finds_all_that_an_earlier_run_stored(tmp_path: Path) -> None:
    def run(seed: int, epochs: int) -> list[int]:
        lora = {"r": 2, "target_modules": "all-linear"}
        method = {"lora": lora, "freeze": FROZEN, "trunk_cache": {"folder": str(tmp_path / "features")}}
        torch.manual_seed(seed)
        model = get_model(model_of("bert"), method, task="SEQ_CLS")
        computed = Computed(model)
        rows = rows_of("bert", 16, ragged=True)
        trainer_of(
            model,
            rows,
            tmp_path / f"{seed}",
            computed,
            collate=padding,
            seed=seed,
            train_sampling_strategy="random",
            num_train_epochs=epochs,
        ).train()
        return computed.steps

    size = lambda: sum(file.stat().st_size for file in tmp_path.rglob("*.rows"))  # noqa: E731
    run(0, 1)  # though it saves nothing in this one: a named folder is for later ones
    before = size()
    assert before > 0
    second = run(1, 2)
    assert (size(), second[1:]) == (before, [0] * 7)


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_a_tuner_in_front_of_the_blocks_is_refused_when_the_model_is_built() -> None:
    for tuner in ({"prompt_tuning": {"num_virtual_tokens": 2}}, {"p_tuning": {"num_virtual_tokens": 2}}):
        with pytest.raises(MethodError, match=r"trunk_cache.*lies in front of the blocks"):
            get_model(tiny("bert"), {**tuner, "trunk_cache": {}})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"limit_gb": 0.0}, "limit_gb=0.0: give a number of gigabytes > 0"),
        ({"limit_gb": float("nan")}, "limit_gb=nan"),
        ({"limit_gb": float("inf")}, "limit_gb=inf"),
        ({"folder": ""}, "folder='': give a folder, or None"),
        ({"dtype": "fp8"}, "dtype"),
        ({"fill": "later"}, "fill"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(MethodError, match=f"trunk_cache.*{says}"):
        get_model(tiny("bert"), {"lora": {}, "trunk_cache": settings})


class Started(TrainerCallback):
    """Notes that a step was finished."""

    steps = 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps += 1


def refused(model: nn.Module, rows: Any, folder: Path, says: str, **settings: Any) -> None:
    """Training ends with that error before its first update, and gives the model back."""
    started = Started()
    before = weights(model)
    with pytest.raises((MethodError, PluginError), match=says):
        trainer_of(model, rows, folder, started, **settings).train()
    assert started.steps == 0
    assert differing(weights(model), before) == []
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    assert not hasattr(inner.forward, "__signature__")


@pytest.mark.parametrize("method", [{"lora": {}}, {"full": {}}, {"lora": {}, "freeze": {"patterns": "embeddings"}}])
def test_a_run_in_which_everything_trains_is_refused(method: dict[str, Any], tmp_path: Path) -> None:
    if "freeze" in method:
        method = {"full": {}, "freeze": method["freeze"]}
    model = built("bert", {**method, "trunk_cache": {}})
    what = "the lowest block" if "full" not in method or "freeze" in method else "the embeddings or something in front"
    refused(model, rows_of("bert", 8), tmp_path, f"trunk_cache has nothing to store: {what}.*Freeze the lower blocks")


def test_a_schedule_that_never_freezes_the_lowest_block_is_refused(tmp_path: Path) -> None:
    method = {"full": {}, "gradual_unfreeze": {"every": 2, "direction": "bottom_up"}, "trunk_cache": {}}
    model = built("bert", {**method, "linear_probe": {}} if False else method)
    # The head alone trains at first, in an epoch that is longer than that, and then the embeddings.
    trainer_of(model, rows_of("bert", 16), tmp_path, num_train_epochs=3).train()
    assert list(tmp_path.iterdir()) == []


def test_a_run_too_short_to_save_anything_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained("bert", tmp_path, cache={}, num_train_epochs=1)
    assert "trunk_cache saves nothing here: the lower blocks stay frozen for less than the pass over the" in (
        caplog.text
    )


def test_words_that_are_masked_anew_in_each_epoch_are_refused(tmp_path: Path) -> None:
    model = built("bert", {"lora": {}, "freeze": FROZEN, "trunk_cache": {}}, "MASKED_LM")
    collator = DataCollatorForLanguageModeling(tiny_tokenizer("encoder"), mlm_probability=0.3)
    says = "DataCollatorForLanguageModeling masks other words of it in each epoch"
    refused(model, rows_of("bert", 8), tmp_path, says, collate=collator)


@pytest.mark.parametrize(
    ("name", "overrides", "says"),
    [
        ("bert", {"output_hidden_states": True}, r"config\.output_hidden_states=True"),
        ("mixtral", {"output_router_logits": True}, r"config\.output_router_logits=True"),
        ("opt", {"layerdrop": 0.1}, r"config\.layerdrop=0\.1 leaves out whole blocks"),
        ("xlnet", {"mem_len": 0}, "expected block 2 to put out|stands in another batch"),
    ],
)
def test_models_that_cannot_be_served_are_refused(
    name: str, overrides: dict[str, Any], says: str, tmp_path: Path
) -> None:
    lora = {"lora": {"target_modules": ["ff.layer_1"]} if name == "xlnet" else {}}
    model = built(name, {**lora, "freeze": FROZEN, "trunk_cache": {}}, **overrides)
    refused(model, rows_of(name, 8), tmp_path, says)


def test_a_model_whose_layers_share_their_weights_has_no_blocks_to_freeze(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"trunk_cache.*this model has no list of blocks .all its layers may share"):
        built("albert", {"lora": {}, "trunk_cache": {}})


def test_a_limit_below_what_the_data_need_is_refused(tmp_path: Path) -> None:
    model = built("bert", {"lora": {}, "freeze": FROZEN, "trunk_cache": {"limit_gb": 1e-6}})
    refused(model, rows_of("bert", 16, ragged=True), tmp_path, r"more than limit_gb=1e-06", collate=padding)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = built("bert", {"lora": {}, "freeze": FROZEN, "trunk_cache": {"folder": str(tmp_path / "file")}})
    refused(model, rows_of("bert", 8), tmp_path / "out", "trunk_cache cannot write its store.*Give another folder=")


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(rows_of("bert", 8))


def test_a_stream_is_served_but_cannot_be_filled_in_before(tmp_path: Path) -> None:
    settings = {"max_steps": 6, "num_train_epochs": 1}
    model = built("bert", {"lora": {}, "freeze": FROZEN, "trunk_cache": {"fill": "before"}})
    refused(model, Stream(), tmp_path, r"fill='before'.*read as a stream", **settings)
    found = []
    for more in ({}, {"trunk_cache": {}}):
        model = built("bert", {"lora": {}, "freeze": FROZEN, **more})
        computed = Computed(model)
        trainer_of(model, Stream(), tmp_path, computed, **settings).train()
        found.append(weights(model))
    assert differing(*found) == []
    assert computed.steps[2:] == [0] * 4


class Augmented(Dataset[Any]):
    """Draws another word in each row each time."""

    def __init__(self) -> None:
        self.rows = rows_of("bert", 16)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        row = copy.deepcopy(self.rows[index])
        row["input_ids"][2] = int(torch.randint(4, 90, ()))
        return row


def test_data_that_are_drawn_anew_are_told_of_and_the_run_is_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = []
    for more in ({}, {"trunk_cache": {}}):
        model = built("bert", {"lora": {}, "freeze": FROZEN, **more})
        trainer_of(model, Augmented(), tmp_path, num_train_epochs=4).train()
        found.append(weights(model))
    assert differing(*found) == []
    assert "of 16 examples of this epoch were never seen before" in caplog.text
    assert [r.levelname for r in caplog.records if "never seen before" in r.message] == ["WARNING"]


def test_it_says_before_the_first_step_what_it_will_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        trained("bert", tmp_path, cache={})
    assert "trunk_cache: blocks 1 to 2 of 3 are frozen until step 12" in caplog.text
    assert "a step that finds it takes about 0.50 of the time of one that computes it" in caplog.text
    assert "trunk_cache stores the output of block 2: 116 tokens × 128 bytes = 14.8 kB" in caplog.text
