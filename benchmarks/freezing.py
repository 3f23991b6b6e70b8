"""What freezing saves: the frozen trunk computed once, noise above it, and activation checkpointing without it.

    python -m benchmarks.freezing                       # all tables, about 40 minutes
    python -m benchmarks.freezing --only epochs --model minilm

Every side trains LoRA on movie sentences, on the same batches of equal length, on one thread; whole runs of the sides
take turns, and a ratio is the median over such rounds. Theirs is plain PEFT in transformers' Trainer.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.memory import saved_activations
from benchmarks.sentences import MODELS, Case, arguments, tiny
from examples.demo import quiet


@dataclass(frozen=True)
class Split(Case):
    """A case of which the upper blocks train.

    Attributes:
        blocks: L.
        frozen: k, how many of them are frozen.
    """

    blocks: int
    frozen: int


TRAINED = {"minilm": (480, 32, 6, 4), "smollm2": (48, 8, 30, 20)}
"""Model → how many examples are trained on, and at a time; its blocks, and those that are frozen."""


@dataclass(frozen=True)
class Side:
    """One way to train.

    Attributes:
        frozen: how many of the lowest blocks have no LoRA.
        plugins: what trains through us; None for plain PEFT and transformers.
        checkpointing: of activations.
    """

    frozen: int = 0
    plugins: Mapping[str, Mapping[str, Any]] | None = None
    checkpointing: bool = False


@dataclass
class Clocked:
    """A run: seconds of the process and by the clock, of each epoch, and before the first; bytes saved for backward."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    start: float = 0.0
    activations: int = 0

    @property
    def whole(self) -> float:
        """Processor seconds from the beginning of training to its end."""
        return self.start + sum(self.cpu)

    @property
    def later(self) -> float:
        """Processor seconds of an epoch after the first, as a median."""
        return float(np.median(self.cpu[1:] or self.cpu))

    @property
    def later_wall(self) -> float:
        """The same by the clock."""
        return float(np.median(self.wall[1:] or self.wall))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--only", choices=list(TABLES), action="append", help="one of the tables; may be repeated")
    parser.add_argument("--model", choices=["minilm", "smollm2"], help="one of the models")
    parser.add_argument("--quick", action="store_true", help="tiny models and made-up sentences: shows that it runs")
    parser.add_argument("--plot", type=Path, help="also draw time against k into this file (needs matplotlib)")
    options = parser.parse_args(argv)
    import torch

    torch.set_num_threads(1)
    quiet.hide_progress_bars()
    if options.quick:
        cases = [split(tiny(task, 32, 8), 2, 1) for task in ("SEQ_CLS", "CAUSAL_LM")]
    else:
        chosen = {name: sizes for name, sizes in TRAINED.items() if options.model in (None, name)}
        cases = [split(MODELS[name](rows, batch), *blocks) for name, (rows, batch, *blocks) in chosen.items()]
    for name, make in TABLES.items():
        if options.only and name not in options.only:
            continue
        for case in cases:
            for line in make(case, options.repeats, options.plot):
                print(line, flush=True)
            print(flush=True)


# ---- what is compared ----------------------------------------------------------------------------------------------


def split(case: Case, blocks: int, frozen: int) -> Split:
    """The case with `frozen` of its `blocks` frozen."""
    return Split(**vars(case), blocks=blocks, frozen=frozen)


