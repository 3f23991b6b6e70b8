"""R3F against scipy and against plain torch: a second model, the same noise through `inputs_embeds`, autograd."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_plus import MethodError, PluginError, Run, Stage, get_model
from peft_plus_stability.r3f import R3F
from tests.consistency import (
    TASKS,
    Grab,
    accumulated,
    distance,
    gradients,
    kl_both_ways,
    lively,
    model_and_batch,
    sampler_order,
    summed_distance,
    trainer_of,
    two_passes,
)
from tests.models import batch, rows_of, tiny


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


# ---- the term, task by task --------------------------------------------------------------------------------------


class Spy(Run):
    """Keeps the noise that a plugin drew."""

    def forward(self, batch: Mapping[str, Any], *, perturb: Any = None) -> Any:
        def kept(embeddings: Tensor) -> Tensor:
            self.noise = perturb["embeddings"](embeddings)
            return self.noise

        return super().forward(batch, perturb={"embeddings": kept})


@pytest.mark.parametrize("eps", [0.1, 1.0])
@pytest.mark.parametrize("noise", ["uniform", "normal"])
@pytest.mark.parametrize(("name", "task"), TASKS)
def test_value_and_gradient_against_plain_torch(name, task, noise, eps):
    model, data = model_and_batch(name, task)
    twin = copy.deepcopy(model)
    model = get_model(model, ["full", R3F(weight=0.7, eps=eps, noise=noise)])
    plan = model.peft_plus
    run = Spy(model=model, task=plan.task, num_blocks=3, seed=5, step=3, batch=data)
    term = plan.plugins[0].loss_terms(run, data, model(**data))["r3f"]
    value = term.sum / term.count
    value.backward()

    assert not run.noise.requires_grad
    total, count = summed_distance(task, data, *two_passes(twin, name, data, run.noise))
    wanted = 0.7 * total / count
    wanted.backward()
    assert int(term.count) == count
    assert term.per == "label"
    assert term.sum.dtype == torch.float32
    assert wanted.item() > 1e-4
    assert value.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert distance(gradients(model), gradients(twin)) < 1e-4


def test_the_clean_pass_is_not_detached():
    """With its gradient through one pass alone, half of the pull would be missing."""
    model, data = model_and_batch("bert", "SEQ_CLS")
    model = get_model(model, ["full", R3F(eps=1.0)])
    run = Spy(model=model, task=model.peft_plus.task, num_blocks=3)
    output = model(**data)
    output.logits.retain_grad()
    model.peft_plus.plugins[0].loss_terms(run, data, output)["r3f"].sum.backward()
    assert output.logits.grad is not None
    assert output.logits.grad.abs().max() > 0


# ---- in a run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_weight_zero_is_the_plain_run_bit_for_bit(tuner, tmp_path):
    rows = rows_of(batch("bert", rows=16))
    trained = []
    for method in ({tuner: {}}, {tuner: {}, "r3f": {"weight": 0.0, "eps": 1.0}}):
        torch.manual_seed(0)
        model = get_model(tiny("bert", hidden_dropout_prob=0.1), method)
        trainer_of(model, rows, tmp_path, max_steps=4, gradient_accumulation_steps=2).train()
        trained.append({n: p.detach().clone() for n, p in model.named_parameters()})
    assert all(torch.equal(trained[0][n], trained[1][n]) for n in trained[0])


class NoiseRecorder:
    """What the input embeddings' LayerNorm was given, in each pass: the difference of two passes is the noise."""

    def __init__(self, model: nn.Module) -> None:
        self.inputs: list[Tensor] = []
        norm = next(m for n, m in model.named_modules() if n.endswith("embeddings.LayerNorm"))
        norm.register_forward_pre_hook(lambda module, args: self.inputs.append(args[0].detach().clone()))

    def noise(self) -> list[Tensor]:
        return [b - a for a, b in zip(self.inputs[::2], self.inputs[1::2], strict=True)]


