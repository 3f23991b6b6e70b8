"""Augmented rows: what stays, how often what changes, and that a row is always the same for (seed, epoch, index)."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import DataCollatorWithPadding, default_data_collator

import peft_plus
from peft_plus import MethodError, Session, get_model
from peft_plus.stage_data import stage_data
from peft_plus.state_files import read_state, write_state
from peft_plus_stability.augmented_rows import AugmentedRows
from peft_plus_stability.eda import EDA
from tests.models import tiny
from tests.tokenizers import SPECIAL, tiny_tokenizer
from tests.training import StopAt, quiet

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")

PAD, UNK, CLS, SEP = (SPECIAL.index(token) for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]"))
FIRST = len(SPECIAL)
"""The first token id that is a word's."""
WORDS = range(FIRST, 90)

Row = dict[str, Any]


def texts(number: int, *, length: int | None = None, seed: int = 0) -> list[list[int]]:
    """Random words, all different within a text; with a `length` the first text has one word less, so rows differ."""
    draw = np.random.default_rng(seed)
    lengths = [length - (n == 0) if length else draw.integers(8, 20) for n in range(number)]
    return [draw.permutation(WORDS)[:words].tolist() for words in lengths]


def single(words: Sequence[int], *, padded: int = 0, left: bool = False) -> Row:
    """One text between [CLS] and [SEP]; label = the sum of its tokens modulo 3, so that rows and labels go together."""
    ids = [CLS, *words, SEP]
    row = {"input_ids": ids, "attention_mask": [1] * len(ids), "token_type_ids": [0] * len(ids)}
    row = {
        name: padding_of(name, padded) * left + value + padding_of(name, padded) * (not left)
        for name, value in row.items()
    }
    return {**row, "labels": sum(words) % 3}


def padding_of(name: str, number: int) -> list[int]:
    return [PAD if name == "input_ids" else 0] * number


def pair(one: Sequence[int], other: Sequence[int]) -> Row:
    ids = [CLS, *one, SEP, *other, SEP]
    return {
        "input_ids": ids,
        "attention_mask": [1] * len(ids),
        "token_type_ids": [0] * (len(one) + 2) + [1] * (len(other) + 1),
        "labels": 1,
    }


def singles(number: int, **settings: Any) -> list[Row]:
    return [single(words, **settings) for words in texts(number)]


def made(dataset: Any, *, seed: int = 0, tokenizer: Any = None, model: Any = None, **settings: Any) -> Any:
    """What the plugin makes of the data."""
    model = model or get_model(tiny("bert"), ["lora", EDA(**settings)])
    plan = model.peft_plus
    start = {"seed": seed, "batch_size": 4, "processes": 1, "tokenizer": tokenizer or tiny_tokenizer()}
    return stage_data(plan, plan.stages[0], model, dataset, **start).dataset


def words_of(row: Mapping[str, Any]) -> list[int]:
    return [int(token) for token in row["input_ids"] if token >= FIRST]


def at(data: AugmentedRows, epoch: int) -> list[Row]:
    data.set_epoch(epoch)
    return [data[index] for index in range(len(data))]


# ---- what changes, and how often -----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_so_many_examples_are_changed_in_each_epoch_and_others_in_the_next(share: float) -> None:
    """By "replace", of which each leaves a trace."""
    rows = singles(1500)
    data = made(rows, share=share, operations=["replace"])
    changed = [
        [row["input_ids"] != plain["input_ids"] for row, plain in zip(at(data, e), rows, strict=True)] for e in (0, 1)
    ]
    for one in changed:
        assert np.mean(one) == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / len(rows)))
    both = np.mean(np.logical_and(*changed))
    assert both == pytest.approx(share**2, abs=0.05)
    assert at(data, 0) == at(data, 0) != at(data, 1)


@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_of_long_rows_the_share_that_alpha_says_is_changed(alpha: float) -> None:
    rows = [single(words) for words in texts(201, length=40)]
    count = int(alpha * 40)
    for operation in ("replace", "insert", "swap", "delete"):
        data = at(made(rows, alpha=alpha, share=1.0, operations=[operation]), 0)
        pairs = [(words_of(row), words_of(plain)) for row, plain in zip(data[1:], rows[1:], strict=True)]
        match operation:
            case "replace":
                assert {sum(a != b for a, b in zip(*both, strict=True)) for both in pairs} == {count}
            case "insert":
                assert {len(new) - len(old) for new, old in pairs} == {count}
            case "swap":
                assert all(sorted(new) == sorted(old) for new, old in pairs)
                moved = [sum(a != b for a, b in zip(*both, strict=True)) for both in pairs]
                assert 1.2 * count < np.mean(moved) <= 2 * count
            case "delete":
                gone = [len(old) - len(new) for new, old in pairs]
                assert np.mean(gone) == pytest.approx(alpha * 40, abs=4 * np.sqrt(alpha * (1 - alpha) * 40 / 200))