def train(
    case: Split, side: Side, *, epochs: int, seed: int, examples: int | None = None, count: bool = False
) -> Clocked:
    """Train once; with `count`, count what is saved for the backward pass too, which takes time."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model
    from transformers import PrinterCallback, TrainerCallback

    import peft_plus

    found = Clocked()

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.at = time.process_time(), time.perf_counter()

        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            if not found.cpu:
                found.start = time.process_time() - self.at[0]
            self.at = time.process_time(), time.perf_counter()

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            found.cpu.append(time.process_time() - self.at[0])
            found.wall.append(time.perf_counter() - self.at[1])

    torch.manual_seed(seed)
    lora = {"r": 8, "layers_to_transform": list(range(side.frozen, case.blocks)) if side.frozen else None}
    if side.plugins is None:
        model = get_peft_model(case.base(), LoraConfig(task_type=case.task, **lora))
        trainer_class = transformers.Trainer
    else:
        model, trainer_class = peft_plus.get_model(case.base(), {"lora": lora, **side.plugins}), peft_plus.Trainer

    class Counting(trainer_class):  # type: ignore[valid-type,misc]
        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            with saved_activations(model) as saved:
                loss = super().training_step(model, *args, **kwargs)
            found.activations = max(found.activations, saved.bytes)
            return loss

    with tempfile.TemporaryDirectory() as folder:
        trainer = (Counting if count else trainer_class)(
            model,
            arguments(
                case,
                folder,
                seed,
                epochs=epochs,
                train_sampling_strategy="group_by_length",
                activation_checkpointing=side.checkpointing,
                activation_checkpointing_kwargs={"use_reentrant": False} if side.checkpointing else None,
            ),
            train_dataset=case.sentences.select(range(examples or case.examples)),
            data_collator=case.collate,
            callbacks=[Clock()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return found


def rounds(case: Split, sides: Mapping[str, Side], *, epochs: int, repeats: int) -> list[dict[str, Clocked]]:
    """Each side once a round; who goes first changes."""
    for side in sides.values():  # what is made once in a process is made
        train(case, side, epochs=2, seed=0, examples=case.batch_size)
    found = []
    for seed in range(repeats):
        names = list(sides) if seed % 2 == 0 else list(reversed(sides))
        found.append({name: train(case, sides[name], epochs=epochs, seed=seed) for name in names})
    return found


def ratio(found: Sequence[Mapping[str, Clocked]], a: str, b: str, what: Callable[[Clocked], float]) -> float:
    """Median over the rounds of `what(a)` / `what(b)`."""
    return float(np.median([what(one[a]) / what(one[b]) for one in found]))


# ---- tables --------------------------------------------------------------------------------------------------------


def epochs_table(case: Split, repeats: int, plot: Path | None) -> Iterator[str]:
    """A cached epoch, and whole runs, against plain PEFT."""
    small_run = case.task == "CAUSAL_LM"
    lengths = (3,) if small_run else (3, 10)
    sides = {
        "everywhere": Side(plugins=None),
        "top": Side(frozen=case.frozen),
        "cached": Side(frozen=case.frozen, plugins={"trunk_cache": {}}),
        "cached, filled before": Side(frozen=case.frozen, plugins={"trunk_cache": {"fill": "before"}}),
    }
    yield from (
        f"{case.title}: LoRA in the top {case.blocks - case.frozen} of {case.blocks} blocks, {case.examples} examples "
        f"× {case.batch_size}, {repeats} rounds. How many times faster, processor time (by the clock).",
        "",
        "| against | a cached epoch | a whole run of … epochs, filled in the first | filled before |",
        "|---|--:|---|---|",
    )
    found = {number: rounds(case, sides, epochs=number, repeats=repeats) for number in lengths}
    for other in ("everywhere", "top"):
        one = ratio(found[lengths[0]], other, "cached", lambda run: run.later)
        clock = ratio(found[lengths[0]], other, "cached", lambda run: run.later_wall)
        whole = ["cached", "cached, filled before"]
        cells = [
            ", ".join(
                f"{number}: {ratio(of, other, side, lambda run: run.whole):.2f} ×" for number, of in found.items()
            )
            for side in whole
        ]
        yield f"| {other} | {one:.2f} × ({clock:.2f} ×) | {cells[0]} | {cells[1]} |"
    seconds = {name: float(np.median([one[name].later for one in found[lengths[0]]])) for name in sides}
    yield ""
    yield "An epoch, processor seconds: " + ", ".join(f"{name} {value:.2f}" for name, value in seconds.items()) + "."


def depth_table(case: Split, repeats: int, plot: Path | None) -> Iterator[str]:
    """A cached epoch against the number of frozen blocks, beside what the arithmetic predicts."""
    from peft_plus.layers import layer_map
    from peft_plus.trunk.choice import head_cost

    base = case.base()
    head = head_cost(base, layer_map(base))
    step = max(1, case.blocks // 6)
    places = [*range(step, case.blocks, step)]
    sides = {"0": Side(plugins={})} | {str(k): Side(frozen=k, plugins={"trunk_cache": {}}) for k in places}
    found = rounds(case, sides, epochs=2, repeats=repeats)
    measured = {int(k): ratio(found, k, "0", lambda run: run.later) for k in sides}
    predicted = {k: (2 * (1 - k / case.blocks) + 2 * head) / (2 + 2 * head) for k in measured}
    yield from (
        f"{case.title}: a cached epoch over one of LoRA everywhere, by the number k of frozen blocks of {case.blocks}; "
        f"predicted (2(1 − f) + 2h) / (2 + 2h), f = k/L, h = {head:.2f}. {repeats} rounds.",
        "",
        "| k | " + " | ".join(map(str, measured)) + " |",
        "|---|" + "--:|" * len(measured),
        "| measured | " + " | ".join(f"{value:.2f}" for value in measured.values()) + " |",
        "| predicted | " + " | ".join(f"{value:.2f}" for value in predicted.values()) + " |",
    )
    if plot is not None:
        draw(case, measured, predicted, plot)


def draw(case: Split, measured: Mapping[int, float], predicted: Mapping[int, float], file: Path) -> None:
    """Both lines into a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    axes.plot(list(predicted), list(predicted.values()), "--", label="predicted by the arithmetic")
    axes.plot(list(measured), list(measured.values()), "o-", label="measured")
    axes.set(
        xlabel="frozen blocks k", ylabel="time of a cached epoch / LoRA everywhere", title=case.title, ylim=(0, 1.1)
    )
    axes.legend()
    figure.savefig(file.with_stem(f"{file.stem}-{case.title.split('-')[0].lower()}"))


