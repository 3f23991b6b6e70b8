"""What a training checkpoint costs, to write, to go on from and in bytes: ours, transformers' and Accelerate's."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .loops import ROWS, Make, our_model, plain_model, rows, trainer
from .turns import Loop, Turn, take_turns


def checkpoint_table(bases: Mapping[str, Make], saves: int) -> Iterator[str]:
    """Writing a checkpoint of a running loop, and going on from it; by the clock, as much of it is the disk's."""
    yield from (
        "A training checkpoint of lora, by the clock, medians. Ours are on the disk when they are written (fsync), and "
        "hold a SHA-256 of each file, which is compared on resume.",
        "",
        "| model | | without us | ours | ratio | pairs |",
        "|---|---|--:|--:|--:|--:|",
    )
    yield from trainer_checkpoints(bases, saves)
    yield from session_checkpoints(bases, saves)


def trainer_checkpoints(bases: Mapping[str, Make], saves: int) -> Iterator[str]:
    """Rows for the Trainer."""
    import transformers

    import peft_plus

    sides = {
        "theirs": (transformers.Trainer, plain_model),
        "ours": (peft_plus.Trainer, lambda base: our_model(base, {})),
    }
    for title, base in bases.items():
        with tempfile.TemporaryDirectory() as place:
            folders = {side: os.path.join(place, side) for side in sides}
            written: dict[str, list[float]] = {side: [] for side in sides}
            loops = {
                side: saving_loop(cls, lambda make=make, base=base: make(base), folders[side], saves, written[side])
                for side, (cls, make) in sides.items()
            }
            take_turns(loops, warm_up=0)
            sizes = {side: folder_size(os.path.join(folders[side], f"checkpoint-{saves}")) for side in sides}
            read: dict[str, list[float]] = {side: [] for side in sides}
            for _ in range(min(saves, 7)):
                for side, (cls, make) in sides.items():
                    read[side].append(resume_seconds(cls, make(base), folders[side], saves))
        yield time_row(f"{title}, Trainer", "write", written)
        yield time_row(f"{title}, Trainer", "resume", read)
        yield size_row(f"{title}, Trainer", sizes)


def time_row(title: str, what: str, seconds: Mapping[str, Sequence[float]]) -> str:
    """Medians of both sides."""
    medians = {side: float(np.median(times)) for side, times in seconds.items()}
    ratio = medians["ours"] / medians["theirs"]
    cells = [f"{1e3 * medians[side]:.0f} ms" for side in ("theirs", "ours")]
    return f"| {title} | {what} | {cells[0]} | {cells[1]} | {ratio:.2f} × | {len(seconds['ours'])} |"


def size_row(title: str, sizes: Mapping[str, int]) -> str:
    """Bytes of a checkpoint on both sides."""
    ratio = sizes["ours"] / sizes["theirs"]
    return f"| {title} | bytes | {sizes['theirs']:,} | {sizes['ours']:,} | {ratio:.2f} × | |"


def saving_loop(trainer_class: Any, make: Make, folder: str, saves: int, seconds: list[float]) -> Loop:
    """A run that saves after every step; fills `seconds`."""

    def loop(turn: Turn) -> None:
        from transformers import TrainerCallback

        class Saves(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                turn()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                self.start = time.perf_counter()

            def on_save(self, *_: Any, **__: Any) -> None:
                seconds.append(time.perf_counter() - self.start)

        settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
        trainer(trainer_class, make(), saves, folder, Saves(), **settings).train()

    return loop


def resume_seconds(trainer_class: Any, model: Any, folder: str, steps: int) -> float:
    """From `train(resume_from_checkpoint=…)`, of the last checkpoint but one, to where its first step begins."""
    from transformers import TrainerCallback

    class Begun(TrainerCallback):
        seconds = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.seconds = self.seconds or time.perf_counter() - start

    begun = Begun()
    resumed = trainer(trainer_class, model, steps, folder, begun, save_strategy="steps", save_steps=1)
    start = time.perf_counter()
    resumed.train(resume_from_checkpoint=os.path.join(folder, f"checkpoint-{steps - 1}"))
    return begun.seconds


def session_checkpoints(bases: Mapping[str, Make], saves: int) -> Iterator[str]:
    """Rows for a bare loop: `session.save` and `resume` against Accelerate's `save_state` and `load_state`."""
    for title, base in bases.items():
        with tempfile.TemporaryDirectory() as place:
            written: dict[str, list[float]] = {"theirs": [], "ours": []}
            folders = {side: os.path.join(place, side) for side in written}
            loops = {
                "theirs": saving_bare_loop(
                    lambda base=base: plain_model(base), folders["theirs"], saves, written["theirs"]
                ),
                "ours": saving_session(lambda base=base: our_model(base, {}), folders["ours"], saves, written["ours"]),
            }
            take_turns(loops, warm_up=0)
            yield time_row(f"{title}, bare loop", "write", written)
            yield size_row(
                f"{title}, bare loop", {side: folder_size(folder) // saves for side, folder in folders.items()}
            )


def saving_bare_loop(make: Make, folder: str, saves: int, seconds: list[float]) -> Loop:
    """Accelerate's own, after every step; fills `seconds`."""

    def loop(turn: Turn) -> None:
        import torch
        from accelerate import Accelerator
        from transformers import default_data_collator

        accelerator = Accelerator(cpu=True)
        model = make()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-5)
        loader = torch.utils.data.DataLoader(rows(saves * ROWS), ROWS, collate_fn=default_data_collator)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        model.train()
        for step, batch in enumerate(loader):
            turn()
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
            start = time.perf_counter()
            accelerator.save_state(os.path.join(folder, f"checkpoint-{step}"))
            seconds.append(time.perf_counter() - start)
        turn()

    return loop


def saving_session(make: Make, folder: str, saves: int, seconds: list[float]) -> Loop:
    """A Session that saves after every step; fills `seconds`."""

    def loop(turn: Turn) -> None:
        import torch
        from accelerate import Accelerator
        from transformers import default_data_collator

        from peft_plus.session import Session

        accelerator = Accelerator(cpu=True)
        session = Session(make(), accelerator, max_steps=saves)
        optimizer = session.optimizer(torch.optim.AdamW, lr=5e-5)
        loader = session.loader(rows(saves * ROWS), batch_size=ROWS, collate_fn=default_data_collator)
        for batch in session.batches(loader):
            turn()
            accelerator.backward(session.loss(batch))
            optimizer.step()
            optimizer.zero_grad()
            start = time.perf_counter()
            session.save(folder)
            seconds.append(time.perf_counter() - start)
        turn()

    return loop


def folder_size(folder: str) -> int:
    """Bytes of all files in it."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
