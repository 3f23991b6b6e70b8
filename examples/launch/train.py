"""Fine-tune a text classifier: one script for one CPU, many GPUs, and several machines.

```console
$ python examples/launch/train.py --model MODEL --data sentences.csv
$ accelerate launch --config_file examples/launch/ddp.yaml examples/launch/train.py --model MODEL --data sentences.csv
```

It asks nothing about processes: `accelerate launch` says through the environment how many there are and what shares
the model, the Trainer reads it, and peft_plus sets what the method needs, or says why the two do not go together.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from datasets import load_dataset
from transformers import AutoTokenizer, TrainingArguments, set_seed

import peft_plus
from peft_plus import get_model


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and save.

    Args:
        arguments: of the command line.
    """
    parser = argparse.ArgumentParser(description="Fine-tune a text classifier with peft_plus.")
    parser.add_argument("--model", required=True, help="a hub id or a folder")
    parser.add_argument("--data", required=True, help="a CSV file with the columns text and label (0, 1, …)")
    parser.add_argument("--method", nargs="+", default=["lora", "r3f"], help="a tuner and plugins, by name")
    parser.add_argument("--output", default="out", help="a folder; the adapter goes into its sub-folder adapter")
    parser.add_argument("--batch", type=int, default=16, help="rows in a micro-batch of one process")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of one process in a step")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=42)
    given = parser.parse_args(arguments)

    rows = load_dataset("csv", data_files=given.data, split="train")
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    set_seed(given.seed)  # so that all processes draw the same first values
    # Before the arguments: from then on DeepSpeed ZeRO-3 would split weights while they load.
    model = get_model(given.model, given.method, task="SEQ_CLS", num_labels=len(set(rows["label"])))
    args = TrainingArguments(
        given.output,
        per_device_train_batch_size=given.batch,
        gradient_accumulation_steps=given.accumulation,
        num_train_epochs=given.epochs,
        learning_rate=given.lr,
        save_strategy="no",
        logging_steps=10,
        seed=given.seed,
        report_to=[],
    )
    with args.main_process_first():  # one process tokenises, the others read what it cached
        data = model.peft_plus.task.preprocess(rows, tokenizer)
    trainer = peft_plus.Trainer(model, args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    # Every process calls this, since a sharded model is put together by all; the first one writes.
    trainer.save_model(f"{given.output}/adapter")
    if trainer.is_world_process_zero():
        print(f"{trainer.accelerator.num_processes} process(es), {trainer.state.global_step} steps")
        print(model.peft_plus)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
