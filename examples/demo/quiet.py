"""Keeping the libraries' remarks out of the demo's output, each by name, and torch off cores that are not its own."""

from __future__ import annotations

import logging
import os
import warnings

EXPECTED = {
    # "classifier.weight is newly initialized": that is what fine-tuning for a new task means.
    "transformers.modeling_utils": logging.ERROR,
    # "The following layers were not sharded": on one device none is. It is said only where the logger above is quieted.
    "transformers.distributed.tensor_parallel": logging.ERROR,
    # "Failed to load CPU gemm_4bit_forward": an optional, faster kernel that would come from the hub.
    "bitsandbytes.backends.cpu.ops": logging.ERROR,
}
"""Logger → the level from which on it is heard; its remarks below that are expected here."""


def before_imports() -> None:
    """What must be set before transformers, bitsandbytes and torch are imported: they read it, or talk, only then."""
    # Everything is local (`make inputs`): without this, each model would first ask the hub.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["TQDM_DISABLE"] = "1"  # the bar of the one-time conversion of SmolLM2 cannot be reached otherwise
    # OpenMP threads that wait for each other spin by default. Where the cores are shared with other programs, that
    # makes a step on two threads up to ten times slower than on one; waiting passively, never.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name, level in EXPECTED.items():
        logging.getLogger(name).setLevel(level)
    # PEFT asks transformers by a name that transformers is renaming.
    warnings.filterwarnings("ignore", r"`is_gradient_checkpointing` is deprecated", FutureWarning)


def hide_progress_bars() -> None:
    """Those of the libraries: the demo has its own."""
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def set_threads() -> int:
    """Let torch use two threads, one on a single core; returns how many.

    MiniLM's matrices are small: on idle cores two threads train 1.4 times as fast as one, more gain nothing.
    """
    import torch

    threads = min(2, cores())
    torch.set_num_threads(threads)
    return threads


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
