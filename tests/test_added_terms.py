"""A plugin's term weighs what it says, from 1.0 to 1e-6, whoever computes the loss, on one process and on two."""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback, default_data_collator

import peft_plus
from peft_plus import LossTerm, Plugin, get_model

from . import scale_cases
from .distributed.launch import launch
from .scale import STILL, Recorder, arguments, check_pulled, distance, expected, model_of, own_loss_func, rows_of, run
from .scale_cases import CASES, ON_TWO, Case, exact, step

pytestmark = pytest.mark.filterwarnings(
    "ignore:`(label_smoothing_factor|compute_loss_func)` is deprecated:FutureWarning"  # in TRL's SFTTrainer only
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_one_process(case, tmp_path):
    recorder = step(case, tmp_path)
    (got,) = recorder.gradients
    check_pulled(got)
    assert distance(got, exact(case, [recorder.batches])) < 1e-6


@pytest.mark.slow
def test_on_two_processes(tmp_path):
    """All cases in one launch, whose start costs more than they do."""
    done = launch("tests.scale_cases", folder=tmp_path, limit=400)
    assert done.returncode == 0, done.stdout
    wrong = {}
    for case in ON_TWO:
        (first, *own), (second, *others) = (scale_cases.of_rank(case, tmp_path, rank) for rank in (0, 1))
        check_pulled(first)
        check_pulled(second)
        away = distance(first, exact(case, [*own, *others]))
        if away >= 1e-6 or any(not torch.equal(first[name], second[name]) for name in first | second):
            wrong[str(case)] = away
    assert not wrong
    # Or averaging together could not be told from averaging apart.
    together, apart = (Case("bert", "TOKEN_CLS", "plain", 4, together=flag) for flag in (True, False))
    batches = [scale_cases.of_rank(apart, tmp_path, rank)[1] for rank in (0, 1)]
    assert distance(exact(together, batches), exact(apart, batches)) > 1e-3


@dataclass(kw_only=True)
class PullLogits(Plugin):
    """weight · Σ over labels of the logits' sum."""

    name: ClassVar[str] = "pull_logits"

    weight: float = 1.0

    def loss_terms(self, run, batch, output):
        ((logits, mask),) = run.task.logits(output, batch)
        return {"logits": LossTerm(self.weight * logits[mask].sum(), mask.sum())}


LOSSES = ("plain", "label_smoothing", "compute_loss_func")
MODELS = [("bert", "TOKEN_CLS"), ("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")]


@pytest.mark.parametrize(
    ("name", "task", "loss", "weight"),
    [
        *((*model, loss, 1.0) for model in MODELS for loss in LOSSES),
        # The others compute parts in fp32 even here, where 1e-6 is lost beside the task's loss.
        *(("bert", "TOKEN_CLS", loss, 1e-6) for loss in ("plain", "compute_loss_func")),
    ],
)
def test_a_term_over_logits_is_summed_over_the_whole_step(name, task, loss, weight, tmp_path):
    model = model_of(name, task).double()
    untouched = copy.deepcopy(model).train()
    smoothing = 0.2 if loss == "label_smoothing" else 0.0
    recorder = run(
        get_model(model, ["full", PullLogits(weight=weight)]),
        rows_of(name, task),
        tmp_path,
        trainer={"compute_loss_func": own_loss_func(shift=task == "CAUSAL_LM")} if loss == "compute_loss_func" else {},
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        label_smoothing_factor=smoothing,
    )
    of_task = expected(untouched, recorder.batches, task, smoothing)
    total, labels = torch.zeros((), dtype=torch.float64), 0
    for data in recorder.batches:
        logits = untouched(**{k: v for k, v in data.items() if k != "labels"}).logits
        known = data["labels"] != -100
        if task == "CAUSAL_LM":
            logits, known = logits[:, :-1], known[:, 1:]
        total, labels = total + logits[known].sum(), labels + int(known.sum())
    (total / labels).backward()
    of_term = {n: p.grad for n, p in untouched.named_parameters() if p.grad is not None}
    (got,) = recorder.gradients
    added = {n: (got[n] - of_task.get(n, torch.zeros(()))) / weight for n in got}
    assert distance(added, of_term) < 1e-6


def test_terms_are_logged_as_their_means(tmp_path):
    model = get_model(model_of("bert", "SEQ_CLS"), ["full", PullLogits(weight=2.0)])
    recorder = Recorder()
    trainer = peft_plus.Trainer(
        model,
        arguments(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=4, logging_steps=1),
        train_dataset=rows_of("bert", "SEQ_CLS"),
        data_collator=recorder.collate,
        **STILL,
    )
    trainer.train()
    with torch.no_grad():
        logits = torch.cat([model(**{k: v for k, v in b.items() if k != "labels"}).logits for b in recorder.batches])
    assert trainer.state.log_history[0]["logits"] == pytest.approx(2.0 * float(logits.sum(-1).mean()), abs=2e-6)


@pytest.mark.parametrize("method", ["full", ["full", PullLogits()]], ids=["plain", "with a term"])
def test_the_logits_are_let_go_of_before_the_update(method, tmp_path):
    """Or they would be in memory together with the next batch's."""
    seen: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    class Looks(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            alive.extend(logits() is not None for logits in seen)

    model = get_model(model_of("bert", "SEQ_CLS"), method)
    model.register_forward_hook(lambda module, args, output: seen.append(weakref.ref(output.logits)))
    given = {"callbacks": [Looks()]}
    run(model, rows_of("bert", "SEQ_CLS"), tmp_path, trainer=given, per_device_train_batch_size=8)
    assert alive == [False, False, False]  # the first one's, then both


def test_evaluation_adds_no_terms(tmp_path):
    rows = rows_of("bert", "SEQ_CLS")
    losses: list[Any] = []
    for method in ("full", ["full", PullLogits(weight=100.0)]):
        trainer = peft_plus.Trainer(
            get_model(model_of("bert", "SEQ_CLS"), method),
            arguments(tmp_path, per_device_eval_batch_size=4),
            train_dataset=rows,
            eval_dataset=rows,
            data_collator=default_data_collator,
            **STILL,
        )
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1]
