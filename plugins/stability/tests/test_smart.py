"""SMART against plain torch: a second model, the same start, ascent by hand, a teacher that is a model of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback, default_data_collator

from peft_plus import MethodError, Param, Plugin, PluginError, Run, Session, get_model
from peft_plus_stability.smart import SMART, ascend
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

LARGE = {"eps": 0.5, "step_size": 0.3, "sigma": 0.4}
"""Noise that does not vanish by rounding, of which some elements reach eps and others do not."""


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Spy(Run):
    """Keeps the noise of each pass, and how many passes had other weights."""

    noises: list[Tensor]
    taught: int

    def forward(self, batch: Mapping[str, Any], *, perturb: Any = None, weights: Any = None) -> Any:
        self.taught += weights is not None
        if perturb is None:
            return super().forward(batch, weights=weights)
        ((place, noise),) = perturb.items()

        def noted(output: Tensor) -> Tensor:
            delta = noise if isinstance(noise, Tensor) else noise(output)
            self.noises.append(delta.detach().clone())
            return delta

        return super().forward(batch, perturb={place: noted})


def spy(model: Any, data: Mapping[str, Any], *, step: int = 3, **settings: Any) -> Spy:
    plan = model.peft_plus
    run = Spy(
        model=model,
        task=plan.task,
        num_blocks=3,
        params=tuple(plan.params.values()),
        layers=plan.layers,
        seed=5,
        step=step,
        batch=data,
        **settings,
    )
    run.noises, run.taught = [], 0
    return run


def plugin_of(model: Any) -> SMART:
    return next(plugin for plugin in model.peft_plus.plugins if isinstance(plugin, SMART))


# ---- the ascent --------------------------------------------------------------------------------------------------


def test_a_step_by_hand():
    delta = torch.tensor([[[0.0, 0.1], [-0.2, 0.3]]])
    gradient = torch.tensor([[[4.0, -2.0], [0.0, 1.0]]])
    wanted = torch.tensor([[[0.2, 0.0], [-0.2, 0.25]]])  # 0.3 + 0.2 · 1/4 is past 0.25
    torch.testing.assert_close(ascend(delta, gradient, rows=1, step_size=0.2, eps=0.25), wanted)


def test_the_papers_sizes_stay_within_eps():
    """η is a hundred times ε, and the noise starts beyond it."""
    draw = torch.Generator().manual_seed(0)
    delta = torch.randn(4, 8, 32, generator=draw) * 1e-5
    found = ascend(delta, torch.randn(4, 8, 32, generator=draw) * 1e-9, rows=4, step_size=1e-3, eps=1e-5)
    assert delta.abs().max() > 1e-5
    assert found.abs().max() <= 1e-5
    assert (found.abs() == found.abs().max()).float().mean() > 0.9


@pytest.mark.parametrize("size", [0.0, 1e-40])
def test_no_gradient_is_no_step(size):
    delta = torch.tensor([[[0.5, -0.1]], [[0.1, 0.1]]])
    gradient = torch.tensor([[[0.0, 0.0]], [[size, -size]]])
    found = ascend(delta, gradient, rows=2, step_size=0.2, eps=0.3)
    torch.testing.assert_close(found, delta.clamp(-0.3, 0.3), rtol=0, atol=1e-2 if size else 0)


def test_the_step_of_an_example_depends_on_no_other():
    """Nor on how much they make it be padded; but the choices of one example make one step."""
    draw = torch.Generator().manual_seed(0)
    delta, gradient = torch.randn(2, 4, 6, 8, generator=draw)
    gradient[1] *= 100
    padded = [F.pad(x, (0, 0, 0, 3)) for x in (delta, gradient)]
    many = ascend(*padded, rows=4, step_size=0.2, eps=0.9)
    for row in range(4):
        alone = ascend(delta[row : row + 1], gradient[row : row + 1], rows=1, step_size=0.2, eps=0.9)
        assert torch.equal(many[row : row + 1, :6], alone)
    pairs = ascend(delta, gradient, rows=2, step_size=0.2, eps=0.9)
    assert not torch.equal(pairs[0], many[0, :6])  # its other choice has the larger gradient
    assert torch.equal(pairs[2:], ascend(delta[2:], gradient[2:], rows=1, step_size=0.2, eps=0.9))


# ---- the noise term, task by task --------------------------------------------------------------------------------


def worst_noise(
    passes: Callable[[Tensor], tuple[Any, Any]], task: str, data: Any, start: Tensor, settings: Any
) -> Tensor:
    """Algorithm 1 of the paper, example by example.

    Args:
        passes: noise → the clean output and the noised one.
    """
    rows = len(next(iter(data.values())))
    delta = start.clone()
    for _ in range(settings.get("steps", 1)):
        leaf = delta.clone().requires_grad_()
        total, _ = summed_distance(task, data, *passes(leaf))
        total.backward()
        assert leaf.grad is not None
        moved = []
        for mine, gradient in zip(delta.chunk(rows), leaf.grad.chunk(rows), strict=True):
            step = settings["step_size"] * gradient / gradient.abs().max()
            moved.append((mine + step).clip(-settings["eps"], settings["eps"]))
        delta = torch.cat(moved)
    return delta


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("name", "task"), TASKS)
def test_value_and_gradient_against_plain_torch(name, task, steps):
    model, data = model_and_batch(name, task)
    twin = copy.deepcopy(model)
    settings = {**LARGE, "steps": steps}
    model = get_model(model, ["full", SMART(weight=0.7, bregman=0.0, **settings)])
    run = spy(model, data)
    term = plugin_of(model).loss_terms(run, data, model(**data))["smart"]
    assert all(parameter.grad is None for parameter in model.parameters())  # the ascent left nothing behind
    value = term.sum / term.count
    value.backward()
    start, *_, delta = run.noises
    assert len(run.noises) == steps + 1
    assert run.taught == 0

    wanted_delta = worst_noise(lambda z: two_passes(twin, name, data, z), task, data, start, settings)
    twin.zero_grad()
    torch.testing.assert_close(delta, wanted_delta, rtol=0, atol=1e-4)
    assert delta.dtype == torch.float32
    assert delta.abs().max() <= 0.5
    assert 0.01 < (delta.abs() == 0.5).float().mean() < 0.9
    total, count = summed_distance(task, data, *two_passes(twin, name, data, wanted_delta))
    wanted = 0.7 * total / count
    wanted.backward()
    assert int(term.count) == count
    assert term.per == "label"
    assert term.sum.dtype == torch.float32
    assert value.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert distance(gradients(model), gradients(twin)) < 1e-4
    # Worse than where it started, or than as much noise that goes anywhere.
    least, _ = summed_distance(task, data, *two_passes(twin, name, data, start.clamp(-0.5, 0.5)))
    assert total > least


def test_the_noise_starts_as_it_should_and_has_no_gradient():
    model, data = model_and_batch("bert", "SEQ_CLS")
    model = get_model(model, ["full", SMART(bregman=0.0, sigma=0.2)])
    run = spy(model, data, first_example=8)
    plugin_of(model).loss_terms(run, data, model(**data))
    start, delta = run.noises
    assert start.std() == pytest.approx(0.2, rel=0.05)
    assert delta.abs().max() <= 1e-5
    for row in range(4):
        wanted = torch.empty(8, 32).normal_(0.0, 0.2, generator=run.generator("smart", 8 + row, 0))
        assert torch.equal(start[row], wanted)


@pytest.mark.parametrize(("name", "task"), [("bert", "SEQ_CLS"), ("bert", "MULTIPLE_CHOICE"), ("llama", "CAUSAL_LM")])
def test_the_noise_of_an_example_depends_on_no_neighbour(name, task):
    model, data = model_and_batch(name, task)
    model = get_model(model, ["full", SMART(bregman=0.0, **LARGE)])
    together = spy(model, data)
    plugin_of(model).loss_terms(together, data, model(**data))
    texts = len(together.noises[0]) // 4
    for row in range(4):
        length = int(data["attention_mask"][row].reshape(texts, -1)[0].sum())
        one = {k: v[row : row + 1] if v.dim() == 1 else v[row : row + 1, ..., :length] for k, v in data.items()}
        alone = spy(model, one, first_example=row)
        plugin_of(model).loss_terms(alone, one, model(**one))
        for mine, both in zip(alone.noises, together.noises, strict=True):
            torch.testing.assert_close(mine, both[row * texts : (row + 1) * texts, :length], rtol=0, atol=1e-4)


def test_the_ascent_asks_for_the_gradient_of_the_noise_alone():
    model, data = model_and_batch("bert", "SEQ_CLS")
    model = get_model(model, ["full", SMART(bregman=0.0, **LARGE)])
    output = model(**data)
    reached: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda gradient, name=name: reached.append(name))
    plugin_of(model).loss_terms(spy(model, data), data, output)
    assert reached == []


# ---- the teacher's term --------------------------------------------------------------------------------------------


def elsewhere(model: nn.Module, size: float = 0.1) -> dict[str, Tensor]:
    """Other weights of all that trains."""
    draw = torch.Generator().manual_seed(7)
    return {
        name: parameter.detach() + size * torch.randn(parameter.shape, generator=draw)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@pytest.mark.parametrize(("name", "task"), TASKS)
def test_the_teachers_term_against_plain_torch(name, task):
    model, data = model_and_batch(name, task)
    twin = copy.deepcopy(model)
    model = get_model(model, ["full", SMART(weight=0.0, bregman=0.7)])
    teacher = elsewhere(model)
    before = copy.deepcopy(twin)
    before.load_state_dict(teacher, strict=False)
    plugin_of(model).teacher = teacher
    run = spy(model, data)
    terms = plugin_of(model).loss_terms(run, data, model(**data))
    assert list(terms) == ["smart_bregman"]
    assert run.noises == []
    value = terms["smart_bregman"].sum / terms["smart_bregman"].count
    value.backward()

    nothing = torch.zeros(1).expand(*data["input_ids"].shape, 32)
    with torch.no_grad():
        earlier, _ = two_passes(before, name, data, nothing)
    now, _ = two_passes(twin, name, data, nothing)
    total, count = summed_distance(task, data, now, earlier)
    (0.7 * total / count).backward()
    assert value.item() > 1e-3
    assert value.item() == pytest.approx(0.7 * total.item() / count, rel=1e-4)
    assert distance(gradients(model), gradients(twin)) < 1e-4


TUNERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "linear_probe": {},
    "prompt_tuning": {"num_virtual_tokens": 3},
    "prefix_tuning": {"num_virtual_tokens": 3, "encoder_hidden_size": 16},
    "p_tuning": {"num_virtual_tokens": 3, "encoder_hidden_size": 16},
    "ia3": {},
}


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize(("name", "task"), [("bert", "SEQ_CLS"), ("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")])
def test_the_teachers_term_inside_a_peft_model(name, task, tuner):
    """Its weights in PEFT's own layers: the same as in a copy of the model that has them."""
    if tuner == "linear_probe" and task != "SEQ_CLS":
        task = "SEQ_CLS"  # their language models have no head of their own
    model: Any = get_model(lively(name, task), {tuner: TUNERS[tuner], "smart": {"weight": 0.0}})
    data = batch(name, task)
    plugin_of(model).teacher = elsewhere(model)
    before = copy.deepcopy(model)
    before.load_state_dict(plugin_of(model).teacher, strict=False)
    term = plugin_of(model).loss_terms(spy(model, data), data, model(**data))["smart_bregman"]
    with torch.no_grad():
        now, earlier = model(**data).logits, before(**data).logits
    if task == "SEQ_CLS":
        wanted = kl_both_ways(now, earlier).mean()
    else:
        labels, length = data["labels"], data["labels"].shape[1]
        now, earlier = now[:, -length:], earlier[:, -length:]
        if task == "CAUSAL_LM":
            now, earlier, labels = now[:, :-1], earlier[:, :-1], labels[:, 1:]
        wanted = kl_both_ways(now, earlier)[labels != -100].mean()
    assert wanted.item() > 1e-4
    assert (term.sum / term.count).item() == pytest.approx(wanted.item(), rel=1e-4)
    term.sum.backward()
    assert all(tensor.grad is None for tensor in plugin_of(model).teacher.values())


