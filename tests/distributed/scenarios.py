"""What is trained on one process and on two: each scenario is one short run whose weights can be compared.

Rank r of two gets rows [2bs + br, 2bs + br + b) of micro-batch s, one process with the doubled batch gets all 2b of
them, so both see the same rows in the same step.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import IterableDataset
from transformers import default_data_collator

import peft_plus
from peft_plus import Plugin, get_model
from tests.models import LENGTH, NUM_LABELS, PAD, batch, tiny

Row = dict[str, Tensor]
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Scenario:
    """One run.

    Attributes:
        method: as for `get_model`.
        model, task: keys of `tests.models`.
        rows: examples in the data.
        padded: so many of the first rows are appended for one process, as two processes repeat them by themselves.
        silent: the rows of rank 1 carry no label that counts.
        stream: the data have no length.
        batch: rows in a micro-batch of one of two processes.
        dynamic: pad each micro-batch to its own longest row, so that ranks differ in length.
        ragged: the rows themselves are of different length, and the collator pads.
        steps: optimizer steps.
        accumulation: micro-batches of one process in a step.
        exact: compute in fp64, where the run would blow up fp32's rounding (AdamW on vanishing gradients, T5's large
            logits): what is left is what the processes do differently.
        adamw: with AdamW; otherwise plain SGD, whose updates are as exact as the gradients.
        texts: whether the Trainer has a tokenizer.
        stages: whether the method plans several stages, so that `fit` runs it.
        thawed: the part of a name that tells base weights which train beside the tuner.
        attached: the method that acts on these.
        bound: how far one process and two may end apart, as a share of the change of all weights together. What
            differs is the order of sums; fp32 rounds it, and AdamW and deep or large models blow it up.
    """

    method: Any
    model: str = "bert"
    task: str = "SEQ_CLS"
    rows: int = 32
    padded: int = 0
    silent: bool = False
    stream: bool = False
    batch: int = 2
    dynamic: bool = False
    ragged: bool = False
    steps: int = 8
    accumulation: int = 1
    exact: bool = False
    adamw: bool = False
    shuffled: bool = False
    checkpointing: bool = False
    quantization: str | None = None
    texts: bool = False
    stages: bool = False
    thawed: str = ""
    attached: Any = None
    bound: float = 1e-6


class Turns(Plugin):
    """Every second step other depths train: what has trained rests again, as no shipped schedule has it."""

    name = "turns"

    def may_train(self, run, param):
        return (run.step + param.depth) % 2 == 0


@dataclass(kw_only=True)
class Told(Plugin):
    """Acts at every event: rates by gradients, weights that come back, a depth that rests, one that never trains."""

    name: ClassVar[str] = "told"
    on_freeze: ClassVar[Literal["keep", "drop_state"]] = "drop_state"

    norm: float = field(init=False, default=0.0)

    def ever_trains(self, run, param):
        return param.depth != 1

    def may_train(self, run, param):
        return param.depth != 2 or run.step % 4 != 2

    def on_pre_optimizer_step(self, run):
        gradients = [g for param in run.params if (g := run.gradient(param)) is not None]
        weights = sum(float(run.weight(param).double().square().sum()) for param in run.params)
        self.norm = run.mean(float(sum(g.double().square().sum() for g in gradients)) / weights)

    def lr_scale(self, run, param):
        return 1 / (1 + self.norm)

    def on_step_end(self, run):
        if run.step == 2:
            run.keep("second")
        if run.step == 6:
            run.restore("second")

    def on_evaluate(self, run):
        if run.step == 4:
            run.restore("second")


LORA = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.0, "init_lora_weights": False}  # B ≠ 0, so that all moves at once
UNFREEZE = {"every": 2}
PHASES = [{"train": "head", "steps": 2}, {"train": "block 1", "steps": 2}, {"train": ["block 1", "head"]}]
NOISE = {"eps": 0.3, "weight": 1.0}
WORST = {"eps": 0.3, "step_size": 0.2, "sigma": 0.2, "ema": 0.5}
ALL = {"lora": LORA, "gradual_unfreeze": UNFREEZE, "llrd": {"decay": 0.7}, "r3f": NOISE}
TRUNK = {"freeze": {"blocks": 2}, "trunk_cache": {}}
STEADY = {
    "freelb": {"step_size": 0.3, "init_magnitude": 1.0},
    "child_tuning": {},
    "clip": {"percentile": 50.0},
    "ema": {"decay": 0.5},
}
GUARDED = {"swa": {"every": 3, "start_fraction": 0.0}, "loss_guard": {}, "l2_sp": {}}
THAWS = {"frozen_blocks": 2, "patience": 1, "stop": False}
QUIET = {name: settings for name, settings in ALL.items() if name != "r3f"}

SCENARIOS: dict[str, Scenario] = {
    "lora": Scenario({"lora": LORA}),
    "full": Scenario("full"),
    "gradual_unfreeze": Scenario({"lora": LORA, "gradual_unfreeze": UNFREEZE}),
    "llrd": Scenario({"lora": LORA, "llrd": {"decay": 0.7}}),
    "r3f": Scenario({"lora": LORA, "r3f": NOISE}),
    "smart": Scenario({"lora": LORA, "smart": WORST}, bound=1e-5),
    "smart, without a teacher": Scenario({"lora": LORA, "smart": {**WORST, "bregman": 0.0}}, bound=1e-5),
    "freeze": Scenario({"full": {}, "freeze": {"blocks": 1}}),
    "freeze_plan": Scenario({"lora": LORA, "freeze_plan": {"phases": PHASES}}, adamw=True, bound=1e-5),
    "chain_thaw": Scenario({"lora": LORA, "chain_thaw": {"steps": 1}}, adamw=True, bound=1e-5),
    "lisa": Scenario({"full": {}, "lisa": {"layers": 1, "period_steps": 2}}),
    "lisa, AdamW": Scenario({"lora": LORA, "lisa": {"layers": 1, "period_steps": 2}}, adamw=True, bound=1e-5),
    "freezeout": Scenario({"lora": LORA, "freezeout": {"t0": 0.3}}),
    "autofreeze": Scenario({"full": {}, "autofreeze": {"interval_steps": 1}}),
    "surgical": Scenario({"lora": LORA, "surgical": {"every": 4, "measure_steps": 2}}),
    "surgical, snr": Scenario({"full": {}, "surgical": {"every": "once", "criterion": "snr", "measure_steps": 3}}),
    "told": Scenario(["full", Told()], exact=True),
    "told, AdamW": Scenario([LoraConfig(**LORA), Told()], adamw=True, bound=1e-5),
    "all": Scenario(ALL),
    "all, AdamW": Scenario(ALL, adamw=True, exact=True),
    "accumulation": Scenario(ALL, accumulation=2, rows=64),
    "accumulation, Llama": Scenario(
        ALL, model="llama", task="CAUSAL_LM", accumulation=2, rows=64, dynamic=True, exact=True
    ),
    "accumulation, T5": Scenario(ALL, model="t5", task="SEQ_2_SEQ_LM", accumulation=2, rows=64, exact=True),
    "checkpointing": Scenario(ALL, accumulation=2, rows=64, checkpointing=True),
    "checkpointing, Llama": Scenario(ALL, model="llama", task="CAUSAL_LM", checkpointing=True, exact=True),
    "shuffled": Scenario(ALL, shuffled=True),
    "length_buckets": Scenario(QUIET | {"length_buckets": {}}, rows=64, shuffled=True, ragged=True, accumulation=2),
    # 22 rows are 5½ micro-batches of 4: in the last one, rank 1 gets the first two rows once more.
    "incomplete": Scenario(ALL, rows=22, padded=2, steps=9),
    "incomplete, accumulation": Scenario(ALL, rows=22, padded=2, steps=9, accumulation=2),
    # 18 rows: rank 0 gets the last two and two of the first, rank 1 goes on with the next of the first.
    "incomplete by more": Scenario(ALL, rows=34, batch=4, padded=6, steps=8),
    "stream": Scenario(ALL, rows=64, stream=True),
    "no labels on one rank": Scenario(
        ALL, model="llama", task="CAUSAL_LM", accumulation=2, rows=64, silent=True, exact=True
    ),
    "nf4": Scenario(ALL, quantization="nf4"),
    "nf4, checkpointing": Scenario(ALL, quantization="nf4", checkpointing=True),
    "thawed": Scenario({"lora": LORA}, thawed="output.LayerNorm", attached={"gradual_unfreeze": UNFREEZE}),
    "thawed, in turns": Scenario({"lora": LORA}, thawed="output.LayerNorm", attached=[Turns()], adamw=True, bound=1e-5),
    # Eight steps to an epoch. Filled before, the second process finds all that the first one stored.
    "trunk_cache": Scenario({"lora": LORA, **TRUNK}, shuffled=True, ragged=True, steps=24, exact=True),
    "trunk_cache, filled before": Scenario(
        {"lora": LORA, **TRUNK, "trunk_cache": {"fill": "before"}}, shuffled=True, steps=12, exact=True
    ),
    "trunk_cache, thawing": Scenario(
        {"full": {}, "gradual_unfreeze": {"every": 7}, "trunk_cache": {}}, rows=16, shuffled=True, steps=24, exact=True
    ),
    "trunk_cache, noise": Scenario(
        {"lora": LORA, **TRUNK, "r3f": {**NOISE, "at": "trunk"}}, shuffled=True, steps=12, accumulation=2, exact=True
    ),
    "noise at the trunk": Scenario(
        {"lora": LORA, "freeze": {"blocks": 1}, "r3f": {**NOISE, "at": "trunk"}}, bound=1e-5
    ),
    "stability": Scenario({"lora": LORA, "mixout": {}, "l2_sp": {}, **STEADY}, rows=64, accumulation=2, exact=True),
    "stability, full": Scenario({"full": {}, "r_drop": {}, "token_cutoff": {"share": 0.4}, **GUARDED}, exact=True),
    "stability, AdamW": Scenario({"lora": LORA, **STEADY}, adamw=True, exact=True),
    "ema, AdamW": Scenario({"lora": LORA, "ema": {"decay": 0.5}}, adamw=True, bound=1e-5),
    "stability, fp32": Scenario({"lora": LORA, **STEADY}, bound=1e-5),
    "r4f": Scenario({"lora": LORA, "r4f": NOISE}, exact=True),
    "neftune": Scenario({"lora": LORA, "neftune": {}}),
    "eda": Scenario({"lora": LORA, "eda": {}}, texts=True, steps=16),
    "early_stop": Scenario({"lora": LORA, "early_stop": {"patience": 1, "min_delta": 10.0}}),
    "adaptive": Scenario({"lora": LORA, "adaptive": {}}),
    "adaptive, thawing": Scenario({"full": {}, "adaptive": {**THAWS, "learning_rate": 0.05}}),
    "lp_ft": Scenario({"lora": LORA, "lp_ft": {"probe_epochs": 0.5, "probe_lr": 0.05}}, stages=True),
    "sft": Scenario(ALL, model="llama", task="CAUSAL_LM", accumulation=2, rows=64, exact=True),
    "dpo": Scenario(QUIET, model="llama", task="CAUSAL_LM", accumulation=2, rows=64, checkpointing=True, exact=True),
}
SCENARIOS |= {
    f"{name}, fp32": replace(SCENARIOS[name], exact=False, bound=1e-5)
    for name in ("all, AdamW", "accumulation, T5", "checkpointing, Llama")
}


# ---- data --------------------------------------------------------------------------------------------------------


def rows_of(scenario: Scenario, processes: int) -> list[Row]:
    """Single examples with very different numbers of labels; those that two processes repeat come once more."""
    data = batch(scenario.model, scenario.task, rows=scenario.rows)
    if data["labels"].dim() > 1:
        kept = 2 + torch.arange(scenario.rows) * 5 % 6  # between 2 and 7 labels, uneven in any order
        data["labels"] = data["labels"].masked_fill(torch.arange(LENGTH) >= kept[:, None], -100)
    if scenario.silent:
        on_rank_1 = torch.arange(scenario.rows) // scenario.batch % 2 == 1
        data["labels"] = data["labels"].masked_fill(on_rank_1[:, None], -100)
    rows = [{key: value[i] for key, value in data.items()} for i in range(scenario.rows)]
    if scenario.ragged:
        for number, row in enumerate(rows):
            kept = 3 + number * 5 % (LENGTH - 2)
            rows[number] = {key: value[:kept] if value.dim() else value for key, value in row.items()}
    return rows + rows[: scenario.padded if processes == 1 else 0]


PREFERENCES = [
    {"prompt": "the cat", "chosen": " is good", "rejected": " is bad and bad"},
    {"prompt": "where is", "chosen": " york and paris", "rejected": " the dog"},
    {"prompt": "a dog", "chosen": " works", "rejected": " is in york on the cat"},
    {"prompt": "what", "chosen": " works on a dog", "rejected": " is"},
]


class Stream(IterableDataset[Row]):
    """Rows without a length."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = rows

    def __iter__(self) -> Any:
        return iter(self._rows)


