"""`peft_plus.seeds`: runs that differ by their seeds alone; nothing finished is lost or made twice."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import peft_plus
from peft_plus import Racing, SeedRuns, Seeds, SuccessiveHalving, TrainingError, seeds
from peft_plus.seed_runs import compare_table
from peft_plus.seed_runs.axis import seeds_of
from peft_plus.seed_runs.one_run import run_once

from .factories import Watch, dies_always, dies_once, fails_once, made, plain

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")


def one(out: Path, *, init: int = 0, order: int = 0, dropout: int = 0, kind: Any = peft_plus.Trainer) -> Any:
    """What a run of these seeds begins with, sees, and loses."""
    watch, batches = Watch(), []

    def factory(given: Seeds) -> Any:
        trainer = made(given, kind=kind, logging_strategy="steps", logging_steps=1)
        trainer.add_callback(watch)
        collate = trainer.data_collator

        def noted(rows: Any) -> Any:
            batches.append(torch.stack([row["input_ids"] for row in rows]))
            return collate(rows)

        trainer.data_collator = noted
        factory.trainer = trainer
        return trainer

    run_once(factory, Seeds(number=0, init=init, order=order, dropout=dropout, shared=out), out / "run")
    losses = [entry["loss"] for entry in factory.trainer.state.log_history if "loss" in entry]
    return watch.start, torch.stack(batches[:6]), losses


@pytest.mark.parametrize("kind", [peft_plus.Trainer, transformers.Trainer])
def test_each_axis_changes_what_it_is_named_for_and_nothing_else(kind: Any, tmp_path: Path) -> None:
    start, seen, losses = one(tmp_path / "a", kind=kind)
    again = one(tmp_path / "b", kind=kind)
    assert all(torch.equal(start[name], again[0][name]) for name in start)
    assert torch.equal(seen, again[1])
    assert losses == again[2]
    other, same_order, _ = one(tmp_path / "c", init=1, kind=kind)
    assert not all(torch.equal(start[name], other[name]) for name in start)
    assert torch.equal(seen, same_order)
    same_start, other_order, _ = one(tmp_path / "d", order=1, kind=kind)
    assert all(torch.equal(start[name], same_start[name]) for name in start)
    assert not torch.equal(seen, other_order)
    same_start, same_order, other_losses = one(tmp_path / "e", dropout=1, kind=kind)
    assert all(torch.equal(start[name], same_start[name]) for name in start)
    assert torch.equal(seen, same_order)
    assert losses != other_losses


def test_axes_that_are_not_named_keep_the_base(tmp_path: Path) -> None:
    given = seeds_of(3, base=10, vary=("order",), shared=tmp_path)
    assert (given.init, given.order, given.dropout) == (10, 13, 10)


def test_results_say_what_was_evaluated_when_and_a_second_call_makes_nothing_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    factory = partial(made, eval_strategy="steps", eval_steps=2)
    runs = seeds(factory, 3, metric="accuracy", out=tmp_path)
    assert [r.number for r in runs.results] == [0, 1, 2]
    assert [step for step, _ in runs.results[0].evaluations] == [2, 4, 6]
    assert runs.results[0].evaluations[-1][1]["eval_accuracy"] == runs.values[0]
    assert all(r.steps == r.max_steps == 6 and r.finished for r in runs.results)
    with caplog.at_level(logging.INFO, logger="peft_plus"):
        more = seeds(factory, 4, metric="accuracy", out=tmp_path)
    assert "holds 3 of 4 results" in caplog.text
    assert more.results[:3] == runs.results
    assert SeedRuns.load(tmp_path) == more
    assert SeedRuns.load(tmp_path, metric="eval_loss").greater_is_better is False


def test_a_result_does_not_depend_on_the_runs_before_it(tmp_path: Path) -> None:
    alone = seeds(plain, 2, base=5, out=tmp_path / "a")
    among = seeds(plain, 3, base=4, out=tmp_path / "b")
    assert alone.values == {0: among.values[1], 1: among.values[2]}


@pytest.mark.slow
def test_several_processes_give_the_same_results(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    assert seeds(plain, 3, out=tmp_path / "a").values == seeds(plain, 3, out=tmp_path / "b", workers="auto").values


def test_a_failed_run_is_told_at_the_end_and_made_by_the_next_call(tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"1 of 3 runs failed, the first by ValueError: no luck.* 2 results are kept"
    ):
        seeds(fails_once, 3, out=tmp_path)
    assert "no luck" in (tmp_path / "run-1.error.txt").read_text()
    kept = json.loads((tmp_path / "run-2.json").read_text())
    (tmp_path / "shared" / "mended").touch()
    runs = seeds(fails_once, 3, out=tmp_path)
    assert len(runs.finished) == 3
    assert json.loads((tmp_path / "run-2.json").read_text()) == kept
    assert not (tmp_path / "run-1.error.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("factory", [dies_once, dies_always])
def test_a_process_that_is_killed_takes_no_result_with_it(factory: Any, tmp_path: Path) -> None:
    if factory is dies_once:
        assert len(seeds(factory, 3, out=tmp_path, workers=2).finished) == 3
        return
    with pytest.raises(TrainingError, match=r"1 of 3 runs failed, the first by The process .* died \(exit code -9\)"):
        seeds(factory, 3, out=tmp_path, workers=2)
    assert SeedRuns.load(tmp_path).values.keys() == {0, 2}
    assert "exit code -9" in (tmp_path / "run-1.error.txt").read_text()


def test_an_interrupted_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    class Interrupted(BaseException):
        pass

    calls: list[int] = []
    stop = False

    def factory(given: Seeds) -> Any:
        trainer = made(given, save_strategy="steps", save_steps=2)
        step = trainer.training_step

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(trainer.state.global_step)
            if stop and trainer.state.global_step == 4:
                raise Interrupted
            return step(*args, **kwargs)

        trainer.training_step = counted
        return trainer

    whole = seeds(factory, 2, out=tmp_path / "whole")
    calls.clear()
    stop = True
    with pytest.raises(Interrupted):
        seeds(factory, 2, out=tmp_path / "cut")
    assert calls == [0, 1, 2, 3, 4]
    calls.clear()
    stop = False
    again = seeds(factory, 2, out=tmp_path / "cut")
    assert calls == [4, 5, 0, 1, 2, 3, 4, 5]
    assert again.values == whole.values


# ---- racing --------------------------------------------------------------------------------------------------------


def test_racing_finishes_the_best_as_whole_runs_would(tmp_path: Path) -> None:
    """The schedule is the whole run's, and being judged changes nothing in it."""
    whole = seeds(plain, 4, out=tmp_path / "whole")
    evaluated = seeds(partial(made, eval_strategy="steps", eval_steps=3), 4, out=tmp_path / "evaluated")
    racing = Racing(fraction=0.5, keep=2)
    raced = seeds(plain, 4, out=tmp_path / "raced", racing=racing)
    early = {r.number: dict(r.evaluations)[3]["eval_loss"] for r in evaluated.results}
    best = sorted(sorted(early, key=early.__getitem__)[:2])
    assert [r.number for r in raced.finished] == best
    assert raced.values == {number: whole.values[number] for number in best}
    stopped = {r.number: r.metrics["eval_loss"] for r in raced.results if not r.finished}
    assert stopped == {number: early[number] for number in early if number not in best}
    assert all(r.resumed == 0 and r.seconds > 0 for r in raced.finished)
    assert not [path for path in (tmp_path / "raced").iterdir() if path.is_dir() and path.name != "shared"]
    report = raced.report()
    assert report.stopped == 2
    assert report.cost == pytest.approx(racing.cost(4) / 4)
    assert "Racing stopped 2 of 4 runs, and found" in str(report)
    again = seeds(plain, 4, out=tmp_path / "raced", racing=racing)
    assert again == raced


