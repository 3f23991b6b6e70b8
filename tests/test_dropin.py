"""`import peft_plus as peft`: the same names, the same objects, the same modules, and a light import."""

from __future__ import annotations

import importlib
import pkgutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from unittest import mock

import peft
import peft.tuners.lora
import peft_plus.tuners.lora
import pytest

import peft_plus

OURS = {"Task", "Trainer", "attach", "fit", "get_model", "load_thawed", "with_plugins"}
HEAVY = {
    "accelerate",
    "bitsandbytes",
    "datasets",
    "jinja2",
    "numpy",
    "packaging",
    "peft",
    "pydantic",
    "rich",
    "safetensors",
    "scipy",
    "seqeval",
    "sklearn",
    "tokenizers",
    "torch",
    "tqdm",
    "transformers",
    "typer",
    "yaml",
}
PEFT_MODULES = sorted(
    module.name.removeprefix("peft.")
    for module in pkgutil.walk_packages(peft.__path__, "peft.")
    if module.name.count(".") <= 3
)


def run(code: str, cwd: Path | None = None) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- Names ---


@pytest.mark.parametrize("name", peft.__all__)
def test_every_name_of_peft_is_here(name: str) -> None:
    assert getattr(peft_plus, name) is getattr(peft, name)


@pytest.mark.parametrize("name", [n for n in dir(peft) if not n.startswith("_") and n not in ("import_utils",)])
def test_whatever_else_peft_has_is_here(name: str) -> None:
    theirs = getattr(peft, name)
    assert getattr(peft_plus, name) is theirs


def test_star_import() -> None:
    names: dict[str, object] = {}
    exec("from peft_plus import *", names)
    assert names["LoraConfig"] is peft.LoraConfig
    assert set(peft.__all__) | OURS <= set(names)
    assert set(peft_plus.__all__) == (set(names) - {"__builtins__"})


def test_dir() -> None:
    assert set(peft.__all__) | OURS | {"__version__"} <= set(dir(peft_plus))
    assert dir(peft_plus) == sorted(dir(peft_plus))
    assert {"tuners", "utils", "mapping", "peft_model"} <= set(dir(peft_plus))


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="module 'peft_plus' has no attribute 'LoraKonfig', and neither has peft"):
        _ = peft_plus.LoraKonfig
    with pytest.raises(AttributeError, match="__wrapped__"):
        _ = peft_plus.__wrapped__
    assert not hasattr(peft_plus, "_no_such_name")
    with pytest.raises(ImportError, match="LoraKonfig"):
        exec("from peft_plus import LoraKonfig")


def test_our_own_names_come_first() -> None:
    assert {name: getattr(peft_plus, name).__module__.partition(".")[0] for name in sorted(OURS)} == dict.fromkeys(
        sorted(OURS), "peft_plus"
    )
    assert not OURS & set(peft.__all__)


# --- Submodules ---


def test_a_submodule_is_the_same_module() -> None:
    assert peft_plus.tuners.lora is peft.tuners.lora
    assert sys.modules["peft_plus.tuners.lora"] is sys.modules["peft.tuners.lora"]
    assert peft.tuners.lora.__name__ == "peft.tuners.lora"
    assert peft.tuners.lora.__package__ == "peft.tuners.lora"
    spec = peft.tuners.lora.__spec__
    assert spec is not None
    assert spec.name == "peft.tuners.lora"
    assert spec.origin == peft.tuners.lora.__file__
    assert peft.tuners.lora.__loader__ is spec.loader


@pytest.mark.parametrize("name", [m for m in PEFT_MODULES if m.count(".") < 2])
def test_every_module_of_peft_is_here(name: str) -> None:
    def imported(module: str) -> ModuleType | str:
        try:
            return importlib.import_module(module)
        except ImportError as error:  # needs what is not installed: then under our name as well
            return str(error)

    theirs = imported(f"peft.{name}")
    spec = getattr(theirs, "__spec__", None)
    assert imported(f"peft_plus.{name}") == theirs
    assert getattr(theirs, "__spec__", None) is spec
    assert getattr(theirs, "__name__", f"peft.{name}") == f"peft.{name}"


