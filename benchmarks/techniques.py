"""What each technique does to plain LoRA: MiniLM-L6 on the movie sentences, paired by seed and by test sentence.

    python -m benchmarks.techniques --seeds 4

Same data, budget and learning rate for all (those of the demo, chosen for plain LoRA alone), 1,500 sentences to train
on, 1,000 to test on, one thread a process. The figures on the plugins' cards come from here.
"""

from __future__ import annotations

# First of all: it silences what the libraries say when they are imported.
from examples.demo import quiet

quiet.before_imports()

import argparse  # noqa: E402
import json  # noqa: E402
from collections.abc import Mapping  # noqa: E402
from concurrent.futures import ProcessPoolExecutor  # noqa: E402
from multiprocessing import get_context  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402

from examples.demo.compare import EPOCHS, arguments, methods  # noqa: E402
from examples.demo.intervals import bootstrap  # noqa: E402

STEPS = EPOCHS * 94
"""Optimizer steps of 1,500 sentences in batches of 16, over all epochs."""

TECHNIQUES: Mapping[str, Mapping[str, Any]] = {
    "lora": {},
    "gradual_unfreeze": {"gradual_unfreeze": {"every": STEPS // 12}},
    "llrd": {"llrd": {}},
    "r3f": {"r3f": {}},
    "r3f, eps=0.05": {"r3f": {"eps": 0.05}},
    "lp_ft": {"lp_ft": {}},
    "the demo's combination": {k: v for k, v in list(methods(STEPS).values())[-1].items() if k != "lora"},
}
"""What is added to `lora`, by its title."""


def main() -> None:
    """Run all techniques for all seeds, two processes at a time, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4, help="how many, from 0 (default 4)")
    parser.add_argument("--out", type=Path, default=Path("out/techniques"), help="folder (default out/techniques)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    # Techniques are interleaved within each seed, so that a busy minute of the machine falls on all of them alike.
    with ProcessPoolExecutor(max_workers=2, mp_context=get_context("spawn")) as pool:
        by_seed = list(pool.map(run_seed, range(options.seeds), [options.out] * options.seeds))
    print(table(by_seed))


def run_seed(seed: int, out: Path) -> dict[str, dict[str, Any]]:
    """Train every technique once; what is already in the seed's file is not run again.

    Returns: title → `correct` (0 or 1 for each test sentence) and `seconds` of training.
    """
    file = out / f"seed-{seed}.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    for title, plugins in TECHNIQUES.items():
        if title not in results:
            results[title] = run(plugins, seed, out / f"trainer-{seed}")
            file.write_text(json.dumps(results))
    return results


def run(plugins: Mapping[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    """Fine-tune MiniLM with LoRA and these plugins, and classify the test set once."""
    import torch
    from transformers import AutoTokenizer, PrinterCallback, set_seed

    from examples.inputs import minilm, movie_split
    from peft_plus import Trainer, fit, get_model

    torch.set_num_threads(1)
    quiet.hide_progress_bars()
    set_seed(seed)
    model = get_model(minilm(), method={"lora": {}, **plugins}, task="SEQ_CLS", num_labels=2)
    data = model.peft_plus.task.preprocess(movie_split(), AutoTokenizer.from_pretrained(minilm()))
    args = arguments(folder, seed)
    seconds = sum(output.metrics["train_runtime"] for output in fit(model, args, train_dataset=data["train"]))
    tester = Trainer(model, args)
    tester.remove_callback(PrinterCallback)
    prediction = tester.predict(data["test"])
    correct = np.argmax(prediction.predictions, -1) == prediction.label_ids
    return {"correct": correct.astype(int).tolist(), "seconds": seconds}


def table(by_seed: list[dict[str, dict[str, Any]]]) -> str:
    """Accuracy, the paired difference to plain LoRA with its 95 % bootstrap interval, and time as a ratio; Markdown."""
    lines = [
        "| lora + | accuracy, % | by seed | difference, points | time |",
        "|---|--:|---|--:|--:|",
    ]
    plain = np.array([seed["lora"]["correct"] for seed in by_seed])
    for title in TECHNIQUES:
        correct = np.array([seed[title]["correct"] for seed in by_seed])
        ratio = np.median([seed[title]["seconds"] / seed["lora"]["seconds"] for seed in by_seed])
        difference = bootstrap((correct - plain).mean(0))
        seeds = " ".join(f"{100 * share:.1f}" for share in correct.mean(1))
        interval = "" if title == "lora" else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*_points(difference))
        lines.append(f"| {title} | {100 * correct.mean():.1f} | {seeds} | {interval} | {ratio:.2f} × |")
    return "\n".join(lines)


def _points(estimate: Any) -> tuple[float, float, float]:
    return 100 * estimate.mean, 100 * estimate.low, 100 * estimate.high


if __name__ == "__main__":
    main()