def test_each_operation_comes_as_often_as_the_others() -> None:
    rows = [single(words) for words in texts(1200, length=40)]
    found = {"longer": 0, "shorter or plain": 0, "others in it": 0, "another order": 0}
    for row, plain in zip(at(made(rows, share=1.0), 0), rows, strict=True):
        new, old = words_of(row), words_of(plain)
        if len(new) > len(old):
            found["longer"] += 1
        elif len(new) < len(old) or new == old:
            found["shorter or plain"] += 1
        else:
            found["another order" if sorted(new) == sorted(old) else "others in it"] += 1
    assert all(number == pytest.approx(300, abs=4 * np.sqrt(1200 * 3 / 16)) for number in found.values()), found


def test_replacements_are_the_nearest_tokens_of_the_models_own_embeddings() -> None:
    rows = singles(100)
    model = get_model(tiny("bert"), ["full", EDA(share=1.0, alpha=0.3, operations=["replace"], neighbours=3)])
    table = model.get_input_embeddings().weight.detach().numpy()
    unit = table / np.linalg.norm(table, axis=1, keepdims=True).clip(1e-12)
    barred = [*range(FIRST), *range(len(tiny_tokenizer()), len(table))]
    near: dict[int, set[int]] = {}
    for token in WORDS:
        cosine = unit @ unit[token]
        cosine[[token, *barred]] = -2
        near[token] = set(np.argsort(-cosine)[:3].tolist())
    seen: set[tuple[int, int]] = set()
    for row, plain in zip(at(made(rows, model=model), 0), rows, strict=True):
        seen |= {(a, b) for a, b in zip(words_of(plain), words_of(row), strict=True) if a != b}
    assert len(seen) > 100
    assert all(b in near[a] for a, b in seen)


# ---- what stays ----------------------------------------------------------------------------------------------------


def test_special_tokens_labels_and_what_a_row_holds_for_each_token_stay_in_step() -> None:
    rows = [single([UNK, *words], padded=n % 3) | {"number": n} for n, words in enumerate(texts(300))]
    for epoch in range(3):
        for row, plain in zip(at(made(rows, share=1.0, alpha=0.3), epoch), rows, strict=True):
            assert (row["labels"], row["number"], row.keys()) == (plain["labels"], plain["number"], plain.keys())
            length = len(row["input_ids"])
            assert len(row["attention_mask"]) == len(row["token_type_ids"]) == length
            real = sum(row["attention_mask"])
            assert row["attention_mask"] == [1] * real + [0] * (length - real)
            ids = row["input_ids"]
            assert (ids[0], ids[real - 1], ids[real:]) == (CLS, SEP, [PAD] * (length - real))
            assert sum(token in (CLS, SEP) for token in ids) == 2


def test_an_unknown_word_may_go_or_move_but_nothing_stands_for_it_and_it_for_nothing() -> None:
    rows = [single([UNK, *words]) for words in texts(200)]
    count = {"replace": {1}, "insert": {1}, "swap": {1}, "delete": {0, 1}}
    for operation, numbers in count.items():
        data = at(made(rows, share=1.0, alpha=0.3, operations=[operation]), 0)
        assert {row["input_ids"].count(UNK) for row in data} == numbers
        at_first = [row["input_ids"][1] == UNK for row in data]
        assert all(at_first) == (operation == "replace")