# ---- in a run ----------------------------------------------------------------------------------------------------


class Teachers(TrainerCallback):
    """The weights and the teacher at the start of each step."""

    def __init__(self, model: nn.Module, plugin: SMART) -> None:
        self.model, self.plugin = model, plugin
        self.weights: list[dict[str, Tensor]] = []
        self.teachers: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        names = self.plugin.teacher
        self.weights.append({n: p.detach().clone() for n, p in self.model.named_parameters() if n in names})
        self.teachers.append({n: t.clone() for n, t in names.items()})


@pytest.mark.parametrize("ema", [0.0, 0.5, 0.99, 1.0])
def test_the_teacher_is_the_average_of_the_iterates(ema, tmp_path):
    model = get_model(lively("bert"), {"lora": {}, "smart": {"weight": 0.0, "ema": ema}})
    seen = Teachers(model, plugin_of(model))
    trainer = trainer_of(
        model, rows_of(batch("bert", rows=16)), tmp_path, [seen], max_steps=6, logging_strategy="steps", logging_steps=1
    )
    trainer.train()
    assert seen.teachers[0].keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    wanted = {name: weight.double() for name, weight in seen.weights[0].items()}
    for step, (weights, teacher) in enumerate(zip(seen.weights, seen.teachers, strict=True)):
        if step:
            wanted = {name: ema * average + (1 - ema) * weights[name].double() for name, average in wanted.items()}
        for name, average in wanted.items():
            torch.testing.assert_close(teacher[name].double(), average, rtol=1e-5, atol=1e-7)
            if ema in (0.0, 1.0):  # the previous iterate, or the first
                assert torch.equal(teacher[name], (seen.weights[0] if ema else weights)[name])
    logged = [entry["smart_bregman"] for entry in trainer.state.log_history if "smart_bregman" in entry]
    assert logged[0] == 0.0  # without dropout, the model is as far from itself as it should be
    assert all((value > 1e-6) == (ema > 0) for value in logged[1:])


