"""`get_model` and `attach`: everything a user may write, and what comes back."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, PeftModel, PeftModelForSequenceClassification, PeftType, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from peft_plus import MethodError, Plan, attach, from_pretrained, get_model, registry
from peft_plus.tasks.seq_cls import SequenceClassification
from peft_plus_freezing.gradual_unfreeze import GradualUnfreeze
from peft_plus_stability.llrd import LLRD
from peft_plus_stability.r3f import R3F
from tests.models import batch, tiny

CLASSES = {"task": "SEQ_CLS", "num_labels": 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved bases by name. `wide` is 64 wide, the block size of 4-bit kernels."""
    made = {
        "bert": tiny("bert", "FEATURE_EXTRACTION"),
        "bart": tiny("bart", "FEATURE_EXTRACTION"),
        "xlnet": tiny("xlnet", "FEATURE_EXTRACTION"),
        "llama": tiny("llama", "CAUSAL_LM"),
        "wide": tiny("bert", "FEATURE_EXTRACTION", hidden_size=64, num_hidden_layers=2),
    }
    paths = {}
    for name, model in made.items():
        paths[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(paths[name])
    return paths


def trainable(model: nn.Module) -> set[str]:
    return {name for name, tensor in model.named_parameters() if tensor.requires_grad}


def plugin_names(model: Any) -> list[str]:
    return [plugin.name for plugin in model.peft_plus.plugins]


# --- What may be written ---


def test_a_name_with_settings(folders: dict[str, Path]) -> None:
    model = get_model(str(folders["bert"]), method="lora", **CLASSES, r=4, lora_alpha=16)
    assert type(model) is PeftModelForSequenceClassification
    assert type(model.base_model) is peft.LoraModel
    assert type(model.get_base_model()) is transformers.BertForSequenceClassification
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.task_type) == (4, 16, "SEQ_CLS")
    assert model.config.num_labels == 3
    assert isinstance(model.peft_plus, Plan)
    assert (model.peft_plus.tuner, model.peft_plus.plugins) == ("lora", ())
    assert model.peft_plus.task.name == "SEQ_CLS"
    assert set(model.peft_plus.params) == trainable(model)


@pytest.mark.parametrize(
    "method",
    [
        ["lora", "gradual_unfreeze", "llrd"],
        ("gradual_unfreeze", "llrd", "lora"),
        {"lora": {"r": 8}, "gradual_unfreeze": None, "llrd": {}},
        [LoraConfig(r=8), GradualUnfreeze(), LLRD()],
        ["lora", GradualUnfreeze(), "llrd"],
    ],
    ids=["list", "tuple", "mapping", "objects", "mixed"],
)
def test_methods_of_several(folders: dict[str, Path], method: Any) -> None:
    model = get_model(folders["bert"], method=method, **CLASSES)
    assert type(model) is PeftModelForSequenceClassification
    assert model.peft_config["default"].r == 8
    assert plugin_names(model) == ["gradual_unfreeze", "llrd"]


def test_settings_in_a_mapping(folders: dict[str, Path]) -> None:
    model = get_model(folders["bert"], {"ia3": {}, "llrd": {"decay": 0.5}, "r3f": {"weight": 2, "eps": 0.1}}, **CLASSES)
    assert model.peft_plus.tuner == "ia3"
    assert [p.settings() for p in model.peft_plus.plugins] == [
        {"decay": 0.5},
        {"weight": 2, "eps": 0.1, "noise": "uniform", "at": "embeddings"},
    ]


def test_a_single_object_is_a_method(folders: dict[str, Path]) -> None:
    assert get_model(folders["bert"], IA3Config(), **CLASSES).peft_plus.tuner == "ia3"
    model = get_model(folders["bert"], R3F(eps=0.1), **CLASSES)
    assert (model.peft_plus.tuner, plugin_names(model)) == ("full", ["r3f"])


def test_loose_settings_of_a_plugin(folders: dict[str, Path]) -> None:
    model = get_model(folders["bert"], "llrd", **CLASSES, decay=0.5)
    assert model.peft_plus.plugins == (LLRD(decay=0.5),)