def test_the_texts_of_a_pair_stay_apart() -> None:
    """The tokens of each are from a range of their own."""
    half = (FIRST + 90) // 2
    draw = np.random.default_rng(0)
    rows = [
        pair(draw.permutation(range(FIRST, half))[:12].tolist(), draw.permutation(range(half, 90))[:9].tolist())
        for _ in range(300)
    ]
    rows.insert(0, pair([FIRST], [half]))  # so that rows differ in length
    for row, plain in zip(at(made(rows, share=1.0, alpha=0.3, operations=["swap", "delete"]), 0), rows, strict=True):
        cut = row["token_type_ids"].index(1)
        first, second = words_of({"input_ids": row["input_ids"][:cut]}), words_of({"input_ids": row["input_ids"][cut:]})
        assert first
        assert second
        assert max(first) < half <= min(second)
        assert row["input_ids"][cut - 1] == row["input_ids"][-1] == SEP
        assert {*first, *second} <= {*words_of(plain)}
    without = [{name: value for name, value in row.items() if name != "token_type_ids"} for row in rows]
    for row in at(made(without, share=1.0, alpha=0.3, operations=["swap"]), 0):  # by [SEP] alone
        assert max(row["input_ids"][1 : row["input_ids"].index(SEP)]) < half


@pytest.mark.parametrize("left", [False, True])
def test_rows_that_are_equally_long_remain_so(left: bool) -> None:
    rows = [single(words, padded=20 - len(words), left=left) for words in texts(300)] + [single(range(20, 40))]
    data = made(rows, share=1.0, alpha=0.4)
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left" if left else "right"
    data = made(rows, share=1.0, alpha=0.4, tokenizer=tokenizer)
    lengths = set()
    for epoch in range(3):
        for row in at(data, epoch):
            assert {len(row[name]) for name in ("input_ids", "attention_mask", "token_type_ids")} == {22}
            real = [token for token, seen in zip(row["input_ids"], row["attention_mask"], strict=True) if seen]
            hidden = row["input_ids"][: 22 - len(real)] if left else row["input_ids"][len(real) :]
            assert (real[0], real[-1], {*hidden} <= {PAD}) == (CLS, SEP, True)
            lengths.add(len(real))
    assert min(lengths) < 8
    assert max(lengths) == 22
    default_data_collator(at(data, 0))


def test_no_row_becomes_longer_than_the_model_has_positions() -> None:
    rows = [single(list(WORDS)[:62]), single(list(WORDS)[:50])]  # 64 and 52 tokens, and 64 positions
    data = made(rows, share=1.0, alpha=1.0, operations=["insert"])
    for epoch in range(20):
        long, short = at(data, epoch)
        assert long == rows[0]
        assert len(short["input_ids"]) == 64


def test_rows_come_back_as_what_they_were() -> None:
    rows = singles(40)
    plain = at(made(rows, share=1.0), 0)
    tensors = [{k: torch.tensor(v) for k, v in row.items()} for row in rows]
    arrays = [{k: np.array(v, np.int32) for k, v in row.items()} for row in rows]
    for row, t, a in zip(plain, at(made(tensors, share=1.0), 0), at(made(arrays, share=1.0), 0), strict=True):
        for name in row:
            assert isinstance(t[name], Tensor)
            assert t[name].dtype == torch.int64
            assert a[name].dtype == np.int32
            assert np.asarray(row[name]).tolist() == t[name].tolist() == a[name].tolist()
    assert at(made(Dataset.from_list(rows), share=1.0), 0) == plain
    assert made(Dataset.from_list(rows), share=1.0).__getitems__([3, 1]) == [plain[3], plain[1]]
    assert all(isinstance(token, int) for token in plain[0]["input_ids"])


@pytest.mark.parametrize("settings", [{"alpha": 0.0}, {"share": 0.0}])
def test_at_strength_zero_the_data_are_the_users_own_object(settings: dict[str, float]) -> None:
    rows = singles(4)
    assert made(rows, **settings) is rows


# ---- always the same row -------------------------------------------------------------------------------------------


def test_a_row_depends_on_seed_epoch_and_index_alone() -> None:
    rows = singles(60)
    data = made(rows, share=1.0)
    data.set_epoch(3)
    forth = [data[index] for index in range(60)]
    assert [data[index] for index in reversed(range(60))] == forth[::-1]
    assert data.__getitems__(range(60)) == forth
    assert [data[np.int64(7)], data[-1]] == [forth[7], forth[59]]
    copied = pickle.loads(pickle.dumps(data))  # as a worker process gets it
    assert [copied[index] for index in range(60)] == forth
    np.random.seed(1)
    torch.manual_seed(1)
    again = made(rows, share=1.0)
    assert at(again, 3) == forth
    assert at(made(rows, share=1.0, seed=1), 3) != forth