def test_a_second_run_begins_with_a_teacher_of_its_own(tmp_path):
    model = get_model(lively("bert"), {"lora": {}, "smart": {"weight": 0.0, "ema": 1.0}})
    rows = rows_of(batch("bert", rows=16))
    for _ in range(2):
        seen = Teachers(model, plugin_of(model))
        trainer_of(model, rows, tmp_path, [seen]).train()
        assert all(torch.equal(seen.teachers[-1][n], weight) for n, weight in seen.weights[0].items())


def test_a_bf16_models_teacher_does_not_stand_still(tmp_path):
    model = get_model(tiny("bert").bfloat16(), {"full": {}, "smart": {"weight": 0.0, "ema": 0.999}})
    seen = Teachers(model, plugin_of(model))
    trainer_of(model, rows_of(batch("bert", rows=16)), tmp_path, [seen], max_steps=4).train()
    first, last = seen.teachers[0], seen.teachers[-1]
    assert {teacher.dtype for teacher in last.values()} == {torch.float32}
    moved = [n for n, weight in seen.weights[-1].items() if not torch.equal(weight, seen.weights[0][n])]
    assert len(moved) > 10
    assert all(not torch.equal(first[n], last[n]) for n in moved)


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_both_weights_zero_is_the_plain_run_bit_for_bit(tuner, tmp_path):
    rows = rows_of(batch("bert", rows=16))
    trained = []
    for method in ({tuner: {}}, {tuner: {}, "smart": {"weight": 0.0, "bregman": 0.0, "eps": 1.0}}):
        torch.manual_seed(0)
        model = get_model(tiny("bert", hidden_dropout_prob=0.1), method)
        trainer_of(model, rows, tmp_path, max_steps=4, gradient_accumulation_steps=2).train()
        trained.append({n: p.detach().clone() for n, p in model.named_parameters()})
    assert all(torch.equal(trained[0][n], trained[1][n]) for n in trained[0])


