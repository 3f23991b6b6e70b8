"""R4F against torch's own spectral norm, SciPy's singular values, and plain PEFT."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import scipy.linalg
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers import default_data_collator

from peft_plus import MethodError, Plugin, Run, Session, Trainer, get_model
from peft_plus_stability.r4f import R4F, iterate, normalised
from tests.consistency import (
    Grab,
    arguments,
    distance,
    gradients,
    lively,
    model_and_batch,
    sampler_order,
    summed_distance,
    trainer_of,
    two_passes,
)
from tests.models import batch, rows_of, tiny

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")
NOISY = {"weight": 0.7, "eps": 0.5}
HEADS = {"bert": ["classifier"], "roberta": ["classifier.dense", "classifier.out_proj"]}


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def spectral_norm(weight: Tensor) -> float:
    """The largest singular value, by SciPy."""
    return float(scipy.linalg.svdvals(weight.detach().double().numpy())[0])


def with_torchs_norm(model: nn.Module, names: list[str]) -> nn.Module:
    """A copy whose layers have torch's own spectral norm, at the exact singular vectors and without iterations."""
    model = copy.deepcopy(model).train()
    for name in names:
        layer = parametrizations.spectral_norm(model.get_submodule(name), n_power_iterations=1).eval()
        norm: Any = layer.parametrizations.weight[0]
        u, _, v = torch.linalg.svd(layer.parametrizations.weight.original.detach())
        norm._u.copy_(u[:, 0])
        norm._v.copy_(v[0])
    return model


def plainly(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("parametrizations.weight.original", "weight"): grad for name, grad in grads.items()}


def noise_of(run: Any, rows: int, eps: float) -> Tensor:
    """As R3F draws it: a stream for each example."""
    streams = [run.generator("r3f", row, 0) for row in range(rows)]
    return torch.stack([torch.empty(8, 32).uniform_(-eps, eps, generator=stream) for stream in streams])