@pytest.mark.parametrize("method", ["full", ["full", "llrd"], "llrd"])
def test_full_is_the_transformers_model(folders: dict[str, Path], method: Any) -> None:
    model = get_model(folders["bert"], method, **CLASSES)
    assert type(model) is transformers.BertForSequenceClassification
    assert trainable(model) == {name for name, _ in model.named_parameters()}
    assert model.peft_plus.tuner == "full"


def test_linear_probe_trains_the_head_alone(folders: dict[str, Path]) -> None:
    model = get_model(folders["bert"], "linear_probe", **CLASSES)
    assert type(model) is PeftModelForSequenceClassification
    prefix = "base_model.model.classifier.modules_to_save.default."
    assert trainable(model) == {prefix + "weight", prefix + "bias"}
    assert {p.part for p in model.peft_plus.params.values()} == {"head"}


def test_variants(folders: dict[str, Path]) -> None:
    assert get_model(folders["bert"], "dora", **CLASSES).peft_config["default"].use_dora
    config = get_model(folders["bert"], {"rslora": {"r": 4}}, **CLASSES).peft_config["default"]
    assert (config.use_rslora, config.r) == (True, 4)


def test_a_loaded_model_is_used_as_it_is() -> None:
    base = tiny("bert").to(torch.float64)
    model = get_model(base, "lora")
    assert model.get_base_model() is base
    assert model.peft_plus.task == SequenceClassification(num_labels=3)
    assert {t.dtype for n, t in model.named_parameters() if "lora_" not in n} == {torch.float64}
    assert type(get_model(tiny("bert"), "lora", task="SEQ_CLS")) is PeftModelForSequenceClassification
    assert get_model(tiny("bert"), "lora", num_labels=3).config.num_labels == 3


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("SEQ_CLS", "bert"),
        ("TOKEN_CLS", "bert"),
        ("QUESTION_ANS", "bert"),
        ("MASKED_LM", "bert"),
        ("MULTIPLE_CHOICE", "bert"),
        ("FEATURE_EXTRACTION", "bert"),
        ("CAUSAL_LM", "llama"),
        ("SEQ_2_SEQ_LM", "t5"),
    ],
)
def test_a_loaded_model_tells_its_task(task: str, name: str) -> None:
    model = get_model(tiny(name, task), "lora", target_modules="all-linear")
    assert model.peft_plus.task.name == task
    known = task in {t.value for t in peft.TaskType}
    assert model.peft_config["default"].task_type == (task if known else None)
    assert type(model) is (peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task] if known else PeftModel)


def test_task_objects(folders: dict[str, Path]) -> None:
    task = SequenceClassification(label_names=["bad", "good"], problem="multi_label")
    model = get_model(folders["bert"], "lora", task=task)
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert model.config.problem_type == "multi_label_classification"
    assert model.peft_plus.task == task
    assert model.peft_plus.task is not task
    assert get_model(folders["bert"], "lora", task=task, num_labels=2).config.num_labels == 2
    assert get_model(folders["bert"], "lora", task=peft.TaskType.SEQ_CLS, num_labels=2).config.num_labels == 2


@pytest.mark.parametrize("task", ["MASKED_LM", "MULTIPLE_CHOICE"])
def test_tasks_that_peft_has_no_type_for(folders: dict[str, Path], task: str) -> None:
    model = get_model(folders["bert"], "lora", task=task)
    assert type(model) is PeftModel
    assert model.peft_config["default"].task_type is None
    assert any("classifier" in name for name in trainable(model)) == (task == "MULTIPLE_CHOICE")
    model(**batch("bert", task)).loss.backward()


def test_loading_options(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Any, Any]] = []
    load = PreTrainedModel.from_pretrained.__func__

    def spy(cls: Any, *args: Any, **kwargs: Any) -> Any:
        given.append((kwargs.get("device_map"), kwargs.get("dtype")))
        return load(cls, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(spy))
    model = get_model(
        folders["bert"],
        "lora",
        **CLASSES,
        device_map="cpu",
        dtype="bfloat16",
        model_kwargs={"attn_implementation": "eager"},
    )
    base = model.get_base_model()
    assert base.dtype == torch.bfloat16
    assert base.config._attn_implementation == "eager"
    assert base.device == torch.device("cpu")
    assert given == [("cpu", "bfloat16")]
    assert get_model(folders["bert"], "full", **CLASSES, dtype=torch.float64).dtype == torch.float64


