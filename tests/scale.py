"""The oracle for a step's gradient, in plain torch, and the runs that are compared with it. Knows no pytest."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback, default_data_collator

import peft_plus
from peft_plus import LossTerm, Plugin, Session

from .models import NUM_LABELS, PAD, batch, tiny
from .training import quiet

PROBLEMS = ("multi_label_classification", "regression")

Row = dict[str, Tensor]
Gradients = dict[str, Tensor]


def rows_of(name: str, task: str, number: int = 16, seed: int = 0) -> list[Row]:
    """Single examples with very different numbers of labels."""
    problem, task = (task, "SEQ_CLS") if task in PROBLEMS else ("", task)
    data = batch(name, task, rows=number, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    if problem == "multi_label_classification":
        data["labels"] = torch.randint(0, 2, (number, NUM_LABELS), generator=draw).float()
    if problem == "regression":
        data["labels"] = torch.randn(number, generator=draw)
    if task in ("TOKEN_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM", "MASKED_LM"):
        kept = 2 + torch.arange(number) * 5 % 6  # between 2 and 7 labels, uneven in any order
        data["labels"] = data["labels"].masked_fill(torch.arange(data["labels"].shape[1]) >= kept[:, None], -100)
    if task == "SEQ_2_SEQ_LM":
        data["decoder_input_ids"] = shifted_right(data["labels"], start=PAD)
    return [{key: value[i] for key, value in data.items()} for i in range(number)]


def shifted_right(labels: Tensor, start: int) -> Tensor:
    return torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1].masked_fill(labels[:, :-1] < 0, PAD)], 1)


def model_of(name: str, task: str) -> nn.Module:
    if task in PROBLEMS:
        return tiny(name, problem_type=task, num_labels=1 if task == "regression" else NUM_LABELS)
    return tiny(name, task)


# ---- the oracle: plain torch -------------------------------------------------------------------------------------


def summed_loss(
    model: nn.Module, data: Mapping[str, Tensor], task: str, smoothing: float = 0.0, dft: bool = False
) -> tuple[Tensor, int]:
    """The summed loss of a batch and over how many labels it runs.

    Args:
        dft: weigh each label by its own probability (dynamic fine-tuning, arXiv:2508.05629).
    """
    labels = {key: data[key] for key in ("labels", "start_positions", "end_positions") if key in data}
    output = model(**{key: value for key, value in data.items() if key not in labels})
    match task:
        case "QUESTION_ANS":
            start = F.cross_entropy(output.start_logits, labels["start_positions"], reduction="sum")
            end = F.cross_entropy(output.end_logits, labels["end_positions"], reduction="sum")
            return (start + end) / 2, len(labels["start_positions"])
        case "multi_label_classification":
            wanted = labels["labels"]
            return F.binary_cross_entropy_with_logits(output.logits, wanted, reduction="sum"), wanted.numel()
        case "regression":
            return (output.logits[:, 0] - labels["labels"]).square().sum(), len(labels["labels"])
    logits, wanted = output.logits, labels["labels"]
    if task == "CAUSAL_LM":
        logits, wanted = logits[:, :-1], wanted[:, 1:]
    known = wanted != -100
    log_p = logits[known].log_softmax(-1)
    nll = -log_p.gather(1, wanted[known][:, None])
    if dft:
        nll = nll * (-nll).exp().detach()
    return (1 - smoothing) * nll.sum() - smoothing * log_p.mean(-1).sum(), int(known.sum())


def expected(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    task: str,
    smoothing: float = 0.0,
    dft: bool = False,
) -> Gradients:
    """The gradient of the mean over all labels of all batches."""
    model = copy.deepcopy(model).train()
    model.zero_grad()
    parts = [summed_loss(model, b, task, smoothing, dft) for b in batches]
    (sum(loss for loss, _ in parts) / sum(n for _, n in parts)).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def mean_of(gradients: Sequence[Gradients]) -> Gradients:
    """The average of several gradients."""
    zero = torch.zeros(())
    names = {name for gradient in gradients for name in gradient}
    return {n: sum((g.get(n, zero) for g in gradients), zero) / len(gradients) for n in names}


def distance(got: Gradients, wanted: Gradients) -> float:
    """‖got − wanted‖ / ‖wanted‖ over all parameters together."""
    names = got.keys() | wanted.keys()
    zero = torch.zeros(())
    difference = sum((got.get(n, zero) - wanted.get(n, zero)).double().square().sum() for n in names)
    return float((difference / sum(g.double().square().sum() for g in wanted.values())).sqrt())


# ---- the runs ----------------------------------------------------------------------------------------------------


class Recorder(TrainerCallback):
    """Collator and callback: keeps the batches as they were made, and the gradient of every update."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []
        self.gradients: list[Gradients] = []

    def collate(self, rows: list[Row]) -> dict[str, Tensor]:
        made = default_data_collator(rows)
        self.batches.append({key: value.clone() for key, value in made.items()})
        return made

    def keep_gradients(self, model: nn.Module) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self.keep_gradients(model)


