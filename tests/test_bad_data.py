"""Bad data: each is an error that names row, column and fix, before the first pass where it can be known, and loses
nothing that was learned before it.

Also found before training, and tested elsewhere: rows of different length without a tokenizer (test_arguments), texts
that are empty or None, unknown columns and label names (tests of `Task.preprocess`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import Dataset, IterableDataset
from transformers import DataCollatorWithPadding, default_data_collator

from peft_plus import DataError, MethodError, Session
from peft_plus.data_columns import check_columns
from peft_plus.data_limits import Limits, check_batch

from .bad_inputs import Watched, after, built, free, holds, refused, rows, same, spoilt, stopped, trainer, weights
from .models import VOCAB, tiny
from .tokenizers import tiny_tokenizer


def table(made: list[dict[str, Any]]) -> datasets.Dataset:
    return datasets.Dataset.from_list([{key: value.tolist() for key, value in row.items()} for row in made])


def without(column: str, **more: Any) -> datasets.Dataset:
    data = table(rows()).remove_columns(column)
    for name, values in more.items():
        data = data.add_column(name, values)
    return data


def classes(values: Any) -> datasets.Dataset:
    return without("labels", labels=list(values))


# ---- known before training ---------------------------------------------------------------------------------------

FOUND: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "no rows": (list, {}, ("train_dataset has no rows",)),
    "a table without rows": (lambda: table(rows()).select([]), {}, ("train_dataset has no rows",)),
    "less than one batch": (
        lambda: rows(count=3),
        {"dataloader_drop_last": True},
        ("dataloader_drop_last=True", "3 rows", "per_device_train_batch_size"),
    ),
    "a label above the classes": (
        lambda: classes([0, 1, 2, 3, 7, 1] * 4),
        {},
        (r"train_dataset\[3\]\['labels'\]: 3", r"0 … 2 \(num_labels=3\)", "num_labels=8 or more"),
    ),
    "a label above the classes, in plain rows": (
        lambda: spoilt(17, "labels", 3),
        {},
        (r"train_dataset\[17\]\['labels'\]: 3", "num_labels=4 or more"),
    ),
    "a label above the classes, past a selection": (
        lambda: table(spoilt(17, "labels", 3)).select(range(15, 20)),
        {},
        (r"train_dataset\[2\]",),
    ),
    "a hidden label": (
        lambda: classes([-1] * 24),
        {},
        (r"train_dataset\[0\]\['labels'\]: -1", "a label that is to be ignored is -100"),
    ),
    "float labels for classes": (
        lambda: classes([0.0, 1.0, 2.0] * 8),
        {},
        ("'labels'.: 0.0 is a float", "whole numbers 0 … 2", "convert the column"),
    ),
    "names for labels": (
        lambda: classes(["good", "bad", "fair"] * 8),
        {},
        ("column 'labels', row 0: 'good' is text", "task.preprocess"),
    ),
    "labels under another name that transformers knows": (
        lambda: without("labels", label=[0, 1, 5] * 8),
        {},
        (r"train_dataset\[2\]\['label'\]: 5",),
    ),
    "a missing label": (lambda: classes([0, None, 1] * 8), {}, ("column 'labels', row 1: there is no value", "drop")),
    "a token id past the vocabulary": (
        lambda: table(spoilt(5, "input_ids", VOCAB)),
        {},
        (r"train_dataset\[5\]\['input_ids'\]: 100", "vocabulary of 100", "resize_token_embeddings"),
    ),
    "a negative token id": (lambda: spoilt(5, "input_ids", -1), {}, (r"train_dataset\[5\]\['input_ids'\]: -1",)),
    "a bad label to evaluate on": (
        rows,
        {"eval_dataset": spoilt(2, "labels", 9), "eval_strategy": "steps", "eval_steps": 1},
        (r"eval_dataset\[2\]\['labels'\]: 9",),
    ),
    "nothing to evaluate on": (
        rows,
        {"eval_dataset": [], "eval_strategy": "steps", "eval_steps": 1},
        ("eval_dataset has no rows",),
    ),
    "a bad label in one of several sets": (
        rows,
        {"eval_dataset": {"a": rows(), "b": spoilt(2, "labels", 9)}, "eval_strategy": "epoch"},
        (r"eval_dataset\['b'\]\[2\]\['labels'\]: 9",),
    ),
}


@pytest.mark.parametrize("case", FOUND)
def test_found_before_training(case: str, tmp_path: Path) -> None:
    data, given, says = FOUND[case]
    model = built(["lora", "gradual_unfreeze"])
    before, watch = weights(model), Watched(model)
    run = trainer(model, tmp_path, data(), **given)
    refused(run.train, DataError, *says)
    assert watch.passes == 0
    assert run.optimizer is None
    assert same(model, before)
    assert free(model)


@pytest.mark.parametrize(
    ("task", "row", "column", "value", "says"),
    [
        ("TOKEN_CLS", 4, "labels", 3, (r"train_dataset\[4\]\['labels'\]: 3", "num_labels=4")),
        ("MASKED_LM", 4, "labels", VOCAB, (r"train_dataset\[4\]\['labels'\]: 100", "vocabulary=100")),
    ],
)
def test_labels_of_tokens(task: str, row: int, column: str, value: int, says: tuple[str, ...], tmp_path: Path) -> None:
    model = built("lora", task=task)
    watch = Watched(model)
    for data in (spoilt(row, column, value, task=task), table(spoilt(row, column, value, task=task))):
        refused(trainer(model, tmp_path, data).train, DataError, *says)
    assert watch.passes == 0


def test_more_labels_than_tokens(tmp_path: Path) -> None:
    model = built("lora", task="TOKEN_CLS")
    watch, data = Watched(model), rows(task="TOKEN_CLS")
    data[7]["labels"] = torch.cat([data[7]["labels"], data[7]["labels"]])
    for given in (data, table(data)):
        refused(trainer(model, tmp_path, given).train, DataError, r"train_dataset\[7\] has 8 input_ids and 16 labels")
    assert watch.passes == 0


def test_whole_numbers_for_a_regression(tmp_path: Path) -> None:
    from peft_plus import get_model

    model = get_model(tiny("bert", num_labels=1), "lora")
    watch = Watched(model)
    refused(trainer(model, tmp_path, classes([0, 1] * 12)).train, DataError, "is a whole number", "takes floats")
    refused(trainer(model, tmp_path, classes([0.5, float("nan")] * 12)).train, DataError, r"\[1\].*no finite number")
    assert watch.passes == 0
    trainer(model, tmp_path, classes([0.5, 0.1] * 12), max_steps=1).train()


def test_what_is_fine_stays_so(tmp_path: Path) -> None:
    """−100 for a label that is ignored; labels and rows that a collator or a loss of the user's own understands."""
    trainer(built(), tmp_path, classes([0, -100, 2, 1] * 6)).train()

    def shifted(made: list[Any]) -> Any:
        batch = default_data_collator(made)
        batch["labels"] = batch["labels"] - 1
        return batch

    trainer(built(), tmp_path, classes([1, 2, 3] * 8), data_collator=shifted).train()

    def own_loss(output: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        return (output.logits.logsumexp(-1) * (labels == -1)).mean()

    trainer(built(), tmp_path, classes([-1, 7, 0] * 8), compute_loss_func=own_loss).train()


def test_columns_that_the_model_does_not_take(tmp_path: Path) -> None:
    """What a collator of the user's own makes of them, only the batch can tell."""
    model = built()
    watch = Watched(model)
    plain = [{"text": "a", "stars": 1}] * 8
    for text in (plain, datasets.Dataset.from_list(plain), datasets.Dataset.from_dict({"text": ["a"], "labels": [1]})):
        refused(
            trainer(model, tmp_path, text).train,
            DataError,
            "train_dataset has no column 'input_ids'",
            "task.preprocess",
        )

    def mine(made: list[Any]) -> Any:
        return default_data_collator(made)

    refused(
        trainer(model, tmp_path, plain, data_collator=mine).train,
        DataError,
        r"batch of train_dataset\[0, 1, 2, 3\] is empty",
        "rename the columns",
    )
    assert watch.passes == 0


def test_no_labels_at_all(tmp_path: Path) -> None:
    model = built()
    before = weights(model)
    run = trainer(model, tmp_path, without("labels", stars=[1] * 24))
    refused(run.train, DataError, "hold no labels", "Name the column 'labels'", "'stars'")
    assert same(model, before)


def test_no_data(tmp_path: Path) -> None:
    run = trainer(built(), tmp_path, [])
    run.train_dataset = None
    refused(run.train, ValueError, "training requires a train_dataset")
    data = rows()
    refused(
        lambda: trainer(built(), tmp_path, data, eval_strategy="epoch"), ValueError, "eval_strategy", "eval_dataset"
    )


class Stream(IterableDataset[Any]):
    def __init__(self, made: list[Any], fails_at: int = -1) -> None:
        self.made, self.fails_at = made, fails_at

    def __iter__(self) -> Any:
        for i, row in enumerate(self.made):
            if i == self.fails_at:
                raise OSError("connection reset")
            yield row


def test_streams(tmp_path: Path) -> None:
    refused(
        lambda: trainer(built(), tmp_path, Stream(rows()), max_steps=-1, num_train_epochs=1.0), ValueError, "max_steps"
    )
    model = built()
    watch = Watched(model)
    refused(trainer(model, tmp_path, Stream([])).train, DataError, "gave no batch: it is empty")
    refused(
        trainer(model, tmp_path, Stream(spoilt(1, "labels", 8))).train,
        DataError,
        r"row 1 of a batch of train_dataset, 'labels': 8",
        "num_labels=9",
    )
    assert watch.passes == 0


# ---- known when the row is read ----------------------------------------------------------------------------------


class Broken(Dataset[Any]):
    """Raises in one row."""

    def __init__(self, row: int = 13, error: type[Exception] = ZeroDivisionError) -> None:
        self.made, self.row, self.error = rows(), row, error

    def __len__(self) -> int:
        return len(self.made)

    def __getitem__(self, index: int) -> Any:
        if index == self.row:
            raise self.error("picture is truncated")
        return self.made[index]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_cannot_be_read(workers: int, tmp_path: Path) -> None:
    """Row 13 is in batch 3, and batches are fetched one ahead: two steps are done."""
    model = built(["lora", "llrd"])
    expected = after(2, built(["lora", "llrd"]), tmp_path)
    run = trainer(model, tmp_path, Broken(), dataloader_num_workers=workers)
    refused(
        run.train,
        DataError,
        r"train_dataset\[13\] could not be read: ZeroDivisionError: picture is truncated",
        "after 2 finished steps",
        "stopped",
    )
    assert same(model, expected)
    assert holds(stopped(tmp_path), expected)
    assert free(model)


@pytest.mark.parametrize("error", [StopIteration, IndexError, KeyError])
def test_an_error_that_python_would_take_for_the_end_is_none(error: type[Exception], tmp_path: Path) -> None:
    refused(trainer(built(), tmp_path, Broken(error=error)).train, DataError, rf"\[13\].*{error.__name__}")


def test_a_row_that_datasets_cannot_make(tmp_path: Path) -> None:
    def decode(made: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if 13 in made["index"]:
            raise OSError("no such picture")
        return {key: torch.tensor(values) for key, values in made.items() if key != "index"}  # type: ignore[misc]

    data = table(rows()).add_column("index", list(range(24))).with_transform(decode)
    run = trainer(built(), tmp_path, data, remove_unused_columns=False)
    refused(run.train, DataError, r"train_dataset\[13\] could not be read: OSError: no such picture")


def test_a_stream_that_breaks_off(tmp_path: Path) -> None:
    model = built()
    refused(
        trainer(model, tmp_path, Stream(rows(), fails_at=13)).train,
        DataError,
        "could not give the batches of the step after step 2: OSError: connection reset",
    )
    assert holds(stopped(tmp_path), weights(model))


def _ragged(made: list[Any]) -> Any:
    return default_data_collator([{**row, "input_ids": row["input_ids"][: 4 + i]} for i, row in enumerate(made)])


COLLATORS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "raises": (lambda made: 1 / 0, ("The collator <lambda>", r"train_dataset\[0, 1, 2, 3\]", "ZeroDivisionError")),
    "returns a list": (lambda made: made, ("made a list", "expected a mapping")),
    "returns nothing": (lambda made: None, ("made a NoneType", "expected a mapping")),
    "makes rows of different length": (_ragged, ("The collator _ragged", "ValueError|RuntimeError")),
    "makes a bad label": (
        lambda made: {**default_data_collator(made), "labels": torch.tensor([0, 1, 5, 0])},
        (r"train_dataset\[2\], 'labels': 5",),
    ),
}


@pytest.mark.parametrize("case", COLLATORS)
def test_a_collator_that(case: str, tmp_path: Path) -> None:
    collate, says = COLLATORS[case]
    model = built()
    before, watch = weights(model), Watched(model)
    refused(trainer(model, tmp_path, data_collator=collate).train, DataError, *says)
    assert watch.passes == 0
    assert same(model, before)


def test_ragged_rows_past_those_that_were_looked_at(tmp_path: Path) -> None:
    """The first 64 rows decide whether a collator is missing; the 65th may still differ."""
    data = [{**row} for row in rows(count=72)]
    data[70]["input_ids"] = data[70]["input_ids"][:5]
    run = trainer(built(), tmp_path, data, per_device_train_batch_size=24)
    refused(run.train, DataError, "train_dataset.48, 49", "Lengths differ: 'input_ids' 5 to 8", "data_collator")


def test_rows_with_other_columns(tmp_path: Path) -> None:
    data = rows()
    del data[2]["attention_mask"]
    refused(trainer(built(), tmp_path, data).train, DataError, "Rows differ in their columns", "attention_mask")


def test_a_batch_that_goes_bad_later_keeps_what_was_learned(tmp_path: Path) -> None:
    class Late(Broken):
        def __getitem__(self, index: int) -> Any:
            row = self.made[index]
            return {**row, "labels": torch.tensor(3)} if index == self.row else row

    model = built()
    expected = after(2, built(), tmp_path)
    message = refused(trainer(model, tmp_path, Late()).train, DataError, r"train_dataset\[13\], 'labels': 3")
    assert "after 2 finished steps" in message
    assert same(model, expected)


def test_the_padding_collator_is_named_with_its_rows(tmp_path: Path) -> None:
    data = [{"input_ids": [5, 6, 7], "labels": 0}, {"input_ids": [5, 6], "labels": [0, 1]}] * 4
    run = trainer(built(), tmp_path, data, data_collator=DataCollatorWithPadding(tiny_tokenizer()))
    refused(run.train, DataError, "DataCollatorWithPadding", r"train_dataset\[0, 1, 2, 3\]")


# ---- a bare loop -------------------------------------------------------------------------------------------------


def loop(model: Any, data: Any, *, own_loss: Any = None, steps: int = 6, **settings: Any) -> Session:
    session = Session(model, Accelerator(cpu=True), max_steps=steps)
    optimizer = session.optimizer(torch.optim.SGD, lr=0.05)
    given = {"collate_fn": default_data_collator, "shuffle": False, **settings}
    loader = session.loader(data, batch_size=4, **given)
    for batch in session.batches(loader):
        with session.accelerator.accumulate(session.model):
            loss = session.loss(batch) if own_loss is None else own_loss(session, batch)
            session.accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    return session


SESSION: dict[str, tuple[Any, tuple[str, ...]]] = {
    "no rows": (list, ("empty",)),
    "a label above the classes": (lambda: spoilt(17, "labels", 3), (r"dataset\[17\]\['labels'\]: 3", "num_labels=4")),
    "a token id past the vocabulary": (lambda: spoilt(17, "input_ids", 100), (r"dataset\[17\]\['input_ids'\]: 100",)),
    "names for labels": (lambda: classes(["good"] * 24), ("'good' is text",)),
    "a stream with a bad label": (lambda: Stream(spoilt(1, "labels", 8)), ("'labels': 8",)),
}


@pytest.mark.parametrize("case", SESSION)
def test_a_session_finds(case: str) -> None:
    data, says = SESSION[case]
    model = built()
    before, watch = weights(model), Watched(model)
    refused(lambda: loop(model, data()), DataError, *says)
    assert watch.passes == 0
    assert same(model, before)


def test_a_session_names_the_row() -> None:
    model = built()
    refused(lambda: loop(model, Broken()), DataError, r"dataset\[13\] could not be read: ZeroDivisionError")
    refused(lambda: loop(model, rows(), collate_fn=lambda made: 1 / 0), DataError, r"dataset\[0, 1, 2, 3\]")
    refused(lambda: loop(model, rows(), collate_fn=lambda made: None), DataError, "NoneType")
    loop(model, rows(), steps=2)


def test_a_session_with_a_loss_of_its_own_may_have_labels_of_its_own() -> None:
    def mine(session: Session, batch: Any) -> Any:
        output = session.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return session.loss(batch, output=output, loss=output.logits.logsumexp(-1)[batch["labels"] >= 0].mean())

    loop(built(), classes([-1, 7, 0] * 8), own_loss=mine)


# ---- the look itself ---------------------------------------------------------------------------------------------


def test_the_look_at_a_column_is_a_numpy_oracle() -> None:
    """Against a loop over all values, on random columns of each kind."""
    draw = np.random.default_rng(0)
    for _ in range(60):
        values = draw.integers(-2, 6, size=draw.integers(1, 30))
        data: Any = datasets.Dataset.from_dict({"labels": values.tolist()})
        if draw.random() < 0.5:
            order = draw.permutation(len(values))
            data, values = data.select(order), values[order]
        limits = Limits(classes=4)
        wrong = [i for i, v in enumerate(values) if v != -100 and not 0 <= v < 4]
        if not wrong:
            check_columns(data, limits, "data")
            check_batch({"labels": torch.from_numpy(values)}, limits, "data", ())
            continue
        place = rf"data\[{wrong[0]}\]\['labels'\]: {values[wrong[0]]} is outside"
        refused(lambda d=data, n=limits: check_columns(d, n, "data"), DataError, place)
        batch = {"labels": torch.from_numpy(values)}
        refused(
            lambda b=batch, n=limits: check_batch(b, n, "data", range(100, 200)),
            DataError,
            rf"data\[{100 + wrong[0]}\]",
        )


def test_no_column_is_read_that_is_made_on_the_fly() -> None:
    reads: list[Any] = []

    def decode(made: Any) -> Any:
        reads.append(made)
        return made

    check_columns(table(spoilt(3, "labels", 9)).with_transform(decode), Limits(classes=3), "data")
    check_columns(Broken(0), Limits(classes=3), "data")
    assert not reads


def test_refusals_are_value_errors() -> None:
    assert issubclass(DataError, ValueError)
    assert not issubclass(DataError, MethodError)