def test_a_typo_in_model_kwargs_is_not_passed_over(folders: dict[str, Path]) -> None:
    with pytest.raises((TypeError, MethodError), match="atn_implementation"):
        get_model(folders["bert"], "lora", **CLASSES, model_kwargs={"atn_implementation": "eager"})


def test_what_the_user_gave_stays_as_it_was(folders: dict[str, Path]) -> None:
    config, plugin, task = LoraConfig(), GradualUnfreeze(every=2), SequenceClassification(num_labels=3)
    quantization, kwargs = BitsAndBytesConfig(load_in_8bit=True), {"attn_implementation": "eager"}
    settings = {"lora": {"r": 4}, "llrd": {"decay": 0.5}}
    before = copy.deepcopy((config, plugin, task, quantization.to_dict(), kwargs, settings))
    model = get_model(
        folders["wide"], [config, plugin], task=task, quantization=quantization, dtype="float32", model_kwargs=kwargs
    )
    get_model(folders["bert"], settings, task=task)
    assert (config, plugin, task, quantization.to_dict(), kwargs, settings) == before
    assert config.modules_to_save is None
    assert model.peft_config["default"] is not config
    assert model.peft_plus.plugins[0] is not plugin
    second = get_model(folders["bert"], [config, plugin], task=task)
    assert second.peft_plus.plugins[0] is not model.peft_plus.plugins[0]


# --- Quantisation ---


@pytest.mark.parametrize(
    ("quantization", "scheme", "kind"),
    [
        ("nf4", "nf4", "Params4bit"),
        ("int8", "int8", "Int8Params"),
        (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), "nf4", "Params4bit"),
        (BitsAndBytesConfig(load_in_4bit=True), "fp4", "Params4bit"),
        (BitsAndBytesConfig(load_in_8bit=True), "int8", "Int8Params"),
        (BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["key"]), "int8", "Int8Params"),
    ],
    ids=["nf4", "int8", "nf4-config", "fp4-config", "int8-config", "int8-config-skip"],
)
@pytest.mark.parametrize("method", ["lora", "linear_probe"])
def test_quantisation(folders: dict[str, Path], quantization: Any, scheme: str, kind: str, method: str) -> None:
    model = get_model(folders["wide"], method, **CLASSES, quantization=quantization)
    assert model.peft_plus.quantization == scheme
    base = model.get_base_model()
    assert type(base.bert.encoder.layer[0].output.dense.weight).__name__ == kind
    skipped = "key" in (model.config.quantization_config.llm_int8_skip_modules or [])
    assert (type(base.bert.encoder.layer[0].attention.self.key) is nn.Linear) == skipped
    assert type(base.classifier.modules_to_save["default"]) is nn.Linear
    packed = {n for n, t in model.named_parameters() if type(t).__name__ == kind}
    assert {t.dtype for n, t in model.named_parameters() if n not in packed} == {torch.float32}
    assert packed.isdisjoint(trainable(model))
    model.train()(**batch("bert")).loss.backward()
    assert base.classifier.modules_to_save["default"].weight.grad.abs().sum() > 0


def test_a_base_that_is_stored_quantised(folders: dict[str, Path], tmp_path: Path) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["classifier"])
    wide = transformers.AutoModelForSequenceClassification.from_pretrained(
        folders["wide"], num_labels=3, quantization_config=config, dtype="float16"
    )
    wide.save_pretrained(tmp_path)
    model = get_model(tmp_path, "lora", **CLASSES)
    assert model.peft_plus.quantization == "nf4"
    plain = {t.dtype for t in model.parameters() if type(t).__name__ != "Params4bit"}
    assert plain == {torch.float32}  # prepared for k-bit training as well
    assert get_model(wide, "lora").peft_plus.quantization == "nf4"


def test_a_body_that_is_stored_quantised_gets_a_head_that_trains(folders: dict[str, Path], tmp_path: Path) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    transformers.AutoModel.from_pretrained(folders["wide"], quantization_config=config).save_pretrained(tmp_path)
    model = get_model(tmp_path, "lora", **CLASSES)
    assert type(model.get_base_model().bert.encoder.layer[0].output.dense.weight).__name__ == "Params4bit"
    head = model.get_base_model().classifier.modules_to_save["default"]
    assert type(head) is nn.Linear
    model.train()(**batch("bert")).loss.backward()
    assert head.weight.grad.abs().sum() > 0


