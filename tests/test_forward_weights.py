"""`Run.forward(batch, weights=…)` gives what a copy of the model with these weights puts out, and changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_plus import LossTerm, Plugin, Run, attach, get_model
from tests.consistency import lively, trainer_of
from tests.models import batch, rows_of, tiny


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def elsewhere(model: nn.Module) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(7)
    return {
        name: parameter.detach() + 0.1 * torch.randn(parameter.shape, generator=draw)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def run_of(model: Any, **settings: Any) -> Run:
    return Run(model=model, task=model.peft_plus.task, num_blocks=3, **settings)


MODELS = [("bert", "SEQ_CLS"), ("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")]


@pytest.mark.parametrize("tuner", ["full", "lora", "prefix_tuning"])
@pytest.mark.parametrize(("name", "task"), MODELS)
def test_it_is_what_a_copy_with_these_weights_puts_out(name, task, tuner):
    settings = {"num_virtual_tokens": 3} if tuner == "prefix_tuning" else {}
    model = get_model(lively(name, task), {tuner: settings}).train()
    other = copy.deepcopy(model)
    weights = elsewhere(model)
    other.load_state_dict(weights, strict=False)
    data = batch(name, task)
    inputs = data if name == "t5" else {k: v for k, v in data.items() if k != "labels"}
    before = {n: (p, p.detach().clone()) for n, p in model.named_parameters()}
    got = run_of(model).forward(data, weights=weights).logits
    with torch.no_grad():
        assert torch.equal(got, other(**inputs).logits)
        assert not torch.equal(got, model(**inputs).logits)
    assert not got.requires_grad
    for n, parameter in model.named_parameters():
        assert parameter is before[n][0]
        assert torch.equal(parameter, before[n][1])
        assert parameter.grad is None


def test_tied_weights_change_together():
    model = get_model(lively("bert", "MASKED_LM"), "full")
    data = batch("bert", "MASKED_LM")
    name = next(n for n, _ in model.named_parameters() if "word_embeddings" in n)
    other = copy.deepcopy(model)
    weights = {name: elsewhere(model)[name]}
    other.load_state_dict(weights, strict=False)
    assert other.get_output_embeddings().weight is other.get_input_embeddings().weight
    assert torch.equal(run_of(model).forward(data, weights=weights).logits, other(**data).logits)


def test_they_may_be_of_another_dtype():
    model = get_model(lively("bert").bfloat16(), "full")
    weights = elsewhere(model)
    wanted = run_of(model).forward(batch("bert"), weights=weights).logits
    given = {name: tensor.double() for name, tensor in weights.items()}
    assert torch.equal(run_of(model).forward(batch("bert"), weights=given).logits, wanted)
    assert wanted.dtype == torch.bfloat16


def test_it_goes_past_the_models_hooks_and_through_a_wrapped_forward():
    """Accelerate's autocast wraps `forward`; a hook on the model belongs to the training pass."""
    model = get_model(lively("bert"), "lora")
    model.register_forward_hook(lambda *_: pytest.fail("a hook of the model ran"))
    native, wrapped = model.forward, []

    def forward(**kwargs: Any) -> Any:
        wrapped.append(1)
        with torch.autocast("cpu", torch.bfloat16):
            return native(**kwargs)

    model.forward = forward
    got = run_of(model).forward(batch("bert"), weights=elsewhere(model)).logits
    assert wrapped == [1]
    assert got.dtype == torch.bfloat16


def test_autocast_keeps_the_gradient_of_the_next_pass():
    """Autocast remembers the bf16 copies of what trains; one made without a gradient must not serve a pass with one."""
    model = get_model(lively("bert"), "full")
    data, weights = batch("bert"), elsewhere(model)
    some = dict(list(weights.items())[:3])
    with torch.autocast("cpu", torch.bfloat16):
        run_of(model).forward(data, weights=some)
        model(**data).loss.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert missing == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": {"no.such": torch.zeros(1)}}, "no parameter called 'no.such'"),
        ({"weights": {}, "perturb": {"embeddings": torch.zeros(1)}}, "not both"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    model = get_model(tiny("bert"), "lora")
    with pytest.raises(ValueError, match=message):
        run_of(model).forward(batch("bert"), **settings)


def test_a_split_model_is_refused():
    model = get_model(tiny("bert"), "lora")
    weights = elsewhere(model)
    model.get_parameter(next(iter(weights))).ds_id = 0  # as ZeRO-3 marks what it split
    with pytest.raises(ValueError, match=r"whole on each process.*DDP"):
        run_of(model).forward(batch("bert"), weights=weights)


# ---- above a frozen trunk ----------------------------------------------------------------------------------------


class Asks(Plugin):
    """Makes passes with other weights in each step, and compares each with that of a copy that has them."""

    name = "asks"

    def loss_terms(self, run: Run, batch: Any, output: Any) -> dict[str, LossTerm]:
        model: Any = run.model
        above = elsewhere(model)
        below = {n: 2 * p.detach() for n, p in model.named_parameters() if "layer.0.output.dense" in n}
        assert above.keys().isdisjoint(below)
        another = {**batch, "input_ids": batch["input_ids"].flip(0)}
        for data, weights in ((batch, above), (batch, below), (batch, above | below), (another, above)):
            passed.append(0)
            got = run.forward(data, weights=weights).logits
            copies[0].load_state_dict(model.state_dict())
            copies[0].load_state_dict(weights, strict=False)
            with torch.no_grad():
                torch.testing.assert_close(got, copies[0](**data).logits, rtol=1e-5, atol=1e-5)
        return {}


passed: list[int] = []
"""For each pass how often the lowest block ran in it."""
copies: list[Any] = []


@pytest.mark.parametrize("cache", [{}, {"trunk_cache": {}}], ids=["plain", "cached"])
def test_the_trunk_is_shared_only_where_it_is_the_same(cache, tmp_path):
    """Not where a frozen weight is another one, nor for another batch."""
    passed.clear()
    model = lively("bert")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embeddings" not in name and "layer.0" not in name and "layer.1" not in name)
    copies[:] = [copy.deepcopy(model)]

    def count(*_: Any) -> None:
        if passed:
            passed[-1] += 1

    next(m for n, m in model.named_modules() if n.endswith("layer.0.attention.self")).register_forward_hook(count)
    attach(model, [*cache, Asks()])
    trainer_of(model, rows_of(batch("bert", rows=4)), tmp_path, max_steps=3).train()
    assert [bool(times) for times in passed[4:8]] == [False, True, True, True]