STILL = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.0})}
"""For a Trainer: the weights stay, so that every update can be compared with the untouched copy."""


def arguments(folder: Any, **settings: Any) -> Any:
    defaults = {
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "num_train_epochs": 1,
        "remove_unused_columns": False,
    }
    return quiet(folder, **{**defaults, **settings})


def run(
    model: nn.Module,
    rows: Sequence[Row] | Dataset,
    folder: Any,
    *,
    trainer_class: type[Any] = peft_plus.Trainer,
    trainer: Mapping[str, Any] | None = None,
    still: Mapping[str, Any] = STILL,
    **settings: Any,
) -> Recorder:
    """Train, and record.

    Args:
        trainer: more for the Trainer class.
        still: keeps the weights; {} for a class that does not take it, where a single update is compared.
    """
    recorder, given = Recorder(), dict(trainer or {})
    trainer_class(
        model=model,
        args=arguments(folder, **settings),
        train_dataset=rows if isinstance(rows, Dataset) else list(rows),
        data_collator=recorder.collate,
        callbacks=[recorder, *given.pop("callbacks", [])],
        **still,
        **given,
    ).train()
    return recorder


def run_session(
    model: nn.Module,
    rows: Sequence[Row],
    *,
    batch_size: int,
    accumulation: int,
    loss: Callable[[Any, Row], Tensor] | None = None,
) -> Recorder:
    """One update of a bare loop.

    Args:
        loss: the user's own: output and batch → the mean over its labels.
    """
    recorder, accelerator = Recorder(), Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    session = Session(model, accelerator, epochs=1)
    optimizer = session.optimizer(torch.optim.SGD, lr=1e-3)
    loader = session.loader(rows, batch_size, collate_fn=recorder.collate)
    for data in session.batches(loader):
        with accelerator.accumulate(session.model):
            output = session.model(**data) if loss else None
            own = loss(output, data) if loss else None
            accelerator.backward(session.loss(data, output=output, loss=own))
            if accelerator.sync_gradients:
                recorder.keep_gradients(model)
            optimizer.step()
            optimizer.zero_grad()
    return recorder


def windows(batches: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [batches[i : i + size] for i in range(0, len(batches), size)]


# ---- added terms -------------------------------------------------------------------------------------------------

WEIGHTS = (1.0, 1e-6)
UNITS = ("label", "example", "step")


@dataclass(kw_only=True)
class Pull(Plugin):
    """weight · Σ of a parameter that nothing else uses, once per label, example and step: gradient = weight."""

    name: ClassVar[str] = "pull"

    def loss_terms(self, run, batch, output):
        known = {"label": run.task.count(batch), "example": len(batch["input_ids"]), "step": 1}
        free = dict(run.model.named_parameters())
        return {
            f"{unit}_{i}": LossTerm(weight * free[f"free_{unit}_{i}"].sum() * known[unit], known[unit], per=unit)
            for unit in UNITS
            for i, weight in enumerate(WEIGHTS)
        }


def with_free(model: nn.Module) -> nn.Module:
    """`model` with the parameters that `Pull` pulls. 0 times their sum goes through it: DDP wants to see them used."""
    free = [nn.Parameter(torch.randn(3)) for _ in product(UNITS, WEIGHTS)]
    for name, parameter in zip(product(UNITS, range(len(WEIGHTS))), free, strict=True):
        model.register_parameter("free_{}_{}".format(*name), parameter)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda module, args, output: output + 0 * sum(p.sum() for p in free))
    return model


def check_pulled(gradients: Gradients) -> None:
    """Each term of `Pull` weighs what it says. Takes their gradients out of `gradients`."""
    for unit in UNITS:
        for i, weight in enumerate(WEIGHTS):
            added = gradients.pop(f"free_{unit}_{i}")
            torch.testing.assert_close(added, torch.full((3,), weight), rtol=1e-6, atol=0.0)


def own_loss_func(*, shift: bool, mean: bool = False) -> Callable[..., Tensor]:
    """A user's `compute_loss_func`: divided by the step's items, or the mean over the micro-batch."""

    def compute(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits = outputs.logits
        if shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        logits, labels = logits.flatten(0, -2), labels.flatten()
        if mean:
            return F.cross_entropy(logits, labels)
        return F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch

    return compute
