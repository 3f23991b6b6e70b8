"""Checkpoints of transformers' own Trainer, which have no manifest: is everything there that a resume needs?

The Trainer itself does not ask: where its `optimizer.pt`, `scheduler.pt` or random state is missing, it goes on with a
fresh one and says nothing.
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .checkpoint import MANIFEST, UNFINISHED

_WEIGHTS = ("adapter_model.safetensors", "model.safetensors")
_INDEX = "model.safetensors.index.json"


def is_stock(folder: Path) -> bool:
    """Whether transformers' own Trainer wrote it."""
    ours = (MANIFEST, UNFINISHED, "optimizer.json", "scheduler.json", "training_args.json", "session.json")
    return folder.is_dir() and not any((folder / name).exists() for name in ours)


def lacking(folder: Path, processes: int, own_layout: bool) -> list[str]:
    """What is missing or visibly broken, in words; empty where everything seems to be there.

    Args:
        processes: how many train now; each has a random state of its own.
        own_layout: an engine such as DeepSpeed or FSDP lays out weights and optimizer: those are not looked at.
    """
    if own_layout:
        return _state(folder)
    states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{i}.pth" for i in range(processes)]
    pickled = [fault for name in ("optimizer.pt", "scheduler.pt", *states) for fault in _archive(folder / name)]
    if any(fault.startswith("rng_state") for fault in pickled) and any(folder.glob("rng_state*.pth")):
        pickled.append(f"it was written by another number of processes than the {processes} of now")
    return lacking_weights(folder) + _state(folder) + pickled


def lacking_weights(folder: Path) -> list[str]:
    """What is missing of the model alone."""
    if (folder / "pytorch_model.bin").exists() or (folder / "adapter_model.bin").exists():
        return ["its weights are pickled; only safetensors are read"]
    names = [name for name in _WEIGHTS if (folder / name).is_file()]
    names += [str(path.relative_to(folder)) for path in sorted(folder.glob("*/adapter_model.safetensors"))]
    if not names and (folder / _INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            return [f"{_INDEX} is damaged"]
    if not names:
        return ["adapter_model.safetensors or model.safetensors is missing"]
    return [fault for name in names for fault in _tensors(folder / name)]


def _tensors(path: Path) -> list[str]:
    if not path.is_file():
        return [f"{path.name} is missing"]
    try:
        with safe_open(path, framework="pt"):  # reads the header, and compares it with the length
            return []
    except SafetensorError as error:
        return [f"{path.name} is damaged ({error})"]


def _state(folder: Path) -> list[str]:
    path = folder / "trainer_state.json"
    try:
        step = json.loads(path.read_text(encoding="utf-8"))["global_step"]
    except FileNotFoundError:
        return [f"{path.name} is missing"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return [f"{path.name} is damaged"]
    named = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    if type(step) is not int or step < 0 or (named and int(named[1]) != step):
        return [f"{path.name} tells the step {step!r}, which is not that of its folder"]
    return []


def _archive(path: Path) -> list[str]:
    """`torch.save` writes a zip archive with checksums: damage is seen without unpickling."""
    if not path.is_file():
        return [f"{path.name} is missing"]
    try:
        with zipfile.ZipFile(path) as archive:
            sound = archive.testzip() is None
    except (zipfile.BadZipFile, zlib.error, OSError, NotImplementedError):
        sound = False
    return [] if sound else [f"{path.name} is damaged"]
