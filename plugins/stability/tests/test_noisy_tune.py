"""The noise of each tensor against its bounds, its distribution and the paper's line of code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import nn

from peft_plus import MethodError, attach, get_model
from peft_plus_stability.noisy_tune import noised
from tests.bad_inputs import trainer, weights
from tests.models import batch, rows_of, tiny

TASKS = [("bert", "SEQ_CLS"), ("bert", "MASKED_LM"), ("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM"), ("vit", None)]


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def spread(model: nn.Module) -> nn.Module:
    """Norms and biases start constant, which pretrained ones are not."""
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    return model


def test_it_is_uniform_within_half_of_the_intensity_times_the_spread() -> None:
    weight = torch.randn(200, 300) * 0.02 + 1
    noise = (noised(weight, intensity=0.3) - weight).double() / (0.3 * weight.double().std())
    assert noise.abs().max() <= 0.5 + 1e-5
    assert stats.kstest(noise.flatten().numpy(), stats.uniform(-0.5, 1).cdf).pvalue > 0.01


def test_the_paper_s_line_of_code() -> None:
    weight = torch.randn(20, 30)
    torch.manual_seed(3)
    found = noised(weight, intensity=0.15)
    torch.manual_seed(3)
    wanted = weight + (torch.rand(weight.size()) - 0.5) * 0.15 * torch.std(weight)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("weight", [torch.full((7, 3), 0.3), torch.ones(5), torch.tensor([2.0]), torch.zeros(0)])
def test_what_has_no_spread_stays(weight: torch.Tensor) -> None:
    assert torch.equal(noised(weight, intensity=0.5), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_noise_is_drawn_wide_enough_for_any_dtype(dtype: torch.dtype) -> None:
    weight = torch.randn(50, 60).to(dtype)
    found = noised(weight, intensity=0.15)
    assert found.dtype == dtype
    scale = 0.15 * weight.double().std() / 12**0.5
    assert float((found.double() - weight.double()).std()) == pytest.approx(float(scale), rel=0.05)


def heads(name: str, task: str | None) -> tuple[str, ...]:
    """The heads that are drawn fresh."""
    return ("classifier.",) if task in ("SEQ_CLS", None) else ()


@pytest.mark.parametrize(("name", "task"), TASKS)
def test_every_pretrained_tensor_is_noised_once_and_a_fresh_head_is_not(name: str, task: str | None) -> None:
    before = weights(spread(tiny(name, task)))
    model = get_model(spread(tiny(name, task)), {"full": {}, "noisy_tune": {"intensity": 0.15}})
    assert before.keys() == dict(model.named_parameters()).keys()
    for key, tensor in model.named_parameters():
        moved = (tensor.detach() - before[key]).abs()
        if key.startswith(heads(name, task)) or before[key].numel() < 2:
            assert not moved.any(), key
        else:  # a tied tensor that is noised twice would leave these bounds
            assert moved.max() <= 0.075 * before[key].std() * (1 + 1e-4) + 1e-7, key
            assert moved.max() >= 0.075 * before[key].std() * 0.5, key


@pytest.mark.parametrize("how", ["loaded", "folder", "attached"])
def test_whichever_way_the_model_is_built_one_seed_gives_the_same(how: str, tmp_path: Path) -> None:
    method: Any = {"noisy_tune": {"intensity": 0.4}}
    base = tiny("bert")
    base.save_pretrained(tmp_path)
    torch.manual_seed(5)
    wanted = get_model(tiny("bert"), method)
    torch.manual_seed(5)
    if how == "loaded":
        model = get_model(tiny("bert"), {"full": {}, **method})
    elif how == "attached":
        model = attach(tiny("bert"), method)
    else:
        model = get_model(tmp_path, method, task="SEQ_CLS", num_labels=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), wanted.parameters(), strict=True))
    assert not torch.equal(model.get_input_embeddings().weight, base.get_input_embeddings().weight)


def test_intensity_zero_changes_no_weight_and_draws_nothing() -> None:
    before = weights(tiny("bert"))
    state = torch.get_rng_state()
    model = get_model(tiny("bert"), {"full": {}, "noisy_tune": {"intensity": 0.0}})
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())


def test_training_starts_from_the_noised_weights_and_a_saved_folder_holds_them(tmp_path: Path) -> None:
    model = get_model(tiny("bert"), {"full": {}, "noisy_tune": {"intensity": 0.5}})
    noisy = model.get_input_embeddings().weight.detach().clone()
    run = trainer(model, tmp_path, rows_of(batch("bert", rows=8)), max_steps=2, learning_rate=1e-6)
    run.train()
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    assert torch.allclose(again.get_input_embeddings().weight, noisy, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("tuner", ["lora", "prompt_tuning", "linear_probe"])
def test_an_adapter_that_would_be_saved_without_the_noise_is_refused(tuner: str, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=rf"'noisy_tune'.*needs base weights that train.*{tuner!r} keeps the base"):
        get_model(tmp_path / "nothing", [tuner, "noisy_tune"], task="SEQ_CLS", num_labels=2)


@pytest.mark.parametrize("intensity", [-0.1, float("nan"), float("inf")])
def test_an_intensity_out_of_range_is_refused(intensity: float) -> None:
    with pytest.raises(MethodError, match=r"noisy_tune.*intensity="):
        get_model(tiny("bert"), {"full": {}, "noisy_tune": {"intensity": intensity}})
