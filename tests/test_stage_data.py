"""The data that a stage trains on: plugins change them in order, and every loop takes them, resumed or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from accelerate import Accelerator
from peft import LoraConfig
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, SequentialSampler
from transformers import TrainerCallback, default_data_collator

import peft_plus
from peft_plus import MethodError, Plugin, PluginError, Run, Session, Stage, get_model
from peft_plus.epoch_data import keyed

from .models import batch, tiny
from .training import StopAt, quiet

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")

ROWS = 10
Row = dict[str, Any]


def rows(number: int = ROWS) -> list[Row]:
    data = batch("bert", rows=number)
    return [{"number": row, **{key: value[row] for key, value in data.items()}} for row in range(number)]


class Marked(Dataset[Any]):
    """Rows that say which epoch it is, in their first token."""

    def __init__(self, dataset: Any) -> None:
        self._dataset, self._epoch = dataset, 0
        self.told: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self.told.append(epoch)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Row:
        row = self._dataset[index]
        ids = row["input_ids"].clone()
        ids[0] = 50 + self._epoch
        return {**row, "input_ids": ids}


@dataclass(kw_only=True)
class Marks(Plugin):
    name: ClassVar[str] = "marks"
    made: ClassVar[list[tuple[Run, Any, Marked]]] = []
    """What `task_data` was given and gave, outside the instance, which is copied."""

    def task_data(self, run: Run, dataset: Any) -> Any:
        self.made.append((run, dataset, Marked(dataset)))
        return self.made[-1][-1]


@dataclass(kw_only=True)
class Shortens(Plugin):
    """Leaves the first rows."""

    name: ClassVar[str] = "shortens"
    rows: int = 5

    def task_data(self, run: Run, dataset: Any) -> Any:
        return [dataset[index] for index in range(self.rows)]


@pytest.fixture(autouse=True)
def _forget() -> None:
    Marks.made.clear()


class Recorded:
    """A collator that notes the number and the first token of each row of each batch."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, int]]] = []

    def __call__(self, examples: list[Row]) -> Any:
        self.batches.append([(row["number"], int(row["input_ids"][0])) for row in examples])
        return default_data_collator([{k: v for k, v in row.items() if k != "number"} for row in examples])

    @property
    def numbers(self) -> list[list[int]]:
        return [[number for number, _ in made] for made in self.batches]

    @property
    def epochs(self) -> list[int]:
        """Of each batch, whose rows all say the same."""
        return [token - 50 for made in self.batches for token in {token for _, token in made}]


def trainer_of(
    folder: Any,
    plugins: Sequence[Any],
    cls: Any = peft_plus.Trainer,
    callbacks: Sequence[TrainerCallback] = (),
    data: Any = None,
    **settings: Any,
) -> Any:
    torch.manual_seed(0)
    model = get_model(tiny("bert", hidden_dropout_prob=0.1), ["lora", *plugins])
    settings = {"remove_unused_columns": False, "num_train_epochs": 2, "per_device_train_batch_size": 4, **settings}
    return cls(
        model,
        quiet(folder, **settings),
        train_dataset=rows() if data is None else data,
        data_collator=Recorded(),
        callbacks=list(callbacks),
    )


