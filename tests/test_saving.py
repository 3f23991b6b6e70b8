"""What is saved is what was trained: sizes, `peft_plus.json`, thawed weights, fingerprints, copies."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainingArguments

import peft_plus
from peft_plus import Trainer, attach, from_pretrained, get_model, load_thawed
from peft_plus.saving import fingerprint
from peft_plus.tasks.seq_cls import SequenceClassification
from peft_plus_freezing.gradual_unfreeze import GradualUnfreeze
from tests.models import batch, tiny
from tests.tokenizers import tiny_tokenizer
from tests.training import quiet

POOLER = "base_model.model.bert.pooler.dense.weight"
EMBEDDINGS = "base_model.model.bert.embeddings.word_embeddings.weight"


def saved(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Save, and read `peft_plus.json`."""
    model.save_pretrained(folder)
    return json.loads((folder / "peft_plus.json").read_text(encoding="utf-8"))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@torch.no_grad()
def disturb(model: nn.Module, *names: str) -> None:
    """Change what trains, as training would; or only the parameters named."""
    for name, tensor in model.named_parameters():
        if name in names or (not names and tensor.requires_grad):
            tensor.add_(torch.randn_like(tensor))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(**batch("bert")).logits


def thawed_model(*names: str) -> Any:
    """A LoRA in which the user thawed base weights by hand."""
    model = get_peft_model(tiny("bert"), LoraConfig(task_type="SEQ_CLS"))
    for name in names or (POOLER,):
        model.get_parameter(name).requires_grad_(True)
    return attach(model, [])


# --- peft_plus.json ---


def test_record(tmp_path: Path) -> None:
    base = tiny("bert", "FEATURE_EXTRACTION")
    base.save_pretrained(tmp_path / "base")
    task = SequenceClassification(label_names=["no", "yes"])
    method = {"gradual_unfreeze": {"every": 3}, "lora": {"r": 4}, "llrd": {}}
    model = get_model(tmp_path / "base", method, task=task)
    record = saved(model, tmp_path / "out")
    assert record == {
        "format": 1,
        "tuner": "lora",
        "tuner_origin": f"peft {version('peft')}",
        "plugins": [
            {
                "name": "gradual_unfreeze",
                "origin": f"peft-plus-freezing {version('peft-plus-freezing')}",
                "settings": GradualUnfreeze(every=3).settings(),
            },
            {
                "name": "llrd",
                "origin": f"peft-plus-stability {version('peft-plus-stability')}",
                "settings": {"decay": 0.95},
            },
        ],
        "task": {"name": "SEQ_CLS", "settings": task.settings(), "labels": ["no", "yes"]},
        "quantization": None,
        "base": {
            "name_or_path": str(tmp_path / "base"),
            "class": "BertForSequenceClassification",
            "dtype": "float32",
            "fingerprint": fingerprint(model),
        },
        "stages_run": [],
        "trained_parameters": sum(t.numel() for t in model.parameters() if t.requires_grad),
        "thawed_tensors": [],
        "versions": {
            name: version(name) for name in ("peft-plus", "peft", "transformers", "accelerate", "torch", "bitsandbytes")
        },
    }
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "peft_plus.json",
    }


def test_record_of_full_and_quantised(tmp_path: Path) -> None:
    tiny("bert", "FEATURE_EXTRACTION", hidden_size=64).save_pretrained(tmp_path / "base")
    full = saved(get_model(tmp_path / "base", "full", task="SEQ_CLS", num_labels=2), tmp_path / "full")
    assert (full["tuner"], full["quantization"]) == ("full", None)
    model = get_model(tmp_path / "base", "lora", task="SEQ_CLS", num_labels=2, quantization="int8")
    assert saved(model, tmp_path / "int8")["quantization"] == "int8"


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    get_model(tiny("bert"), "lora").save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.glob("*peft_plus*"))


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_model(tiny("bert"), "lora")
    before = saved(model, tmp_path)

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert json.loads((tmp_path / "peft_plus.json").read_text()) == before
    assert not list(tmp_path.glob(".*"))


# --- Sizes, and who can read it ---


