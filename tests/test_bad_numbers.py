"""NaN and infinity: the run stops before the update that would ruin the weights, and says which rows or term did it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback, default_data_collator

import peft_plus
from peft_plus import DivergenceError, EngagementError, LossTerm, Plugin, PluginError, Session, TrainingError
from peft_plus.divergence import SKIPPED_IN_A_ROW, finite, gradient_norm

from .bad_inputs import Watched, after, built, free, holds, refused, rows, same, stopped, trainer, weights

INF, NAN = float("inf"), float("nan")


class Term(Plugin):
    """Adds a harmless term, but for one step."""

    name = "term"

    def __init__(self, value: float = NAN, step: int = 2) -> None:
        self.value, self.step = value, step

    def loss_terms(self, run, batch, output):
        factor = self.value if run.step == self.step else 1e-3
        return {"extra": LossTerm(output.logits.float().square().sum() * factor, 1, per="step")}


def pictures(row: int = -1, value: float = NAN) -> list[dict[str, Tensor]]:
    made = rows("vit")
    if row >= 0:
        made[row]["pixel_values"] = made[row]["pixel_values"].clone()
        made[row]["pixel_values"][1, 2, 3] = value
    return made


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_bad_input_stops_the_run_and_is_named(value: float, tmp_path: Path) -> None:
    """Row 13 is the second of the fourth batch: three steps are done."""
    model = built({"lora": {"target_modules": ["q_proj"]}}, "vit")
    expected = after(3, built({"lora": {"target_modules": ["q_proj"]}}, "vit"), tmp_path, pictures())
    run = trainer(model, tmp_path, pictures(13, value))
    refused(
        run.train,
        DivergenceError,
        "The loss of step 3 is nan",
        "The task's loss is nan in the batch, rows 1 to 4 of the step",
        re.escape("(dataset[i], i = 12, 13, 14, 15)"),
        "'pixel_values' holds NaN or infinite values at position 1",
        "the weights are those after 3 finished steps, learning rate 0.05",
        "Mend or drop these rows",
        "stopped",
    )
    assert same(model, expected)
    assert holds(stopped(tmp_path), expected)
    assert free(model)
    assert all(tensor.grad is None for tensor in model.parameters())


def test_at_step_0_nothing_is_saved_because_nothing_changed(tmp_path: Path) -> None:
    model = built({"lora": {"target_modules": ["q_proj"]}}, "vit")
    before = weights(model)
    refused(trainer(model, tmp_path, pictures(0)).train, DivergenceError, "The loss of step 0 is nan", "i = 0, 1, 2, 3")
    assert same(model, before)
    assert not (tmp_path / "stopped").exists()


def test_the_micro_batch_of_a_step_is_named(tmp_path: Path) -> None:
    model = built({"lora": {"target_modules": ["q_proj"]}}, "vit")
    run = trainer(model, tmp_path, pictures(13), gradient_accumulation_steps=2, per_device_train_batch_size=2)
    refused(
        run.train,
        DivergenceError,
        "The loss of step 3 is nan",
        "micro-batch 1 of 2, rows 1 to 2 of the step .dataset.i., i = 12, 13",
        "after 3 finished steps",
    )


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_plugins_term_is_named(method: str, value: float, tmp_path: Path) -> None:
    model = built([method, Term(value)])
    expected = after(2, built([method, Term(value)]), tmp_path)
    refused(
        trainer(model, tmp_path).train,
        DivergenceError,
        f"The loss of step 2 is {value}",
        f"The loss term 'extra' of plugin 'term' .{re.escape(Term.__module__)}. is {value}",
        "Weaken plugin 'term'",
    )
    assert same(model, expected)


class Gradient(TrainerCallback):
    """Puts a value into one gradient, whose loss was fine."""

    def __init__(self, model: Any, value: float, step: int = 2) -> None:
        self.step, self.value, self.now = step, value, 0
        tensor = next(t for n, t in model.named_parameters() if t.requires_grad and "lora_B" in n)
        tensor.register_hook(self._spoil)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.now = state.global_step

    def _spoil(self, gradient: Tensor) -> Tensor:
        return torch.full_like(gradient, self.value) if self.now == self.step else gradient


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_gradient_without_a_bad_loss(value: float, max_grad_norm: float, tmp_path: Path) -> None:
    model = built()
    expected = after(2, built(), tmp_path, max_grad_norm=max_grad_norm)
    run = trainer(model, tmp_path, callbacks=[Gradient(model, value)], max_grad_norm=max_grad_norm)
    refused(
        run.train,
        DivergenceError,
        f"The gradient of step 2 has the norm {value}. Its loss is finite",
        "learning rate 0.0666",
        "Lower the learning rate",
    )
    assert same(model, expected)
    assert holds(stopped(tmp_path), expected)


def test_stock_transformers_ruins_the_weights_and_logs_a_zero(tmp_path: Path) -> None:
    """Why all this: the same run without us ends without a word, with NaN in every weight that trained."""
    import transformers

    model = built({"lora": {"target_modules": ["q_proj"]}}, "vit")
    del model.peft_plus
    run = trainer(model, tmp_path, pictures(13), kind=transformers.Trainer)
    result = run.train()
    assert math.isfinite(result.training_loss)
    assert all(math.isfinite(entry["loss"]) for entry in run.state.log_history if "loss" in entry)
    assert any(not finite(tensor) for tensor in model.parameters())


def test_a_loss_that_is_nan_without_harm_is_logged_as_it_is(tmp_path: Path) -> None:
    """transformers would log the mean of the losses before it, or 0."""

    def harmless(output: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        return output.logits.sum() * 1e-3 + NAN

    run = trainer(built(), tmp_path, compute_loss_func=harmless, max_steps=2)
    run.train()
    assert all(entry["loss"] != entry["loss"] for entry in run.state.log_history if "loss" in entry)
    assert run.args.logging_nan_inf_filter


# ---- half precision ----------------------------------------------------------------------------------------------


def _with_scaler(run: Any, overflows: range) -> Any:
    """A gradient scaler as fp16 on a GPU has it, on the CPU; some steps overflow."""
    model, run.accelerator.scaler = run.model, torch.amp.GradScaler("cpu", init_scale=2.0**16)

    class Overflow(Gradient):
        def _spoil(self, gradient: Tensor) -> Tensor:
            return torch.full_like(gradient, INF) if self.now in overflows else gradient

    run.add_callback(Overflow(model, INF))
    return run


def test_an_overflow_that_the_scaler_skips_is_no_error(tmp_path: Path) -> None:
    model = built()
    run = _with_scaler(trainer(model, tmp_path, max_grad_norm=0.0), range(1, 3))
    run.train()
    assert run.state.global_step == 6
    assert run.accelerator.scaler.get_scale() == 2.0**14
    assert all(finite(tensor) for tensor in model.parameters())


def test_a_run_whose_every_update_is_skipped_stops(tmp_path: Path) -> None:
    model = built()
    run = _with_scaler(trainer(model, tmp_path, max_steps=60, max_grad_norm=0.0), range(2, 60))
    message = refused(run.train, DivergenceError, f"last {SKIPPED_IN_A_ROW} updates", "all skipped", "bf16 or fp32")
    assert run.state.global_step == 2 + SKIPPED_IN_A_ROW - 1
    assert "stopped" in message
    assert same(model, after(2, built(), tmp_path, max_steps=60, max_grad_norm=0.0))


# ---- weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "full"])
def test_weights_that_are_nan_from_the_start(method: str, tmp_path: Path) -> None:
    model = built(method)
    watch = Watched(model)
    name, tensor = next((n, t) for n, t in model.named_parameters() if t.requires_grad)
    with torch.no_grad():
        tensor.view(-1)[3] = NAN
    refused(trainer(model, tmp_path).train, TrainingError, "1 parameters that train hold NaN", re.escape(name), "Load")
    assert watch.passes == 0
    assert free(model)


def test_frozen_weights_that_are_nan_are_the_cause_of_the_nan_loss(tmp_path: Path) -> None:
    model = built()
    name, tensor = next((n, t) for n, t in model.named_parameters() if n.endswith("layer.0.output.dense.weight"))
    with torch.no_grad():
        tensor.view(-1)[3] = NAN
    refused(
        trainer(model, tmp_path).train,
        DivergenceError,
        "The loss of step 0 is nan",
        f"1 tensors of the model hold NaN or infinite values already, e.g. '{re.escape(name)}'",
        "no update was made yet. Load or build the model anew.$",
    )
    assert not (tmp_path / "stopped").exists()


class Ruin(TrainerCallback):
    """What a broken optimizer does: the gradient was finite, the weight is not."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                next(t for t in model.parameters() if t.requires_grad).view(-1)[0] = NAN


