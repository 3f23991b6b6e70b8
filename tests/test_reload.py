"""`from_pretrained`: what a good folder gives is what plain PEFT gives, bit for bit; and what comes with it."""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

import peft_plus
from peft_plus import MethodError, PluginError, attach, fit, from_pretrained, get_model, patterns, registry, rehearsal
from peft_plus.saving import fingerprint
from tests.models import batch, tiny
from tests.test_adapter_folder import POOLER, RECORD, bounded, state_of
from tests.test_get_model import MINIMAL
from tests.training import quiet

NEED_VALUES = {"adamss", "boft", "frod", "shira", "unilora"}
"""PEFT's tuners that read the base's weights while they are built."""

REGEX = {"target_modules": r".*\.self\.(query|value)"}
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    # what → (base, tuner, settings)
    "dora": ("bert", "dora", {}),
    "rslora": ("bert", "rslora", {}),
    "linear_probe": ("bert", "linear_probe", {}),
    "pissa": ("bert", "lora", {"init_lora_weights": "pissa"}),
    "olora": ("bert", "lora", {"init_lora_weights": "olora"}),
    "biases": ("bert", "lora", {"bias": "all"}),
    "biases of targets": ("bert", "lora", {"bias": "lora_only"}),
    "biases of B": ("bert", "lora", {"lora_bias": True}),
    "modules to save": ("bert", "lora", {"modules_to_save": ["pooler"]}),
    "tokens": ("bert", "lora", {"trainable_token_indices": {"word_embeddings": [1, 2]}}),
    "embeddings": ("bert", "lora", {"target_modules": ["word_embeddings", "query"]}),
    "some layers": ("bert", "lora", {"layers_to_transform": [0, 2], "layers_pattern": "layer"}),
    "parameters": ("llama", "lora", {"target_parameters": ["mlp.up_proj.weight"], "target_modules": []}),
    "replicated layers": ("llama", "lora", {"layer_replication": [[0, 2], [1, 3]], "target_modules": r".*\.[qv]_proj"}),
    "all linear": ("bert", "lora", {"target_modules": "all-linear"}),
    "an expression": ("bert", "lora", REGEX),
    "expressions to exclude": ("bert", "lora", {"target_modules": "all-linear", "exclude_modules": r".*\.1\..*"}),
    "expressions for ranks": (
        "bert",
        "lora",
        {"rank_pattern": {r"layer\.[01]\..*query": 2, "value": 4}, "alpha_pattern": {"^bert.*key|query": 3}},
    ),
    "expressions for ranks, overlapping": (
        "bert",
        "lora",
        {**REGEX, "rank_pattern": {r"layer\.0.*": 2, r"layer\.\d.*": 4, r"layer\.0\..*query": 6}},
    ),
    "expressions of ia3": (
        "bert",
        "ia3",
        {"target_modules": r".*(key|output\.dense)", "feedforward_modules": r".*output\.dense"},
    ),
    "expressions of loha": ("bert", "loha", {"rank_pattern": {r".*query": 2}}),
    "expressions of hira": ("bert", "hira", {"rank_pattern": {r".*query": 2}}),
    "expressions of delora": ("bert", "delora", {"rank_pattern": {r".*query": 2}, "lambda_pattern": {".*value": 3}}),
    "expressions of fourierft": (
        "bert",
        "fourierft",
        {"n_frequency": 10, "n_frequency_pattern": {r"layer\.\d\..*query": 5}},
    ),
    "expressions of waveft": ("bert", "waveft", {"n_frequency": 64, "n_frequency_pattern": {".*query": 32}}),
    "expressions of c3a": ("bert", "c3a", {"block_size": 8, "block_size_pattern": {r"layer\.\d\..*query": 4}}),
    "expressions of osf": ("bert", "osf", {"rank_pattern": {r"layer\.\d\..*query": 4}}),
    "adalora at its end": ("bert", "adalora", {"total_step": 10}),
    "vera without its projection": ("bert", "vera", {"save_projection": False}),
    "randlora without its projection": ("bert", "randlora", {"save_projection": False}),
    "vblora for inference": ("bert", "vblora", {"vector_length": 16, "save_only_topk_weights": True}),
    "a prefix through a projection": ("llama", "prefix_tuning", {"prefix_projection": True, "encoder_hidden_size": 16}),
    "an encoder-decoder": ("bart", "lora", {"target_modules": ["q_proj"]}),
    "convolutions": ("resnet", "lora", {"target_modules": r".*convolution"}),
}
TUNERS = {
    name: (MINIMAL.get(name, ("bert", {}))[0], name, MINIMAL.get(name, ("bert", {}))[1])
    for name in registry.peft_tuners()
    if name != "xlora"
}


def task_of(base: str) -> str | None:
    return "CAUSAL_LM" if base == "llama" else None


