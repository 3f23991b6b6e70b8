"""The benchmarks run and print their tables. What they measure is for a quiet machine; here only the small ones run."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import batching, overhead, stability, stability_cost
from benchmarks.turns import Turn, difference, take_turns
from peft_plus import SeedRuns
from peft_plus.seed_runs import RunResult


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """The benchmarks are programs of their own, and set what they need."""
    import datasets
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    yield
    torch.set_num_threads(1)
    if bars[0]:
        logging.enable_progress_bar()
    if not bars[1]:
        datasets.enable_progress_bars()


def rows(table: str) -> list[list[str]]:
    """Cells of a Markdown table, without its head."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:2] == "| "][
        1:
    ]


def tables(printed: str) -> list[list[list[str]]]:
    return [rows(part) for part in printed.split("\n\n") if part.startswith("| ")]


def test_loops_take_turns_and_only_their_own_steps_are_timed():
    order = []

    def loop(name: str, busy: float, idle: float):
        def run(turn: Turn) -> None:
            for step in range(5):
                turn()
                order.append((step, name))
                end = time.thread_time() + busy
                while time.thread_time() < end:
                    pass
                time.sleep(idle)
            turn()

        return run

    laps = take_turns({"short": loop("short", 0.01, 0.0), "long": loop("long", 0.02, 0.02)}, warm_up=1)
    rounds = [("long", "short"), ("short", "long")]
    assert order == [(step, name) for step in range(5) for name in rounds[step % 2]]
    assert [len(lap.cpu) for lap in laps.values()] == [4, 4]
    assert all(0.01 <= seconds < 0.018 for seconds in laps["short"].cpu)
    assert all(0.02 <= seconds < 0.028 for seconds in laps["long"].cpu)
    assert all(laps["long"].wall >= 0.04)


def test_a_loop_that_fails_ends_the_others():
    def fails(turn: Turn) -> None:
        turn()
        raise KeyError("broken")

    def endless(turn: Turn) -> None:
        while True:
            turn()

    with pytest.raises(KeyError, match="broken"):
        take_turns({"endless": endless, "fails": fails})


def test_differences_are_medians_over_pairs():
    found = difference(np.array([1.5, 2.5, 9.0]), np.array([1.0, 2.0, 3.0]))
    assert (found.step, found.more, found.share, found.pairs) == (2.0, 0.5, 0.25, 3)


def test_overhead_prints_its_tables(capsys: pytest.CaptureFixture[str]):
    assert overhead.main(["--quick"]) == 0
    steps, once, memory, checkpoint = tables(capsys.readouterr().out)
    assert [row[0] for row in steps] == ["PEFT + Trainer", "lora", "lora in a Session"]
    for row in steps:
        assert float(row[3]) > 0
        assert re.fullmatch(r"[+-]\d+ \([+-]\d+ to [+-]\d+\)", row[4])
        assert int(row[-1]) == 8
    assert [int(cell) > 0 for cell in once[0][1:]] == [True, True]
    assert [row[1] for row in memory] == ["Trainer", "Accelerate"]
    for _, _, plain, ours, equal in memory:
        assert (plain, equal) == (ours, "yes")
    assert [row[1] for row in checkpoint] == ["write", "resume", "bytes", "write", "bytes"]


def test_batching_prints_its_tables(capsys: pytest.CaptureFixture[str]):
    batching.main(["--quick", "--repeats", "1"])
    padding, times = tables(capsys.readouterr().out)
    assert [row[0] for row in times] == ["tiny SEQ_CLS", "tiny CAUSAL_LM"]
    for row in times:
        theirs, ours = map(float, row[-2].split(" → "))
        assert 1 <= ours < theirs  # the same examples, less padding
    for _, _, _, shuffled, grouped, buckets in padding:
        assert 1 <= float(buckets) < float(grouped) < float(shuffled)


