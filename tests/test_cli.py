"""The command line: what it prints, on what width, with which exit code, and what it must not import."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from peft_plus import __version__, describe, registry
from peft_plus.cli import app

ANSI = re.compile(r"\x1b\[[0-9;]*m")
HEAVY = ("torch", "peft", "transformers", "numpy", "accelerate", "datasets", "bitsandbytes")
NAMES = sorted({name for kind in registry.GROUPS for name in registry.entries(kind)})

PLUGIN = '''
from dataclasses import dataclass
from typing import ClassVar

from peft_plus import Plugin


@dataclass(kw_only=True)
class {cls}(Plugin):
    """{summary}"""

    name: ClassVar[str] = "{name}"
'''


@dataclass
class Shown:
    code: int
    out: str
    err: str

    @property
    def words(self) -> str:
        """What was printed, with every run of white space as one space."""
        return " ".join(self.out.split())


def run(*arguments: str, width: int = 80, terminal: bool = False) -> Shown:
    """The command in this process, on a terminal of that width or into a pipe."""
    env = {"COLUMNS": str(width), "FORCE_COLOR": "1" if terminal else None, "NO_COLOR": None}
    result = CliRunner().invoke(app, list(arguments), env=env)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return Shown(result.exit_code, result.stdout, result.stderr)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a distribution on the path, as a wheel would leave it: a module and its metadata."""

    def install(distribution: str, entries: str, code: str | None = None, readme: str = "") -> Path:
        folder = tmp_path / distribution
        info = folder / f"{distribution.replace('-', '_')}-1.5.dist-info"
        info.mkdir(parents=True)
        head = f"Metadata-Version: 2.4\nName: {distribution}\nVersion: 1.5\n"
        (info / "METADATA").write_text(f"{head}\n{readme}", "utf-8")
        (info / "entry_points.txt").write_text(f"[peft_plus.plugins]\n{entries}\n", "utf-8")
        if code is not None:
            (folder / f"{distribution.replace('-', '_')}.py").write_text(code, "utf-8")
        monkeypatch.syspath_prepend(folder)
        return info

    return install


# ---- list ----------------------------------------------------------------------------------------------------------


