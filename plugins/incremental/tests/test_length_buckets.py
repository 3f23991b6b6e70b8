"""The order against what it promises: everything once, little padding, equal on every process and after a resume."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import TrainerCallback

import peft_plus
from peft_plus import MethodError, Run, get_model
from peft_plus.session import Session
from peft_plus_incremental.length_buckets import LengthBuckets, by_length
from tests.models import EOS, PAD, VOCAB, tiny
from tests.training import StopAt, quiet

PERMUTED = (torch.arange(1000) * 387) % 1000 + 1
"""1,000 examples of which no two are equally long."""


def drawn(number: int, seed: int = 0) -> Tensor:
    """Lengths as texts have them: many short ones, few long ones, many ties."""
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(number, generator=draw).exp() * 20).long().clamp(3, 200)


def ordered(lengths: Tensor, *, batch_size: int = 8, processes: int = 1, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return by_length(lengths, batch_size=batch_size, processes=processes, generator=draw)


def run_of(**fields: Any) -> Run:
    fields = {"seed": 0, "batch_size": 8, **fields}
    return Run(model=nn.Identity(), task=None, num_blocks=3, **fields)  # type: ignore[arg-type]


def sampler_of(lengths: Any, plugin: LengthBuckets | None = None, **fields: Any) -> Any:
    return (plugin or LengthBuckets()).sampler(
        run_of(**fields), Dataset.from_dict({"length": [int(x) for x in lengths]})
    )


def padded(lengths: Tensor, batch_size: int) -> int:
    """Tokens of all batches when each is as wide as its longest row."""
    return sum(len(rows) * int(rows.max()) for rows in lengths.split(batch_size))


def least_padded(lengths: Tensor, batch_size: int) -> int:
    """The optimum: sorted, and the short batch where it costs least. Swapping rows between batches then never helps."""
    ascending = lengths.sort().values
    short = len(lengths) % batch_size
    if not short:
        return padded(ascending, batch_size)
    cut = [
        (ascending[:i], ascending[i : i + short], ascending[i + short :]) for i in range(0, len(lengths), batch_size)
    ]
    return min(sum(padded(part, batch_size) for part in parts if len(part)) for parts in cut)


# ---- one process ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("number", [1, 7, 8, 9, 16, 23, 24, 25, 500])
def test_every_example_comes_once(number: int, processes: int) -> None:
    for seed in range(5):
        assert sorted(ordered(drawn(number), processes=processes, seed=seed).tolist()) == list(range(number))


@pytest.mark.parametrize("batch_size", [4, 16, 32])
def test_padding_is_near_the_least_possible(batch_size: int) -> None:
    lengths = drawn(1000)
    least = least_padded(lengths, batch_size)
    shuffled = padded(lengths[torch.randperm(1000)], batch_size)
    for seed in range(10):
        assert least <= padded(lengths[ordered(lengths, batch_size=batch_size, seed=seed)], batch_size) <= 1.02 * least
    assert shuffled > 1.5 * least


def test_the_longest_come_first_and_the_short_batch_last() -> None:
    lengths = drawn(1001)
    for seed in range(5):
        batches = lengths[ordered(lengths, seed=seed)].split(8)
        assert batches[0].min() == lengths.sort().values[-8]
        assert [len(rows) for rows in batches] == [8] * 125 + [1]


def test_batches_are_in_random_order_and_what_is_left_out_changes() -> None:
    first_batches, left_out = set(), set()
    for seed in range(20):
        order = ordered(PERMUTED[:996], seed=seed)  # 996 = 124 · 8 + 4
        first_batches.add(tuple(order[8:16].tolist()))
        left_out.add(tuple(order[-4:].tolist()))
    assert len(first_batches) > 10
    assert len(left_out) > 10


def test_the_order_depends_on_seed_stage_and_epoch_alone() -> None:
    def epochs(**fields: Any) -> list[list[int]]:
        sampler, orders = sampler_of(drawn(100), **fields), []
        for epoch in (0, 1, 2, 1):
            sampler.set_epoch(epoch)
            torch.rand(1)  # what others draw meanwhile
            orders.append(list(sampler))
        return orders

    first, second, third, again = epochs()
    assert first != second != third != first
    assert again == second
    assert epochs() == [first, second, third, second]
    assert epochs(seed=1)[0] != first
    assert epochs(stage=peft_plus.Stage(name="other"))[0] != first


def test_iterating_draws_from_no_stream_of_the_model() -> None:
    sampler = sampler_of(drawn(100))
    before = torch.get_rng_state()
    assert len(list(sampler)) == len(sampler) == 100
    assert torch.equal(torch.get_rng_state(), before)


def test_lengths_in_one_bucket_are_mixed() -> None:
    """20 buckets of 50: each batch holds one bucket or two neighbours, but is no longer cut from sorted lengths."""
    sampler = sampler_of(PERMUTED, LengthBuckets(bucket_tokens=50))
    mixed = 0
    for batch in torch.tensor(list(sampler)).split(8):
        lengths = PERMUTED[batch].sort().values
        buckets = (lengths + 49) // 50
        assert buckets[-1] - buckets[0] <= 1
        mixed += int(lengths[-1] - lengths[0]) > 8
    assert mixed > 100


def test_a_bucket_below_one_token_is_refused() -> None:
    with pytest.raises(MethodError, match=r"length_buckets.*bucket_tokens=0"):
        get_model(tiny("bert"), {"lora": {}, "length_buckets": {"bucket_tokens": 0}})


# ---- several processes ---------------------------------------------------------------------------------------------


def loaders(lengths: Tensor, processes: int, **settings: Any) -> list[Any]:
    """What Accelerate makes of the loader on each of several processes; batches are lists of indices."""
    made = []
    for rank in range(processes):
        sampler = sampler_of(lengths, processes=processes)
        loader = DataLoader(range(len(lengths)), 8, sampler=sampler, collate_fn=list, **settings)  # type: ignore[arg-type]
        made.append(prepare_data_loader(loader, num_processes=processes, process_index=rank, put_on_device=False))
    return made


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("number", [960, 997])
def test_processes_share_an_epoch_and_none_waits(number: int, processes: int) -> None:
    """No two lengths are equal, so batches of neighbours differ by one batch's rows, or by what was left out too."""
    lengths = PERMUTED[:number].argsort().argsort() + 1
    ranks = [list(loader) for loader in loaders(lengths, processes)]
    together = 8 * processes
    full, surplus = divmod(number, together)
    assert {len(batches) for batches in ranks} == {full + (surplus > 0)}
    seen = [index for turn in itertools.islice(zip(*ranks, strict=True), full) for batch in turn for index in batch]
    assert len(set(seen)) == len(seen) == full * together
    assert {index for batches in ranks for batch in batches for index in batch} == set(range(number))
    for turn in itertools.islice(zip(*ranks, strict=True), full):
        longest = [int(lengths[batch].max()) for batch in turn]
        assert max(longest) - min(longest) <= (processes - 1) * 8 + surplus


