"""R3F with its noise above the frozen blocks, against plain torch: a second model, hooks of our own, autograd."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback

from peft_plus import MethodError, PluginError, Session, get_model
from peft_plus.layers import layer_map
from tests.consistency import (
    TASKS,
    Grab,
    accumulated,
    distance,
    gradients,
    model_and_batch,
    sampler_order,
    summed_distance,
    trainer_of,
)
from tests.models import PAD, batch, rows_of, tiny

FREEZE = {"freeze": {"blocks": 2}}
"""The embeddings go with the first blocks."""


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def block(model: nn.Module, depth: int) -> nn.Module:
    """The block at a depth that reads the input: of an encoder-decoder the encoder's."""
    row = layer_map(model).blocks[depth - 1]
    return model.get_submodule(next((name for name in row if "encoder" in name), row[0]))


class Seen:
    """What a block was given in each training pass: the difference of two passes is the noise."""

    def __init__(self, model: nn.Module, depth: int = 3) -> None:
        self.inputs: list[Tensor] = []
        block(model, depth).register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled():
            self.inputs.append((args[0] if args else kwargs["hidden_states"]).detach().clone())

    def noise(self) -> list[Tensor]:
        return [noised - clean for clean, noised in zip(self.inputs[::2], self.inputs[1::2], strict=True)]


class Ran:
    """How often a block's attention ran, with a gradient or without."""

    def __init__(self, model: nn.Module, depth: int) -> None:
        self.times = 0
        attention = next(m for m in block(model, depth).modules() if "Attention" in type(m).__name__)
        attention.register_forward_pre_hook(lambda *_: self._count())

    def _count(self) -> None:
        self.times += 1


def two_passes(model: nn.Module, name: str, data: Mapping[str, Tensor], noise: Tensor) -> tuple[Any, Any]:
    """The outputs of both passes, the second with the noise on the output of block 2."""
    inputs = {k: v for k, v in data.items() if k not in ("labels", "start_positions", "end_positions")}
    if name in ("t5", "bart"):
        labels = data["labels"]
        start = model.config.decoder_start_token_id  # type: ignore[union-attr]
        before = labels[:, :-1].masked_fill(labels[:, :-1] == -100, PAD)
        inputs["decoder_input_ids"] = torch.cat([torch.full_like(labels[:, :1], start), before], 1)
    clean = model(**inputs)

    def add(module: nn.Module, args: Any, output: Any) -> Any:
        return output + noise if isinstance(output, Tensor) else (output[0] + noise, *output[1:])

    hook = block(model, 2).register_forward_hook(add)
    noised = model(**inputs)
    hook.remove()
    return clean, noised


def frozen(model: nn.Module) -> nn.Module:
    """As `FREEZE` leaves it, by hand."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(layer_map(model).depth[name] > 2)
    return model


def task_loss(task: str, data: Mapping[str, Tensor], output: Any) -> Tensor:
    """What the model's own loss is."""
    labels = data.get("labels")
    match task:
        case "QUESTION_ANS":
            start = F.cross_entropy(output.start_logits, data["start_positions"])
            return (start + F.cross_entropy(output.end_logits, data["end_positions"])) / 2
        case "multi_label_classification":
            return F.binary_cross_entropy_with_logits(output.logits, labels)
        case "regression":
            return (output.logits.squeeze(-1) - labels).square().mean()
    assert labels is not None
    logits = output.logits
    if task == "CAUSAL_LM":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return (
        F.cross_entropy(logits.flatten(0, -2), labels.flatten())
        if labels.dim() > 1
        else F.cross_entropy(logits, labels)
    )


