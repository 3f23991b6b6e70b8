"""An end between any two operations of a process on its files: it is killed there, or the disk is full from there on.

Python's own operations are replaced for good in the process that asks for it, which is a forked one. What is written
is written in two halves, so that a file may be empty, half or whole when the end comes.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

CHANGING = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "truncate", "ftruncate", "link", "symlink")
FREEING = ("unlink", "remove", "rmdir")  # what a full disk still does
_WRITING_MODES = frozenset("wax+")


def end_at(count: int, *, disk_full: bool = False) -> Callable[[], bool]:
    """Let the operation number `count`, and with `disk_full` all later ones too, not happen.

    Args:
        count: from 1.
        disk_full: raise what a full disk raises, instead of killing this process.
    Returns: tells whether there were so many operations.
    """
    done = 0

    def before(name: str) -> None:
        nonlocal done
        done += 1
        if done < count:
            return
        if not disk_full:
            os.kill(os.getpid(), signal.SIGKILL)
        if name not in FREEING:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in (*CHANGING, "fsync"):
        setattr(os, name, _counted(name, getattr(os, name), before))
    os.open = _counted_open(os.open, before)
    builtins.open = io.open = _files(io.open, before)
    safetensors.torch.serialize_file = _tensors(safetensors.torch.serialize_file, before)
    return lambda: done >= count


def _counted(name: str, function: Callable[..., Any], before: Callable[[str], None]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        before(name)
        return function(*args, **kwargs)

    return call


def _counted_open(function: Callable[..., Any], before: Callable[[str], None]) -> Callable[..., Any]:
    def call(path: Any, flags: int, *args: Any, **kwargs: Any) -> Any:
        if flags & os.O_CREAT:
            before("open")
        return function(path, flags, *args, **kwargs)

    return call


def _files(function: Callable[..., Any], before: Callable[[str], None]) -> Callable[..., Any]:
    class Halves(io.FileIO):
        def write(self, data: Any) -> int:
            whole = memoryview(data).cast("B")
            middle = len(whole) // 2
            before("write")
            super().write(whole[:middle])
            before("write")
            super().write(whole[middle:])
            return len(whole)

    def call(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
        if not _WRITING_MODES & set(mode):
            return function(file, mode, buffering, *args, **kwargs)
        before("open")
        options = {key: kwargs.pop(key) for key in ("closefd", "opener") if key in kwargs}
        raw = Halves(file, mode.replace("t", "").replace("b", ""), **options)
        if buffering == 0:
            return raw
        buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *args, **kwargs)

    return call


def _tensors(function: Callable[..., Any], before: Callable[[str], None]) -> Callable[..., Any]:
    """safetensors writes in Rust: into a temporary file, which it renames."""

    def call(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> None:
        path = Path(filename)
        half = path.with_name(".tmpHalf0")
        try:
            before("open")
            function(tensors, half, *args, **kwargs)
            os.truncate(half, half.stat().st_size // 2)  # counts, and comes before the cut
        except OSError as error:
            raise SafetensorError(f"I/O error: {error.strerror} (os error {error.errno})") from error
        half.unlink()
        function(tensors, filename, *args, **kwargs)

    return call