@pytest.mark.parametrize(("method", "settings"), [("lora", {"r": 2}), ("linear_probe", {}), ("ia3", {})])
def test_little_trained_is_little_saved(tmp_path: Path, method: str, settings: dict[str, int]) -> None:
    """A base with so many words that it is wide for its size: less than 1 % trains, less than 1 % is saved."""
    tiny("bert", "FEATURE_EXTRACTION", vocab_size=20_000, hidden_size=64).save_pretrained(tmp_path / "base")
    model = get_model(tmp_path / "base", method, task="SEQ_CLS", num_labels=3, **settings)
    disturb(model)
    record = saved(model, tmp_path / "out")
    assert record["trained_parameters"] < 0.01 * sum(t.numel() for t in model.parameters())
    assert size(tmp_path / "out") < 0.01 * size(tmp_path / "base")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "out")), logits(model))


def test_full_reloads_with_plain_transformers(tmp_path: Path) -> None:
    model = get_model(tiny("bert"), ["full", "llrd"])
    disturb(model)
    record = saved(model, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors", "peft_plus.json"}
    assert record["thawed_tensors"] == []
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning", "p_tuning", "dora", "linear_probe"])
def test_adapters_reload_with_plain_peft(tmp_path: Path, method: str) -> None:
    model = get_model(tiny("bert"), method)
    disturb(model)
    saved(model, tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny("bert"), tmp_path)), logits(model))


def test_several_adapters(tmp_path: Path) -> None:
    model = get_model(tiny("bert"), "lora")
    model.add_adapter("second", LoraConfig(task_type="SEQ_CLS", r=2))
    model.set_adapter("second")
    attach(model, "llrd")
    disturb(model)
    record = saved(model, tmp_path)
    assert record["plugins"][0]["name"] == "llrd"
    assert record["base"]["fingerprint"] == fingerprint(tiny("bert"))
    again = PeftModel.from_pretrained(tiny("bert"), tmp_path)
    again.load_adapter(tmp_path / "second", adapter_name="second")
    again.set_adapter("second")
    assert torch.equal(logits(again), logits(model))
    model.set_adapter("default")
    again.set_adapter("default")
    assert torch.equal(logits(again), logits(model))


def test_save_pretrained_is_still_the_class_s_own(tmp_path: Path) -> None:
    model = get_model(tiny("bert"), "lora")
    assert model.save_pretrained.__doc__ == PeftModel.save_pretrained.__doc__
    model.save_pretrained(tmp_path, safe_serialization=True, selected_adapters=["default"])
    assert (tmp_path / "peft_plus.json").is_file()
    full = get_model(tiny("bert"), "full")
    full.save_pretrained(tmp_path / "full", max_shard_size="40KB")
    assert len(list((tmp_path / "full").glob("*.safetensors"))) > 1


# --- Base weights that were thawed ---


def test_thawed_weights_come_back_bit_for_bit(tmp_path: Path) -> None:
    model = thawed_model(POOLER, EMBEDDINGS)
    disturb(model)
    record = saved(model, tmp_path)
    assert record["thawed_tensors"] == [EMBEDDINGS, POOLER]
    stored = load_file(tmp_path / "thawed.safetensors")
    assert set(stored) == {EMBEDDINGS, POOLER}
    plain = PeftModel.from_pretrained(tiny("bert"), tmp_path)
    assert not torch.equal(logits(plain), logits(model))
    assert load_thawed(plain, tmp_path) is plain
    for name, tensor in stored.items():
        assert torch.equal(plain.get_parameter(name), tensor)
        assert torch.equal(model.get_parameter(name), tensor)
    assert torch.equal(logits(plain), logits(model))


def test_weights_frozen_again_leave_no_stale_file(tmp_path: Path) -> None:
    model = thawed_model()
    saved(model, tmp_path)
    assert (tmp_path / "thawed.safetensors").exists()
    model.get_parameter(POOLER).requires_grad_(False)
    attach(model, [])
    assert saved(model, tmp_path)["thawed_tensors"] == []
    assert not (tmp_path / "thawed.safetensors").exists()