# --- Every tuner of the installed PEFT ---

LLAMA = {"task": "CAUSAL_LM"}
MINIMAL: dict[str, tuple[str, dict[str, Any]]] = {
    "adalora": ("bert", {"total_step": 10}),
    "adaption_prompt": ("llama", {"adapter_len": 4, "adapter_layers": 2}),
    "c3a": ("bert", {"block_size": 8}),
    "cpt": ("llama", {"cpt_token_ids": [4, 5, 6], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]}),
    "ln_tuning": ("bert", {"target_modules": ["LayerNorm"]}),
    "miss": ("bert", {"r": 4}),
    "multitask_prompt_tuning": ("bert", {"num_tasks": 2}),
    "poly": ("bert", {"n_tasks": 2}),
    "road": ("bert", {"group_size": 16}),
    "shadow": ("llama", {}),
    "shira": ("bert", {"r": 4}),
    "trainable_tokens": ("llama", {"token_indices": [7, 8]}),
    "vblora": ("bert", {"vector_length": 16}),
    "waveft": ("bert", {"n_frequency": 64}),
}
"""Tuners whose defaults do not fit a tiny BERT (32 wide) → a base and the settings they need."""


def test_tuners_are_those_of_the_installed_peft() -> None:
    assert set(registry.peft_tuners()) == {t.value.lower() for t in PeftType}
    assert set(MINIMAL) <= set(registry.peft_tuners())
    assert set(registry.entries("tuner")) >= {*registry.peft_tuners(), "full", "linear_probe", "dora", "rslora"}


def test_a_newer_peft_has_more_tuners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "utils").mkdir()
    source = 'import enum\nclass PeftType(str, enum.Enum):\n    """Docs."""\n    LORA = "LORA"\n    ZEBRA = "ZEBRA"\n'
    (tmp_path / "utils" / "peft_types.py").write_text(source)
    monkeypatch.setattr(registry, "_package_folder", lambda package: tmp_path)
    registry.peft_tuners.cache_clear()
    try:
        assert registry.peft_tuners() == ("lora", "zebra")
        assert registry.entries("tuner")["zebra"].origin == f"peft {peft.__version__}"
    finally:
        registry.peft_tuners.cache_clear()


@pytest.mark.filterwarnings(
    "ignore:Failed to load the CUDA extension:UserWarning"
)  # boft, on every machine without CUDA
@pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1:UserWarning")
@pytest.mark.filterwarnings("ignore:Unsupported layer type.*LayerNorm:UserWarning")  # ln_tuning
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")  # frod
@pytest.mark.parametrize("name", [t for t in registry.peft_tuners() if t != "xlora"])
def test_every_tuner_by_its_name(folders: dict[str, Path], name: str) -> None:
    base, settings = MINIMAL.get(name, ("bert", {}))
    task = CLASSES if base == "bert" else LLAMA
    model = get_model(folders[base], name, **task, **settings)
    assert model.peft_plus.tuner == name
    assert type(model) is peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task["task"]]
    inputs = batch(base, task["task"])
    if name in ("multitask_prompt_tuning", "poly"):
        inputs["task_ids"] = torch.zeros(len(inputs["input_ids"]), dtype=torch.long)
    if name == "cpt":  # it wants to know which tokens are input, output and template
        inputs["input_type_mask"] = torch.full_like(inputs["input_ids"], 4)
    model.train()(**inputs).loss.backward()
    reached = {model.peft_plus.params[n].part for n, t in model.named_parameters() if t.grad is not None}
    assert reached == ({"adapter", "head"} if base == "bert" else {"adapter"})
    assert {p.part for p in model.peft_plus.params.values()} == reached


def test_xlora_mixes_adapters(folders: dict[str, Path], tmp_path: Path) -> None:
    get_model(folders["llama"], "lora", **LLAMA).save_pretrained(tmp_path)
    base = tiny("llama", "CAUSAL_LM", use_cache=False)
    model = get_model(base, "xlora", hidden_size=32, adapters={"one": str(tmp_path)})
    assert model.peft_plus.tuner == "xlora"
    assert all("xlora" in name for name in trainable(model))


