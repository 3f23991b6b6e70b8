"""What users install: each distribution builds, holds what it should, and works in an empty environment."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROJECTS = {"peft_plus": ROOT} | {f"peft_plus_{path.name}": path for path in sorted(ROOT.glob("plugins/*"))}

pytestmark = pytest.mark.slow
Build = Callable[[str], "Built"]


@dataclass(frozen=True)
class Built:
    wheel: Path
    sdist: Path

    def wheel_files(self) -> set[str]:
        with zipfile.ZipFile(self.wheel) as archive:
            return set(archive.namelist())

    def sdist_files(self) -> set[str]:
        with tarfile.open(self.sdist) as archive:
            return {member.name.partition("/")[2] for member in archive if member.isfile()}

    def metadata(self) -> list[Requirement]:
        with zipfile.ZipFile(self.wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            fields = Parser().parsestr(archive.read(name).decode())
        return [Requirement(line) for line in fields.get_all("Requires-Dist", [])]


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command outside the repository; on failure show what it said."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Package → its sdist, and the wheel built from that sdist, as the package index would; each built once."""

    @functools.cache
    def build(package: str) -> Built:
        out = tmp_path_factory.mktemp(package)
        run(sys.executable, "-m", "build", "--outdir", out, PROJECTS[package], cwd=out)
        (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
        return Built(wheel, sdist)

    return build


@pytest.mark.parametrize("package", PROJECTS)
def test_wheel_holds_the_package_and_nothing_else(build: Build, package: str) -> None:
    source = PROJECTS[package] / package
    expected = {
        f"{package}/{file.relative_to(source).as_posix()}"
        for file in source.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    files = {file for file in build(package).wheel_files() if ".dist-info/" not in file}
    assert files == expected
    assert f"{package}/py.typed" in files
    assert not any("test" in file.split("/")[1:-1] or "tests" in file for file in files)
    assert any(file.endswith(".dist-info/licenses/LICENSE") for file in build(package).wheel_files())


@pytest.mark.parametrize("package", PROJECTS)
def test_sdist_holds_the_package_and_its_papers(build: Build, package: str) -> None:
    files = build(package).sdist_files()
    assert {"LICENSE", "README.md", "pyproject.toml", f"{package}/py.typed"} <= files
    assert (PROJECTS[package] / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    papers = {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "PKG-INFO", ".gitignore"}
    assert {file for file in files if not file.startswith(f"{package}/")} <= papers


@pytest.mark.parametrize("package", PROJECTS)
def test_dependencies_have_lower_bounds_only(build: Build, package: str) -> None:
    for requirement in build(package).metadata():
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators == {">="}, f"{package} requires {requirement}"


def test_all_installs_every_first_party_plugin(build: Build) -> None:
    extra = {
        re.sub(r"[-_.]+", "_", requirement.name)
        for requirement in build("peft_plus").metadata()
        if requirement.marker
        and requirement.marker.evaluate({"extra": "all"})
        and not requirement.marker.evaluate({"extra": ""})
    }
    assert extra == set(PROJECTS) - {"peft_plus"}


MODEL_SCRIPT = """
from peft import PeftModel
from transformers import BertConfig, BertModel

from peft_plus import get_model

shape = dict(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
BertModel(BertConfig(**shape)).save_pretrained("tiny")
model = get_model("tiny", method=["lora", "gradual_unfreeze", "confidence_penalty"], task="SEQ_CLS", num_labels=2)
assert isinstance(model, PeftModel)
print(type(model).__name__, model.config.num_labels)
"""


def test_works_in_an_empty_environment(build: Build, tmp_path: Path) -> None:
    """One test, not several over a fixture: the environment takes over a minute and must not be made per worker."""
    venv.create(tmp_path / "env", with_pip=True)
    bin = tmp_path / "env" / "bin"
    install = (bin / "python", "-m", "pip", "install", "-qq", "-c", ROOT / "constraints.txt")
    run(*install, "torch", cwd=tmp_path)
    core, *plugins = (build(package).wheel for package in PROJECTS)
    run(*install, f"{core}[all]", *plugins, cwd=tmp_path)
    run(bin / "python", "-m", "pip", "install", "-qq", ROOT / "examples" / "third_party_plugin", cwd=tmp_path)
    run(bin / "python", "-m", "pip", "check", cwd=tmp_path)

    listed = run(bin / "peft-plus", "list", cwd=tmp_path)
    for name in ("lora", "gradual_unfreeze", "llrd", "r3f", "lp_ft", "confidence_penalty", "SEQ_CLS"):
        assert name in listed
    assert "peft_plus_stability/cards/llrd.md" in "".join(run(bin / "peft-plus", "info", "llrd", cwd=tmp_path).split())

    (tmp_path / "script.py").write_text(MODEL_SCRIPT)
    assert run(bin / "python", "script.py", cwd=tmp_path) == "PeftModelForSequenceClassification 2\n"