# ---- value and gradient --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("name", "task"), TASKS)
def test_value_and_gradient_against_plain_torch(name: str, task: str, cached: bool, tmp_path: Any) -> None:
    model, data = model_and_batch(name, task)
    twin = frozen(copy.deepcopy(model)).train()
    seen, grab = Seen(model), Grab()
    more = {"trunk_cache": {"fill": "before"}} if cached else {}
    method = {"full": {}, **FREEZE, "r3f": {"weight": 0.7, "eps": 0.5, "at": "trunk"}, **more}
    trainer = trainer_of(
        get_model(model, method),
        rows_of(data),
        tmp_path,
        [grab],
        max_steps=1,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        logging_strategy="steps",
        logging_steps=1,
    )
    trainer.train()
    (noise,) = seen.noise()
    assert noise.abs().max() <= 0.5 + 1e-5
    clean, noised = two_passes(twin, name, data, noise)
    total, count = summed_distance(task, data, clean, noised)
    wanted = 0.7 * total / count
    (task_loss(task, data, clean) + wanted).backward()
    assert wanted.item() > 1e-4
    assert trainer.state.log_history[0]["r3f"] == pytest.approx(wanted.item(), rel=1e-3)
    assert distance(grab.gradients, gradients(twin)) < 1e-4
    assert not [n for n in grab.gradients if layer_map(twin).depth[n] <= 2]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_whole_gradient_whatever_the_accumulation(name: str, tmp_path: Any) -> None:
    """Task loss + weight · distance of one big batch; each example's noise is its own, whoever stands beside it."""
    found = []
    for accumulation in (1, 2, 4):
        model, data = model_and_batch(name, "SEQ_CLS", rows=8)
        twin = frozen(copy.deepcopy(model)).train()
        seen, grab = Seen(model), Grab()
        model = get_model(model, {"full": {}, **FREEZE, "r3f": {"weight": 0.7, "eps": 0.5, "at": "trunk"}})
        trainer_of(
            model,
            rows_of(data),
            tmp_path,
            [grab],
            max_steps=1,
            **accumulated(8, accumulation),
        ).train()
        found.append((torch.cat(seen.noise()), grab.gradients))
    noise = found[0][0]
    assert all(not torch.allclose(a, b, atol=0.1) for a, b in combinations(noise, 2))
    for other, _ in found[1:]:
        torch.testing.assert_close(other, noise, rtol=0, atol=1e-5)
    data = {key: value[sampler_order(8)] for key, value in data.items()}
    clean, noised = two_passes(twin, name, data, noise)
    total, count = summed_distance("SEQ_CLS", data, clean, noised)
    (F.cross_entropy(clean.logits, data["labels"]) + 0.7 * total / count).backward()
    for _, got in found:
        assert distance(got, gradients(twin)) < 1e-4


def test_it_is_another_objective_than_noise_in_the_embeddings(tmp_path: Any) -> None:
    found = []
    for at in ("embeddings", "trunk"):
        model, data = model_and_batch("bert", "SEQ_CLS")
        grab = Grab()
        model = get_model(model, {"full": {}, **FREEZE, "r3f": {"eps": 0.5, "at": at}})
        trainer_of(model, rows_of(data), tmp_path, [grab], max_steps=1).train()
        found.append(grab.gradients)
    assert distance(*found) > 1e-2


# ---- with a store, and without -------------------------------------------------------------------------------------


def trained(
    method: Mapping[str, Any], folder: Any, *, name: str = "bert", task: str = "SEQ_CLS", **settings: Any
) -> Any:
    model, data = model_and_batch(name, task, rows=12)
    torch.manual_seed(0)
    model = get_model(model, dict(method))
    defaults = {"max_steps": 9, "train_sampling_strategy": "sequential"}
    trainer_of(model, rows_of(data), folder, **{**defaults, **settings}).train()
    return {n: p.detach().clone() for n, p in model.named_parameters()}


NOISY = {"r3f": {"eps": 0.5, "weight": 2.0, "at": "trunk"}}


SETTINGS: dict[str, dict[str, Any]] = {
    "": {},
    "accumulation": {"gradient_accumulation_steps": 3, "max_steps": 4},
    "bf16": {"bf16": True},
    "checkpointing": {"activation_checkpointing": True},
    "reentrant": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
}


@pytest.mark.parametrize(
    ("name", "task", "settings"),
    [
        *(("bert", "SEQ_CLS", settings) for settings in SETTINGS),
        *(("llama", "CAUSAL_LM", settings) for settings in ("", "bf16")),
        *(("t5", "SEQ_2_SEQ_LM", settings) for settings in ("", "accumulation", "reentrant")),
    ],
)
def test_with_a_store_the_run_is_the_same_bit_for_bit(name: str, task: str, settings: str, tmp_path: Any) -> None:
    method = {"full": {}, **FREEZE, **NOISY}
    plain = trained(method, tmp_path, name=name, task=task, **SETTINGS[settings])
    cached = trained({**method, "trunk_cache": {}}, tmp_path, name=name, task=task, **SETTINGS[settings])
    assert [n for n in plain if not torch.equal(plain[n], cached[n])] == []


def test_the_frozen_blocks_run_once_for_both_passes_and_with_a_store_once_for_all_epochs(tmp_path: Any) -> None:
    counts = {}
    for more in ("", "trunk_cache"):
        model, data = model_and_batch("bert", "SEQ_CLS", rows=12)
        lower, upper = Ran(model, 1), Ran(model, 3)
        method = {"full": {}, **FREEZE, **NOISY, **({more: {}} if more else {})}
        trainer_of(get_model(model, method), rows_of(data), tmp_path, max_steps=9).train()
        counts[more] = (lower.times, upper.times)
    assert counts[""] == (9, 18)
    assert counts["trunk_cache"][0] <= 3 + 8  # an epoch, and the trials of its first batch
    assert counts["trunk_cache"][1] >= 18