# --- Heads found by looking ---


@pytest.mark.parametrize(
    ("name", "head", "targets"),
    [("bart", "classification_head", ["q_proj"]), ("xlnet", "logits_proj", ["layer_1"]), ("bert", "classifier", None)],
)
def test_new_heads_train(folders: dict[str, Path], name: str, head: str, targets: Any) -> None:
    model = get_model(folders[name], "lora", **CLASSES, target_modules=targets)
    heads = {n for n in trainable(model) if f".{head}.modules_to_save.default." in n}
    assert heads
    assert {model.peft_plus.params[n].part for n in heads} == {"head"}
    inputs = batch(name)
    model.train()(**inputs).loss.backward()
    assert all(model.get_parameter(n).grad is not None for n in heads)


def test_modules_to_save_of_the_user_are_kept(folders: dict[str, Path]) -> None:
    model = get_model(folders["bert"], "lora", **CLASSES, modules_to_save=["pooler"])
    names = {n.split(".modules_to_save")[0] for n in trainable(model) if "modules_to_save" in n}
    assert names == {"base_model.model.bert.pooler", "base_model.model.classifier"}


def test_any_torch_module() -> None:
    class Perceptron(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.outer(self.inner(x))

    model = get_model(Perceptron(), LoraConfig(target_modules=["inner"], modules_to_save=["outer"]))
    assert type(model) is PeftModel
    assert set(model.peft_plus.params) == trainable(model)
    assert get_model(Perceptron(), "full").peft_plus.task.name == ""


# --- attach ---


def test_attach_to_what_plain_peft_made() -> None:
    model = get_peft_model(tiny("bert"), LoraConfig(task_type="SEQ_CLS"))
    assert attach(model, ["gradual_unfreeze", "llrd"]) is model
    assert type(model) is PeftModelForSequenceClassification
    assert (model.peft_plus.tuner, plugin_names(model)) == ("lora", ["gradual_unfreeze", "llrd"])
    assert model.peft_plus.task.name == "SEQ_CLS"
    attach(model, {"r3f": {"eps": 0.1}})
    assert plugin_names(model) == ["r3f"]
    attach(model, [])
    assert model.peft_plus.plugins == ()
    assert get_model(model, R3F()) is model
    assert plugin_names(model) == ["r3f"]


def test_attach_again_after_a_change() -> None:
    model = attach(get_peft_model(tiny("bert"), LoraConfig(task_type="SEQ_CLS")), "r3f")
    thawed = "base_model.model.bert.pooler.dense.weight"
    assert thawed not in model.peft_plus.params
    model.get_parameter(thawed).requires_grad_(True)
    assert attach(model, "r3f").peft_plus.params[thawed].part == "base"
    model.add_adapter("second", LoraConfig(task_type="SEQ_CLS", target_modules=["key"]))
    model.set_adapter("second")
    params = attach(model, "llrd").peft_plus.params
    assert thawed in params
    assert all(".second." in name for name, param in params.items() if param.part != "base")


def test_attach_to_a_transformers_model() -> None:
    model = attach(tiny("bert"), "llrd")
    assert type(model) is transformers.BertForSequenceClassification
    assert model.peft_plus.tuner == "full"


def test_attach_knows_a_probe(folders: dict[str, Path], tmp_path: Path) -> None:
    get_model(folders["bert"], "linear_probe", **CLASSES).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("bert"), tmp_path, is_trainable=True)
    assert attach(again, "r3f").peft_plus.tuner == "linear_probe"
    with pytest.raises(MethodError, match="it trains only the head"):
        attach(again, "llrd")


def test_attach_with_a_task() -> None:
    task = SequenceClassification(num_labels=3, problem="multi_label")
    model = get_peft_model(tiny("bert"), LoraConfig(task_type="SEQ_CLS"))
    assert attach(model, "r3f", task=task).peft_plus.task.distribution == "bernoulli"
    assert attach(model, "r3f", task="SEQ_CLS").peft_plus.task.num_labels == 3


