"""`make demo` works from start to end, and what it keeps is what it measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm

from examples.demo.intervals import Estimate, bootstrap, verdict

ROOT = Path(__file__).resolve().parent.parent.parent


def demo(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "examples.demo", *options]
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.mark.real
@pytest.mark.slow
def test_quick_demo(tmp_path: Path) -> None:
    done = demo("--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "", "a library talks into the demo's output"

    results = json.loads((tmp_path / "results.json").read_text())
    assert results["quick"]
    plain, combined = results["comparison"]["methods"].values()
    assert list(combined["settings"]) == ["lora", "gradual_unfreeze", "llrd", "r3f"]
    for method in (plain, combined):
        assert method["trainable"] == 74_498  # r = 8 on query and value of 6 blocks of width 384, and the head
        assert len(method["dev"][0]) == 2
        assert method["accuracy"]["low"] <= method["accuracy"]["mean"] <= method["accuracy"]["high"]
    assert combined["terms"][0]["r3f"] > 1e-6, "r3f's noise is too small to have an effect"
    difference = combined["accuracy"]["mean"] - plain["accuracy"]["mean"]
    assert results["comparison"]["difference"]["mean"] == pytest.approx(difference)
    assert results["comparison"]["verdict"] in done.stdout.replace("\n", " ").replace("  ", " ")

    timeline = results["combination"]["timeline"]
    assert [len(change["groups"]) for change in timeline] == list(range(1, 8)), "one group more at each thaw"
    assert all(row["moved"] == row["tensors"] for row in results["combination"]["engagement"])

    assert results["reload"]["max_difference"] == 0
    assert results["reload"]["adapter_bytes"] < 0.01 * results["reload"]["base_bytes"]
    before, after = results["language_model"]["held_out"]
    assert after < before


def test_missing_inputs_say_how_to_get_them(tmp_path: Path) -> None:
    done = demo("--out", str(tmp_path / "out"), PEFT_PLUS_INPUTS=str(tmp_path))
    assert done.returncode == 1
    assert "make inputs" in done.stderr
    assert "Traceback" not in done.stderr


def test_bootstrap_agrees_with_the_normal_interval() -> None:
    values = np.random.default_rng(1).choice([0.0, 0.5, 1.0], size=1_000, p=[0.2, 0.1, 0.7])
    estimate = bootstrap(values)
    half = norm.ppf(0.975) * values.std() / np.sqrt(len(values))
    assert estimate.mean == values.mean()
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.1 * half)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.01, 0.03, "helped"), (-0.03, -0.01, "hurt"), (-0.01, 0.03, "No evidence"), (0.0, 0.0, "No evidence")],
)
def test_verdict_says_no_more_than_the_interval(low: float, high: float, said: str) -> None:
    assert said in verdict(Estimate((low + high) / 2, low, high))