def test_from_imports() -> None:
    from peft_plus.tuners import lora
    from peft_plus.tuners.lora import LoraLayer
    from peft_plus.utils import get_peft_model_state_dict
    from peft_plus.utils.constants import DUMMY_TARGET_MODULES

    from peft_plus import build, tuners

    assert lora is peft.tuners.lora
    assert tuners is peft.tuners
    assert LoraLayer is peft.tuners.lora.LoraLayer
    assert get_peft_model_state_dict is peft.get_peft_model_state_dict
    assert DUMMY_TARGET_MODULES == peft.utils.constants.DUMMY_TARGET_MODULES
    assert isinstance(build, ModuleType)
    assert build.__name__ == "peft_plus.build"


def test_unknown_submodules() -> None:
    for name in ("peft_plus.nowhere", "peft_plus.tuners.nowhere", "peft_plus.nowhere.at.all"):
        with pytest.raises(ModuleNotFoundError, match="nowhere"):
            importlib.import_module(name)


def test_ours_hides_nothing_of_peft_s() -> None:
    """A module of ours with the name of one of PEFT's would shadow it."""
    own = {module.name for module in pkgutil.iter_modules(peft_plus.__path__)}
    assert not own & {module.name for module in pkgutil.iter_modules(peft.__path__)}


@pytest.mark.parametrize("first", ["peft", "peft_plus"])
def test_either_may_be_imported_first(first: str) -> None:
    second = {"peft": "peft_plus", "peft_plus": "peft"}[first]
    code = f"import {first}.tuners.lora as a, {second}.tuners.lora as b; assert a is b; print(a.__spec__.name)"
    assert run(code) == "peft.tuners.lora"


def test_deep_names() -> None:
    from peft_plus.helpers import rescale_adapter_scale
    from peft_plus.import_utils import is_bnb_available
    from peft_plus.tuners.lora.layer import Linear
    from peft_plus.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers

    assert Linear is peft.tuners.lora.layer.Linear
    assert issubclass(Linear, BaseTunerLayer)
    assert is_bnb_available is peft.import_utils.is_bnb_available
    assert rescale_adapter_scale.__module__ == "peft.helpers"
    assert _maybe_include_all_linear_layers is peft.tuners.tuners_utils._maybe_include_all_linear_layers


# --- Patching and reloading ---


def test_patching_a_submodule_patches_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_plus.mapping, "PEFT_TYPE_TO_TUNER_MAPPING", {})
    assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING == {}
    layer = peft.tuners.lora.layer.Linear
    with mock.patch("peft_plus.tuners.lora.layer.Linear.scale_layer") as patched:
        assert layer.scale_layer is patched
    assert layer.scale_layer is not patched


@pytest.mark.parametrize("target", ["peft", "peft_plus"])
def test_a_patch_of_a_name_leaves_no_trace(target: str) -> None:
    original = peft.get_peft_model
    with mock.patch(f"{target}.get_peft_model") as patched:
        assert peft_plus.get_peft_model is patched
    assert peft_plus.get_peft_model is peft.get_peft_model is original


def test_reloading() -> None:
    finders = list(sys.meta_path)
    for module in (peft_plus, peft, peft_plus.helpers):
        assert importlib.reload(module) is module
    assert peft_plus.helpers is peft.helpers
    assert peft_plus.LoraConfig is peft.LoraConfig
    assert sys.meta_path == finders


def test_the_version_is_our_own() -> None:
    assert peft_plus.__version__ == version("peft-plus")
    assert peft_plus.config.__version__ == version("peft")


# --- In PEFT's place ---

