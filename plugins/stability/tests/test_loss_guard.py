"""What is refused, against runs that never saw it; what comes back, against plain torch; what ends, with its report."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainerCallback, default_data_collator

from peft_plus import MethodError, Run, Session, get_model
from peft_plus_stability.loss_guard import LossGuard, fault, spike_limit
from tests.bad_inputs import built, rows, same, trainer, weights
from tests.models import tiny

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")

ADAMW: dict[str, Any] = {
    "optim": "adamw_torch",
    "weight_decay": 0.1,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
}
SIZE = 4
"""Rows of a batch."""


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def guard_of(model: Any) -> LossGuard:
    return model.peft_plus.plugins[0]


def pictures(*broken: int, value: float = float("nan"), batches: int = 6) -> list[dict[str, Tensor]]:
    """Rows for a ViT of which the first one of each of these batches has one bad pixel."""
    data = rows("vit", count=SIZE * batches)
    for batch in broken:
        pixels = data[SIZE * batch]["pixel_values"].clone()
        pixels.view(-1)[7] = value
        data[SIZE * batch]["pixel_values"] = pixels
    return data


def without(data: Sequence[Any], *batches: int) -> list[Any]:
    return [row for i, row in enumerate(data) if i // SIZE not in batches]


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_the_limit_is_the_mean_and_six_standard_deviations() -> None:
    losses = np.random.default_rng(0).gamma(2.0, size=50).tolist()
    limit = np.mean(losses) + 6 * np.std(losses, ddof=1)
    assert spike_limit(losses, sigmas=6) == pytest.approx(limit, rel=1e-12)
    assert fault(limit * 0.999, 1.0, losses, sigmas=6, least=50) == ""
    assert "limit" in fault(limit * 1.001, 1.0, losses, sigmas=6, least=50)
    assert fault(1e9, 1.0, losses, sigmas=6, least=51) == ""  # too few are known
    assert fault(1e9, 1.0, losses, sigmas=None, least=2) == ""


def test_a_smooth_run_does_not_take_rounding_for_a_spike() -> None:
    assert spike_limit([2.0] * 8, sigmas=6) == pytest.approx(2.12)
    assert spike_limit([-2.0] * 8, sigmas=6) == pytest.approx(-1.88)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf"), 1.0])
def test_what_is_not_finite_is_refused_from_the_first_step_on(loss: float) -> None:
    norm = float("inf") if loss == 1.0 else 1.0
    assert fault(loss, norm, [], sigmas=None, least=2)


def judged(plugin: LossGuard, losses: Sequence[float]) -> list[bool]:
    run = Run(model=nn.Identity(), task=None, num_blocks=0)  # type: ignore[arg-type]
    return [plugin.accept_update(run, loss, 1.0) for loss in losses]


def test_a_hard_example_is_refused_once_and_not_for_ever() -> None:
    """Else a run that has learned nearly all would never learn the rest."""
    easy = [0.010, 0.012, 0.008, 0.011, 0.009, 0.010]
    plugin = LossGuard(window=8)
    assert judged(plugin, [*easy, 1.0, 0.01, 1.0]) == [True] * 6 + [False, True, True]
    assert statistics.median(plugin.losses) < 0.02


def test_a_jump_that_stays_is_refused_until_patience_ends_whatever_the_window() -> None:
    plugin = LossGuard(window=4, patience=9)
    assert judged(plugin, [1.0, 1.1, 0.9, 1.0, *[30.0] * 9]) == [True] * 4 + [False] * 9
    assert max(plugin.losses) == 1.1


def test_the_window_holds_the_last_losses() -> None:
    plugin = LossGuard(window=4, sigmas=None)
    judged(plugin, [float(i) for i in range(9)])
    assert plugin.losses == [5.0, 6.0, 7.0, 8.0]


# ---- runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_an_ordinary_run_is_the_plain_one_bit_for_bit(tuner: str, tmp_path: Path) -> None:
    ends, logs = [], []
    for method in ({tuner: {}}, {tuner: {}, "loss_guard": {"window": 4, "keep_every": 2}}):
        torch.manual_seed(0)
        model = get_model(tiny("bert", hidden_dropout_prob=0.1), method)
        run = trainer(model, tmp_path, optim="adamw_torch", weight_decay=0.1, learning_rate=1e-3)
        run.train()
        ends.append(model)
        logs.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert guard_of(ends[1]).refused == 0
    assert same(ends[1], weights(ends[0]))
    assert logs[0] == logs[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_broken_picture_is_as_if_its_batch_had_not_been(value: float, tmp_path: Path) -> None:
    data = pictures(2, value=value)
    guarded, plain = built(["full", LossGuard()], "vit"), built("full", "vit")
    run = trainer(guarded, tmp_path, data, **ADAMW)
    run.train()
    trainer(plain, tmp_path, without(data, 2), max_steps=5, **ADAMW).train()
    assert same(guarded, weights(plain))
    logged = [entry["loss_guard_refused"] for entry in run.state.log_history if "loss_guard_refused" in entry]
    assert logged == [1, 1, 1, 1]  # from the third step on


def test_a_gradient_that_overflows_under_a_finite_loss_is_refused(tmp_path: Path) -> None:
    guarded, plain = built(["full", LossGuard()]), built("full")
    backwards = 0

    def broken(gradient: Tensor) -> Tensor:
        nonlocal backwards
        backwards += 1
        return gradient * float("inf") if backwards == 3 else gradient

    guarded.classifier.weight.register_hook(broken)
    trainer(guarded, tmp_path, **ADAMW).train()
    trainer(plain, tmp_path, without(rows(), 2), max_steps=5, **ADAMW).train()
    assert guard_of(guarded).refused == 1
    assert "norm" in guard_of(guarded).report[0]
    assert same(guarded, weights(plain))


def numbers(*batches: int, value: float = 1e3, count: int = 6) -> list[dict[str, Tensor]]:
    """Rows with a number to predict; the first one of each of these batches has another one."""
    data = rows(count=SIZE * count)
    for i, row in enumerate(data):
        row["labels"] = torch.tensor(value if i in [SIZE * batch for batch in batches] else float(row["labels"]))
    return data


def regressor(method: Any) -> Any:
    torch.manual_seed(0)
    return get_model(tiny("bert", problem_type="regression", num_labels=1), method)


def test_a_spike_is_refused_and_a_plain_guard_without_sigmas_lets_it_through(tmp_path: Path) -> None:
    ends = {}
    for name, sigmas in (("guarded", 6.0), ("open", None)):
        model = regressor(["full", LossGuard(window=4, sigmas=sigmas)])
        trainer(model, tmp_path, numbers(3), **ADAMW).train()
        ends[name] = model
    plain = regressor("full")
    trainer(plain, tmp_path, without(numbers(3), 3), max_steps=5, **ADAMW).train()
    assert (guard_of(ends["guarded"]).refused, guard_of(ends["open"]).refused) == (1, 0)
    assert same(ends["guarded"], weights(plain))
    assert not same(ends["open"], weights(plain))


# ---- going back ----------------------------------------------------------------------------------------------------


RETURNS = LossGuard(patience=2, keep_every=2, backoff=0.25)
BROKEN = (5, 6)
"""With copies after 2 and 4 steps, the run goes back to 2 when these batches are over, and on with the eighth."""


def by_hand(data: Sequence[Any], batches: Sequence[tuple[int, float]]) -> dict[str, Tensor]:
    """A plain loop over these batches, each at its rate; the weights at its end."""
    model = tiny("vit").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for batch, rate in batches:
        optimizer.param_groups[0]["lr"] = rate
        model(**default_data_collator(list(data[SIZE * batch : SIZE * (batch + 1)]))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def in_session(model: Any, data: Sequence[Any], steps: int) -> Session:
    session = Session(model, Accelerator(cpu=True), max_steps=steps)
    optimizer = session.optimizer(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    loader = session.loader(list(data), SIZE, shuffle=False, collate_fn=default_data_collator)
    for batch in session.batches(loader):
        session.accelerator.backward(session.loss(batch))
        optimizer.step()
        optimizer.zero_grad()
    return session


@pytest.mark.parametrize("loop", ["trainer", "session"])
def test_weights_and_moments_come_back_and_the_rate_is_lower(loop: str, tmp_path: Path) -> None:
    """The newest copy may be what led there, so it is the one before. One group, so decay is on all weights."""
    data = pictures(*BROKEN, batches=10)
    model = built(["full", RETURNS], "vit")
    if loop == "trainer":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        given: dict[str, Any] = {**ADAMW, "max_steps": 10, "optimizers": (optimizer, None)}
        trainer(model, tmp_path, data, **given).train()
    else:
        in_session(model, data, 10)
    wanted = by_hand(data, [(0, 1e-2), (1, 1e-2), (7, 2.5e-3), (8, 2.5e-3), (9, 2.5e-3)])
    found = weights(model)
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-4, atol=1e-6) for name in wanted)
    assert guard_of(model).backoffs == 1
    assert guard_of(model).report == [
        "step 5: the loss is nan",
        "step 6: the loss is nan",
        "after step 7: back to the state after 2 steps, learning rate × 0.25",
    ]


class Weights(TrainerCallback):
    """Those after each update."""

    def __init__(self) -> None:
        self.after: list[dict[str, Tensor]] = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.after.append(weights(model))


@pytest.mark.parametrize("loop", ["trainer", "session"])
def test_data_that_stay_broken_end_the_run_in_the_last_good_state_with_a_report(
    loop: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = pictures(*range(5, 30), batches=30)
    model = built(["full", LossGuard(patience=2, keep_every=2, max_backoffs=2)], "vit")
    with caplog.at_level(logging.WARNING):
        if loop == "trainer":
            run = trainer(model, tmp_path, data, max_steps=30, **ADAMW)
            run.train()
            steps = run.state.global_step
        else:
            steps = in_session(model, data, 30).step
    assert steps == 5 + 3 * 2  # each return takes two refusals, and so does the end
    plain = built("full", "vit")
    if loop == "trainer":
        trainer(plain, tmp_path, data, max_steps=2, **ADAMW).train()
    else:
        in_session(plain, data, 2)
    assert same(model, weights(plain))
    ended = next(record.getMessage() for record in caplog.records if "ends the training" in record.getMessage())
    assert "2 updates in a row were refused, after 2 returns of at most 2; 6 in all" in ended
    assert "The weights are those after 2 finished steps" in ended
    assert "step 5: the loss is nan; step 6: the loss is nan; after step 7: back to the state after 2 steps" in ended


def test_broken_from_the_first_step_on_it_ends_with_the_weights_it_came_with(tmp_path: Path) -> None:
    model = built(["full", LossGuard(patience=1, max_backoffs=1)], "vit")
    before = weights(model)
    run = trainer(model, tmp_path, pictures(*range(6)), **ADAMW)
    run.train()
    assert run.state.global_step == 2
    assert same(model, before)


def test_without_returns_nothing_is_copied_and_it_ends_where_the_trouble_began(tmp_path: Path) -> None:
    seen = Weights()
    model = built(["full", LossGuard(patience=2, keep_every=1, max_backoffs=0)], "vit")
    run = trainer(model, tmp_path, pictures(3, 4, 5), save_strategy="steps", save_steps=1, callbacks=[seen], **ADAMW)
    run.train()
    assert run.state.global_step == 5
    assert same(model, seen.after[2])
    assert not any("kept" in path.name for path in tmp_path.rglob("*"))
    assert not guard_of(model).copies


def test_a_return_to_the_same_rate_still_keeps_its_count(tmp_path: Path) -> None:
    model = built(["full", LossGuard(patience=1, backoff=1.0, max_backoffs=1)], "vit")
    run = trainer(model, tmp_path, pictures(1, 3), **ADAMW)
    run.train()
    assert run.state.global_step == 4
    assert guard_of(model).backoffs == 1


# ---- resume --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_resumed_after_any_step_it_ends_as_the_uninterrupted_run(tuner: str, tmp_path: Path) -> None:
    def made(**given: Any) -> Any:
        data = numbers(1, *BROKEN, value=1e30, count=10)  # its square overflows
        return trainer(regressor([tuner, RETURNS]), tmp_path, data, max_steps=10, **{**ADAMW, **given})

    whole = made(save_strategy="steps", save_steps=1)
    whole.train()
    assert guard_of(whole.model).backoffs == 1
    end, state = weights(whole.model), guard_of(whole.model).state_dict()
    for step in (1, 2, 4, 6, 7, 9):
        again = made()
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert same(again.model, end), step
        assert guard_of(again.model).state_dict() == state, step


def test_a_second_run_begins_anew(tmp_path: Path) -> None:
    model = built(["full", LossGuard(patience=1, max_backoffs=1)], "vit")
    trainer(model, tmp_path, pictures(0), **ADAMW).train()
    assert guard_of(model).backoffs == 1
    trainer(model, tmp_path, pictures(), **ADAMW).train()
    assert (guard_of(model).backoffs, guard_of(model).refused, guard_of(model).report) == (0, 0, [])


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"sigmas": 0.0},
        {"sigmas": float("nan")},
        {"sigmas": float("inf")},
        {"window": 3},
        {"patience": 0},
        {"keep_every": 0},
        {"backoff": 0.0},
        {"backoff": 1.5},
        {"max_backoffs": -1},
        {"patience": 1.5},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match=f"loss_guard.*{next(iter(settings))}"):
        get_model(tiny("bert"), {"lora": {}, "loss_guard": settings})


def test_where_no_copy_can_be_made_it_says_how_to_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("FSDP keeps the optimizer's state in pieces.")

    monkeypatch.setattr(Run, "keep", refuse)
    run = Run(model=nn.Identity(), task=None, num_blocks=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"in pieces\. Or set max_backoffs=0, for which nothing is copied"):
        LossGuard().on_stage_begin(run)
    LossGuard(max_backoffs=0).on_stage_begin(run)