def test_bias_that_a_tuner_trains_is_peft_s_to_save(tmp_path: Path) -> None:
    model = get_model(tiny("bert"), "lora", bias="all")
    disturb(model)
    record = saved(model, tmp_path)
    again = PeftModel.from_pretrained(tiny("bert"), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert record["thawed_tensors"] == []


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        (POOLER, (3, 3), "shape (3, 3), the model's has (32, 32)"),
        ("base_model.model.bert.no_such.weight", (2,), "not a parameter of this PeftModelForSequenceClassification"),
    ],
)
def test_thawed_weights_of_another_base_change_nothing(
    tmp_path: Path, name: str, shape: tuple[int, ...], says: str
) -> None:
    model = thawed_model()
    save_file({EMBEDDINGS: torch.ones(100, 32), name: torch.ones(shape)}, tmp_path / "thawed.safetensors")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"thawed\.safetensors") as refused:
        load_thawed(model, tmp_path)
    assert says in str(refused.value)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_no_thawed_weights(tmp_path: Path) -> None:
    saved(get_model(tiny("bert"), "lora"), tmp_path)
    with pytest.raises(FileNotFoundError, match="PEFT's folder is complete"):
        load_thawed(get_model(tiny("bert"), "lora"), tmp_path)


# --- Trainer ---


def test_checkpoints_hold_the_same_files(tmp_path: Path) -> None:
    model = attach(thawed_model(), [GradualUnfreeze(every=1)])
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        save_steps=3,
        per_device_train_batch_size=4,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    data = batch("bert")
    trainer = Trainer(model, args, train_dataset=[{key: value[i] for key, value in data.items()} for i in range(4)])
    trainer.train()
    checkpoint, final = tmp_path / "checkpoint-3", tmp_path / "final"
    trainer.save_model(str(final))
    ours = {"adapter_model.safetensors", "adapter_config.json", "peft_plus.json", "thawed.safetensors"}
    for folder in (checkpoint, final):
        assert ours <= {path.name for path in folder.iterdir()}
        again = load_thawed(PeftModel.from_pretrained(tiny("bert"), folder), folder)
        assert torch.equal(logits(again), logits(model))
    assert json.loads((checkpoint / "peft_plus.json").read_text()) == json.loads((final / "peft_plus.json").read_text())


def plain_training(model: Any, folder: Path) -> None:
    data = batch("bert")
    rows = [{key: value[i] for key, value in data.items()} for i in range(4)]
    transformers.Trainer(model, quiet(folder, max_steps=2, learning_rate=1e-2), train_dataset=rows).train()