@pytest.mark.parametrize(("name", "task"), [("bert", "SEQ_CLS"), ("bert", "MULTIPLE_CHOICE"), ("bert", "TOKEN_CLS")])
def test_the_whole_gradient_whatever_the_accumulation(name, task, tmp_path):
    """Task loss + weight · distance of one big batch; the noise follows the example's place in the step."""
    found = []
    for accumulation in (1, 2, 4):
        model, data = model_and_batch(name, task, rows=8)
        twin = copy.deepcopy(model).train()
        recorder, grab = NoiseRecorder(model), Grab()
        model = get_model(model, ["full", R3F(weight=0.7, eps=0.5)])
        trainer_of(
            model,
            rows_of(data),
            tmp_path,
            [grab],
            max_steps=1,
            **accumulated(8, accumulation),
        ).train()
        noise = torch.cat(recorder.noise())
        found.append((noise, grab.gradients))
    noise = found[0][0]
    assert all(not torch.allclose(a, b, atol=0.1) for a, b in combinations(noise, 2))
    for other, _ in found[1:]:
        torch.testing.assert_close(other, noise, rtol=0, atol=1e-6)
    # In which order the sampler handed the rows out does not matter to the task's loss, but it does to the noise.
    order = sampler_order(8)
    data = {key: value[order] for key, value in data.items()}
    clean, noised = two_passes(twin, name, data, noise)
    total, count = summed_distance(task, data, clean, noised)
    wanted = data["labels"] != -100
    (F.cross_entropy(clean.logits[wanted], data["labels"][wanted]) + 0.7 * total / count).backward()
    for _, got in found:
        assert distance(got, gradients(twin)) < 1e-4


def test_noise_differs_between_steps_and_seeds_and_comes_back(tmp_path):
    noises = {}
    for key, seed in (("a", 1), ("again", 1), ("b", 2)):
        model = tiny("bert")
        recorder = NoiseRecorder(model)
        rows = rows_of(batch("bert", rows=4))
        trainer_of(get_model(model, ["full", R3F(eps=0.5)]), rows, tmp_path, seed=seed, data_seed=0).train()
        noises[key] = recorder.noise()
    assert all(torch.equal(x, y) for x, y in zip(noises["a"], noises["again"], strict=True))
    first, second = noises["a"]
    assert not torch.allclose(first, second, atol=0.1)
    assert not torch.allclose(first, noises["b"][0], atol=0.1)
    assert not torch.allclose(first[0], first[1], atol=0.1)


def test_a_resumed_run_draws_the_same_noise(tmp_path):
    def run(resume: str | None) -> list[Tensor]:
        torch.manual_seed(0)
        model = tiny("bert", hidden_dropout_prob=0.1)
        recorder = NoiseRecorder(model)
        model = get_model(model, {"lora": {}, "r3f": {"eps": 0.5}})
        trainer = trainer_of(
            model,
            rows_of(batch("bert", rows=20)),
            tmp_path,
            max_steps=4,
            save_strategy="steps",
            save_steps=1,
            gradient_accumulation_steps=2,
        )
        trainer.train(resume_from_checkpoint=resume)
        return recorder.inputs

    whole = run(None)
    for step, passes in ((2, 12), (3, 8)):  # 3 updates to an epoch of 5 batches: 4 + 4 + 2 passes, then 4 again
        again = run(str(tmp_path / f"checkpoint-{step}"))
        tail = whole[-len(again) :]
        assert len(again) < len(whole)
        assert all(torch.equal(x, y) for x, y in zip(again, tail, strict=True)), (step, passes)


TUNERS = ["lora", "full", "linear_probe", "prompt_tuning", "prefix_tuning", "p_tuning", "ia3"]


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize(("name", "task"), [("bert", "SEQ_CLS"), ("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")])
def test_with_every_kind_of_tuner(name, task, tuner, tmp_path):
    if tuner == "linear_probe" and task != "SEQ_CLS":
        task = {"llama": "SEQ_CLS", "t5": "SEQ_CLS"}.get(name, task)  # their language models have no head of their own
    settings = {"num_virtual_tokens": 3, "encoder_hidden_size": 16} if tuner in ("p_tuning", "prefix_tuning") else {}
    if tuner == "prompt_tuning":
        settings = {"num_virtual_tokens": 3}
    model = get_model(lively(name, task), {tuner: settings, "r3f": {"eps": 1.0, "weight": 2.0}})
    rows = rows_of(batch(name, task, rows=8))
    trainer = trainer_of(model, rows, tmp_path, logging_strategy="steps", logging_steps=1)
    trainer.train()
    logged = [entry["r3f"] for entry in trainer.state.log_history if "r3f" in entry]
    assert len(logged) == 2
    assert all(value > 1e-5 for value in logged)