def test_weights_that_an_update_ruined_are_found_at_the_next(tmp_path: Path) -> None:
    model = built()
    run = trainer(model, tmp_path, callbacks=[Ruin(3)], save_strategy="steps", save_steps=2)
    refused(
        run.train, DivergenceError, "The loss of step 3 is nan", "hold NaN or infinite values already", "a checkpoint"
    )
    assert not (tmp_path / "stopped").exists()
    assert all(bool(torch.isfinite(t).all()) for t in _adapter(tmp_path / "checkpoint-2"))


def test_weights_that_the_last_update_ruined_fail_the_proof(tmp_path: Path) -> None:
    model = built()
    refused(
        trainer(model, tmp_path, callbacks=[Ruin(6)]).train,
        EngagementError,
        "1 tensors became NaN or infinite, e.g. '.*lora_A",
        "an earlier checkpoint",
    )


def _adapter(folder: Path) -> list[Tensor]:
    from safetensors.torch import load_file

    return list(load_file(folder / "adapter_model.safetensors").values())


class Flip(Plugin):
    """Block 0 trains in the first two steps only, or in every other one."""

    name = "flip"

    def __init__(self, often: bool = False) -> None:
        self.often = often

    def may_train(self, run, param):
        return "layer.0." not in param.name or (run.step % 2 == 0 if self.often else run.step < 2)


