"""The loops that a scenario runs in: the Trainer, TRL's, a bare Accelerate loop, the same sharded, or interrupted."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

import peft_plus
from peft_plus import MethodError, Session, with_plugins
from tests.tokenizers import tiny_tokenizer
from tests.training import quiet

from .scenarios import PREFERENCES, Scenario, Stream, Weights, build, collator_of, rows_of


def with_trainer(
    model: nn.Module,
    scenario: Scenario,
    processes: int,
    folder: Path,
    trainer: type[Any] = peft_plus.Trainer,
    resume: str | None = None,
    callbacks: Any = None,
    **settings: Any,
) -> None:
    """`Trainer.train`, or `fit` where there are stages."""
    args = quiet(
        folder,
        per_device_train_batch_size=scenario.batch * 2 // processes,
        gradient_accumulation_steps=scenario.accumulation,
        max_steps=scenario.steps,
        optim="adamw_torch" if scenario.adamw else "sgd",
        learning_rate=1e-3 if scenario.adamw else 0.05,
        train_sampling_strategy="random" if scenario.shuffled else "sequential",
        activation_checkpointing=scenario.checkpointing,
        logging_strategy="no",
        **settings,
    )
    check_processes(args.world_size, processes)
    rows = rows_of(scenario, processes)
    data: dict[str, Any] = {
        "train_dataset": Stream(rows) if scenario.stream else rows,
        "data_collator": collator_of(scenario),
    }
    if scenario.texts:
        data["processing_class"] = tiny_tokenizer("encoder")
    if scenario.stages:
        peft_plus.fit(model, args, **data)
    else:
        trainer(model, args, **data, callbacks=callbacks).train(resume_from_checkpoint=resume)


def with_session(model: nn.Module, scenario: Scenario, processes: int, folder: Path, sharded: bool = False) -> None:
    """A bare Accelerate loop; over Accelerate's own FSDP2 one that also asks for checkpoints, and is told why not."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=scenario.accumulation)
    check_processes(accelerator.num_processes, processes)
    if sharded:
        shard(accelerator)
    if scenario.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    session = Session(model, accelerator, max_steps=scenario.steps)
    optimizer = session.optimizer(torch.optim.SGD, lr=0.05)
    loader = session.loader(
        rows_of(scenario, processes),
        batch_size=scenario.batch * 2 // processes,
        collate_fn=collator_of(scenario),
        shuffle=scenario.shuffled,
    )
    if sharded:
        note_refusal(folder, lambda: session.resume(folder))
    model.train()
    for micro_batch in session.batches(loader):
        with accelerator.accumulate(session.model):
            accelerator.backward(session.loss(micro_batch))
            optimizer.step()
            optimizer.zero_grad()
    if sharded:
        check_sharded(session.model)
        note_refusal(folder, lambda: session.save(folder))


def shard(accelerator: Any) -> None:
    """Accelerate takes no FSDP plugin on a CPU; here it is given after the fact, and all that follows is its own."""
    for shared in (PartialState(), accelerator.state):  # each takes what the other says whenever it is made anew
        shared.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        state_dict_type="FULL_STATE_DICT",
        # Without it Accelerate 1.15 shards BERT's embeddings twice and fails.
        transformer_cls_names_to_wrap=["BertLayer"],
    )


def check_sharded(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # an evaluation leaves the outermost one whole
    if not all(isinstance(tensor, DTensor) for tensor in model.parameters()):
        raise RuntimeError("nothing was sharded")


class Sharded(peft_plus.Trainer):
    """The Trainer over Accelerate's own FSDP2."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        shard(self.accelerator)
        self.is_fsdp_enabled = True

    def train(self, *args: Any, **kwargs: Any) -> Any:
        result = super().train(*args, **kwargs)
        check_sharded(self.model)
        self.save_model(str(Path(self.args.output_dir or ".") / "saved"))
        return result


def with_fsdp2(model: nn.Module, scenario: Scenario, processes: int, folder: Path) -> None:
    """On one process the plain Trainer."""
    with_trainer(model, scenario, processes, folder, Sharded if processes > 1 else peft_plus.Trainer)


class Stop(TrainerCallback):
    """Ends a run after so many steps."""

    def __init__(self, step: int = 4) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= state.global_step == self._step


def with_fsdp2_resumed(model: nn.Module, scenario: Scenario, processes: int, folder: Path) -> None:
    """A run that stops after step 4, and another that goes on from its checkpoint of step 3."""
    saving = {"save_strategy": "steps", "save_steps": 3}
    interrupted = build(scenario)
    with_trainer(interrupted, scenario, processes, folder, Sharded, callbacks=[Stop()], **saving)
    with_trainer(model, scenario, processes, folder, Sharded, str(folder / "checkpoint-3"), **saving)


def with_trainer_resumed(model: nn.Module, scenario: Scenario, processes: int, folder: Path) -> None:
    """A run that stops in the middle of an epoch, two steps after the checkpoint from which another goes on."""
    saving = {"save_strategy": "steps", "save_steps": 11}
    with_trainer(build(scenario), scenario, processes, folder, callbacks=[Stop(13)], **saving)
    with_trainer(model, scenario, processes, folder, resume=str(folder / "checkpoint-11"), **saving)


class Worsens(Sharded):
    """Each evaluation is worse than the one before."""

    def __init__(self, *args: Any, train_dataset: Any, **kwargs: Any) -> None:
        kwargs |= {
            "eval_dataset": train_dataset[:4],
            "compute_metrics": lambda _: {"age": float(self.state.global_step)},
        }
        super().__init__(*args, train_dataset=train_dataset, **kwargs)


def with_evaluations(
    model: nn.Module, scenario: Scenario, processes: int, folder: Path, kind: type[Any] = peft_plus.Trainer
) -> None:
    """An evaluation after each second step; on one process always the plain Trainer."""

    def made(*args: Any, **kwargs: Any) -> Any:
        return (kind if processes > 1 else peft_plus.Trainer)(*args, **kwargs, eval_dataset=kwargs["train_dataset"][:4])

    made_of: Any = made
    with_trainer(model, scenario, processes, folder, made_of, eval_strategy="steps", eval_steps=2)


class Keep(TrainerCallback):
    """The weights as they were after step 3, whether they trained there or not."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 3:
            self.kept = whole(model, model.peft_plus.params)


def with_fsdp2_best(model: Any, scenario: Scenario, processes: int, folder: Path) -> None:
    """A run that ends with its best checkpoint, that of step 3."""
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "age", "greater_is_better": False}
    keep = Keep()
    with_trainer(model, scenario, processes, folder, Worsens, callbacks=[keep], **settings)
    now = whole(model, keep.kept)
    if lost := [name for name in keep.kept if not torch.equal(keep.kept[name], now[name])]:
        raise RuntimeError(f"{len(lost)} weights are not those of the best step, e.g. {lost[0]!r}")