def built(base: str, tuner: str, settings: dict[str, Any]) -> Any:
    """A model whose trainable weights are not what they started from."""
    model = get_model(tiny(base, task_of(base)), {tuner: settings})
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.requires_grad:
                tensor.add_(torch.randn_like(tensor) * 0.1)
    return model


@torch.no_grad()
def logits(model: Any, base: str = "bert", tuner: str = "lora") -> Tensor:
    inputs = batch(base, task_of(base))
    del inputs["labels"]
    if tuner in ("multitask_prompt_tuning", "poly"):
        inputs["task_ids"] = torch.zeros(len(inputs["input_ids"]), dtype=torch.long)
    if tuner == "cpt":
        inputs["input_type_mask"] = torch.full_like(inputs["input_ids"], 4)
    return model.eval()(**inputs).logits


def trainable(model: nn.Module) -> set[str]:
    return {name for name, tensor in model.named_parameters() if tensor.requires_grad}


def saved(model: Any, folder: Path, **changes: Any) -> dict[str, Any]:
    """Save, change the record at the top, and give it."""
    model.save_pretrained(folder)
    record = json.loads((folder / RECORD).read_text()) | changes
    (folder / RECORD).write_text(json.dumps(record))
    return record


# --- Every tuner, as plain PEFT loads it ---


@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension:UserWarning")  # boft, without CUDA
@pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1:UserWarning")
@pytest.mark.filterwarnings("ignore:Unsupported layer type.*LayerNorm:UserWarning")  # ln_tuning
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")  # frod
@pytest.mark.filterwarnings("ignore:Specified to not (save|load):UserWarning")
@pytest.mark.filterwarnings("ignore:.*6 LoRA tensor.s. have invalid shape.*lora_B.bias:peft.utils.warning.PeftWarning")
@pytest.mark.filterwarnings(
    "ignore:The following rank_pattern keys did not match.*lora_E:RuntimeWarning"
)  # adalora's own
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize("what", [*TUNERS, *VARIANTS])
def test_gives_what_plain_peft_gives(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, tuner, settings = (TUNERS | VARIANTS)[what]
    model = built(name, tuner, settings)
    if what == "adalora at its end":  # as its last allocation leaves it: every second rank pruned
        short = {n.removeprefix("base_model.model.").replace(".default", ""): t for n, t in model.named_parameters()}
        pattern = {n: [i % 2 == 0 for i in range(len(t))] for n, t in short.items() if n.endswith("lora_E")}
        model.peft_config["default"].rank_pattern = pattern
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    plain = PeftModel.from_pretrained(tiny(name, task_of(name)), tmp_path)
    looks: list[bool] = []
    rehearse = rehearsal.rehearse

    def watched(*args: Any, values: bool = False) -> None:
        looks.append(values)
        rehearse(*args, values=values)

    monkeypatch.setattr("peft_plus.reload.rehearse", watched)
    torch.manual_seed(1)
    base = tiny(name, task_of(name))
    own = from_pretrained(base, tmp_path)
    assert type(own) is type(plain)
    assert own.get_base_model() is base
    expected, found = plain.state_dict(), own.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert trainable(own) == trainable(plain)
    assert own.training == plain.training
    assert torch.equal(logits(own, name, tuner), logits(plain, name, tuner))
    # Only these look at the base before the file is known to fit.
    assert (True in looks) == (tuner in NEED_VALUES or what == "adalora at its end")


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
@pytest.mark.parametrize("tuner", ["lora", "ia3", "prompt_tuning", "linear_probe"])
def test_quantised_bases(scheme: str, tuner: str, tmp_path: Path) -> None:
    wide = tiny("bert", hidden_size=64, num_hidden_layers=2)
    wide.save_pretrained(tmp_path / "base")

    def base() -> Any:
        config = (
            BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["classifier"])
            if scheme == "int8"
            else BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.float32,
                llm_int8_skip_modules=["classifier"],
            )
        )
        auto = transformers.AutoModelForSequenceClassification
        return auto.from_pretrained(tmp_path / "base", quantization_config=config)

    get_model(base(), tuner).save_pretrained(tmp_path / "out")
    plain, own = PeftModel.from_pretrained(base(), tmp_path / "out"), from_pretrained(base(), tmp_path / "out")
    by_name = from_pretrained(tmp_path / "base", tmp_path / "out", quantization=scheme)

    def answer(model: Any) -> Tensor:  # in train mode bitsandbytes keeps to its exact kernels
        with torch.no_grad():
            return model.train()(**batch("bert")).logits

    assert torch.equal(answer(own), answer(plain))
    assert torch.equal(answer(by_name), answer(plain))


# --- Training goes on ---


