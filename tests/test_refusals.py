"""Every bad name, setting and combination is a clear error before any weights load: what, where, and the fix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import BitsAndBytesConfig, PreTrainedModel

from peft_plus import MethodError, Plugin, PluginError, Task, attach, get_model, registry
from peft_plus.tasks.seq_cls import SequenceClassification
from peft_plus_freezing.gradual_unfreeze import GradualUnfreeze
from peft_plus_stability.llrd import LLRD
from peft_plus_stability.r3f import R3F
from tests.models import tiny

INF, NAN = float("inf"), float("nan")


@dataclass(kw_only=True)
class Labelled(Plugin):
    """A plugin whose setting is no plain value."""

    name: ClassVar[str] = "labelled"
    names: Any = ()


@dataclass(kw_only=True)
class Early(Plugin):
    """Clashes with `r3f`."""

    name: ClassVar[str] = "early"
    conflicts: ClassVar[tuple[str, ...]] = ("r3f",)


@dataclass(kw_only=True)
class Greedy(Plugin):
    """Needs something unheard of."""

    name: ClassVar[str] = "greedy"
    needs: ClassVar[tuple[str, ...]] = ("gold",)


@dataclass(kw_only=True)
class Old(Plugin):
    """Written for another contract."""

    name: ClassVar[str] = "old"
    api: ClassVar[int] = 0


@dataclass(kw_only=True)
class Nameless(Plugin):
    """Has no name."""


class Bare(Plugin):
    """Forgot @dataclass, so its setting would be ignored."""

    name: ClassVar[str] = "bare"
    size: int = 3


METHODS: dict[str, tuple[Any, tuple[str, ...]]] = {
    # names
    "unknown tuner": ("lorra", ("No installed tuner or plugin is called 'lorra'", "Did you mean 'lora'?")),
    "unknown plugin": (["lora", "gradual_unfreez"], ("'gradual_unfreez'", "Did you mean 'gradual_unfreeze'?")),
    "nothing like it": ("qqqq", ("'qqqq'", "`peft-plus list`")),
    "another case": ("LORA", ("'LORA'", "Did you mean 'lora'?")),
    "empty name": ("", ("called ''", "`peft-plus list`")),
    "two tuners": (["lora", "ia3"], ("at most one tuner", "'lora' and 'ia3'", "Keep one")),
    "a tuner and full": (["lora", "full"], ("'lora' and 'full'", "Keep one")),
    "a tuner twice": (["lora", LoraConfig()], ("'lora' and 'lora'",)),
    "a plugin twice": (["lora", "r3f", R3F()], ("'r3f' is named twice", "give it once")),
    "a plugin's class": (["lora", R3F], ("R3F is a class", "R3F()")),
    "a config's class": (LoraConfig, ("LoraConfig", "give a name, a PEFT config, a plugin object")),
    # shapes
    "no method": (None, ("None", "give a name, a PEFT config, a plugin object")),
    "a number": (8, ("8 (int)", "give a name")),
    "a set": ({"lora"}, ("(set)", "list or mapping")),
    "a list in a list": (["lora", ["r3f"]], ("['r3f'] (list)",)),
    "a mapping in a list": ([{"lora": {"r": 8}}], ("(dict)", "list or mapping of them")),
    "an empty list": ([], ("empty", "method='lora'")),
    "an empty mapping": ({}, ("empty", "method='lora'")),
    "settings that are no mapping": ({"lora": 8}, ("settings of 'lora' are 8", "{'lora': {…}}")),
    "a key that is no name": ({8: {}}, ("8", "names")),
    # settings of a tuner
    "unknown setting of a tuner": ({"lora": {"rr": 8}}, ("tuner 'lora' (peft ", "'rr'", "Did you mean 'r'?")),
    "r is text": ({"lora": {"r": "8"}}, ("tuner 'lora'", "r='8' is str", "expected int")),
    "r is no whole number": ({"lora": {"r": 8.5}}, ("r=8.5 is float", "expected int")),
    "r is a flag": ({"lora": {"r": True}}, ("r=True is bool", "expected int")),
    "r is zero": ({"lora": {"r": 0}}, ("tuner 'lora'", "positive", "0")),
    "r of an object is zero": (LoraConfig(r=0), ("tuner 'lora'", "positive", "0")),
    "bias is one of a few words": ({"lora": {"bias": "some"}}, ("bias='some'", "'none' or 'all' or 'lora_only'")),
    "targets that are not there": (
        {"lora": {"target_modules": ["attn_q"]}},
        ("tuner 'lora'", "BertForSequenceClassification", "attn_q", "target_modules"),
    ),
    "modules_to_save that are not there": (
        {"lora": {"modules_to_save": ["poller"]}},
        ("modules_to_save names 'poller'", "BertForSequenceClassification", "Did you mean 'pooler'?"),
    ),
    "a setting that the variant fixes": ({"dora": {"use_dora": False}}, ("'dora' means 'lora'", "use_dora=False")),
    "settings for full": ({"full": {"r": 8}}, ("'full' has no settings", "r")),
    "settings for a probe": ({"linear_probe": {"lr": 1.0}}, ("'linear_probe' has no settings", "lr")),
    "no virtual tokens": ({"prompt_tuning": {"num_virtual_tokens": 0}}, ("num_virtual_tokens=0", "≥ 1")),
    "virtual tokens forgotten": (PromptTuningConfig(), ("num_virtual_tokens=None", "≥ 1")),
    "a required setting is missing": ("adalora", ("tuner 'adalora'", "total_step", "> 0")),
    "settings that contradict": (
        {"ia3": {"target_modules": ["key"], "feedforward_modules": ["x"]}},
        ("tuner 'ia3'", "`feedforward_modules` should be a subset of `target_modules`"),
    ),
    # settings of a plugin
    "unknown setting of a plugin": (
        {"lora": {}, "llrd": {"decai": 0.9}},
        ("plugin 'llrd' (peft-plus-stability ", "'decai'", "Did you mean 'decay'?"),
    ),
    "decay is text": ({"lora": {}, "llrd": {"decay": "0.9"}}, ("decay='0.9' is str", "expected float")),
    "decay out of range": ({"lora": {}, "llrd": {"decay": 1.5}}, ("plugin 'llrd'", "decay=1.5", "(0, 1]")),
    "decay is not a number": ({"lora": {}, "llrd": {"decay": NAN}}, ("decay=nan", "(0, 1]")),
    "every is misspelt": (
        {"lora": {}, "gradual_unfreeze": {"every": "epok"}},
        ("plugin 'gradual_unfreeze' (peft-plus-freezing ", "every='epok'", "'epoch' or 'stall' or int"),
    ),
    "every is zero": ({"lora": {}, "gradual_unfreeze": {"every": 0}}, ("every=0", "≥ 1")),
    "eps is infinite": ({"lora": {}, "r3f": {"eps": INF}}, ("plugin 'r3f'", "eps=inf", "> 0")),
    "weight is not a number": ({"lora": {}, "r3f": {"weight": NAN}}, ("weight=nan", "≥ 0")),
    "noise is unknown": ({"lora": {}, "r3f": {"noise": "gauss"}}, ("noise='gauss'", "'uniform' or 'normal'")),
    "probe_lr is zero": ({"lora": {}, "lp_ft": {"probe_lr": 0.0}}, ("plugin 'lp_ft'", "probe_lr=0.0", "> 0")),
    "a setting that cannot be saved": (["lora", Labelled(names={1, 2})], ("'labelled'", "plain values", "set")),
    # plugins that break the contract
    "plugins in conflict": (["lora", "r3f", Early()], ("'early'", "'r3f'", "cannot run together", "Drop one")),
    "an unknown need": (["lora", Greedy()], ("'greedy'", "'gold'")),
    "another contract": (["lora", Old()], ("'old'", "version 0", "Update whichever is older")),
    "a plugin without a name": (["lora", Nameless()], ("Nameless", "no `name`", "class variable")),
    "a plugin that is no dataclass": (["lora", Bare()], ("Bare", "@dataclass(kw_only=True)")),
    # combinations
    "a prompt has no layers": (
        ["prompt_tuning", "gradual_unfreeze"],
        ("'gradual_unfreeze' (peft-plus-freezing ", "'prompt_tuning' has none", "Drop the plugin"),
    ),
    "a probe has no layers": (["linear_probe", "llrd"], ("'llrd'", "only the head", "e.g. 'lora'")),
    "a probe has no body": (["linear_probe", "lp_ft"], ("'lp_ft'", "the head alone", "Drop the plugin")),
    "one layer has no order": (
        [LoraConfig(layers_to_transform=[1], modules_to_save=None), GradualUnfreeze(), LLRD()],
        (),  # the new head is a second depth: fine, see test_what_is_fine
    ),
    "the config's task": (
        LoraConfig(task_type="CAUSAL_LM"),
        ("'lora' config says task_type='CAUSAL_LM'", "'SEQ_CLS'", "Make them agree"),
    ),
    "a tuner that cannot train a head": ("trainable_tokens", ("'trainable_tokens'", "new head", "modules_to_save")),
}
FINE = {name for name, (_, says) in METHODS.items() if not says}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    made = {
        "bert": tiny("bert", "FEATURE_EXTRACTION"),
        "albert": tiny("albert", "FEATURE_EXTRACTION"),
        "resnet": tiny("resnet", "FEATURE_EXTRACTION"),
        "llama": tiny("llama", "CAUSAL_LM"),
        "tied": tiny("llama", "CAUSAL_LM", tie_word_embeddings=True),
    }
    for name, model in made.items():
        model.save_pretrained(root / name)
    get_peft_model(tiny("bert"), LoraConfig(task_type="SEQ_CLS")).save_pretrained(root / "adapter")
    (root / "empty").mkdir()
    stored = transformers.BertConfig.from_pretrained(root / "bert")
    stored.quantization_config = BitsAndBytesConfig(load_in_8bit=True).to_dict()
    stored.save_pretrained(root / "stored_int8")
    return {path.name: path for path in root.iterdir()} | {"missing": root / "missing"}


@pytest.fixture
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("The base's weights were loaded.")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)


def refused(call: Callable[[], Any], *says: str, error: type[Exception] = MethodError) -> str:
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    for words in says:
        assert words in message
    return message


@pytest.mark.usefixtures("_no_weights")
@pytest.mark.parametrize("case", sorted(set(METHODS) - FINE))
def test_methods(folders: dict[str, Path], case: str) -> None:
    method, says = METHODS[case]
    broken = isinstance(method, list) and any(isinstance(p, Greedy | Old | Nameless | Bare) for p in method)
    error = PluginError if broken else MethodError
    refused(lambda: get_model(folders["bert"], method, task="SEQ_CLS", num_labels=2), *says, error=error)


CALLS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    # loose settings
    "settings with a list": ("bert", {"method": ["lora", "r3f"], "r": 8}, ("r go", "{'lora': {…}, 'r3f': {…}}")),
    "settings with a mapping": ("bert", {"method": {"lora": {}}, "r": 8}, ("mapping", "method={'lora': {…}}")),
    "settings with an object": ("bert", {"method": LoraConfig(), "r": 8}, ("LoraConfig", "into the objects")),
    "an argument that does not exist": ("bert", {"quantisation": "nf4"}, ("'quantisation'", "tuner 'lora'")),
    # quantisation
    "unknown scheme": ("bert", {"quantization": "nf5"}, ("quantization='nf5'", "Did you mean 'nf4'?", "'int8'")),
    "a number of bits": ("bert", {"quantization": 4}, ("quantization=4", "'nf4', 'int8' or a BitsAndBytesConfig")),
    "another library's config": ("bert", {"quantization": transformers.GPTQConfig(bits=4)}, ("BitsAndBytesConfig",)),
    "full on quantised weights": ("bert", {"method": "full", "quantization": "nf4"}, ("'full'", "'lora'")),
    "plugins alone on quantised weights": (
        "bert",
        {"method": "r3f", "quantization": "int8"},
        ("'full'", "no gradient"),
    ),
    "quantised twice": ("stored_int8", {"quantization": "nf4"}, ("stored as int8 already", "drop quantization")),
    "full on stored quantised weights": ("stored_int8", {"method": "full"}, ("'full'", "no gradient", "'lora'")),
    "GGUF and quantised": (
        "bert",
        {"quantization": "nf4", "model_kwargs": {"gguf_file": "x.gguf"}},
        ("GGUF", "save_pretrained"),
    ),
    # other options
    "no dtype": ("bert", {"dtype": "floaty"}, ("dtype='floaty'", "'bfloat16'")),
    "an integer dtype": ("bert", {"dtype": torch.int8}, ("torch.int8", "floating-point")),
    "dtype twice": ("bert", {"dtype": "float32", "model_kwargs": {"dtype": "float32"}}, ("dtype is given twice",)),
    "hidden quantisation": (
        "bert",
        {"model_kwargs": {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}},
        ("'quantization_config'", "quantization="),
    ),
    "hidden labels": ("bert", {"model_kwargs": {"num_labels": 3}}, ("model_kwargs holds 'num_labels'", "num_labels=")),
    "model_kwargs is no mapping": ("bert", {"model_kwargs": ["dtype"]}, ("model_kwargs=['dtype']", "mapping")),
    # tasks
    "no task": ("bert", {"task": None}, ("task= is missing", "SEQ_CLS")),
    "unknown task": ("bert", {"task": "SEQ_CSL"}, ("No installed task is called 'SEQ_CSL'", "Did you mean 'SEQ_CLS'?")),
    "task in lower case": ("bert", {"task": "seq_cls"}, ("'seq_cls'", "Did you mean 'SEQ_CLS'?")),
    "task is a number": ("bert", {"task": 3}, ("task=3 is a int", "'SEQ_CLS'")),
    "task is a class": ("bert", {"task": SequenceClassification}, ("task=", "Task object")),
    "no num_labels": ("bert", {"num_labels": None}, ("task 'SEQ_CLS'", "`num_labels`")),
    "no labels at all": ("bert", {"num_labels": 0}, ("`num_labels`", "≥ 1", "0")),
    "num_labels is text": ("bert", {"num_labels": "2"}, ("num_labels='2' is str", "expected int")),
    "labels for a language model": ("llama", {"task": "CAUSAL_LM"}, ("num_labels=2", "'CAUSAL_LM' has no classes")),
    "labels twice": (
        "bert",
        {"task": SequenceClassification(num_labels=3)},
        ("num_labels=2", "the task object says 3", "Give it once"),
    ),
    # bases
    "no such folder": ("missing", {}, ("missing", "does not exist")),
    "an empty folder": ("empty", {}, ("empty", "no config.json")),
    "an adapter's folder": ("adapter", {}, ("holds a PEFT adapter", "peft_plus.from_pretrained(base, ")),
    "an architecture without the task": (
        "bert",
        {"task": "SEQ_2_SEQ_LM", "num_labels": None},
        ("'bert' model", "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", "Tasks it can do: CAUSAL_LM, FEATURE_EXTRACTION"),
    ),
    "an image model as a language model": (
        "resnet",
        {"task": "CAUSAL_LM", "num_labels": None},
        ("'resnet'", "Tasks it can do: FEATURE_EXTRACTION, SEQ_CLS"),
    ),
    # tuner, plugin, task and base together
    "a probe of a tied head": (
        "tied",
        {"method": "linear_probe", "task": "CAUSAL_LM", "num_labels": None},
        ("'linear_probe'", "tied weights", "'SEQ_CLS'"),
    ),
    "a probe without a head": (
        "bert",
        {"method": "linear_probe", "task": "FEATURE_EXTRACTION", "num_labels": None},
        ("'linear_probe'", "BertModel has none", "task with a head"),
    ),
    "a prompt without a task type": (
        "bert",
        {"method": "prompt_tuning", "task": "MULTIPLE_CHOICE", "num_labels": None},
        ("'prompt_tuning'", "'MULTIPLE_CHOICE'", "e.g. 'lora'"),
    ),
    "a tuner for one task": ("bert", {"method": "cpt"}, ("tuner 'cpt'", "task_type = CAUSAL_LM")),
    "no new head to probe": (
        "llama",
        {"method": ["lora", "lp_ft"], "task": "CAUSAL_LM", "num_labels": None},
        ("'lp_ft'", "'CAUSAL_LM' keeps the pretrained head", "'SEQ_CLS'"),
    ),
    "one set of weights as every layer": (
        "albert",
        {"method": {"lora": {"target_modules": ["query"]}, "gradual_unfreeze": {}}},
        ("'gradual_unfreeze' (peft-plus-freezing ", "AlbertForSequenceClassification has no list of blocks"),
    ),
    "one layer alone": (
        "llama",
        {
            "method": {"lora": {"layers_to_transform": [1]}, "gradual_unfreeze": {}},
            "task": "CAUSAL_LM",
            "num_labels": None,
        },
        ("'gradual_unfreeze'", "lies at depth [2]", "more layers"),
    ),
    "settings that PEFT computes with": (
        "llama",
        {"method": "adaption_prompt", "task": "CAUSAL_LM", "num_labels": None},
        ("'adaption_prompt'", "Settings without a value: target_modules, adapter_len, adapter_layers"),
    ),
}


@pytest.mark.usefixtures("_no_weights")
@pytest.mark.parametrize("case", CALLS)
def test_calls(folders: dict[str, Path], case: str) -> None:
    base, given, says = CALLS[case]
    call = {"method": "lora", "task": "SEQ_CLS", "num_labels": 2} | given
    refused(lambda: get_model(folders[base], **call), *says)


@pytest.mark.usefixtures("_no_weights")
@pytest.mark.parametrize("model", [None, 3, b"bert"])
def test_no_model(model: Any) -> None:
    refused(lambda: get_model(model, "lora", task="SEQ_CLS", num_labels=2), f"model={model!r}", "hub id, a folder")


@pytest.mark.usefixtures("_no_weights")
@pytest.mark.parametrize("name", ["./nowhere", "~/nowhere", "a/b/c"])
def test_no_folder_of_that_name(name: str) -> None:
    refused(lambda: get_model(name, "lora", task="SEQ_CLS", num_labels=2), repr(name), "does not exist")


# --- Loaded models ---


LOADED: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"quantization": "nf4"}, ("quantization= is for loading", "from_pretrained")),
    ({"dtype": "float32"}, ("dtype= is for loading",)),
    ({"device_map": "cpu"}, ("device_map= is for loading",)),
    ({"model_kwargs": {}}, ("model_kwargs= is for loading",)),
    ({"num_labels": 2}, ("head has 3 labels", "num_labels=2", "Load it with")),
    ({"task": SequenceClassification(num_labels=5)}, ("head has 3 labels", "num_labels=5")),
    ({"task": "CAUSAL_LM"}, ("BertForSequenceClassification does the task 'SEQ_CLS'", "'CAUSAL_LM'", "Drop task=")),
]
OF_THE_TUNER = [
    ({"target_modules": ["attn_q"]}, ("tuner 'lora'", "target_modules")),
    ({"modules_to_save": ["poller"]}, ("'poller'", "Did you mean 'pooler'?")),
]


@pytest.mark.parametrize(("given", "says"), LOADED + OF_THE_TUNER)
def test_loaded_models(given: dict[str, Any], says: tuple[str, ...]) -> None:
    model = tiny("bert")
    refused(lambda: get_model(model, "lora", **given), *says)
    assert not hasattr(model, "peft_plus")
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize(("given", "says"), LOADED)
def test_loaded_peft_models(given: dict[str, Any], says: tuple[str, ...]) -> None:
    model = get_peft_model(tiny("bert"), LoraConfig(task_type="SEQ_CLS"))
    refused(lambda: get_model(model, "r3f", **given), *says)
    assert not hasattr(model, "peft_plus")


def test_labels_for_a_loaded_language_model() -> None:
    refused(lambda: get_model(tiny("llama", "CAUSAL_LM"), "lora", num_labels=2), "num_labels=2", "no classes")


def test_full_on_a_loaded_quantised_model(tmp_path: Path) -> None:
    tiny("bert", hidden_size=64).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["classifier"])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=config)
    for call in (lambda: get_model(model, "full"), lambda: attach(model, "r3f")):
        refused(call, "'full'", "quantised weights get no gradient", "'lora'")


@pytest.mark.parametrize("method", ["lora", ["ia3", "r3f"], LoraConfig(), "full"])
def test_a_second_tuner(method: Any) -> None:
    model = get_peft_model(tiny("bert"), LoraConfig(task_type="SEQ_CLS"))
    for call in (lambda: attach(model, method), lambda: get_model(model, method)):
        refused(call, "PeftModelForSequenceClassification already has its tuner", "Name only plugins")


def test_attach_wants_a_model_and_a_method() -> None:
    refused(lambda: attach("bert", "r3f"), "'bert'", "get_model")  # type: ignore[arg-type]
    refused(lambda: attach(tiny("bert"), None), "None", "give a name")
    refused(lambda: attach(tiny("bert"), "gradual_unfreze"), "'gradual_unfreze'", "Did you mean 'gradual_unfreeze'?")
    prompted = get_peft_model(tiny("bert"), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    refused(lambda: attach(prompted, "llrd"), "'llrd'", "'prompt_tuning' has none")


@pytest.mark.parametrize("case", sorted(FINE))
def test_what_is_fine(folders: dict[str, Path], case: str) -> None:
    assert isinstance(get_model(folders["bert"], METHODS[case][0], task="SEQ_CLS", num_labels=2), PeftModel)


# --- Distributions: installed by hand into a folder on sys.path ---

Install = Callable[..., None]
PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar
from peft_plus import Plugin

@dataclass(kw_only=True)
class Thing(Plugin):
    name: ClassVar[str] = {name!r}
    api: ClassVar[int] = {api}
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a distribution of one module and one entry point."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(distribution: str, entry: str, module: str, code: str, group: str = "plugins") -> None:
        info = tmp_path / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[peft_plus.{group}]\n{entry} = {module}:Thing\n")
        (tmp_path / f"{module}.py").write_text(code)

    return install


def build(folders: dict[str, Path], *names: str) -> Callable[[], Any]:
    return lambda: get_model(folders["bert"], ["lora", *names], task="SEQ_CLS", num_labels=2)


def test_a_plugin_of_ours_that_is_not_installed(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    everything = registry.entry_points

    def others(group: str) -> Any:
        return [p for p in everything(group=group) if p.name not in registry.FIRST_PARTY]

    monkeypatch.setattr(registry, "entry_points", others)
    for name, home in registry.FIRST_PARTY.items():
        refused(build(folders, name), f"No installed tuner or plugin is called {name!r}", f"pip install {home}")


def test_first_party_lists_what_our_distributions_provide() -> None:
    found = {n: e.distribution for n, e in registry.entries("plugin").items() if e.distribution.startswith("peft-plus")}
    assert {name: found.get(name) for name in registry.FIRST_PARTY} == registry.FIRST_PARTY


@pytest.mark.usefixtures("_no_weights")
class TestDistributions:
    def test_raises_on_import(self, folders: dict[str, Path], install: Install) -> None:
        install("peft-plus-broken", "broken_thing", "broken_module", "raise OSError('no such library')")
        refused(
            build(folders, "broken_thing"),
            "plugin 'broken_thing' of peft-plus-broken 1.2",
            "OSError: no such library",
            "pip install -U peft-plus-broken",
            error=PluginError,
        )

    def test_is_never_imported_unless_named(self, folders: dict[str, Path], install: Install) -> None:
        install("peft-plus-broken", "broken_thing", "broken_module_2", "raise OSError('no such library')")
        assert "broken_thing" in registry.entries("plugin")
        refused(build(folders, "lorra"), "'lorra'")
        refused(build(folders, "broken_thin"), "Did you mean 'broken_thing'?")

    def test_lacks_the_class(self, folders: dict[str, Path], install: Install) -> None:
        install("peft-plus-hollow", "hollow_thing", "hollow_module", "")
        refused(build(folders, "hollow_thing"), "peft-plus-hollow 1.2", "AttributeError", "Thing", error=PluginError)

    def test_is_no_plugin(self, folders: dict[str, Path], install: Install) -> None:
        install("peft-plus-odd", "odd_thing", "odd_module", "class Thing: pass")
        refused(build(folders, "odd_thing"), "'odd_thing' of peft-plus-odd 1.2", "peft_plus.Plugin", error=PluginError)

    def test_is_named_otherwise(self, folders: dict[str, Path], install: Install) -> None:
        install("peft-plus-misnamed", "one_thing", "misnamed_module", PLUGIN.format(name="other_thing", api=1))
        refused(build(folders, "one_thing"), "peft-plus-misnamed", "'other_thing'", "'one_thing'", error=PluginError)

    def test_speaks_another_contract(self, folders: dict[str, Path], install: Install) -> None:
        install("peft-plus-newer", "newer_thing", "newer_module", PLUGIN.format(name="newer_thing", api=2))
        refused(
            build(folders, "newer_thing"), "peft-plus-newer 1.2", "version 2", "speaks version 1", error=PluginError
        )

    def test_two_with_one_name(self, folders: dict[str, Path], install: Install) -> None:
        install("first-twin", "twin", "first_twin", PLUGIN.format(name="twin", api=1))
        install("second-twin", "twin", "second_twin", PLUGIN.format(name="twin", api=1))
        refused(
            build(folders, "twin"), "'twin'", "first-twin 1.2", "second-twin 1.2", "pip uninstall", error=PluginError
        )

    def test_a_tuner_that_does_not_import(self, folders: dict[str, Path], install: Install) -> None:
        install("strange-tuner", "strange", "strange_module", "import nowhere_to_be_found", group="tuners")
        says = ("tuner 'strange' of strange-tuner 1.2", "nowhere_to_be_found", "pip install -U strange-tuner")
        refused(lambda: get_model(folders["bert"], "strange", task="SEQ_CLS", num_labels=2), *says, error=PluginError)

    def test_a_task_that_does_not_import(self, folders: dict[str, Path], install: Install) -> None:
        install("strange-task", "STRANGE", "strange_task_module", "import nowhere_to_be_found", group="tasks")
        says = ("task 'STRANGE' of strange-task 1.2", "nowhere_to_be_found", "pip install -U strange-task")
        refused(lambda: get_model(folders["bert"], "lora", task="STRANGE"), *says, error=PluginError)

    @pytest.mark.parametrize(("group", "kind"), [("tuners", "tuner"), ("tasks", "task")])
    def test_something_else_in_the_group(
        self, folders: dict[str, Path], install: Install, group: str, kind: str
    ) -> None:
        install(f"odd-{kind}", f"odd_{kind}", f"odd_{kind}_module", "class Thing: pass", group=group)
        tuner = {"method": "odd_tuner", "task": "SEQ_CLS", "num_labels": 2}
        call = tuner if kind == "tuner" else {"method": "lora", "task": "odd_task"}
        refused(lambda: get_model(folders["bert"], **call), f"odd-{kind} 1.2", "Thing", error=PluginError)


def test_a_plugin_that_works(folders: dict[str, Path], install: Install) -> None:
    install("peft-plus-good", "good_thing", "good_module", PLUGIN.format(name="good_thing", api=1))
    model = build(folders, "good_thing")()
    assert model.peft_plus.origins["good_thing"] == "peft-plus-good 1.2"


def test_enough_cases() -> None:
    assert len(METHODS) + len(CALLS) > 90
    assert issubclass(MethodError, ValueError)
    assert isinstance(SequenceClassification(num_labels=2), Task)
