"""A bare loop with a Session equals the loop without, the Trainer, one big batch, and itself uninterrupted."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

import peft_plus
from peft_plus import CheckpointError, EngagementError, MethodError, Plugin, Run, Session, get_model
from peft_plus.errors import DataError

from .models import batch, tiny
from .scale import distance
from .training import quiet

Rows = list[dict[str, Tensor]]


pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")


def rows_of(name: str = "bert", task: str = "SEQ_CLS", number: int = 22) -> Rows:
    """Examples with different numbers of labels, so that means of means would differ."""
    data = batch(name, task, rows=number)
    if task in ("TOKEN_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM"):
        kept = 2 + torch.arange(number) * 5 % 6
        data["labels"] = data["labels"].masked_fill(torch.arange(data["labels"].shape[1]) >= kept[:, None], -100)
    return [{key: value[i] for key, value in data.items()} for i in range(number)]


def collate(rows: Rows) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def accelerator(accumulation: int = 1) -> Accelerator:
    return Accelerator(cpu=True, gradient_accumulation_steps=accumulation)


def built(method: Any = "lora", name: str = "bert", task: str = "SEQ_CLS", **overrides: Any) -> Any:
    torch.manual_seed(0)
    return get_model(tiny(name, task, **overrides), method=method, task=task)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@dataclass
class Loop:
    """A user's loop: everything that a test may want to change about it."""

    method: Any = "lora"
    rows: Rows = field(default_factory=rows_of)
    accumulation: int = 1
    epochs: float = 2
    batch_size: int = 4
    save_at: tuple[int, ...] = ()
    stop_at: int | None = None
    folder: Path = Path()
    resume: bool = False
    workers: int = 0
    scheduler: str | None = "linear"
    optimizer: Any = torch.optim.AdamW
    settings: dict[str, Any] = field(default_factory=dict)
    collate: Callable[[Rows], Any] = collate
    overrides: dict[str, Any] = field(default_factory=lambda: {"hidden_dropout_prob": 0.1})
    shuffle: bool = True

    def run(self, model: nn.Module | None = None) -> Any:
        model = built(self.method, **self.overrides) if model is None else model
        engine = accelerator(self.accumulation)
        session = Session(model, engine, epochs=self.epochs)
        optimizer = session.optimizer(self.optimizer, **{"lr": 1e-2, **self.settings})
        loader = session.loader(
            self.rows, self.batch_size, collate_fn=self.collate, num_workers=self.workers, shuffle=self.shuffle
        )
        schedule = session.scheduler(self.scheduler, num_warmup_steps=2) if self.scheduler else None
        if self.resume:
            assert session.resume(self.folder)
        else:
            torch.manual_seed(1)
        for data in session.batches(loader):
            with engine.accumulate(session.model):
                engine.backward(session.loss(data))
                optimizer.step()
                if schedule:
                    schedule.step()
                optimizer.zero_grad()
            if engine.sync_gradients and session.step in self.save_at:
                session.save(self.folder)
            if engine.sync_gradients and session.step == self.stop_at:
                break
        return model


# ---- the loop --------------------------------------------------------------------------------------------------------