@pytest.mark.parametrize(
    "what", ["lora", "ia3", "vera", "trainable_tokens", "linear_probe", "biases", "modules to save"]
)
def test_the_same_trains_again(what: str, tmp_path: Path) -> None:
    name, tuner, settings = (TUNERS | VARIANTS)[what]
    model = built(name, tuner, settings)
    model.save_pretrained(tmp_path)
    again = from_pretrained(tiny(name, task_of(name)), tmp_path, is_trainable=True)
    assert trainable(again) == trainable(model) == set(again.peft_plus.params)
    assert again.peft_plus.tuner == model.peft_plus.tuner.replace("rslora", "lora")


def test_the_plan_comes_back(tmp_path: Path) -> None:
    model = get_model(tiny("bert"), {"lora": {"r": 2}, "llrd": {"decay": 0.5}, "gradual_unfreeze": {"every": 3}})
    first = saved(model, tmp_path / "one")
    again = from_pretrained(tiny("bert"), tmp_path / "one", is_trainable=True)
    assert again.peft_plus.plugins == model.peft_plus.plugins
    assert again.peft_plus.origins == model.peft_plus.origins
    assert saved(again, tmp_path / "two") == first
    data = batch("bert")
    rows = [{name: values[i] for name, values in data.items()} for i in range(4)]
    fit(again, quiet(tmp_path, max_steps=4, per_device_train_batch_size=4), train_dataset=rows)
    assert not torch.equal(logits(again), logits(model))


def test_without_training_there_is_no_plan(tmp_path: Path) -> None:
    get_model(tiny("bert"), ["lora", "llrd"]).save_pretrained(tmp_path)
    assert not hasattr(from_pretrained(tiny("bert"), tmp_path), "peft_plus")


def test_a_folder_of_plain_peft_goes_on_without_plugins(tmp_path: Path) -> None:
    get_peft_model(tiny("bert"), LoraConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path)
    again = from_pretrained(tiny("bert"), tmp_path, is_trainable=True)
    assert (again.peft_plus.tuner, again.peft_plus.plugins) == ("lora", ())


def test_thawed_weights_come_back_and_train(tmp_path: Path) -> None:
    model = get_model(tiny("bert"), "lora")
    model.get_parameter(POOLER).requires_grad_(True)
    attach(model, [])
    with torch.no_grad():
        model.get_parameter(POOLER).add_(1.0)
    first = saved(model, tmp_path / "one")
    inference = from_pretrained(tiny("bert"), tmp_path / "one")
    assert torch.equal(logits(inference), logits(model))
    assert trainable(inference) == set()
    again = from_pretrained(tiny("bert"), tmp_path / "one", is_trainable=True)
    assert torch.equal(logits(again), logits(model))
    assert trainable(again) == trainable(model)
    assert saved(again, tmp_path / "two") == first  # the fingerprint is that of the base as it was before


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_tuners_that_change_the_base_tell_which_it_was(tmp_path: Path, init: str) -> None:
    model = get_model(tiny("bert"), "lora", init_lora_weights=init)
    assert model.peft_plus.base["fingerprint"] == fingerprint(tiny("bert"))
    model.save_pretrained(tmp_path)
    again = from_pretrained(tiny("bert"), tmp_path, is_trainable=True)
    assert again.peft_plus.base == model.peft_plus.base


@pytest.mark.parametrize("tuner", ["prompt_tuning", "prefix_tuning", "p_tuning"])
def test_prompts_cannot_go_on(tmp_path: Path, tuner: str) -> None:
    get_model(tiny("bert"), tuner).save_pretrained(tmp_path)
    base = tiny("bert")
    before = state_of(base)
    with pytest.raises(MethodError, match=f"PEFT cannot go on training '{tuner}'"):
        from_pretrained(base, tmp_path, is_trainable=True)
    assert state_of(base) == before


def test_another_name(tmp_path: Path) -> None:
    model = built("bert", "lora", {})
    model.save_pretrained(tmp_path)
    again = from_pretrained(tiny("bert"), tmp_path, adapter_name="mine")
    assert list(again.peft_config) == ["mine"]
    assert torch.equal(logits(again), logits(model))
    for name in ("", "a.b"):
        with pytest.raises(MethodError, match="is no name for an adapter"):
            from_pretrained(tiny("bert"), tmp_path, adapter_name=name)


# --- Plugins that are named ---


PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar
from pathlib import Path
from peft_plus import Plugin

Path(__file__).with_suffix(".imported").touch()


@dataclass(kw_only=True)
class Thing(Plugin):
    name: ClassVar[str] = "canary"
    volume: int = 1
