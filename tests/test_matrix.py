"""What composes: every tuner × every plugin × every precision trains, saves and reloads exactly, or is refused early.

The expected outcomes are written down here; each is checked by running it. `python -m tests.test_matrix --write` checks
them all and writes `docs/matrix.md`.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel, TrainingArguments

from peft_plus import MethodError, fit, get_model
from peft_plus.registry import FIRST_PARTY
from tests.models import AUTO, batch, rows_of, tiny

PAGE = Path(__file__).resolve().parent.parent / "docs" / "matrix.md"

ACROSS: dict[str, dict[str, Any]] = {
    "gradual_unfreeze": {"every": 1},
    "llrd": {"decay": 0.9},
    "r3f": {"eps": 0.1},
    "lp_ft": {"probe_epochs": 1.0},
    "length_buckets": {},
}
FREEZING: dict[str, dict[str, Any]] = {
    "freeze": {"blocks": 1},
    "freeze_plan": {"phases": [{"train": "block 2", "steps": 2}, {"train": "all"}]},
    "chain_thaw": {"steps": 1},
    "lisa": {"layers": 1, "period_steps": 1},
    "autofreeze": {"interval_steps": 1},
    "freezeout": {},
    "plasticity_freeze": {"every": 1, "window": 2, "patience": 1},
    "surgical": {"measure_steps": 1, "every": "once"},
    "discriminative_lr": {},
    "slanted_triangular": {},
    "trunk_cache": {},
}
STABILITY: dict[str, dict[str, Any]] = {
    "smart": {"eps": 0.1},
    "r4f": {"eps": 0.1},
    "freelb": {},
    "r_drop": {},
    "neftune": {},
    "token_cutoff": {"share": 0.3},
    "l2_sp": {},
    "mixout": {},
    "ema": {"decay": 0.5},
    "swa": {"every": 1, "start_fraction": 0.0},
    "child_tuning": {},
    "clip": {},
    "loss_guard": {},
    "early_stop": {"patience": 1},
    "plateau": {},
    "warm_restarts": {},
    "mosbach": {"learning_rate": 1e-2},
    "low_lr": {"pretrained": 1e-3, "adapter": 1e-3, "head": 1e-3},
    "lr_patterns": {"patterns": {"weight|default": 2.0}},
    "eda": {"special_ids": [0, 1, 2]},
    "noisy_tune": {},
    "reinit_top": {},
    "adaptive": {"epochs": 2.0},
}
"""Plugins, with settings that let a run of four steps show what they do; one of each area, and all of two of them."""

EVALUATED = {"early_stop", "plateau"}
"""Those that need evaluations."""

PRECISIONS = ("fp32", "nf4", "int8")

REASONS = {
    "B": (
        "keeps the base as it was loaded",
        "the plugin changes base weights, which this tuner's adapter is saved without",
    ),
    "C": (
        "on a CPU int8 weights lose their scales",
        "PEFT's DoRA reads the base weights, and on a CPU int8 weights lose their scales thereby",
    ),
    "D": (
        "trainable parameters in the model's blocks",
        "the plugin tells parameters apart by depth; here all lie at one",
    ),
    "E": ("lie at the tokens or depend on them", "other tokens would need other labels"),
    "H": (
        "needs something to train beside the head",
        "`linear_probe` trains the head alone, so there is no second stage",
    ),
    "M": ("no matrix that trains would mix", "the head does not mix unless told to"),
    "N": ("matches nothing that trains", "nothing that the tuner trains lies there"),
    "T": ("in front of the blocks", "what the tuner trains changes the output of every block in each step"),
    "P": ("a freshly initialised head", "the task keeps its pretrained head, so there is nothing to probe first"),
    "Q": ("quantised weights get no gradient", "`full` trains the base, and quantised weights get no gradient"),
}
"""Letter → (what the error must say, what the page says)."""

EXPECTED: dict[str, dict[str, str]] = {
    "across": {
        "SEQ_CLS": """
            tuner          precision      none  gradual_unfreeze  llrd  r3f  lp_ft  length_buckets  all
            lora           fp32,nf4,int8  +     +                 +     +    +      +               +
            rslora         fp32,nf4,int8  +     +                 +     +    +      +               +
            dora           fp32,nf4       +     +                 +     +    +      +               +
            dora           int8           C     C                 C     C    C      C               C
            ia3            fp32,nf4,int8  +     +                 +     +    +      +               +
            prefix_tuning  fp32,nf4,int8  +     D                 D     +    +      +               +
            prompt_tuning  fp32,nf4,int8  +     D                 D     +    +      +               +
            p_tuning       fp32,nf4,int8  +     D                 D     +    +      +               +
            linear_probe   fp32,nf4,int8  +     D                 D     +    H      +               +
            full           fp32           +     +                 +     +    +      +               +
            full           nf4,int8       Q     Q                 Q     Q    Q      Q               Q
        """,
        "CAUSAL_LM": """
            tuner          precision      none  gradual_unfreeze  llrd  r3f  lp_ft  length_buckets  all
            lora           fp32,nf4,int8  +     +                 +     +    P      +               +
            rslora         fp32,nf4,int8  +     +                 +     +    P      +               +
            dora           fp32,nf4       +     +                 +     +    P      +               +
            dora           int8           C     C                 C     C    C      C               C
            ia3            fp32,nf4,int8  +     +                 +     +    P      +               +
            prefix_tuning  fp32,nf4,int8  +     D                 D     +    P      +               +
            prompt_tuning  fp32,nf4,int8  +     D                 D     +    P      +               +
            p_tuning       fp32,nf4,int8  +     D                 D     +    P      +               +
            linear_probe   fp32,nf4,int8  +     D                 D     +    PH     +               +
            full           fp32           +     +                 +     +    P      +               +
            full           nf4,int8       Q     Q                 Q     Q    Q      Q               Q
        """,
    },
    "freezing": {
        "SEQ_CLS": """
            tuner          precision      none  freeze  freeze_plan  chain_thaw  lisa  autofreeze  freezeout  plasticity_freeze  surgical  discriminative_lr  slanted_triangular  trunk_cache  ULMFiT
            lora           fp32,nf4,int8  +     +       +            +           +     +           +          +                  +         +                  +                   +            +
            dora           fp32           +     +       +            +           +     +           +          +                  +         +                  +                   +            +
            ia3            fp32,nf4       +     +       +            +           +     +           +          +                  +         +                  +                   +            +
            prefix_tuning  fp32           +     N       N            D           D     D           D          D                  D         D                  +                   T            D
            prompt_tuning  fp32           +     N       N            D           D     D           D          D                  D         D                  +                   T            D
            linear_probe   fp32           +     N       N            D           D     D           D          D                  D         D                  +                   +            D
            full           fp32           +     +       +            +           +     +           +          +                  +         +                  +                   +            +
        """,  # noqa: E501
        "CAUSAL_LM": """
            tuner          precision  none  freeze  freeze_plan  chain_thaw  lisa  autofreeze  freezeout  plasticity_freeze  surgical  discriminative_lr  slanted_triangular  trunk_cache  ULMFiT
            lora           fp32,nf4   +     +       +            +           +     +           +          +                  +         +                  +                   +            +
            prompt_tuning  fp32       +     N       N            D           D     D           D          D                  D         D                  +                   T            D
            full           fp32       +     +       +            +           +     +           +          +                  +         +                  +                   +            +
        """,  # noqa: E501
    },
    "stability": {
        "SEQ_CLS": """
            tuner          precision  none  smart  r4f  freelb  r_drop  neftune  token_cutoff  l2_sp  mixout  ema  swa  child_tuning  clip  loss_guard  early_stop  plateau  warm_restarts  mosbach  low_lr  lr_patterns  eda  noisy_tune  reinit_top  adaptive  together
            lora           fp32,nf4   +     +      +    +       +       +        +             +      +       +    +    +             +     +           +           +        +              +        +       +            +    B           B          +         +
            ia3            fp32       +     +      +    +       +       +        +             +      +       +    +    +             +     +           +           +        +              +        +       +            +    B           B          +         +
            prompt_tuning  fp32       +     +      +    +       +       +        +             +      +       +    +    +             +     +           +           +        +              +        +       +            +    B           B          +         +
            linear_probe   fp32       +     +      +    +       +       +        +             +      M       +    +    H             +     +           +           +        +              +        +       +            +    B           B          +         H
            full           fp32       +     +      +    +       +       +        +             +      +       +    +    +             +     +           +           +        +              +        +       +            +    +           +          +         +
        """,  # noqa: E501
        "CAUSAL_LM": """
            tuner          precision  none  smart  r4f  freelb  r_drop  neftune  token_cutoff  l2_sp  mixout  ema  swa  child_tuning  clip  loss_guard  early_stop  plateau  warm_restarts  mosbach  low_lr  lr_patterns  eda  noisy_tune  reinit_top  adaptive  together
            lora           fp32       +     +      P    +       +       +        +             +      +       +    +    +             +     +           +           +        +              +        +       +            E    B           B          +         +
            full           fp32       +     +      P    +       +       +        +             +      +       +    +    +             +     +           +           +        +              +        +       +            E    +           +          +         +
        """,  # noqa: E501
    },
}
"""Page's part → task → its table: `+` works, letters are reasons of a refusal (the first is what the error says)."""