@pytest.mark.parametrize("tuner", ["lora", "prompt_tuning"])
@pytest.mark.parametrize(("name", "task"), [("bert", "SEQ_CLS"), ("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")])
def test_the_value_inside_a_peft_model(name, task, tuner):
    """The second pass through PEFT's own `inputs_embeds`; virtual tokens are neither noised nor compared."""
    settings = {"num_virtual_tokens": 3} if tuner == "prompt_tuning" else {}
    model = get_model(lively(name, task), {tuner: settings, "r3f": {"eps": 0.5}})
    for n, p in model.named_parameters():
        if "lora_B" in n:
            nn.init.normal_(p, std=0.3)
    data = batch(name, task)
    run = Spy(model=model, task=model.peft_plus.task, num_blocks=3)
    term = model.peft_plus.plugins[0].loss_terms(run, data, model(**data))["r3f"]
    assert run.noise.shape[:2] == data["input_ids"].shape

    inputs = dict(data)
    ids = inputs.pop("input_ids")
    base = model.get_base_model()
    holder = base.get_encoder() if name == "t5" else base
    with torch.no_grad():
        clean = model(**data).logits
        noised = model(inputs_embeds=holder.get_input_embeddings()(ids) + run.noise, **inputs).logits
    labels = data["labels"]
    if task == "SEQ_CLS":
        wanted = kl_both_ways(clean, noised).mean()
    else:
        length = labels.shape[1]
        clean, noised = clean[:, -length:], noised[:, -length:]
        if task == "CAUSAL_LM":
            clean, noised, labels = clean[:, :-1], noised[:, :-1], labels[:, 1:]
        wanted = kl_both_ways(clean, noised)[labels != -100].mean()
    assert wanted.item() > 1e-4
    assert (term.sum / term.count).item() == pytest.approx(wanted.item(), rel=1e-4)