@pytest.mark.parametrize(("name", "task"), [("bert", "SEQ_CLS"), ("bert", "TOKEN_CLS")])
def test_the_whole_gradient_whatever_the_accumulation(name, task, tmp_path):
    """Task loss + weight · distance of one big batch; the teacher's term joins in from the second step on."""
    found, ends, starts = [], [], []
    method = {"full": {}, "smart": {"weight": 0.7, "bregman": 2.0, "ema": 0.9, **LARGE}}
    for accumulation in (1, 2, 4):
        model, data = model_and_batch(name, task, rows=8)
        twin = copy.deepcopy(model).train()
        grab = Grab()
        seen: list[Tensor] = []
        norm = next(m for n, m in model.named_modules() if n.endswith("embeddings.LayerNorm"))
        norm.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].detach().clone()))
        model = get_model(model, method)
        trainer_of(
            model,
            rows_of(data),
            tmp_path,
            [grab],
            max_steps=3,
            **accumulated(8, accumulation),
            optim="sgd",
        ).train()
        found.append(grab.gradients)
        ends.append({n: p.detach() for n, p in model.named_parameters()})
        # Of each micro-batch: the clean pass, the teacher's, the start of the noise, and where it ends.
        passes = [seen[i : i + 4] for i in range(0, 4 * accumulation, 4)]
        starts.append(torch.cat([start - clean for clean, _, start, _ in passes]))
    for start in starts[1:]:
        torch.testing.assert_close(start, starts[0], rtol=0, atol=1e-6)
    data = {key: value[sampler_order(8)] for key, value in data.items()}
    delta = worst_noise(lambda z: two_passes(twin, name, data, z), task, data, starts[0], LARGE)
    twin.zero_grad()
    clean, noised = two_passes(twin, name, data, delta)
    total, count = summed_distance(task, data, clean, noised)
    wanted = data["labels"] != -100
    (F.cross_entropy(clean.logits[wanted], data["labels"][wanted]) + 0.7 * total / count).backward()
    first = dict(twin.named_parameters())
    for got, end in zip(found, ends, strict=True):
        assert distance(got, gradients(twin)) < 1e-4
        moved = {n: weight - first[n].detach() for n, weight in end.items()}
        assert distance(moved, {n: weight - first[n].detach() for n, weight in ends[0].items()}) < 1e-3