MODELS = {"SEQ_CLS": "bert", "CAUSAL_LM": "llama"}
HEADS = {"SEQ_CLS": "classifier", "CAUSAL_LM": "lm_head"}


ULMFIT = ("gradual_unfreeze", "discriminative_lr", "slanted_triangular")

STEADY = ("child_tuning", "freelb", "l2_sp", "mixout", "ema", "clip")
PARTS = {
    "across": (ACROSS, "all that fit"),
    "freezing": (FREEZING, "ULMFiT: all three"),
    "stability": (STABILITY, "six together"),
}
"""Page's part → its plugins, and the last column, in which several are at work."""

PLUGINS = ACROSS | FREEZING | STABILITY


@dataclass(frozen=True)
class Cell:
    task: str
    tuner: str
    column: str
    precision: str
    outcome: str
    plugins: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.task}-{self.tuner}-{self.column.replace(' ', '_')}-{self.precision}"

    @property
    def method(self) -> dict[str, dict[str, Any]]:
        return {self.tuner: {}} | {name: PLUGINS[name] for name in self.plugins}


def columns(part: str) -> tuple[str, ...]:
    plugins, last = PARTS[part]
    return ("none", *plugins, last)


def rows(part: str, task: str) -> list[tuple[str, tuple[str, ...], list[str]]]:
    """The lines of a table: tuner, precisions, outcome of each column."""
    lines = [line.split() for line in EXPECTED[part][task].strip().splitlines()[1:]]
    return [(tuner, tuple(precision.split(",")), outcomes) for tuner, precision, *outcomes in lines]


