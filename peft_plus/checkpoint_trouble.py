"""What goes wrong while a checkpoint is written or read, told as what it is."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .checkpoint import MANIFEST
from .errors import CheckpointError, MethodError

_UNREADABLE = (OSError, SafetensorError, ValueError, KeyError, RuntimeError, EOFError)


def try_to_write(folder: str | os.PathLike[str]) -> None:
    """Raise CheckpointError, before training, where checkpoints could not be written at its end."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
            file.flush()
    except OSError as error:
        raise CheckpointError(
            f"Checkpoints cannot be written to {str(folder)!r}: {error}. Training has not begun. Choose another "
            "output_dir, or save_strategy='no'."
        ) from error


@contextmanager
def loading(folder: str) -> Generator[None]:
    """What goes wrong between the check of a checkpoint and its use is told as what it is."""
    if not Path(folder).is_dir():  # PEFT would look for it on the hub
        raise CheckpointError(gone(folder))
    try:
        yield
    except (CheckpointError, MethodError):
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{folder} holds a pickle with more in it than tensors and plain values, which could run code. It was not "
            "loaded. Train anew, or resume from a checkpoint that you trust."
        ) from error
    except _UNREADABLE as error:
        raise CheckpointError(
            f"{folder} could not be loaded: {type(error).__name__}: {error}. It does not fit this run, or it changed "
            "after it was checked; nothing in it was changed by this run."
        ) from error


@contextmanager
def writing(run_dir: Path, folder: Path) -> Generator[None]:
    """A full disk, a read-only folder: says what could not be written, and what is still there."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"The checkpoint {folder} could not be written: {error}.{_room(run_dir, folder)} It is unfinished, and "
            "never taken for whole. Earlier checkpoints and the model in memory are as they were: make room, then "
            "resume with resume_from_checkpoint=True."
        ) from error


def gone(folder: str) -> str:
    """The message for a checkpoint that was there, and is not any more."""
    return f"{folder} was whole a moment ago and is gone now: something else deletes in this output_dir."


def _room(run_dir: Path, folder: Path) -> str:
    """How much a checkpoint takes, as far as another one tells, and how much room there is."""
    try:
        free = f" {shutil.disk_usage(run_dir).free / 1e6:,.1f} MB are free there"
        sizes = [
            sum(path.stat().st_size for path in manifest.parent.rglob("*") if path.is_file())
            for manifest in run_dir.glob(f"checkpoint-*/{MANIFEST}")
            if manifest.parent != folder
        ]
    except OSError:
        return ""
    return f"{free}; another checkpoint takes {max(sizes) / 1e6:,.1f} MB." if sizes else f"{free}."
