"""LoRA on a 4-bit language model: SmolLM2-135M learns to write like movie reviewers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from datasets import DatasetDict
from transformers import AutoTokenizer, PrinterCallback, TrainingArguments, set_seed

from examples import inputs
from peft_plus import Trainer, get_model

from .compare import OnStep

BATCH = 8
HELD_OUT = 32


@dataclass(frozen=True)
class Losses:
    """The course of the run, in nats per token.

    Attributes:
        steps: the training loss of each step. Every step sees other sentences, so single ones jump.
        held_out: the loss on the same dev sentences before and after.
        sentences: how many those are.
        trainable, parameters: how many parameters trained, of how many.
        seconds: training alone.
    """

    steps: list[float]
    held_out: tuple[float, float]
    sentences: int
    trainable: int
    parameters: int
    seconds: float

    @property
    def edge(self) -> int:
        """How many steps count as first, and as many as last."""
        return min(5, len(self.steps) // 2)

    @property
    def ends(self) -> tuple[float, float]:
        """The mean training loss of the first and of the last `edge` steps."""
        return sum(self.steps[: self.edge]) / self.edge, sum(self.steps[-self.edge :]) / self.edge

    @property
    def fell(self) -> bool:
        """Whether the loss on the same sentences is lower after than before."""
        return self.held_out[1] < self.held_out[0]


def train(data: DatasetDict, steps: int, folder: Path, advance: Callable[[], None]) -> Losses:
    """Train for `steps` optimizer steps on the texts of `data`.

    Args:
        data: splits `train` and `dev` with a column `text`.
        folder: where the Trainer may write.
        advance: called after each optimizer step.
    """
    set_seed(0)
    model = get_model(inputs.smollm2(), method="lora", task="CAUSAL_LM", quantization="nf4")
    encoded = model.peft_plus.task.preprocess(data, AutoTokenizer.from_pretrained(inputs.smollm2()))
    args = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=2e-3,
        # Not grouped by length: batches would go from long to short, whose tokens are harder, and hide the fall.
        train_sampling_strategy="random",
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    held_out = encoded["dev"].select(range(min(HELD_OUT, len(encoded["dev"]))))
    trainer = Trainer(model, args, train_dataset=encoded["train"], eval_dataset=held_out, callbacks=[OnStep(advance)])
    trainer.remove_callback(PrinterCallback)
    before = trainer.evaluate()["eval_loss"]
    seconds = trainer.train().metrics["train_runtime"]
    after = trainer.evaluate()["eval_loss"]
    trainable, parameters = model.get_nb_trainable_parameters()
    return Losses(
        steps=[row["loss"] for row in trainer.state.log_history if "loss" in row],
        held_out=(before, after),
        sentences=len(held_out),
        trainable=trainable,
        parameters=parameters,
        seconds=seconds,
    )