def test_successive_halving_stops_runs_that_are_behind(tmp_path: Path) -> None:
    factory = partial(made, eval_strategy="steps", eval_steps=1)
    halving = SuccessiveHalving(reduction_factor=2)
    runs = seeds(factory, 8, out=tmp_path, racing=halving)
    stopped = [r for r in runs.results if not r.finished]
    assert stopped
    assert all(r.steps < 6 for r in stopped)
    assert all(r.steps == 6 for r in runs.finished)
    assert runs.report().cost < 1
    assert seeds(factory, 8, out=tmp_path, racing=halving) == runs
    first = [dict(r.evaluations)[1]["eval_loss"] for r in runs.results]
    assert all(first[r.number] > min(first[: r.number]) for r in stopped if r.steps == 1)


# ---- the report ----------------------------------------------------------------------------------------------------


def test_the_report_says_mean_spread_and_failed_runs(tmp_path: Path) -> None:
    runs = seeds(plain, 3, metric="accuracy", out=tmp_path)
    values = torch.tensor(list(runs.values.values()), dtype=torch.float64)
    report = runs.report()
    assert report.mean.value == pytest.approx(values.mean().item())
    assert report.std.value == pytest.approx(values.std().item())
    labels = runs.results[0].majority
    assert report.failed == pytest.approx((values <= labels).double().mean().item())
    assert runs.report(majority=1.0).failed == 1.0
    folder = runs.save()
    assert json.loads((folder / "report.json").read_text())["n"] == 3
    assert "95 % intervals over the runs" in (folder / "report.md").read_text()


