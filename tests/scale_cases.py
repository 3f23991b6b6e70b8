"""Every way in which a loss is scaled, as single optimizer steps: in this process, or in each of two.

`accelerate launch … -m tests.scale_cases FOLDER LIMIT` runs `ON_TWO` in both processes; rank r leaves the gradient and
the batches of case N in `N.gradient.r.safetensors` and `N.batch.M.r.safetensors`, and its error in `r.txt`.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

import peft_plus
from peft_plus import get_model, with_plugins
from tests.scale import (
    Gradients,
    Pull,
    Recorder,
    expected,
    mean_of,
    model_of,
    own_loss_func,
    rows_of,
    run,
    run_session,
    with_free,
)
from tests.tokenizers import tiny_tokenizer

ROWS = 16
SMOOTHING = 0.2

Loss = Literal["plain", "label_smoothing", "compute_loss_func", "mean_loss_func", "dft"]


@dataclass(frozen=True)
class Case:
    """One optimizer step over 16 rows with very different numbers of labels, with the terms of `Pull`.

    Attributes:
        name, task: keys of `tests.models`.
        loss: who computes it: the model, transformers' label smoother, a user's function that divides by the step's
            items or one that returns a plain mean, TRL's dynamic fine-tuning.
        accumulation: micro-batches of one process.
        trainer: the Trainer class, or Session. In a Session the user's own loss is a mean that he hands over.
        together: average over the labels of all processes, not over each one's own.
    """

    name: str
    task: str
    loss: Loss
    accumulation: int
    trainer: Literal["Trainer", "Seq2SeqTrainer", "SFTTrainer", "Session"] = "Trainer"
    together: bool = True

    def __str__(self) -> str:
        parts = [self.trainer, self.name, self.task, self.loss, str(self.accumulation)]
        return "-".join(parts if self.together else [*parts, "apart"])


MODELS = (("bert", "SEQ_CLS"), ("bert", "TOKEN_CLS"), ("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM"))
LOSSES: tuple[Loss, ...] = ("plain", "label_smoothing", "compute_loss_func", "mean_loss_func")
WINDOWS = (1, 4)
CASES = [
    *(Case(*model, loss, window) for model, loss, window in product(MODELS, LOSSES, WINDOWS)),
    *(Case("t5", "SEQ_2_SEQ_LM", loss, window, "Seq2SeqTrainer") for loss, window in product(LOSSES, WINDOWS)),
    *(Case("llama", "CAUSAL_LM", loss, window, "SFTTrainer") for loss, window in product((*LOSSES, "dft"), WINDOWS)),
    *(
        Case(*model, loss, window, "Session")
        for model, loss, window in product(MODELS, ("plain", "label_smoothing", "mean_loss_func"), WINDOWS)
    ),
]
ON_TWO = [
    *CASES,
    *(Case(*model, "plain", 4, together=False) for model in MODELS),
    Case("llama", "CAUSAL_LM", "mean_loss_func", 4, together=False),
    Case("llama", "CAUSAL_LM", "plain", 4, "SFTTrainer", together=False),
]
"""What two processes run. One process alone has nothing to average over, together or not."""


def step(case: Case, folder: Any, processes: int = 1) -> Recorder:
    """Run a case: the gradient of its update, and the batches of this process."""
    model = get_model(with_free(model_of(case.name, case.task)), ["full", Pull()])
    rows: Any = rows_of(case.name, case.task, ROWS)
    size = ROWS // case.accumulation // processes
    if case.trainer == "Session":
        loss = _own_mean(case) if case.loss != "plain" else None
        return _checked(case, run_session(model, rows, batch_size=size, accumulation=case.accumulation, loss=loss))
    given: dict[str, Any] = {}
    if case.loss in ("compute_loss_func", "mean_loss_func"):
        mean = case.loss == "mean_loss_func"
        given["compute_loss_func"] = own_loss_func(shift=case.task == "CAUSAL_LM", mean=mean)
    settings: dict[str, Any] = {}
    trainer_class: Any = peft_plus.Trainer
    if case.trainer == "Seq2SeqTrainer":
        trainer_class, settings = with_plugins(Seq2SeqTrainer), {"kind": Seq2SeqTrainingArguments, "still": {}}
    if case.trainer == "SFTTrainer":
        import trl

        trainer_class, given["processing_class"] = with_plugins(trl.SFTTrainer), tiny_tokenizer("decoder")
        rows = Dataset.from_list([{key: value.tolist() for key, value in row.items()} for row in rows])
        settings = {"kind": trl.SFTConfig, "bf16": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
        settings["loss_type"] = "dft" if case.loss == "dft" else "nll"
    recorder = run(
        model,
        rows,
        folder,
        trainer_class=trainer_class,
        trainer=given,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=case.accumulation,
        label_smoothing_factor=SMOOTHING if case.loss == "label_smoothing" else 0.0,
        average_tokens_across_devices=case.together,
        **settings,
    )
    return _checked(case, recorder)


def _checked(case: Case, recorder: Recorder) -> Recorder:
    if [len(recorder.gradients), len(recorder.batches)] != [1, case.accumulation]:
        raise AssertionError(f"{case}: {len(recorder.gradients)} updates over {len(recorder.batches)} micro-batches")
    return recorder


def _own_mean(case: Case) -> Callable[[Any, Any], Tensor]:
    """What a user computes in a bare loop: transformers' label smoother, or a mean of his own."""
    shift = case.task == "CAUSAL_LM"
    if case.loss == "mean_loss_func":
        own = own_loss_func(shift=shift, mean=True)
        return lambda output, data: own(output, data["labels"])
    smoother = LabelSmoother(epsilon=SMOOTHING)
    return lambda output, data: smoother(output, data["labels"], shift_labels=shift)


