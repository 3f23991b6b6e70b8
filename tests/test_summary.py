"""`print(model.peft_plus)`: what a user sees of a plan, before and after a run."""

from __future__ import annotations

from transformers import TrainingArguments

import peft_plus
from peft_plus import get_model

from .models import batch, tiny


def test_a_plan_prints_what_will_and_what_did_happen(tmp_path):
    model = get_model(
        tiny("bert"), {"lora": {}, "gradual_unfreeze": {"every": 1}, "llrd": {}, "lp_ft": {"probe_epochs": 1}}
    )
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    before = str(model.peft_plus)
    assert f"lora on BertForSequenceClassification, task SEQ_CLS: {parameters:,} parameters in 14 tensors" in before
    assert "gradual_unfreeze(every=1, " in before
    assert "llrd(decay=0.95)" in before
    assert "stages: probe (head), train (all)" in before
    data = batch("bert")
    rows = [{name: values[i] for name, values in data.items()} for i in range(len(data["labels"]))]
    args = TrainingArguments(str(tmp_path), num_train_epochs=4, use_cpu=True, report_to="none", disable_tqdm=True)
    peft_plus.fit(model, args, train_dataset=rows)
    after = str(model.peft_plus)
    assert "block 1 adapter  ·" in after
    assert "probe: what moved" in after
    assert "train: what moved" in after
