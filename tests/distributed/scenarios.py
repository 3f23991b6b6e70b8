"""What is trained on one process and on two: each scenario is one short run whose weights can be compared.

Rank r of two gets rows [2bs + br, 2bs + br + b) of micro-batch s, one process with the doubled batch gets all 2b of
them, so both see the same rows in the same step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset
from transformers import default_data_collator

import peft_plus
from peft_plus import Session, get_model
from tests.models import LENGTH, NUM_LABELS, PAD, batch, tiny
from tests.training import quiet

Row = dict[str, Tensor]
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Scenario:
    """One run.

    Attributes:
        method: as for `get_model`.
        model, task: keys of `tests.models`.
        rows: examples in the data.
        padded: so many of the first rows are appended for one process, as two processes repeat them by themselves.
        silent: the rows of rank 1 carry no label that counts.
        stream: the data have no length.
        batch: rows in a micro-batch of one of two processes.
        dynamic: pad each micro-batch to its own longest row, so that ranks differ in length.
        steps: optimizer steps.
        accumulation: micro-batches of one process in a step.
        exact: compute in fp64, where the run would blow up fp32's rounding (AdamW on vanishing gradients, T5's large
            logits): what is left is what the processes do differently.
        adamw: with AdamW; otherwise plain SGD, whose updates are as exact as the gradients.
        stages: whether the method plans several stages, so that `fit` runs it.
        thawed: the part of a name that tells base weights which train beside the tuner.
    """

    method: Any
    model: str = "bert"
    task: str = "SEQ_CLS"
    rows: int = 32
    padded: int = 0
    silent: bool = False
    stream: bool = False
    batch: int = 2
    dynamic: bool = False
    steps: int = 8
    accumulation: int = 1
    exact: bool = False
    adamw: bool = False
    shuffled: bool = False
    checkpointing: bool = False
    quantization: str | None = None
    stages: bool = False
    thawed: str = ""


LORA = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.0, "init_lora_weights": False}  # B ≠ 0, so that all moves at once
UNFREEZE = {"every": 2}
NOISE = {"eps": 0.3, "weight": 1.0}
ALL = {"lora": LORA, "gradual_unfreeze": UNFREEZE, "llrd": {"decay": 0.7}, "r3f": NOISE}
QUIET = {name: settings for name, settings in ALL.items() if name != "r3f"}

SCENARIOS: dict[str, Scenario] = {
    "lora": Scenario({"lora": LORA}),
    "full": Scenario("full"),
    "gradual_unfreeze": Scenario({"lora": LORA, "gradual_unfreeze": UNFREEZE}),
    "llrd": Scenario({"lora": LORA, "llrd": {"decay": 0.7}}),
    "r3f": Scenario({"lora": LORA, "r3f": NOISE}),
    "all": Scenario(ALL),
    "all, AdamW": Scenario(ALL, adamw=True, exact=True),
    "accumulation": Scenario(ALL, accumulation=2, rows=64),
    "accumulation, Llama": Scenario(
        ALL, model="llama", task="CAUSAL_LM", accumulation=2, rows=64, dynamic=True, exact=True
    ),
    "accumulation, T5": Scenario(ALL, model="t5", task="SEQ_2_SEQ_LM", accumulation=2, rows=64, exact=True),
    "checkpointing": Scenario(ALL, accumulation=2, rows=64, checkpointing=True),
    "checkpointing, Llama": Scenario(ALL, model="llama", task="CAUSAL_LM", checkpointing=True, exact=True),
    "shuffled": Scenario(ALL, shuffled=True),
    # 22 rows are 5½ micro-batches of 4: in the last one, rank 1 gets the first two rows once more.
    "incomplete": Scenario(ALL, rows=22, padded=2, steps=9),
    "incomplete, accumulation": Scenario(ALL, rows=22, padded=2, steps=9, accumulation=2),
    # 18 rows: rank 0 gets the last two and two of the first, rank 1 goes on with the next of the first.
    "incomplete by more": Scenario(ALL, rows=34, batch=4, padded=6, steps=8),
    "stream": Scenario(ALL, rows=64, stream=True),
    "no labels on one rank": Scenario(
        ALL, model="llama", task="CAUSAL_LM", accumulation=2, rows=64, silent=True, exact=True
    ),
    "nf4": Scenario(ALL, quantization="nf4"),
    "nf4, checkpointing": Scenario(ALL, quantization="nf4", checkpointing=True),
    "thawed": Scenario({"lora": LORA}, thawed="output.LayerNorm"),
    "lp_ft": Scenario({"lora": LORA, "lp_ft": {"probe_epochs": 0.5, "probe_lr": 0.05}}, stages=True),
}


# ---- data --------------------------------------------------------------------------------------------------------


def rows_of(scenario: Scenario, processes: int) -> list[Row]:
    """Single examples with very different numbers of labels; those that two processes repeat come once more."""
    data = batch(scenario.model, scenario.task, rows=scenario.rows)
    if data["labels"].dim() > 1:
        kept = 2 + torch.arange(scenario.rows) * 5 % 6  # between 2 and 7 labels, uneven in any order
        data["labels"] = data["labels"].masked_fill(torch.arange(LENGTH) >= kept[:, None], -100)
    if scenario.silent:
        on_rank_1 = torch.arange(scenario.rows) // scenario.batch % 2 == 1
        data["labels"] = data["labels"].masked_fill(on_rank_1[:, None], -100)
    rows = [{key: value[i] for key, value in data.items()} for i in range(scenario.rows)]
    return rows + rows[: scenario.padded if processes == 1 else 0]


class Stream(IterableDataset[Row]):
    """Rows without a length."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = rows

    def __iter__(self) -> Any:
        return iter(self._rows)