def exact(case: Case, batches: Sequence[Sequence[dict[str, Tensor]]]) -> Gradients:
    """What the task's gradient must be.

    Args:
        batches: those of each process.
    """
    model = model_of(case.name, case.task)
    smoothing = SMOOTHING if case.loss == "label_smoothing" else 0.0
    groups = [[batch for own in batches for batch in own]] if case.together else batches
    return mean_of([expected(model, group, case.task, smoothing, case.loss == "dft") for group in groups])


# ---- two processes -----------------------------------------------------------------------------------------------


def main(folder: Path) -> None:
    state = PartialState(cpu=True)
    if state.num_processes != 2 or state.backend != "gloo":
        raise RuntimeError(f"expected two gloo processes, not {state.num_processes} with {state.backend}")
    torch.set_num_threads(1)
    for number, case in enumerate(ON_TWO):
        with tempfile.TemporaryDirectory() as scratch:
            recorder = step(case, scratch, processes=2)
        save_file(recorder.gradients[0], folder / f"{number}.gradient.{state.process_index}.safetensors")
        for place, batch in enumerate(recorder.batches):
            save_file(batch, folder / f"{number}.batch.{place}.{state.process_index}.safetensors")
    state.destroy_process_group()


def of_rank(case: Case, folder: Path, rank: int) -> tuple[Gradients, list[dict[str, Tensor]]]:
    """The gradient and the batches that one of the two processes left behind."""
    number = ON_TWO.index(case)
    batches = [load_file(folder / f"{number}.batch.{i}.{rank}.safetensors") for i in range(case.accumulation)]
    return load_file(folder / f"{number}.gradient.{rank}.safetensors"), batches


if __name__ == "__main__":
    report = (Path(sys.argv[1]) / f"{os.environ['RANK']}.txt").open("w")
    faulthandler.dump_traceback_later(float(sys.argv[2]), exit=True, file=report)
    try:
        main(Path(sys.argv[1]))
    except BaseException:
        traceback.print_exc(file=report)
        report.flush()
        raise
