"""Two methods, the same data, seeds and steps: plain LoRA, and LoRA with three plugins on top."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import DatasetDict
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from examples import inputs
from peft_plus import Trainer, get_model

EPOCHS = 2
BATCH = 16
# Chosen once, for plain LoRA alone, by its accuracy on the dev set after 2 epochs with seed 0: 5e-4 gave .678, 1e-3
# .808, 2e-3 .824, 5e-3 .822. Nothing was tuned for the combination.
LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class Size:
    """How much is trained and measured."""

    train: int
    dev: int
    test: int
    seeds: tuple[int, ...]

    @property
    def steps(self) -> int:
        """Optimizer steps of one run."""
        return EPOCHS * math.ceil(self.train / BATCH)


@dataclass
class Outcome:
    """One fine-tuned model.

    Attributes:
        model: as it was after the last step; nothing was selected on the dev set.
        dev: accuracy on the dev set after each epoch.
        correct: for each test example, in order, whether it was classified rightly.
        trainable: how many parameters trained.
        seconds: training alone, without the evaluations.
        terms: plugin's loss term → its mean over the run.
    """

    model: Any
    dev: list[float]
    correct: np.ndarray
    trainable: int
    seconds: float
    terms: dict[str, float]


def methods(steps: int) -> dict[str, Mapping[str, Mapping[str, Any]]]:
    """What is compared, by its title: tuner and plugins with their settings, as `get_model` takes them.

    Args:
        steps: optimizer steps of a run.
    """
    combination = {
        "lora": {},
        # The head and six blocks: seven groups. Six thaws, the last of them halfway through the run.
        "gradual_unfreeze": {"every": max(1, steps // 12)},
        "llrd": {},
        # About one standard deviation (.056) of MiniLM's word embeddings. The paper's 1e-5 is meant for fp16 models of
        # another scale; here it changes the logits by less than fp32 can tell, and so does nothing.
        "r3f": {"eps": 0.05},
    }
    return {" + ".join(method): method for method in ({"lora": {}}, combination)}


def sentences(size: Size) -> DatasetDict:
    """The movie sentences, cut to size. Columns `text`, `valence` and `label`."""
    split = inputs.movie_split()
    return DatasetDict({name: split[name].select(range(getattr(size, name))) for name in ("train", "dev", "test")})


def fine_tune(
    method: Mapping[str, Mapping[str, Any]], seed: int, data: DatasetDict, folder: Path, advance: Callable[[], None]
) -> Outcome:
    """Fine-tune MiniLM once and classify the test set, once.

    Args:
        method: one of `methods`.
        seed: of the head's and LoRA's start, and of the order of the data.
        data: from `sentences`.
        folder: where the Trainer may write.
        advance: called after each optimizer step.
    """
    set_seed(seed)
    model = get_model(inputs.minilm(), method=method, task="SEQ_CLS", num_labels=2)
    task = model.peft_plus.task
    encoded = task.preprocess(data, AutoTokenizer.from_pretrained(inputs.minilm()))
    args = arguments(folder, seed, eval_strategy="epoch", logging_steps=1)
    trainer = Trainer(
        model,
        args,
        train_dataset=encoded["train"],
        eval_dataset=encoded["dev"],
        compute_metrics=task.compute_metrics,
        callbacks=[OnStep(advance)],
    )
    trainer.remove_callback(PrinterCallback)
    runtime = trainer.train().metrics["train_runtime"]
    log = trainer.state.log_history
    prediction = trainer.predict(encoded["test"])
    return Outcome(
        model=model,
        dev=[row["eval_accuracy"] for row in log if "eval_accuracy" in row],
        correct=np.argmax(prediction.predictions, -1) == prediction.label_ids,
        trainable=model.get_nb_trainable_parameters()[0],
        seconds=runtime - sum(row.get("eval_runtime", 0) for row in log),
        terms={name: float(np.mean([row[name] for row in log if name in row])) for name in ("r3f",) if name in method},
    )


def arguments(folder: Path, seed: int, **more: Any) -> TrainingArguments:
    """The budget that every method gets: batches grouped by length, a tenth of the steps to warm up."""
    return TrainingArguments(
        str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=50,
        learning_rate=LEARNING_RATE,
        warmup_steps=0.1,
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
        **more,
    )


class OnStep(TrainerCallback):
    """Calls a function after each optimizer step."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._function()
