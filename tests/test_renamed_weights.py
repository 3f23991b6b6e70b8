"""A whole model resumes bit for bit also where transformers saves it under older names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import default_data_collator

from peft_plus import CheckpointError, Session
from peft_plus.renamed_weights import left_out, load_by_their_class

from .bad_inputs import built, rows, same, trainer, weights
from .models import tiny

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")


def test_vit_is_saved_under_other_names(tmp_path: Path) -> None:
    """Else this file tests nothing."""
    model = tiny("vit")
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() != model.state_dict().keys()


@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("name", ["vit", "bert", "llama"])
def test_a_resumed_trainer_ends_bit_identical(name: str, best: bool, tmp_path: Path) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    if best:
        saving |= {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": True}
        saving["metric_for_best_model"] = "eval_loss"
    data = rows(name)

    def made() -> Any:
        evaluated = {"eval_dataset": data[:4]} if best else {}
        return trainer(built("full", name), tmp_path, data, learning_rate=1e-2, **saving, **evaluated)

    whole = made()
    whole.train()
    again = made()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same(again.model, weights(whole.model))


def test_a_resumed_session_ends_bit_identical(tmp_path: Path) -> None:
    def run(stop: int | None = None, resume: bool = False) -> Any:
        model = built("full", "vit")
        session = Session(model, Accelerator(cpu=True), max_steps=4)
        optimizer = session.optimizer(torch.optim.AdamW, lr=1e-2)
        loader = session.loader(rows("vit"), 4, shuffle=False, collate_fn=default_data_collator)
        assert not resume or session.resume(tmp_path)
        for batch in session.batches(loader):
            session.accelerator.backward(session.loss(batch))
            optimizer.step()
            optimizer.zero_grad()
            if session.step == stop:
                session.save(tmp_path)
                break
        return model

    whole = run()
    run(stop=2)
    assert same(run(resume=True), weights(whole))


def test_tied_weights_are_not_left_out_and_another_model_is_told(tmp_path: Path) -> None:
    tied = tiny("llama", "CAUSAL_LM", tie_word_embeddings=True)
    assert left_out(tied, ["lm_head.weight"]) == []
    assert left_out(tied, ["model.norm.weight"]) == ["model.norm.weight"]
    tiny("bert", num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"does not hold this model: '.*layer\.1\..*' is not in it"):
        load_by_their_class(tiny("bert"), tmp_path)
