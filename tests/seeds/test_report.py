"""The report and comparisons of results that are written down here."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peft_plus import MethodError, SeedRuns, SuccessiveHalving
from peft_plus.seed_runs import RunResult, compare_table, optional
from peft_plus.seed_runs.results import SETTINGS, keep_result, write_whole


def runs(*values: float, metric: str = "eval_accuracy", majority: float | None = 0.6, **each: Any) -> SeedRuns:
    """Finished runs with these values."""
    common = {"seeds": {}, "steps": 10, "max_steps": 10, "majority": majority, **each}
    results = [RunResult(number=k, metrics={metric: v}, **common) for k, v in enumerate(values)]
    return SeedRuns(results=tuple(results), metric=metric, greater_is_better="loss" not in metric)


def test_the_numbers_are_numpys() -> None:
    values = [0.5, 0.6, 0.9, 0.7, 0.8]
    report = runs(*values).report()
    assert report.mean.value == pytest.approx(np.mean(values))
    assert report.std.value == pytest.approx(np.std(values, ddof=1))
    assert (report.least, report.median, report.most) == (0.5, 0.7, 0.9)
    assert report.mean.low < report.mean.value < report.mean.high
    assert report.std.low < report.std.value < report.std.high
    assert report.failed == 0.4  # at or below .6
    assert (report.stopped, report.cost) == (0, 1.0)
    assert str(report) == report.markdown()


@pytest.mark.parametrize("metric", ["eval_balanced_accuracy", "test_accuracy", "eval_f1", "eval_loss"])
def test_the_largest_class_measures_the_accuracy_of_its_own_data_alone(metric: str) -> None:
    report = runs(0.1, 0.9, metric=metric).report()
    assert report.failed is None
    assert "Which runs failed is unknown" in str(report)
    assert runs(0.1, 0.9, metric=metric).report(majority=0.5).failed == 0.5


def test_a_run_that_is_not_a_number_has_failed() -> None:
    assert runs(0.9, math.nan, 0.8, 0.7).report().failed == 0.25
    assert runs(0.9, math.nan, metric="eval_loss").report(majority=1.0).failed == 0.5


def test_runs_without_a_number_are_told_and_spoil_no_other_figure(tmp_path: Path) -> None:
    """One diverged, the metric of another is NaN."""
    some = runs(0.9, 0.8, math.nan, 0.7)
    some = replace(some, results=(*some.results, replace(some.results[0], number=4, metrics={}, diverged="the loss")))
    report, without = some.report(), runs(0.9, 0.8, 0.7).report()
    assert report.no_number == (2, 4)
    assert report.failed == 0.4
    assert (report.mean, report.std, report.expected_best) == (without.mean, without.std, without.expected_best)
    assert "2 of 5 runs ended without a number" in str(report)
    again = json.loads((some.save(tmp_path) / "report.json").read_text(), parse_constant=pytest.fail)
    assert again["values"]["4"] is None
    for result in some.results:
        keep_result(tmp_path, result)
    write_whole(tmp_path / SETTINGS, '{"metric": "eval_accuracy", "greater_is_better": true}')
    assert SeedRuns.load(tmp_path).report().as_dict().keys() == report.as_dict().keys()
    assert math.isnan(SeedRuns.load(tmp_path).values[2])
    assert SeedRuns.load(tmp_path).results[4].diverged == "the loss"


def test_a_run_that_ended_by_an_error_is_told(tmp_path: Path) -> None:
    write_whole(tmp_path / "run-2.error.txt", "no luck")
    write_whole(tmp_path / "run-0.error.txt", "no luck, but made again since")
    some = replace(runs(0.9, 0.8), folder=tmp_path)
    assert some.broken == some.report().broken == (2,)
    assert "1 runs ended by an error and have no result (2)" in str(some.report())


def test_a_run_that_collapsed_has_failed_though_fp32_rounds_upward() -> None:
    value = torch.tensor([1.0] * 8 + [0.0] * 7).mean().item()
    assert value > 8 / 15
    assert runs(value, 0.9, majority=8 / 15).report().failed == 0.5


def test_the_runs_that_racing_finished_are_not_taken_for_all() -> None:
    """One of four was finished: who failed is unknown, and the best to expect is that of all where they were judged."""
    early = (0.6, 0.7, 0.5, 0.65)
    whole = runs(*early)
    results = [
        replace(one, steps=3, finished=False, judged=one.metrics) if one.number != 1
        else replace(one, metrics={"eval_accuracy": 0.9}, judged=one.metrics)
        for one in whole.results
    ]  # fmt: skip
    report = replace(whole, results=tuple(results)).report()
    assert (report.n, report.stopped, report.failed, report.most) == (1, 3, None, 0.9)
    assert report.cost == pytest.approx((10 + 3 * 3) / 40)
    assert report.expected_best[1] == pytest.approx(np.mean(early))
    assert math.isnan(report.mean.low)
    assert "Racing stopped 3 of 4 runs, and found 0.9000 with 48 % of the steps of all." in str(report)
    assert "the best to expect of so many runs: of 1 0.6125" in str(report)
    with pytest.raises(ValueError, match="Racing chose which of these runs were finished"):
        whole.compare(replace(whole, results=tuple(results)))


def test_less_is_better_of_a_loss() -> None:
    report = runs(1.0, 0.2, 0.7, metric="eval_loss").report(majority=0.7)
    assert report.failed == pytest.approx(2 / 3)
    assert report.expected_best[2] < report.mean.value


def test_only_runs_in_one_go_tell_the_time() -> None:
    whole = runs(0.8, 0.9, cpu_seconds=8.0)
    part = replace(whole.results[1], cpu_seconds=2.0, resumed=7)
    assert replace(whole, results=(whole.results[0], part)).report().cpu_seconds == 8.0
    assert math.isnan(replace(whole, results=(part, replace(part, number=5))).report().cpu_seconds)


@pytest.mark.parametrize("values", [(), (0.5,)])
def test_a_spread_of_fewer_than_two_runs_is_refused(values: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=f"there are {len(values)}"):
        runs(*values).report()


def test_runs_are_compared_by_their_numbers() -> None:
    """The other's order and its further runs change nothing."""
    a = runs(0.8, 0.9, 0.7)
    b = runs(0.5, 0.7, 0.6, 0.1)
    comparison = a.compare(replace(b, results=b.results[::-1]))
    assert comparison.n == 3
    assert comparison.mean.value == pytest.approx((0.3 + 0.2 + 0.1) / 3)
    assert comparison.p == 0.25  # of eight signs, two give as large a mean
    assert comparison.std.value == pytest.approx(0.0)
    assert comparison.std_ratio.value == pytest.approx(1.0)
    with pytest.raises(ValueError, match="read them with one metric"):
        a.compare(runs(0.1, 0.2, metric="eval_loss"))
    with pytest.raises(ValueError, match=r"ended with a number in both; here \[0\]"):
        a.compare(replace(b, results=b.results[:1]))