"""


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed distribution with one plugin; the path given exists once it was imported."""
    site = tmp_path / "site"
    info = site / "canary_plugin-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: canary-plugin\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[peft_plus.plugins]\ncanary = canary_plugin:Thing\n")
    (site / "canary_plugin.py").write_text(PLUGIN)
    (site / "bystander.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(site))
    yield site / "canary_plugin.imported"
    sys.modules.pop("canary_plugin", None)


def with_plugin(folder: Path, name: str, origin: str, settings: Any = None) -> Path:
    model = get_model(tiny("bert"), "lora")
    saved(model, folder, plugins=[{"name": name, "origin": origin, "settings": settings or {}}])
    return folder


def test_a_plugin_is_imported_only_to_train(canary: Path, tmp_path: Path) -> None:
    folder = with_plugin(tmp_path / "out", "canary", "canary-plugin 1.2", {"volume": 3})
    from_pretrained(tiny("bert"), folder)
    assert not canary.exists()
    model = from_pretrained(tiny("bert"), folder, is_trainable=True)
    assert canary.exists()
    assert [p.settings() for p in model.peft_plus.plugins] == [{"volume": 3}]


def test_settings_of_a_recorded_plugin_are_checked(canary: Path, tmp_path: Path) -> None:
    folder = with_plugin(tmp_path / "out", "canary", "canary-plugin 1.2", {"volume": "loud"})
    base = tiny("bert")
    before = state_of(base)
    with pytest.raises(MethodError, match="volume='loud' is str; expected int"):
        from_pretrained(base, folder, is_trainable=True)
    assert state_of(base) == before


@pytest.mark.parametrize(
    ("name", "origin", "says"),
    [
        ("gradual_unfreeze", "peft-plus-freezing 0.1.0", "is not installed: pip install 'peft-plus-freezing>=0.1.0'"),
        ("tickle", "peft-tickle 2.0", "names 'peft-tickle' for it. If you trust that: pip install 'peft-tickle>=2.0'"),
        ("gradual_unfreeze", "evil 1.0", "names 'evil' for it. If you trust that"),
        ("tickle", "__main__", "no distribution. Reload the adapter with plain PEFT"),
        ("tickle", "x; rm -rf / 1.0", "no distribution"),
        ("tickle", "--index-url=http://evil x 1.0", "no distribution"),
        ("bystander", "os 1.0", "which is not installed"),
    ],
)
def test_a_missing_plugin(
    name: str, origin: str, says: str, canary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_plugin(tmp_path / "out", name, origin)
    everything = registry.entry_points
    monkeypatch.setattr(
        registry,
        "entry_points",
        lambda group: [p for p in everything(group=group) if p.name not in registry.FIRST_PARTY],
    )
    from_pretrained(tiny("bert"), folder)
    base = tiny("bert")
    before = state_of(base)
    with pytest.raises(MethodError) as refused:
        from_pretrained(base, folder, is_trainable=True)
    assert says in str(refused.value)
    assert "without is_trainable" in str(refused.value)
    assert state_of(base) == before
    assert "bystander" not in sys.modules


TUNER = """
from dataclasses import dataclass
from enum import Enum

import peft
from peft import mapping


class Type(str, Enum):
    CANARY_TUNER = "CANARY_TUNER"


@dataclass
class Thing(peft.LoraConfig):
    def __post_init__(self):
        super().__post_init__()
        self.peft_type = Type.CANARY_TUNER


mapping.PEFT_TYPE_TO_CONFIG_MAPPING[Type.CANARY_TUNER] = Thing
mapping.PEFT_TYPE_TO_TUNER_MAPPING[Type.CANARY_TUNER] = peft.LoraModel
mapping.PEFT_TYPE_TO_PREFIX_MAPPING[Type.CANARY_TUNER] = "lora_"
"""


def test_an_installed_tuner_is_imported_since_nothing_loads_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "site" / "canary_tuner-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: canary-tuner\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[peft_plus.tuners]\ncanary_tuner = canary_tuner:Thing\n")
    (tmp_path / "site" / "canary_tuner.py").write_text(TUNER)
    model = built("bert", "lora", {})
    model.save_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    (tmp_path / "out" / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "CANARY_TUNER"}))
    with pytest.raises(MethodError, match="'CANARY_TUNER' adapter, a tuner that the installed peft"):
        from_pretrained(tiny("bert"), tmp_path / "out")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    mappings = [getattr(peft.mapping, f"PEFT_TYPE_TO_{what}_MAPPING") for what in ("CONFIG", "TUNER", "PREFIX")]
    try:
        again = from_pretrained(tiny("bert"), tmp_path / "out")
    finally:
        for mapping in mappings:
            mapping.pop("CANARY_TUNER", None)
        sys.modules.pop("canary_tuner", None)
    assert torch.equal(logits(again), logits(model))


