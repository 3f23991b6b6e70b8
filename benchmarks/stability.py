"""How much the seed decides: MiniLM-L6 with LoRA on 250 Amazon sentences, with each stability technique.

    python -m benchmarks.stability                                  # every method of the docs, 20 seeds each
    python -m benchmarks.stability --methods lora ema --seeds 5     # some of them
    python -m benchmarks.stability --rate 2e-2                      # at twice the rate that was chosen
    python -m benchmarks.stability --methods 'lora+{"mixout": {"p": 0.5}}'  # any other method

Always the same 250 sentences; a seed decides the head's and adapter's start, the order of the data, and the dropout.
400 other sentences are the dev set, on which anything is chosen; 1,000 more are the test set. The learning rate was
chosen for plain LoRA alone. All train for three epochs, as BERT's authors did, in batches of like length
(`length_buckets`), which saves half the time. What is done is not done again: `--out` holds every run's result.

Beside the tables it plays racing over the runs of the baseline: what half of what n runs cost would have found.
"""

from __future__ import annotations

# First of all: it silences what the libraries say when they are imported.
from examples.demo import quiet

quiet.before_imports()

import argparse  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402
from collections.abc import Mapping  # noqa: E402
from functools import cache, partial  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

TRAIN, DEV, TEST = 250, 400, 1_000
EPOCHS = 3
# Chosen for plain LoRA alone, by its mean accuracy on the dev set over seeds 0–3: 2e-3 gave .664, 5e-3 .854, 1e-2 .860,
# 2e-2 .809.
LEARNING_RATE = 1e-2
DOMAIN = "amazon"

METHODS: Mapping[str, Mapping[str, Any]] = {
    "lora": {},
    "llrd": {"llrd": {}},
    "r3f": {"r3f": {"eps": 0.05}},
    "r_drop": {"r_drop": {}},
    "mixout": {"mixout": {}},
    # The paper's 2e-5 is for full fine-tuning. Chosen like the rate above: 1e-3 gave .857, 2e-3 .856.
    "mosbach": {"mosbach": {"learning_rate": 1e-3}},
    "ema": {"ema": {}},
}
"""Title → plugins beside LoRA."""


@cache
def data(train: int = TRAIN, dev: int = DEV, test: int = TEST) -> Any:
    """Tokenised train, dev and test sentences, the same in every process."""
    from datasets import DatasetDict
    from transformers import AutoTokenizer

    from examples import inputs
    from peft_plus.tasks.seq_cls import SequenceClassification

    rows = inputs.sentences(DOMAIN).shuffle(seed=0)
    ends = {"train": (0, train), "dev": (train, train + dev), "test": (train + dev, train + dev + test)}
    split = DatasetDict({name: rows.select(range(*places)) for name, places in ends.items()})
    rows = SequenceClassification(num_labels=2).preprocess(split, AutoTokenizer.from_pretrained(inputs.minilm()))
    for name in ("dev", "test"):  # in the order that pads least
        lengths = [len(ids) for ids in rows[name]["input_ids"]]
        rows[name] = rows[name].select(sorted(range(len(lengths)), key=lengths.__getitem__))
    return rows


