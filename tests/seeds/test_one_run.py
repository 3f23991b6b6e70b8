"""One run: whose seed decides what, what is recorded, and how a run that was interrupted goes on."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

import peft_plus
from peft_plus import MethodError, Seeds
from peft_plus.seed_runs.one_run import _majority, clear, run_once
from tests.models import config
from tests.seeds.factories import BreaksOnce, Watch, made, plain, rows

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")

SAVING = {"save_strategy": "steps", "save_steps": 2}


def seeds_in(folder: Path, **values: int) -> Seeds:
    return Seeds(**{"number": 3, "init": 0, "order": 1, "dropout": 2, "shared": folder, **values})


def drawn() -> Any:
    """A model whose weights come from the global stream."""
    return AutoModelForSequenceClassification.from_config(config("bert", hidden_dropout_prob=0.1, num_labels=3))


def test_a_model_that_the_trainer_builds_itself_comes_from_the_seed_of_init(tmp_path: Path) -> None:
    def start(**values: int) -> tuple[dict[str, torch.Tensor], float]:
        watch = Watch()

        def factory(seeds: Seeds) -> Any:
            trainer = made(
                seeds, kind=transformers.Trainer, model_init=drawn, logging_steps=1, logging_strategy="steps"
            )
            trainer.add_callback(watch)
            return trainer

        losses: list[float] = []

        def first_loss(trainer: Any) -> dict[str, float]:
            losses.append(next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))
            return {}

        run_once(factory, seeds_in(tmp_path, **values), tmp_path / "run", evaluate=first_loss)
        return watch.start, losses[0]

    weights, loss = start()
    other_dropout, other_loss = start(dropout=5)
    other_init, _ = start(init=5)
    assert all(torch.equal(weights[name], other_dropout[name]) for name in weights)
    assert loss != other_loss
    assert not all(torch.equal(weights[name], other_init[name]) for name in weights)


def test_an_order_that_cannot_be_told_apart_from_dropout_is_refused(tmp_path: Path) -> None:
    factory = partial(made, accelerator_config={"use_seedable_sampler": False})
    with pytest.raises(MethodError, match="use_seedable_sampler"):
        run_once(factory, seeds_in(tmp_path), tmp_path / "run")


def test_a_run_records_its_seeds_time_memory_and_versions(tmp_path: Path) -> None:
    found = run_once(partial(made, eval_strategy="steps", eval_steps=3), seeds_in(tmp_path), tmp_path / "run")
    assert (found.number, dict(found.seeds)) == (3, {"init": 0, "order": 1, "dropout": 2})
    assert (found.steps, found.max_steps, found.resumed, found.finished) == (6, 6, 0, True)
    assert [step for step, _ in found.evaluations] == [3, 6]
    assert found.seconds > 0
    assert found.cpu_seconds > 0
    assert found.peak_bytes > 50e6
    assert found.versions["torch"] == torch.__version__
    labels = [int(label) for label in rows(8)["labels"]]
    assert found.majority == max(labels.count(label) for label in labels) / 8


def test_checkpoints_go_below_out_and_not_where_the_factory_said(tmp_path: Path) -> None:
    run_once(partial(made, folder=tmp_path / "theirs", **SAVING), seeds_in(tmp_path), tmp_path / "run")
    names = ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == names
    assert not list((tmp_path / "theirs").iterdir())


@pytest.mark.parametrize("kind", [peft_plus.Trainer, transformers.Trainer])
def test_an_interrupted_run_goes_on_from_its_newest_checkpoint(kind: Any, tmp_path: Path) -> None:
    breaks = BreaksOnce(3)

    def factory(seeds: Seeds) -> Any:
        trainer = made(seeds, kind=kind, **SAVING)
        trainer.add_callback(breaks)
        return trainer

    with pytest.raises(RuntimeError, match="no luck"):
        run_once(factory, seeds_in(tmp_path), tmp_path / "run")
    found = run_once(factory, seeds_in(tmp_path), tmp_path / "run")
    assert (found.resumed, found.steps) == (2, 6)
    whole = run_once(factory, seeds_in(tmp_path), tmp_path / "whole")
    if kind is peft_plus.Trainer:  # transformers alone does not promise it
        assert found.metrics["eval_loss"] == whole.metrics["eval_loss"]


@pytest.mark.parametrize("kind", [peft_plus.Trainer, transformers.Trainer])
def test_a_run_whose_checkpoints_are_all_damaged_begins_anew(
    kind: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    factory = partial(made, kind=kind, save_total_limit=1, **SAVING)
    first = run_once(factory, seeds_in(tmp_path), tmp_path / "run")
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    (checkpoint / "adapter_model.safetensors").write_bytes(b"torn")
    again = run_once(factory, seeds_in(tmp_path), tmp_path / "run")
    assert again.resumed == 0
    assert again.metrics["eval_loss"] == first.metrics["eval_loss"]
    assert "begins anew" in caplog.text


def test_clearing_leaves_what_is_not_the_trainers(tmp_path: Path) -> None:
    from peft_plus.checkpoint import REPLACED

    for name in ("checkpoint-3", f"{REPLACED}checkpoint-3", "_trunk", "adapter", "my-checkpoint-best"):
        (tmp_path / "run" / name).mkdir(parents=True)
    clear(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"adapter", "my-checkpoint-best"}
    (tmp_path / "empty" / "checkpoint-3").mkdir(parents=True)
    clear(tmp_path / "empty")
    assert not (tmp_path / "empty").exists()


@pytest.mark.parametrize("given", [None, 3, "trainer"])
def test_a_factory_that_gives_no_trainer_is_told_what_it_gave(given: Any, tmp_path: Path) -> None:
    def broken(seeds: Seeds) -> Any:
        return given

    with pytest.raises(MethodError, match=rf"broken returned {type(given).__name__}"):
        run_once(broken, seeds_in(tmp_path), tmp_path / "run")


def test_a_trainer_that_has_trained_is_refused(tmp_path: Path) -> None:
    trainer = made(seeds_in(tmp_path), folder=tmp_path / "own")
    trainer.train()
    with pytest.raises(MethodError, match="has trained for 6 steps"):
        run_once(lambda seeds: trainer, seeds_in(tmp_path), tmp_path / "run")


def test_an_evaluation_without_metrics_is_told(tmp_path: Path) -> None:
    evaluate: Any = lambda trainer: 0.5  # noqa: E731
    with pytest.raises(MethodError, match=r"evaluate returned 0\.5"):
        run_once(plain, seeds_in(tmp_path), tmp_path / "run", evaluate=evaluate)


@pytest.mark.parametrize(
    ("dataset", "share"),
    [
        ([{"labels": 1}, {"labels": 1}, {"labels": 0}], 2 / 3),
        ([{"label": torch.tensor(1)}, {"label": torch.tensor(0)}], 0.5),
        ([{"labels": 0.5}, {"labels": 1.0}], None),
        ([{"labels": [1, 2]}, {"labels": [1]}], None),
        ([{"labels": [1, 2]}, {"labels": [1, 1]}], None),
        ([{"input_ids": [1]}], None),
        ([], None),
        (None, None),
        ({"one": [{"labels": 1}]}, None),
        (Dataset.from_dict({"labels": [0, 2, 2, 2]}), 0.75),
        (Dataset.from_dict({"labels": [[0, 1], [1]]}), None),
        (Dataset.from_dict({"labels": [0.5, 1.0]}), None),
    ],
)
def test_the_largest_class_is_known_for_single_labels_alone(dataset: Any, share: float | None) -> None:
    assert _majority(dataset) == share