def test_a_tuner_of_a_plugin(tmp_path: Path) -> None:
    record = saved(get_model(tiny("bert"), "lora"), tmp_path)
    assert record["tuner_origin"] == f"peft {peft.__version__}"
    (tmp_path / RECORD).write_text(
        json.dumps(record | {"tuner": "bottleneck", "tuner_origin": "peft-plus-adapters 0.2"})
    )
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "BOTTLENECK"}))
    with pytest.raises(MethodError, match=r"If you trust that: pip install 'peft-plus-adapters>=0\.2'"):
        from_pretrained(tiny("bert"), tmp_path)


# --- The base ---


@pytest.mark.filterwarnings("ignore:Could not find a config file in org/base:UserWarning")
def test_the_base_must_be_named(tmp_path: Path) -> None:
    base = tiny("bert")
    base.name_or_path = "org/base"
    get_model(base, "lora").save_pretrained(tmp_path)
    for call in (lambda: from_pretrained(tmp_path), lambda: from_pretrained(None, tmp_path)):  # type: ignore[arg-type]
        with pytest.raises(MethodError, match=r"trained on 'org/base'\. If you trust that one"):
            call()
    with pytest.raises(MethodError, match="takes two things"):
        from_pretrained(tiny("bert"))
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(MethodError, match="trained on 'org/base'"):
        from_pretrained(tmp_path)
    with pytest.raises(MethodError, match="does not exist"):
        from_pretrained(tiny("bert"), tmp_path / "nowhere")
    with pytest.raises(MethodError, match="'out/adapter' is no folder here, nor can it be fetched from the hub"):
        from_pretrained(tiny("bert"), "out/adapter")


def test_a_base_with_an_adapter(tmp_path: Path) -> None:
    model = get_model(tiny("bert"), "lora")
    model.save_pretrained(tmp_path)
    with pytest.raises(MethodError, match="has an adapter already"):
        from_pretrained(model, tmp_path)
    with pytest.raises(MethodError, match="quantization= is for loading"):
        from_pretrained(tiny("bert"), tmp_path, quantization="nf4")


def test_another_base(tmp_path: Path) -> None:
    model = built("bert", "lora", {})
    model.save_pretrained(tmp_path)
    other = tiny("bert", seed=1)
    before = state_of(other)
    with pytest.raises(MethodError, match="trained on another base") as refused:
        from_pretrained(other, tmp_path)
    assert fingerprint(tiny("bert"))[:12] in str(refused.value)
    assert fingerprint(other)[:12] in str(refused.value)
    assert state_of(other) == before
    again = from_pretrained(other, tmp_path, allow_other_base=True)
    plain = PeftModel.from_pretrained(tiny("bert", seed=1), tmp_path)
    assert torch.equal(logits(again), logits(plain))


def test_a_base_of_another_head(tmp_path: Path) -> None:
    built("bert", "lora", {}).save_pretrained(tmp_path)
    with pytest.raises(MethodError, match="trained on another base: BertForSequenceClassification"):
        from_pretrained(tiny("bert", "FEATURE_EXTRACTION"), tmp_path)
    with pytest.raises(MethodError, match="head of the right size"):
        from_pretrained(tiny("bert", num_labels=7), tmp_path)


def test_the_base_in_another_precision(tmp_path: Path) -> None:
    built("bert", "lora", {}).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="in float32, this base is in bfloat16: whether it is the same"):
        from_pretrained(tiny("bert").to(torch.bfloat16), tmp_path)
    wide = tiny("bert", hidden_size=64, num_hidden_layers=2)
    wide.save_pretrained(tmp_path / "base")
    get_model(wide, "lora").save_pretrained(tmp_path / "out")
    with pytest.warns(UserWarning, match="in float32, this base is in int8"):
        from_pretrained(tmp_path / "base", tmp_path / "out", quantization="int8")


@pytest.mark.filterwarnings("ignore:Could not find a config file in org/base:UserWarning")
def test_plain_peft_records_no_fingerprint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = tiny("bert")
    base.name_or_path = "org/base"
    get_peft_model(base, LoraConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path)
    other = tiny("bert", seed=1)
    other.name_or_path = "org/other"
    with caplog.at_level(logging.WARNING, "peft_plus"):
        from_pretrained(other, tmp_path)
        assert "trained on 'org/base'; you loaded it on org/other" in caplog.text
        caplog.clear()
        same = tiny("bert")
        same.name_or_path = "/models/base"
        from_pretrained(same, tmp_path)
        assert not caplog.text