def trained(trainer: Any, **settings: Any) -> dict[str, Tensor]:
    trainer.train(**settings)
    return {name: tensor.detach().clone() for name, tensor in trainer.model.named_parameters()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- what is trained on --------------------------------------------------------------------------------------------


def test_the_loader_reads_what_the_plugins_make_of_the_data_and_steps_follow_its_length(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, [Shortens(), Marks()])
    given = trainer.train_dataset
    trainer.train()
    assert sorted(chain(*trainer.data_collator.numbers[:2])) == [0, 1, 2, 3, 4]
    assert trainer.data_collator.epochs == [0, 0, 1, 1]
    assert trainer.state.global_step == trainer.state.max_steps == 4
    assert trainer.train_dataset is given
    assert len(given) == ROWS


def test_plugins_chain_in_the_users_order(tmp_path: Path) -> None:
    trainer_of(tmp_path, [Shortens(), Marks()]).get_train_dataloader()
    trainer_of(tmp_path, [Marks(), Shortens()]).get_train_dataloader()
    assert [len(given) for _, given, _ in Marks.made] == [5, ROWS]


def test_what_a_plugin_is_told(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, [Marks()], seed=3, data_seed=5)
    trainer.processing_class = "a tokenizer"
    trainer.get_train_dataloader()
    ((run, given, _),) = Marks.made
    assert given is trainer.train_dataset
    assert run.model is trainer.model
    assert (run.seed, run.batch_size, run.processes, run.step, run.optimizer) == (5, 4, 1, 0, None)
    assert (run.stage, run.tokenizer) == (Stage(), "a tokenizer")
    assert {param.name for param in run.params} == set(trainer.model.peft_plus.params)


def test_the_same_object_back_is_the_plain_run_bit_for_bit(tmp_path: Path) -> None:
    @dataclass(kw_only=True)
    class Idle(Plugin):
        name: ClassVar[str] = "idle"

        def task_data(self, run: Run, dataset: Any) -> Any:
            return dataset

    weights, seen = [], []
    for plugins in ([], [Idle()]):
        trainer = trainer_of(tmp_path, plugins)
        weights.append(trained(trainer))
        seen.append(trainer.data_collator.batches)
    assert same(*weights)
    assert seen[0] == seen[1]


def test_it_trains_as_if_the_user_had_given_the_other_data(tmp_path: Path) -> None:
    changed = trained(trainer_of(tmp_path, [Marks()]))
    plain = trained(trainer_of(tmp_path, [], data=Marked(rows())))
    assert same(changed, plain)
    assert not same(changed, trained(trainer_of(tmp_path, [])))


def test_evaluations_never_see_it(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, [Marks()], max_steps=1)
    trainer.train()
    before = len(trainer.data_collator.batches)
    trainer.evaluate(rows(4))
    plain = [(row["number"], int(row["input_ids"][0])) for row in rows(4)]
    assert list(chain(*trainer.data_collator.batches[before:])) == plain


def test_the_sampler_orders_what_is_trained_on(tmp_path: Path) -> None:
    @dataclass(kw_only=True)
    class Ordered(Plugin):
        name: ClassVar[str] = "ordered"

        def sampler(self, run: Run, dataset: Any) -> Sampler[int]:
            return SequentialSampler(dataset)

    trainer = trainer_of(tmp_path, [Ordered(), Shortens()], num_train_epochs=1)
    trainer.train()
    assert trainer.data_collator.numbers == [[0, 1, 2, 3], [4]]


def test_a_plugin_of_another_stage_is_not_asked(tmp_path: Path) -> None:
    @dataclass(kw_only=True)
    class Two(Plugin):
        name: ClassVar[str] = "two"

        def plan_stages(self, stages: Any) -> Any:
            return [Stage(name="a", plugins=("two",)), Stage(name="b", plugins=("marks",))]

    model = get_model(tiny("bert"), ["lora", Marks(), Two()])
    collate = Recorded()
    args = quiet(tmp_path, num_train_epochs=1, remove_unused_columns=False)
    peft_plus.fit(model, args, train_dataset=rows(8), data_collator=collate)
    first, second = collate.batches
    assert [token for _, token in second] == [50] * 8
    assert [token for _, token in first] != [50] * 8


def test_what_plugins_look_at_before_the_first_step_is_what_will_be_trained_on(tmp_path: Path) -> None:
    @dataclass(kw_only=True)
    class Looks(Plugin):
        name: ClassVar[str] = "looks"
        seen: dict[str, Tensor] = field(init=False, default_factory=dict)

        def on_stage_begin(self, run: Run) -> None:
            self.seen = {"ids": torch.cat([made["input_ids"] for made in run.examples(4)])}

    trainer = trainer_of(tmp_path, [Marks(), Looks()], max_steps=1)
    trainer.train()
    assert trainer.model.peft_plus.plugins[-1].seen["ids"][:, 0].tolist() == [50] * ROWS


# ---- which epoch it is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [2, 3, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_reads_the_rows_of_its_epoch_and_ends_bit_identical(
    workers: int, at: int, tmp_path: Path
) -> None:
    settings = {"save_strategy": "steps", "save_steps": at, "dataloader_num_workers": workers}
    whole = trained(trainer_of(tmp_path / "whole", [Marks()], **settings))
    trainer_of(tmp_path / "cut", [Marks()], callbacks=[StopAt(at)], **settings).train()
    resumed = trainer_of(tmp_path / "cut", [Marks()], **settings)
    assert same(whole, trained(resumed, resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{at}")))
    if not workers:  # which collate in processes of their own
        assert resumed.data_collator.epochs == [0, 0, 0, 1, 1, 1][at:]


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_that_outlive_an_epoch_read_the_rows_of_the_next(persistent: bool) -> None:
    data = rows(8)
    loader = DataLoader(
        Marked(data),
        batch_size=2,
        collate_fn=lambda made: [int(row["input_ids"][0]) for row in made],
        num_workers=2,
        persistent_workers=persistent,
    )
    tells = keyed(loader, seed=1, rank=0)
    assert tells is not None
    for epoch in (0, 1, 3):
        tells.begin(epoch, 0)
        assert [token for made in loader for token in made] == [50 + epoch] * 8


def test_an_epoch_is_told_where_accelerates_loader_does_not_reach_the_data() -> None:
    """With a sampler that wants to know the epoch, on several processes, it tells that one alone."""
    data = Marked(rows(8))
    loader = DataLoader(data, batch_size=8, collate_fn=list)  # type: ignore[arg-type]
    tells = keyed(loader, seed=1, rank=0)
    assert tells is not None
    tells.begin(2, 0)
    next(iter(loader))
    assert data.told == [2]


def session_run(
    plugins: Sequence[Any], folder: Path, *, stop: int = 0, resume: bool = False
) -> tuple[dict[str, Tensor], Recorded]:
    """Two epochs of three steps in a bare loop."""
    torch.manual_seed(0)
    model = get_model(tiny("bert", hidden_dropout_prob=0.1), ["lora", *plugins])
    accelerator, collate = Accelerator(cpu=True), Recorded()
    session = Session(model, accelerator, epochs=2)
    optimizer = session.optimizer(torch.optim.AdamW, lr=1e-2)
    loader = session.loader(rows(), batch_size=4, collate_fn=collate)
    if resume:
        assert session.resume(folder)
    for made in session.batches(loader):
        with accelerator.accumulate(session.model):
            accelerator.backward(session.loss(made))
            optimizer.step()
            optimizer.zero_grad()
        if stop and session.step == stop:
            session.save(folder)
            break
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}, collate


@pytest.mark.parametrize("at", [2, 3, 4])
def test_a_session_reads_them_too_and_resumes_bit_identical(at: int, tmp_path: Path) -> None:
    whole, seen = session_run([Shortens(rows=9), Marks()], tmp_path)
    assert seen.epochs == [0, 0, 0, 1, 1, 1]
    assert sorted(chain(*seen.numbers[3:])) == list(range(9))
    session_run([Shortens(rows=9), Marks()], tmp_path, stop=at)
    resumed, seen = session_run([Shortens(rows=9), Marks()], tmp_path, resume=True)
    assert same(whole, resumed)
    assert seen.epochs == [0, 0, 0, 1, 1, 1][at:]


# ---- what is refused -----------------------------------------------------------------------------------------------


def giving(answer: Any) -> Plugin:
    @dataclass(kw_only=True)
    class Odd(Plugin):
        name: ClassVar[str] = "odd"

        def task_data(self, run: Run, dataset: Any) -> Any:
            return answer(dataset)

    return Odd()


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(rows())


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda _: None, r"returned None; expected data with a length"),
        (lambda _: [], "returned data without rows"),
        (lambda data: iter(data), "returned <list_iterator .*expected data with a length"),
        (lambda _: Stream(), "returned <.*Stream.*expected data with a length"),
    ],
    ids=["None", "empty", "iterator", "stream"],
)
def test_an_answer_that_cannot_be_trained_on_is_refused(answer: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=rf"plugin 'odd' .*task_data {said}"):
        trainer_of(tmp_path, [giving(answer)]).train()