def shortest(rows: list[Row]) -> dict[str, Tensor]:
    """Collate, then cut the columns that are padding in every row."""
    made = default_data_collator(rows)
    kept = int((made["input_ids"] != PAD).sum(1).max())
    return {key: value[:, :kept] if value.dim() > 1 else value for key, value in made.items()}


# ---- loops -------------------------------------------------------------------------------------------------------


def with_trainer(
    model: nn.Module, scenario: Scenario, processes: int, folder: Path, trainer: type[Any] = peft_plus.Trainer
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
    )
    check_processes(args.world_size, processes)
    rows = rows_of(scenario, processes)
    data: dict[str, Any] = {
        "train_dataset": Stream(rows) if scenario.stream else rows,
        "data_collator": shortest if scenario.dynamic else default_data_collator,
    }
    if scenario.stages:
        peft_plus.fit(model, args, **data)
    else:
        trainer(model, args, **data).train()


def with_session(model: nn.Module, scenario: Scenario, processes: int, folder: Path) -> None:
    """A bare Accelerate loop."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=scenario.accumulation)
    check_processes(accelerator.num_processes, processes)
    if scenario.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    session = Session(model, accelerator, max_steps=scenario.steps)
    optimizer = session.optimizer(torch.optim.SGD, lr=0.05)
    loader = session.loader(
        rows_of(scenario, processes),
        batch_size=scenario.batch * 2 // processes,
        collate_fn=shortest if scenario.dynamic else default_data_collator,
        shuffle=scenario.shuffled,
    )
    model.train()
    for micro_batch in session.batches(loader):
        with accelerator.accumulate(session.model):
            accelerator.backward(session.loss(micro_batch))
            optimizer.step()
            optimizer.zero_grad()


class Sharded(peft_plus.Trainer):
    """Accelerate takes no FSDP plugin on a CPU; this one is given after the fact, and all that follows is its own."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state: Any = self.accelerator.state
        for shared in (PartialState(), state):  # each takes what the other says whenever it is made anew
            shared.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            reshard_after_forward=True,
            state_dict_type="FULL_STATE_DICT",
            # Without it Accelerate 1.15 shards BERT's embeddings twice and fails.
            transformer_cls_names_to_wrap=["BertLayer"],
        )
        self.is_fsdp_enabled = True

    def train(self, *args: Any, **kwargs: Any) -> Any:
        result = super().train(*args, **kwargs)
        if not all(isinstance(tensor, DTensor) for tensor in self.model.parameters()):
            raise RuntimeError("nothing was sharded")
        self.save_model(str(Path(self.args.output_dir or ".") / "saved"))
        return result


def with_fsdp2(model: nn.Module, scenario: Scenario, processes: int, folder: Path) -> None:
    """The Trainer over Accelerate's own FSDP2; on one process the plain one."""
    with_trainer(model, scenario, processes, folder, Sharded if processes > 1 else peft_plus.Trainer)


def check_processes(number: int, expected: int) -> None:
    if number != expected:
        raise RuntimeError(f"{number} processes run instead of {expected}")


LOOPS: dict[str, Callable[[nn.Module, Scenario, int, Path], None]] = {
    "trainer": with_trainer,
    "session": with_session,
    "fsdp2": with_fsdp2,
}
"""Kind of loop → what trains a model in it."""


def run(loop: str, scenario: Scenario, *, processes: int, folder: Path, saved: Path) -> tuple[Weights, Weights]:
    """Train one scenario.

    Args:
        folder: to write into.
        saved: a saved tiny BERT, to be loaded quantised.
    Returns: everything that may train, before and after.
    """
    torch.manual_seed(0)
    base: Any = tiny(scenario.model, scenario.task).to(torch.float64 if scenario.exact else torch.float32)
    options: dict[str, Any] = {}
    if scenario.quantization is not None:
        base, options = str(saved), {"num_labels": NUM_LABELS, "quantization": scenario.quantization}
    model = get_model(base, scenario.method, task=scenario.task, **options)
    if scenario.thawed:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or scenario.thawed in name)
        peft_plus.attach(model, {"gradual_unfreeze": UNFREEZE})
    before = trainable(model)
    LOOPS[loop](model, scenario, processes, folder)
    return before, trainable(model)


def trainable(model: nn.Module) -> Weights:
    """Copies of everything that may train, put together from its shards."""
    tensors = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    return {name: tensor.detach().clone() for name, tensor in whole.items()}
