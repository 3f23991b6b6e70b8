"""What users install: each distribution builds, holds what it should, and works in an empty environment."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROJECTS = {"peft_plus": ROOT} | {f"peft_plus_{path.name}": path for path in sorted(ROOT.glob("plugins/*"))}

# One process builds, whatever the number of workers.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging")]


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
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    """Package → its wheel and sdist; the wheel is built from the unpacked sdist, as the package index would."""
    found: dict[str, Built] = {}
    for package, project in PROJECTS.items():
        out = tmp_path_factory.mktemp(package)
        run(sys.executable, "-m", "build", "--outdir", out, project, cwd=out)
        (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
        found[package] = Built(wheel, sdist)
    return found


@pytest.fixture(scope="module")
def stranger(built: dict[str, Built], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of a new environment that holds our wheels, their dependencies and nothing else."""
    home = tmp_path_factory.mktemp("stranger")
    venv.create(home / "env", with_pip=True)
    python = home / "env" / "bin" / "python"
    install = (python, "-m", "pip", "install", "-qq", "-c", ROOT / "constraints.txt")
    run(*install, "torch", cwd=home)
    core, *plugins = (artefact.wheel for artefact in built.values())
    run(*install, f"{core}[all]", *plugins, cwd=home)
    return python


@pytest.mark.parametrize("package", PROJECTS)
def test_wheel_holds_the_package_and_nothing_else(built: dict[str, Built], package: str) -> None:
    source = PROJECTS[package] / package
    expected = {
        f"{package}/{file.relative_to(source).as_posix()}"
        for file in source.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    files = {file for file in built[package].wheel_files() if ".dist-info/" not in file}
    assert files == expected
    assert f"{package}/py.typed" in files
    assert not any("test" in file.split("/")[1:-1] or "tests" in file for file in files)
    assert any(file.endswith(".dist-info/licenses/LICENSE") for file in built[package].wheel_files())


@pytest.mark.parametrize("package", PROJECTS)
def test_sdist_holds_the_package_and_its_papers(built: dict[str, Built], package: str) -> None:
    files = built[package].sdist_files()
    assert {"LICENSE", "README.md", "pyproject.toml", f"{package}/py.typed"} <= files
    papers = {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "PKG-INFO", ".gitignore"}
    assert {file for file in files if not file.startswith(f"{package}/")} <= papers


@pytest.mark.parametrize("package", PROJECTS)
def test_dependencies_have_lower_bounds_only(built: dict[str, Built], package: str) -> None:
    for requirement in built[package].metadata():
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators == {">="}, f"{package} requires {requirement}"


def test_all_installs_every_first_party_plugin(built: dict[str, Built]) -> None:
    extra = {
        re.sub(r"[-_.]+", "_", requirement.name)
        for requirement in built["peft_plus"].metadata()
        if requirement.marker and requirement.marker.evaluate({"extra": "all"})
        and not requirement.marker.evaluate({"extra": ""})
    }
    assert extra == set(PROJECTS) - {"peft_plus"}


def test_environment_is_consistent(stranger: Path) -> None:
    run(stranger, "-m", "pip", "check", cwd=stranger.parent)


def test_command_lists_what_is_installed(stranger: Path) -> None:
    listed = run(stranger.parent / "peft-plus", "list", cwd=stranger.parent)
    for name in ("lora", "gradual_unfreeze", "llrd", "r3f", "lp_ft", "SEQ_CLS"):
        assert name in listed


def test_model_is_built(stranger: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        """
from peft import PeftModel
from transformers import BertConfig, BertModel

from peft_plus import get_model

shape = dict(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
BertModel(BertConfig(**shape)).save_pretrained("tiny")
model = get_model("tiny", method=["lora", "gradual_unfreeze"], task="SEQ_CLS", num_labels=2)
assert isinstance(model, PeftModel)
assert model.config.num_labels == 2
print(type(model).__name__)
"""
    )
    assert "PeftModelForSequenceClassification" in run(stranger, script, cwd=tmp_path)
