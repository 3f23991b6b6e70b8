"""The table of rates: head = base, top block = base · d, embeddings = base · d^(L+1)."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import TrainingArguments, default_data_collator

import peft_plus
from peft_plus import MethodError, Param, Run, get_model
from peft_plus_stability.llrd import LLRD, layer_rate
from tests.models import batch, tiny


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def test_the_table_of_the_paper():
    """Twelve blocks, d = 0.95, written out."""
    table = {13: 1.0, 12: 0.95, 11: 0.9025, 1: 0.95**12, 0: 0.95**13}
    assert {d: layer_rate(d, 12, decay=0.95) for d in table} == pytest.approx(table, rel=1e-12)
    assert [layer_rate(d, 12, decay=1.0) for d in range(14)] == [1.0] * 14


def test_neighbours_differ_by_one_factor():
    rates = [layer_rate(d, 6, decay=0.8) for d in range(8)]
    assert rates[-1] == 1.0
    assert [lower / upper for lower, upper in pairwise(rates)] == pytest.approx([0.8] * 7)


def by_name(name: str) -> int:
    """How many decays a parameter of a three-block model gets."""
    block = re.search(r"\.(?:layer|layers|block|h)\.(\d)\.", name)
    if block:
        return 3 - int(block[1])
    if re.search(r"embed|shared|wte|wpe|relative", name):
        return 4
    return 1 if "encoder.final_layer_norm" in name else 0


@pytest.mark.parametrize("tuner", ["full", "lora"])
@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("bert", "SEQ_CLS"),
        ("roberta", "TOKEN_CLS"),
        ("llama", "CAUSAL_LM"),
        ("t5", "SEQ_2_SEQ_LM"),
        ("bart", "SEQ_CLS"),
    ],
)
def test_every_parameter_of_a_model(name, task, tuner):
    model = get_model(tiny(name, task), {tuner: {}, "llrd": {"decay": 0.5}})
    plan = model.peft_plus
    (plugin,) = plan.plugins
    run = Run(model=model, task=plan.task, num_blocks=plan.layers.num_blocks)
    assert plan.params.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for n, param in plan.params.items():
        assert plugin.lr_scale(run, param) == 0.5 ** by_name(n), n


def test_parameters_of_one_key_have_one_rate():
    plugin = LLRD(decay=0.9)
    run = Run(model=nn.Identity(), task=None, num_blocks=3)  # type: ignore[arg-type]
    params = [Param(f"{d}{part}", (1,), d, part) for d in range(5) for part in ("adapter", "base", "head")]
    rates: dict[tuple, set[float]] = {}
    for param in params:
        rates.setdefault(plugin.lr_key(param), set()).add(plugin.lr_scale(run, param))
    assert all(len(found) == 1 for found in rates.values())


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.01, float("nan"), float("inf")])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match="decay="):
        LLRD(decay=decay)
    with pytest.raises(MethodError, match=r"llrd.*peft-plus-stability.*decay"):
        get_model(tiny("bert"), {"lora": {}, "llrd": {"decay": decay}})


@pytest.mark.parametrize("tuner", ["linear_probe", "prompt_tuning", "prefix_tuning"])
def test_a_tuner_without_layers_is_refused(tuner):
    with pytest.raises(MethodError, match=rf"llrd.*{tuner}"):
        get_model(tiny("bert"), [tuner, "llrd"])


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor"])
def test_decay_one_is_the_plain_run_bit_for_bit(optim, tmp_path):
    data = batch("bert", rows=16)
    trained = []
    for method in ({"lora": {}}, {"lora": {}, "llrd": {"decay": 1.0}}):
        torch.manual_seed(0)
        model = get_model(tiny("bert", hidden_dropout_prob=0.1), method)
        arguments = TrainingArguments(
            str(tmp_path),
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            max_steps=4,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            weight_decay=0.1,
            optim=optim,
        )
        rows = [{key: value[i] for key, value in data.items()} for i in range(16)]
        peft_plus.Trainer(model, arguments, train_dataset=rows, data_collator=default_data_collator).train()
        trained.append({n: p.detach().clone() for n, p in model.named_parameters()})
    plain, decayed = trained
    assert all(torch.equal(plain[n], decayed[n]) for n in plain)
