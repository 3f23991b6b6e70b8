"""What each technique does to plain LoRA: MiniLM-L6 on the movie sentences, paired by seed and by test sentence.

    python -m benchmarks.techniques --seeds 4
    python -m benchmarks.techniques --group freezing --seeds 3

Same data, budget and learning rate for all (those of the demo, chosen for plain LoRA alone), 1,500 sentences to train
on, 1,000 to test on, one thread a process. The figures on the plugins' cards come from here.

Time is that of the processor, without evaluations. Memory is counted, not sampled, in every tenth step: bytes that
autograd saves for the backward pass, gradients, and the optimizer's state; its peak over the run. The weights
themselves and the allocator's overhead are not in it.
"""

from __future__ import annotations

# First of all: it silences what the libraries say when they are imported.
from examples.demo import quiet

quiet.before_imports()

import argparse  # noqa: E402
import json  # noqa: E402
import time  # noqa: E402
from collections.abc import Mapping  # noqa: E402
from concurrent.futures import ProcessPoolExecutor  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402
from multiprocessing import get_context  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402

from examples.demo.compare import EPOCHS, arguments, methods  # noqa: E402
from examples.demo.intervals import bootstrap  # noqa: E402

STEPS = EPOCHS * 94
"""Optimizer steps of 1,500 sentences in batches of 16, over all epochs."""

COUNTED_EVERY = 10
"""In how many steps memory is counted once: it costs time."""


@dataclass(frozen=True)
class Technique:
    """One way to train.

    Attributes:
        plugins: what is added to the tuner.
        tuner: what trains.
        arguments: what differs in the TrainingArguments.
        baseline: title of what it is compared with.
    """

    plugins: Mapping[str, Any] = field(default_factory=dict)
    tuner: str = "lora"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    baseline: str = "lora"


