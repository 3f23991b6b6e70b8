"""η(0) = η_max / 32, η(cut) = η_max, and the paper's closed form between and after."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from peft_plus import MethodError, get_model
from peft_plus_freezing.slanted_triangular import SlantedTriangular, slanted_triangle
from tests.bare_loop import BareLoop, check_resume
from tests.models import tiny
from tests.multipliers import in_session, in_trainer


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def papers(t: int, T: int, cut_frac: float, ratio: float) -> float:
    """η(t) / η_max as §3.2 prints it."""
    cut = math.floor(T * cut_frac)
    p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / cut_frac - 1))
    return (1 + p * (ratio - 1)) / ratio


@pytest.mark.parametrize(("steps", "cut_frac", "ratio"), [(100, 0.1, 32.0), (40, 0.25, 8.0), (2000, 0.1, 32.0)])
def test_the_closed_form_of_the_paper(steps: int, cut_frac: float, ratio: float) -> None:
    found = [slanted_triangle(t, steps, cut_frac=cut_frac, ratio=ratio) for t in range(steps + 1)]
    assert found == pytest.approx([papers(t, steps, cut_frac, ratio) for t in range(steps + 1)], rel=1e-9)
    assert found[0] == 1 / ratio
    assert found[round(steps * cut_frac)] == max(found) == 1.0
    assert found[-1] == pytest.approx(1 / ratio)


@pytest.mark.parametrize("steps", range(1, 60))
def test_a_run_of_any_length_stays_between_the_two_rates(steps: int) -> None:
    """Where T · cut_frac is not whole, the paper's own denominator takes the rate below zero."""
    found = [slanted_triangle(t, steps, cut_frac=0.1, ratio=32.0) for t in range(steps)]
    assert all(1 / 32 <= rate <= 1 for rate in found)
    assert found[steps // 10] == 1.0
    assert found == sorted(found[: steps // 10]) + sorted(found[steps // 10 :], reverse=True)


def test_ratio_one_is_a_constant_rate() -> None:
    assert {slanted_triangle(t, 50, cut_frac=0.1, ratio=1.0) for t in range(50)} == {1.0}


def test_every_depth_has_that_rate_under_trainer_and_session_with_accumulation(tmp_path: Any) -> None:
    """The Trainer's own scheduler would be linear by default; underneath this one it is constant."""
    wanted = [slanted_triangle(t, 6, cut_frac=0.34, ratio=4.0) for t in range(6)]
    assert wanted == [0.25, 0.625, 1.0, 0.8125, 0.625, 0.4375]
    settings = {"full": {}, "slanted_triangular": {"cut_frac": 0.34, "ratio": 4.0}}
    for rates in (
        in_trainer(get_model(tiny("bert"), settings), tmp_path, steps=6),
        in_session(get_model(tiny("bert"), settings), steps=6),
    ):
        assert rates == [pytest.approx(dict.fromkeys(range(5), rate), rel=1e-2) for rate in wanted]


@pytest.mark.parametrize("arguments", [{"lr_scheduler_type": "cosine"}, {"warmup_steps": 2}])
def test_another_schedule_underneath_is_refused(arguments: dict[str, Any], tmp_path: Any) -> None:
    with pytest.raises(MethodError, match="slanted_triangular"):
        in_trainer(get_model(tiny("bert"), ["full", "slanted_triangular"]), tmp_path, steps=4, **arguments)


def test_all_three_parts_of_ulmfit_together() -> None:
    method = {
        "full": {},
        "gradual_unfreeze": {"every": 2},
        "discriminative_lr": {"factor": 2.0},
        "slanted_triangular": {"cut_frac": 0.2},
    }
    loop = BareLoop(
        get_model(tiny("bert"), method), steps=10, optimizer=torch.optim.SGD, lr=1.0, weight_decay=0.0
    ).run()
    for step, rates in enumerate(loop.rates):
        height = slanted_triangle(step, 10, cut_frac=0.2, ratio=32.0)
        assert rates == pytest.approx({d: height / 2 ** (4 - d) for d in range(4, 3 - step // 2, -1)}, rel=2e-2)


def test_resumed_after_any_step_the_end_is_bit_identical() -> None:
    check_resume(lambda: get_model(tiny("bert"), ["lora", "slanted_triangular"]), steps=6)


@pytest.mark.parametrize(
    "settings",
    [{"cut_frac": 1.0}, {"cut_frac": -0.1}, {"cut_frac": float("nan")}, {"ratio": 0.5}, {"ratio": float("inf")}],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=f"{name}="):
        SlantedTriangular(**settings)
    with pytest.raises(MethodError, match=rf"slanted_triangular.*{name}"):
        get_model(tiny("bert"), {"lora": {}, "slanted_triangular": settings})
