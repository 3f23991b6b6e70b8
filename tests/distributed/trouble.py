"""Runs that go wrong on one of two ranks: `python -m tests.distributed.trouble FOLDER SECONDS`.

One warm process forks both ranks of every case, so that each costs a second instead of a start. A rank that still
runs after SECONDS writes its stacks and ends. `FOLDER/ends.json` holds for each case both exit codes and outputs.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig
from transformers import TrainerCallback, default_data_collator

import peft_plus
from peft_plus import LossTerm, Plugin, get_model
from peft_plus.distributed import check_accelerator
from peft_plus.step_loss import StepLoss
from tests.models import batch, tiny
from tests.training import quiet

from .test_distributed import accelerator, fsdp2

CASES: dict[str, Callable[[Path, int], None]] = {}


def case(function: Callable[[Path, int], None]) -> Callable[[Path, int], None]:
    CASES[function.__name__] = function
    return function


def train(folder: Path, *plugins: Plugin, collate: Any = default_data_collator, **given: Any) -> Any:
    torch.manual_seed(0)
    data = batch("bert", rows=32)
    rows = [{name: values[i] for name, values in data.items()} for i in range(32)]
    model = get_model(tiny("bert"), [LoraConfig(r=4), *plugins])
    args = quiet(folder, per_device_train_batch_size=2, max_steps=4, learning_rate=0.05, optim="sgd")
    trainer = peft_plus.Trainer(model, args, train_dataset=rows, data_collator=collate, **given)
    trainer.train()
    return trainer


class Term(Plugin):
    """A loss term that is not a number on rank 1."""

    name = "term"

    def loss_terms(self, run, batch, output):
        wrong = run.step == 1 and os.environ["RANK"] == "1"
        return {"term": LossTerm(output.logits.sum() * (float("nan") if wrong else 0.0), 1, per="step")}


class Gate(Plugin):
    """Raises on rank 1 when it is asked the second time."""

    name = "gate"

    def may_train(self, run, param):
        if run.step == 1 and os.environ["RANK"] == "1":
            raise ZeroDivisionError("on this rank only")
        return True


class Nudge(TrainerCallback):
    """Moves a weight on rank 1."""

    def __init__(self, part: str) -> None:
        self._part = part

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 2 and os.environ["RANK"] == "1":
            tensor = next(t for name, t in model.named_parameters() if self._part in name)
            with torch.no_grad():
                tensor.view(-1)[0] += 0.5


def without_labels(rows: list[Any]) -> Any:
    made = default_data_collator(rows)
    if os.environ["RANK"] == "1":
        del made["labels"]
    return made


@case
def a_hook_raises(folder: Path, rank: int) -> None:
    train(folder, Gate())


@case
def a_term_is_not_a_number(folder: Path, rank: int) -> None:
    train(folder, Term())


@case
def a_frozen_weight_moves(folder: Path, rank: int) -> None:
    train(folder, callbacks=[Nudge("query.base_layer.weight")])


@case
def a_trained_weight_moves(folder: Path, rank: int) -> None:
    train(folder, callbacks=[Nudge("query.lora_A")])


@case
def a_batch_without_labels(folder: Path, rank: int) -> None:
    train(folder, collate=without_labels)


@case
def a_batch_without_labels_for_a_term(folder: Path, rank: int) -> None:
    from peft_plus_stability.r3f import R3F

    train(folder, R3F(eps=0.1), collate=without_labels)


@case
def a_sharded_model_from_different_seeds(folder: Path, rank: int) -> None:
    torch.manual_seed(rank)
    model = get_model(tiny("bert"), "lora")
    check_accelerator(model.peft_plus, model, accelerator(fsdp=fsdp2()))


@case
def a_step_of_different_length(folder: Path, rank: int) -> None:
    """Rank 0 has two micro-batches of the step's two, rank 1 has only one."""
    state = PartialState(cpu=True)
    model = get_model(tiny("bert"), "lora")

    def gather(numbers: torch.Tensor) -> torch.Tensor:
        table = [torch.empty_like(numbers) for _ in range(2)]
        torch.distributed.all_gather(table, numbers)
        return torch.stack(table)

    loss = StepLoss(model, model.peft_plus.task, gather=gather, processes=2, rank=state.process_index)
    made = [batch("bert", rows=3), batch("bert", rows=2)]
    loss.begin(made if rank == 0 else made[:1], micro_batches=2)
    sys.stdout.write(f"SHARE {float(loss.share(torch.ones(()), made[0]))} first {loss.first_example}")


def child(name: str, folder: Path, rank: int, limit: float) -> None:
    """One rank of one case; never returns."""
    with (folder / f"{name}.{rank}.txt").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        faulthandler.dump_traceback_later(limit, exit=True, file=output)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        code = 0
        try:
            # Through a file: no port that another test could take.
            torch.distributed.init_process_group("gloo", f"file://{folder}/{name}.store", rank=rank, world_size=2)
            CASES[name](folder / name, rank)
        except BaseException:  # noqa: BLE001 - whatever it is, this copy of the parent must end here
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(folder: Path, limit: float) -> None:
    torch.set_num_threads(1)
    ends = {}
    for name in CASES:
        ranks = []
        for rank in (0, 1):
            pid = os.fork()
            if pid == 0:
                child(name, folder, rank, limit)
            ranks.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
        texts = [(folder / f"{name}.{rank}.txt").read_text() for rank in (0, 1)]
        ends[name] = list(zip(codes, texts, strict=True))
    (folder / "ends.json").write_text(json.dumps(ends), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