def noise_table(case: Split, repeats: int, plot: Path | None) -> Iterator[str]:
    """Consistency under noise above a cached trunk, against the plain uncached epoch of the same layers."""
    top = {"frozen": case.frozen}
    sides = {
        "plain": Side(**top),
        "cached": Side(**top, plugins={"trunk_cache": {}}),
        "R3F": Side(**top, plugins={"r3f": {"eps": 0.05}}),
        "R3F at the trunk": Side(**top, plugins={"r3f": {"eps": 0.05, "at": "trunk"}}),
        "R3F at the cached trunk": Side(**top, plugins={"r3f": {"eps": 0.05, "at": "trunk"}, "trunk_cache": {}}),
        "SMART at the cached trunk": Side(**top, plugins={"smart": {"at": "trunk"}, "trunk_cache": {}}),
        "without its teacher": Side(**top, plugins={"smart": {"at": "trunk", "bregman": 0.0}, "trunk_cache": {}}),
    }
    found = rounds(case, sides, epochs=2, repeats=repeats)
    yield from (
        f"{case.title}: an epoch over a plain one of the same top {case.blocks - case.frozen} of {case.blocks} blocks, "
        f"processor time, {repeats} rounds.",
        "",
        "| " + " | ".join(sides) + " |",
        "|" + "--:|" * len(sides),
        "| " + " | ".join(f"{ratio(found, name, 'plain', lambda run: run.later):.2f}" for name in sides) + " |",
    )


def activations_table(case: Split, repeats: int, plot: Path | None) -> Iterator[str]:
    """Bytes that a step saves for its backward pass."""
    sides = {
        "LoRA everywhere": Side(),
        "top": Side(frozen=case.frozen),
        "top, cached": Side(frozen=case.frozen, plugins={"trunk_cache": {}}),
        "everywhere, checkpointing": Side(checkpointing=True),
        "top, checkpointing, theirs": Side(frozen=case.frozen, checkpointing=True),
        "top, checkpointing, ours": Side(frozen=case.frozen, checkpointing=True, plugins={}),
    }
    rows = 4 * case.batch_size
    found = {name: train(case, side, epochs=2, seed=0, examples=rows, count=True) for name, side in sides.items()}
    yield from (
        f"{case.title}: MB that the largest of {2 * rows // case.batch_size} steps of {case.batch_size} sentences "
        f"saves for its backward pass; top {case.blocks - case.frozen} of {case.blocks} blocks.",
        "",
        "| " + " | ".join(sides) + " |",
        "|" + "--:|" * len(sides),
        "| " + " | ".join(f"{one.activations / 1e6:.1f}" for one in found.values()) + " |",
    )


