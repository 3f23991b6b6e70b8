"""A Trainer's random data after a resume: the same order, the same rows, the same draws of the collator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import TrainerCallback, default_data_collator

import peft_plus
from peft_plus import get_model
from peft_plus.epoch_data import keyed

from .models import batch, tiny
from .training import quiet

Rows = list[dict[str, Tensor]]


class Interrupted(Exception):
    pass


class Interrupt(TrainerCallback):
    def __init__(self, at: int | None) -> None:
        self._at = at

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._at:
            raise Interrupted


class Stream(IterableDataset[Any]):
    """Rows without a length, read through three times."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __iter__(self) -> Any:
        return iter(self._rows)


class Jittered(Dataset[Any]):
    """Rows that are drawn."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return hide(self._rows[index])


def hide(data: dict[str, Tensor]) -> dict[str, Tensor]:
    hidden = torch.rand(data["input_ids"].shape) < 0.3
    return data | {"input_ids": data["input_ids"].masked_fill(hidden, 4)}


def drawing(rows: Rows) -> dict[str, Tensor]:
    return hide(default_data_collator(rows))


def trained(
    folder: Path,
    *,
    stop: int | None = None,
    resume: bool = False,
    collate: Callable[[Rows], Any] = default_data_collator,
    data: Callable[[Rows], Any] = list,
    trainer: type[Any] = peft_plus.Trainer,
    **settings: Any,
) -> dict[str, Tensor]:
    """Three epochs of six steps, with a checkpoint at step `stop`."""
    torch.manual_seed(0)
    model = get_model(tiny("bert", hidden_dropout_prob=0.1), "lora")
    values = batch("bert", rows=22)
    rows = [{name: value[i] for name, value in values.items()} for i in range(22)]
    args = quiet(
        folder,
        per_device_train_batch_size=4,
        num_train_epochs=3,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=stop or 100,
        **settings,
    )
    runs = trainer(
        model, args, train_dataset=data(rows), eval_dataset=rows[:8], data_collator=collate, callbacks=[Interrupt(stop)]
    )
    if stop is None:
        runs.train(resume_from_checkpoint=resume)
    else:
        with pytest.raises(Interrupted):
            runs.train()
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters() if tensor.requires_grad}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


PERSISTENT = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
RANDOM: dict[str, dict[str, Any]] = {
    "collator": {"collate": drawing},
    "collator in workers": {"collate": drawing, "dataloader_num_workers": 2},
    "collator, accumulated": {"collate": drawing, "gradient_accumulation_steps": 2},
    "rows": {"data": Jittered},
    "stream": {"data": Stream, "max_steps": 18},
    "stream, collator": {"data": Stream, "max_steps": 18, "collate": drawing},
    "collator in persistent workers": {"collate": drawing, **PERSISTENT},
    "persistent workers": PERSISTENT,
    "evaluated at the end of an epoch": {"eval_strategy": "epoch"},
    "grouped by length": {"train_sampling_strategy": "group_by_length"},
    "order of torch": {"accelerator_config": {"use_seedable_sampler": False}},
}


@pytest.mark.parametrize("case", RANDOM)
def test_a_resumed_run_draws_what_it_would_have_drawn(case: str, tmp_path: Path) -> None:
    """In the middle of the first and of a later epoch, and between two."""
    whole = trained(tmp_path / "whole", **RANDOM[case])
    steps = 3 if "gradient_accumulation_steps" in RANDOM[case] else 6
    # Persistent workers take long to end, and would differ after any stop.
    for stop in (3,) if "persistent" in case else (steps // 2, steps, steps + 1):
        folder = tmp_path / str(stop)
        trained(folder, stop=stop, **RANDOM[case])
        assert equal(whole, trained(folder, resume=True, **RANDOM[case])), stop


@pytest.mark.parametrize(
    "case", ["plain", "grouped by length", "order of torch", "stream", "evaluated at the end of an epoch"]
)
def test_where_the_data_draw_nothing_it_trains_as_the_trainer_does(case: str, tmp_path: Path) -> None:
    """Bit for bit, with dropout: what is saved and put back disturbs no stream."""
    settings = RANDOM.get(case, {})
    ours = trained(tmp_path / "ours", **settings)
    assert equal(ours, trained(tmp_path / "theirs", trainer=transformers.Trainer, **settings))


def test_a_callback_finds_the_users_own_dataset(tmp_path: Path) -> None:
    class Own(Dataset[Any]):
        language = "de"

        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {key: value[index] for key, value in batch("bert", rows=8).items()}

        def counted(self) -> int:
            return len(self)

    seen = []

    class Looks(TrainerCallback):
        def on_epoch_begin(self, *_: Any, train_dataloader: Any, **__: Any) -> None:
            data = train_dataloader.dataset
            seen.append((data.language, data.counted(), len(data), hasattr(data, "nothing like it")))

    args = quiet(tmp_path, max_steps=1, per_device_train_batch_size=4)
    for model in (tiny("bert"), get_model(tiny("bert"), "lora")):
        peft_plus.Trainer(model, args, train_dataset=Own(), callbacks=[Looks()]).train()
    assert seen == [("de", 8, 8, False)] * 2


def test_each_epoch_and_each_batch_draws_anew() -> None:
    rows = [{"input_ids": torch.full((50,), 9)} for _ in range(4)]
    loader = DataLoader(rows, batch_size=2, collate_fn=drawing)  # type: ignore[arg-type]
    data = keyed(loader, seed=1, rank=0)
    assert data is not None
    seen = []
    for epoch in (0, 1, 0):
        data.begin(epoch, 0)
        seen.append([made["input_ids"] for made in loader])
    first, second, again = seen
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = DataLoader(rows, batch_size=2, collate_fn=drawing)  # type: ignore[arg-type]
    keyed(other, seed=1, rank=1)
    assert not torch.equal(first[0], next(iter(other))["input_ids"])


def test_persistent_workers_see_the_next_epoch(tmp_path: Path) -> None:
    model = get_model(tiny("bert"), "lora")
    values = batch("bert", rows=16)
    rows = [{name: value[i] for name, value in values.items()} for i in range(16)]
    seen = []
    for settings in ({}, PERSISTENT):
        args = quiet(tmp_path, per_device_train_batch_size=4, train_sampling_strategy="sequential", **settings)
        trainer = peft_plus.Trainer(model, args, train_dataset=rows, data_collator=drawing)
        loader = trainer.get_train_dataloader()
        for epoch in (0, 1):
            trainer._data.begin(epoch, 0)
            seen.append(torch.cat([made["input_ids"] for made in loader]))
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[1])