def test_in_a_session_too(tmp_path: Any) -> None:
    found = []
    for more in ({}, {"trunk_cache": {}}):
        model, data = model_and_batch("bert", "SEQ_CLS", rows=12)
        torch.manual_seed(0)
        model = get_model(model, {"full": {}, **FREEZE, **NOISY, **more})
        accelerator = Accelerator(cpu=True)
        session = Session(model, accelerator, epochs=3)
        optimizer = session.optimizer(torch.optim.SGD, lr=0.05)
        loader = session.loader(rows_of(data), batch_size=4, shuffle=False)
        for inputs in session.batches(loader):
            accelerator.backward(session.loss(inputs))
            optimizer.step()
            optimizer.zero_grad()
        assert session.logs()["r3f"] > 1e-4
        found.append({n: p.detach().clone() for n, p in model.named_parameters()})
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


@pytest.mark.parametrize("more", [{}, {"trunk_cache": {}}])
def test_weight_zero_is_the_plain_run_bit_for_bit(more: dict[str, Any], tmp_path: Any) -> None:
    method = {"lora": {"init_lora_weights": False, "lora_dropout": 0.1}, **FREEZE, **more}
    plain = trained(method, tmp_path)
    none = trained({**method, "r3f": {"weight": 0.0, "eps": 1.0, "at": "trunk"}}, tmp_path)
    assert all(torch.equal(plain[n], none[n]) for n in plain)
    noisy = trained({**method, **NOISY}, tmp_path)
    assert not all(torch.equal(plain[n], noisy[n]) for n in plain)


def test_the_noise_goes_above_the_highest_block_that_is_frozen_at_that_step(tmp_path: Any) -> None:
    """Also where the store serves fewer blocks than are frozen now."""
    # The head, block 3 too from step 4 on, block 2 too from step 8 on; block 1 stays frozen.
    method = {"full": {}, "gradual_unfreeze": {"every": 4}, **NOISY}
    model, data = model_and_batch("bert", "SEQ_CLS", rows=12)
    ran = {depth: Ran(model, depth) for depth in (1, 2, 3)}
    steps: list[list[int]] = []

    class Note(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            steps.append([one.times for one in ran.values()])

    trainer_of(get_model(model, method), rows_of(data), tmp_path, [Note()], max_steps=11).train()
    passes = [[b - a for a, b in zip(x, y, strict=True)] for x, y in zip([[0, 0, 0], *steps], steps, strict=False)]
    assert passes == [[1, 1, 1]] * 4 + [[1, 1, 2]] * 4 + [[1, 2, 2]] * 3
    found = [trained({**method, **more}, tmp_path, max_steps=11, optim="sgd") for more in ({}, {"trunk_cache": {}})]
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


# ---- what is refused -----------------------------------------------------------------------------------------------


class Started(TrainerCallback):
    steps = 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps += 1


def refused(method: Mapping[str, Any], folder: Any, says: str, base: nn.Module | None = None) -> None:
    started = Started()
    trainer = trainer_of(
        get_model(base or tiny("bert"), dict(method)), rows_of(batch("bert", rows=8)), folder, [started], max_steps=9
    )
    with pytest.raises(PluginError, match=rf"'r3f'.*{says}"):
        trainer.train()
    assert started.steps == 0


def test_without_a_frozen_block_there_is_no_trunk(tmp_path: Any) -> None:
    says = r"no trunk to put noise on: no block is frozen now\. Freeze the lower blocks"
    refused({"lora": {}, "r3f": {"at": "trunk"}}, tmp_path, says)
    refused({"full": {}, "freeze": {"patterns": "embeddings"}, "r3f": {"at": "trunk"}}, tmp_path, says)


def test_a_schedule_that_thaws_the_last_block_is_refused_in_the_first_step(tmp_path: Any) -> None:
    says = "from step 6 on no block is frozen any more.*Keep the lower blocks frozen"
    refused({"full": {}, "gradual_unfreeze": {"every": 2}, "r3f": {"at": "trunk"}}, tmp_path, says)
    # One that ends before that is not.
    model = get_model(tiny("bert"), {"full": {}, "gradual_unfreeze": {"every": 4}, "r3f": {"at": "trunk"}})
    trainer_of(model, rows_of(batch("bert", rows=8)), tmp_path, max_steps=9).train()


def test_noise_that_bf16_swallows_is_an_error(tmp_path: Any) -> None:
    method = {"full": {}, **FREEZE, "r3f": {"at": "trunk"}}
    says = r"vanishes in the trunk's output in torch\.bfloat16.*larger noise"
    refused(method, tmp_path, says, tiny("bert").bfloat16())
    model, data = model_and_batch("bert", "SEQ_CLS")
    larger = get_model(model.bfloat16(), {**method, "r3f": {"at": "trunk", "eps": 0.5}})
    trainer = trainer_of(larger, rows_of(data), tmp_path, logging_strategy="steps", logging_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["r3f"] > 1e-3


def test_an_unknown_place_is_refused() -> None:
    with pytest.raises(MethodError, match=r"r3f.*at"):
        get_model(tiny("bert"), {"lora": {}, "r3f": {"at": "head"}})
