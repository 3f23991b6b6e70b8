"""What soups of several seeds are worth: MiniLM-L6 with LoRA on 250 Amazon sentences, groups of five runs.

    python -m benchmarks.soup                 # 4 groups of each kind, about 40 runs
    python -m benchmarks.soup --groups 1      # one of each

The training of `benchmarks.stability`. The runs of a group begin with one head and adapter and differ in the order of
the data and in dropout, or they differ in everything. Of each group: its runs alone, the best on the dev set, their
uniform soup, and the greedy soup that the same dev set chose; accuracy on the dev set, on other Amazon sentences, and
on movie sentences. Runs that are there are not made again.
"""

from __future__ import annotations

# First of all: it silences what the libraries say when they are imported.
from examples.demo import quiet

quiet.before_imports()

import argparse  # noqa: E402
import shutil  # noqa: E402
from collections.abc import Iterator, Mapping, Sequence  # noqa: E402
from functools import cache, partial  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402

from . import stability  # noqa: E402

RUNS = 5
MOVIES = 1_000
KINDS: Mapping[str, tuple[str, ...]] = {"one start": ("order", "dropout"), "other starts": ("init", "order", "dropout")}
"""Title → the seeds that differ within a group."""


@cache
def sets() -> dict[str, Any]:
    """Tokenised sentences to evaluate on, shortest first."""
    from transformers import AutoTokenizer

    from examples import inputs
    from peft_plus.tasks.seq_cls import SequenceClassification

    movies = inputs.sentences("movies").shuffle(seed=0).select(range(MOVIES))
    movies = SequenceClassification(num_labels=2).preprocess(movies, AutoTokenizer.from_pretrained(inputs.minilm()))
    lengths = [len(ids) for ids in movies["input_ids"]]
    found = stability.data()
    return {
        "dev": found["dev"],
        "test": found["test"],
        "movies": movies.select(sorted(range(len(lengths)), key=lengths.__getitem__)),
    }


@cache
def accuracies(folder: Path) -> dict[str, float]:
    """Of a saved adapter, on each set."""
    from transformers import AutoTokenizer, PrinterCallback, Trainer, TrainingArguments

    from examples import inputs
    from peft_plus import from_pretrained
    from peft_plus.tasks.seq_cls import SequenceClassification

    silence = {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
    trainer = Trainer(
        from_pretrained(inputs.minilm(), folder),
        TrainingArguments("out/trainer", per_device_eval_batch_size=64, **silence),
        compute_metrics=SequenceClassification(num_labels=2).compute_metrics,
        processing_class=AutoTokenizer.from_pretrained(inputs.minilm()),
    )
    trainer.remove_callback(PrinterCallback)
    return {name: trainer.evaluate(rows)["eval_accuracy"] for name, rows in sets().items()}


def save(trainer: Any) -> dict[str, float]:
    """Keep a run's adapter beside its result."""
    out = Path(trainer.args.output_dir)
    folder = out.with_name(f"{out.name}-adapter")
    trainer.model.save_pretrained(folder)
    return {f"eval_{name}": value for name, value in accuracies(folder).items()}


def runs(kind: str, group: int, out: Path) -> list[Path]:
    """The adapters of a group."""
    import peft_plus

    place = out / kind.replace(" ", "-") / str(group)
    seeds = peft_plus.seeds(
        partial(stability.factory, plugins={}, eval_strategy="no"),
        RUNS,
        metric="eval_dev",
        out=place,
        base=RUNS * group,
        vary=KINDS[kind],
        evaluate=save,
    )
    return sorted(path for path in place.rglob("*-adapter") if path.is_dir())[: len(seeds.results)]


def of_group(folders: Sequence[Path], out: Path) -> dict[str, dict[str, float]]:
    """What to compare in a group: title → set → accuracy, and the number of ingredients."""
    from peft_plus_stability.soup import greedy_soup, uniform_soup

    shutil.rmtree(out, ignore_errors=True)
    alone = [accuracies(folder) for folder in folders]
    greedy = greedy_soup(folders, out / "greedy", lambda folder: accuracies.__wrapped__(folder)["dev"])
    uniform = uniform_soup(folders, out / "uniform")
    return {
        "a run, mean": {name: float(np.mean([one[name] for one in alone])) for name in sets()} | {"runs": 1},
        "best on dev": max(alone, key=lambda one: one["dev"]) | {"runs": 1},
        "uniform soup": accuracies(uniform.folder) | {"runs": len(folders)},
        "greedy soup": accuracies(greedy.folder) | {"runs": len(greedy.ingredients)},
    }


def table(kind: str, groups: Sequence[Mapping[str, Mapping[str, float]]]) -> Iterator[str]:
    """Means over the groups, and by how much the worst and the best group differ from the best run of their own."""
    yield f"| {kind} | runs in it | dev | test | movies | test − best run's: mean (least to most) |"
    yield "|---|--:|--:|--:|--:|--:|"
    for title in groups[0]:
        means = {name: np.mean([group[title][name] for group in groups]) for name in ("runs", *sets())}
        gaps = [100 * (group[title]["test"] - group["best on dev"]["test"]) for group in groups]
        yield (
            f"| {title} | {means['runs']:.1f} | {means['dev']:.1%} | {means['test']:.1%} | {means['movies']:.1%} | "
            f"{np.mean(gaps):+.1f} ({min(gaps):+.1f} to {max(gaps):+.1f}) |"
        )


def main() -> None:
    """Run what is missing, and print a table for each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=4, help="of each kind (default 4)")
    parser.add_argument("--out", type=Path, default=Path("out/soup"), help="folder (default out/soup)")
    options = parser.parse_args()
    for kind in KINDS:
        found = []
        for group in range(options.groups):
            folders = runs(kind, group, options.out)
            found.append(of_group(folders, options.out / "soups" / kind.replace(" ", "-") / str(group)))
        for line in table(kind, found):
            print(line, flush=True)
        print(flush=True)


if __name__ == "__main__":
    main()