def test_packed_texts_count_as_each_alone(tmp_path):
    """One row of two texts, told apart by their positions; what has no label adds nothing. By hand text by text."""
    model = lively("llama", "CAUSAL_LM")
    twin, grab = copy.deepcopy(model), Grab()
    lengths = (5, 7)
    ids = torch.randint(5, 100, (1, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, [0, 1, 5, 6, 7]] = -100  # each text's first token, and a prompt in both
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    data = {"input_ids": ids, "position_ids": positions, "labels": labels}
    model = get_model(model, ["full", R3F(weight=0.7, eps=1.0)], task="CAUSAL_LM")
    settings = {"max_steps": 1, "per_device_train_batch_size": 1, "max_grad_norm": 0.0}
    trainer = trainer_of(model, rows_of(data), tmp_path, [grab], **settings, logging_strategy="steps", logging_steps=1)
    trainer.train()

    stream = Run(model=nn.Linear(1, 1), task=None, num_blocks=0, seed=42, stage=Stage()).generator("r3f", 0, 0)
    noise = torch.empty(1, 12, 32).uniform_(-1, 1, generator=stream)
    own, apart = torch.zeros(()), torch.zeros(())
    for start, length in zip((0, 5), lengths, strict=True):
        text = slice(start, start + length)
        inner = {"input_ids": ids[:, text], "attention_mask": torch.ones(1, length, dtype=torch.long)}
        clean, noised = (x.logits[:, :-1] for x in two_passes(twin, "llama", inner, noise[:, text]))
        known = labels[:, text][:, 1:] != -100
        own = own + F.cross_entropy(clean[known], labels[:, text][:, 1:][known], reduction="sum")
        apart = apart + kl_both_ways(clean, noised)[known].sum()
    count = int((labels != -100).sum())
    ((own + 0.7 * apart) / count).backward()
    assert count == 7
    assert trainer.state.log_history[0]["r3f"] == pytest.approx(0.7 * apart.item() / count, rel=1e-4)
    assert distance(grab.gradients, gradients(twin)) < 1e-4


# ---- low precision and refusals ----------------------------------------------------------------------------------


def test_noise_that_bf16_swallows_is_an_error(tmp_path):
    model = get_model(tiny("bert").bfloat16(), ["full", "r3f"])
    with pytest.raises(PluginError, match=r"'r3f'.*vanishes in the embeddings in torch\.bfloat16.*fp32.*larger noise"):
        trainer_of(model, rows_of(batch("bert")), tmp_path).train()


def test_larger_noise_runs_in_bf16(tmp_path):
    model = get_model(tiny("bert").bfloat16(), {"full": {}, "r3f": {"eps": 0.5}})
    trainer = trainer_of(model, rows_of(batch("bert")), tmp_path, logging_strategy="steps", logging_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["r3f"] > 1e-5


def test_autocast_keeps_the_papers_noise(tmp_path):
    """fp32 weights under bf16=True: the embeddings stay fp32, so 1e-5 is not lost, and the noise is what was drawn."""
    model = tiny("bert")
    recorder = NoiseRecorder(model)
    model = get_model(model, ["full", "r3f"])
    trainer_of(model, rows_of(batch("bert")), tmp_path, bf16=True).train()
    for noise in recorder.noise():
        assert noise.dtype == torch.float32
        assert 5e-6 < float(noise.abs().max()) < 1.1e-5


def test_autocast_at_larger_noise_is_near_the_fp32_value(tmp_path):
    logged = []
    for bf16 in (False, True):
        model = get_model(lively("bert"), {"full": {}, "r3f": {"eps": 1.0}})
        trainer = trainer_of(
            model, rows_of(batch("bert")), tmp_path, bf16=bf16, logging_strategy="steps", logging_steps=1
        )
        trainer.train()
        logged.append(trainer.state.log_history[0]["r3f"])
    assert logged[1] == pytest.approx(logged[0], rel=0.1)


def test_embeddings_given_by_hand_are_an_error(tmp_path):
    model = tiny("bert")
    data = batch("bert")
    data["inputs_embeds"] = model.get_input_embeddings()(data.pop("input_ids")).detach()
    model = get_model(model, ["full", "r3f"])
    with pytest.raises(PluginError, match=r"'r3f'.*inputs_embeds.*Give `input_ids`"):
        trainer_of(model, rows_of(data), tmp_path).train()


def test_a_model_without_embeddings_is_an_error(tmp_path):
    model = get_model(tiny("resnet"), ["full", "r3f"])
    with pytest.raises(PluginError, match=r"'r3f'.*ResNetForImageClassification has no input embeddings"):
        trainer_of(model, rows_of(batch("resnet")), tmp_path).train()


@pytest.mark.parametrize(
    "settings",
    [
        {"weight": -1.0},
        {"eps": 0.0},
        {"eps": -1e-5},
        {"eps": float("nan")},
        {"weight": float("nan")},
        {"noise": "laplace"},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(MethodError, match=f"r3f.*{next(iter(settings))}"):
        get_model(tiny("bert"), {"lora": {}, "r3f": settings})


def test_the_second_pass_leaves_the_model_as_it_was():
    model, data = model_and_batch("t5", "SEQ_2_SEQ_LM")
    model = get_model(model, ["full", R3F(eps=0.5)])
    before = model(**data).logits
    run = Spy(model=model, task=model.peft_plus.task, num_blocks=3)
    model.peft_plus.plugins[0].loss_terms(run, data, model(**data))
    assert torch.equal(model(**data).logits, before)
    with pytest.raises(ValueError, match="shape"):
        Run(model=model, task=model.peft_plus.task, num_blocks=3).forward(data, perturb={"embeddings": torch.zeros(1)})
    assert torch.equal(model(**data).logits, before)
    with pytest.raises(ValueError, match="'trunks'"):
        Run(model=model, task=model.peft_plus.task, num_blocks=3).forward(data, perturb={"trunks": torch.zeros(1)})