def projection_table(case: Split, repeats: int, plot: Path | None) -> Iterator[str]:
    """What projecting supervised positions alone would add to a cached step of a language model; not built in."""
    import torch

    if case.task != "CAUSAL_LM":
        return
    from peft_plus import get_model
    from peft_plus.trunk import Trunk

    torch.manual_seed(0)
    top = {"r": 8, "layers_to_transform": list(range(case.frozen, case.blocks))}
    model = get_model(case.base(), {"lora": top})
    inner, trunk = model.get_base_model(), Trunk(model, model.peft_plus.layers, case.frozen)
    rows = sorted(case.sentences.select(range(case.examples)), key=lambda row: len(row["input_ids"]))
    batches = [case.collate(rows[at : at + case.batch_size]) for at in range(0, len(rows), case.batch_size)]
    features = [trunk.features(inner.forward, batch) for batch in batches]

    def seconds(place: int, labels: torch.Tensor, *, selected: bool) -> float:
        batch = {**batches[place], "labels": labels}
        started = time.process_time()
        with trunk.skipping(features[place]):
            if selected:
                inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
                hidden = inner.get_decoder()(**inputs).last_hidden_state[:, :-1][labels[:, 1:] != -100]
                logits = inner.get_output_embeddings()(hidden).float()
                loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:][labels[:, 1:] != -100])
            else:
                loss = inner(**batch).loss
        loss.backward()
        return time.process_time() - started

    yield from (
        f"{case.title}: a cached step (forward and backward) that projects all positions, over one that projects those "
        f"with a label, processor time, medians over {repeats} × {len(batches)} batches of {case.batch_size}.",
        "",
        "| labels at | faster |",
        "|---|--:|",
    )
    for title, share in (("every real token", 0.0), ("the second half of each sentence", 0.5)):
        ratios = []
        for _ in range(repeats):
            for place, batch in enumerate(batches):
                starts = (batch["attention_mask"].sum(1, keepdim=True) * share).long()
                labels = batch["labels"].masked_fill(torch.arange(batch["labels"].shape[1]) < starts, -100)
                ratios.append(seconds(place, labels, selected=False) / seconds(place, labels, selected=True))
        yield f"| {title} | {float(np.median(ratios)):.2f} × |"


def checkpointing_table(case: Split, repeats: int, plot: Path | None) -> Iterator[str]:
    """Activation checkpointing where only the upper blocks train."""
    sides = {
        "PEFT and transformers": Side(frozen=case.frozen, checkpointing=True),
        "ours": Side(frozen=case.frozen, checkpointing=True, plugins={}),
        "ours, cached": Side(frozen=case.frozen, checkpointing=True, plugins={"trunk_cache": {}}),
    }
    found = rounds(case, sides, epochs=2, repeats=repeats)
    theirs = "PEFT and transformers"
    yield from (
        f"{case.title}: activation checkpointing, LoRA in the top {case.blocks - case.frozen} of {case.blocks} blocks; "
        f"how many times faster than PEFT and transformers, processor time, {repeats} rounds.",
        "",
        "| ours | ours, cached |",
        "|--:|--:|",
        f"| {ratio(found, theirs, 'ours', lambda run: run.later):.2f} × | "
        f"{ratio(found, theirs, 'ours, cached', lambda run: run.later):.2f} × |",
    )


TABLES: Mapping[str, Callable[[Split, int, Path | None], Iterator[str]]] = {
    "epochs": epochs_table,
    "noise": noise_table,
    "checkpointing": checkpointing_table,
    "activations": activations_table,
    "projection": projection_table,
    "depth": depth_table,
}


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    quiet.before_imports()  # main imports what this silences
    main()
