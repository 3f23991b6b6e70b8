"""NEFTune against transformers' own hook, SciPy, and plain torch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import default_data_collator
from transformers.integrations.neftune import neftune_post_forward_hook

from peft_plus import MethodError, PluginError, Run, Session, Stage, Trainer, get_model
from peft_plus_stability.neftune import NEFTune, bound
from tests.bare_loop import on_nf4
from tests.consistency import (
    TASKS,
    Grab,
    accumulated,
    arguments,
    distance,
    gradients,
    lively,
    model_and_batch,
    sampler_order,
    trainer_of,
    two_passes,
)
from tests.models import batch, rows_of, tiny
from tests.scale import summed_loss

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Noise:
    """What is added to BERT's word embeddings: what they put out, and what their model goes on with.

    Args:
        model: a BERT, whose token types and positions are subtracted again.
    """

    def __init__(self, model: Any) -> None:
        self.clean: list[Tensor] = []
        self.noised: list[Tensor] = []
        words = model.get_input_embeddings()
        words.register_forward_hook(lambda *given: self.clean.append(given[-1].detach().clone()))
        norm = next(m for n, m in model.named_modules() if n.endswith("embeddings.LayerNorm"))
        norm.register_forward_pre_hook(lambda _, given: self.noised.append(given[0].detach().clone()))
        place = next(m for n, m in model.named_modules() if n.endswith("embeddings"))
        self._added = lambda n: place.position_embeddings.weight[:n] + place.token_type_embeddings.weight[0]

    def of_each_pass(self) -> list[Tensor]:
        with torch.no_grad():
            return [b - a - self._added(a.shape[1]) for a, b in zip(self.clean, self.noised, strict=True)]


def drawn(rows: int, tokens: int, *, alpha: float, size: int = 32, **settings: Any) -> Tensor:
    """The noise of a run's first batch."""
    config: dict[str, Any] = {"hidden_size": size, "intermediate_size": 16, "num_hidden_layers": 1}
    model = tiny("bert", **config)
    noise = Noise(model)
    data = batch("bert", rows=rows, length=tokens)
    model = get_model(model, ["linear_probe", NEFTune(alpha=alpha)])
    trainer_of(model, rows_of(data), settings.pop("folder"), max_steps=1, per_device_train_batch_size=rows).train()
    return noise.of_each_pass()[0]


def test_noise_is_distributed_as_that_of_transformers_own_hook(tmp_path: Path) -> None:
    """Uniform within the bound, by a Kolmogorov–Smirnov test; nothing lies beyond."""
    mine = drawn(16, 32, alpha=5.0, folder=tmp_path).flatten()
    layer: Any = nn.Embedding(100, 32).train()
    layer.neftune_noise_alpha = 5.0
    ids = torch.zeros(16, 32, dtype=torch.long)
    theirs = (neftune_post_forward_hook(layer, (ids,), layer(ids)) - layer(ids)).detach().flatten()
    limit = 5 / (32 * 32) ** 0.5
    assert bound(5.0, tokens=32, width=32) == pytest.approx(limit)
    for noise in (mine, theirs):
        assert 0.99 * limit < float(noise.abs().max()) < limit * (1 + 1e-4)
        assert scipy.stats.kstest(noise.numpy(), scipy.stats.uniform(-limit, 2 * limit).cdf).pvalue > 1e-3
    assert scipy.stats.ks_2samp(mine.numpy(), theirs.numpy()).pvalue > 1e-3


