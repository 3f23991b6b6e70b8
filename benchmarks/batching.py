"""`length_buckets` against transformers' own length grouping: an epoch of the same examples, time and padding.

    python -m benchmarks.batching

Both sides train LoRA on movie sentences, on one thread, in turn, epoch by epoch: plain PEFT in transformers' Trainer
with `train_sampling_strategy="group_by_length"`, and `["lora", "length_buckets"]` through us.

transformers sorts within chunks of at most 50 batches, a quarter of the data where that is less. On few data its chunks
are short and much padding remains; on many, hardly any, and the two are equal. So the figures hold for the number of
examples beside them; another table gives the padding alone for other numbers, up to all sentences.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.sentences import MODELS, Case, arguments, tiny
from examples.demo import quiet

SIZES = (160, 320, 640, 1_500, 3_200)
TRAINED = {"minilm": (1_000, 32), "smollm2": (320, 32)}
"""Model → how many examples are trained on, and at a time."""
TARGETS = {"MiniLM-L6": 1.1, "SmolLM2-135M": 1.3}
"""Model → how many times faster we want to be."""


@dataclass
class Epoch:
    """One epoch: seconds of the process and by the clock, tokens of its batches, and those that are not padding."""

    cpu: float = 0.0
    wall: float = 0.0
    padded: int = 0
    real: int = 0


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="pairs of epochs (default 7)")
    parser.add_argument("--only", choices=["minilm", "smollm2"], help="one of the models")
    parser.add_argument("--quick", action="store_true", help="tiny models and made-up sentences: shows that it runs")
    options = parser.parse_args(argv)
    import torch

    torch.set_num_threads(1)
    quiet.hide_progress_bars()
    if options.quick:
        cases = [tiny("SEQ_CLS", 96, 8), tiny("CAUSAL_LM", 96, 8)]
    else:
        cases = [MODELS[name](*size) for name, size in TRAINED.items() if options.only in (None, name)]
    for table in (padding_table(cases), time_table(cases, options.repeats)):
        for line in table:
            print(line, flush=True)
        print()


# ---- what is compared ----------------------------------------------------------------------------------------------


def epoch(case: Case, *, ours: bool, seed: int, examples: int | None = None) -> Epoch:
    """Train one epoch, by default over all examples of the case."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model
    from transformers import PrinterCallback, TrainerCallback

    import peft_plus

    found = Epoch()

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            found.cpu, found.wall = -time.process_time(), -time.perf_counter()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            found.cpu += time.process_time()
            found.wall += time.perf_counter()

    def collate(rows: list[dict[str, Any]]) -> Any:
        batch = case.collate(rows)
        found.padded += batch["input_ids"].numel()
        found.real += int(batch["attention_mask"].sum())
        return batch

    torch.manual_seed(seed)
    lora = LoraConfig(task_type=case.task, r=8)
    if ours:
        model, trainer_class = peft_plus.get_model(case.base(), [lora, "length_buckets"]), peft_plus.Trainer
    else:
        model, trainer_class = get_peft_model(case.base(), lora), transformers.Trainer
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model,
            arguments(case, folder, seed, train_sampling_strategy="random" if ours else "group_by_length"),
            train_dataset=case.sentences.select(range(examples or case.examples)),
            data_collator=collate,
            callbacks=[Clock()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return found


# ---- tables --------------------------------------------------------------------------------------------------------


def time_table(cases: Sequence[Case], repeats: int) -> Iterator[str]:
    """Seconds of an epoch on both sides, as medians; the ratio is the median over pairs."""
    yield from (
        "An epoch of LoRA, one thread, epochs in turn: transformers' group_by_length against length_buckets.",
        "",
        "| model | examples × batch | theirs, s | ours, s | faster | by the clock | target | padded/real | pairs |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    )
    for case in cases:
        for ours in (False, True):  # what is made once in a process is made
            epoch(case, ours=ours, seed=0, examples=case.batch_size)
        sides: dict[bool, list[Epoch]] = {False: [], True: []}
        for seed in range(repeats):
            for ours in (False, True) if seed % 2 == 0 else (True, False):
                sides[ours].append(epoch(case, ours=ours, seed=seed))
        pairs = list(zip(sides[False], sides[True], strict=True))
        cpu = np.median([theirs.cpu / ours.cpu for theirs, ours in pairs])
        wall = np.median([theirs.wall / ours.wall for theirs, ours in pairs])
        seconds = [float(np.median([one.cpu for one in side])) for side in sides.values()]
        padding = [float(np.median([one.padded / one.real for one in side])) for side in sides.values()]
        target = f"{TARGETS[case.title]} ×" if case.title in TARGETS else ""
        yield (
            f"| {case.title} | {case.examples:,} × {case.batch_size} | {seconds[0]:.1f} | {seconds[1]:.1f} | "
            f"{cpu:.2f} × | {wall:.2f} × | {target} | {padding[0]:.2f} → {padding[1]:.2f} | {repeats} |"
        )


def padding_table(cases: Sequence[Case]) -> Iterator[str]:
    """Tokens of all batches over those that are not padding, by how many examples there are; medians of five epochs."""
    yield from (
        "Padded over real tokens, by the number of examples.",
        "",
        "| model | batch | examples | random order | group_by_length | length_buckets |",
        "|---|--:|--:|--:|--:|--:|",
    )
    for case in cases:
        for number in sorted({*(size for size in SIZES if size < len(case.sentences)), len(case.sentences)}):
            ratios = padding(case, number)
            cells = " | ".join(f"{ratio:.3f}" for ratio in ratios)
            yield f"| {case.title} | {case.batch_size} | {number:,} | {cells} |"


def padding(case: Case, number: int) -> tuple[float, float, float]:
    """Of the first `number` examples: in random order, as transformers groups them, in our order."""
    import torch
    from torch import nn
    from transformers.trainer_pt_utils import get_length_grouped_indices

    from peft_plus import Run
    from peft_plus_incremental.length_buckets import LengthBuckets

    data = case.sentences.select(range(number))
    lengths = torch.tensor([len(ids) for ids in data["input_ids"]])
    run = Run(model=nn.Identity(), task=None, num_blocks=0, batch_size=case.batch_size)  # type: ignore[arg-type]
    sampler: Any = LengthBuckets().sampler(run, data)

    def ours(epoch: int) -> list[int]:
        sampler.set_epoch(epoch)
        return list(sampler)

    orders: list[Callable[[int], Any]] = [
        lambda seed: torch.randperm(number, generator=torch.Generator().manual_seed(seed)),
        lambda seed: get_length_grouped_indices(
            lengths.tolist(), case.batch_size, generator=torch.Generator().manual_seed(seed)
        ),
        ours,
    ]

    def ratio(indices: Any) -> float:
        batches = lengths[torch.as_tensor(indices)].split(case.batch_size)
        return sum(len(rows) * int(rows.max()) for rows in batches) / int(lengths.sum())

    first, second, third = (float(np.median([ratio(order(seed)) for seed in range(5)])) for order in orders)
    return first, second, third


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    quiet.before_imports()  # main imports what this silences
    main()
