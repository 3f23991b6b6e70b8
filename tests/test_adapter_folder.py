"""Malicious and broken folders: refused with a clear error, before anything runs, is allocated or is changed."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_plus import MethodError, Trainer, attach, from_pretrained, get_model, patterns
from peft_plus.rehearsal import check_adapter_folder
from tests.models import batch, tiny
from tests.training import quiet

CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "peft_plus.json"
QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"
EMBEDDINGS = "base_model.model.bert.embeddings.word_embeddings.weight"
POOLER = "base_model.model.bert.pooler.dense.weight"
SLOW = "(" * 12 + r"[\w.]+" + ")+" * 12 + "!"
"""Matches nothing; `re` would try for longer than the universe has been there."""

MANY = [f"a{i}" for i in range(100_000)]
"""More than a megabyte of names; two are read."""

Craft = Callable[[Path], Any]

pytestmark = [
    pytest.mark.filterwarnings("ignore:Specified to not save projection:UserWarning"),  # tinylora
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension:UserWarning"),  # boft, without CUDA
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning"),  # frod
]


# --- Folders to spoil ---


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What `save_pretrained` wrote, by tuner; `thawed` has base weights beside it, `plain` comes from plain PEFT."""
    folders: dict[str, Path] = {}
    methods: dict[str, dict[str, Any]] = {
        "lora": {"r": 4},
        "ia3": {},
        "fourierft": {"n_frequency": 10},
        "prompt_tuning": {},
        "peanut": {},
        "unilora": {},
        "tinylora": {"save_projection": False},
        "adalora": {"total_step": 10},
        "multitask_prompt_tuning": {"num_tasks": 2},
        "adamss": {},
        "shira": {"r": 4},
        "boft": {},
        "frod": {"progressbar": False},
    }
    for name, settings in methods.items():
        model = get_model(tiny("bert"), {name: settings})
        with torch.no_grad():
            for tensor in model.parameters():
                if tensor.requires_grad:
                    tensor.add_(torch.randn_like(tensor) * 0.1)
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
    thawed = get_model(tiny("bert"), {"lora": {"r": 4}})
    thawed.get_parameter(POOLER).requires_grad_(True)
    folders["thawed"] = tmp_path_factory.mktemp("thawed")
    attach(thawed, []).save_pretrained(folders["thawed"])
    for name in ("lora", "prompt_tuning"):
        shutil.copytree(folders[name], copied := tmp_path_factory.mktemp("plain") / name)
        (copied / RECORD).unlink()
        folders[f"plain_{name}"] = copied
    return folders


def change(file: str, **values: Any) -> Craft:
    """Set values of a JSON file; dots go inside."""

    def craft(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        for path, value in values.items():
            *outer, last = path.split("__")
            inner = content
            for key in outer:
                inner = inner[int(key)] if isinstance(inner, list) else inner[key]
            inner[last] = value
        (folder / file).write_text(json.dumps(content))

    return craft


def config(**values: Any) -> Craft:
    return change(CONFIG, **values)


def record(**values: Any) -> Craft:
    return change(RECORD, **values)


def replace(file: str, content: bytes | str) -> Craft:
    return lambda folder: (
        (folder / file).write_bytes(content.encode() if isinstance(content, str) else content) and None
    )


def edit(file: str, old: str, new: str) -> Craft:
    def craft(folder: Path) -> None:
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new, 1))

    return craft


def weights(spoil: Callable[[dict[str, Tensor]], Any], file: str = WEIGHTS) -> Craft:
    def craft(folder: Path) -> None:
        tensors = load_file(folder / file)
        spoil(tensors)
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return craft