NAMED = {"id2label": {0: "pos", 1: "neg", 2: "none"}, "label2id": {"pos": 0, "neg": 1, "none": 2}}


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("named", ["SEQ_CLS", None, "object"])
def test_a_trained_head_tells_the_order_of_its_classes(loaded: bool, named: str | None, tmp_path: Path) -> None:
    base = tiny("bert", **NAMED)
    base.save_pretrained(tmp_path)
    task = SequenceClassification(num_labels=3) if named == "object" else named
    if not loaded and task is None:
        task = "SEQ_CLS"
    labels = {"num_labels": 3} if task == "SEQ_CLS" else {}
    model = get_model(base if loaded else tmp_path, "lora", task=task, **labels)
    assert model.peft_plus.task.label_names_in_use == (None if loaded and named == "object" else ["pos", "neg", "none"])


def test_a_trained_head_tells_its_problem(tmp_path: Path) -> None:
    tiny("bert", problem_type="multi_label_classification").save_pretrained(tmp_path)
    model = get_model(tmp_path, "lora", task="SEQ_CLS", num_labels=3)
    assert model.peft_plus.task.distribution == "bernoulli"
    loaded = tiny("bert", problem_type="multi_label_classification")
    assert get_model(loaded, "lora", task="SEQ_CLS").peft_plus.task.problem == "multi_label"


def test_a_head_of_another_size_is_refused_before_loading_or_made_anew(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path)
    with pytest.raises(MethodError, match=r"head has 3 labels, but num_labels=5.*ignore_mismatched_sizes"):
        get_model(tmp_path, "lora", task="SEQ_CLS", num_labels=5)
    model = get_model(tmp_path, "lora", task="SEQ_CLS", num_labels=5, model_kwargs={"ignore_mismatched_sizes": True})
    assert model.config.num_labels == 5


# --- What a base must not bring along ---


@pytest.fixture
def beside(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A base with an adapter in its folder, which plain transformers loads into it without a word."""
    shutil.copytree(folders["bert"], base := tmp_path / "base")
    get_peft_model(tiny("bert"), LoraConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path / "adapter")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "adapter" / file, base / file)
    return base


def test_an_adapter_beside_the_base_is_refused(beside: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(beside, num_labels=3)
    assert any("lora_A" in name for name, _ in plain.named_parameters())
    get_model(folders["bert"], "lora", **CLASSES).save_pretrained(tmp_path / "own")
    for load in (
        lambda: get_model(beside, "lora", **CLASSES),
        lambda: get_model(beside, "full", **CLASSES),
        lambda: from_pretrained(beside, tmp_path / "own"),
    ):
        with pytest.raises(MethodError, match=r"holds adapter_config\.json beside the base.*delete the file"):
            load()


@pytest.mark.parametrize("place", ["", "inner"])
def test_an_adapter_beside_a_base_in_a_subfolder(beside: Path, tmp_path: Path, place: str) -> None:
    shutil.copytree(beside, beside / "inner")
    (beside / ("inner" if place == "" else "") / "adapter_config.json").unlink()
    with pytest.raises(MethodError, match=r"adapter_config\.json beside the base"):
        get_model(beside, "lora", **CLASSES, model_kwargs={"subfolder": "inner"})


def test_an_adapter_beside_a_base_on_the_hub(beside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache as the hub's client lays it out."""
    cached = tmp_path / "cache" / "models--org--base"
    shutil.copytree(beside, cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    options: dict[str, Any] = {"model_kwargs": {"cache_dir": str(tmp_path / "cache"), "local_files_only": True}}
    with pytest.raises(MethodError, match=r"'org/base' holds adapter_config\.json beside the base"):
        get_model("org/base", "lora", **CLASSES, **options)
    (cached / "snapshots" / "abc" / "adapter_config.json").unlink()
    assert get_model("org/base", "lora", **CLASSES, **options).peft_plus.tuner == "lora"


def test_an_adapter_that_transformers_loads_all_the_same(beside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it came to the hub between the look and the load."""
    monkeypatch.setattr("peft_plus.loading._check_no_adapter", lambda *_: None)
    with pytest.raises(MethodError, match="holds an adapter beside the base model"):
        get_model(beside, "lora", **CLASSES)


def test_what_full_saved_is_a_base(folders: dict[str, Path], tmp_path: Path) -> None:
    get_model(folders["bert"], "full", **CLASSES).save_pretrained(tmp_path)
    assert get_model(tmp_path, "lora", **CLASSES).peft_plus.tuner == "lora"
