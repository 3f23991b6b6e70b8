"""What plugins say of an update: whether it is made, of which gradients, and what it may not move."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback, default_data_collator

from peft_plus import MethodError, Plugin, PluginError, Session, TrainingError, get_model

from .bad_inputs import built, rows, same, spoilt, trainer, weights
from .models import tiny

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")


# ---- edit_gradient and moves ---------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Halved(Plugin):
    """Half of each gradient in the blocks."""

    name: ClassVar[str] = "halved"

    def edit_gradient(self, run, param, gradient):
        return gradient / 2 if 1 <= param.depth <= run.num_blocks else gradient


@dataclass(kw_only=True)
class Even(Plugin):
    """Only elements with an even index move, in even steps of a whole tensor none."""

    name: ClassVar[str] = "even"

    wrong: str = ""

    def edit_gradient(self, run, param, gradient):
        return 0.0 if self.wrong == "edit_gradient" else gradient

    def moves(self, run, param):
        if self.wrong == "moves":
            return torch.ones(3)
        if run.step % 2:
            return None
        return (torch.arange(torch.Size(param.shape).numel()) % 2 == 0).view(param.shape)


class Updates(TrainerCallback):
    """The weights around each update."""

    def __init__(self) -> None:
        self.pairs: list[list[dict[str, Tensor]]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.pairs.append([weights(model)])

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.pairs[-1].append(weights(model))


def test_half_a_gradient_under_sgd_is_half_a_step(tmp_path: Path) -> None:
    moved = []
    for method in ("full", ["full", Halved()]):
        updates = Updates()
        trainer(built(method), tmp_path, max_steps=1, max_grad_norm=0.0, callbacks=[updates]).train()
        before, after = updates.pairs[0]
        moved.append({name: after[name] - before[name] for name in before})
    params = built("full").peft_plus.params
    for name, param in params.items():
        factor = 0.5 if 1 <= param.depth <= 3 else 1.0
        assert torch.allclose(moved[1][name], factor * moved[0][name], atol=1e-7), name


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_what_may_not_move_rests_bit_for_bit_whatever_decay_and_momentum(tuner: str, tmp_path: Path) -> None:
    updates = Updates()
    model = built([tuner, Even()])
    run = trainer(model, tmp_path, optim="adamw_torch", weight_decay=0.1, learning_rate=1e-2, callbacks=[updates])
    run.train()
    for step, (before, after) in enumerate(updates.pairs):
        for name in model.peft_plus.params:
            odd = torch.arange(before[name].numel()) % 2 == 1
            rests = torch.equal(before[name].flatten()[odd], after[name].flatten()[odd])
            assert rests or step % 2, (step, name)
            if step == 1 and before[name].numel() > 1 and "lora_A" not in name:
                assert not rests, name


@pytest.mark.parametrize("wrong", ["edit_gradient", "moves"])
def test_a_wrong_answer_is_told(wrong: str, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=f"{wrong} returned .*; expected a tensor of shape"):
        trainer(built(["full", Even(wrong=wrong)]), tmp_path).train()


# ---- accept_update -------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Guard(Plugin):
    """Refuses what is not finite, and the steps that it is told to."""

    name: ClassVar[str] = "guard"

    refuses: tuple[int, ...] = ()
    answer: str = ""
    seen: list[float] = field(init=False, default_factory=list)

    def accept_update(self, run, loss, norm):
        self.seen.append(loss)
        if self.answer:
            return self.answer
        return run.step not in self.refuses and bool(torch.tensor([loss, norm]).isfinite().all())


def test_a_refused_update_is_as_if_its_step_had_not_been(tmp_path: Path) -> None:
    """With plain AdamW at a constant rate the run ends as the one over the other rows."""
    settings: dict[str, Any] = {
        "optim": "adamw_torch",
        "weight_decay": 0.1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
    }
    guarded = built(["full", Guard(refuses=(2,))])
    trainer(guarded, tmp_path, **settings).train()
    plain = built("full")
    trainer(plain, tmp_path, rows()[:8] + rows()[12:], max_steps=5, **settings).train()
    assert same(guarded, weights(plain))


def test_a_nan_ends_the_run_unless_a_plugin_refuses_its_update(tmp_path: Path) -> None:
    model = built("full", "vit")
    images = spoilt(5, "pixel_values", float("nan"), "vit")
    with pytest.raises(TrainingError, match=r"NaN|nan"):
        trainer(model, tmp_path, images).train()
    guarded = built(["full", Guard()], "vit")
    trainer(guarded, tmp_path, images).train()
    assert all(tensor.isfinite().all() for tensor in guarded.parameters())
    assert sum(not torch.tensor(loss).isfinite() for loss in guarded.peft_plus.plugins[0].seen) == 1


@pytest.mark.parametrize("accumulation", [1, 2])
def test_it_is_told_the_mean_loss_of_the_step(accumulation: int, tmp_path: Path) -> None:
    model = built(["full", Guard()])
    settings: dict[str, Any] = {"max_steps": 3, "gradient_accumulation_steps": accumulation}
    run = trainer(model, tmp_path, per_device_train_batch_size=4 // accumulation, **settings)
    run.train()
    logged = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert model.peft_plus.plugins[0].seen == pytest.approx(logged, abs=1e-4)


def test_a_session_leaves_a_refused_update_out_too() -> None:
    ends = []
    for plugin, data in ((Guard(refuses=(2,)), rows()), (Guard(), rows()[:8] + rows()[12:])):
        model = built(["full", plugin])
        session = Session(model, Accelerator(cpu=True), max_steps=len(data) // 4)
        optimizer = session.optimizer(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
        loader = session.loader(data, 4, shuffle=False, collate_fn=default_data_collator)
        for batch in session.batches(loader):
            session.accelerator.backward(session.loss(batch))
            optimizer.step()
            optimizer.zero_grad()
        ends.append(weights(model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_wrong_verdict_is_told(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="accept_update returned 'yes' at step 0; expected a bool"):
        trainer(built(["full", Guard(answer="yes")]), tmp_path).train()


def test_beside_a_gradient_scaler_a_guard_is_refused_before_training() -> None:
    from peft_plus.distributed import check_accelerator

    class Half:
        num_processes, ddp_handler, mixed_precision, state = 1, None, "fp16", object()

    model = get_model(tiny("bert"), ["full", Guard()])
    with pytest.raises(MethodError, match="in fp16 the gradient scaler leaves updates out itself"):
        check_accelerator(model.peft_plus, model, Half())