def test_two_trainings_are_compared_run_by_run(tmp_path: Path) -> None:
    slow = seeds(partial(made, learning_rate=1e-6), 3, out=tmp_path / "slow")
    fast = seeds(plain, 4, out=tmp_path / "fast")
    comparison = fast.compare(slow)
    assert comparison.n == 3
    differences = [fast.values[k] - slow.values[k] for k in range(3)]
    assert comparison.mean.value == pytest.approx(sum(differences) / 3)
    assert "| slow |" in compare_table({"fast": fast, "slow": slow}, baseline="fast")
    assert fast.plot(tmp_path / "spread.png", slow=slow).read_bytes().startswith(b"\x89PNG")


def test_the_function_keeps_its_name_whatever_is_imported() -> None:
    import peft_plus.seed_runs.runner

    assert peft_plus.seeds is peft_plus.seed_runs.runner.seeds


def test_a_trl_trainer_is_a_trainer(tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    from tests.models import tiny
    from tests.tokenizers import tiny_tokenizer
    from tests.training import quiet

    def factory(given: Seeds) -> Any:
        from datasets import Dataset

        data = Dataset.from_dict({"input_ids": [[4, 5, 6, 7, 8 + row] for row in range(8)]})
        model = peft_plus.get_model(tiny("llama", "CAUSAL_LM"), {"lora": {"r": 2}}, task="CAUSAL_LM")
        args = quiet("unused", kind=SFTConfig, max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2)
        kind = peft_plus.with_plugins(SFTTrainer)
        return kind(model, args=args, train_dataset=data, eval_dataset=data, processing_class=tiny_tokenizer())

    runs = seeds(factory, 2, out=tmp_path)
    assert len(set(runs.values.values())) == 2
    assert seeds(factory, 2, out=tmp_path / "again").values == runs.values


def test_a_second_seed_finds_the_trunk_that_the_first_stored(tmp_path: Path) -> None:
    """LoRA whose B is zero changes nothing, so runs whose bases are equal share the store."""

    def factory(given: Seeds) -> Any:
        trunk = {"folder": str(given.shared / "trunk"), "fill": "before"}
        return made(given, method={"lora": {"r": 2}, "freeze": {"blocks": 2}, "trunk_cache": trunk})

    def stored(trainer: Any) -> dict[str, float]:
        files = [file for file in (tmp_path / "shared" / "trunk").rglob("*") if file.is_file()]
        return {**trainer.evaluate(), "files": len(files), "newest": max(file.stat().st_mtime_ns for file in files)}

    first, second = seeds(factory, 2, out=tmp_path, evaluate=stored).results
    assert first.metrics["files"] > 1
    assert [second.metrics[name] for name in ("files", "newest")] == [
        first.metrics[name] for name in ("files", "newest")
    ]