def first_noise(data: Any, alpha: float, width: int, run: Any) -> Tensor:
    """By the formula, each text from its own stream; padding counts and is noised too."""
    ids = data["input_ids"]
    texts, length = ids.reshape(-1, ids.shape[-1]), ids.shape[-1]
    limit, per_row = alpha / (length * width) ** 0.5, len(texts) // len(ids)
    streams = [run.generator("neftune", i // per_row, i % per_row) for i in range(len(texts))]
    return torch.stack([torch.empty(length, width).uniform_(-limit, limit, generator=stream) for stream in streams])


@pytest.mark.parametrize(("name", "task"), TASKS)
def test_loss_and_gradient_against_plain_torch(name: str, task: str, tmp_path: Path) -> None:
    model, data = model_and_batch(name, task)
    twin, grab = copy.deepcopy(model), Grab()
    model = get_model(model, ["full", NEFTune(alpha=20.0)])
    settings: dict[str, Any] = {"max_steps": 1, "max_grad_norm": 0.0, "logging_strategy": "steps", "logging_steps": 1}
    trainer = trainer_of(model, rows_of(data), tmp_path, [grab], **settings)
    trainer.train()
    data = {key: value[sampler_order(4)] for key, value in data.items()}
    run = Run(model=model, task=model.peft_plus.task, num_blocks=3, seed=42, stage=Stage())
    noise = first_noise(data, 20.0, 32, run)

    def noised(**inputs: Tensor) -> Any:
        return two_passes(twin, name, data, noise)[1]

    total, count = summed_loss(noised, data, task)  # type: ignore[arg-type]
    (total / count).backward()
    assert distance(grab.gradients, gradients(twin)) < 2e-5
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(total.detach()) / count, rel=1e-3)


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_change_nothing(micro_batches: int, tmp_path: Path) -> None:
    got = []
    for parts in (1, micro_batches):
        model, data = model_and_batch("bert", "SEQ_CLS", rows=8)
        grab = Grab()
        settings = {**accumulated(8, parts), "max_steps": 1}
        trainer_of(get_model(model, ["full", NEFTune(alpha=20.0)]), rows_of(data), tmp_path, [grab], **settings).train()
        got.append(grab.gradients)
    assert distance(got[1], got[0]) < 1e-5


def test_the_gradient_in_a_session(tmp_path: Path) -> None:
    model, data = model_and_batch("bert", "SEQ_CLS")
    twin = copy.deepcopy(model)
    session = Session(get_model(model, ["full", NEFTune(alpha=20.0)]), Accelerator(cpu=True), max_steps=1)
    optimizer = session.optimizer(torch.optim.SGD, lr=1e-2)
    loader = session.loader(rows_of(data), 4, shuffle=False, collate_fn=default_data_collator)
    for micro_batch in session.batches(loader):
        session.accelerator.backward(session.loss(micro_batch))
        got, noise = gradients(session.bare_model), first_noise(data, 20.0, 32, session.engine.run)
        F.cross_entropy(two_passes(twin, "bert", data, noise)[1].logits, data["labels"]).backward()
        assert distance(got, gradients(twin)) < 2e-5
        optimizer.step()
        optimizer.zero_grad()


def test_an_evaluation_is_the_plain_one_bit_for_bit(tmp_path: Path) -> None:
    """Also the one that falls into the training."""
    losses = []
    for method in ({"lora": {}}, {"lora": {}, "neftune": {"alpha": 50.0}}):
        torch.manual_seed(0)
        model, data = model_and_batch("bert", "SEQ_CLS")
        trainer = Trainer(
            get_model(model, method),
            arguments(tmp_path, eval_strategy="steps", eval_steps=1, eval_on_start=True, learning_rate=1e-30),
            train_dataset=rows_of(data),
            eval_dataset=rows_of(data),
            data_collator=default_data_collator,
        )
        trainer.train()
        losses.append([entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry])
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]


def test_alpha_zero_is_the_plain_run_bit_for_bit(tmp_path: Path) -> None:
    ends = []
    for method in ({"lora": {}}, {"lora": {}, "neftune": {"alpha": 0.0}}):
        torch.manual_seed(0)
        model = get_model(lively("bert", hidden_dropout_prob=0.1), method)
        rows = rows_of(batch("bert", rows=16))
        trainer_of(model, rows, tmp_path, max_steps=4, gradient_accumulation_steps=2).train()
        ends.append({n: p.detach().clone() for n, p in model.named_parameters()})
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


