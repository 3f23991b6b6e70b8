"""A sample of PEFT's own tests: what plain PEFT passes, peft_plus passes. `make peft-tests` runs all of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.peft_suite.compare import Comparison, Difference, Row
from tests.peft_suite.suite import BIG, FILES, SMALL, Mode, renamed, run, unpack

SAMPLE = {
    BIG: 600,
    "test_config": 2,
    "test_initialization": 30,
    "test_lora_variants": 3,
    "test_mixed": 4,
    "test_tuners_utils": 5,
}
"""File → n: one test in n. The other files run whole."""

LIGHT = ("test_config", "test_low_level_api", "test_mapping", "test_other")
"""What is run in the third way too: files that cost little and import from all over PEFT."""


@pytest.mark.real
@pytest.mark.slow
def test_what_passes_with_plain_peft_passes_with_peft_plus(tmp_path: Path) -> None:
    def outcomes(mode: Mode, files: tuple[str, ...]) -> dict[str, str]:
        return run(mode, unpack(mode, tmp_path), files, sample=SAMPLE)

    plain = outcomes("plain", FILES)
    passed = Counter(test.partition("::")[0] for test, outcome in plain.items() if outcome == "passed")
    assert set(passed) == {f"tests/{name}.py" for name in FILES}  # nothing is compared where nothing passes
    assert Comparison(plain, outcomes("renamed", FILES)).differences() == []
    light = {test: outcome for test, outcome in plain.items() if test.split("/")[1].split(".")[0] in LIGHT}
    assert Comparison(light, outcomes("replaced", LIGHT)).differences() == []


@pytest.mark.real
def test_only_names_of_peft_change(tmp_path: Path) -> None:
    theirs, ours = (unpack(mode, tmp_path) / "tests" for mode in ("plain", "renamed"))
    for name in (*(f"{name}.py" for name in FILES), "testing_common.py", "testing_utils.py"):
        before, after = ((folder / name).read_text(encoding="utf-8").splitlines() for folder in (theirs, ours))
        changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
        assert changed
        assert all(new.replace("peft_plus", "peft", 1) == old for old, new in changed)


def test_renamed_covers_every_way_of_importing() -> None:
    source = """
import peft
import peft.tuners.lora as lora
from peft import (
    LoraConfig,
)
    from peft.utils import infer_device
with patch("peft.tuners.lora.layer.Linear"):
    raise ValueError("<class 'peft.tuners.lora.layer.Linear'>")  # a message names PEFT's class, as it should
"""
    assert (
        renamed(source)
        == """
import peft_plus as peft
import peft_plus.tuners.lora as lora
from peft_plus import (
    LoraConfig,
)
    from peft_plus.utils import infer_device
with patch("peft_plus.tuners.lora.layer.Linear"):
    raise ValueError("<class 'peft.tuners.lora.layer.Linear'>")  # a message names PEFT's class, as it should
"""
    )


def test_renamed_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"'import peft' still speaks of peft"):
        renamed("import peft, torch")


def test_a_broken_test_is_found() -> None:
    plain = {"tests/a.py::x": "passed", "tests/a.py::y": "failed", "tests/b.py::z": "passed"}
    ours = {"tests/a.py::x": "failed", "tests/a.py::y": "passed"}
    comparison = Comparison(plain, ours)
    assert comparison.broken() == [
        Difference("tests/a.py::x", "passed", "failed"),
        Difference("tests/b.py::z", "passed", "missing"),
    ]
    assert comparison.rows() == [Row("a", 2, 1, 1, 1, 2), Row("b", 1, 1, 0, 1, 1), Row("all", 3, 2, 1, 2, 3)]


def test_the_files_are_those_of_the_promise() -> None:
    assert len({BIG, *SMALL}) == 9