def test_a_run_resumed_after_any_step_ends_the_same_bit_for_bit(tmp_path):
    def run(resume: str | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        torch.manual_seed(0)
        model = get_model(lively("bert", hidden_dropout_prob=0.1), {"lora": {}, "smart": {**LARGE, "ema": 0.9}})
        trainer_of(
            model,
            rows_of(batch("bert", rows=20)),
            tmp_path,
            max_steps=4,
            save_strategy="steps",
            save_steps=1,
            gradient_accumulation_steps=2,
        ).train(resume_from_checkpoint=resume)
        return {n: p.detach().clone() for n, p in model.named_parameters()}, plugin_of(model).teacher

    weights, teacher = run(None)
    for step in (1, 2, 3):
        again, average = run(str(tmp_path / f"checkpoint-{step}"))
        assert all(torch.equal(weights[n], again[n]) for n in weights), step
        assert teacher.keys() == average.keys()
        assert all(torch.equal(teacher[n], average[n]) for n in teacher), step


def test_in_a_session(tmp_path):
    """The loss of a loop's own is the task's + both terms, and the teacher follows its steps."""
    torch.manual_seed(0)
    model, data = model_and_batch("bert", "SEQ_CLS", rows=8)
    twin = copy.deepcopy(model).train()
    model = get_model(model, {"full": {}, "smart": {"weight": 0.7, "bregman": 2.0, "ema": 0.0, **LARGE}})
    session = Session(model, Accelerator(cpu=True), max_steps=3)
    optimizer = session.optimizer(torch.optim.SGD, lr=1e-2)
    loader = session.loader(rows_of(data), 8, collate_fn=default_data_collator, shuffle=False)
    starts: list[Tensor] = []

    for micro_batch in session.batches(loader):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        loss = session.loss(micro_batch)
        teacher = plugin_of(model).teacher
        assert all(torch.equal(teacher[n], weight) for n, weight in before.items())
        session.accelerator.backward(loss)
        if session.step == 0:
            run = session.engine.run
            starts = [torch.empty(8, 32).normal_(0.0, 0.4, generator=run.generator("smart", i, 0)) for i in range(8)]
            got, value = gradients(model), loss.item()
        optimizer.step()
        optimizer.zero_grad()

    delta = worst_noise(lambda z: two_passes(twin, "bert", data, z), "SEQ_CLS", data, torch.stack(starts), LARGE)
    twin.zero_grad()
    clean, noised = two_passes(twin, "bert", data, delta)
    total, count = summed_distance("SEQ_CLS", data, clean, noised)
    wanted = F.cross_entropy(clean.logits, data["labels"]) + 0.7 * total / count
    wanted.backward()
    assert value == pytest.approx(wanted.item(), rel=1e-4)
    assert distance(got, gradients(twin)) < 1e-4


# ---- above the trunk -----------------------------------------------------------------------------------------------

FROZEN = {"lora": {}, "freeze": {"blocks": 2}}


def pass_above(model: Any, data: Mapping[str, Tensor], noise: Tensor | None) -> Any:
    """A pass of a plain BERT with noise on the output of its second block."""
    inputs = {k: v for k, v in data.items() if k != "labels"}

    def add(module: nn.Module, args: Any, output: Any) -> Any:
        return output + noise if isinstance(output, Tensor) else (output[0] + noise, *output[1:])

    layer = next(m for n, m in model.named_modules() if n.endswith("encoder.layer.1"))
    hook = layer.register_forward_hook(add) if noise is not None else None
    output = model(**inputs)
    if hook is not None:
        hook.remove()
    return output


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "MULTIPLE_CHOICE"])
def test_noise_above_the_trunk_against_plain_torch(task, steps, tmp_path):
    settings = {**LARGE, "steps": steps}
    model, data = model_and_batch("bert", task)
    twin = copy.deepcopy(model).train()
    full = {"full": {}, "freeze": {"blocks": 2}, "smart": {"weight": 0.7, "bregman": 0.0, "at": "trunk", **settings}}
    grab, seen = Grab(), []
    model = get_model(model, full)
    pair = {"MULTIPLE_CHOICE": 8}.get(task, 4)
    trainer = trainer_of(model, rows_of(data), tmp_path, [grab], max_steps=1, max_grad_norm=0.0)
    trainer.train()
    data = {key: value[sampler_order(4)] for key, value in data.items()}
    run = Run(model=model, task=model.peft_plus.task, num_blocks=3, seed=42, stage=model.peft_plus.stages[0])
    texts = pair // 4
    for i in range(pair):
        stream = run.generator("smart", i // texts, i % texts)
        seen.append(torch.empty(8, 32).normal_(0.0, 0.4, generator=stream))

    def passes(noise: Tensor) -> tuple[Any, Any]:
        return pass_above(twin, data, None), pass_above(twin, data, noise)

    delta = worst_noise(passes, task, data, torch.stack(seen), settings)
    twin.zero_grad()
    clean, noised = passes(delta)
    total, count = summed_distance(task, data, clean, noised)
    wanted = data["labels"] != -100
    (F.cross_entropy(clean.logits[wanted], data["labels"][wanted]) + 0.7 * total / count).backward()
    names = grab.gradients.keys()
    assert not any("layer.0." in n or "layer.1." in n or "embeddings" in n for n in names)
    assert any("layer.2." in n for n in names)
    assert distance(grab.gradients, {n: g for n, g in gradients(twin).items() if n in names}) < 1e-4


class Passes(TrainerCallback):
    """How often each block runs in a step after the first epoch."""

    def __init__(self, model: nn.Module) -> None:
        self.counts = [0, 0, 0]
        for n, module in model.named_modules():
            if n.endswith("attention.self"):
                module.register_forward_hook(partial(self._count, int(n.split(".")[-3])))

    def _count(self, block: int, *_: Any) -> None:
        self.counts[block] += 1

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.counts = [0, 0, 0]


@pytest.mark.parametrize(("name", "task"), [("bert", "SEQ_CLS"), ("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")])
@pytest.mark.parametrize("at", ["trunk", "embeddings"])
def test_a_cached_trunk_gives_the_uncached_run_bit_for_bit(name, task, at, tmp_path):
    trained = []
    for cache in ({}, {"trunk_cache": {}}):
        torch.manual_seed(0)
        method = {**FROZEN, **cache, "smart": {"at": at, "ema": 0.5, **LARGE}}
        model = get_model(lively(name, task), method)
        trainer_of(model, rows_of(batch(name, task, rows=8)), tmp_path, max_steps=6).train()
        trained.append({n: p.detach().clone() for n, p in model.named_parameters()} | plugin_of(model).teacher)
    assert all(torch.equal(trained[0][n], trained[1][n]) for n in trained[0])


@pytest.mark.parametrize(("cache", "below"), [({}, 1), ({"trunk_cache": {}}, 0)])
def test_the_frozen_blocks_run_once_for_all_passes_or_not_at_all(cache, below, tmp_path):
    """Four passes: the clean one, the teacher's, the ascent's, the loss's."""
    model = get_model(lively("bert"), {**FROZEN, **cache, "smart": {"at": "trunk", **LARGE}})
    passes = Passes(model)
    trainer_of(model, rows_of(batch("bert", rows=8)), tmp_path, [passes], max_steps=6).train()
    assert passes.counts == [below, below, 4]


class RestsLater(Plugin):
    """The lowest block trains for two steps, and rests from then on."""

    name = "rests_later"

    def may_train(self, run: Run, param: Param) -> bool:
        return run.step < 2 or param.depth > 1

    def next_change(self, run: Run) -> int | None:
        return 2 if run.step < 2 else None


class Distances(TrainerCallback):
    """How far model and teacher are apart on one batch in each step, computed with two copies."""

    def __init__(self, model: nn.Module, plugin: SMART, data: Mapping[str, Tensor]) -> None:
        self.model, self.plugin, self.data = model, plugin, data
        self.copies = copy.deepcopy(model), copy.deepcopy(model)
        self.values: list[float] = []

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        now, before = self.copies
        now.load_state_dict(self.model.state_dict())
        before.load_state_dict(self.model.state_dict())
        before.load_state_dict(self.plugin.teacher, strict=False)
        with torch.no_grad():
            self.values.append(kl_both_ways(now(**self.data).logits, before(**self.data).logits).mean().item())


@pytest.mark.parametrize("cache", [{}, {"trunk_cache": {}}], ids=["plain", "cached"])
def test_a_block_that_rests_after_it_has_trained_is_still_another_one_in_the_teacher(cache, tmp_path):
    """Its output in the clean pass is not the teacher's, though nothing trains in it any more."""
    model = get_model(lively("bert"), ["full", RestsLater(), SMART(weight=0.0, ema=0.9), *cache])
    data = batch("bert", rows=4)
    seen = Distances(model, plugin_of(model), data)
    trainer = trainer_of(
        model, rows_of(data), tmp_path, [seen], max_steps=6, logging_strategy="steps", logging_steps=1, optim="sgd"
    )
    trainer.train()
    logged = [entry["smart_bregman"] for entry in trainer.state.log_history if "smart_bregman" in entry]
    assert max(seen.values) > 1e-3
    assert logged == pytest.approx(seen.values, rel=1e-2, abs=2e-6)


# ---- activation checkpointing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", [{}, {"r3f": {"at": "trunk", "eps": 0.5}}], ids=["alone", "with r3f at the trunk"])
def test_checkpointing_changes_no_bit_of_it(beside, tmp_path):
    """The ascent goes back through frozen blocks, which are computed again for it, and for nothing else."""
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
        model = get_model(lively("bert", **dropout), {**FROZEN, "smart": {**LARGE, "ema": 0.5}, **beside})
        seen: list[Tensor] = []
        norm = next(m for n, m in model.named_modules() if n.endswith("embeddings.LayerNorm"))
        norm.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].detach().clone()))
        trainer = trainer_of(
            model,
            rows_of(batch("bert", rows=8)),
            tmp_path,
            max_steps=3,
            activation_checkpointing=checkpointing,
            logging_strategy="steps",
            logging_steps=1,
        )
        trainer.train()
        logs = [{k: v for k, v in entry.items() if k in ("smart", "r3f")} for entry in trainer.state.log_history]
        found.append((seen, {n: p.detach() for n, p in model.named_parameters()}, logs))
    (plain, weights, logs), (other, others, their) = found
    assert len(plain) == len(other)
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    assert all(torch.equal(weights[n], others[n]) for n in weights)
    assert logs == their


