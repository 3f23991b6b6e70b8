from __future__ import annotations

import math
from importlib.metadata import entry_points, requires
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from peft_plus import PluginError, Trainer, get_model
from peft_plus_confidence_penalty import ConfidencePenalty, entropy

WORDS = 50


def tiny(**config: object) -> BertForSequenceClassification:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=WORDS, num_labels=3, **shape, **config))


def rows(count: int = 24) -> Dataset:
    ids = torch.randint(0, WORDS, (count, 6), generator=torch.Generator().manual_seed(1))
    labels = [int(row[0]) % 3 for row in ids]
    return Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": [[1] * 6] * count, "labels": labels})


def trained(method: object, folder: Path, data: Dataset | None = None, **config: object) -> Trainer:
    model = get_model(tiny(**config), method=method)
    args = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, args, train_dataset=data or rows())
    trainer.train()
    return trainer


def mean_entropy(trainer: Trainer) -> float:
    return float(entropy(torch.as_tensor(trainer.predict(rows()).predictions)).mean())


def test_entropy_is_the_closed_form() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3], [1.0, 0.0, 0.0]], dtype=torch.float64)
    logits = p.clamp(min=1e-30).log()
    torch.testing.assert_close(entropy(logits), torch.tensor([1.5 * math.log(2), math.log(3), 0.0]))


def test_its_gradient_is_minus_p_times_log_p_plus_h() -> None:
    logits = torch.randn(5, 7, dtype=torch.float32, requires_grad=True)
    entropy(logits).sum().backward()
    p = logits.detach().softmax(-1)
    h = -(p * p.log()).sum(-1, keepdim=True)
    torch.testing.assert_close(logits.grad, -p * (p.log() + h))


def test_it_is_found_by_name_and_needs_only_peft_plus() -> None:
    (point,) = entry_points(group="peft_plus.plugins", name="confidence_penalty")
    assert point.load() is ConfidencePenalty
    assert requires("peft-plus-confidence-penalty") == ["peft-plus>=0.1"]


def test_predictions_stay_less_certain_than_without_it(tmp_path: Path) -> None:
    plain = trained(["lora"], tmp_path / "plain")
    penalised = trained(["lora", "confidence_penalty"], tmp_path / "default")
    strong = trained({"lora": {}, "confidence_penalty": {"weight": 1.0}}, tmp_path / "strong")
    assert mean_entropy(plain) < mean_entropy(penalised) < mean_entropy(strong) <= math.log(3)


def test_the_logged_term_is_minus_the_weighted_entropy(tmp_path: Path) -> None:
    trainer = trained({"lora": {}, "confidence_penalty": {"weight": 0.5}}, tmp_path)
    logged = [line["confidence_penalty"] for line in trainer.state.log_history if "confidence_penalty" in line]
    assert len(logged) == trainer.state.global_step
    assert all(-0.5 * math.log(3) <= value < 0 for value in logged)


def test_weight_zero_is_plain_lora_bit_for_bit(tmp_path: Path) -> None:
    plain = trained(["lora"], tmp_path / "plain")
    zero = trained({"lora": {}, "confidence_penalty": {"weight": 0.0}}, tmp_path / "zero")
    for (name, a), b in zip(plain.model.named_parameters(), zero.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="β ≥ 0"):
        get_model(tiny(), method={"lora": {}, "confidence_penalty": {"weight": -1.0}})


def test_a_task_without_classes_is_refused(tmp_path: Path) -> None:
    data = rows().remove_columns("labels").add_column("labels", [[0.0, 1.0, 0.0]] * 24)
    # An error in a hook comes as PluginError, under the plugin's name and distribution.
    with pytest.raises(PluginError, match=r"'confidence_penalty' \(peft-plus-confidence-penalty .*one class per label"):
        trained(["lora", "confidence_penalty"], tmp_path, data, problem_type="multi_label_classification")