REPLACED = """
import importlib, sys
{substitute}

import peft, peft_plus
import peft.tuners.lora as lora, peft.helpers, peft.build, peft.tasks.seq_cls
from peft import LoraConfig, PeftModel, config, get_peft_model, tuners
from peft.utils.hotswap import hotswap_adapter
from peft.utils import infer_device
from importlib.metadata import version
from importlib.util import find_spec
from packaging.version import parse

assert peft is peft_plus
assert tuners.lora is lora is peft_plus.tuners.lora is sys.modules["peft.tuners.lora"]
assert peft_plus.dropin.peft().tuners is tuners
assert lora.__name__ == lora.__spec__.name == "peft.tuners.lora"
assert LoraConfig is lora.LoraConfig and LoraConfig.__module__ == "peft.tuners.lora.config"
assert peft.helpers.__spec__.origin.endswith("helpers.py")
assert peft.helpers is peft_plus.helpers is importlib.import_module("peft_plus.helpers")
assert peft.build is peft_plus.build and peft.tasks.seq_cls is peft_plus.tasks.seq_cls  # not a second copy of ours
assert parse(peft.__version__) == parse(config.__version__) == parse(version("peft"))
assert set(peft.__all__) > {{"LoraConfig", "get_model"}} and find_spec("peft.tuners.boft") is not None
for name in ("peft.nowhere", "peft.tuners.nowhere"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert "nowhere" in str(error)
    else:
        raise AssertionError(name)

# What others ask of PEFT is answered by the same objects.
import torch, transformers
from transformers import BertConfig, BertForSequenceClassification
from transformers.trainer import _is_peft_model
from transformers.utils import is_peft_available

torch.manual_seed(0)
shape = dict(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
model = peft.get_model(BertForSequenceClassification(BertConfig(**shape)), ["lora", "llrd"])
assert is_peft_available() and _is_peft_model(model) and isinstance(model, PeftModel)
other = BertForSequenceClassification(BertConfig(**shape))
other.add_adapter(LoraConfig())
assert other.active_adapters() == ["default"]
assert importlib.reload(peft) is sys.modules["peft"] is peft_plus
print(len(peft_plus.registry.entries("tuner")) > 30)
"""


SUBSTITUTES = {
    "before peft": "import peft_plus; sys.modules['peft'] = peft_plus",
    "after peft": "import peft.tuners.lora, peft as theirs; import peft_plus; sys.modules['peft'] = peft_plus",
    "by a file": "sys.path.insert(0, '.')",
}


@pytest.mark.parametrize("how", SUBSTITUTES)
def test_we_may_be_put_in_peft_s_place(how: str, tmp_path: Path) -> None:
    """As a crude substituter would: in `sys.modules`, at once or late, or by a file that is found before PEFT."""
    (tmp_path / "peft.py").write_text("import sys, peft_plus\nsys.modules['peft'] = peft_plus\n")
    folder = tmp_path if how == "by a file" else tmp_path.parent
    assert run(REPLACED.format(substitute=SUBSTITUTES[how]), cwd=folder) == "True"


# --- Lightness ---


def test_importing_loads_nothing_heavy() -> None:
    loaded = run("import sys; before = set(sys.modules); import peft_plus; print(*sorted(set(sys.modules) - before))")
    tops = {name.partition(".")[0] for name in loaded.split()}
    assert not tops & HEAVY
    third_party = {name for name in tops - sys.stdlib_module_names if not name.startswith(("_", "peft_plus"))}
    assert not third_party


def test_dir_and_the_registry_load_nothing_heavy() -> None:
    code = """
import sys, peft_plus
dir(peft_plus), peft_plus.__all__
from peft_plus import registry, Plugin, MethodError
for kind in ("plugin", "tuner", "task"):
    assert registry.entries(kind)
print(*sys.modules)
"""
    assert not {name.partition(".")[0] for name in run(code).split()} & {"torch", "peft", "transformers", "numpy"}


def test_importing_is_quick(capsys: pytest.CaptureFixture[str]) -> None:
    """Aimed at a third of `import click, rich`, interpreter included; asserted with room for a busy machine."""

    def seconds(code: str) -> float:
        start = time.perf_counter()
        run(code)
        return time.perf_counter() - start

    pairs = [(seconds("import peft_plus"), seconds("import click, rich"), seconds("pass")) for _ in range(7)]
    ours, theirs, bare = (statistics.median(times) for times in zip(*pairs, strict=True))
    with capsys.disabled():
        sys.stdout.write(
            f"\nimport peft_plus {ours * 1e3:.0f} ms, click + rich {theirs * 1e3:.0f} ms, bare {bare * 1e3:.0f} ms: "
            f"{ours / theirs:.2f}\n"
        )
    assert ours < 2 * theirs
