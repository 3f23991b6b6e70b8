"""The order of the data: one plugin sets it, every loop takes it, and whatever else would set it too is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch.utils.data import BatchSampler, Sampler, SequentialSampler
from transformers import default_data_collator

import peft_plus
from peft_plus import MethodError, Plugin, PluginError, Run, Stage, get_model

from .models import batch, tiny
from .training import quiet

ROWS = 12


class Backwards(Sampler[int]):
    """From the last to the first, and from another start in each epoch."""

    def __init__(self, length: int) -> None:
        self._length, self.epochs = length, []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        return iter((index - self.epochs[-1]) % self._length for index in reversed(range(self._length)))


@dataclass(kw_only=True)
class Ordered(Plugin):
    name: ClassVar[str] = "ordered"
    made: ClassVar[list[Any]] = []
    """What `sampler` was given and gave, outside the instance, which is copied."""

    def sampler(self, run: Run, dataset: Any) -> Sampler[int]:
        self.made.append((run, dataset, Backwards(len(dataset))))
        return self.made[-1][-1]


@dataclass(kw_only=True)
class Other(Ordered):
    name: ClassVar[str] = "other"


def giving(answer: Any) -> Plugin:
    """A plugin that answers with something else."""

    @dataclass(kw_only=True)
    class Odd(Plugin):
        name: ClassVar[str] = "odd"

        def sampler(self, run: Run, dataset: Any) -> Any:
            return answer(dataset)

    return Odd()


@pytest.fixture(autouse=True)
def _forget() -> None:
    Ordered.made.clear()


def rows() -> list[dict[str, Any]]:
    data = batch("bert", rows=ROWS)
    return [{"number": row, **{key: value[row] for key, value in data.items()}} for row in range(ROWS)]


class Recorded:
    """A collator that notes which rows make up each batch."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        self.batches.append([row["number"] for row in examples])
        return default_data_collator([{k: v for k, v in row.items() if k != "number"} for row in examples])


def trainer_of(folder: Any, plugins: list[Any], cls: Any = peft_plus.Trainer, data: Any = None, **settings: Any) -> Any:
    model = get_model(tiny("bert"), ["lora", *plugins])
    settings = {"remove_unused_columns": False, "num_train_epochs": 2, "per_device_train_batch_size": 4, **settings}
    return cls(model, quiet(folder, **settings), train_dataset=data or rows(), data_collator=Recorded())


def test_the_loader_follows_the_sampler_in_every_epoch(tmp_path):
    trainer = trainer_of(tmp_path, [Ordered()])
    trainer.train()
    assert trainer.data_collator.batches == [
        [11, 10, 9, 8],
        [7, 6, 5, 4],
        [3, 2, 1, 0],
        [10, 9, 8, 7],
        [6, 5, 4, 3],
        [2, 1, 0, 11],
    ]


def test_what_a_plugin_is_told(tmp_path):
    trainer = trainer_of(tmp_path, [Ordered()], seed=3, data_seed=5)
    trainer.train()
    ((run, dataset, _),) = Ordered.made
    assert dataset is trainer.train_dataset
    assert run.model is trainer.model
    assert (run.seed, run.batch_size, run.processes, run.step, run.optimizer) == (5, 4, 1, 0, None)
    assert run.stage == Stage()
    trainer_of(tmp_path, [Ordered()], seed=3).get_train_dataloader()
    assert Ordered.made[-1][0].seed == 3


def test_a_resumed_run_is_told_its_epoch(tmp_path):
    trainer_of(tmp_path, [Ordered()], save_strategy="steps", save_steps=1).train()
    resumed = trainer_of(tmp_path, [Ordered()])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert set(Ordered.made[-1][-1].epochs) == {1}
    assert resumed.data_collator.batches == [[6, 5, 4, 3], [2, 1, 0, 11]]