def test_list_imports_nothing_heavy() -> None:
    code = (
        "import sys; from peft_plus.cli import app; app(['list'], standalone_mode=False); "
        f"print('HEAVY', [m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "gradual_unfreeze" in done.stdout
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_list_shows_every_name_with_its_distribution() -> None:
    shown = run("list")
    assert shown.code == 0
    lines = shown.out.splitlines()
    for kind in registry.GROUPS:
        for entry in registry.entries(kind).values():
            (line,) = [text for text in lines if text.split()[:1] == [entry.name]]
            assert entry.origin in line, "in a pipe each name has one line, whatever the width"
            assert line.endswith(entry.summary or entry.origin)


@pytest.mark.parametrize(
    ("kind", "there", "absent"),
    [
        ("plugins", "llrd", "lora"),
        ("plugin", "llrd", "SEQ_CLS"),
        ("TASKS", "SEQ_CLS", "llrd"),
        ("tuners", "ia3", "r3f"),
    ],
)
def test_list_of_one_kind(kind: str, there: str, absent: str) -> None:
    names = [line.split()[:1] for line in run("list", kind).out.splitlines()]
    assert [there] in names
    assert [absent] not in names


def test_list_of_an_unknown_kind_names_the_nearest() -> None:
    shown = run("list", "plugs")
    assert (shown.code, shown.out) == (2, "")
    assert "Did you mean 'plugins'?" in shown.err


def test_list_json_is_the_registry() -> None:
    rows = json.loads(run("list", "--json").out)
    assert {row["name"] for row in rows} == set(NAMES)
    (row,) = [row for row in rows if row["name"] == "llrd"]
    assert row["kind"] == "plugin"
    assert row["distribution"] == "peft-plus-stability"
    assert row["target"] == "peft_plus_stability.llrd:LLRD"


def test_a_name_of_two_distributions_is_an_error_that_hides_nothing_else(install: Callable[..., Path]) -> None:
    install("first-comer", "twice = first_comer:Twice", PLUGIN.format(cls="Twice", name="twice", summary="One."))
    install("late-comer", "twice = late_comer:Twice", PLUGIN.format(cls="Twice", name="twice", summary="Two."))
    for arguments in ([], ["--json"]):
        shown = run("list", *arguments)
        assert shown.code == 1
        assert "first-comer 1.5" in " ".join(shown.err.split())
        assert "late-comer 1.5" in " ".join(shown.err.split())
        assert "SEQ_CLS" in shown.out
    assert run("list", "tasks").code == 0
    shown = run("info", "twice")
    assert (shown.code, shown.out) == (1, "")


def test_a_broken_distribution_is_listed_and_stops_only_who_names_it(install: Callable[..., Path]) -> None:
    install("no-package", "hollow = nowhere_at_all:Hollow")
    install("bad-syntax", "garbled = bad_syntax:Garbled", "class Garbled(:\n")
    shown = run("list", "plugins")
    assert shown.code == 0
    assert {"hollow", "garbled", "llrd"} <= {line.split()[0] for line in shown.out.splitlines() if line.strip()}
    for name, origin in (("hollow", "no-package 1.5"), ("garbled", "bad-syntax 1.5")):
        shown = run("info", name, width=200)
        assert (shown.code, shown.out) == (1, "")
        assert origin in shown.err
        assert "does not import" in shown.err


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_terminal_cuts_no_word(width: int) -> None:
    for arguments in (["list"], ["info", "r3f"], ["info", "SEQ_CLS"], ["info", "lora"]):
        shown = run(*arguments, width=width, terminal=True)
        assert ANSI.search(shown.out)
        plain = ANSI.sub("", shown.out)
        assert "…" not in plain
        assert max(map(len, plain.splitlines())) <= width
        # Folded words are whole again when the folds are taken out.
        joined = "".join(plain.split())
        if arguments[0] == "list":
            found = [entry for kind in registry.GROUPS for entry in registry.entries(kind).values()]
            expected = [text for entry in found for text in (entry.name, entry.origin)]
        else:
            expected = [s.name for s in describe.describe(arguments[1]).settings]
        assert [text for text in expected if "".join(text.split()) not in joined] == []


# ---- info ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 200])
def test_info_of_a_plugin_shows_all_of_it(width: int) -> None:
    shown = run("info", "gradual_unfreeze", width=width)
    assert shown.code == 0
    assert not ANSI.search(shown.out)
    for text in (
        "gradual_unfreeze plugin · peft-plus-freezing",
        "the embeddings last.",
        "p = ⌊step / interval⌋",
        "'epoch' | 'stall' | int",
        "a number of optimizer steps ≥ 1; or",
        "may_train, next_change, on_step_end",
        "layers: trainable parameters in the model's blocks",
        "Howard & Ruder 2018, arXiv:1801.06146",
        "peft_plus_freezing.gradual_unfreeze:GradualUnfreeze",
    ):
        assert text in shown.words
    assert "peft_plus_freezing/cards/gradual_unfreeze.md" in "".join(shown.out.split()), "folded where it is too long"


@pytest.mark.parametrize("name", NAMES)
def test_info_knows_every_name(name: str) -> None:
    shown = run("info", name, "--json")
    assert shown.code == 0
    facts = json.loads(shown.out)
    assert facts["name"] == name
    assert all(s["type"] for s in facts["settings"])
    if facts["kind"] != "tuner":
        assert facts["paragraphs"]
        assert all(s["meaning"] for s in facts["settings"]), "every setting of ours is explained in its docstring"
    assert run("info", name).code == 0


def test_info_of_a_tuner_shows_what_naming_it_gives() -> None:
    def settings(name: str) -> dict[str, object]:
        return {s["name"]: s["default"] for s in json.loads(run("info", name, "--json").out)["settings"]}

    lora = settings("lora")
    assert (lora["r"], lora["use_dora"]) == (8, False)
    assert "peft_type" not in lora, "what PEFT fills in itself is no setting"
    assert settings("dora")["use_dora"] is True
    assert settings("prompt_tuning")["num_virtual_tokens"] == 20
    assert settings("full") == {}
    assert "Lora attention dimension" in run("info", "lora").out


def test_info_of_an_unknown_name_names_the_nearest() -> None:
    shown = run("info", "gradual_unfreze", width=200)
    assert (shown.code, shown.out) == (2, "")
    assert "Did you mean 'gradual_unfreeze'?" in shown.err
    assert "Traceback" not in shown.err


CARD = """
# Title

## other

### Claim

Nothing.

## `paced`

### Claim

Faster.

### Measured verdict

{verdict}
"""


def test_the_verdict_comes_with_an_installed_wheel(install: Callable[..., Path]) -> None:
    code = PLUGIN.format(cls="Paced", name="paced", summary="Slow, then fast.")
    install("pace-maker", "paced = pace_maker:Paced", code, CARD.format(verdict="Measured: no evidence that it helps."))
    shown = run("info", "paced")
    assert "Slow, then fast." in shown.out
    assert re.search(r"^measured +no evidence that it helps\.$", shown.out, re.MULTILINE)
    assert "README of pace-maker 1.5, section 'paced'" in shown.out


def test_the_verdict_of_an_editable_install_is_that_of_the_file(install: Callable[..., Path], tmp_path: Path) -> None:
    code = PLUGIN.format(cls="Paced", name="paced", summary="Slow, then fast.")
    info = install("pace-maker", "paced = pace_maker:Paced", code, CARD.format(verdict="Measured: not yet."))
    source = tmp_path / "a folder"
    source.mkdir()
    (source / "README.md").write_text(CARD.format(verdict="Measured: +1.5 points."), "utf-8")
    (info / "direct_url.json").write_text(json.dumps({"url": source.as_uri(), "dir_info": {"editable": True}}))
    assert json.loads(run("info", "paced", "--json").out)["verdict"] == "Measured: +1.5 points."


def test_a_plugin_without_a_card_says_so(install: Callable[..., Path]) -> None:
    install("pace-maker", "paced = pace_maker:Paced", PLUGIN.format(cls="Paced", name="paced", summary="Slow."))
    assert "its distribution has no card for it" in run("info", "paced").out


# ---- the program ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", [["-m", "peft_plus"], ["-c", "from peft_plus.cli import main; main()"]])
def test_it_runs_as_a_program(program: list[str]) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *program, *arguments], capture_output=True, text=True, check=False)

    assert call("--version").stdout == f"peft-plus {__version__}\n"
    assert call("list", "tasks").returncode == 0
    wrong = call("info", "lorra")
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr


def test_an_encoding_without_greek_letters_is_no_error() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "peft_plus", "info", "r3f"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "loss = task loss + weight" in done.stdout
