"""A resumed Trainer ends bit by bit where the uninterrupted one does, or says why it will not go on."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, TrainerCallback

import peft_plus
import peft_plus.checkpoint
from peft_plus import Param, Plugin, Run, Trainer, get_model
from peft_plus.checkpoint import verify
from peft_plus.errors import CheckpointError, MethodError
from peft_plus.find_checkpoint import newest_whole
from peft_plus_freezing.gradual_unfreeze import GradualUnfreeze
from peft_plus_stability.r3f import R3F
from tests.models import batch, tiny
from tests.training import quiet

FILES = [
    *("README.md", "adapter_config.json", "adapter_model.safetensors"),
    *("epoch_rng_state.json", "epoch_rng_state.safetensors", "manifest.json", "optimizer.json", "optimizer.pt"),
    *("optimizer.safetensors", "peft_plus.json", "plan_state.json", "rng_state.json", "rng_state.safetensors"),
    *("scheduler.json", "scheduler.pt", "trainer_state.json", "training_args.json"),
]


def data(rows: int = 8, seed: int = 0) -> list[dict[str, Tensor]]:
    columns = batch("bert", rows=rows, seed=seed)
    return [{name: column[i] for name, column in columns.items()} for i in range(rows)]


def trainer(
    folder: Path,
    method: Any = "lora",
    *,
    rows: int = 8,
    base: dict[str, Any] | None = None,
    cls: Any = Trainer,
    callbacks: Sequence[Any] = (),
    **arguments: Any,
) -> Any:
    """A fresh one over a fresh model, as a script makes when it is started again. 4 steps an epoch, 2 epochs."""
    settings: dict[str, Any] = {"per_device_train_batch_size": 2, "num_train_epochs": 2, "learning_rate": 1e-2}
    settings |= {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    torch.manual_seed(0)
    model = get_model(tiny("bert", hidden_dropout_prob=0.1, **(base or {})), method)
    made = cls(model, quiet(folder, **(settings | arguments)), train_dataset=data(rows), eval_dataset=data(4, seed=1))
    for callback in callbacks:
        made.add_callback(callback)
    return made


def trained(folder: Path, *args: Any, resume: Any = None, **kwargs: Any) -> Any:
    made = trainer(folder, *args, **kwargs)
    made.train(resume_from_checkpoint=resume)
    return made


def everything(made: Any) -> dict[str, Tensor]:
    """Every tensor that a run leaves: the model's, the optimizer's, and the losses that it logged."""
    tensors = {name: tensor.detach().clone() for name, tensor in made.model.state_dict().items()}
    for index, state in made.optimizer.state_dict()["state"].items():
        quantised = state.pop("__bnb_optimizer_quant_state__", {})  # bitsandbytes keeps its 8 bits apart
        tensors |= {f"{index}.{name}": torch.as_tensor(value) for name, value in (state | quantised).items()}
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    return tensors | {"losses": torch.tensor(losses), "rates": torch.tensor(made.lr_scheduler.get_last_lr())}


def identical(one: Any, other: Any) -> bool:
    a, b = everything(one), everything(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("peft_plus")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """An uninterrupted run of 8 steps, and its folder with all its checkpoints. Copy before changing."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return trained(folder), folder


