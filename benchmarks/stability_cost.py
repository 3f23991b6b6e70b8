"""What a step costs with each stability technique, as a multiple of the plain step: LoRA on MiniLM-L6.

    python -m benchmarks.stability_cost                      # all of them
    python -m benchmarks.stability_cost --only r_drop ema    # some
    python -m benchmarks.stability_cost --tiny               # a tiny model: shows that it runs

Plain and other loop take turns step by step on one thread; processor time, 16 rows of 32 tokens, the median of the
steps of both. Whether a bound is held is said where there is one.
"""

from __future__ import annotations

# First of all: it silences what the libraries say when they are imported.
from examples.demo import quiet

quiet.before_imports()

import argparse  # noqa: E402
from collections.abc import Iterator, Mapping, Sequence  # noqa: E402
from functools import partial  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402

from .loops import Make, minilm, our_model, tiny, trainer_loop  # noqa: E402
from .turns import take_turns_both_ways  # noqa: E402

BOUNDS: Mapping[str, float] = {
    "r3f": 2.15,
    "r_drop": 2.15,
    "smart": 3.7,
    "freelb": 2.3,
    "l2_sp": 1.1,
    "ema": 1.1,
    "mixout": 1.1,
}
"""Title → the most that a step may cost."""

TECHNIQUES: Mapping[str, Mapping[str, Any]] = {
    "plain again": {},
    "r3f": {"r3f": {"eps": 0.05}},
    "r4f": {"r4f": {"eps": 0.05}},
    "smart": {"smart": {}},
    "freelb": {"freelb": {}},
    "r_drop": {"r_drop": {}},
    "token_cutoff": {"token_cutoff": {}},
    "neftune": {"neftune": {}},
    "l2_sp": {"l2_sp": {}},
    "mixout": {"mixout": {}},
    "ema": {"ema": {}},
    "swa": {"swa": {"every": 10, "start_fraction": 0.0}},
    "child_tuning": {"child_tuning": {}},
    "clip": {"clip": {}},
    "loss_guard": {"loss_guard": {}},
    "lr_patterns": {"lr_patterns": {"patterns": {"lora_B": 16.0}}},
    "llrd": {"llrd": {}},
}
"""Title → plugins beside LoRA. What only acts before the first step, or sets arguments, costs a step nothing."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(TECHNIQUES), default=list(TECHNIQUES), help="which of them")
    parser.add_argument("--steps", type=int, default=14, help="steps of each side, twice (default 14)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model")
    options = parser.parse_args(argv)
    quiet.hide_progress_bars()
    for line in table(tiny if options.tiny else minilm, options.only, options.steps):
        print(line, flush=True)


def table(base: Make, titles: Sequence[str], steps: int) -> Iterator[str]:
    """One line for each technique."""
    from peft_plus import Trainer

    yield "| | step ÷ plain step | quartiles | bound |"
    yield "|---|--:|---|---|"
    for title in titles:
        loops = {
            name: trainer_loop(Trainer, partial(our_model, base, plugins), steps)
            for name, plugins in (("plain", {}), ("other", TECHNIQUES[title]))
        }
        laps = take_turns_both_ways(loops, warm_up=3)
        ratios = laps["other"].cpu / laps["plain"].cpu
        low, middle, high = np.percentile(ratios, [25, 50, 75])
        bound = BOUNDS.get(title)
        verdict = "" if bound is None else f"≤ {bound}: {'held' if middle <= bound else 'missed'}"
        yield f"| {title} | {middle:.2f} | {low:.2f} to {high:.2f} | {verdict} |"


if __name__ == "__main__":
    main()