def shortest(rows: list[Row]) -> dict[str, Tensor]:
    """Collate, then cut the columns that are padding in every row."""
    made = default_data_collator(rows)
    kept = int((made["input_ids"] != PAD).sum(1).max())
    return {key: value[:, :kept] if value.dim() > 1 else value for key, value in made.items()}


def padding(rows: list[Row]) -> dict[str, Tensor]:
    """Collate rows of different length."""
    return {
        key: pad_sequence([row[key] for row in rows], batch_first=True, padding_value=PAD if key == "input_ids" else 0)
        if rows[0][key].dim()
        else torch.stack([row[key] for row in rows])
        for key in rows[0]
    }


def collator_of(scenario: Scenario) -> Any:
    """What makes its micro-batches."""
    return padding if scenario.ragged else shortest if scenario.dynamic else default_data_collator


# ---- models ----------------------------------------------------------------------------------------------------------


def build(scenario: Scenario, saved: Path | None = None) -> nn.Module:
    """The model of a scenario, with its plan; equal on every call and process."""
    torch.manual_seed(0)
    base: Any = tiny(scenario.model, scenario.task).to(torch.float64 if scenario.exact else torch.float32)
    options: dict[str, Any] = {}
    if scenario.quantization is not None:
        base, options = str(saved), {"num_labels": NUM_LABELS, "quantization": scenario.quantization}
    model = get_model(base, scenario.method, task=scenario.task, **options)
    if scenario.thawed:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or scenario.thawed in name)
        peft_plus.attach(model, scenario.attached)
    return model