@pytest.fixture
def by_name(tmp_path: Path) -> Path:
    tiny("bert", "FEATURE_EXTRACTION").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_base_by_name_gets_the_recorded_head(by_name: Path, tmp_path: Path) -> None:
    task = peft_plus.tasks.seq_cls.SequenceClassification(label_names=["no", "yes", "maybe"])
    model = get_model(by_name, ["lora", "llrd"], task=task)
    model.save_pretrained(tmp_path / "out")
    again = from_pretrained(by_name, tmp_path / "out")
    assert type(again.get_base_model()) is transformers.BertForSequenceClassification
    assert again.config.id2label == {0: "no", 1: "yes", 2: "maybe"}
    assert torch.equal(logits(again), logits(model))
    assert from_pretrained(by_name, tmp_path / "out", is_trainable=True).peft_plus.task == task
    with pytest.raises(MethodError, match="num_labels=5"):
        from_pretrained(by_name, tmp_path / "out", num_labels=5)


def test_names_of_classes_that_were_learned_come_back(tmp_path: Path) -> None:
    model = get_model(tiny("bert"), "lora")
    record = saved(model, tmp_path)
    (tmp_path / RECORD).write_text(json.dumps(record | {"task": record["task"] | {"labels": ["a", "b", "c"]}}))
    base = tiny("bert")
    assert from_pretrained(base, tmp_path).config.id2label == {0: "a", 1: "b", 2: "c"}
    again = from_pretrained(tiny("bert"), tmp_path, is_trainable=True)
    assert again.peft_plus.task.label_names_in_use == ["a", "b", "c"]


def test_plain_peft_and_a_base_by_name(by_name: Path, tmp_path: Path) -> None:
    base = transformers.AutoModelForSequenceClassification.from_pretrained(by_name, num_labels=2)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path / "out")
    again = from_pretrained(by_name, tmp_path / "out", num_labels=2)
    assert torch.equal(logits(again), logits(model))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    (tmp_path / "out" / "adapter_config.json").write_text(json.dumps(config | {"task_type": None}))
    with pytest.raises(MethodError, match="task= is missing"):
        from_pretrained(by_name, tmp_path / "out")
    assert torch.equal(logits(from_pretrained(by_name, tmp_path / "out", task="SEQ_CLS", num_labels=2)), logits(model))


def test_no_weights_load_before_the_folder_fits(by_name: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    get_model(by_name, "lora", task="SEQ_CLS", num_labels=2).save_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    (tmp_path / "out" / "adapter_config.json").write_text(json.dumps(config | {"r": 9}))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("The base's weights were loaded.")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)
    with pytest.raises(
        MethodError, match=r"\(8, 32\), this model wants \(9, 32\)|\(32, 8\), this model wants \(32, 9\)"
    ):
        from_pretrained(by_name, tmp_path / "out")


def test_any_torch_module(tmp_path: Path) -> None:
    def perceptron() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

    model = get_peft_model(perceptron(), LoraConfig(target_modules=["0"], modules_to_save=["2"]))
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.1 if tensor.requires_grad else 0.0)
    model.save_pretrained(tmp_path)
    x = torch.ones(1, 4)
    assert torch.equal(from_pretrained(perceptron(), tmp_path)(x), model(x))


# --- What fails for real leaves the base as it was ---


@pytest.mark.parametrize(
    ("tuner", "is_trainable"),
    [("prompt_tuning", False), *((tuner, trains) for tuner in ("lora", "pissa", "layers") for trains in (False, True))],
)
def test_a_failure_in_the_real_load(
    tuner: str, is_trainable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {
        "pissa": {"init_lora_weights": "pissa"},
        "layers": {"layer_replication": [[0, 3], [1, 3]]},
    }
    get_model(tiny("bert"), {tuner if tuner == "prompt_tuning" else "lora": settings.get(tuner, {})}).save_pretrained(
        tmp_path
    )
    base = tiny("bert")
    base.get_input_embeddings().register_forward_hook(lambda *_: None)
    before, answer = state_of(base), logits(base)

    def full(*_: Any, **__: Any) -> None:
        raise MemoryError("no memory left")

    monkeypatch.setattr(PeftModel, "load_adapter", full)
    with pytest.raises(MemoryError):
        from_pretrained(base, tmp_path, is_trainable=is_trainable)
    assert state_of(base) == before
    assert torch.equal(logits(base), answer)
    monkeypatch.undo()
    assert torch.equal(logits(from_pretrained(base, tmp_path)), logits(from_pretrained(tiny("bert"), tmp_path)))


@pytest.mark.parametrize(("settings", "says"), [(7, "AttributeError: 'int'"), ({"buffer_size": 10**9}, "is absurd")])
def test_what_peft_builds_only_where_there_is_memory(settings: Any, says: str, tmp_path: Path) -> None:
    """The samplers of MonteCLoRA are left out on the copy without memory."""
    get_model(tiny("bert"), {"lora": {"r": 4}}).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"monteclora_config": settings}))
    base = tiny("bert")
    before = state_of(base)
    with bounded(seconds=10, megabytes=80), pytest.raises(MethodError, match=says):
        from_pretrained(base, tmp_path)
    assert state_of(base) == before