def factory(
    seeds: Any, *, plugins: Mapping[str, Any], epochs: float = EPOCHS, rate: float = LEARNING_RATE, **more: Any
) -> Any:
    """A Trainer of MiniLM with LoRA and plugins.

    Args:
        more: other training arguments.
    """
    from transformers import AutoTokenizer, PrinterCallback, ProgressCallback, TrainingArguments

    from examples import inputs
    from peft_plus import Trainer, get_model

    quiet.hide_progress_bars()
    model = get_model(inputs.minilm(), {"lora": {}, "length_buckets": {}, **plugins}, task="SEQ_CLS", num_labels=2)
    settings: dict[str, Any] = {
        "num_train_epochs": epochs,
        "learning_rate": rate,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 64,
        "eval_strategy": "steps",
        "eval_steps": 0.3,  # where racing would judge
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    trainer = Trainer(
        model,
        TrainingArguments("out/trainer", **{**settings, **more}),
        train_dataset=data()["train"],
        eval_dataset=data()["dev"],
        compute_metrics=model.peft_plus.task.compute_metrics,
        processing_class=AutoTokenizer.from_pretrained(inputs.minilm()),
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def both_splits(trainer: Any) -> dict[str, float]:
    """Accuracy on the dev set (`eval_accuracy`) and on the test set (`test_accuracy`)."""
    sets = data()
    found: dict[str, float] = {}
    for prefix, name in (("eval", "dev"), ("test", "test")):
        metrics = trainer.evaluate(sets[name], metric_key_prefix=prefix)
        found |= {key: metrics[key] for key in (f"{prefix}_accuracy", f"{prefix}_loss")}
    return found


def plugins_of(title: str) -> Mapping[str, Any]:
    """The plugins of a title: one of `METHODS`, a plugin's name, or `title+{json}`."""
    name, _, more = title.partition("+")
    own = METHODS.get(name, {name: {}})
    return {**own, **(json.loads(more) if more else {})}


def measure(title: str, options: argparse.Namespace) -> Any:
    """The runs of one method."""
    import peft_plus

    make = partial(factory, plugins=plugins_of(title), epochs=options.epochs, rate=options.rate)
    folder = options.out / f"{options.epochs:g}-epochs-at-{options.rate:g}" / f"seeds-{options.base}"
    if options.each_epoch:
        make, folder = partial(make, eval_strategy="epoch"), folder / "evaluated each epoch"
    return peft_plus.seeds(
        make,
        options.seeds,
        metric="eval_accuracy",
        out=folder / title.replace("/", "-"),
        base=options.base,
        evaluate=both_splits,
        workers=options.workers,
    )


def main() -> None:
    """Run what is asked for, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="titles, the baseline first")
    parser.add_argument("--seeds", type=int, default=20, help="runs of each (default 20)")
    parser.add_argument("--base", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--epochs", type=float, default=EPOCHS, help=f"default {EPOCHS}")
    parser.add_argument("--rate", type=float, default=LEARNING_RATE, help=f"default {LEARNING_RATE}")
    parser.add_argument("--each-epoch", action="store_true", help="evaluate as `adaptive` needs it, not for racing")
    parser.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--out", type=Path, default=Path("out/stability"), help="folder (default out/stability)")
    parser.add_argument("--plot", type=Path, help="a file for the drawing")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("peft_plus.seed_runs").setLevel(logging.INFO)
    runs = {title: measure(title, options) for title in options.methods}
    print(report(runs, options.methods[0], options.plot))
    if not options.each_epoch:
        print(f"\n{options.methods[0]}, raced:\n\n{raced(runs[options.methods[0]])}")


def report(runs: Mapping[str, Any], baseline: str, drawing: Path | None = None) -> str:
    """The tables of both splits."""
    from dataclasses import replace

    import numpy as np

    from peft_plus.seed_runs import compare_table
    from peft_plus.seed_runs.plot import plot
    from peft_plus.seed_runs.statistics import largest_share

    parts: list[str] = []
    for metric, name in (("eval_accuracy", "dev"), ("test_accuracy", "test")):
        own = {title: replace(one, metric=metric) for title, one in runs.items()}
        majority = largest_share(np.asarray(data()[name]["labels"]))
        parts.append(f"{name} set, {metric}:\n\n{compare_table(own, baseline=baseline, majority=majority)}")
        if drawing is not None and name == "test":
            plot(own, drawing)
    return "\n\n".join(parts)


def raced(runs: Any) -> str:
    """What racing at half the cost of all runs finds among them, by where it judges.

    Fewer runs are started where judging late is too dear for all; what is left of the half finishes the best.
    """
    import numpy as np

    from peft_plus.seed_runs.racing import Racing, simulate_racing

    done, final = runs.finished, np.asarray(list(runs.values.values()))
    max_steps = done[0].max_steps
    judged = [{step: metrics.get(runs.metric, np.nan) for step, metrics in one.evaluations} for one in done]
    rows = [
        "| judged at | r with the end | started | finished | cost in runs | mean found "
        f"| median best of {len(done)} | found no worse |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for step in sorted({step for one in judged for step in one if step < max_steps}):
        early = np.asarray([one.get(step, np.nan) for one in judged])  # of one that had diverged by then: none
        fraction, half = step / max_steps, len(done) / 2
        started = min(len(done), int((half - (1 - fraction)) / fraction))
        racing = Racing(fraction=fraction, keep=max(1, int((half - started * fraction) / (1 - fraction))))
        found, median, share = simulate_racing(early, final, racing=racing, n=started, whole=len(done))
        ended = np.isfinite(early) & np.isfinite(final)
        together = np.corrcoef(early[ended], final[ended])[0, 1]
        rows.append(
            f"| {fraction:.0%} | {together:.2f} | {started} | {racing.keep} | {racing.cost(started):.1f} "
            f"| {found:.4f} | {median:.4f} | {share:.0%} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
