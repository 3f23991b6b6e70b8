"""The dependency rule: plugins → core → peft and transformers; never the other way, never sideways.

Read from the syntax trees, so that an import inside a function or under `TYPE_CHECKING` counts too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "peft_plus"
BRIDGE = CORE / "hf.py"  # the one file that may know transformers' Trainer
PACKAGES = [CORE, *sorted(ROOT.glob("plugins/*/peft_plus_*"))]
FILES = [file for package in PACKAGES for file in sorted(package.rglob("*.py"))]

TRAINER_LIBRARIES = {"transformers", "trl"}
EMPTY_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Every (module, name) that a file imports; the name is empty for a whole module. Relative ones stay inside."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((alias.name, "") for alias in names)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                yield from ((module, alias.name) for alias in names)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield module, ""


def trainers(tree: ast.AST) -> Iterator[str]:
    """Every mention of a Trainer class of transformers or TRL (`TrainerCallback` and the like are none)."""
    aliases: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in TRAINER_LIBRARIES:
                    aliases.add(alias.asname or alias.name.split(".")[0])
    for module, name in imports(tree):
        if module.split(".")[0] in TRAINER_LIBRARIES and name.endswith("Trainer"):
            yield f"{module}.{name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.endswith("Trainer"):
            base = ast.unparse(node.value)
            if base.split(".")[0] in aliases:
                yield f"{base}.{node.attr}"


def package_of(file: Path) -> Path:
    return next(package for package in PACKAGES if package in file.parents)


def broken(file: Path, source: str) -> list[str]:
    """What `source`, were it in `file`, would break of the rule."""
    tree = ast.parse(source)
    own = package_of(file).name
    faults = [
        f"imports {module}"
        for module, _ in imports(tree)
        if (top := module.split(".")[0]).startswith("peft_plus_") and top != own
    ]
    if file != BRIDGE:
        faults += [f"uses {name}; only {BRIDGE.name} may" for name in trainers(tree)]
    return faults


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_rule_holds(file: Path) -> None:
    assert broken(file, file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("package", "source"),
    [
        (CORE, "import peft_plus_freezing"),
        (CORE, "def f():\n    from peft_plus_freezing.gradual_unfreeze import GradualUnfreeze"),
        (CORE, "import importlib\nimportlib.import_module('peft_plus_freezing.gradual_unfreeze')"),
        (PACKAGES[-1], "from peft_plus_someone_else import x"),
        (CORE, "from transformers import Trainer"),
        (CORE, "from transformers.trainer import Trainer as T"),
        (CORE, "import transformers as tf\nclass Mine(tf.Trainer): ..."),
        (PACKAGES[-1], "from trl import SFTTrainer"),
    ],
)
def test_a_breach_is_seen(package: Path, source: str) -> None:
    assert broken(package / "new.py", source)


@pytest.mark.parametrize(
    ("package", "source"),
    [
        (CORE, "from .hf import Trainer"),
        (CORE, "from transformers import TrainerCallback, TrainingArguments"),
        (PACKAGES[-1], "from peft_plus import Plugin"),
        (PACKAGES[-1], f"from {PACKAGES[-1].name} import own"),
    ],
)
def test_what_is_allowed_passes(package: Path, source: str) -> None:
    assert broken(package / "new.py", source) == []


def test_every_file_is_named_for_its_subject() -> None:
    named = [file for file in ROOT.rglob("*.py") if not any(part[0] == "." for part in file.relative_to(ROOT).parts)]
    assert named
    assert [str(file.relative_to(ROOT)) for file in named if file.stem in EMPTY_NAMES] == []