@pytest.mark.parametrize("make", [lambda: torch.ones(10**9), lambda: torch.ones(1000, 1).expand(1000, 3000).clone()])
def test_numbers_are_counted_where_there_is_memory(make: Callable[[], Tensor]) -> None:
    base = tiny("bert")
    refused = pytest.raises(MethodError, match="is absurd")
    with bounded(seconds=10, megabytes=80), refused, rehearsal.Bounded(base, dry=False):
        make(), make()


def test_a_plugin_that_fails_leaves_the_base(canary: Path, tmp_path: Path) -> None:
    source = canary.with_suffix(".py")
    source.write_text(source.read_text() + "    def plan_stages(self, stages):\n        raise RuntimeError('no')\n")
    folder = with_plugin(tmp_path / "out", "canary", "canary-plugin 1.2")
    base = tiny("bert")
    before = state_of(base)
    with pytest.raises(PluginError, match="'canary'"):
        from_pretrained(base, folder, is_trainable=True)
    assert state_of(base) == before


# --- From the hub ---


def test_only_four_files_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache as the hub's client lays it out: a snapshot of links to blobs."""
    model = built("bert", "lora", {})
    model.save_pretrained(tmp_path / "made")
    snapshot, blobs = (
        tmp_path / "models--org--adapter" / "snapshots" / "abc",
        tmp_path / "models--org--adapter" / "blobs",
    )
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    asked: list[Any] = []

    def download(repo: str, *, allow_patterns: list[str]) -> str:
        asked.append((repo, sorted(allow_patterns)))
        for name in allow_patterns:
            if (tmp_path / "made" / name).exists():
                shutil.copy(tmp_path / "made" / name, blobs / name)
                (snapshot / name).symlink_to(f"../../blobs/{name}")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert torch.equal(logits(from_pretrained(tiny("bert"), "org/adapter")), logits(model))
    files = ["adapter_config.json", "adapter_model.safetensors", "peft_plus.json", "thawed.safetensors"]
    assert asked == [("org/adapter", files)]


# --- Expressions ---


