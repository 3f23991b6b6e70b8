"""Passes in the place of the plain one: their losses and gradients add up to what plain PyTorch gives, on any loop."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import default_data_collator

import peft_plus
from peft_plus import DataError, LossTerm, MethodError, Pass, Plugin, PluginError, Session, get_model
from peft_plus.batch_rows import repeated

from .consistency import Grab, accumulated, distance, gradients, model_and_batch, sampler_order, trainer_of, two_passes
from .models import rows_of

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")


@dataclass(kw_only=True)
class Passing(Plugin):
    """Makes the passes that its class holds, and notes there what comes back."""

    name = "passing"
    given: ClassVar[list[Any]] = []
    received: ClassVar[list[Any]] = []

    def passes(self, run, batch) -> Generator[Pass, Tensor | None, None]:
        for one in self.given:
            self.received.append((yield one))


def passing(passes: list[Any]) -> Passing:
    return type("Own", (Passing,), {"given": passes, "received": []})()


@dataclass(kw_only=True)
class Norms(Plugin):
    """A term of each unit: the logits squared by example, and a constant pull on the head by step."""

    name: ClassVar[str] = "norms"

    def loss_terms(self, run, batch, output):
        head = next(p for n, p in run.model.named_parameters() if "classifier" in n and p.requires_grad)
        return {
            "logits": LossTerm(output.logits.square().sum(), len(output.logits), per="example"),
            "head": LossTerm(0.1 * head.square().sum(), 1, per="step"),
        }


def trained(plugins: list[Plugin], rows: Any, folder: Path, model: nn.Module, **settings: Any) -> Any:
    grab = Grab()
    model = get_model(model, ["full", *plugins])
    run = trainer_of(model, rows, folder, [grab], max_steps=1, **settings)
    run.train()
    return grab.gradients, run, model.peft_plus.plugins[0]


def made(rows: int = 8) -> tuple[nn.Module, dict[str, Tensor]]:
    model, data = model_and_batch("bert", "SEQ_CLS", rows=rows)
    order = sampler_order(rows)
    return model, {name: value[order] for name, value in data.items()}


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("copies", [1, 2, 3])
def test_copies_without_dropout_are_the_plain_pass_with_all_its_terms(
    copies: int, micro_batches: int, tmp_path: Path
) -> None:
    data = model_and_batch("bert", "SEQ_CLS", rows=8)[1]
    settings = accumulated(8, micro_batches)
    plain, *_ = trained([Norms()], rows_of(data), tmp_path, made()[0], **settings)
    several, *_ = trained([passing([Pass(copies=copies)]), Norms()], rows_of(data), tmp_path, made()[0], **settings)
    assert distance(several, plain) < 1e-6


@pytest.mark.parametrize("loop", ["trainer", "session"])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_weighted_passes_add_up_and_the_gradient_on_the_noise_comes_back(
    loop: str, micro_batches: int, tmp_path: Path
) -> None:
    """Two noised passes of weights ¼ and ¾ against autograd on `inputs_embeds`."""
    rows = 8
    model, data = made(rows)
    draw = torch.Generator().manual_seed(1)
    noise = 0.1 * torch.randn(rows // micro_batches, data["input_ids"].shape[1], 32, generator=draw)
    deltas: list[Tensor] = []

    def delta(output: Tensor) -> Tensor:
        deltas.append(noise[: len(output)].clone().requires_grad_())
        return deltas[-1]

    passes = [
        Pass(perturb={"embeddings": delta}, weight=0.25, final=False),
        Pass(perturb={"embeddings": -noise}, weight=0.75),
    ]
    plugin = passing(passes)
    shuffled = model_and_batch("bert", "SEQ_CLS", rows=rows)[1]
    if loop == "trainer":
        got, run, _ = trained([plugin], rows_of(shuffled), tmp_path, model, **accumulated(rows, micro_batches))
        loss = run.state.log_history[-1]["train_loss"]
    else:
        got, loss = in_session([plugin], shuffled, micro_batches, model)
    expected, size = made(rows)[0], rows // micro_batches
    total = torch.zeros(())
    wanted: list[Tensor] = []
    for start in range(0, rows, size):
        part = {name: value[start : start + size] for name, value in (data if loop == "trainer" else shuffled).items()}
        own = noise.clone().requires_grad_()
        first = nn.functional.cross_entropy(two_passes(expected, "bert", part, own)[1].logits, part["labels"])
        other = nn.functional.cross_entropy(two_passes(expected, "bert", part, -noise)[1].logits, part["labels"])
        share = (0.25 * first + 0.75 * other) / micro_batches
        share.backward()
        assert own.grad is not None
        wanted.append(own.grad)
        total = total + share.detach()
    assert distance(got, gradients(expected)) < 1e-5
    assert loss == pytest.approx(float(total), rel=1e-5)
    assert len(deltas) == micro_batches
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(plugin.received, wanted, strict=True))


def in_session(
    plugins: list[Plugin], data: dict[str, Tensor], micro_batches: int, model: nn.Module
) -> tuple[Any, float]:
    model = get_model(model, ["full", *plugins])
    session = Session(model, Accelerator(cpu=True, gradient_accumulation_steps=micro_batches), max_steps=1)
    optimizer = session.optimizer(torch.optim.SGD, lr=1e-3)
    rows = rows_of(data)
    loader = session.loader(rows, len(rows) // micro_batches, shuffle=False, collate_fn=default_data_collator)
    got: dict[str, Tensor] = {}
    for batch in session.batches(loader):
        with session.accelerator.accumulate(session.model):
            session.accelerator.backward(session.loss(batch))
            got = gradients(model)
            optimizer.step()
            optimizer.zero_grad()
    return got, session.logs()["loss"]


def test_with_checkpointing_the_passes_give_the_same_gradients(tmp_path: Path) -> None:
    data = rows_of(model_and_batch("bert", "SEQ_CLS", rows=4)[1])
    noise = 0.1 * torch.randn(4, 8, 32, generator=torch.Generator().manual_seed(1))
    noise = noise[:, : len(data[0]["input_ids"])]
    passes = [Pass(perturb={"embeddings": noise}, weight=0.5, final=False), Pass(weight=0.5, copies=2)]
    got = [
        trained([passing(passes)], data, tmp_path, made(4)[0], activation_checkpointing=checkpointing)[0]
        for checkpointing in (False, True)
    ]
    assert distance(got[1], got[0]) < 1e-6


@pytest.mark.parametrize(
    ("passes", "says"),
    [
        ([], "passes ended without a final one"),
        ([Pass(final=False)], "passes ended without a final one"),
        ([Pass(copies=0)], "expected a Pass with copies ≥ 1"),
        ([3], "expected a Pass"),
        ([Pass(perturb={"trunk": torch.zeros(())})], "perturbed in the embeddings, not in"),
    ],
)
def test_wrong_passes_are_told(passes: list[Any], says: str, tmp_path: Path) -> None:
    data = rows_of(model_and_batch("bert", "SEQ_CLS", rows=4)[1])
    with pytest.raises((PluginError, ValueError), match=says):
        trained([passing(passes)], data, tmp_path, made(4)[0])


def test_two_plugins_that_make_the_passes_are_refused_before_training() -> None:
    other = type("Other", (Passing,), {"name": "other"})
    with pytest.raises(MethodError, match="both make the passes of a micro-batch"):
        get_model(made(4)[0], ["full", Passing(), other()])


def test_a_session_refuses_a_pass_of_the_users_own(tmp_path: Path) -> None:
    model, data = made(4)
    model = get_model(model, ["full", passing([Pass()])])
    session = Session(model, Accelerator(cpu=True), max_steps=1)
    session.optimizer(torch.optim.SGD, lr=1e-3)
    loader = session.loader(rows_of(data), 4, collate_fn=default_data_collator)
    batch = next(session.batches(loader))
    with pytest.raises(MethodError, match="a plugin of this model makes the passes itself"):
        session.loss(batch, output=session.model(**batch))


def test_the_loss_of_several_passes_counts_as_that_of_one_micro_batch(tmp_path: Path) -> None:
    """A NaN is found and named in its micro-batch, whatever the number of passes."""
    model, data = made(4)
    passes = [Pass(weight=0.5, final=False), Pass(weight=0.5)]
    model = get_model(model, ["full", passing(passes)])
    with torch.no_grad():
        model.get_input_embeddings().weight[data["input_ids"][0, 0]] = 1e38
    with pytest.raises(peft_plus.TrainingError, match="in the batch, rows 1 to 4 of the step"):
        trainer_of(model, rows_of(data), tmp_path, max_steps=1).train()


@dataclass(kw_only=True)
class Halved(Plugin):
    """Computes with half of each matrix in the blocks."""

    name: ClassVar[str] = "halved"

    def effective_weight(self, run, param, value):
        return 0.5 * value if len(param.shape) > 1 and 1 <= param.depth <= run.num_blocks else value


@pytest.mark.parametrize("loop", ["trainer", "session"])
def test_each_pass_has_weights_of_its_own_to_go_back_through(loop: str, tmp_path: Path) -> None:
    """Three passes in equal parts are the plain one, also where all compute with other weights."""
    data = model_and_batch("bert", "SEQ_CLS", rows=8)[1]
    parts = [Pass(weight=1 / 3, final=final) for final in (False, False, True)]
    got = []
    for passes in ([Pass()], parts):
        plugins = [passing(passes), Halved()]
        if loop == "session":
            got.append(in_session(plugins, data, 2, made()[0])[0])
        else:
            got.append(trained(plugins, rows_of(data), tmp_path, made()[0], **accumulated(8, 2))[0])
    assert distance(got[1], got[0]) < 1e-6


def test_what_is_laid_end_to_end_is_not_repeated_in_silence() -> None:
    """Patches of several images, as Qwen-VL has them, belong to rows that nobody knows."""
    batch = {"pixel_values": torch.zeros(6, 2), "input_ids": torch.zeros(4, 3), "position_ids": torch.zeros(1, 3)}
    with pytest.raises(DataError, match=r"pixel_values has shape \(6, 2\) in a batch of 4 rows"):
        repeated(batch, 2)
    longer = repeated({name: value for name, value in batch.items() if name != "pixel_values"}, 2)
    assert [len(value) for value in longer.values()] == [8, 1]
    packed = {"input_ids": torch.zeros(1, 7), "cu_seq_lens_q": torch.tensor([0, 3, 7])}
    assert repeated(packed, 3)["cu_seq_lens_q"].tolist() == [0, 3, 7, 10, 14, 17, 21]