def together(part: str, outcomes: list[str]) -> tuple[str, ...]:
    """What is at work in the last column."""
    if part in ("freezing", "stability"):
        return ULMFIT if part == "freezing" else STEADY
    return tuple(p for p, outcome in zip(ACROSS, outcomes[1:], strict=False) if outcome in ("+", "C", "Q"))


def cells() -> Iterator[Cell]:
    for part, (plugins, _) in PARTS.items():
        for task in EXPECTED[part]:
            for tuner, precisions, outcomes in rows(part, task):
                alone: list[tuple[str, ...]] = [(plugin,) for plugin in plugins]
                if part == "freezing" and outcomes[1] == "+":  # where everything trains there is nothing to store
                    alone[-1] = ("freeze", "trunk_cache")
                members = [(), *alone, together(part, outcomes)]
                for precision in precisions:
                    for column, outcome, named in zip(columns(part), outcomes, members, strict=True):
                        if part == "across" or column != "none":  # which is in the other part already
                            yield Cell(task, tuner, column, precision, outcome, named)


CELLS = list(cells())


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Task → folder of a saved base; 64 wide, which is what 4-bit kernels work in blocks of."""
    folders = {}
    for task, name in MODELS.items():
        folders[task] = tmp_path_factory.mktemp(name)
        wide = {"hidden_size": 64, "num_hidden_layers": 2} | ({"head_dim": 32} if name == "llama" else {})
        tiny(name, "FEATURE_EXTRACTION" if task == "SEQ_CLS" else task, **wide).save_pretrained(folders[task])
    return folders


def build(cell: Cell, folder: Path) -> nn.Module:
    labels = {"num_labels": 3} if cell.task == "SEQ_CLS" else {}
    quantization = None if cell.precision == "fp32" else cell.precision
    return get_model(folder, cell.method, task=cell.task, quantization=quantization, **labels)


def plain_base(cell: Cell, folder: Path) -> nn.Module:
    """The base as a user of plain transformers and PEFT loads it."""
    labels = {"num_labels": 3} if cell.task == "SEQ_CLS" else {}
    auto = getattr(transformers, AUTO[cell.task])
    if cell.precision == "fp32":
        return auto.from_pretrained(folder, **labels)
    skip = [HEADS[cell.task]]
    if cell.precision == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=skip,
        )
    model = auto.from_pretrained(folder, quantization_config=config, **labels)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


@torch.no_grad()
def logits(model: nn.Module, cell: Cell) -> Tensor:
    """In train mode, without dropout: in eval mode bitsandbytes takes a coarser 4-bit kernel on CPUs that have bf16."""
    return model.train()(**batch(MODELS[cell.task], cell.task)).logits


def examples(cell: Cell) -> list[dict[str, Tensor]]:
    return rows_of(batch(MODELS[cell.task], cell.task, rows=8))


def refuse_loading(*_: Any, **__: Any) -> None:
    raise AssertionError("The base's weights were loaded.")


@pytest.mark.parametrize("cell", [c for c in CELLS if c.outcome == "+"], ids=str)
def test_works(cell: Cell, bases: dict[str, Path], tmp_path: Path) -> None:
    model = build(cell, bases[cell.task])
    assert [p.name for p in model.peft_plus.plugins] == list(cell.plugins)
    before = {name: t.detach().clone() for name, t in model.named_parameters()}
    trains = {name for name, t in model.named_parameters() if t.requires_grad}
    args = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    if EVALUATED.intersection(cell.plugins):
        args.eval_strategy, args.eval_steps = "steps", 1
        args.__post_init__()
    outputs = fit(model, args, train_dataset=examples(cell), eval_dataset=examples(cell))
    assert len(outputs) == 1 + ("lp_ft" in cell.plugins)
    assert all(math.isfinite(output.training_loss) for output in outputs)
    moved = {name for name, t in model.named_parameters() if not torch.equal(t, before[name])}
    assert moved
    assert moved <= trains
    model.save_pretrained(tmp_path / "saved")
    if cell.tuner == "full":
        again = getattr(transformers, AUTO[cell.task]).from_pretrained(tmp_path / "saved")
    else:
        again = PeftModel.from_pretrained(plain_base(cell, bases[cell.task]), tmp_path / "saved")
    assert not hasattr(again, "peft_plus")
    assert torch.equal(logits(model, cell), logits(again, cell))


@pytest.mark.parametrize("cell", [c for c in CELLS if c.outcome != "+"], ids=str)
def test_refused_before_the_weights_load(cell: Cell, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse_loading)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)  # the page speaks of CPUs
    with pytest.raises(MethodError, match=REASONS[cell.outcome[0]][0]) as refused:
        build(cell, bases[cell.task])
    message = str(refused.value)
    assert repr(cell.tuner if cell.outcome in "CQ" else cell.plugins[0]) in message
    assert "Use " in message or "Drop " in message  # the fix


def test_every_cell_is_in_the_table() -> None:
    assert len(CELLS) == len({str(cell) for cell in CELLS})
    across = [cell for cell in CELLS if cell.column in columns("across")]
    assert len(across) == 2 * 9 * len(columns("across")) * len(PRECISIONS)
    homes = {"peft-plus-freezing", "peft-plus-stability"}
    assert {name for name, home in FIRST_PARTY.items() if home in homes} <= PLUGINS.keys()


def test_page_says_what_was_found() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "Run: python -m tests.test_matrix --write"


def page() -> str:
    """`docs/matrix.md`. The tests above hold the tables to what really happens."""
    kinds = {"SEQ_CLS": "Classification (BERT, `SEQ_CLS`)", "CAUSAL_LM": "Language modelling (Llama, `CAUSAL_LM`)"}
    lines = [
        "# What composes with what",
        "",
        "Written by `python -m tests.test_matrix --write`; `tests/test_matrix.py` runs every cell and fails where this",
        "page is wrong. **✓**: trains under `peft_plus.fit`, saves, and reloads in plain PEFT (`full`: in plain",
        "transformers) to identical logits, compared in train mode without dropout: on CPUs with AVX512-BF16 a 4-bit",
        "base that plain bitsandbytes has evaluated computes in bf16 from then on, for good. A letter: refused with an",
        "error that says why and what to do, before any weights load.",
        "",
        *(f"- **{letter}**: {text}." for letter, (_, text) in REASONS.items()),
        "",
        f"*Six together*: {', '.join(f'`{name}`' for name in STEADY)}.",
        "*All that fit* is the tuner with every plugin that has a ✓ in its row. `trunk_cache` stands beside",
        "`freeze` where that can freeze anything: where everything trains there is nothing to store.",
    ]
    headings = {"across": "", "freezing": ": freezing", "stability": ": stability"}
    for part, heading in headings.items():
        for task, title in kinds.items():
            names = columns(part)
            head = ["tuner", "precision", *(f"`{c}`" if c in PLUGINS else c for c in names)]
            lines += ["", f"## {title}{heading}", "", "| " + " | ".join(head) + " |"]
            lines.append("|---" * 2 + "|:-:" * len(names) + "|")
            for tuner, precisions, outcomes in rows(part, task):
                marks = ["✓" if outcome == "+" else ", ".join(outcome) for outcome in outcomes]
                lines.append("| " + " | ".join([f"`{tuner}`", ", ".join(precisions), *marks]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    # In a process of its own: pytest wants to see the modules before they are imported.
    failed = subprocess.call([sys.executable, "-m", "pytest", __file__, "-q", "-k", "not page_says"])
    if not failed and "--write" in sys.argv:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(), encoding="utf-8")
    sys.exit(failed)