class Named(nn.Module):
    """A model whose modules have the names given."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def named_modules(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Module]]:  # type: ignore[override]
        yield from ((name, self) for name in ["", *self.names])


NAMES = ["a", "b", "a.b", "b.a", "ab.a", "a.b.a", "a-b.a", "aa.b"]
EXPRESSIONS = st.recursive(
    st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", "^", "$", "-", "a.b", "(?!a)", r"\b"]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"({two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "*?"])).map(lambda two: f"({two[0]}){two[1]}"),
    ),
    max_leaves=6,
)


def matched_here(groups: list[tuple[bool, list[tuple[str, str]]]], names: list[str]) -> list[list[list[str]]]:
    """As the process does, which takes too long to start for each of hundreds of examples."""
    found: list[list[list[str]]] = []
    for first_only, expressions in groups:
        matched = [[name for name in names if getattr(re, how)(e, name)] for how, e in expressions]
        if first_only:
            matched = [[n for n in m if not any(n in before for before in matched[:i])] for i, m in enumerate(matched)]
        found.append(matched)
    return found


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    target=EXPRESSIONS,
    excluded=EXPRESSIONS,
    ranked=st.lists(EXPRESSIONS, min_size=1, max_size=3),
    long=st.sampled_from([0, patterns._LONG_MAPPING]),
)
def test_a_tamed_expression_chooses_the_same_modules(target: str, excluded: str, ranked: list[str], long: int) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    def config() -> LoraConfig:
        ranks = {expression: rank % 2 + 1 for rank, expression in enumerate(ranked)}
        return LoraConfig(target_modules=target, exclude_modules=excluded, rank_pattern=ranks)

    def choice(config: Any) -> list[Any]:
        ranks = [config.rank_pattern.get(get_pattern_key(config.rank_pattern, n), config.r) for n in NAMES]
        return [[bool(check_target_module_exists(config, n)) for n in NAMES], ranks]

    plain, tame = config(), config()
    assume(any(re.fullmatch(target, n) for n in NAMES))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patterns, "_matches", matched_here)
        patch.setattr(patterns, "_LONG_MAPPING", long)  # 0: every mapping is
        patterns.tame(tame, Named(NAMES))
    assert choice(tame) == choice(plain)
    assert "*" not in f"{tame.target_modules}{tame.exclude_modules}{[*tame.rank_pattern]}"


def test_the_process_matches_as_peft_does() -> None:
    expressions = [
        ("fullmatch", "a.*"),
        ("match", "a"),
        ("search", r"\.b$"),
        ("fullmatch", r"(\w)\.?\1?"),
        ("match", "(?i)A"),
    ]
    groups = [(False, expressions), (True, expressions), (False, expressions[:1])]
    assert patterns._matches(groups, NAMES) == matched_here(groups, NAMES)


def test_a_rank_for_each_of_many_modules_is_quick(tmp_path: Path) -> None:
    """As EVA saves them. PEFT compiles every key for every module where there are more than `re` keeps: minutes."""
    base = tiny("bert", num_hidden_layers=150)
    names = [f"bert.encoder.layer.{i}.attention.self.{part}" for i in range(150) for part in ("query", "key", "value")]
    ranks = {name: 1 + i % 3 for i, name in enumerate(names)}
    config = LoraConfig(target_modules=["query", "key", "value"], rank_pattern=ranks, alpha_pattern=dict(ranks))
    start = time.monotonic()
    patterns.tame(config, base)
    assert len(config.rank_pattern) == 3
    model = get_peft_model(base, config)
    assert time.monotonic() - start < 10
    assert {name: len(model.base_model.model.get_submodule(name).lora_A["default"].weight) for name in names} == ranks


def test_names_that_do_exist_but_are_too_many() -> None:
    base = tiny("bert", num_hidden_layers=50)
    names = [name for name, _ in base.named_modules() if name][:501]
    patterns.tame(LoraConfig(target_modules=["query"], modules_to_save=names[:500]), base)
    ranks = {name: i for i, name in enumerate(names, 1)}
    some = dict(list(ranks.items())[:51])
    too_many: list[dict[str, Any]] = [
        {"modules_to_save": names},
        {"rank_pattern": ranks},
        {"modules_to_save": names[:450], "rank_pattern": some},
    ]
    for fields in too_many:
        with pytest.raises(MethodError, match="than PEFT can try on every module"):
            patterns.tame(LoraConfig(target_modules=["query"], **fields), base)


def test_a_field_of_every_module_that_there_is(tmp_path: Path) -> None:
    base = tiny("bert")
    names = [name for name, module in base.named_modules() if isinstance(module, nn.Linear) and "layer" in name]
    get_peft_model(tiny("bert"), LoraConfig(target_modules=names, task_type="SEQ_CLS")).save_pretrained(tmp_path)
    assert len(names) == 18
    assert len(from_pretrained(base, tmp_path).base_model.targeted_module_names) == 18


def test_a_program_without_an_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "")
    patterns.tame(LoraConfig(target_modules=["a"]), Named(NAMES))
    with pytest.raises(MethodError, match="no interpreter to start"):
        patterns.tame(LoraConfig(target_modules="a.*"), Named(NAMES))


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")  # PEFT's own
def test_expressions_reach_the_experts_of_older_models() -> None:
    """transformers 5 fused what PEFT's users wrote expressions for; PEFT looks for the old names."""
    config = transformers.MixtralConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    lora = {"target_modules": r".*experts\.(w1|w2|w3)|.*q_proj", "r": 4}
    plain = get_peft_model(transformers.MixtralForCausalLM(config), LoraConfig(**lora))
    base, tame = transformers.MixtralForCausalLM(config), LoraConfig(**lora)
    patterns.tame(tame, base)
    assert [n for n, _ in get_peft_model(base, tame).named_parameters()] == [n for n, _ in plain.named_parameters()]


def test_peft_matches_expressions_where_we_know_it() -> None:
    """A PEFT that runs another setting of a config as an expression must be looked at."""
    folder = Path(peft.__file__).parent
    calls: dict[str, int] = {}
    for path in sorted(folder.rglob("*.py")):
        found = re.findall(r"\bre\.(?:fullmatch|match|search|compile|findall|split|subn?)\(", path.read_text("utf-8"))
        if found:
            calls[str(path.relative_to(folder))] = len(found)
    assert calls == {
        "tuners/c3a/model.py": 1,
        "tuners/fourierft/model.py": 1,
        "tuners/ia3/model.py": 1,
        "tuners/lora/model.py": 4,
        "tuners/osf/model.py": 1,
        "tuners/tuners_utils.py": 6,
        "utils/other.py": 3,
        "utils/save_and_load.py": 3,
    }


def test_the_page_names_tests_that_exist() -> None:
    root = Path(__file__).parent
    named = set(re.findall(r"`(test_\w+)`", (root.parent / "docs" / "safety.md").read_text("utf-8")))
    defined = re.findall(
        r"^def (test_\w+)",
        "".join((root / f"test_{name}.py").read_text("utf-8") for name in ("reload", "adapter_folder", "get_model")),
        re.M,
    )
    assert len(named) > 10
    assert named <= set(defined)
    page = (root.parent / "docs" / "safety.md").read_text("utf-8")
    assert all(f"`{name}`" in page for name in NEED_VALUES)