def test_pairs_have_equal_seeds() -> None:
    a, b = (runs(0.8, 0.9, seeds={"init": seed}) for seed in (0, 100))
    with pytest.raises(ValueError, match=r"Run 0 of one has the seeds .*100.*only runs of equal base and vary"):
        a.compare(b)


def test_a_pair_without_a_number_is_left_out_and_told() -> None:
    comparison = runs(0.8, math.nan, 0.7, 0.9).compare(runs(0.5, 0.7, 0.6, math.nan))
    assert (comparison.n, comparison.left_out) == (2, (1, 3))
    assert comparison.mean.value == pytest.approx(0.2)
    assert comparison.p == 0.5
    assert "2 pairs, without 1, 3, which gave no number" in str(comparison)


def test_the_difference_of_spreads_is_redrawn_pair_by_pair() -> None:
    a = np.random.default_rng(0).normal(size=12)
    narrow, wide = runs(*a), runs(*(3 * a))
    ratio = wide.compare(narrow).std_ratio
    assert [ratio.value, ratio.low, ratio.high] == pytest.approx([3.0, 3.0, 3.0])


def test_a_spread_over_none_is_infinite_and_no_spread_at_all_the_same() -> None:
    some, none = runs(0.5, 0.6, 0.9, 0.7), runs(0.5, 0.5, 0.5, 0.5)
    assert some.compare(none).std_ratio.value == math.inf
    assert none.compare(none).std_ratio.value == 1.0


def test_the_table_holds_a_row_for_each_training_and_none_compared_with_itself() -> None:
    table = compare_table({"lora": runs(0.8, 0.6, cpu_seconds=2.0), "r3f": runs(0.9, 0.8, cpu_seconds=4.0)},
                          baseline="lora").splitlines()  # fmt: skip
    assert table[2].startswith("| lora | 2 | 0.7000 | 0.1414 | 0.6000 | 50 % | | | | 1.00 × |")
    assert table[3].startswith("| r3f | 2 | 0.8500 | 0.0707 | 0.8000 | 0 % | +0.1500 [")
    assert table[3].endswith("| 2.00 × |")
    with pytest.raises(ValueError, match="baseline='full' is none of"):
        compare_table({"lora": runs(0.1, 0.2)}, baseline="full")
    assert "100 %" in compare_table({"lora": runs(0.1, 0.2)}, baseline="lora", majority=0.3)


def test_one_drawing_holds_several_trainings(tmp_path: Path) -> None:
    target = runs(0.8, 0.9, 0.7).plot(tmp_path / "folder" / "spread.svg", r3f=runs(0.6, 0.7, math.nan))
    drawing = target.read_text()
    assert "<svg" in drawing
    assert "1 without a number" in drawing


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("matplotlib", lambda: runs(0.1, 0.2).plot("spread.png")),
        ("optuna", lambda: SuccessiveHalving().study([], "accuracy", True)),
    ],
)
def test_a_package_that_is_missing_is_named(name: str, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optional, "find_spec", lambda asked: None if asked == name else find_spec(asked))
    with pytest.raises(MethodError, match=rf"needs {name}, which is not installed: pip install {name}"):
        call()


def test_a_file_that_is_no_result_is_named(tmp_path: Path) -> None:
    write_whole(tmp_path / SETTINGS, '{"metric": "eval_accuracy", "greater_is_better": true}')
    for result in runs(0.5, 0.7).results:
        keep_result(tmp_path, result)
    assert SeedRuns.load(tmp_path) == runs(0.5, 0.7)
    (tmp_path / "run-1.json").write_text('{"number": 1}')
    with pytest.raises(MethodError, match=r"run-1\.json is not what this peft_plus writes"):
        SeedRuns.load(tmp_path)


def test_a_report_of_runs_from_nowhere_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="say where to"):
        runs(0.5, 0.7).save()
    assert (runs(0.5, 0.7).save(tmp_path / "new") / "report.md").is_file()
