"""One life of a run: it begins, or goes on from the newest whole checkpoint, and trains to the end unless it is killed.

A life works in its current folder: checkpoints in `run/`; what happened, line by line, in `log.<rank>.txt`; how it
ended in `end.<rank>.json`. As a whole process: `python -m tests.kills.life FOLDER LOOP:CASE…`, also under a launcher.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import IterableDataset

import peft_plus
from peft_plus import CheckpointError, Session, get_model
from tests.models import NUM_LABELS, batch, tiny
from tests.training import quiet

from .cases import CASES, Case
from .ending import ending

OUTPUT = "run"
SECONDS = 300.0
"""A life that takes longer hangs: it writes its stacks and ends."""
REFUSED = 3
"""Exit code of a life that ended with a CheckpointError."""

BATCH = 4
ROWS = 22
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
_open = os.open  # a sweep replaces it, and a log is no part of a save


class Log:
    """Lines `time event number value`, each in the file before the next thing happens.

    Args:
        watch: called at each line, e.g. to end this life there.
    """

    def __init__(self, rank: int, watch: Callable[[str, int], None] | None = None) -> None:
        self._name, self._watch = f"log.{rank}.txt", watch

    def note(self, event: str, number: int = 0, value: str = "") -> None:
        file = _open(self._name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)  # in the folder of now
        os.write(file, f"{time.monotonic():.6f} {event} {number} {value}\n".encode())
        os.close(file)
        if self._watch is not None:
            self._watch(event, number)


# ---- what is trained -------------------------------------------------------------------------------------------------


def built(case: Case, base: Path) -> Any:
    """The model; `base` is the folder of a saved tiny BERT, to be loaded quantised."""
    torch.manual_seed(0)
    if case.quantization is None:
        return get_model(tiny("bert", **DROPOUT), case.method, task="SEQ_CLS")
    return get_model(str(base), case.method, task="SEQ_CLS", num_labels=NUM_LABELS, quantization=case.quantization)


def save_base(folder: Path) -> None:
    tiny("bert", **DROPOUT).save_pretrained(folder)


def rows_of(seed: int = 0) -> list[dict[str, Tensor]]:
    data = batch("bert", rows=ROWS, seed=seed)
    return [{key: value[i] for key, value in data.items()} for i in range(ROWS)]


class Stream(IterableDataset[dict[str, Tensor]]):
    """Rows without a length."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(rows_of())


def data_of(case: Case) -> Any:
    return Stream() if case.stream else rows_of()


