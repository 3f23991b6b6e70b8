"""Each depth's rate is that of the depth above ÷ 2.6, counted over the depths where something trains."""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import Any

import pytest
import torch

from peft_plus import MethodError, get_model
from peft_plus_freezing.discriminative_lr import DiscriminativeLR, discriminative_rate
from tests.bare_loop import BareLoop, check_resume
from tests.models import tiny
from tests.multipliers import in_session, in_trainer

TABLE = {4: 1.0, 3: 1 / 2.6, 2: 1 / 6.76, 1: 1 / 17.576, 0: 1 / 45.6976}
"""Three blocks between embeddings and head, written out."""


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def test_the_table_of_the_paper() -> None:
    depths = (4, 3, 2, 1, 0)
    assert {d: discriminative_rate(d, depths, factor=2.6) for d in depths} == pytest.approx(TABLE, rel=1e-12)
    rates = [discriminative_rate(d, depths, factor=2.6) for d in depths]
    assert [above / below for above, below in pairwise(rates)] == pytest.approx([2.6] * 4)
    assert [discriminative_rate(d, depths, factor=1.0) for d in depths] == [1.0] * 5


def test_depths_without_anything_to_train_do_not_count() -> None:
    assert [discriminative_rate(d, (3, 1), factor=2.0) for d in (3, 1)] == [1.0, 0.5]


@pytest.mark.parametrize("tuner", ["full", "lora", "ia3"])
def test_every_update_has_the_rates_of_the_table(tuner: str) -> None:
    model = get_model(tiny("bert"), [tuner, "discriminative_lr"])
    loop = BareLoop(model, steps=3, optimizer=torch.optim.SGD, lr=1.0, weight_decay=0.0)
    loop.step()
    loop.step()
    table = {depth: rate for depth, rate in TABLE.items() if depth or tuner == "full"}
    for rates in loop.rates:
        assert rates == pytest.approx(table, rel=2e-2)


def test_without_a_head_the_topmost_block_has_the_base_rate() -> None:
    model = get_model(tiny("llama", "CAUSAL_LM"), ["lora", "discriminative_lr"])
    loop = BareLoop(
        model, steps=2, optimizer=torch.optim.SGD, lr=1.0, weight_decay=0.0, data=("llama", "CAUSAL_LM")
    ).run()
    assert loop.rates[-1] == pytest.approx({3: 1.0, 2: 1 / 2.6, 1: 1 / 6.76}, rel=1e-3)


def test_under_trainer_and_session_with_accumulation(tmp_path: Any) -> None:
    for rates in (
        in_trainer(
            get_model(tiny("bert"), ["full", "discriminative_lr"]), tmp_path, steps=2, lr_scheduler_type="constant"
        ),
        in_session(get_model(tiny("bert"), ["full", "discriminative_lr"]), steps=2),
    ):
        assert rates == [pytest.approx(TABLE, rel=1e-2)] * 2


def test_it_composes_with_a_thaw_and_another_rate() -> None:
    """The rates of the depths do not depend on which of them train yet, and multipliers multiply."""
    method = {"full": {}, "gradual_unfreeze": {"every": 1}, "discriminative_lr": {}, "llrd": {"decay": 0.5}}
    loop = BareLoop(get_model(tiny("bert"), method), steps=5, optimizer=torch.optim.SGD, lr=1.0, weight_decay=0.0).run()
    for step, rates in enumerate(loop.rates):
        assert rates == pytest.approx({d: TABLE[d] * 0.5 ** (4 - d) for d in range(4, 3 - step, -1)}, rel=1e-2)


def test_factor_one_is_the_plain_run_bit_for_bit() -> None:
    ended = [
        BareLoop(get_model(tiny("bert"), method), steps=4).run().model.state_dict()
        for method in ({"full": {}}, {"full": {}, "discriminative_lr": {"factor": 1.0}})
    ]
    assert all(torch.equal(ended[0][name], ended[1][name]) for name in ended[0])


def test_resumed_after_any_step_the_end_is_bit_identical() -> None:
    check_resume(lambda: get_model(tiny("bert"), ["full", "discriminative_lr"]), steps=4)


def test_a_depth_so_low_that_it_hardly_moves_is_told_before_training(caplog: pytest.LogCaptureFixture) -> None:
    deep = {"num_hidden_layers": 20, "hidden_size": 8, "intermediate_size": 8}
    get_model(tiny("bert", **deep), ["lora", "discriminative_lr"])
    assert "of 21 depths the lowest gets 5.0e-09 of the learning rate" in caplog.text
    assert "factor=1.41 it would get a thousandth" in caplog.text
    assert discriminative_rate(0, range(21), factor=1.41) == pytest.approx(1e-3, rel=0.05)
    caplog.clear()
    get_model(tiny("bert", **deep), {"lora": {}, "discriminative_lr": {"factor": 1.41}})
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("factor", [0.99, -2.6, float("nan"), float("inf")])
def test_a_factor_out_of_range_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="factor="):
        DiscriminativeLR(factor=factor)
    with pytest.raises(MethodError, match=r"discriminative_lr.*peft-plus-freezing.*factor"):
        get_model(tiny("bert"), {"lora": {}, "discriminative_lr": {"factor": factor}})