def test_no_process_always_gets_the_longer_batch() -> None:
    longest = [PERMUTED[ordered(PERMUTED[:992], processes=2, seed=seed)].view(62, 2, 8).amax(2) for seed in range(20)]
    ahead = torch.cat([turn[:, 0] > turn[:, 1] for turn in longest])
    assert abs(float(ahead.float().mean()) - 0.5) < 0.05  # 1,240 draws: a standard deviation is 0.014


def test_dropping_the_last_leaves_full_batches_without_repetition() -> None:
    dropped = set()
    for epoch in range(5):
        ranks = loaders(drawn(997), 2, drop_last=True)
        for loader in ranks:
            loader.set_epoch(epoch)
        batches = [[tuple(batch) for batch in loader] for loader in ranks]
        assert [len(own) for own in batches] == [62, 62]
        indices = [index for own in batches for batch in own for index in batch]
        assert len(set(indices)) == len(indices) == 62 * 16
        dropped.add(frozenset(range(997)) - set(indices))
    assert len(dropped) == 5


@pytest.mark.parametrize("processes", [1, 2])
def test_skipping_batches_gives_the_rest_of_the_same_epoch(processes: int) -> None:
    for whole, again in zip(loaders(drawn(200), processes), loaders(drawn(200), processes), strict=True):
        whole.set_epoch(3)
        rest = skip_first_batches(again, 5)
        rest.set_epoch(3)
        sampler = getattr(again.batch_sampler, "batch_sampler", again.batch_sampler).sampler
        sampler.set_epoch(3)  # as the loops do: on several processes Accelerate's own call does not get here
        assert list(rest) == list(whole)[5:]


