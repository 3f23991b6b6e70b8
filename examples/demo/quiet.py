"""Keeping the libraries' remarks out of the demo's output, each by name. Call both before the first model."""

from __future__ import annotations

import logging
import os
import warnings


def set_environment() -> None:
    """What libraries read once, when they are imported; so this comes before them."""
    # Everything is local (`make inputs`): without this, each model would first ask the hub.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # OpenMP threads that wait for each other spin by default. Where the cores are shared with other programs, that
    # made a step on two threads ten times slower than on one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads() -> int:
    """Let torch use two threads, one on a single core; returns how many.

    MiniLM's matrices are small: on idle cores two threads train 1.4 times as fast as one, more gain nothing.
    """
    import torch

    threads = min(2, cores())
    torch.set_num_threads(threads)
    return threads


def silence() -> None:
    """Progress bars other than our own, and the remarks that are expected here."""
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # "classifier.weight is newly initialized": that is what fine-tuning on a new task means.
    logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
    logging.getLogger("transformers.utils.loading_report").setLevel(logging.ERROR)
    # "Failed to load CPU gemm_4bit_forward": an optional, faster kernel that would come from the hub.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # PEFT asks transformers by a name that transformers is renaming.
    warnings.filterwarnings("ignore", r"`is_gradient_checkpointing` is deprecated", FutureWarning)
