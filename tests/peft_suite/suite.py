"""Unpacking PEFT's tests, putting peft_plus in PEFT's place, running them in a process of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from examples.inputs import folder

Mode = Literal["plain", "renamed", "replaced"]
"""`plain`: as PEFT ships them. `renamed`: their source says peft_plus where it said peft. `replaced`: their source is
untouched, and `sys.modules["peft"]` is peft_plus before anything else is imported."""

MODES: tuple[Mode, ...] = ("plain", "renamed", "replaced")
VERSION = "0.21.2"
BIG = "test_custom_models"
SMALL = (
    "test_config",
    "test_tuners_utils",
    "test_initialization",
    "test_low_level_api",
    "test_mapping",
    "test_mixed",
    "test_other",
    "test_lora_variants",
)
FILES = (BIG, *SMALL)

_CHILD = Path(__file__).parent / "child"
_RENAMES = (
    (re.compile(r"^(\s*from )peft(?=[. ])", re.MULTILINE), r"\1peft_plus"),
    (re.compile(r"^(\s*)import peft$", re.MULTILINE), r"\1import peft_plus as peft"),
    (re.compile(r"^(\s*import )peft(?=\.\S+ as )", re.MULTILINE), r"\1peft_plus"),
    (re.compile(r"(\bpatch\(\s*[\"'])peft(?=\.)"), r"\1peft_plus"),
)
_LEFT = re.compile(r"^\s*(?:from|import) peft\b|\bpatch\(\s*[\"']peft\.", re.MULTILINE)


def archive() -> Path:
    """PEFT's sdist among the inputs."""
    return _fetched(f"peft-tests/peft-{VERSION}.tar.gz")


def packages() -> Path:
    """What PEFT's tests import and nothing of ours does: diffusers and the like."""
    return _fetched("peft-tests/packages")


def unpack(mode: Mode, into: Path) -> Path:
    """PEFT's tests as a package in a fresh folder, in the way of `mode`. Returns where pytest is to be started."""
    root = into / mode
    shutil.rmtree(root, ignore_errors=True)
    with tarfile.open(archive()) as tar:
        top = f"peft-{VERSION}/"
        for member in tar:
            name = member.name.removeprefix(top)
            if member.isfile() and (name == "pyproject.toml" or re.fullmatch(r"tests/\w+\.py", name)):
                content = tar.extractfile(member)
                assert content is not None
                target = root / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content.read())
    (root / "tests" / "__init__.py").touch()  # they import each other relatively; the sdist leaves this file out
    if mode == "renamed":
        for path in (root / "tests").glob("*.py"):
            path.write_text(renamed(path.read_text(encoding="utf-8")), encoding="utf-8")
    return root


def renamed(source: str) -> str:
    """A test file whose imports and patches say peft_plus where they said peft."""
    for pattern, replacement in _RENAMES:
        source = pattern.sub(replacement, source)
    left = _LEFT.search(source)
    if left is not None:
        raise ValueError(f"{left.group()!r} still speaks of peft: teach renamed() this way of naming it.")
    return source


def run(
    mode: Mode,
    root: Path,
    files: Iterable[str] = FILES,
    *,
    sample: Mapping[str, int] | None = None,
    workers: int = 0,
) -> dict[str, str]:
    """Run test files in a child process.

    Args:
        mode: the way in which `unpack` made the folder.
        root: that folder.
        files: names of test files, without `.py`.
        sample: file → n: run only those of its tests whose id hashes to a multiple of n.
        workers: of pytest-xdist; 0 runs all in one process.
    Returns: test id → passed, failed, skipped, xfailed or collection failed.
    Raises:
        RuntimeError: pytest itself broke down.
    """
    record = root / "outcomes.json"
    record.unlink(missing_ok=True)
    plugins = ["in_place_of_peft", "record_outcomes"] if mode == "replaced" else ["record_outcomes"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=line",
        "--assert=plain",
        "--no-header",
        "-p",
        "no:cacheprovider",
    ]
    # Their options ask for pytest-cov, and worker processes that import a plugin by name need it on the path as well.
    command += ["-o", "addopts=", *(f"-p{name}" for name in plugins), *(["-n", str(workers)] if workers else [])]
    command += [f"tests/{name}.py" for name in files]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (_CHILD, packages()))),
        "PEFT_SUITE_RECORD": str(record),
        "PEFT_SUITE_SAMPLE": json.dumps({f"tests/{name}.py": every for name, every in (sample or {}).items()}),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    log = root / "pytest.log"
    with log.open("w", encoding="utf-8") as out:
        code = subprocess.run(command, cwd=root, env=environment, stdout=out, stderr=subprocess.STDOUT, check=False)
    if code.returncode not in (0, 1) or not record.is_file():  # 1: some tests failed, as those do that need the hub
        raise RuntimeError(
            f"pytest ended with {code.returncode}; {log} ends:\n{log.read_text(encoding='utf-8')[-3000:]}"
        )
    return json.loads(record.read_text(encoding="utf-8"))


def _fetched(path: str) -> Path:
    found = folder() / path
    if not found.exists():
        raise FileNotFoundError(f"{found} is missing. Run `make inputs` in the repository to fetch it.")
    return found