def test_looking_at_the_data_draws_nothing_that_the_run_would_draw() -> None:
    class Noisy(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            torch.rand(1)
            np.random.rand()
            return super().__getitem__(index)

    model = get_model(tiny("bert"), ["lora", EDA()])
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    made(Noisy(singles(10)), model=model)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()


def trainer_of(folder: Any, method: Any, callbacks: Any = (), **settings: Any) -> Any:
    torch.manual_seed(0)
    args = quiet(
        folder,
        **{"num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_strategy": "no"}
        | settings,
    )
    model = get_model(tiny("bert", hidden_dropout_prob=0.1), method)
    return peft_plus.Trainer(
        model,
        args,
        train_dataset=singles(14),
        eval_dataset=singles(4),
        processing_class=tiny_tokenizer(),
        callbacks=list(callbacks),
    )


def trained(trainer: Any, **settings: Any) -> dict[str, Tensor]:
    trainer.train(**settings)
    return {name: tensor.detach().clone() for name, tensor in trainer.model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def strong() -> EDA:
    return EDA(alpha=0.4, share=1.0)


@pytest.mark.parametrize("tuner", ["lora", "full"])
@pytest.mark.parametrize("at_step", [2, 4, 6])
def test_a_trainer_stopped_and_resumed_ends_bit_identical(tuner: str, at_step: int, tmp_path: Path) -> None:
    """Also where the embeddings train, and those of the checkpoint have other neighbours than those it began with."""
    settings = {"save_strategy": "steps", "save_steps": at_step}
    if tuner == "full":
        settings |= {"learning_rate": 0.3, "optim": "sgd"}
    whole = trained(trainer_of(tmp_path / "whole", [tuner, strong()], **settings))
    trainer_of(tmp_path / "cut", [tuner, strong()], [StopAt(at_step)], **settings).train()
    resumed = trainer_of(tmp_path / "cut", [tuner, strong()], **settings)
    assert same(whole, trained(resumed, resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{at_step}")))


def test_strength_zero_is_the_plain_run_bit_for_bit(tmp_path: Path) -> None:
    plain = trained(trainer_of(tmp_path, "lora"))
    assert same(plain, trained(trainer_of(tmp_path, ["lora", EDA(alpha=0.0)])))
    assert same(plain, trained(trainer_of(tmp_path, ["lora", EDA(share=0.0)])))
    assert not same(plain, trained(trainer_of(tmp_path, ["lora", strong()])))


def test_the_neighbours_of_a_checkpoint_are_those_that_rows_are_made_with(tmp_path: Path) -> None:
    """Rows read the table that the plugin loads after they were made."""
    rows, settings = singles(30), {"share": 1.0, "alpha": 0.5, "operations": ["replace"]}
    first = get_model(tiny("bert", seed=1), ["full", EDA(**settings)])
    expected = at(made(rows, model=first), 1)
    write_state(tmp_path / "state", first.peft_plus.plugins[0].state_dict())
    other = get_model(tiny("bert", seed=2), ["full", EDA(**settings)])
    data = made(rows, model=other)
    assert at(data, 1) != expected
    other.peft_plus.plugins[0].load_state_dict(read_state(tmp_path / "state"))
    assert at(data, 1) == expected


def session_run(folder: Path, *, stop: int = 0, resume: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = get_model(tiny("bert", hidden_dropout_prob=0.1), ["full", EDA(alpha=0.4, special_ids=[PAD, CLS, SEP])])
    accelerator = Accelerator(cpu=True)
    session = Session(model, accelerator, epochs=2)
    optimizer = session.optimizer(torch.optim.SGD, lr=0.3)
    collate = DataCollatorWithPadding(tiny_tokenizer())
    loader = session.loader(singles(14), batch_size=4, collate_fn=collate)
    if resume:
        assert session.resume(folder)
    for batch in session.batches(loader):
        with accelerator.accumulate(session.model):
            accelerator.backward(session.loss(batch))
            optimizer.step()
            optimizer.zero_grad()
        if stop and session.step == stop:
            session.save(folder)
            break
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("stop", [3, 4, 6])
def test_a_session_stopped_and_resumed_ends_bit_identical(stop: int, tmp_path: Path) -> None:
    whole = session_run(tmp_path)
    session_run(tmp_path, stop=stop)
    assert same(whole, session_run(tmp_path, resume=True))


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"alpha": -0.1}, "alpha=-0.1: give a share"),
        ({"alpha": 1.1}, "alpha=1.1"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"share": 2.0}, "share=2.0"),
        ({"operations": []}, r"operations=\[\]: give a list of some of 'replace', 'insert', 'swap', 'delete'"),
        ({"operations": ["swop"]}, r"operations=\['swop'\]"),
        ({"operations": ["swap", "swap"]}, "operations="),
        ({"operations": "swap"}, "operations='swap'"),
        ({"neighbours": 0}, "neighbours=0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        EDA(**settings)


@pytest.mark.parametrize(
    ("name", "task", "said"),
    [
        ("bert", "TOKEN_CLS", "the labels of 'TOKEN_CLS' lie at the tokens"),
        ("bert", "MULTIPLE_CHOICE", "It is for 'SEQ_CLS'"),
        ("llama", "CAUSAL_LM", "the labels of 'CAUSAL_LM'"),
    ],
)
def test_tasks_with_labels_at_the_tokens_are_refused_when_the_model_is_built(name: str, task: str, said: str) -> None:
    with pytest.raises(MethodError, match=rf"plugin 'eda' .*{said}"):
        get_model(tiny(name, task), ["lora", EDA()], task=task)
    get_model(tiny(name, task), ["lora", EDA(alpha=0.0)], task=task)


def test_a_model_without_tokens_is_refused() -> None:
    with pytest.raises(MethodError, match=r"plugin 'eda' .*(no embeddings of tokens|lie at the tokens)"):
        get_model(tiny("vit"), ["full", EDA()])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "no tokens"}], "row 0 has no 'input_ids' that are a list of token ids. Tokenise the data first"),
        ([{"input_ids": [[1, 2], [3, 4]]}], "row 0 has no 'input_ids'"),
        ([{**single([20, 30]), "position_ids": [0, 1, 2, 3]}], "the column 'position_ids' has a value for each token"),
        ([{"input_ids": [CLS, 20, SEP], "labels": 0}] * 2, "all rows are 3 tokens long and have no attention_mask"),
    ],
)
def test_rows_that_it_could_not_change_are_refused(rows: list[Row], said: str) -> None:
    with pytest.raises(MethodError, match=rf"plugin 'eda' .*{said}"):
        made(rows)


