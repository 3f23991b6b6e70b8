"""Names → classes: what is listed, from where, and what it costs. Errors are in test_refusals.py."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import peft
import pytest

from peft_plus import MethodError, registry
from peft_plus.names import nearest
from peft_plus.registry import CORE_TUNERS, VARIANTS, Entry, entries, find, load
from peft_plus.tasks.seq_cls import SequenceClassification
from peft_plus_stability.llrd import LLRD


def test_plugins() -> None:
    found = entries("plugin")
    entry = found["llrd"]
    assert entry == Entry(
        "llrd",
        "plugin",
        "peft-plus-stability",
        version("peft-plus-stability"),
        "peft_plus_stability.llrd:LLRD",
        "A smaller learning rate the deeper a layer lies below the head.",
    )
    assert entry.origin == f"peft-plus-stability {version('peft-plus-stability')}"
    assert list(found) == sorted(found)
    assert set(registry.FIRST_PARTY) <= set(found)


def test_tasks() -> None:
    assert {
        "SEQ_CLS",
        "TOKEN_CLS",
        "QUESTION_ANS",
        "CAUSAL_LM",
        "SEQ_2_SEQ_LM",
        "MASKED_LM",
        "MULTIPLE_CHOICE",
        "FEATURE_EXTRACTION",
    } <= set(entries("task"))
    assert entries("task")["SEQ_CLS"].distribution == "peft-plus"


def test_tuners() -> None:
    found = entries("tuner")
    assert {found[name].distribution for name in (*CORE_TUNERS, *VARIANTS)} == {"peft-plus"}
    assert found["lora"].origin == f"peft {peft.__version__}"
    assert found["full"].summary == CORE_TUNERS["full"]
    assert {VARIANTS[name][0] for name in VARIANTS} <= set(found)


@pytest.mark.parametrize("kind", ["plugin", "tuner", "task"])
def test_every_summary_is_one_short_line(kind: registry.Kind) -> None:
    for name, entry in entries(kind).items():
        assert "\n" not in entry.summary
        assert len(entry.summary) < 400, name
        if entry.distribution.startswith("peft-plus"):
            assert entry.summary.endswith("."), name


def test_load() -> None:
    assert load(find("llrd", ("tuner", "plugin"))) is LLRD
    assert load(find("SEQ_CLS", ("task",))) is SequenceClassification
    with pytest.raises(MethodError, match="built into peft-plus"):
        load(find("full", ("tuner",)))


def test_find_looks_only_where_it_is_told() -> None:
    with pytest.raises(MethodError, match="No installed task is called 'lora'"):
        find("lora", ("task",))
    with pytest.raises(MethodError, match="No installed tuner or plugin is called 'SEQ_CLS'"):
        find("SEQ_CLS", ("tuner", "plugin"))


def test_listing_imports_no_plugin() -> None:
    code = """
import sys
from peft_plus import registry
for kind in ("plugin", "tuner", "task"):
    registry.entries(kind)
print(*(m for m in sys.modules if m.startswith(("peft_plus_", "peft_plus.tasks", "torch", "peft."))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_package_that_is_not_there() -> None:
    with pytest.raises(registry.PluginError, match="'no_such_package' is not installed"):
        registry._package_folder("no_such_package")


def test_a_peft_without_the_enum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils" / "peft_types.py").write_text("class TaskType: pass\n")
    monkeypatch.setattr(registry, "_package_folder", lambda package: tmp_path)
    registry.peft_tuners.cache_clear()
    with pytest.raises(registry.PluginError, match=r"no PeftType enum.*update peft-plus"):
        registry.peft_tuners()


@pytest.mark.parametrize(
    ("docstring", "line"),
    [
        (None, ""),
        ("One line.", "One line."),
        ("First.\n\nSecond.", "First."),
        ("A sentence over\n    two lines. Another.", "A sentence over two lines."),
        ("With 0.5 inside, e.g. this one (really). Then more.", "With 0.5 inside, e.g. this one (really)."),
    ],
)
def test_first_line(docstring: str | None, line: str) -> None:
    assert registry._first_line(docstring) == line


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("lorra", " Did you mean 'lora'?"),
        ("LORA", " Did you mean 'lora'?"),
        ("seq_cls", " Did you mean 'SEQ_CLS'?"),
        ("xyz", ""),
        ("", ""),
    ],
)
def test_nearest(name: str, hint: str) -> None:
    assert nearest(name, ["lora", "loha", "SEQ_CLS"]) == hint