def test_the_cost_of_a_stability_step_is_a_ratio_with_its_bound(capsys: pytest.CaptureFixture[str]) -> None:
    stability_cost.main(["--tiny", "--steps", "5", "--only", "ema", "clip"])
    (table,) = tables(capsys.readouterr().out)
    assert [row[0] for row in table] == ["ema", "clip"]
    assert all(float(row[1]) > 0.5 for row in table)
    assert table[0][3].startswith("≤ 1.1: ")
    assert table[1][3] == ""


def test_a_title_of_the_seeds_benchmark_is_a_method() -> None:
    assert stability.plugins_of("lora") == {}
    assert stability.plugins_of("r3f") == {"r3f": {"eps": 0.05}}
    assert stability.plugins_of('swa+{"ema": {"decay": 0.5}}') == {"swa": {}, "ema": {"decay": 0.5}}


def test_a_race_that_is_played_over_recorded_runs_costs_half_of_them() -> None:
    """Runs whose start tells the end: the best is found; judged late, fewer are started."""
    results = tuple(
        RunResult(
            number=k,
            seeds={},
            metrics={"eval_accuracy": 0.5 + k / 100},
            evaluations=tuple((step, {"eval_accuracy": 0.4 + k / 100}) for step in (3, 6, 10)),
            steps=10,
            max_steps=10,
        )
        for k in range(20)
    )
    runs = SeedRuns(results=results, metric="eval_accuracy", greater_is_better=True)
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in stability.raced(runs).splitlines()[2:]]
    assert [row[:4] for row in table] == [["30%", "1.00", "20", "5"], ["60%", "1.00", "16", "1"]]
    assert all(float(row[4]) <= 10 for row in table)
    assert table[0][7] == "64%"  # 1 − .95²⁰: the best of all is among 20 draws, which is the median best of so many


def test_a_recorded_run_that_diverged_loses_the_race() -> None:
    """Two of six diverged, one of them before it is judged; the best of the others is found."""

    def result(k: int) -> RunResult:
        steps = {4: 10, 5: 3}.get(k, 20)
        evaluations = tuple((step, {"eval_accuracy": k / 10}) for step in (6, 20) if step <= steps)
        metrics = {} if k >= 4 else {"eval_accuracy": k / 10}
        why = "" if metrics else "the loss"
        return RunResult(
            number=k, seeds={}, metrics=metrics, evaluations=evaluations, steps=steps, max_steps=20, diverged=why
        )

    runs = SeedRuns(results=tuple(map(result, range(6))), metric="eval_accuracy", greater_is_better=True)
    (row,) = [[cell.strip() for cell in line.split("|")[1:-1]] for line in stability.raced(runs).splitlines()[2:]]
    assert row[:4] == ["30%", "1.00", "6", "1"]
    # Judged best is the one that diverges later, wherever it is drawn; else the best of what is drawn of the others.
    assert 0 < float(row[7].rstrip("%")) <= 100 * (5 / 6) ** 6


def test_each_setting_of_the_seeds_benchmark_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, dict[str, object]]] = []
    monkeypatch.setattr("peft_plus.seeds", lambda make, n, *, out, **_: made.append((out.as_posix(), make.keywords)))
    given = {"seeds": 2, "base": 7, "epochs": 3.0, "workers": 1, "out": Path("out")}
    for rate, each in ((1e-2, False), (2e-2, False), (2e-2, True)):
        stability.measure("lora", argparse.Namespace(**given, rate=rate, each_epoch=each))
    assert [out for out, _ in made] == [
        "out/3-epochs-at-0.01/seeds-7/lora",
        "out/3-epochs-at-0.02/seeds-7/lora",
        "out/3-epochs-at-0.02/seeds-7/evaluated each epoch/lora",
    ]
    assert [(settings["rate"], settings.get("eval_strategy")) for _, settings in made] == [
        (1e-2, None),
        (2e-2, None),
        (2e-2, "epoch"),
    ]