OWN_SCHEDULE = {"lr_scheduler_type": "constant", "warmup_steps": 0}
EVALUATED = {"eval_strategy": "steps", "eval_steps": STEPS // 12}
FULL = {"learning_rate": 1e-4}

GROUPS: Mapping[str, Mapping[str, Technique]] = {
    "all": {
        "lora": Technique(),
        "gradual_unfreeze": Technique({"gradual_unfreeze": {"every": STEPS // 12}}),
        "llrd": Technique({"llrd": {}}),
        "r3f": Technique({"r3f": {}}),
        "r3f, eps=0.05": Technique({"r3f": {"eps": 0.05}}),
        "lp_ft": Technique({"lp_ft": {}}),
        "the demo's combination": Technique(
            {k: v for k, v in list(methods(STEPS).values())[-1].items() if k != "lora"}
        ),
    },
    "freezing": {
        "lora": Technique(),
        "freeze, blocks=4": Technique({"freeze": {"blocks": 4}}),
        "freeze, blocks=4, trunk_cache": Technique({"freeze": {"blocks": 4}, "trunk_cache": {}}),
        "gradual_unfreeze": Technique({"gradual_unfreeze": {"every": STEPS // 12}}),
        "gradual_unfreeze, bottom_up": Technique(
            {"gradual_unfreeze": {"every": STEPS // 12, "direction": "bottom_up"}}
        ),
        "gradual_unfreeze, stall": Technique({"gradual_unfreeze": {"every": "stall"}}, arguments=EVALUATED),
        "chain_thaw": Technique({"chain_thaw": {"steps": STEPS // 9}}),
        "lisa": Technique({"lisa": {}}),
        "autofreeze": Technique({"autofreeze": {}}),
        "freezeout": Technique({"freezeout": {}}, arguments=OWN_SCHEDULE),
        "plasticity_freeze": Technique({"plasticity_freeze": {"every": 5}}),
        "surgical": Technique({"surgical": {}}),
        "surgical, snr": Technique({"surgical": {"criterion": "snr"}}),
        "discriminative_lr": Technique({"discriminative_lr": {}}),
        "slanted_triangular": Technique({"slanted_triangular": {}}, arguments=OWN_SCHEDULE),
        "ULMFiT: all three": Technique(
            {"gradual_unfreeze": {"every": STEPS // 12}, "discriminative_lr": {}, "slanted_triangular": {}},
            arguments=OWN_SCHEDULE,
        ),
        "freeze_plan: head, top 2, all": Technique(
            {
                "freeze_plan": {
                    "phases": [
                        {"train": "head", "steps": STEPS // 6},
                        {"train": ["head", "blocks 5-6"], "steps": STEPS // 3},
                        {"train": "all"},
                    ]
                }
            }
        ),
    },
    "full": {
        "full": Technique(tuner="full", arguments=FULL, baseline="full"),
        "lisa": Technique({"lisa": {}}, tuner="full", arguments=FULL, baseline="full"),
        "lisa, blocks alone": Technique({"lisa": {"embeddings": False}}, tuner="full", arguments=FULL, baseline="full"),
        "freeze, blocks=4": Technique({"freeze": {"blocks": 4}}, tuner="full", arguments=FULL, baseline="full"),
    },
}
"""Title → technique, by group."""


def main() -> None:
    """Run all techniques of a group for all seeds, two processes at a time, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4, help="how many, from 0 (default 4)")
    parser.add_argument("--group", choices=list(GROUPS), default="all", help="which techniques (default all)")
    parser.add_argument("--out", type=Path, default=Path("out/techniques"), help="folder (default out/techniques)")
    options = parser.parse_args()
    out = options.out / options.group
    out.mkdir(parents=True, exist_ok=True)
    seeds = range(options.seeds)
    # Techniques are interleaved within each seed, so that a busy minute of the machine falls on all of them alike.
    with ProcessPoolExecutor(max_workers=2, mp_context=get_context("spawn")) as pool:
        by_seed = list(pool.map(run_seed, seeds, [options.group] * len(seeds), [out] * len(seeds)))
    print(table(GROUPS[options.group], by_seed))


def run_seed(seed: int, group: str, out: Path) -> dict[str, dict[str, Any]]:
    """Train every technique once; what is already in the seed's file is not run again.

    Returns: title → `correct` (0 or 1 for each test sentence), processor `seconds` of training and `bytes` of memory.
    """
    file = out / f"seed-{seed}.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    for title, technique in GROUPS[group].items():
        if title not in results:
            results[title] = run(technique, seed, out / f"trainer-{seed}")
            file.write_text(json.dumps(results))
    return results


def run(technique: Technique, seed: int, folder: Path) -> dict[str, Any]:
    """Fine-tune MiniLM, and classify the test set once."""
    import torch
    from transformers import AutoTokenizer, PrinterCallback, set_seed

    from examples.inputs import minilm, movie_split
    from peft_plus import fit, get_model

    torch.set_num_threads(1)
    quiet.hide_progress_bars()
    set_seed(seed)
    method = {technique.tuner: {}, **technique.plugins}
    model = get_model(minilm(), method=method, task="SEQ_CLS", num_labels=2)
    data = model.peft_plus.task.preprocess(movie_split(), AutoTokenizer.from_pretrained(minilm()))
    args = arguments(folder, seed)
    for name, value in technique.arguments.items():
        setattr(args, name, value)
    args.__post_init__()
    counting = counting_trainer()
    started = time.process_time()
    fit(model, args, trainer_class=counting, train_dataset=data["train"], eval_dataset=data["dev"].select(range(200)))
    seconds = time.process_time() - started - counting.evaluating
    tester = counting(model, arguments(folder, seed))
    tester.remove_callback(PrinterCallback)
    prediction = tester.predict(data["test"])
    correct = np.argmax(prediction.predictions, -1) == prediction.label_ids
    return {
        "correct": correct.astype(int).tolist(),
        "seconds": seconds,
        "bytes": counting.peak,
    }


def counting_trainer() -> Any:
    """A Trainer class that counts the memory of every tenth step (`peak`) and the seconds of evaluations."""
    from benchmarks.memory import gradients_and_states, saved_activations
    from peft_plus import Trainer

    class Counting(Trainer):
        peak = 0
        evaluating = 0.0

        def evaluate(self, *args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                return super().evaluate(*args, **kwargs)
            finally:
                type(self).evaluating += time.process_time() - started

        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step % COUNTED_EVERY != 5:
                return super().training_step(model, *args, **kwargs)
            with saved_activations(model) as saved:
                loss = super().training_step(model, *args, **kwargs)
            type(self).peak = max(type(self).peak, saved.bytes + gradients_and_states(model, self.optimizer))
            return loss

    return Counting


def table(techniques: Mapping[str, Technique], by_seed: list[dict[str, dict[str, Any]]]) -> str:
    """Accuracy, the paired difference to the baseline with its 95 % bootstrap interval, time and memory; Markdown."""
    lines = [
        "| | accuracy, % | by seed | difference, points | time | memory, MB |",
        "|---|--:|---|--:|--:|--:|",
    ]
    for title, technique in techniques.items():
        base = technique.baseline
        correct, plain = (np.array([seed[name]["correct"] for seed in by_seed]) for name in (title, base))
        ratio = np.median([seed[title]["seconds"] / seed[base]["seconds"] for seed in by_seed])
        difference = bootstrap((correct - plain).mean(0))
        seeds = " ".join(f"{100 * share:.1f}" for share in correct.mean(1))
        interval = "" if title == base else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*_points(difference))
        memory = max(seed[title]["bytes"] for seed in by_seed) / 1e6
        lines.append(f"| {title} | {100 * correct.mean():.1f} | {seeds} | {interval} | {ratio:.2f} × | {memory:.0f} |")
    return "\n".join(lines)


def _points(estimate: Any) -> tuple[float, float, float]:
    return 100 * estimate.mean, 100 * estimate.low, 100 * estimate.high


if __name__ == "__main__":
    main()