def test_rows_without_a_mask_may_be_exchanged_and_ragged_ones_dropped() -> None:
    equal = [{"input_ids": [CLS, *words, SEP]} for words in texts(21, length=10)[1:]]
    assert at(made(equal, operations=["swap", "replace"], share=1.0), 0) != equal
    ragged = [{"input_ids": [CLS, *words, SEP]} for words in texts(20)]
    assert at(made(ragged, operations=["delete"], share=1.0, alpha=0.5), 0) != ragged


def test_a_stream_is_refused(tmp_path: Path) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(singles(4))

    with pytest.raises(MethodError, match=r"plugin 'eda' .*Stream is read as a stream. Give map-style data"):
        made(Stream())


def test_unknown_special_tokens_are_refused_and_may_be_given(tmp_path: Path) -> None:
    def trainer(**settings: Any) -> Any:
        model = get_model(tiny("bert"), ["lora", EDA(share=1.0, **settings)])
        collate = DataCollatorWithPadding(tiny_tokenizer())
        return peft_plus.Trainer(model, quiet(tmp_path, max_steps=1), train_dataset=singles(8), data_collator=collate)

    with pytest.raises(MethodError, match=r"plugin 'eda' .*no tokenizer tells which these are.*set special_ids"):
        trainer().train()
    trainer(special_ids=[PAD, CLS, SEP]).train()


def test_what_it_is_given_as_special_is_added_to_what_the_tokenizer_knows() -> None:
    rows = [single([20, *(word for word in words if word != 20)]) for words in texts(100)]
    data = at(made(rows, share=1.0, alpha=1.0, special_ids=[20]), 0)
    assert all(row["input_ids"][:2] == [CLS, 20] and row["input_ids"].count(20) == 1 for row in data)


def test_a_store_of_features_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"trunk_cache stores .*plugin 'eda' .* makes other rows of it in each epoch"):
        trainer_of(tmp_path, ["linear_probe", "trunk_cache", EDA()]).train()
    trainer_of(tmp_path, ["linear_probe", "trunk_cache", EDA(alpha=0.0)]).train()