# ---- a run ---------------------------------------------------------------------------------------------------------


LENGTHS = drawn(22).clamp(3, 40)


def sentences(lengths: Tensor) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(EOS + 2, VOCAB, (int(n),), generator=draw) for n in lengths]
    return [{"input_ids": text, "labels": int(text[0]) % 3} for text in texts]


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    ids = pad_sequence([row["input_ids"] for row in rows], batch_first=True, padding_value=PAD)
    return {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "labels": torch.tensor([r["labels"] for r in rows]),
    }


class Widths(TrainerCallback):
    """The width of every micro-batch that the model was given."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_begin(self, *_: Any, model: nn.Module, **__: Any) -> None:
        model.register_forward_pre_hook(
            lambda _, __, batch: self.seen.append(batch["input_ids"].shape[1]), with_kwargs=True
        )


def trainer_of(folder: Any, method: Any, *callbacks: TrainerCallback, **settings: Any) -> Any:
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-2, **settings}
    torch.manual_seed(0)  # of the adapters' start
    model = get_model(tiny("bert", hidden_dropout_prob=0.1), method)
    rows = sentences(LENGTHS)
    return peft_plus.Trainer(
        model, quiet(folder, **settings), train_dataset=rows, data_collator=collate, callbacks=list(callbacks)
    )


def test_the_trainer_sees_the_planned_batches(tmp_path: Any) -> None:
    widths = Widths()
    trainer = trainer_of(tmp_path, ["lora", "length_buckets"], widths, data_seed=7)
    trainer.train()
    expected = []
    for epoch in range(2):
        sampler = sampler_of(LENGTHS, seed=7, batch_size=4, stage=peft_plus.Stage())
        sampler.set_epoch(epoch)
        expected += [int(LENGTHS[batch].max()) for batch in torch.tensor(list(sampler)).split(4)]
    assert widths.seen == expected


def session_run(folder: Any, *, stop: int | None = None) -> Any:
    """A Session over two epochs of six steps, from the newest checkpoint on; saves and leaves after `stop` steps."""
    torch.manual_seed(0)
    model = get_model(tiny("bert", hidden_dropout_prob=0.1), ["lora", "length_buckets"])
    session = Session(model, Accelerator(cpu=True), epochs=2)
    optimizer = session.optimizer(torch.optim.AdamW, lr=1e-2)
    loader = session.loader(sentences(LENGTHS), 4, collate_fn=collate)
    session.resume(folder)
    widths = []
    for rows in session.batches(loader):
        widths.append(rows["input_ids"].shape[1])
        with session.accelerator.accumulate(session.model):
            session.accelerator.backward(session.loss(rows))
            optimizer.step()
            optimizer.zero_grad()
        if session.step == stop:
            session.save(folder)
            break
    return widths, model.state_dict()


def test_in_a_session_too(tmp_path: Any) -> None:
    widths, whole = session_run(tmp_path / "whole")
    before, _ = session_run(tmp_path / "cut", stop=9)
    after, resumed = session_run(tmp_path / "cut")
    assert before + after == widths
    assert widths[:6] != widths[6:]
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_interrupted_in_the_middle_of_an_epoch_it_ends_bit_identical(accumulation: int, tmp_path: Any) -> None:
    """With a freezing schedule and a noise term, which must not notice the order, nor disturb it."""
    method = {"lora": {}, "length_buckets": {}, "gradual_unfreeze": {"every": "epoch"}, "r3f": {"eps": 0.1}}
    steps = 6 // accumulation
    stop = steps + steps // 2
    settings = {"gradient_accumulation_steps": accumulation, "save_strategy": "steps", "save_steps": stop}
    whole = trainer_of(tmp_path / "whole", method, **settings)
    whole.train()
    trainer_of(tmp_path / "cut", method, StopAt(stop), **settings).train()
    resumed = trainer_of(tmp_path / "cut", method, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{stop}"))
    assert resumed.state.global_step == whole.state.global_step == 2 * steps
    pairs = zip(resumed.model.state_dict().values(), whole.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