def test_without_an_answer_the_loops_own_order_holds(tmp_path):
    plain, asked = trainer_of(tmp_path, []), trainer_of(tmp_path, [giving(lambda _: None)])
    for trainer in (plain, asked):
        trainer.train()
    assert asked.data_collator.batches == plain.data_collator.batches
    assert plain.data_collator.batches[0] != sorted(plain.data_collator.batches[0])


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda data: list(range(len(data))), r"returned \[0, 1, 2"),
        (lambda data: BatchSampler(SequentialSampler(data), 4, False), "BatchSampler"),
        (lambda data: iter(range(len(data))), "range_iterator"),
    ],
    ids=["list", "batches", "iterator"],
)
def test_an_answer_that_is_no_sampler_of_indices_is_refused(answer, said, tmp_path):
    with pytest.raises(
        PluginError, match=rf"'odd'.*sampler {said if said.startswith('ret') else f'.*{said}'}.*indices"
    ):
        trainer_of(tmp_path, [giving(answer)]).train()


def test_a_plugin_that_fails_is_named(tmp_path):
    with pytest.raises(PluginError, match=r"plugin 'odd' .*failed in sampler.*TypeError"):
        trainer_of(tmp_path, [giving(lambda data: data + 1)]).train()


def test_two_plugins_that_set_the_order_are_refused_by_name(monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("The base's weights were loaded.")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)
    with pytest.raises(MethodError, match=r"plugin 'ordered' .* and plugin 'other' .* both set the order of the data"):
        get_model(tiny("bert"), ["lora", Ordered(), Other()])
    with pytest.raises(MethodError, match=r"'length_buckets' \(peft-plus-incremental .* and plugin 'ordered'"):
        get_model("some/model", ["lora", "length_buckets", Ordered()], task="SEQ_CLS", num_labels=2)


def test_two_plugins_may_set_the_order_of_different_stages():
    @dataclass(kw_only=True)
    class Two(Plugin):
        name: ClassVar[str] = "two"

        def plan_stages(self, stages: Any) -> Any:
            return [Stage(name="a", plugins=("ordered",)), Stage(name="b", plugins=("other",))]

    model = get_model(tiny("bert"), ["lora", Ordered(), Other(), Two()])
    assert [stage.name for stage in model.peft_plus.stages] == ["a", "b"]


@pytest.mark.parametrize("strategy", ["group_by_length", "sequential", "batch_rebalance"])
def test_a_strategy_of_the_arguments_beside_it_is_refused_when_the_trainer_is_built(strategy, tmp_path):
    with pytest.raises(MethodError, match=rf"plugin 'ordered' .*train_sampling_strategy='{strategy}'.*Leave one"):
        trainer_of(tmp_path, [Ordered()], train_sampling_strategy=strategy)


def test_data_that_bring_their_own_order_are_refused(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(rows())

    with pytest.raises(MethodError, match=r"plugin 'ordered' .*Stream has no length.*map-style"):
        trainer_of(tmp_path, [Ordered()], data=Stream(), max_steps=2).train()


def test_a_trainer_that_orders_its_data_itself_is_refused(tmp_path):
    class Own(transformers.Trainer):
        def _get_train_sampler(self, train_dataset=None):
            return SequentialSampler(train_dataset)

    class Whole(transformers.Trainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(self.train_dataset, 4, collate_fn=self.data_collator)

    with pytest.raises(MethodError, match=r"plugin 'ordered' .* so does Own"):
        trainer_of(tmp_path, [Ordered()], peft_plus.with_plugins(Own)).train()
    with pytest.raises(MethodError, match=r"plugin 'ordered' .* so does Whole"):
        trainer_of(tmp_path, [Ordered()], peft_plus.with_plugins(Whole)).train()
    trainer = trainer_of(tmp_path, [], peft_plus.with_plugins(Own))  # without such a plugin theirs holds
    trainer.train()
    assert trainer.data_collator.batches[0] == [0, 1, 2, 3]
