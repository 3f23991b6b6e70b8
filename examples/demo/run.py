"""The demo from start to end: train, compare, reload, quantise; print and keep what came out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from datasets import DatasetDict
from rich.console import Console
from rich.markup import escape

from peft_plus import proof, timeline

from . import language_model, quiet
from .compare import EPOCHS, LEARNING_RATE, Outcome, Size, fine_tune, methods, sentences
from .intervals import bootstrap, verdict
from .reload import save_and_reload
from .tables import comparison, console, percent, progress_bar

FULL, FULL_STEPS = Size(train=1_500, dev=500, test=1_000, seeds=(0, 1)), 15
QUICK, QUICK_STEPS = Size(train=64, dev=16, test=48, seeds=(0,)), 4
RELOADED = 32


def run(out: Path, *, quick: bool) -> bool:
    """Run everything and write `results.json` into `out`.

    Args:
        out: made if it is not there.
        quick: a small part of the data and one seed, to see that all of it works.
    Returns: whether the reloaded logits were equal and the language model's loss fell.
    """
    start = time.perf_counter()
    threads = quiet.set_threads()
    quiet.hide_progress_bars()
    size, steps = (QUICK, QUICK_STEPS) if quick else (FULL, FULL_STEPS)
    out.mkdir(parents=True, exist_ok=True)
    data = sentences(size)
    to = console()
    to.print(
        f"MiniLM-L6 on movie sentences, positive or negative: {size.train} to train on, {size.dev} dev, "
        f"{size.test} test; {EPOCHS} epochs, seeds {', '.join(map(str, size.seeds))}, learning rate {LEARNING_RATE}.\n"
    )
    with progress_bar(to) as bar:
        task = bar.add_task("", total=2 * len(size.seeds) * size.steps + steps)

        def begin(description: str) -> Callable[[], None]:
            bar.update(task, description=description)
            return lambda: bar.advance(task)

        outcomes = _fine_tune_all(size, data, out, to, begin)
        results: dict[str, Any] = {"quick": quick, "comparison": _compare(outcomes, size, to)}
        combined = list(outcomes.values())[-1][0].model
        results["combination"] = _who_trained(combined.peft_plus, to)
        begin("reloading in plain PEFT")
        results["reload"] = _reload(combined, data["test"]["text"][:RELOADED], out / "adapter", to)
        advance = begin("SmolLM2-135M, nf4, lora")
        results["language_model"] = _language_model(data, steps, out, to, advance)
        bar.update(task, description="")
    results["machine"] = {"cores": quiet.cores(), "threads": threads}
    results["versions"] = {
        name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "peft-plus")
    }
    results["seconds"] = time.perf_counter() - start
    (out / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    to.print(
        f"\n{results['seconds']:.0f} seconds in all on {quiet.cores()} CPU cores, {threads} threads "
        f"({', '.join(f'{name} {number}' for name, number in results['versions'].items())}). "
        f"Everything is in {out / 'results.json'}."
    )
    return results["reload"]["max_difference"] == 0 and results["language_model"]["fell"]


def _fine_tune_all(
    size: Size, data: DatasetDict, out: Path, to: Console, begin: Callable[[str], Callable[[], None]]
) -> dict[str, list[Outcome]]:
    outcomes: dict[str, list[Outcome]] = {}
    for title, method in methods(size.steps).items():
        for seed in size.seeds:
            name = f"{title}, seed {seed}"
            outcome = fine_tune(method, seed, data, out / "trainer", begin(name))
            outcomes.setdefault(title, []).append(outcome)
            to.print(f"{name}: dev accuracy by epoch {' → '.join(f'{100 * value:.1f} %' for value in outcome.dev)}")
    return outcomes


def _compare(outcomes: dict[str, list[Outcome]], size: Size, to: Console) -> dict[str, Any]:
    shares = {title: np.mean([run.correct for run in runs], axis=0) for title, runs in outcomes.items()}
    accuracy = {title: bootstrap(share) for title, share in shares.items()}
    plain, combined = shares.values()
    difference = bootstrap(combined - plain)
    said = verdict(difference)
    to.print(comparison(outcomes, accuracy))
    to.print(
        escape(
            f"Combination minus plain LoRA, on the same sentences: {percent(difference, '+.1f')} points. {said}\n"
            f"[…] is a 95 % bootstrap interval over the {size.test} test sentences. How much seeds differ is not in "
            "it: see each seed's own accuracy."
        )
    )
    return {
        "methods": {
            title: {
                "accuracy": asdict(accuracy[title]),
                "by_seed": [float(run.correct.mean()) for run in runs],
                "dev": [run.dev for run in runs],
                "trainable": runs[0].trainable,
                "seconds": [run.seconds for run in runs],
                "terms": [run.terms for run in runs],
                "settings": dict(methods(size.steps)[title]),
            }
            for title, runs in outcomes.items()
        },
        "difference": asdict(difference),
        "verdict": said,
    }


def _who_trained(plan: Any, to: Console) -> dict[str, Any]:
    blocks = plan.layers.num_blocks
    rows = plan.engagement["train"]
    to.print("\nWho trained when, in the combination (seed 0):")
    to.print(timeline.draw(plan.timeline, blocks), markup=False)
    to.print(
        "\nWhat was declared (updates at a rate above 0; the warm-up's first is at 0), and which tensors really moved:"
    )
    to.print(proof.table(rows, blocks), markup=False)
    return {
        "timeline": [
            {"step": c.step, "groups": [timeline.label(g, blocks) for g in sorted(c.groups, reverse=True)]}
            for c in plan.timeline
        ],
        "engagement": [
            {
                "group": timeline.label(row.group, blocks),
                "updates": row.steps,
                "tensors": row.tensors,
                "moved": row.moved,
            }
            for row in rows
        ],
    }


def _reload(model: Any, texts: list[str], folder: Path, to: Console) -> dict[str, Any]:
    reloaded = save_and_reload(model, texts, folder)
    to.print(
        f"\nSaved, and reloaded by plain PEFT in a fresh process: largest |Δ logit| = {reloaded.max_difference:g} on "
        f"{reloaded.sentences} test sentences. The adapter is {reloaded.adapter_bytes / 1e3:.0f} kB, "
        f"{100 * reloaded.adapter_bytes / reloaded.base_bytes:.2f} % of the base's {reloaded.base_bytes / 1e6:.0f} MB."
    )
    if reloaded.max_difference:
        to.print("The reloaded model is NOT the one that was saved.")
    return asdict(reloaded)


def _language_model(
    data: DatasetDict, steps: int, out: Path, to: Console, advance: Callable[[], None]
) -> dict[str, Any]:
    losses = language_model.train(data, steps, out / "trainer", advance)
    first, last = losses.ends
    before, after = losses.held_out
    to.print(
        f"\nSmolLM2-135M in 4 bits (nf4) with LoRA, the same sentences as a language model, {steps} steps of "
        f"{language_model.BATCH}, {losses.trainable:,} of {losses.parameters:,} parameters, "
        f"{losses.seconds:.0f} seconds:"
    )
    to.print(
        f"  loss on {losses.sentences} held-out sentences {before:.3f} → {after:.3f}: "
        f"{'falling' if losses.fell else 'NOT falling'}"
    )
    to.print(
        f"  training loss {first:.3f} → {last:.3f} (means of the first and last {losses.edge} steps, each on other "
        "sentences)"
    )
    return {**asdict(losses), "ends": losses.ends, "fell": losses.fell}