def test_noise_differs_between_examples_steps_and_seeds_and_comes_back(tmp_path: Path) -> None:
    noises = {}
    for key, seed in (("a", 1), ("again", 1), ("b", 2)):
        model = tiny("bert")
        noise = Noise(model)
        rows = rows_of(batch("bert"))
        trainer_of(get_model(model, ["lora", NEFTune()]), rows, tmp_path, seed=seed, data_seed=0).train()
        noises[key] = noise.of_each_pass()
    first, second = noises["a"]
    assert all(torch.equal(x, y) for x, y in zip(noises["a"], noises["again"], strict=True))
    assert not torch.allclose(first, second, atol=0.1)
    assert not torch.allclose(first, noises["b"][0], atol=0.1)
    assert not torch.allclose(first[0], first[1], atol=0.1)


def test_a_run_resumed_after_any_step_ends_the_same_bit_for_bit(tmp_path: Path) -> None:
    def run(resume: str | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = get_model(lively("bert", hidden_dropout_prob=0.1), {"lora": {}, "neftune": {}})
        settings: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
        trainer = trainer_of(
            model, rows_of(batch("bert", rows=20)), tmp_path, gradient_accumulation_steps=2, **settings
        )
        trainer.train(resume_from_checkpoint=resume)
        return {n: p.detach().clone() for n, p in model.named_parameters()}

    whole = run(None)
    for step in (1, 2, 3):
        again = run(str(tmp_path / f"checkpoint-{step}"))
        assert all(torch.equal(whole[n], again[n]) for n in whole), step


@pytest.mark.parametrize("tuner", ["prompt_tuning", "prefix_tuning", "p_tuning", "ia3"])
@pytest.mark.parametrize(("name", "task"), [("bert", "SEQ_CLS"), ("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")])
def test_with_every_kind_of_tuner(name: str, task: str, tuner: str, tmp_path: Path) -> None:
    """The noise is in the loss of its own pass: it is another one than without."""
    settings = {} if tuner == "ia3" else {"num_virtual_tokens": 3}
    settings |= {"encoder_hidden_size": 16} if tuner in ("p_tuning", "prefix_tuning") else {}
    losses = []
    for alpha in (0.0, 20.0):
        torch.manual_seed(0)
        model = get_model(lively(name, task), {tuner: settings, "neftune": {"alpha": alpha}})
        trainer = trainer_of(model, rows_of(batch(name, task)), tmp_path, max_steps=1)
        losses.append(trainer.train().training_loss)
    assert abs(losses[1] - losses[0]) > 1e-4


def test_on_a_base_of_four_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = on_nf4({"lora": {}, "neftune": {}}, tmp_path / "base")
    noise = Noise(model)
    trainer_of(model, rows_of(batch("bert")), tmp_path, max_steps=1).train()
    limit = 5 / (8 * 64) ** 0.5
    assert 0.95 * limit < float(noise.of_each_pass()[0].abs().max()) <= limit * (1 + 1e-4)


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_the_trainers_own_argument_beside_it_is_refused(tuner: str, tmp_path: Path) -> None:
    rows = rows_of(batch("bert"))
    trainer = trainer_of(get_model(tiny("bert"), {tuner: {}, "neftune": {}}), rows, tmp_path, neftune_noise_alpha=5.0)
    with pytest.raises(MethodError, match=r"'neftune'.*added twice.*neftune_noise_alpha"):
        trainer.train()
    model = get_model(tiny("bert"), {tuner: {}, "neftune": {"alpha": 0.0}})
    trainer_of(model, rows, tmp_path, neftune_noise_alpha=5.0).train()  # the user's own, as ever


def test_another_plugin_with_passes_is_refused() -> None:
    with pytest.raises(MethodError, match="both make the passes"):
        get_model(tiny("bert"), {"full": {}, "neftune": {}, "freelb": {}})


def test_a_model_without_embeddings_is_refused_by_name(tmp_path: Path) -> None:
    model = get_model(tiny("resnet"), ["full", "neftune"])
    with pytest.raises(PluginError, match=r"'neftune'.*ResNetForImageClassification has no input embeddings"):
        trainer_of(model, rows_of(batch("resnet")), tmp_path).train()


@pytest.mark.parametrize("alpha", [-1.0, float("nan"), float("inf")])
def test_an_alpha_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(MethodError, match=r"neftune.*alpha="):
        get_model(tiny("bert"), {"lora": {}, "neftune": {"alpha": alpha}})
