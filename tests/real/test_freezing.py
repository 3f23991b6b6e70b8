"""Every freezing schedule on the real MiniLM and the movie sentences: it learns, and trains what it says.

What each does to accuracy over three seeds stands on the cards (`python -m benchmarks.techniques --group freezing`);
here runs are short, and only what must hold in any of them is asserted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.techniques import GROUPS, Technique
from examples import inputs
from examples.demo.compare import arguments
from peft_plus import Trainer, get_model

pytestmark = [pytest.mark.real, pytest.mark.slow]

STEPS = 24
SHORTER: dict[str, dict[str, Any]] = {
    "gradual_unfreeze": {"every": 4},
    "gradual_unfreeze, bottom_up": {"every": 4, "direction": "bottom_up"},
    "chain_thaw": {"steps": 3},
    "lisa": {"period_steps": 4},
    "autofreeze": {"interval_steps": 4},
    "plasticity_freeze": {"every": 2, "window": 2, "patience": 2},
    "surgical": {"measure_steps": 2},
    "surgical, snr": {"measure_steps": 2, "criterion": "snr"},
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def plugins_of(title: str, technique: Technique) -> dict[str, Any]:
    """With settings for a run of `STEPS` steps."""
    plugins = dict(technique.plugins)
    if title in SHORTER:
        plugins[next(iter(plugins))] = SHORTER[title]
    if "ULMFiT" in title:
        plugins["gradual_unfreeze"] = {"every": 4}
    if "freeze_plan" in plugins:
        phases = [{"train": "head", "steps": 4}, {"train": ["head", "blocks 5-6"], "steps": 10}, {"train": "all"}]
        plugins["freeze_plan"] = {"phases": phases}
    return plugins


def run(title: str, technique: Technique, folder: Path) -> tuple[Any, Trainer]:
    """The model, and its Trainer, trained."""
    torch.manual_seed(0)
    method = {"lora": {}, **plugins_of(title, technique)}
    model = get_model(inputs.minilm(), method=method, task="SEQ_CLS", num_labels=2)
    data = model.peft_plus.task.preprocess(inputs.movie_split(), AutoTokenizer.from_pretrained(inputs.minilm()))
    args = arguments(folder, 0, max_steps=STEPS, logging_steps=1)
    for name, value in {**technique.arguments, "warmup_steps": 0}.items():
        setattr(args, name, 6 if name == "eval_steps" else value)
    args.__post_init__()
    trainer = Trainer(model, args, train_dataset=data["train"], eval_dataset=data["dev"].select(range(64)))
    trainer.train()
    return model, trainer


@pytest.mark.parametrize("title", [title for title in GROUPS["freezing"] if title != "lora"])
def test_it_learns_and_what_moved_is_what_was_declared(title: str, tmp_path: Path) -> None:
    model, trainer = run(title, GROUPS["freezing"][title], tmp_path)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == STEPS
    assert np.isfinite(losses).all()
    # Not that it learns well: that takes hundreds of steps. But a run whose weights stay would not get below ln 2.
    assert min(losses[STEPS // 2 :]) < np.log(2)
    rows = model.peft_plus.engagement["train"]
    assert any(row.moved for row in rows)
    assert all(row.moved for row in rows if row.steps), "declared trainable, and never moved"
    assert not any(row.moved for row in rows if not row.steps), "frozen, and moved"


def test_a_cached_trunk_changes_no_digit_of_the_loss(tmp_path: Path) -> None:
    losses = []
    for plugins in ({"freeze": {"blocks": 4}}, {"freeze": {"blocks": 4}, "trunk_cache": {}}):
        torch.manual_seed(0)
        base = AutoModelForSequenceClassification.from_pretrained(
            inputs.minilm(), num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        model = get_model(base, method={"lora": {}, **plugins})
        data = model.peft_plus.task.preprocess(inputs.movie_split(), AutoTokenizer.from_pretrained(inputs.minilm()))
        args = arguments(tmp_path, 0, logging_steps=1)
        trainer = Trainer(model, args, train_dataset=data["train"].select(range(96)))
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    plain, cached = losses
    assert len(plain) == 12
    assert plain[:6] == cached[:6], "the first epoch computes what it stores, in the same batches"
    assert np.allclose(plain, cached, rtol=1e-5), "in the second, batches are padded to other lengths"
