"""What costs a start of several processes is done once, by the first worker that needs it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.models import tiny

from .launch import ROOT, launch

DDP = ROOT / "examples" / "launch" / "ddp.yaml"
LIMIT = 300
"""Seconds for all scenarios: several times what they take, so that only a hang meets it."""

RESUMED = ("all, AdamW, fp32", "thawed, in turns", "told, AdamW")
AVERAGED = ("ema, AdamW",)
"""What is also interrupted and resumed under FSDP2, which must end as the run that was not. Of the first the best model
is loaded, too, whose weights are those of a step."""

LAUNCHED = {
    "trainer": (
        *("lora", "full", "gradual_unfreeze", "llrd", "r3f", "smart", "all", "all, AdamW"),
        *("freeze", "freeze_plan", "chain_thaw"),
        *("lisa", "freezeout", "autofreeze", "surgical", "surgical, snr"),
        *("accumulation", "accumulation, Llama", "accumulation, T5", "checkpointing", "checkpointing, Llama"),
        *("shuffled", "length_buckets", "incomplete", "incomplete, accumulation", "incomplete by more", "stream"),
        *("no labels on one rank", "nf4", "nf4, checkpointing", "lp_ft"),
        *("stability", "stability, full", "stability, AdamW", "r4f", "neftune", "eda"),
        *("trunk_cache", "trunk_cache, filled before", "trunk_cache, thawing", "trunk_cache, noise"),
        *("all, AdamW, fp32", "accumulation, T5, fp32", "checkpointing, Llama, fp32"),
    ),
    "session": (
        *("lora", "all", "accumulation, Llama", "checkpointing", "incomplete"),
        *("trunk_cache", "trunk_cache, filled before", "stability"),
    ),
    "fsdp2": (
        *("lora", "gradual_unfreeze", "llrd", "lisa, AdamW", "surgical", "r3f", "all", "accumulation", "checkpointing"),
        *("smart, without a teacher", "noise at the trunk", "thawed", "stability, fp32", *RESUMED, *AVERAGED),
    ),
    "trainer, evaluated": ("told", "early_stop", "adaptive", "adaptive, thawing"),
    "fsdp2, evaluated": ("told", "told, AdamW"),
    "session, fsdp2": ("all", "accumulation"),
    "sft": ("sft",),
    "dpo": ("dpo",),
}
"""Loop → the scenarios that run in it."""

STORED = ("trunk_cache", "trunk_cache, thawing")
"""What is also interrupted and resumed by a Trainer and under DDP."""

INTERRUPTED = {
    "resumed": STORED,
    "fsdp2, resumed": RESUMED + AVERAGED,
    "fsdp2, best": RESUMED,
    "fsdp2, refused": ("lora",),
}
"""Likewise, for runs in two parts."""


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Any]) -> tuple[Path, Any]:
    """What `make(folder)` returned to the first worker that asked; the others wait and read it.

    Args:
        make: returns plain values.
    Returns: the folder, which all share, and the values.
    """
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # which the workers share
    folder, done = root / name, root / f"{name}.json"
    with FileLock(root / f"{name}.lock"):
        if not done.is_file():
            folder.mkdir(exist_ok=True)
            done.write_text(json.dumps(make(folder)), encoding="utf-8")
        return folder, json.loads(done.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder with the weights of both ranks, and how the launch ended."""

    def make(folder: Path) -> list[Any]:
        tiny("bert").save_pretrained(folder / "base")
        names = [f"{loop}:{name}" for loop, scenarios in (LAUNCHED | INTERRUPTED).items() for name in scenarios]
        options = ("--config_file", str(DDP), "--num_processes", "2", "--mixed_precision", "no")
        ended = launch("tests.distributed.ranks", *names, folder=folder, limit=LIMIT, options=options)
        return [ended.returncode, ended.stdout]

    folder, (code, output) = once(tmp_path_factory, "two_processes", make)
    return folder, subprocess.CompletedProcess([], code, output)


@pytest.fixture(autouse=True)
def no_accelerator_left(one_accelerator_at_a_time: None) -> None:
    """Each run in this process starts with none."""