def test_reentrant_checkpointing_is_refused_by_name(tmp_path):
    model = get_model(lively("bert"), {"lora": {}, "smart": {"bregman": 0.0}})
    trainer = trainer_of(
        model,
        rows_of(batch("bert", rows=8)),
        tmp_path,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": True},
    )
    with pytest.raises(PluginError, match=r"'smart'.*use_reentrant=False"):
        trainer.train()


# ---- every tuner, low precision, refusals ----------------------------------------------------------------------------


@pytest.mark.parametrize("tuner", [*TUNERS, "full"])
@pytest.mark.parametrize(("name", "task"), [("bert", "SEQ_CLS"), ("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")])
def test_with_every_kind_of_tuner(name, task, tuner, tmp_path):
    if tuner == "linear_probe":
        task = "SEQ_CLS"
    settings = TUNERS.get(tuner, {})
    model = get_model(lively(name, task), {tuner: settings, "smart": {"ema": 0.5, **LARGE}})
    rows = rows_of(batch(name, task, rows=8))
    trainer = trainer_of(model, rows, tmp_path, logging_strategy="steps", logging_steps=1)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "smart" in entry]
    assert all(entry["smart"] > 1e-4 for entry in logged)
    assert logged[1]["smart_bregman"] > 0


def test_autocast_is_near_the_fp32_value(tmp_path):
    logged = []
    for bf16 in (False, True):
        model = get_model(lively("bert"), {"full": {}, "smart": {"ema": 0.5, **LARGE}})
        trainer = trainer_of(
            model,
            rows_of(batch("bert")),
            tmp_path,
            bf16=bf16,
            logging_strategy="steps",
            logging_steps=1,
            optim="sgd",
            learning_rate=0.1,
        )
        trainer.train()
        logged.append([trainer.state.log_history[i][name] for i, name in ((0, "smart"), (1, "smart_bregman"))])
    assert logged[1] == pytest.approx(logged[0], rel=0.1)
    assert min(logged[0]) > 1e-2