def header(declared: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> Craft:
    """A safetensors file from its raw header."""
    text = declared if isinstance(declared, bytes) else json.dumps(declared).encode()
    return replace(WEIGHTS, struct.pack("<Q", len(text) if length is None else length) + text + data)


def tensor(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def instead(file: str, make: Callable[[Path], Any]) -> Craft:
    def craft(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        make(folder / file)

    return craft


def sparse(size: int) -> Callable[[Path], Any]:
    """A file of that size that takes no room on the disk."""

    def make(path: Path) -> None:
        path.touch()
        os.truncate(path, size)

    return make


class Canary:
    """Its pickle writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.path, "sang"))


def pickled(folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Canary(folder / "canary")))


def only_pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    pickled(folder)


def module(folder: Path, name: str) -> None:
    """A module in the folder that writes the canary when it is imported."""
    (folder / f"{name}.py").write_text(f"open({str(folder / 'canary')!r}, 'w').write('sang')\n")


def outside(folder: Path) -> Path:
    (folder.parent / "outside").mkdir(exist_ok=True)
    return Path(shutil.copy(folder / WEIGHTS, folder.parent / "outside" / WEIGHTS))


def in_sub_folder(folder: Path) -> None:
    (folder / "mine").mkdir()
    for file in (CONFIG, WEIGHTS, RECORD):
        (folder / file).rename(folder / "mine" / file)


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


REFUSED: dict[str, tuple[str, Craft, str]] = {
    # what → (folder to spoil, how, what the error must say)
    # files
    "a folder that is not there": ("lora", shutil.rmtree, "does not exist"),
    "no config": ("lora", lambda f: (f / CONFIG).unlink(), "no adapter_config.json"),
    "an adapter in a sub-folder only": ("lora", in_sub_folder, "sub-folders ['mine']: name one"),
    "no weights": ("lora", lambda f: (f / WEIGHTS).unlink(), "adapter_model.safetensors does not exist"),
    "a pickle": ("lora", only_pickled, "is a pickle"),
    "a pickle beside good weights": ("lora", pickled, "is a pickle"),
    "a link to nowhere named like the pickle": (
        "lora",
        lambda f: (f / "adapter_model.bin").symlink_to("nowhere"),
        "is a pickle",
    ),
    "a directory as config": ("lora", instead(CONFIG, Path.mkdir), "no plain file"),
    "a directory as weights": ("lora", instead(WEIGHTS, Path.mkdir), "no plain file"),
    "a FIFO as config": ("lora", instead(CONFIG, os.mkfifo), "no plain file"),
    "a FIFO as weights": ("lora", instead(WEIGHTS, os.mkfifo), "no plain file"),
    "a FIFO as record": ("lora", instead(RECORD, os.mkfifo), "no plain file"),
    "a device as config": ("lora", instead(CONFIG, lambda p: p.symlink_to("/dev/zero")), "out of its folder"),
    "weights linked from outside": (
        "lora",
        lambda f: (target := outside(f)) and instead(WEIGHTS, lambda p: p.symlink_to(target))(f),
        "out of its folder",
    ),
    "a config linked to itself": ("lora", instead(CONFIG, lambda p: p.symlink_to(p.name)), "leads nowhere"),
    # JSON
    "a config of 100 MB": ("lora", instead(CONFIG, sparse(100_000_000)), "100,000,000 bytes"),
    "a record of 100 MB": ("lora", instead(RECORD, sparse(100_000_000)), "100,000,000 bytes"),
    "an empty config": ("lora", replace(CONFIG, ""), "is damaged"),
    "half a config": ("lora", lambda f: os.truncate(f / CONFIG, 200), "is damaged"),
    "a config that is a list": ("lora", replace(CONFIG, "[]"), "holds a list"),
    "a config nested deeply": ("lora", replace(CONFIG, '{"peft_type": ' + deep(200_000) + "}"), "nested too deeply"),
    "a record nested deeply": ("lora", replace(RECORD, deep(200_000)), "nested too deeply"),
    "bad UTF-8": ("lora", replace(CONFIG, b'{"peft_type": "LORA\xff"}'), "utf-8"),
    "UTF-16": ("lora", replace(CONFIG, '{"peft_type": "LORA"}'.encode("utf-16")), "is damaged"),
    "a key twice": ("lora", edit(CONFIG, '"r": 4', '"r": 4, "r": 4'), "a key stands twice"),
    "NaN": ("lora", edit(CONFIG, '"lora_alpha": 8', '"lora_alpha": NaN'), "NaN is no number"),
    "infinity": ("lora", edit(CONFIG, '"lora_alpha": 8', '"lora_alpha": 1e999'), "no finite number"),
    "a number of 10,000 digits": ("lora", edit(CONFIG, '"r": 4', '"r": ' + "9" * 10_000), "is damaged"),
    "a million empty lists": ("lora", edit(CONFIG, '"r": 4', '"r": [' + "[]," * 650_000 + "[]]"), "cannot build"),
    # tuners
    "no tuner": ("lora", config(peft_type=None), "peft_type is None"),
    "a list as tuner": ("lora", config(peft_type=["LORA"]), "peft_type is ['LORA']"),
    "a module as tuner": ("lora", config(peft_type="os.system"), "peft_type is 'os.system'"),
    "a tuner of a newer PEFT": ("lora", config(peft_type="ZEBRA", peft_version="99.1"), "pip install 'peft>=99.1'"),
    "a tuner nobody knows": ("lora", config(peft_type="ZEBRA"), "a plugin that is not installed provides it"),
    "a tuner that loads other adapters": ("lora", config(peft_type="XLORA", adapters={"a": "/b"}), "adapters={'a'"),
    "a tuner that imports a module": (
        "lora",
        config(megatron_config={"a": 1}, megatron_core="megatron.core"),
        "megatron_config={'a': 1} names",
    ),
    "a tuner that loads another model": (
        "lora",
        config(peft_type="SHADOW", shadow_model="/evil"),
        "shadow_model='/evil'",
    ),
    "a task type nobody knows": ("lora", config(task_type="ROOT"), "Invalid task type"),
    # numbers
    "a rank of a million": ("lora", config(r=10**6), "is absurd"),
    "a rank that overflows": ("lora", config(r=10**18), "cannot build"),
    "a rank of forty": ("lora", config(r=40), "lora_"),
    "a negative rank": ("lora", config(r=-1), "cannot build"),
    "a rank that is a word": ("lora", config(r="8"), "cannot build"),
    "a rank that is a list": ("lora", config(r=[8]), "cannot build"),
    "another rank for one module": ("lora", config(rank_pattern={"query": 10**6}), "is absurd"),
    "one layer many times": ("lora", config(layer_replication=[[0, 3]] * 50_000), "is absurd"),
    "a billion layers in the adapter": ("peanut", config(depth=10**9), "is absurd"),
    "a billion iterations": ("lora", config(init_lora_weights="pissa_niter_1000000000"), "is absurd"),
    "a rank that its file cannot show": ("unilora", config(r=10**6), "is absurd"),
    "a projection that its file cannot show": ("tinylora", config(r=10**6), "this model wants"),
    "a billion virtual tokens": ("prompt_tuning", config(num_virtual_tokens=10**9), "is absurd"),
    "a billion tasks": ("multitask_prompt_tuning", config(num_tasks=10**9), "is absurd"),
    "a token that does not exist": ("lora", config(trainable_token_indices={"word_embeddings": [10**9]}), "lacks"),
    "layers that do not exist": ("lora", config(layers_to_transform=[10**9]), "cannot build"),
    "an absurd number of clusters": (
        "adamss",
        config(r=10**6, num_subspaces=10**6, subspace_rank=10**6),
        "does not|lacks|wants",
    ),
    "more weights than there are": ("shira", config(r=10**9), "cannot build"),
    "blocks wider than the layer": ("boft", config(boft_block_size=10**9), "cannot build"),
    "a density above all": ("frod", config(sparse_rate=1e9), "PEFT refuses these settings"),
    "ranks that are none": ("adalora", config(rank_pattern={f"{QUERY}.lora_E": [10**9]}), "cannot|does not fit"),
    # regular expressions
    "slow target_modules": ("lora", config(target_modules=SLOW), "take more than"),
    "slow exclude_modules": ("lora", config(exclude_modules=SLOW), "take more than"),
    "slow rank_pattern": ("lora", config(rank_pattern={SLOW: 4}), "take more than"),
    "slow alpha_pattern": ("lora", config(alpha_pattern={"query": 4, SLOW: 4}), "take more than"),
    "slow feedforward_modules": ("ia3", config(feedforward_modules=SLOW), "take more than"),
    "slow n_frequency_pattern": ("fourierft", config(n_frequency_pattern={SLOW: 4}), "take more than"),
    "slow rank_pattern of AdaLoRA": ("adalora", config(rank_pattern={SLOW: [True]}), "no name of a module"),
    "slow modules_to_save": ("lora", config(modules_to_save=["classifier", SLOW]), "no name of a module"),
    "slow layers_pattern": ("lora", config(layers_to_transform=[0], layers_pattern=SLOW), "no name of a module"),
    "slow layers_pattern in a list": ("lora", config(layers_to_transform=[0], layers_pattern=[SLOW]), "no name of"),
    "slow target_parameters": ("lora", config(target_parameters=[SLOW]), "no name of a module"),
    "a list of expressions": ("lora", config(target_modules=["query", SLOW]), "no name of a module"),
    "a broken expression": ("lora", config(target_modules="(query"), "invalid regular expression"),
    "an expression of a million characters": ("lora", config(target_modules="(a|" * 300_000), "900,000 characters"),
    "an expression nested deeply": (
        "lora",
        config(target_modules="(" * 5000 + ")" * 5000),
        "invalid regular expression",
    ),
    # names, each of which PEFT would try on every module
    "many target_modules": (
        "lora",
        config(target_modules=["query", "value", *MANY]),
        "target_modules in the adapter's",
    ),
    "many target_modules in IA3": (
        "ia3",
        config(target_modules=["key", *MANY], feedforward_modules=[]),
        "target_modules in the adapter's",
    ),
    "many feedforward_modules": (
        "ia3",
        config(target_modules=".*key", feedforward_modules=MANY),
        "feedforward_modules in the adapter's",
    ),
    "many exclude_modules": ("lora", config(exclude_modules=MANY), "exclude_modules in the adapter's"),
    "many modules_to_save": ("lora", config(modules_to_save=["classifier", *MANY]), "modules_to_save in the adapter's"),
    "many target_parameters": ("lora", config(target_parameters=MANY), "target_parameters in the adapter's"),
    "many layers": ("lora", config(layers_to_transform=list(range(200_000))), "layers_to_transform in the adapter's"),
    "many layers_pattern": (
        "lora",
        config(layers_to_transform=[0], layers_pattern=["layer", *MANY]),
        "layers_pattern in the adapter's",
    ),
    "many ranks": ("lora", config(rank_pattern=dict.fromkeys(MANY, 4)), "rank_pattern in the adapter's"),
    "many expressions for ranks": (
        "lora",
        config(rank_pattern={f".*{name}": 4 for name in MANY}),
        "rank_pattern in the adapter's",
    ),
    "many alphas": ("lora", config(alpha_pattern=dict.fromkeys(MANY, 4)), "alpha_pattern in the adapter's"),
    "many frequencies": (
        "fourierft",
        config(n_frequency_pattern=dict.fromkeys(MANY, 4)),
        "n_frequency_pattern in the adapter's",
    ),
    "many ranks of AdaLoRA": ("adalora", config(rank_pattern={name: [True] for name in MANY}), "rank_pattern in the"),
    "many embeddings": (
        "lora",
        config(trainable_token_indices={name: [1] for name in MANY}),
        "trainable_token_indices in the",
    ),
    "many letters": ("lora", config(modules_to_save="a" * 100_000), "modules_to_save in the adapter's"),
    "a name of a million characters": ("lora", config(modules_to_save=["a" * 10**6]), "1,000,000 characters"),
    "a word of a million characters": ("lora", config(target_modules="a" * 10**6), "1,000,000 characters"),
    "a rank for a name of a million characters": (
        "lora",
        config(rank_pattern={"a" * 10**6: 4}),
        "1,000,000 characters",
    ),
    "layers to repeat that are no numbers": ("lora", config(layer_replication=["a"]), "cannot replicate"),
    "an expression that matches nothing": ("lora", config(target_modules=".*q_proj"), "matches no module"),
    # weights
    "an empty file": ("lora", replace(WEIGHTS, b""), "is damaged"),
    "half a file": ("lora", lambda f: os.truncate(f / WEIGHTS, (f / WEIGHTS).stat().st_size // 2), "is damaged"),
    "an absurd header": ("lora", header({}, length=2**63), "declares a header of"),
    "a header longer than the file": ("lora", header({}, length=30_000_000), "declares a header of"),
    "a header of 100 MB": (
        "lora",
        instead(
            WEIGHTS, lambda p: (sparse(120_000_000)(p), os.pwrite(os.open(p, os.O_WRONLY), struct.pack("<Q", 10**8), 0))
        ),
        "declares a header of",
    ),
    "a header nested deeply": ("lora", header(deep(100_000).encode()), "is damaged"),
    "a header that is no UTF-8": ("lora", header(b'{"\xff": 1}'), "is damaged"),
    "an unknown dtype": ("lora", header({"a": tensor("F99", [4], 0, 16)}, bytes(16)), "is damaged"),
    "a dtype of no adapter": ("lora", header({"a": tensor("C64", [2], 0, 16)}, bytes(16)), "which no adapter is"),
    "overlapping tensors": (
        "lora",
        header({"a": tensor("F32", [4], 0, 16), "b": tensor("F32", [4], 8, 24)}, bytes(24)),
        "is damaged",
    ),
    "a hole between tensors": ("lora", header({"a": tensor("F32", [4], 8, 24)}, bytes(24)), "is damaged"),
    "bytes that belong to nothing": ("lora", header({"a": tensor("F32", [4], 0, 16)}, bytes(32)), "is damaged"),
    "a shape that overflows": ("lora", header({"a": tensor("F32", [2**62, 4], 0, 16)}, bytes(16)), "is damaged"),
    "an empty shape that overflows": (
        "lora",
        header({"a": tensor("F32", [2**62, 2**62, 0], 0, 0)}),
        "lacks|damaged|shape",
    ),
    "a pickle by another name": ("lora", replace(WEIGHTS, pickle.dumps({"a": 1})), "is damaged"),
    "no tensors": ("lora", header({}), "lacks"),
    "a missing tensor": ("lora", weights(lambda t: t.pop(f"{QUERY}.lora_A.weight")), "lacks 1 tensors"),
    "a missing head": ("lora", weights(lambda t: t.pop("base_model.model.classifier.weight")), "lacks"),
    "a tensor too many": ("lora", weights(lambda t: t.update(evil=torch.ones(2))), "also holds 1 tensors, e.g. 'evil'"),
    "a weight of the base": (
        "lora",
        weights(lambda t: t.update({POOLER: torch.zeros(32, 32)})),
        "also holds 1 tensors",
    ),
    "a weight of the base, beside a prompt": (
        "prompt_tuning",
        weights(lambda t: t.update({"base_model.bert.pooler.dense.weight": torch.zeros(32, 32)})),
        "also holds 1 tensors",
    ),
    "a tensor of another shape": (
        "lora",
        weights(lambda t: t.update({f"{QUERY}.lora_B.weight": torch.zeros(32, 5)})),
        "(32, 5), this model wants (32, 4)",
    ),
    "a head for other classes": (
        "lora",
        weights(lambda t: t.update({"base_model.model.classifier.weight": torch.zeros(7, 32)})),
        "head of the right size",
    ),
    "a tensor without values": (
        "lora",
        weights(lambda t: t.update({f"{QUERY}.lora_A.weight": torch.zeros(0, 32)})),
        "(0, 32)",
    ),
    "whole numbers": (
        "lora",
        weights(lambda t: t.update({f"{QUERY}.lora_A.weight": torch.zeros(4, 32, dtype=torch.int64)})),
        "is torch.int64",
    ),
    "NaN in a tensor": ("lora", weights(lambda t: t[f"{QUERY}.lora_A.weight"].fill_(float("nan"))), "holds NaN"),
    "infinity in a tensor": (
        "lora",
        weights(lambda t: t[f"{QUERY}.lora_B.weight"][0].fill_(float("inf"))),
        "holds NaN",
    ),
    "NaN in a prompt": ("prompt_tuning", weights(lambda t: t["prompt_embeddings"].fill_(float("nan"))), "holds NaN"),
    # the record
    "a plugin that is a path": (
        "lora",
        record(plugins=[{"name": "os:system", "origin": "", "settings": {}}]),
        "plugins.0",
    ),
    "a plugin that is a builtin": (
        "lora",
        record(plugins=[{"name": "__import__", "origin": "", "settings": {}}]),
        "plugins.0.name",
    ),
    "plugins that are no list": ("lora", record(plugins="llrd"), "plugins: "),
    "settings that are no mapping": (
        "lora",
        record(plugins=[{"name": "llrd", "origin": "", "settings": [1]}]),
        "plugins.0.settings",
    ),
    "a task that is a path": ("lora", record(task__name="os:system"), "task.name"),
    "labels that are no words": ("lora", record(task__labels=[{"a": 1}]), "task.labels"),
    "a record of the future": ("lora", record(format=2), "pip install -U peft-plus"),
    "a record without a format": ("lora", record(format=None), "format"),
    "an empty record": ("lora", replace(RECORD, "{}"), "format: Field required"),
    "a whole model": ("lora", record(tuner="full"), "holds a whole model"),
    "another base": ("lora", record(base__fingerprint="0" * 64), "allow_other_base=True"),
    "another kind of base": (
        "lora",
        record(base__class="LlamaModel", base__fingerprint="0"),
        "trained on another base",
    ),
    # thawed weights
    "thawed weights that are not listed": ("thawed", record(thawed_tensors=[]), "does not hold what"),
    "thawed weights that are not there": (
        "thawed",
        lambda f: (f / "thawed.safetensors").unlink(),
        "does not hold what",
    ),
    "thawed weights without a record": ("thawed", lambda f: (f / RECORD).unlink(), "does not hold what"),
    "a thawed weight of the adapter": (
        "thawed",
        lambda f: (
            save_file({f"{QUERY}.lora_A.default.weight": torch.zeros(4, 32)}, f / "thawed.safetensors"),
            record(thawed_tensors=[f"{QUERY}.lora_A.default.weight"])(f),
        ),
        "no weight of this base",
    ),
    "a thawed weight of another shape": (
        "thawed",
        weights(lambda t: t.update({POOLER: torch.zeros(3, 3)}), "thawed.safetensors"),
        "(3, 3)",
    ),
    "NaN in a thawed weight": (
        "thawed",
        weights(lambda t: t[POOLER].fill_(float("nan")), "thawed.safetensors"),
        "holds NaN",
    ),
}


# --- What must hold of every refusal ---


def state_of(model: nn.Module) -> list[Any]:
    """Everything that loading could change: tensors by their bits, the tree by its objects, flags, hooks, config."""
    return [
        [(n, id(t), t.requires_grad, t.dtype, t.detach().numpy().tobytes()) for n, t in model.named_parameters()],
        [(n, id(b), b.numpy().tobytes()) for n, b in model.named_buffers()],
        [(n, id(m), type(m), m.training, sorted(vars(m)), len(m._forward_hooks)) for n, m in model.named_modules()],
        model.config.to_json_string(),
    ]


@contextmanager
def bounded(*, seconds: float, megabytes: float) -> Iterator[None]:
    """What runs inside takes no longer and, at its peak, no more memory than that."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = memory("VmHWM"), time.monotonic()
    yield
    taken, used = time.monotonic() - start, memory("VmHWM") - before
    assert taken < seconds, f"{taken:.1f} s"
    assert used < megabytes, f"{used:.1f} MB"


def memory(field: str) -> float:
    """Megabytes, as the kernel counts them."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return tiny("bert")


@pytest.mark.parametrize("what", REFUSED)
def test_refused(
    what: str, good: dict[str, Path], base: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what.startswith("slow"):
        monkeypatch.setattr(patterns, "SECONDS", 1.0)
    name, craft, says = REFUSED[what]
    folder = tmp_path / "folder"
    shutil.copytree(good[name], folder)
    craft(folder)
    before, imported, stream = state_of(base), set(sys.modules), torch.get_rng_state()
    with bounded(seconds=2 if what.startswith("many ") else 10, megabytes=80), pytest.raises(MethodError) as refused:
        from_pretrained(base, folder)
    message = str(refused.value)
    assert any(part in message for part in says.split("|")), message
    assert len(message) < 1500
    assert state_of(base) == before
    assert torch.equal(torch.get_rng_state(), stream)
    assert not (folder / "canary").exists()
    assert {m for m in set(sys.modules) - imported if not m.startswith(("peft", "torch", "transformers"))} == set()


def test_there_are_many(good: dict[str, Path]) -> None:
    assert len(REFUSED) >= 100


# --- What is ignored ---


def loaded(folder: Path, **options: Any) -> Tensor:
    return logits(from_pretrained(tiny("bert"), folder, **options))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    inputs = batch("bert")
    del inputs["labels"]
    return model.eval()(**inputs).logits


def evil_model(folder: Path) -> None:
    """A model folder whose code runs when it is loaded with trust_remote_code, named as the adapter's base."""
    evil = folder / "evil"
    evil.mkdir()
    (evil / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": {"AutoConfig": "modeling_evil.Evil"}}))
    (evil / "modeling_evil.py").write_text(f"open({str(folder / 'canary')!r}, 'w').write('sang')\n")
    config(base_model_name_or_path=str(evil), revision="main")(folder)


def clutter(folder: Path) -> None:
    """Files by the names that transformers and PEFT know, with code and settings of their own."""
    module(folder, "modeling_evil")
    module(folder, "configuration_evil")
    module(folder, "adapter_config")
    remote = {"auto_map": {"AutoConfig": "configuration_evil.Evil"}, "model_type": "evil", "trust_remote_code": True}
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_text(json.dumps(remote))
    (folder / "training_args.bin").write_bytes(pickle.dumps(Canary(folder / "canary")))


def planted(folder: Path) -> None:
    """Adapters in sub-folders, under every name by which something might look for them."""
    tensors = {name: torch.full_like(t, 7.0) for name, t in load_file(folder / WEIGHTS).items()}
    for name in ("default", "adapter", "checkpoint-9"):
        (folder / name).mkdir()
        shutil.copy(folder / CONFIG, folder / name / CONFIG)
        save_file(tensors, folder / name / WEIGHTS)


IGNORED: dict[str, tuple[str, Craft]] = {
    "a base that runs code": ("lora", evil_model),
    "auto_mapping": (
        "lora",
        lambda f: (module(f, "evil"), config(auto_mapping={"parent_library": "evil", "base_model_class": "Evil"})(f)),
    ),
    "a runtime_config": ("lora", config(runtime_config={"ephemeral_gpu_offload": True})),
    "a module to import where nothing asks for it": ("lora", config(megatron_core="evil")),
    "files of other names": ("lora", clutter),
    "adapters in sub-folders": ("lora", planted),
    "a state dict to start the prompt from": (
        "multitask_prompt_tuning",
        lambda f: (
            (f / "start.bin").write_bytes(pickle.dumps(Canary(f / "canary"))),
            config(prompt_tuning_init="EXACT_SOURCE_TASK", prompt_tuning_init_state_dict_path=str(f / "start.bin"))(f),
        ),
    ),
    "a tokenizer to start the prompt from": (
        "prompt_tuning",
        config(prompt_tuning_init="TEXT", prompt_tuning_init_text="a", tokenizer_name_or_path="/evil"),
    ),
    "a plugin that is not installed": (
        "lora",
        record(plugins=[{"name": "evil", "origin": "evil 1.0", "settings": {}}]),
    ),
}


@pytest.mark.parametrize("what", IGNORED)
def test_ignored(what: str, good: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, craft = IGNORED[what]
    folder = tmp_path / "folder"
    shutil.copytree(good[name], folder)
    if name == "multitask_prompt_tuning":  # whose forward wants to know which task
        monkeypatch.setattr(sys.modules[__name__], "logits", lambda model: model.prompt_encoder["default"].state_dict())
    expected = loaded(folder)
    craft(folder)
    monkeypatch.syspath_prepend(str(folder))  # as if the user worked in there
    found = loaded(folder)
    if isinstance(found, Tensor):
        assert torch.equal(found, expected)
    else:
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not (folder / "canary").exists()
    assert {"evil", "modeling_evil", "configuration_evil"}.isdisjoint(sys.modules)


def test_what_the_folder_named_is_not_saved_again(good: dict[str, Path], tmp_path: Path) -> None:
    """Saving asks the hub for the config of `base_model_name_or_path`; it must be the user's base by then."""
    folder = tmp_path / "folder"
    shutil.copytree(good["lora"], folder)
    config(base_model_name_or_path="evil/base", auto_mapping={"parent_library": "evil"})(folder)
    base = tiny("bert")
    base.name_or_path = "mine"
    own = from_pretrained(base, folder).peft_config["default"]
    assert own.base_model_name_or_path == "mine"
    assert own.auto_mapping is None


# --- Where training resumes ---


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Any, Path]:
    """A model, and a checkpoint of it by our Trainer, with everything that a Trainer writes."""
    model = get_model(tiny("bert"), {"lora": {"r": 4}})
    rows = batch("bert")
    data = [{name: values[i] for name, values in rows.items()} for i in range(4)]
    Trainer(model, quiet(tmp_path, max_steps=1, save_strategy="steps", save_steps=1), train_dataset=data).train()
    return model, tmp_path / "checkpoint-1"


def test_a_trainer_picks_up_what_was_planted_and_the_check_refuses_it(checkpoint: tuple[Any, Path]) -> None:
    import transformers

    model, folder = checkpoint
    check_adapter_folder(folder, model)
    trained = logits(model)
    planted(folder)
    plain = PeftModel.from_pretrained(tiny("bert"), folder, is_trainable=True)
    assert torch.equal(logits(plain), trained)
    transformers.Trainer(plain, quiet(folder))._load_from_checkpoint(str(folder))
    assert set(plain.peft_config) == {"default", "adapter", "checkpoint-9"}
    assert not torch.equal(logits(plain), trained)  # `default/` came after the folder's own
    with pytest.raises(MethodError, match="holds an adapter that this model does not have"):
        check_adapter_folder(folder, model)
    assert torch.equal(loaded(folder), trained)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_a_trainer_would_prefer(checkpoint: tuple[Any, Path], name: str) -> None:
    model, folder = checkpoint
    (folder / name).touch()
    with pytest.raises(MethodError, match="a Trainer would load it instead"):
        check_adapter_folder(folder, model)


@pytest.mark.parametrize(
    "what",
    [
        "a pickle beside good weights",
        "half a file",
        "a missing tensor",
        "a weight of the base",
        "a tensor of another shape",
        "a FIFO as weights",
        "half a config",
    ],
)
def test_a_spoilt_checkpoint(checkpoint: tuple[Any, Path], what: str) -> None:
    model, folder = checkpoint
    _, craft, says = REFUSED[what]
    craft(folder)
    before = state_of(model)
    with pytest.raises(MethodError, match=re.escape(says)):
        check_adapter_folder(folder, model)
    assert state_of(model) == before


def test_a_checkpoint_of_another_tuner(checkpoint: tuple[Any, Path], good: dict[str, Path]) -> None:
    model, folder = checkpoint
    with pytest.raises(MethodError, match="describes a 'IA3' adapter, the model has 'LORA'"):
        check_adapter_folder(good["ia3"], model)
    with pytest.raises(MethodError, match="this is a BertForSequenceClassification"):
        check_adapter_folder(folder, tiny("bert"))


def test_checkpoints_of_several_adapters(tmp_path: Path) -> None:
    model = get_model(tiny("bert"), {"lora": {"r": 4}})
    model.add_adapter("second", model.peft_config["default"])
    model.save_pretrained(tmp_path)
    check_adapter_folder(tmp_path, model)
    (tmp_path / "second" / WEIGHTS).write_bytes(b"")
    with pytest.raises(MethodError, match=r"second/adapter_model\.safetensors is damaged"):
        check_adapter_folder(tmp_path, model)


@pytest.mark.parametrize("name", ["prompt_tuning", "adalora", "ia3", "unilora", "tinylora", "adamss"])
def test_good_checkpoints_of_other_tuners(good: dict[str, Path], name: str) -> None:
    settings = {"fourierft": {"n_frequency": 10}, "adalora": {"total_step": 10}, "tinylora": {"save_projection": False}}
    model = get_model(tiny("bert"), {name: settings.get(name, {})})
    check_adapter_folder(good[name], model)
