"""The core on real models: what is saved is small, and is the model that was trained."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    TrainingArguments,
)

from examples import inputs
from peft_plus import Trainer, get_model

pytestmark = pytest.mark.real


def train(model: Any, folder: Path, tmp_path: Path, *, steps: int = 3, **arguments: Any) -> Trainer:
    """A few steps on real sentences."""
    sentences = inputs.movie_split()["train"].select(range(4 * steps))
    data = model.peft_plus.task.preprocess(sentences, AutoTokenizer.from_pretrained(folder))
    args = TrainingArguments(
        str(tmp_path / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **arguments,
    )
    trainer = Trainer(model, args, train_dataset=data, eval_dataset=data)
    trainer.train()
    return trainer


@torch.no_grad()
def logits(model: Any, folder: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(inputs.movie_split()["test"]["text"][:8], padding=True, return_tensors="pt")
    return model.eval()(**batch).logits


def weights(folder: Path) -> int:
    """Bytes of everything in a folder that could be weights."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".pt"))


def classifier(**kwargs: Any) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(inputs.minilm(), num_labels=2, **kwargs)


def exact(model: Any) -> Any:
    """Switch off the kernel by which bitsandbytes, in eval mode on some CPUs, replaces fp32 with bf16 arithmetic."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.mark.parametrize("method", ["lora", "linear_probe"])
def test_adapter_is_small_and_loads_in_plain_peft(method: str, tmp_path: Path) -> None:
    model = get_model(inputs.minilm(), method=method, task="SEQ_CLS", num_labels=2)
    untrained = logits(model, inputs.minilm())
    train(model, inputs.minilm(), tmp_path)
    model.save_pretrained(tmp_path / "adapter")

    assert weights(tmp_path / "adapter") < 0.01 * weights(inputs.minilm())
    reloaded = PeftModel.from_pretrained(classifier(), tmp_path / "adapter")
    expected = logits(model, inputs.minilm())
    assert not torch.equal(expected, untrained)
    assert torch.equal(logits(reloaded, inputs.minilm()), expected)


@pytest.mark.parametrize(
    ("quantization", "config"),
    [
        (
            "nf4",
            partial(BitsAndBytesConfig, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        ),
        ("int8", partial(BitsAndBytesConfig, load_in_8bit=True)),
    ],
)
def test_lora_on_a_quantised_base(quantization: str, config: Any, tmp_path: Path) -> None:
    model = get_model(inputs.minilm(), method="lora", task="SEQ_CLS", num_labels=2, quantization=quantization)
    untrained = logits(model, inputs.minilm())
    train(model, inputs.minilm(), tmp_path)
    model.save_pretrained(tmp_path / "adapter")

    base = exact(classifier(quantization_config=config(llm_int8_skip_modules=["classifier"])))
    reloaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    expected = logits(model, inputs.minilm())
    assert not torch.equal(expected, untrained)
    assert torch.equal(logits(reloaded, inputs.minilm()), expected)


def test_full_loads_in_plain_transformers(tmp_path: Path) -> None:
    model = get_model(inputs.minilm(), method="full", task="SEQ_CLS", num_labels=2)
    train(model, inputs.minilm(), tmp_path)
    model.save_pretrained(tmp_path / "model")

    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    expected = logits(model, inputs.minilm())
    assert not torch.equal(logits(classifier(), inputs.minilm()), expected)
    assert torch.equal(logits(reloaded, inputs.minilm()), expected)


@pytest.mark.parametrize("task", ["SEQ_CLS", "CAUSAL_LM"])
def test_training_goes_on_after_an_evaluation_in_4_bits(task: str, tmp_path: Path) -> None:
    """bitsandbytes would repack the weights for inference at the first evaluation, and then no gradient passes."""
    folder, labels = (inputs.minilm(), {"num_labels": 2}) if task == "SEQ_CLS" else (inputs.smollm2(), {})
    model = get_model(folder, method="lora", task=task, quantization="nf4", **labels)
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    trainer = train(model, folder, tmp_path, eval_strategy="steps", eval_steps=1, logging_steps=1)

    assert sum("eval_loss" in row for row in trainer.state.log_history) == 3
    norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    assert len(norms) == 3
    assert min(norms) > 0
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, before[name]) != tensor.requires_grad, name