@pytest.fixture(scope="module")
def idle(whole: tuple[Any, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trainer of the same run that never gets to train: for whatever is refused before."""
    return trainer(tmp_path_factory.mktemp("idle"))


@pytest.fixture
def run(whole: tuple[Any, Path], tmp_path: Path) -> tuple[Any, Path]:
    """A copy of it in which steps 2 and 4 were saved: as if killed soon after the first epoch."""
    shutil.copytree(whole[1], tmp_path / "run")
    for step in (6, 8):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    return whole[0], tmp_path / "run"


# --- bit by bit ---


@dataclass(kw_only=True)
class Momentum(Plugin):
    """State that matters: a rate that depends on all that went before."""

    name: ClassVar[str] = "momentum"

    seen: int = field(init=False, default=0)
    trace: Tensor = field(init=False, default_factory=lambda: torch.zeros(2))

    def on_step_end(self, run: Run) -> None:
        self.seen += 1
        self.trace = self.trace * 0.9 + self.seen

    def lr_scale(self, run: Run, param: Param) -> float:
        return 1 / (1 + float(self.trace.sum()))


BIG = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}  # enough for bitsandbytes' 8 bits
PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5}}
PLATEAU |= {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}

RUNS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "lora": ({}, (2, 4, 6)),  # within an epoch, between two, within the second
    "full": ({"method": "full"}, (2,)),
    "accumulation": ({"gradient_accumulation_steps": 2, "rows": 10, "save_steps": 1}, (2, 3, 4)),
    "gradual_unfreeze": ({"method": ["lora", GradualUnfreeze(every=2)]}, (2, 4)),
    "gradual_unfreeze_full": ({"method": ["full", GradualUnfreeze(every=1)]}, (2, 4)),
    "r3f": ({"method": ["lora", R3F(eps=0.5)]}, (2,)),
    "llrd": ({"method": ["lora", "llrd"]}, (2,)),
    "stateful_plugin": ({"method": ["lora", Momentum()]}, (2, 4)),
    "adamw_8bit": ({"method": "full", "base": BIG, "optim": "adamw_bnb_8bit"}, (2,)),
    "adafactor": ({"optim": "adafactor"}, (2,)),
    "sgd": ({"optim": "sgd", "optim_args": "momentum=0.9"}, (2,)),
    "cosine": ({"lr_scheduler_type": "cosine", "warmup_steps": 3}, (2, 4)),
    "plateau": (PLATEAU, (2, 4)),
    "bf16": ({"bf16": True}, (2,)),
    "evaluation": ({"eval_strategy": "steps", "eval_steps": 3}, (2, 4)),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_ends_bit_identical(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings, steps = RUNS[name]
    whole = trained(tmp_path / "run", **settings)
    for step in steps:
        resumed = trained(
            tmp_path / "run", resume=tmp_path / f"run/checkpoint-{step}", **(settings | {"save_strategy": "no"})
        )
        assert resumed.state.global_step == whole.state.global_step
        assert identical(whole, resumed), step
    assert warned(caplog) == []


def test_thawed_base_weights_come_back(tmp_path: Path) -> None:
    def thawed() -> Any:
        made = trainer(tmp_path / "run")
        made.model.get_parameter("base_model.model.bert.pooler.dense.weight").requires_grad_(True)
        peft_plus.attach(made.model, [])
        return made

    whole = thawed()
    whole.train()
    assert "thawed.safetensors" in verify(tmp_path / "run/checkpoint-4").files
    resumed = thawed()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"))
    assert identical(whole, resumed)


def test_a_gradient_scaler_goes_on(tmp_path: Path) -> None:
    def scaled(resume: Any = None) -> Any:
        made = trainer(tmp_path / "run")
        made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
        made.train(resume_from_checkpoint=resume)
        return made

    whole = scaled()
    assert "scaler.json" in verify(tmp_path / "run/checkpoint-4").files
    resumed = scaled(tmp_path / "run/checkpoint-4")
    assert identical(whole, resumed)
    assert whole.accelerator.scaler.get_scale() == resumed.accelerator.scaler.get_scale() == 16.0


def test_a_model_without_a_plan_resumes_too(tmp_path: Path) -> None:
    def plain(resume: Any = None) -> Any:
        settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 1e-2}
        made = Trainer(tiny("bert", hidden_dropout_prob=0.1), quiet(tmp_path / "run", **settings), train_dataset=data())
        made.train(resume_from_checkpoint=resume)
        return made

    assert identical(plain(), plain(tmp_path / "run/checkpoint-2"))
    assert "plan_state.json" not in verify(tmp_path / "run/checkpoint-2").files


def test_model_init_resumes_too(tmp_path: Path) -> None:
    def made(resume: Any = None) -> Any:
        settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 1e-2}
        result = Trainer(
            None,
            quiet(tmp_path / "run", **settings),
            train_dataset=data(),
            model_init=lambda: get_model(tiny("bert", hidden_dropout_prob=0.1), "lora"),
        )
        result.train(resume_from_checkpoint=resume)
        return result

    assert identical(made(), made(tmp_path / "run/checkpoint-2"))


# --- damage ---


def test_a_checkpoint_holds_these_files_and_no_pickle(run: tuple[Any, Path]) -> None:
    folder = run[1] / "checkpoint-4"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    for path in folder.iterdir():
        assert path.suffix in (".json", ".safetensors", ".md") or path.read_text().startswith("No pickle: peft_plus")
        assert not path.read_bytes().startswith((b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK"))  # pickle, zip archive
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))


def broken(path: Path) -> Iterator[str]:
    """Break a file in one way after the other."""
    content = path.read_bytes()
    path.unlink()
    yield "deleted"
    path.write_bytes(content[: len(content) // 2])
    yield "truncated"
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    yield "one bit flipped"


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_refused_by_path_and_gone_around_otherwise(
    name: str, run: tuple[Any, Path], idle: Any, caplog: pytest.LogCaptureFixture
) -> None:
    whole, folder = run
    before = everything_of(idle.model)
    for damage in broken(folder / "checkpoint-4" / name):
        with pytest.raises(CheckpointError, match=rf"checkpoint-4.*{name}.*Nothing was loaded"):
            idle.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
        assert same(before, everything_of(idle.model)), damage
        caplog.clear()
        found = newest_whole(folder)
        assert found is not None
        assert found.step == 2
        (warning,) = warned(caplog)
        assert "checkpoint-2, since" in warning
        assert name in warning
    assert identical(whole, trained(folder, resume=True))
    assert verify(folder / "checkpoint-4").step == 4  # written anew


def everything_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Bomb:
    """Runs a function when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_the_bomb_is_a_bomb(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert (tmp_path / "exploded").is_dir()


@pytest.mark.parametrize(
    "name",
    [
        *FILES,
        *("pytorch_model.bin", "adapter_model.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt"),
        *("rng_state.pth", "other/adapter_model.bin"),
    ],
)
@pytest.mark.parametrize("archive", [False, True])
def test_a_pickle_bomb_in_any_place_never_runs(
    name: str, archive: bool, run: tuple[Any, Path], idle: Any, tmp_path: Path
) -> None:
    folder, bomb = run[1] / "checkpoint-4", Bomb(tmp_path / "exploded")
    (folder / name).parent.mkdir(exist_ok=True)
    torch.save(bomb, folder / name) if archive else (folder / name).write_bytes(pickle.dumps(bomb))
    with pytest.raises(CheckpointError, match=name):
        idle.train(resume_from_checkpoint=str(folder))
    assert not (tmp_path / "exploded").exists()


def test_a_bomb_that_nothing_reads_never_runs(run: tuple[Any, Path], tmp_path: Path) -> None:
    torch.save(Bomb(tmp_path / "exploded"), run[1] / "checkpoint-4/training_args.bin")
    assert identical(run[0], trained(run[1], resume=True))
    assert not (tmp_path / "exploded").exists()


# --- transformers' own checkpoints ---


@pytest.fixture(scope="module")
def stock_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("stock") / "run"
    return trained(folder, cls=transformers.Trainer), folder


@pytest.fixture
def stock(stock_run: tuple[Any, Path], tmp_path: Path) -> tuple[Any, Path]:
    """A run of transformers' own Trainer, and a copy of its checkpoint of step 4."""
    shutil.copytree(stock_run[1] / "checkpoint-4", tmp_path / "stock/checkpoint-4")
    return stock_run[0], tmp_path / "stock/checkpoint-4"


def test_a_stock_checkpoint_is_gone_on_with_and_a_warning(
    stock: tuple[Any, Path], caplog: pytest.LogCaptureFixture
) -> None:
    whole, folder = stock
    resumed = trained(folder.parent, resume=folder)
    (warning,) = warned(caplog)
    assert "whether its files are intact is unknown" in warning
    assert identical(whole, resumed)


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "adapter_model.safetensors"]
)
def test_a_stock_checkpoint_without_a_file_is_refused(name: str, stock: tuple[Any, Path], idle: Any) -> None:
    (stock[1] / name).unlink()
    with pytest.raises(CheckpointError, match=f"incomplete: .*{name}.* is missing"):
        idle.train(resume_from_checkpoint=stock[1])


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_bomb_in_a_stock_checkpoint_never_runs(name: str, stock: tuple[Any, Path], tmp_path: Path) -> None:
    torch.save(Bomb(tmp_path / "exploded"), stock[1] / name)
    if name == "training_args.bin":
        trained(stock[1].parent, resume=stock[1])
    else:
        with pytest.raises(CheckpointError, match=r"holds a pickle .* which could run code\. It was not"):
            trained(stock[1].parent, resume=stock[1])
    assert not (tmp_path / "exploded").exists()


@dataclass(kw_only=True)
class Count(Plugin):
    name: ClassVar[str] = "count"

    seen: int = field(init=False, default=0)


def test_a_stock_checkpoint_lacks_the_state_that_a_plugin_keeps(stock: tuple[Any, Path]) -> None:
    with pytest.raises(CheckpointError, match="holds no state of plugins, but 'count' keeps one"):
        trained(stock[1].parent, ["lora", Count()], resume=stock[1])


def test_transformers_own_trainer_stops_at_a_checkpoint_of_ours(run: tuple[Any, Path]) -> None:
    """Without the two files it would go on silently, with a fresh optimizer."""
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        trained(run[1], cls=transformers.Trainer, resume=str(run[1] / "checkpoint-4"))


# --- another run ---


def test_another_method_is_refused_before_anything_is_loaded(run: tuple[Any, Path]) -> None:
    _, folder = run
    listing = sorted(path.name for path in folder.iterdir())
    other = trainer(folder, ["lora", "llrd"])
    before = everything_of(other.model)
    with pytest.raises(CheckpointError, match=r"belongs to another run(.|\n)*plugins: \[\] → \['llrd'\]"):
        other.train(resume_from_checkpoint=True)
    assert same(before, everything_of(other.model))
    assert sorted(path.name for path in folder.iterdir()) == listing
    assert verify(folder / "checkpoint-4").step == 4


def test_another_stage_is_refused(run: tuple[Any, Path]) -> None:
    other = trainer(run[1])
    other.stage = peft_plus.Stage(name="tune")
    with pytest.raises(CheckpointError, match=r"stage\.name: 'train' → 'tune'"):
        other.train(resume_from_checkpoint=True)


def test_changed_arguments_are_told_and_the_run_goes_on(
    run: tuple[Any, Path], caplog: pytest.LogCaptureFixture
) -> None:
    made = trained(run[1], resume=True, learning_rate=2e-2, rows=6)
    (warning,) = warned(caplog)
    assert "learning_rate: 0.01 → 0.02 (no effect: the optimizer goes on with what the checkpoint holds" in warning
    assert warning.endswith("training examples: 8 → 6")
    assert made.state.global_step == 6


@pytest.mark.parametrize("change", [{"learning_rate": 1.0}, {"weight_decay": 0.9}, {"adam_beta1": 0.1}])
def test_what_is_said_to_have_no_effect_has_none(
    change: dict[str, Any], run: tuple[Any, Path], caplog: pytest.LogCaptureFixture
) -> None:
    assert identical(run[0], trained(run[1], resume=True, **change))
    (warning,) = warned(caplog)
    assert "(no effect" in warning


def test_other_data_of_the_same_length_are_told(run: tuple[Any, Path], caplog: pytest.LogCaptureFixture) -> None:
    made = trainer(run[1])
    made.train_dataset = data(8, seed=3)
    made.train(resume_from_checkpoint=True)
    (warning,) = warned(caplog)
    assert "training data, a sample: " in warning


def test_another_base_is_refused_without_a_plan_too(tmp_path: Path) -> None:
    def plain(seed: int) -> Any:
        model = peft.get_peft_model(tiny("bert", seed=seed), peft.LoraConfig(task_type="SEQ_CLS"))
        return Trainer(model, quiet(tmp_path, max_steps=2, save_strategy="steps", save_steps=1), train_dataset=data())

    plain(0).train()
    with pytest.raises(CheckpointError, match=r"base\.fingerprint"):
        plain(1).train(resume_from_checkpoint=True)


def test_training_for_longer_equals_a_longer_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings: dict[str, Any] = {"lr_scheduler_type": "constant"}
    trained(tmp_path / "run", num_train_epochs=1, **settings)
    resumed = trained(tmp_path / "run", num_train_epochs=2, resume=True, **settings)
    assert warned(caplog) == []
    assert identical(trained(tmp_path / "longer", num_train_epochs=2, **settings), resumed)


# --- the end ---


class Steps(TrainerCallback):
    """Counts the steps that this process ran."""

    def __init__(self) -> None:
        self.count = 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.count += 1


@pytest.mark.parametrize("max_steps", [2, 4, 6])  # within an epoch, at its end, within the second
def test_a_finished_run_trains_no_further(max_steps: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = trained(tmp_path / "run", max_steps=max_steps)
    steps = Steps()
    resumed = trained(tmp_path / "run", max_steps=max_steps, resume=True, callbacks=[steps])
    assert steps.count == 0
    assert resumed.state.global_step == max_steps
    assert identical(whole, resumed)
    (warning,) = warned(caplog)
    assert f"the end of this run (step {max_steps} of {max_steps})" in warning


BEST = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "loss"}


class Break(TrainerCallback):
    """Breaks the best checkpoint at a step."""

    def __init__(self, step: int, how: Callable[[Path], Any]) -> None:
        self.step, self.how = step, how

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            state.best_model_checkpoint = str(Path(args.output_dir, "checkpoint-2"))
            state.best_metric = -1.0
            self.how(Path(state.best_model_checkpoint))


@pytest.mark.parametrize(
    ("how", "named"),
    [
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x"), r"adapter_model\.safetensors has 1"),
        (shutil.rmtree, "does not exist"),
        (lambda folder: (folder / "manifest.json").unlink(), "it has no manifest"),
        (
            lambda folder: [(folder / name).unlink() for name in ("manifest.json", "adapter_model.safetensors")],
            "it has no manifest",
        ),
    ],
)
def test_a_damaged_best_model_is_not_loaded(how: Callable[[Path], Any], named: str, tmp_path: Path) -> None:
    last = trained(tmp_path / "other", **{**BEST, "load_best_model_at_end": False})
    made = trainer(tmp_path / "run", callbacks=[Break(8, how)], **BEST)
    with pytest.raises(CheckpointError, match=f"best model cannot be loaded: .*checkpoint-2.*{named}") as error:
        made.train()
    assert "The model in memory is that of the last step" in str(error.value)
    assert same(everything_of(made.model), everything_of(last.model))


def test_the_best_model_is_loaded_at_the_end_of_a_resumed_run(tmp_path: Path) -> None:
    whole = trained(tmp_path / "run", **BEST)
    resumed = trained(tmp_path / "run", resume=tmp_path / "run/checkpoint-6", **BEST)
    assert resumed.state.best_global_step == whole.state.best_global_step
    assert same(everything_of(whole.model), everything_of(resumed.model))


def test_a_missing_best_model_is_told_when_resuming_not_at_the_end(tmp_path: Path) -> None:
    best = Path(trained(tmp_path / "run", **BEST).state.best_model_checkpoint)
    resumed_from = next(p for p in sorted((tmp_path / "run").glob("checkpoint-*")) if p.name > best.name)
    shutil.move(best, tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"best model so far is in .*{best.name}, which cannot be used"):
        trained(tmp_path / "run", resume=resumed_from, **BEST)


def test_a_run_that_was_moved_finds_its_best_model(tmp_path: Path) -> None:
    whole = trained(tmp_path / "run", **BEST)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    resumed = trained(tmp_path / "moved", resume=True, **BEST)
    assert Path(resumed.state.best_model_checkpoint).parent == tmp_path / "moved"
    assert same(everything_of(whole.model), everything_of(resumed.model))


def test_a_copied_run_keeps_its_own_best_model(tmp_path: Path) -> None:
    whole = trained(tmp_path / "run", **BEST)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    shutil.rmtree(tmp_path / "run")
    trained(tmp_path / "run", learning_rate=0.3, **BEST)  # another run where the best model is recorded to be
    resumed = trained(tmp_path / "copy", resume=True, **BEST)
    assert Path(resumed.state.best_model_checkpoint).parent == tmp_path / "copy"
    assert same(everything_of(whole.model), everything_of(resumed.model))


def test_the_best_model_of_another_run_is_refused(tmp_path: Path) -> None:
    best = Path(trained(tmp_path / "run", **BEST).state.best_model_checkpoint)
    step = int(best.name.removeprefix("checkpoint-"))
    trained(tmp_path / "other", ["lora", "llrd"], **BEST, save_total_limit=9)
    shutil.rmtree(best)
    shutil.copytree(tmp_path / f"other/checkpoint-{step}", best)
    later = next(p for p in (tmp_path / "run").glob("checkpoint-*") if int(p.name.removeprefix("checkpoint-")) > step)
    with pytest.raises(CheckpointError, match=r"cannot be used: .*belongs to another run(.|\n)*plugins"):
        trained(tmp_path / "run", resume=later, **BEST)


class Killed(Exception):
    """Stands for kill -9: nothing of ours looks at it."""


def test_a_kill_while_the_best_checkpoint_is_replaced_loses_nothing(tmp_path: Path) -> None:
    """A run begins anew in a used folder and is killed in its first save: its predecessor's are still whole."""
    whole = trained(tmp_path / "run", **BEST, max_steps=2)
    assert Path(whole.state.best_model_checkpoint).name == "checkpoint-2"
    again = trainer(tmp_path / "run", **BEST, max_steps=2)

    def killed(*_: Any) -> None:
        raise Killed

    again._save_rng_state = killed
    with pytest.raises(Killed):
        again.train()
    assert (tmp_path / "run/replaced-checkpoint-2").is_dir()
    resumed = trained(tmp_path / "run", resume=True, **BEST, max_steps=2)
    assert same(everything_of(whole.model), everything_of(resumed.model))


# --- courses ---


def test_of_two_courses_the_later_one_is_resumed(tmp_path: Path) -> None:
    """The run goes back to step 4 and takes another course, which is killed before it comes as far as the first."""
    trained(tmp_path / "run")
    second = trained(tmp_path / "other", max_grad_norm=0.05, resume=tmp_path / "run/checkpoint-4", num_train_epochs=2)
    going_back = trainer(tmp_path / "run", max_grad_norm=0.05, callbacks=[Stop(7)])
    with pytest.raises(Killed):
        going_back.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"))
    assert (tmp_path / "run/checkpoint-8").is_dir()
    assert identical(second, trained(tmp_path / "run", max_grad_norm=0.05, resume=True))


class Stop(TrainerCallback):
    """Kills a run before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise Killed


# --- asked for less ---


def test_a_checkpoint_of_the_model_alone_is_no_place_to_resume_from(tmp_path: Path) -> None:
    trained(tmp_path / "run", save_only_model=True)
    files = verify(tmp_path / "run/checkpoint-4").files
    assert "adapter_model.safetensors" in files
    assert not {"optimizer.json", "scheduler.json", "rng_state.json", "plan_state.json"} & set(files)
    for resume in (True, tmp_path / "run/checkpoint-4"):
        with pytest.raises(CheckpointError, match=r"holds the model alone .*another run would begin"):
            trained(tmp_path / "run", resume=resume)


def test_the_best_of_models_alone_is_loaded(tmp_path: Path) -> None:
    made = trained(tmp_path / "run", save_only_model=True, **BEST)
    assert same(everything_of(made.model), everything_of(trained(tmp_path / "other", **BEST).model))


def test_ignore_data_skip_goes_on_and_says_what_it_means(
    run: tuple[Any, Path], caplog: pytest.LogCaptureFixture
) -> None:
    made = trained(run[1], resume=True, ignore_data_skip=True)
    assert made.state.global_step == 8
    assert any("the data begin anew" in text for text in warned(caplog))


def test_resuming_where_there_is_nothing_is_the_trainers_own_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        trained(tmp_path / "run", resume=True)
    with pytest.raises(CheckpointError, match="checkpoint-9 does not exist"):
        trained(tmp_path / "run", resume=tmp_path / "run/checkpoint-9")


def test_torn_checkpoints_alone_are_an_error(run: tuple[Any, Path]) -> None:
    for folder in run[1].iterdir():
        (folder / "optimizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"No checkpoint in .* is whole(.|\n)*optimizer\.json is missing"):
        trained(run[1], resume=True)


def test_a_sessions_checkpoint_is_not_for_a_trainer(run: tuple[Any, Path]) -> None:
    folder = run[1] / "checkpoint-4"
    identity = verify(folder).identity
    (folder / "trainer_state.json").unlink()
    peft_plus.checkpoint.seal(folder, identity, 4)
    with pytest.raises(CheckpointError, match="was not written by a Trainer"):
        trained(run[1], resume=folder)


# --- rotation ---


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("limit", [1, 2])
def test_rotation_keeps_the_last_ones(limit: int, tmp_path: Path) -> None:
    made = trained(tmp_path / "run", save_total_limit=limit)
    assert names(tmp_path / "run") == sorted(["checkpoint-8", "checkpoint-6"][:limit])
    assert made.args.save_total_limit == limit
    saved = json.loads((tmp_path / "run/checkpoint-8/training_args.json").read_text(encoding="utf-8"))
    assert saved["save_total_limit"] == limit


def test_rotation_keeps_the_best(tmp_path: Path) -> None:
    how = Break(3, lambda _: None)  # from step 3 on, step 2 was the best
    trained(tmp_path / "run", save_total_limit=2, callbacks=[how], **{**BEST, "load_best_model_at_end": False})
    assert names(tmp_path / "run") == ["checkpoint-2", "checkpoint-8"]


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, folder: str) -> Iterator[None]:
    """The disk is full while the manifest of `folder` is written."""
    fsync = os.fsync

    def full(handle: int) -> None:
        if folder in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        yield


def test_a_disk_that_fills_while_sealing_costs_no_earlier_checkpoint(
    whole: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = trainer(tmp_path / "run", save_total_limit=1)
    with failing(monkeypatch, "checkpoint-4"), pytest.raises(CheckpointError, match="could not be written") as error:
        made.train()
    for part in ("No space left on device", "MB are free", "another checkpoint takes", "Earlier checkpoints and the"):
        assert part in str(error.value)
    assert made.state.global_step == 4
    assert made.args.save_total_limit == 1
    resumed = trained(tmp_path / "run", save_total_limit=1, resume=True)
    assert any("checkpoint-4 was never finished" in text for text in warned(caplog))
    assert identical(whole[0], resumed)
    assert names(tmp_path / "run") == ["checkpoint-8"]


def test_a_disk_that_takes_no_more_while_state_is_written(whole: tuple[Any, Path], tmp_path: Path) -> None:
    """A real refusal by the system: files may not grow beyond what the first checkpoint's optimizer needs."""
    made = trainer(tmp_path / "run", callbacks=[Break(3, lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, small))])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    small = (20_000, hard)
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint-4 could not be written: .*File too large"):
            made.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert identical(whole[0], trained(tmp_path / "run", resume=True))