def with_fsdp2_refused(model: nn.Module, scenario: Scenario, processes: int, folder: Path) -> None:
    """The same with an optimizer that keeps no state."""
    note_refusal(folder, lambda: with_fsdp2_resumed(model, scenario, processes, folder))


def with_sharded_session(model: nn.Module, scenario: Scenario, processes: int, folder: Path) -> None:
    """On one process the plain loop."""
    with_session(model, scenario, processes, folder, sharded=processes > 1)


def note_refusal(folder: Path, act: Callable[[], Any]) -> None:
    """Leave what this rank is told for the test."""
    try:
        act()
    except MethodError as error:
        folder.mkdir(exist_ok=True)
        with (folder / f"refused.{PartialState().process_index}").open("a") as file:
            file.write(f"{error}\n")


def with_trl(model: nn.Module, scenario: Scenario, processes: int, folder: Path, kind: str) -> None:
    """TRL's Trainer for a kind of training: fine-tuning on rows of different length, or on preferences."""
    import trl
    from datasets import Dataset

    if kind == "SFT":
        rows = [
            {key: row[key][row["attention_mask"] == 1].tolist() for key in ("input_ids", "labels")}
            for row in rows_of(scenario, processes)
        ]
        settings: dict[str, Any] = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    else:
        rows, settings = [PREFERENCES[i % len(PREFERENCES)] for i in range(scenario.rows)], {}
    args = quiet(
        folder,
        kind=getattr(trl, f"{kind}Config"),
        per_device_train_batch_size=scenario.batch * 2 // processes,
        gradient_accumulation_steps=scenario.accumulation,
        max_steps=scenario.steps,
        optim="sgd",
        learning_rate=0.05,
        max_grad_norm=0.0,
        bf16=False,
        train_sampling_strategy="sequential",
        gradient_checkpointing=scenario.checkpointing,
        logging_strategy="no",
        **settings,
    )
    check_processes(args.world_size, processes)
    trainer = with_plugins(getattr(trl, f"{kind}Trainer"))
    trainer(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer("decoder")
    ).train()


def check_processes(number: int, expected: int) -> None:
    if number != expected:
        raise RuntimeError(f"{number} processes run instead of {expected}")


LOOPS: dict[str, Callable[[nn.Module, Scenario, int, Path], Any]] = {
    "trainer": with_trainer,
    "session": with_session,
    "fsdp2": with_fsdp2,
    "trainer, evaluated": with_evaluations,
    "fsdp2, evaluated": partial(with_evaluations, kind=Sharded),
    "resumed": with_trainer_resumed,
    "fsdp2, resumed": with_fsdp2_resumed,
    "fsdp2, best": with_fsdp2_best,
    "fsdp2, refused": with_fsdp2_refused,
    "session, fsdp2": with_sharded_session,
    "sft": partial(with_trl, kind="SFT"),
    "dpo": partial(with_trl, kind="DPO"),
}
"""Kind of loop → what trains a model in it."""


def run(loop: str, scenario: Scenario, *, processes: int, folder: Path, saved: Path) -> tuple[Weights, Weights]:
    """Train one scenario.

    Args:
        folder: to write into.
        saved: a saved tiny BERT, to be loaded quantised.
    Returns: everything that may train, before and after.
    """
    model = build(scenario, saved)
    before = trainable(model)
    LOOPS[loop](model, scenario, processes, folder)
    return before, trainable(model)


def trainable(model: nn.Module) -> Weights:
    """Copies of everything that may train, put together from its shards."""
    return whole(model, {name for name, tensor in model.named_parameters() if tensor.requires_grad})


def whole(model: nn.Module, names: Collection[str]) -> Weights:
    """Copies of some parameters, put together from their shards."""
    tensors = {name: tensor for name, tensor in model.named_parameters() if name in names}
    full = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    return {name: tensor.detach().clone() for name, tensor in full.items()}
