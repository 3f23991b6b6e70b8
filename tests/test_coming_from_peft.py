"""The scripts of "Coming from PEFT": both run, they agree without plugins, and the page shows them as they are.

`python -m tests.test_coming_from_peft --write` puts the scripts into the page.
"""

from __future__ import annotations

import difflib
import logging
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import peft_plus
from peft_plus import build, registry

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "coming_from_peft.md"
FOLDERS = sorted(path.parent for path in ROOT.glob("examples/coming_from_peft/*/before.py"))
MAX_LINES = 40
# The page names a script's folder in a link; the first `diff` block after it shows the two.
BLOCK = re.compile(r"(\(\.\./examples/coming_from_peft/(\w+)\).*?\n```diff\n)(.*?)(?=^```$)", re.MULTILINE | re.DOTALL)

pytestmark = [
    # Whoever runs the first script of each pair on this machine hears these too.
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found"),
]

Run = Callable[[str], "Result"]


class Result:
    """What a script leaves: its model, and the weights that it saved."""

    def __init__(self, model: Any, folder: Path) -> None:
        self.model = model
        self.saved = {
            f"{path.relative_to(folder)}: {name}": tensor
            for path in sorted(folder.rglob("*.safetensors"))
            if "out" not in path.relative_to(folder).parts
            for name, tensor in load_file(path).items()
        }

    def differs_from(self, other: Result) -> list[str]:
        """Names of tensors that are not the same to the bit, or that only one of the two has."""
        return sorted(differing(self.saved, other.saved) + differing(self.model.state_dict(), other.model.state_dict()))


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a
    return [name for name in {*a, *b} if name not in a or name not in b or not torch.equal(a[name], b[name])]


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    def run(script: str) -> Result:
        into = tmp_path / str(len(list(tmp_path.iterdir())))
        into.mkdir()
        monkeypatch.chdir(into)
        return Result(runpy.run_path(str(request.param / f"{script}.py"))["model"], into)

    return run


@pytest.fixture
def no_plugins(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every plan is made without the plugins that the script names; here are their names."""
    dropped: list[str] = []
    attach, get_model = build.attach, build.get_model

    def tuner_only(method: list[Any]) -> list[Any]:
        plugins = [item for item in method if isinstance(item, str) and item in registry.entries("plugin")]
        dropped.extend(plugins)
        return [item for item in method if item not in plugins]

    def attach_none(model: Any, method: list[Any]) -> Any:
        assert tuner_only(method) == []
        return attach(model, [])

    def get_model_without(model: Any, method: list[Any], **settings: Any) -> Any:
        return get_model(model, tuner_only(method), **settings)

    monkeypatch.setattr(build, "attach", attach_none)
    monkeypatch.setattr(build, "get_model", get_model_without)
    return dropped


def test_without_plugins_nothing_changes(
    run: Run, no_plugins: list[str], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        if "07_prompt_tuning" in request.node.name:
            # The one difference, which the page explains: transformers leaves the first label of each row out of the
            # count, because nothing precedes it. Virtual tokens do.
            patch.setattr(
                transformers.Trainer, "_loss_shifts_labels", property(lambda _: False, lambda *_: None), False
            )
        before = run("before")
    after = run("after")
    assert no_plugins
    assert after.differs_from(before) == []


def test_with_plugins_what_was_declared_is_proved(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    before = run("before")
    with caplog.at_level(logging.INFO, "peft_plus"):
        after = run("after")
    proofs = [record.getMessage() for record in caplog.records if record.getMessage().startswith("What trained in")]
    assert proofs
    assert all("adapter" in proof for proof in proofs)
    assert after.differs_from(before)
    assert after.saved.keys() == before.saved.keys()


# --- The page ---


def shown(folder: Path) -> str:
    """Both scripts in one: what stays, what goes (-), what comes (+)."""
    before, after = ((folder / f"{name}.py").read_text(encoding="utf-8").splitlines() for name in ("before", "after"))
    lines = list(difflib.unified_diff(before, after, n=len(before), lineterm=""))
    return "".join(line.rstrip() + "\n" for line in lines[3:])


def page() -> str:
    """The page with the scripts as they are now."""
    text = PAGE.read_text(encoding="utf-8")
    return BLOCK.sub(lambda block: block[1] + shown(FOLDERS[0].parent / block[2]), text)


def test_the_page_shows_every_script_as_it_is() -> None:
    assert [block[2] for block in BLOCK.finditer(PAGE.read_text(encoding="utf-8"))] == [path.name for path in FOLDERS]
    assert len(FOLDERS) == 10
    assert page() == PAGE.read_text(encoding="utf-8"), "Run: python -m tests.test_coming_from_peft --write"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_scripts_are_short_and_only_the_second_knows_us(folder: Path) -> None:
    before, after = ((folder / f"{name}.py").read_text(encoding="utf-8") for name in ("before", "after"))
    assert max(before.count("\n"), after.count("\n")) <= MAX_LINES
    assert "peft_plus" not in before
    assert not re.search(r"^\s*(import|from) peft\b", after, re.MULTILINE)


def test_the_page_names_what_exists() -> None:
    for name in re.findall(r"`peft_plus\.(?!json)(\w+)", PAGE.read_text(encoding="utf-8")):
        assert hasattr(peft_plus, name), name


if __name__ == "__main__" and "--write" in sys.argv:
    PAGE.write_text(page(), encoding="utf-8")
