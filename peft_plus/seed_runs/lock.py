"""One process at a time works in a folder."""

from __future__ import annotations

import errno
import os
import socket
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from .errors import CallError

FILE = ".lock"

_BYTE = 1 << 30
"""Which byte Windows locks: one beyond the text, since nobody can read what is locked there."""
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}

_held: set[int] = set()
"""Descriptors of the locks that this process holds."""


@contextmanager
def only_one(folder: Path) -> Generator[None]:
    """Work in a folder while no other call does, of this process or another one.

    The lock is the operating system's, which lets go of it when the process ends, however it ends; the file stays.

    Args:
        folder: made where it is missing.
    Raises:
        CallError: another call works there; names its process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / FILE, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    _held.add(file)
    try:
        if not _locked(file, folder):
            raise CallError(
                f"Another call works in {folder} already ({_holder(file)}): wait for it, or give another out."
            )
        _write(file, f"process {os.getpid()} on host {socket.gethostname()}")
        try:
            yield
        finally:
            if file in _held:  # not in a process forked meanwhile
                _write(file, "")
    finally:
        if file in _held:
            _held.remove(file)
            os.close(file)  # which lets go of the lock


def _locked(file: int, folder: Path) -> bool:
    """Whether the folder is ours now; told by a warning where that cannot be known."""
    try:
        return _lock(file)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        warnings.warn(
            f"The file system of {folder} knows no locks ({error.strerror}): see to it yourself that one process at a "
            "time works there.",
            stacklevel=4,
        )
        return True


def _holder(file: int) -> str:
    os.lseek(file, 0, os.SEEK_SET)
    return os.read(file, 1000).decode(errors="replace") or "another process"


def _write(file: int, text: str) -> None:
    os.ftruncate(file, 0)
    os.lseek(file, 0, os.SEEK_SET)
    os.write(file, text.encode())


if sys.platform == "win32":
    import msvcrt

    def _lock(file: int) -> bool:
        """Whether the lock is ours now."""
        os.lseek(file, _BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        return True

else:
    import fcntl

    def _lock(file: int) -> bool:
        """Whether the lock is ours now."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def _leave() -> None:
        """In a forked process, e.g. one that loads data: it would hold the lock of a parent that was killed."""
        for file in _held:
            os.close(file)
        _held.clear()

    os.register_at_fork(after_in_child=_leave)