class Nudge(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                next(t for n, t in model.named_parameters() if "layer.0.attention.self.query.lora_A" in n).add_(1e-3)


@pytest.mark.parametrize(("often", "step"), [(False, 4), (True, 2), (True, 6)])
def test_what_moves_after_it_was_frozen_again_is_caught(often: bool, step: int, tmp_path: Path) -> None:
    model = built(["lora", Flip(often)])
    run = trainer(model, tmp_path, callbacks=[Nudge(step)], max_steps=7)
    refused(run.train, EngagementError, "1 frozen tensors moved, e.g. '.*layer.0.attention.self.query.lora_A")


@pytest.mark.parametrize("often", [False, True])
def test_what_rests_after_it_trained_passes(often: bool, tmp_path: Path) -> None:
    for optim in ("sgd", "adamw_torch"):
        trainer(built(["lora", Flip(often)]), tmp_path, max_steps=7, optim=optim, weight_decay=0.1).train()


# ---- terms that do nothing ----------------------------------------------------------------------------------------


class Odd(Plugin):
    """Adds what it is given."""

    name = "odd"

    def __init__(self, make: Any) -> None:
        self.make = make

    def loss_terms(self, run, batch, output):
        return self.make(output.logits)


ODD: dict[str, tuple[Any, tuple[str, ...]]] = {
    "nothing": (lambda logits: None, ("loss_terms returned NoneType", "{} for none")),
    "a tensor": (lambda logits: logits.sum(), ("loss_terms returned Tensor", "mapping")),
    "a name that is no text": (lambda logits: {3: LossTerm(logits.sum(), 1)}, ("loss_terms returned dict",)),
    "a number": (lambda logits: {"x": 3.0}, ("the loss term 'x' is float", "LossTerm")),
    "a vector": (lambda logits: {"x": LossTerm(logits.sum(1), 4)}, ("the loss term 'x' is LossTerm with sum .4,.",)),
    "no gradient": (
        lambda logits: {"x": LossTerm(logits.detach().sum(), 1)},
        ("the loss term 'x' carries no gradient at step 0", "without detach"),
    ),
    "another device": (
        lambda logits: {"x": LossTerm(torch.zeros((), device="meta", requires_grad=True), 1)},
        ("the loss term 'x' is on meta, the task's loss on cpu",),
    ),
    "another unit": (lambda logits: {"x": LossTerm(logits.sum(), 1, per="token")}, ("per='token'", "'label'")),
}


@pytest.mark.parametrize("case", ODD)
def test_a_term_that_is(case: str, tmp_path: Path) -> None:
    make, says = ODD[case]
    model = built(["lora", Odd(make)])
    before = weights(model)
    refused(trainer(model, tmp_path).train, PluginError, rf"plugin 'odd' \({re.escape(__name__)}\)", *says)
    assert same(model, before)
    assert free(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_term_in_another_dtype_is_added(dtype: torch.dtype, tmp_path: Path) -> None:
    model = built(["lora", Odd(lambda logits: {"x": LossTerm(logits.to(dtype).square().sum(), 1)})])
    trainer(model, tmp_path, max_steps=2).train()
    assert next(t for n, t in model.named_parameters() if "lora_A" in n).dtype == torch.float32


class Later(Plugin):
    """Pulls at a tensor that is frozen for two steps."""

    name = "later"

    def may_train(self, run, param):
        return param.part == "head" or run.step >= 2

    def loss_terms(self, run, batch, output):
        pulled = next(t for n, t in run.model.named_parameters() if "layer.0.attention.self.query.lora_A" in n)
        return {"pull": LossTerm(pulled.square().sum(), 1, per="step")}


def test_a_term_without_a_gradient_yet_is_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(built(["lora", Later()]), tmp_path, max_steps=4).train()
    told = [r.getMessage() for r in caplog.records if "carries no gradient" in r.getMessage()]
    assert len(told) == 1
    assert "plugin 'later'" in told[0]
    assert "'pull' carries no gradient at step 0" in told[0]


# ---- a bare loop -------------------------------------------------------------------------------------------------


def loop(session: Session, data: Any, *, clip: bool = False) -> None:
    optimizer = session.optimizer(torch.optim.SGD, lr=0.1)
    for batch in session.batches(session.loader(data, 4, collate_fn=default_data_collator, shuffle=False)):
        with session.accelerator.accumulate(session.model):
            session.accelerator.backward(session.loss(batch))
            if clip and session.accelerator.sync_gradients:
                session.accelerator.clip_grad_norm_(session.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_session_stops_too(accumulation: int, clip: bool) -> None:
    def run(data: Any, steps: int) -> tuple[Any, Session]:
        model = built({"lora": {"target_modules": ["q_proj"]}}, "vit")
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        return model, Session(model, accelerator, max_steps=steps)

    done = 3 // accumulation
    good, bad = run(None, done), run(None, 6 // accumulation)
    loop(good[1], pictures(), clip=clip)
    refused(
        lambda: loop(bad[1], pictures(13), clip=clip),
        DivergenceError,
        f"The loss of step {done} is nan",
        "i = 12, 13, 14, 15",
        "'pixel_values' holds NaN or infinite values at position 1",
        f"after {done} finished steps",
    )
    assert same(bad[0], weights(good[0]))
    assert bad[1].step == done


def test_a_sessions_term_is_named() -> None:
    refused(
        lambda: loop(Session(built(["lora", Term()]), Accelerator(cpu=True), max_steps=6), rows()),
        DivergenceError,
        "The loss of step 2 is nan",
        "The loss term 'extra' of plugin 'term'",
    )
    refused(
        lambda: loop(Session(built(["lora", Odd(lambda x: None)]), Accelerator(cpu=True), max_steps=6), rows()),
        PluginError,
        "loss_terms returned NoneType",
    )


# ---- what it rests on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_sum_tells_what_looking_at_each_value_tells(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    for size in (1, 7, 1000):
        tensor = torch.randn(size, generator=draw).to(dtype)
        assert finite(tensor)
        for value in (NAN, INF, -INF):
            for place in (0, size // 2, size - 1):
                bad = tensor.clone()
                bad[place] = value
                assert not finite(bad), (size, value, place)
    big = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)
    assert finite(big)  # their sum overflows, they do not
    assert not finite(torch.tensor([INF, -INF], dtype=dtype))
    assert finite(torch.zeros(0, dtype=dtype))
    assert finite(torch.zeros(3, dtype=torch.uint8))


def test_the_norm_is_torchs_own() -> None:
    model = built("full")
    for tensor in model.parameters():
        tensor.grad = torch.ones_like(tensor)
    expected = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    assert gradient_norm(model.parameters()) == expected
    assert gradient_norm([]) == 0


def test_it_is_public() -> None:
    assert peft_plus.TrainingError is TrainingError
    assert issubclass(TrainingError, RuntimeError)
    assert issubclass(DivergenceError, TrainingError)