# --- folders that others touch ---


def test_an_output_dir_that_cannot_be_written_is_told_before_training(tmp_path: Path) -> None:
    steps = Steps()
    made = trainer(tmp_path / "run", callbacks=[steps])
    (tmp_path / "run").rmdir()
    (tmp_path / "run").write_text("in the way", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"cannot be written to '.*/run'.*Training has not begun"):
        made.train()
    assert steps.count == 0
    made.args.save_strategy = "no"
    made.train()
    assert steps.count == 8


def test_a_read_only_file_system_is_told_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(**_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    with pytest.raises(CheckpointError, match=r"Read-only file system\. Training has not begun"):
        trained(tmp_path / "run")


class Vanishing(Trainer):
    """A checkpoint disappears after it was found, before it is loaded."""

    def _find(self, wanted: Any) -> Any:
        found = super()._find(wanted)
        shutil.rmtree(found.folder)
        return found


def test_a_checkpoint_that_vanishes_before_it_is_loaded(run: tuple[Any, Path]) -> None:
    with pytest.raises((CheckpointError, MethodError), match=r"checkpoint-4.* (is gone now|does not exist)"):
        trained(run[1], resume=True, cls=Vanishing)


def test_a_checkpoint_that_vanishes_while_it_is_loaded(run: tuple[Any, Path]) -> None:
    class Delete(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            shutil.rmtree(run[1] / "checkpoint-4")

    with pytest.raises(CheckpointError, match="checkpoint-4 was whole a moment ago and is gone now"):
        trained(run[1], resume=True, callbacks=[Delete()])


def test_an_output_dir_deleted_while_training_is_made_again(tmp_path: Path) -> None:
    class Delete(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                shutil.rmtree(args.output_dir)

    trained(tmp_path / "run", callbacks=[Delete()])
    assert verify(tmp_path / "run/checkpoint-4").step == 4


# --- what cannot be saved ---


class FunctionInside(torch.optim.lr_scheduler.LambdaLR):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "shape": print}


def test_a_scheduler_that_cannot_be_saved_is_told_before_the_first_step(tmp_path: Path) -> None:
    made = trainer(tmp_path / "run")
    optimizer = torch.optim.SGD(made.model.parameters(), lr=0.1)
    made.optimizer, made.lr_scheduler = optimizer, FunctionInside(optimizer, lambda _: 1.0)
    with pytest.raises(TypeError, match=r"scheduler FunctionInside: shape is a builtins\.builtin_function"):
        made.train()
    assert made.state.global_step == 0


@dataclass(kw_only=True)
class Hoarder(Plugin):
    name: ClassVar[str] = "hoarder"

    kept: Any = field(init=False, default_factory=set)


def test_a_plugin_whose_state_cannot_be_saved_is_named_before_the_first_step(tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", ["lora", Hoarder()])
    with pytest.raises(TypeError, match=r"plugin hoarder: kept is a builtins\.set"):
        made.train()
    assert made.state.global_step == 0


# --- callbacks with a state, other ways to save ---


def test_a_callback_whose_state_is_dropped_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained(tmp_path / "run", callbacks=[EarlyStoppingCallback(3)], **BEST)
    caplog.clear()
    trained(tmp_path / "run", resume=True, callbacks=[EarlyStoppingCallback(3)], **BEST)
    assert any("The state of EarlyStoppingCallback in" in text for text in warned(caplog))


def test_a_callback_that_is_new_at_a_resume_does_not_stop_the_next_save(run: tuple[Any, Path]) -> None:
    made = trained(run[1], resume=True, callbacks=[EarlyStoppingCallback(100)], **BEST)
    assert made.state.global_step == 8


def test_a_model_saved_by_hand_leaves_no_pickle_either(tmp_path: Path) -> None:
    made = trained(tmp_path / "run", save_strategy="no")
    made.save_model(str(tmp_path / "model"))
    assert "training_args.json" in names(tmp_path / "model")
    assert "training_args.bin" not in names(tmp_path / "model")


def test_a_trial_of_a_search_is_saved_whole(tmp_path: Path) -> None:
    class Tuned(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                made._tune_save_checkpoint(str(tmp_path / "trial"))

    made = trainer(tmp_path / "run", callbacks=[Tuned()])
    made.train()
    folder = tmp_path / "trial/checkpoint-3"
    assert {"optimizer.json", "scheduler.json", "rng_state.json"} <= set(verify(folder).files)
    assert same(everything_of(made.model), everything_of(trained(tmp_path / "run", resume=folder).model))


def test_a_checkpoint_is_pushed_only_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[str] = []
    monkeypatch.setattr(
        transformers.Trainer,
        "_push_from_checkpoint",
        lambda self, folder: pushed.append(Path(verify(folder).folder).name),
    )
    made = trainer(tmp_path / "run", save_steps=4)
    made.args.push_to_hub = True
    made.train()
    assert pushed == ["checkpoint-4", "checkpoint-8"]