def test_a_stream_may_become_another_one_but_not_nothing(tmp_path: Path) -> None:
    class Doubled(Stream):
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __iter__(self) -> Any:
            return (row for row in self.inner for _ in range(2))

    trainer = trainer_of(tmp_path, [giving(Doubled)], data=Stream(), max_steps=2)
    trainer.train()
    assert trainer.data_collator.numbers[0] == [0, 0, 1, 1]
    with pytest.raises(PluginError, match="returned None; expected data"):
        trainer_of(tmp_path, [giving(lambda _: None)], data=Stream(), max_steps=2).train()


def test_a_plugin_that_fails_is_named_and_a_setting_that_does_not_fit_is_the_users_error(tmp_path: Path) -> None:
    def raises(_: Any) -> None:
        raise ValueError("give rows of tokens")

    with pytest.raises(PluginError, match=r"plugin 'odd' .*failed in task_data.*TypeError"):
        trainer_of(tmp_path, [giving(lambda data: data + 1)]).train()
    with pytest.raises(MethodError, match=r"plugin 'odd' .*: give rows of tokens"):
        trainer_of(tmp_path, [giving(raises)]).train()


def test_a_trainer_that_makes_its_loader_of_its_own_data_is_refused(tmp_path: Path) -> None:
    class Own(transformers.Trainer):
        def get_train_dataloader(self) -> Any:
            return DataLoader(rows(), 4, collate_fn=self.data_collator)  # type: ignore[arg-type]

    cls = peft_plus.with_plugins(Own)
    with pytest.raises(MethodError, match=r"plugin 'marks' .*changes the training data, and Own makes its loader"):
        trainer_of(tmp_path, [Marks()], cls).train()
    trainer_of(tmp_path, [], cls).train()


def test_a_store_of_features_is_refused_only_where_rows_are_drawn_anew(tmp_path: Path) -> None:
    def trainer(*plugins: Plugin) -> Any:
        method = [LoraConfig(layers_to_transform=[2]), "trunk_cache", *plugins]
        args = quiet(tmp_path, num_train_epochs=2, remove_unused_columns=False, per_device_train_batch_size=4)
        return peft_plus.Trainer(get_model(tiny("bert"), method), args, train_dataset=rows(), data_collator=Recorded())

    with pytest.raises(MethodError, match=r"trunk_cache stores .*plugin 'marks' .* makes other rows .*Leave one"):
        trainer(Marks()).train()
    trainer(Shortens()).train()