# ---- the norm ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 32), (1, 32), (32, 3), (16, 16)])
def test_value_and_gradient_against_torchs_parametrization(shape: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=draw).requires_grad_()
    u, v = iterate(weight.detach(), nn.functional.normalize(torch.randn(shape[1], generator=draw), dim=0), times=500)
    layer = nn.Linear(shape[1], shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    layer = with_torchs_norm(nn.Sequential(layer), ["0"])[0]
    pull = torch.randn(shape, generator=draw)
    (normalised(weight, u, v) * pull).sum().backward()
    (layer.weight * pull).sum().backward()
    assert spectral_norm(normalised(weight, u, v)) == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(weight.grad, layer.parametrizations.weight.original.grad, rtol=1e-4, atol=1e-6)


def test_one_iteration_is_torchs() -> None:
    """From the same vectors: v of the last step, one round, the same σ."""
    layer = parametrizations.spectral_norm(nn.Linear(8, 3), n_power_iterations=1)
    norm: Any = layer.parametrizations.weight[0]
    weight, before = layer.parametrizations.weight.original.detach(), norm._v.clone()
    layer.train()
    found = layer.weight.detach()
    u, v = iterate(weight, before, times=1)
    torch.testing.assert_close(u, norm._u)
    torch.testing.assert_close(v, norm._v)
    torch.testing.assert_close(normalised(weight, u, v), found)


# ---- in a run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "task"), [("bert", "SEQ_CLS"), ("roberta", "SEQ_CLS"), ("bert", "TOKEN_CLS")])
def test_the_whole_gradient_against_plain_torch(name: str, task: str, tmp_path: Path) -> None:
    model, data = model_and_batch(name, task)
    twin = with_torchs_norm(model, HEADS[name])
    grab = Grab()
    model = get_model(model, ["full", R4F(**NOISY)])
    trainer_of(model, rows_of(data), tmp_path, [grab], max_steps=1, max_grad_norm=0.0).train()
    data = {key: value[sampler_order(4)] for key, value in data.items()}
    run = Run(model=model, task=model.peft_plus.task, num_blocks=3, seed=42, stage=model.peft_plus.stages[0])
    clean, noised = two_passes(twin, "bert", data, noise_of(run, 4, 0.5))
    total, count = summed_distance(task, data, clean, noised)
    known = data["labels"] != -100
    (nn.functional.cross_entropy(clean.logits[known], data["labels"][known]) + 0.7 * total / count).backward()
    assert total > 1e-3
    assert distance(grab.gradients, plainly(gradients(twin))) < 1e-4


def test_the_gradient_in_a_session(tmp_path: Path) -> None:
    model, data = model_and_batch("bert", "SEQ_CLS")
    twin = with_torchs_norm(model, HEADS["bert"])
    model = get_model(model, ["full", R4F(**NOISY)])
    session = Session(model, Accelerator(cpu=True), max_steps=1)
    optimizer = session.optimizer(torch.optim.SGD, lr=1e-2)
    loader = session.loader(rows_of(data), 4, shuffle=False, collate_fn=default_data_collator)
    got: dict[str, Tensor] = {}
    for micro_batch in session.batches(loader):
        session.accelerator.backward(session.loss(micro_batch))
        got = gradients(model)
        noise = noise_of(session.engine.run, 4, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    clean, noised = two_passes(twin, "bert", data, noise)
    total, count = summed_distance("SEQ_CLS", data, clean, noised)
    (nn.functional.cross_entropy(clean.logits, data["labels"]) + 0.7 * total / count).backward()
    assert distance(got, plainly(gradients(twin))) < 1e-4
    assert spectral_norm(model.get_parameter("classifier.weight")) == pytest.approx(1, rel=1e-3)


class Sees:
    """The head's weight and the logits by row, of each first training pass of a step and of each evaluation."""

    def __init__(self, model: nn.Module, head: str) -> None:
        self.model, self.head = model, head
        self.norms: dict[bool, list[float]] = {True: [], False: []}
        self.logits: dict[bool, list[Tensor]] = {True: [], False: []}
        model.register_forward_hook(self._look, with_kwargs=True)

    def _look(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        layer = self.model.get_submodule(self.head)
        order = kwargs["input_ids"].sum(1).argsort()
        self.norms[model.training].append(spectral_norm(layer.weight))
        self.logits[model.training].append(output.logits.detach()[order])


@pytest.mark.parametrize(
    ("tuner", "name", "head"),
    [
        ("full", "bert", "classifier"),
        ("lora", "bert", "base_model.model.classifier.modules_to_save.default"),
        ("lora", "roberta", "base_model.model.classifier.modules_to_save.default.out_proj"),
        ("linear_probe", "bert", "classifier"),
    ],
)
def test_what_is_evaluated_is_what_trains(tuner: str, name: str, head: str, tmp_path: Path) -> None:
    """Spectral norm 1 in both; the logits after a step are those with which the next one begins."""
    data = batch(name)
    model = get_model(lively(name), {tuner: {}, "r4f": {"eps": 0.5}})
    sees = Sees(model, head)
    Trainer(
        model,
        arguments(tmp_path, max_steps=8, eval_strategy="steps", eval_steps=1),
        train_dataset=rows_of(data),
        eval_dataset=rows_of(data),
        data_collator=default_data_collator,
    ).train()
    assert len(sees.norms[True]) == len(sees.norms[False]) == 8
    assert sees.norms[True] == pytest.approx([1.0] * 8, rel=0.01)
    assert sees.norms[False] == pytest.approx([1.0] * 8, rel=0.01)
    for evaluated, trained in zip(sees.logits[False][:-1], sees.logits[True][1:], strict=True):
        torch.testing.assert_close(evaluated, trained, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(sees.logits[False][0], sees.logits[False][-1], atol=1e-2)
    with torch.no_grad():
        at_the_end = model.eval()(**data).logits[data["input_ids"].sum(1).argsort()]
    torch.testing.assert_close(at_the_end, sees.logits[False][7], rtol=1e-4, atol=1e-5)


def test_the_saved_adapter_is_the_same_function_in_plain_peft(tmp_path: Path) -> None:
    data = batch("roberta")
    model = get_model(lively("roberta"), {"lora": {}, "r4f": {"eps": 0.5}})
    trainer = trainer_of(model, rows_of(data), tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    trainer.train()
    wanted = model.eval()(**data).logits
    for folder in (tmp_path / "checkpoint-4", tmp_path / "saved"):
        if folder.name == "saved":
            model.save_pretrained(folder)
        again = PeftModel.from_pretrained(lively("roberta"), folder).eval()
        torch.testing.assert_close(again(**data).logits, wanted, rtol=1e-5, atol=1e-6)
    for name, weight in again.named_parameters():
        if "modules_to_save" in name and weight.dim() == 2:
            assert spectral_norm(weight) == pytest.approx(1, rel=0.01)


def test_weight_zero_is_the_plain_run_bit_for_bit(tmp_path: Path) -> None:
    rows = rows_of(batch("bert", rows=16))
    trained = []
    for method in ({"lora": {}}, {"lora": {}, "r4f": {"weight": 0.0, "eps": 1.0}}):
        torch.manual_seed(0)
        model = get_model(tiny("bert", hidden_dropout_prob=0.1), method)
        trainer_of(model, rows, tmp_path, max_steps=4, gradient_accumulation_steps=2).train()
        trained.append({n: p.detach().clone() for n, p in model.named_parameters()})
    assert all(torch.equal(trained[0][n], trained[1][n]) for n in trained[0])


def test_a_run_resumed_after_any_step_ends_the_same_bit_for_bit(tmp_path: Path) -> None:
    def run(resume: str | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = get_model(lively("bert", hidden_dropout_prob=0.1), {"lora": {}, "r4f": {"eps": 0.5}})
        settings: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
        settings["gradient_accumulation_steps"] = 2
        trainer = trainer_of(model, rows_of(batch("bert", rows=20)), tmp_path, **settings)
        trainer.train(resume_from_checkpoint=resume)
        return {n: p.detach().clone() for n, p in model.named_parameters()}

    whole = run(None)
    for step in (1, 2, 3):
        again = run(str(tmp_path / f"checkpoint-{step}"))
        assert all(torch.equal(whole[n], again[n]) for n in whole), step


@dataclass(kw_only=True)
class HeadFirst(Plugin):
    """From the third step on the head rests."""

    name: ClassVar[str] = "head_first"

    def may_train(self, run: Run, param: Any) -> bool:
        return (param.part == "head") == (run.step < 2)

    def next_change(self, run: Run) -> int | None:
        return 2 if run.step < 2 else None


def test_a_head_that_rests_stays_normalised(tmp_path: Path) -> None:
    model = get_model(lively("bert"), ["full", HeadFirst(), R4F(eps=0.5)])
    sees = Sees(model, "classifier")
    trainer_of(model, rows_of(batch("bert")), tmp_path, max_steps=5).train()
    assert sees.norms[True] == pytest.approx([1.0] * 5, rel=0.01)


def test_a_second_run_goes_on_from_the_normalised_head(tmp_path: Path) -> None:
    model = get_model(lively("bert"), ["full", R4F(eps=0.5)])
    for _ in range(2):
        sees = Sees(model, "classifier")
        trainer_of(model, rows_of(batch("bert")), tmp_path, max_steps=3).train()
        assert sees.norms[True][:3] == pytest.approx([1.0] * 3, rel=0.01)
    assert spectral_norm(model.get_parameter("classifier.weight")) == pytest.approx(1, rel=0.01)


# ---- refusals ------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class NoHead(Plugin):
    name: ClassVar[str] = "no_head"

    def ever_trains(self, run: Run, param: Any) -> bool:
        return param.part != "head"


def test_a_task_without_a_new_head_is_refused() -> None:
    with pytest.raises(MethodError, match=r"r4f.*head"):
        get_model(tiny("llama", "CAUSAL_LM"), {"lora": {}, "r4f": {}})


def test_a_head_that_never_trains_is_refused() -> None:
    with pytest.raises(MethodError, match=r"r4f.*no matrix of the head trains.*Use r3f"):
        get_model(tiny("bert"), ["full", NoHead(), R4F()])


def test_a_head_of_zeros_is_refused(tmp_path: Path) -> None:
    model = get_model(tiny("bert"), ["full", R4F()])
    nn.init.zeros_(model.get_parameter("classifier.weight"))
    with pytest.raises(MethodError, match=r"r4f.*classifier\.weight is 0 everywhere"):
        trainer_of(model, rows_of(batch("bert")), tmp_path).train()


@pytest.mark.parametrize("other", ["r3f", "ema"])
def test_what_it_cannot_run_beside_is_refused(other: str) -> None:
    with pytest.raises(MethodError, match=f"(r4f.*{other}|{other}.*r4f)"):
        get_model(tiny("bert"), {"lora": {}, other: {}, "r4f": {}})


@pytest.mark.parametrize("settings", [{"weight": -1.0}, {"eps": 0.0}, {"noise": "laplace"}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match=f"r4f.*{next(iter(settings))}"):
        get_model(tiny("bert"), {"lora": {}, "r4f": settings})