@pytest.mark.parametrize(("at", "where"), [("embeddings", "the embeddings"), ("trunk", "the trunk's output")])
def test_noise_that_bf16_swallows_is_an_error(at, where, tmp_path):
    model = get_model(lively("bert").bfloat16(), {"full": {}, "freeze": {"blocks": 1}, "smart": {"at": at}})
    with pytest.raises(PluginError, match=rf"'smart'.*vanishes in {where} in torch\.bfloat16.*larger noise"):
        trainer_of(model, rows_of(batch("bert")), tmp_path).train()


def test_without_frozen_blocks_there_is_no_trunk(tmp_path):
    model = get_model(tiny("bert"), {"full": {}, "smart": {"at": "trunk"}})
    with pytest.raises(PluginError, match=r"'smart'.*no block is frozen.*freeze.*embeddings"):
        trainer_of(model, rows_of(batch("bert")), tmp_path).train()


def test_a_model_without_embeddings_has_the_teachers_term_alone(tmp_path):
    rows = rows_of(batch("resnet"))
    with pytest.raises(PluginError, match=r"'smart'.*ResNetForImageClassification has no input embeddings"):
        trainer_of(get_model(tiny("resnet"), ["full", "smart"]), rows, tmp_path).train()
    trainer_of(get_model(tiny("resnet"), {"full": {}, "smart": {"weight": 0.0}}), rows, tmp_path).train()


@pytest.mark.parametrize(
    "settings",
    [
        {"weight": -1.0},
        {"weight": float("nan")},
        {"eps": 0.0},
        {"eps": float("inf")},
        {"step_size": 0.0},
        {"step_size": -1e-3},
        {"sigma": 0.0},
        {"sigma": float("nan")},
        {"steps": 0},
        {"steps": 1.5},
        {"at": "head"},
        {"bregman": -0.1},
        {"bregman": float("inf")},
        {"ema": -0.1},
        {"ema": 1.1},
        {"ema": float("nan")},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(MethodError, match=f"smart.*{next(iter(settings))}"):
        get_model(tiny("bert"), {"lora": {}, "smart": settings})