def test_plugins_that_never_ran_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The Trainer of a script was left as it was."""
    model = get_model(tiny("bert"), ["lora", "llrd"])
    model.save_pretrained(tmp_path / "fresh")
    assert caplog.text == ""
    plain_training(model, tmp_path / "run")
    record = saved(model, tmp_path / "trained")
    assert "no plugin of this model (llrd) ever ran" in caplog.text
    assert record["stages_run"] == []


def test_plugins_that_ran_are_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = get_model(tiny("bert"), ["lora", "llrd"])
    data = batch("bert")
    rows = [{key: value[i] for key, value in data.items()} for i in range(4)]
    Trainer(model, quiet(tmp_path / "run", max_steps=2), train_dataset=rows).train()
    assert saved(model, tmp_path / "trained")["stages_run"] == ["train"]
    without = get_model(tiny("bert"), "lora")
    plain_training(without, tmp_path / "plain")
    without.save_pretrained(tmp_path / "without")
    again = from_pretrained(tiny("bert"), tmp_path / "trained", is_trainable=True)
    again.save_pretrained(tmp_path / "again")
    assert "ever ran" not in caplog.text


# --- Copies ---


def pickled(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@pytest.mark.parametrize("method", ["lora", "full", "prompt_tuning"])
def test_copies_save_themselves(tmp_path: Path, duplicate: Callable[[Any], Any], method: str) -> None:
    model = get_model(tiny("bert"), [method, "r3f"])
    before = logits(model)
    twin = duplicate(model)
    assert twin.peft_plus is not model.peft_plus
    assert twin.peft_plus.plugins == model.peft_plus.plugins
    assert twin.peft_plus.plugins[0] is not model.peft_plus.plugins[0]
    disturb(twin)
    attach(twin, "llrd" if method != "prompt_tuning" else [])
    record = saved(twin, tmp_path / "twin")
    assert [p["name"] for p in record["plugins"]] == (["llrd"] if method != "prompt_tuning" else [])
    assert [p["name"] for p in saved(model, tmp_path / "model")["plugins"]] == ["r3f"]
    for one, folder in ((twin, "twin"), (model, "model")):
        if method == "full":
            again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / folder)
        else:
            again = PeftModel.from_pretrained(tiny("bert"), tmp_path / folder)
        assert torch.equal(logits(again), logits(one))
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(twin), before)


# --- Fingerprints ---


@pytest.mark.parametrize(
    "method", ["lora", "dora", "ia3", "prompt_tuning", "prefix_tuning", "p_tuning", "linear_probe"]
)
@pytest.mark.parametrize("name", ["bert", "llama", "bart"])
def test_a_base_keeps_its_fingerprint(name: str, method: str) -> None:
    alone = fingerprint(tiny(name))
    model = get_model(tiny(name), method)
    assert model.peft_plus.base["fingerprint"] == fingerprint(model) == alone
    disturb(model)
    assert fingerprint(model) == alone
    assert fingerprint(attach(tiny(name), [])) == alone


def test_a_base_with_a_saved_module_keeps_its_fingerprint() -> None:
    model = get_model(tiny("bert"), "lora", modules_to_save=["pooler"])
    disturb(model)
    assert fingerprint(model) == fingerprint(tiny("bert"))


def test_another_base_has_another_fingerprint() -> None:
    own = fingerprint(tiny("bert"))
    assert fingerprint(tiny("bert")) == own
    other = [tiny("bert", seed=1), tiny("bert", num_hidden_layers=2), tiny("bert").to(torch.float16), tiny("electra")]
    assert len({own, *map(fingerprint, other)}) == 1 + len(other)
    for name, tensor in tiny("bert").named_parameters():
        model = tiny("bert")
        with torch.no_grad():
            model.get_parameter(name).view(-1)[0] += 1
        assert (fingerprint(model) == own) == name.startswith("classifier")
        assert tensor.shape == model.get_parameter(name).shape


def test_a_new_head_does_not_matter() -> None:
    assert fingerprint(tiny("bert", num_labels=2)) == fingerprint(tiny("bert", num_labels=5))


def test_the_module_is_public() -> None:
    assert peft_plus.load_thawed is load_thawed
    with pytest.raises(FileNotFoundError):
        safe_open("nowhere.safetensors", framework="pt")


def test_names_that_the_task_learned_are_saved(tmp_path: Path) -> None:
    model = get_model(tiny("bert", num_labels=2), "full")
    rows = datasets.Dataset.from_dict({"text": ["good", "bad"], "label": ["pos", "neg"]})
    model.peft_plus.task.preprocess(rows, tiny_tokenizer())
    assert saved(model, tmp_path)["task"]["labels"] == ["neg", "pos"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"] == {"0": "neg", "1": "pos"}
    # Whoever goes on from this folder keeps the head's order, whatever order the new data's names would have.
    again = get_model(tmp_path, "lora", task="SEQ_CLS", num_labels=2)
    other = datasets.Dataset.from_dict({"text": ["good"], "label": ["pos"]})
    assert again.peft_plus.task.preprocess(other, tiny_tokenizer())["labels"] == [1]


def test_a_frozen_batch_norm_keeps_its_statistics(tmp_path: Path) -> None:
    base = tiny("resnet")
    model = get_model(copy.deepcopy(base), "linear_probe")
    before = {n: b.clone() for n, b in model.named_buffers()}
    data = batch("resnet")
    rows = [{name: values[i] for name, values in data.items()} for i in range(len(data["labels"]))]
    args = TrainingArguments(
        str(tmp_path / "run"), max_steps=3, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no"
    )
    peft_plus.Trainer(model, args, train_dataset=rows).train()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    model.save_pretrained(tmp_path / "probe")
    reloaded = PeftModel.from_pretrained(base, tmp_path / "probe").eval()
    with torch.no_grad():
        assert torch.equal(reloaded(**data).logits, model.eval()(**data).logits)