def test_without_plugins_it_is_the_plain_loop_bit_for_bit() -> None:
    """The plain loop: Accelerate and PEFT alone, over batches in the same order."""
    rows, seen = rows_of(), []

    def noting(part: Rows) -> dict[str, Tensor]:
        seen.append(collate(part))
        return seen[-1]

    ours = Loop(rows=rows, collate=noting).run()

    torch.manual_seed(0)
    base = tiny("bert", hidden_dropout_prob=0.1)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS"))
    engine = accelerator()
    plain = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = get_linear_schedule_with_warmup(plain, 2, len(seen))
    model, optimizer = engine.prepare(model, plain)
    torch.manual_seed(1)
    model.train()
    for data in seen:
        engine.backward(model(**data).loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert len(seen) == 12
    assert equal(trained(ours), trained(model))


@pytest.mark.parametrize(
    ("name", "task"), [("bert", "SEQ_CLS"), ("bert", "TOKEN_CLS"), ("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")]
)
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_steps_gradient_is_that_of_one_big_batch(name: str, task: str, accumulation: int) -> None:
    """Also in the last step of an epoch, which has fewer and smaller micro-batches."""
    rows = rows_of(name, task, 4 * 2 + 3)
    model = built("lora", name, task)
    engine = accelerator(accumulation)
    session = Session(model, engine, epochs=1)
    optimizer = session.optimizer(torch.optim.SGD, lr=1e-3)
    twin = copy.deepcopy(model)
    loader = session.loader(rows, 2, collate_fn=collate)
    step: list[dict[str, Tensor]] = []
    steps = 0
    for data in session.batches(loader):
        step.append(data)
        with engine.accumulate(session.model):
            engine.backward(session.loss(data))
            if engine.sync_gradients:
                whole = collate([row for part in step for row in unstacked(part)])
                twin.load_state_dict(model.state_dict())
                twin.train()
                twin.zero_grad()
                big_batch_loss(twin, whole, task).backward()
                assert distance(gradients(model), gradients(twin)) < 1e-6
                step.clear()
                steps += 1
            optimizer.step()
            optimizer.zero_grad()
    assert steps == session.step == -(-len(rows) // (2 * accumulation))


def unstacked(data: dict[str, Tensor]) -> Rows:
    return [{key: value[i] for key, value in data.items()} for i in range(len(next(iter(data.values()))))]


def big_batch_loss(model: nn.Module, data: dict[str, Tensor], task: str) -> Tensor:
    """The mean over all labels, in plain torch."""
    logits, labels = model(**data).logits, data["labels"]
    if task == "CAUSAL_LM":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100)


def test_it_trains_as_the_trainer_does(tmp_path: Path) -> None:
    """Same plan, same order of data, no dropout: only the loop differs."""
    method = {"lora": {}, "gradual_unfreeze": {"every": 2}, "llrd": {"decay": 0.5}, "r3f": {"eps": 0.1}}
    rows = rows_of()
    loop = Loop(method, rows, accumulation=2, overrides={}, scheduler=None, shuffle=False, settings={"weight_decay": 0})
    ours = loop.run()

    other = built(method)
    arguments = quiet(
        tmp_path,
        num_train_epochs=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        optim="adamw_torch",
        train_sampling_strategy="sequential",
    )
    trainer = peft_plus.Trainer(other, arguments, train_dataset=rows, data_collator=collate)
    trainer.train()
    assert equal(trained(ours), trained(other))
    assert ours.peft_plus.timeline == other.peft_plus.timeline
    assert ours.peft_plus.engagement == other.peft_plus.engagement


def test_frozen_layers_stay_and_thawed_ones_move() -> None:
    model = built({"lora": {}, "gradual_unfreeze": {"every": 3}})
    start = trained(model)
    Loop(epochs=1, stop_at=3).run(model)
    low = [n for n in start if "layer.0" in n and "lora_" in n]
    assert low
    assert all(torch.equal(start[n], trained(model)[n]) for n in low)
    assert any(not torch.equal(start[n], trained(model)[n]) for n in start if "classifier" in n)
    fresh = built({"lora": {}, "gradual_unfreeze": {"every": 3}})
    Loop(epochs=4).run(fresh)
    assert all(row.moved for row in fresh.peft_plus.engagement["train"])


def test_your_own_pass_and_your_own_loss() -> None:
    """A mean that the loop computes itself is scaled like the model's own."""
    rows = rows_of("bert", "TOKEN_CLS")
    models = []
    for own in (False, True):
        model = built("lora", "bert", "TOKEN_CLS")
        engine = accelerator(2)
        session = Session(model, engine, epochs=1)
        optimizer = session.optimizer(torch.optim.AdamW, lr=1e-2)
        for data in session.batches(session.loader(rows, 4, collate_fn=collate)):
            with engine.accumulate(session.model):
                if own:
                    output = session.model(**{k: v for k, v in data.items() if k != "labels"})
                    mean = nn.functional.cross_entropy(output.logits.flatten(0, 1), data["labels"].flatten())
                    loss = session.loss(data, output=output, loss=mean)
                else:
                    loss = session.loss(data)
                engine.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        models.append(trained(model))
    for name, tensor in models[0].items():
        torch.testing.assert_close(tensor, models[1][name], rtol=1e-4, atol=1e-6)


def test_losses_without_labels_are_means_over_the_micro_batches() -> None:
    rows = [{k: v for k, v in row.items() if k != "labels"} for row in rows_of(number=8)]
    model = built()
    engine = accelerator(4)
    session = Session(model, engine, epochs=1)
    optimizer = session.optimizer(torch.optim.SGD, lr=1e-3)
    whole = []
    for data in session.batches(session.loader(rows, 2, collate_fn=collate)):
        with engine.accumulate(session.model):
            output = session.model(**data)
            engine.backward(session.loss(data, output=output, loss=output.logits.square().mean()))
            whole.append(data)
            if engine.sync_gradients:
                twin = copy.deepcopy(model).train()
                twin.zero_grad()
                twin(**collate([r for part in whole for r in unstacked(part)])).logits.square().mean().backward()
                assert distance(gradients(model), gradients(twin)) < 1e-6
            optimizer.step()
            optimizer.zero_grad()
    assert session.step == 1


def test_the_flags_are_given_back() -> None:
    model = built({"lora": {}, "gradual_unfreeze": {"every": 50}})
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    Loop(stop_at=2).run(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


def test_a_plain_peft_model_is_taken_as_it_is() -> None:
    model = peft.get_peft_model(tiny("bert"), peft.LoraConfig(task_type="SEQ_CLS"))
    Loop(epochs=1).run(model)
    assert all(row.moved for row in model.peft_plus.engagement["train"])


def test_every_row_once_an_epoch_and_another_order_in_each() -> None:
    rows = rows_of(number=10)
    for number, row in enumerate(rows):
        row["input_ids"] = torch.full_like(row["input_ids"], number + 5)
    seen: list[list[int]] = []

    def noting(part: Rows) -> dict[str, Tensor]:
        seen[-1 if seen and len(seen[-1]) < 10 else len(seen) :] = [
            (seen.pop() if seen and len(seen[-1]) < 10 else []) + [int(row["input_ids"][0]) - 5 for row in part]
        ]
        return collate(part)

    Loop(rows=rows, epochs=3, collate=noting).run()
    assert [sorted(epoch) for epoch in seen] == [list(range(10))] * 3
    assert len({tuple(epoch) for epoch in seen}) == 3


def test_an_evaluation_in_the_loop_leaves_no_trace() -> None:
    """It may switch to eval mode, and the next step trains with dropout again."""
    plain = trained(Loop().run())
    model = built(hidden_dropout_prob=0.1)
    engine = accelerator()
    session = Session(model, engine, epochs=2)
    optimizer = session.optimizer(torch.optim.AdamW, lr=1e-2)
    loader = session.loader(rows_of(), 4, collate_fn=collate)
    schedule = session.scheduler("linear", num_warmup_steps=2)
    torch.manual_seed(1)
    ends = []
    for data in session.batches(loader):
        engine.backward(session.loss(data))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if session.end_of_epoch:
            ends.append(session.step)
            session.model.eval()
            with torch.no_grad():
                session.evaluated({"eval_loss": float(session.model(**data).loss)})
    assert ends == [6, 12]
    assert equal(plain, trained(model))
    assert set(session.engine.run.last_metrics) == {"eval_loss"}


def test_logs_are_the_tasks_mean_over_labels_and_the_means_of_the_terms() -> None:
    """Three steps of very different numbers of labels, the last of two rows."""
    model = built({"lora": {}, "r3f": {"eps": 0.5}}, "bert", "TOKEN_CLS")
    engine = accelerator(2)
    session = Session(model, engine, epochs=1)
    optimizer = session.optimizer(torch.optim.SGD, lr=1e-3)
    step: list[dict[str, Tensor]] = []
    means, sizes = [], []
    for data in session.batches(session.loader(rows_of("bert", "TOKEN_CLS", 18), 4, collate_fn=collate)):
        step.append(data)
        with engine.accumulate(session.model):
            engine.backward(session.loss(data))
            if engine.sync_gradients:
                whole = collate([row for part in step for row in unstacked(part)])
                with torch.no_grad():
                    means.append(float(model(**whole).loss))
                sizes.append(len(whole["labels"]))
                step.clear()
            optimizer.step()
            optimizer.zero_grad()
    assert sizes == [8, 8, 2]
    logs = session.logs()
    assert logs["loss"] == pytest.approx(sum(means) / 3, rel=1e-6)
    assert logs["r3f"] > 0
    assert session.logs() == {}


def test_whatever_part_an_evaluation_left_in_eval_mode_trains_again() -> None:
    session, optimizer, loader = prepared(built(hidden_dropout_prob=0.1))
    for data in session.batches(loader):
        assert all(module.training for module in session.model.modules())
        session.accelerator.backward(session.loss(data))
        optimizer.step()
        optimizer.zero_grad()
        session.bare_model.get_base_model().eval()


def test_a_loop_by_epochs() -> None:
    """Some leave the loop at the end of an epoch, e.g. to evaluate, and go on."""
    models = []
    for breaks in (False, True):
        model = built(hidden_dropout_prob=0.1)
        session = Session(model, accelerator(), epochs=2)
        optimizer = session.optimizer(torch.optim.AdamW, lr=1e-2)
        loader = session.loader(rows_of(), 4, collate_fn=collate)
        torch.manual_seed(1)
        while session.step < session.max_steps:
            for data in session.batches(loader):
                session.accelerator.backward(session.loss(data))
                optimizer.step()
                optimizer.zero_grad()
                if breaks and session.end_of_epoch:
                    break
        assert (session.step, session.epoch) == (12, 2)
        models.append(trained(model))
    assert equal(*models)


# ---- resume ----------------------------------------------------------------------------------------------------------

METHODS = {
    "plain": "lora",
    "full": "full",
    "gradual_unfreeze": {"lora": {}, "gradual_unfreeze": {"every": 2}},
    "llrd": {"lora": {}, "llrd": {"decay": 0.5}},
    "r3f": {"lora": {}, "r3f": {"eps": 0.1}},
    "together": {"lora": {}, "gradual_unfreeze": {"every": 2}, "llrd": {}, "r3f": {"eps": 0.1}},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("at", [3, 6, 8], ids=["mid_epoch", "boundary", "second_epoch"])
def test_a_resumed_run_ends_bit_identical(method: str, at: int, tmp_path: Path) -> None:
    whole = Loop(METHODS[method]).run()
    Loop(METHODS[method], save_at=(at,), stop_at=at + 1, folder=tmp_path).run()
    torch.manual_seed(99)
    resumed = Loop(METHODS[method], folder=tmp_path, resume=True).run()
    assert equal(trained(whole), trained(resumed))
    assert whole.peft_plus.timeline == resumed.peft_plus.timeline


@pytest.mark.parametrize("optimizer", ["sgd", "adam8bit", "adafactor"])
def test_any_optimizer_resumes(optimizer: str, tmp_path: Path) -> None:
    import bitsandbytes
    from transformers import Adafactor

    kinds: dict[str, Any] = {
        "sgd": (torch.optim.SGD, {"momentum": 0.9}),
        "adam8bit": (bitsandbytes.optim.AdamW8bit, {"min_8bit_size": 16}),
        "adafactor": (Adafactor, {"relative_step": False, "scale_parameter": False}),
    }
    made, settings = kinds[optimizer]
    common = {"optimizer": made, "settings": settings}
    whole = Loop(**common).run()
    Loop(**common, save_at=(4,), stop_at=4, folder=tmp_path).run()
    assert equal(trained(whole), trained(Loop(**common, folder=tmp_path, resume=True).run()))


@pytest.mark.parametrize("at", [1, 2, 3])
def test_accumulated_steps_resume(at: int, tmp_path: Path) -> None:
    common = {"method": METHODS["together"], "accumulation": 4}
    whole = Loop(**common).run()
    Loop(**common, save_at=(at,), stop_at=at, folder=tmp_path).run()
    assert equal(trained(whole), trained(Loop(**common, folder=tmp_path, resume=True).run()))


def random_words(rows: Rows) -> dict[str, Tensor]:
    """A collator that draws: every epoch sees other masks."""
    data = collate(rows)
    return data | {"input_ids": torch.where(torch.rand(data["input_ids"].shape) < 0.3, 4, data["input_ids"])}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("at", [2, 3, 8])
def test_random_collators_resume(workers: int, at: int, tmp_path: Path) -> None:
    """Batches are fetched ahead, and by other workers after a resume: what they draw must not depend on either."""
    common: dict[str, Any] = {"collate": random_words, "workers": workers}
    whole = Loop(**common).run()
    Loop(**common, save_at=(at,), stop_at=at, folder=tmp_path).run()
    assert equal(trained(whole), trained(Loop(**common, folder=tmp_path, resume=True).run()))


def test_random_collators_differ_between_epochs() -> None:
    seen = []

    def noting(rows: Rows) -> dict[str, Tensor]:
        seen.append(random_words(rows)["input_ids"])
        return collate(rows)

    Loop(collate=noting, rows=rows_of(number=4), epochs=2, shuffle=False).run()
    assert len(seen) == 2
    assert not torch.equal(*seen)


@dataclass(kw_only=True)
class Countdown(Plugin):
    """The rate falls with each step; the state is kept, not derived."""

    name: ClassVar[str] = "countdown"

    left: float = field(init=False, default=1.0)

    def lr_scale(self, run: Run, param: Any) -> float:
        return self.left

    def on_step_end(self, run: Run) -> None:
        self.left *= 0.7


def test_a_plugins_state_resumes(tmp_path: Path) -> None:
    method = ["lora", Countdown()]
    whole = Loop(method).run()
    assert whole.peft_plus.plugins[0].left == pytest.approx(0.7**12)
    Loop(method, save_at=(5,), stop_at=7, folder=tmp_path).run()
    assert equal(trained(whole), trained(Loop(method, folder=tmp_path, resume=True).run()))


def test_a_checkpoint_written_after_the_loop_is_one_of_its_end(tmp_path: Path) -> None:
    """A longer run that goes on from it sees the next epoch, not the one after."""
    model = built(hidden_dropout_prob=0.1)
    Loop(epochs=4, scheduler=None).run(model)
    session = Session(built(hidden_dropout_prob=0.1), accelerator(), epochs=2)
    optimizer = session.optimizer(torch.optim.AdamW, lr=1e-2)
    loader = session.loader(rows_of(), 4, collate_fn=collate)
    torch.manual_seed(1)
    for data in session.batches(loader):
        session.accelerator.backward(session.loss(data))
        optimizer.step()
        optimizer.zero_grad()
    session.save(tmp_path)
    longer = Loop(epochs=4, scheduler=None, resume=True, folder=tmp_path).run()
    assert equal(trained(model), trained(longer))


def test_a_finished_run_makes_no_step_more(tmp_path: Path) -> None:
    whole = Loop(save_at=(12,), folder=tmp_path).run()
    resumed = Loop(folder=tmp_path, resume=True).run()
    assert equal(trained(whole), trained(resumed))


def test_a_damaged_checkpoint_falls_back_to_the_last_whole_one(tmp_path: Path, caplog: Any) -> None:
    whole = Loop(save_at=(3, 5), folder=tmp_path).run()
    victim = next((tmp_path / "checkpoint-5").glob("session*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-7])
    with caplog.at_level(logging.WARNING, "peft_plus"):
        resumed = Loop(folder=tmp_path, resume=True).run()
    assert "checkpoint-5" in caplog.text
    assert equal(trained(whole), trained(resumed))
    with pytest.raises(CheckpointError, match="checkpoint-5"):
        Loop(folder=tmp_path / "checkpoint-5", resume=True).run()


def test_nothing_pickled_is_written(tmp_path: Path) -> None:
    Loop(save_at=(2,), stop_at=2, folder=tmp_path).run()
    suffixes = {path.suffix for path in (tmp_path / "checkpoint-2").rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".md"}


def test_the_checkpoint_loads_in_plain_peft(tmp_path: Path) -> None:
    model = Loop(save_at=(12,), folder=tmp_path).run().eval()
    plain = peft.PeftModel.from_pretrained(tiny("bert"), tmp_path / "checkpoint-12").eval()
    data = batch("bert")
    assert torch.equal(model(**data).logits, plain(**data).logits)


def test_limit_keeps_the_newest(tmp_path: Path) -> None:
    model = built()
    session = Session(model, accelerator(), epochs=1)
    optimizer = session.optimizer(torch.optim.AdamW, lr=1e-2)
    for data in session.batches(session.loader(rows_of(), 4, collate_fn=collate)):
        session.accelerator.backward(session.loss(data))
        optimizer.step()
        optimizer.zero_grad()
        session.save(tmp_path, limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5", "checkpoint-6"]


def test_drawing_after_the_save_is_seen(tmp_path: Path, caplog: Any) -> None:
    session = Session(built(), accelerator(), epochs=1)
    optimizer = session.optimizer(torch.optim.AdamW, lr=1e-2)
    with caplog.at_level(logging.WARNING, "peft_plus"):
        for data in session.batches(session.loader(rows_of(number=8), 4, collate_fn=collate)):
            session.accelerator.backward(session.loss(data))
            optimizer.step()
            optimizer.zero_grad()
            session.save(tmp_path)
            if session.step == 2:
                assert "Save last" not in caplog.text
                torch.rand(1)
    assert "Save last" in caplog.text


def test_another_run_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    Loop(save_at=(2,), stop_at=2, folder=tmp_path).run()
    model = built("ia3")
    before = trained(model)
    with pytest.raises(CheckpointError, match="tuner"):
        Loop(folder=tmp_path, resume=True).run(model)
    assert equal(before, trained(model))
    with pytest.raises(CheckpointError, match="plugins"):
        Loop({"lora": {}, "llrd": {}}, folder=tmp_path, resume=True).run()
    with pytest.raises(CheckpointError, match="schedulers"):
        Loop(folder=tmp_path, resume=True, scheduler=None).run()


def test_an_empty_folder_has_nothing_to_resume(tmp_path: Path, caplog: Any) -> None:
    session = Session(built(), accelerator(), max_steps=3)
    session.optimizer(torch.optim.AdamW, lr=1e-2)
    session.loader(rows_of(), 4, collate_fn=collate)
    for name in ("", "never made", "chekpoint-2", "checkpoint-run"):
        caplog.clear()
        assert session.resume(tmp_path / name) is False
        assert f"There is no checkpoint in {tmp_path / name} yet" in caplog.text
    with pytest.raises(CheckpointError, match="checkpoint-2 does not exist"):
        session.resume(tmp_path / "checkpoint-2")


def test_a_checkpoint_that_lost_its_manifest_is_told_for_what_it_is(tmp_path: Path) -> None:
    Loop(save_at=(2,), stop_at=2, folder=tmp_path).run()
    (tmp_path / "checkpoint-2" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="it has no manifest"):
        Loop(folder=tmp_path, resume=True).run()


def test_another_rate_has_no_effect_and_that_is_told(tmp_path: Path, caplog: Any) -> None:
    Loop(save_at=(2,), stop_at=2, folder=tmp_path).run()
    same = Loop(folder=tmp_path, resume=True).run()
    assert caplog.text == ""
    faster = Loop(folder=tmp_path, resume=True, settings={"lr": 1.0}).run()
    assert "optimizer settings.lr: 0.01 → 1.0 (no effect" in caplog.text
    assert equal(trained(same), trained(faster))


# ---- mistakes --------------------------------------------------------------------------------------------------------


def prepared(model: Any = None, accumulation: int = 1) -> tuple[Session, Any, Any]:
    session = Session(built() if model is None else model, accelerator(accumulation), epochs=1)
    optimizer = session.optimizer(torch.optim.AdamW, lr=1e-2)
    return session, optimizer, session.loader(rows_of(), 4, collate_fn=collate)


def test_no_length_is_refused() -> None:
    with pytest.raises(MethodError, match="how long"):
        Session(built(), accelerator())
    with pytest.raises(MethodError, match="epochs=0"):
        Session(built(), accelerator(), epochs=0)


def test_several_stages_need_a_name() -> None:
    model = built(["lora", "lp_ft"])
    names = [stage.name for stage in model.peft_plus.stages]
    with pytest.raises(MethodError, match=names[0]):
        Session(model, accelerator(), epochs=1)
    session = Session(model, accelerator(), epochs=1, stage=names[0])
    assert session.stage.train == "head"


def test_what_the_method_would_set_for_a_trainer_is_told_once(caplog: Any) -> None:
    with caplog.at_level(logging.WARNING, logger="peft_plus"):
        Session(built("lora"), accelerator(), epochs=1)
        assert caplog.text == ""
        Session(built({"lora": {}, "warm_restarts": {"cycles": 2}}), accelerator(), epochs=1)
    (record,) = caplog.records
    assert "your own loop must follow: lr_scheduler_type='cosine_with_restarts', lr_scheduler_kwargs=" in record.message
    assert "{'num_cycles': 2}" in record.message


def backward_only(session: Session, loader: Any, then: Callable[[], object] = lambda: None) -> None:
    for data in session.batches(loader):
        session.accelerator.backward(session.loss(data))
        then()


def test_forgetting_the_step_is_told() -> None:
    session, _, loader = prepared()
    with pytest.raises(MethodError, match=r"optimizer\.step"):
        backward_only(session, loader)


def test_forgetting_accumulate_is_told() -> None:
    session, optimizer, loader = prepared(accumulation=2)
    with pytest.raises(MethodError, match="accumulate"):
        backward_only(session, loader, then=lambda: (optimizer.step(), optimizer.zero_grad()))


def test_forgetting_to_clear_the_gradients_is_told() -> None:
    session, optimizer, loader = prepared()
    with pytest.raises(MethodError, match=r"zero_grad\(\) was not called after step 1"):
        backward_only(session, loader, then=optimizer.step)


@pytest.mark.parametrize("clear", ["first", "before_backward", "by_the_model", "to_zero", "by_hand"])
def test_gradients_may_be_cleared_in_any_way(clear: str) -> None:
    plain, model = built(), built()
    Loop(epochs=1, scheduler=None).run(plain)
    session, optimizer, loader = prepared(model)
    for data in session.batches(loader):
        if clear == "first":
            optimizer.zero_grad()
        loss = session.loss(data)
        if clear == "before_backward":
            optimizer.zero_grad()
        session.accelerator.backward(loss)
        optimizer.step()
        if clear == "by_the_model":
            session.model.zero_grad()
        if clear == "to_zero":
            optimizer.zero_grad(set_to_none=False)
        if clear == "by_hand":
            for parameter in model.parameters():
                parameter.grad = None
    assert equal(trained(plain), trained(model))


def test_clearing_the_gradients_of_earlier_micro_batches_is_told() -> None:
    session, optimizer, loader = prepared(accumulation=4)

    def loop() -> None:
        for data in session.batches(loader):
            with session.accelerator.accumulate(session.model):
                optimizer.zero_grad()
                session.accelerator.backward(session.loss(data))
                optimizer.step()

    with pytest.raises(MethodError, match=r"throw away the gradients of 3 of the 4 micro-batches of step 1"):
        loop()


def test_a_loss_past_the_session_is_told() -> None:
    """The plugins' terms would be missing."""
    session, optimizer, loader = prepared(built({"lora": {}, "r3f": {"eps": 0.1}}))

    def loop() -> None:
        for data in session.batches(loader):
            session.accelerator.backward(session.model(**data).loss)
            optimizer.step()
            optimizer.zero_grad()

    with pytest.raises(MethodError, match=r"session\.loss\(batch\) was asked for 0 of the 1 micro-batches of step 1"):
        loop()


def test_a_backward_past_accelerate_is_told() -> None:
    session, optimizer, loader = prepared(accumulation=2)

    def loop() -> None:
        for data in session.batches(loader):
            with session.accelerator.accumulate(session.model):
                session.loss(data).backward()
                optimizer.step()
                optimizer.zero_grad()

    with pytest.raises(MethodError, match=r"loss\.backward\(\) makes gradients 2 times too large"):
        loop()


def test_a_rate_of_zero_is_told() -> None:
    session = Session(built(), accelerator(), epochs=1)
    with pytest.raises(MethodError, match=r"lr=0\): nothing would be learned"):
        session.optimizer(torch.optim.AdamW, lr=0.0)
    session, optimizer, loader = prepared()
    session.scheduler("linear", num_warmup_steps=2)  # never stepped
    with pytest.raises(EngagementError, match=r"All 6 updates were made at a learning rate of 0.*schedule\.step\(\)"):
        backward_only(session, loader, then=lambda: (optimizer.step(), optimizer.zero_grad()))


def test_two_updates_in_one_step_are_told() -> None:
    session, optimizer, loader = prepared()
    with pytest.raises(MethodError, match=r"called twice in step 1"):
        backward_only(session, loader, then=lambda: (optimizer.step(), optimizer.step()))
    assert session.step == 1


def test_an_update_outside_the_loop_is_told() -> None:
    _, optimizer, _ = prepared()
    with pytest.raises(MethodError, match=r"belongs into the body of the loop"):
        optimizer.step()


def test_saving_in_the_middle_of_a_step_is_told(tmp_path: Path) -> None:
    session, _, loader = prepared(accumulation=2)
    with pytest.raises(MethodError, match="whole"):
        backward_only(session, loader, then=lambda: session.save(tmp_path))


def test_a_dataloader_is_refused() -> None:
    session, _, _ = prepared()
    with pytest.raises(MethodError, match="dataset"):
        session.loader(torch.utils.data.DataLoader(rows_of()), 4)


@pytest.mark.parametrize("setting", ["sampler", "batch_sampler", "generator", "persistent_workers"])
def test_an_order_behind_its_back_is_refused(setting: str) -> None:
    session, _, _ = prepared()
    with pytest.raises(MethodError, match=setting):
        session.loader(rows_of(), 4, **{setting: True})


def test_empty_data_are_refused() -> None:
    session, _, _ = prepared()
    with pytest.raises(DataError, match="empty"):
        session.loader([], 4)
    with pytest.raises(MethodError, match="drop_last"):
        session.loader(rows_of(number=3), 4, drop_last=True)


def test_a_loss_outside_the_loop_is_refused() -> None:
    session, _, _ = prepared()
    with pytest.raises(MethodError, match="batches"):
        session.loss(collate(rows_of()))


def test_an_optimizer_that_misses_something_is_refused() -> None:
    model = built()
    session = Session(model, accelerator(), epochs=1)
    some = [p for p in model.parameters() if p.requires_grad][:1]
    with pytest.raises(MethodError, match="not in the optimizer"):
        session.optimizer(torch.optim.AdamW, params=some, lr=1e-2)


def test_order_of_calls_is_told() -> None:
    session = Session(built(), accelerator(), epochs=1)
    with pytest.raises(MethodError, match=r"session\.optimizer"):
        session.scheduler("linear")
    with pytest.raises(MethodError, match=r"session\.loader"):
        _ = session.max_steps
    with pytest.raises(MethodError, match=r"session\.optimizer"):
        next(session.batches([]))
    session.optimizer(torch.optim.AdamW, lr=1e-2)
    with pytest.raises(MethodError, match="another Session"):
        session.optimizer(torch.optim.AdamW, lr=1e-2)