def steps_per_epoch(case: Case) -> int:
    """Of one process."""
    return -(-ROWS // (BATCH * case.accumulation))


def steps_of(case: Case) -> int | None:
    """Where the data do not tell: as many as with a length."""
    return case.epochs * steps_per_epoch(case) if case.stream else None


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def hide_words(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A collator that draws from all three streams."""
    data = collate(rows)
    hidden = torch.rand(data["input_ids"].shape) < (random.random() + np.random.rand()) / 3
    return data | {"input_ids": data["input_ids"].masked_fill(hidden, 4)}


# ---- the loops -------------------------------------------------------------------------------------------------------


def _noting(note: Callable[..., None], made: list[Any], stage_steps: int) -> type[Any]:
    """A Trainer that notes its steps and saves, and is kept in `made`.

    Args:
        stage_steps: of each stage but the last: steps are counted on from stage to stage.
    """

    class Noting(peft_plus.Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

        @property
        def _number(self) -> int:
            stages = self.model.peft_plus.stages
            return self.state.global_step + stage_steps * (stages.index(self.stage) if self.stage else 0)

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            super().log(logs, *args, **kwargs)
            if "loss" in logs:
                note("step", self._number, f"{logs['loss'].hex()},{logs['grad_norm'].hex()}")

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            note("save", self._number)
            super()._save_checkpoint(model, trial)
            note("saved", self._number)

    return Noting


def with_trainer(case: Case, base: Path, log: Log) -> dict[str, str]:
    """Train with the Trainer; returns how it ended."""
    model = built(case, base)
    args = quiet(
        OUTPUT,
        num_train_epochs=case.epochs,
        max_steps=steps_of(case) or -1,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=case.accumulation,
        learning_rate=1e-2,
        warmup_steps=2,
        logging_strategy="steps",
        logging_steps=1,
        save_strategy="epoch" if case.save_every is None else "steps",
        save_steps=case.save_every or 500,
        save_total_limit=case.limit,
        dataloader_num_workers=case.workers,
        **case.arguments,
    )
    _check_processes(args.world_size)
    made: list[Any] = []
    trainer_class = _noting(log.note, made, steps_per_epoch(case))
    resume = any(Path(OUTPUT).glob("**/*checkpoint-*"))
    given: dict[str, Any] = {
        "train_dataset": data_of(case),
        "eval_dataset": rows_of(seed=1) if case.arguments else None,
        "data_collator": hide_words if case.draws else collate,
    }
    if case.staged:
        peft_plus.fit(model, args, trainer_class=trainer_class, resume_from_checkpoint=resume, **given)
    else:
        trainer_class(model, args, **given).train(resume_from_checkpoint=resume)
    trainer = made[-1]
    # Of the first rank, whose history all ranks get when they go on.
    history = _history(trainer) if trainer.is_world_process_zero() else []
    best = [trainer.state.best_metric, trainer.state.best_global_step]
    return ending(model, [trainer.optimizer, trainer.lr_scheduler], {"history": history, "best": best})


def _history(trainer: Any) -> list[dict[str, Any]]:
    """What was logged at each step and evaluation, but for the times that it took."""
    lines = [line for line in trainer.state.log_history if "loss" in line or "eval_loss" in line]
    return [{k: v for k, v in line.items() if "second" not in k and "runtime" not in k} for line in lines]


def with_session(case: Case, base: Path, log: Log) -> dict[str, str]:
    """Train in a bare Accelerate loop; returns how it ended."""
    model = built(case, base)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=case.accumulation)
    _check_processes(accelerator.num_processes)
    session = Session(model, accelerator, epochs=case.epochs, max_steps=steps_of(case))
    optimizer = session.optimizer(torch.optim.AdamW, lr=1e-2)
    loader = session.loader(
        data_of(case), BATCH, collate_fn=hide_words if case.draws else collate, num_workers=case.workers
    )
    schedule = session.scheduler("linear", num_warmup_steps=2)
    if not session.resume(OUTPUT):
        torch.manual_seed(1)
    losses = []
    for data in session.batches(loader):
        with accelerator.accumulate(session.model):
            loss = session.loss(data)
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item().hex())
        if accelerator.sync_gradients:
            log.note("step", session.step, ",".join(losses))
            losses.clear()
            due = session.end_of_epoch if case.save_every is None else session.step % case.save_every == 0
            if due:
                log.note("save", session.step)
                session.save(OUTPUT, limit=case.limit)
                log.note("saved", session.step)
    return ending(model, [optimizer, schedule.scheduler], {"step": session.step, "epoch": session.epoch})


LOOPS: dict[str, Callable[[Case, Path, Log], dict[str, str]]] = {"trainer": with_trainer, "session": with_session}


def _check_processes(number: int) -> None:
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if number != expected:
        raise RuntimeError(f"{number} processes train instead of {expected}")


# ---- a life ----------------------------------------------------------------------------------------------------------


def live(loop: str, case: str, base: Path, watch: Callable[[str, int], None] | None = None) -> None:
    """One life in the current folder."""
    rank = int(os.environ.get("RANK", "0"))
    log = Log(rank, watch)
    log.note("begin", os.getpid())
    # Another state of the random generators than in the life before: what is not restored shows.
    torch.manual_seed(os.getpid())
    random.seed(os.getpid())
    np.random.seed(os.getpid())
    end = LOOPS[loop](CASES[case], base, log)
    scratch = Path(f"end.{rank}.tmp")
    scratch.write_text(json.dumps(end), encoding="utf-8")
    scratch.rename(f"end.{rank}.json")
    log.note("end")


def explained(work: Callable[[], None], rank: int) -> int:
    """Do `work`, with its traceback, or its stacks if it hangs, in `error.<rank>.txt`; returns an exit code."""
    with open(f"error.{rank}.txt", "a", encoding="utf-8") as report:
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=report)
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - whatever it is, the parent must learn of it
            with contextlib.suppress(OSError):  # the disk may be full for this, too
                os.write(report.fileno(), traceback.format_exc().encode())
            return REFUSED if isinstance(error, CheckpointError) else 1
        faulthandler.cancel_dump_traceback_later()
    return 0


def main(folder: Path, runs: list[str]) -> int:
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", "0"))
    for run in runs:
        place = folder / run
        place.mkdir(exist_ok=True, parents=True)
        os.chdir(place)
        loop, case = run.split(":")
        if code := explained(lambda loop=loop, case=case: live(loop, case, folder / "base"), rank):
            return code
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2:]))
