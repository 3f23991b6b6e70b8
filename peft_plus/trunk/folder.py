"""Where stores lie: a folder that the user named, one beside the checkpoints, or a temporary one."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from ..distributed import gather, rank
from ..errors import MethodError

logger = logging.getLogger(__name__)


class Folder:
    """The folder of a run's stores, the same for all its processes.

    Args:
        named: by the user; what is in it is kept.
        scratch: beside the run's checkpoints, of its own; None: a temporary folder.
    Raises:
        MethodError: the named one cannot be written.
    """

    def __init__(self, named: str | None, scratch: Path | None) -> None:
        self.kept = named is not None
        self.temporary = named is None and scratch is None
        self.path = _writable(Path(named)) if named is not None else scratch or _temporary()
        self._left: dict[str, int] = {}  # stores that are needed no more → checkpoints begun since

    def opens(self, name: str) -> Path:
        """The folder of one store, which is needed from now on."""
        self._left.pop(name, None)
        return self.path / name

    def leaves(self, name: str) -> None:
        """A store is needed no more; what lies beside checkpoints stays until none of them is likely to need it."""
        if self.temporary:
            shutil.rmtree(self.path / name, ignore_errors=True)
        elif not self.kept:
            self._left[name] = 0

    def checkpoint_begins(self) -> None:
        """Remove what no checkpoint needs: one was begun since it was left, and is finished by now."""
        for name, checkpoints in list(self._left.items()):
            if checkpoints:
                shutil.rmtree(self.path / name, ignore_errors=True)
                del self._left[name]
            else:
                self._left[name] = 1

    def move(self, place: Path) -> bool:
        """Keep what is temporary beside checkpoints from now on. Every process must call it, once it has sealed.

        Args:
            place: of its own; what is there is removed.
        Returns: whether it was moved.
        """
        if not self.temporary:
            return False
        gather(None)  # all have sealed
        problem = None
        if rank() == 0 and self.path.is_dir():
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(place, ignore_errors=True)
                shutil.move(self.path, place)
            except OSError as error:
                problem = str(error)
        problem = gather(problem)[0]
        if problem is not None:
            logger.warning("What trunk_cache stored could not be kept beside the checkpoints: %s.", problem)
            return False
        self.path, self.temporary = place, False
        return True

    def close(self, *, finished: bool) -> None:
        """Remove all that nobody named, unless the run may go on later."""
        if self.kept:
            return
        if finished or self.temporary:
            shutil.rmtree(self.path, ignore_errors=True)
            return
        with suppress(OSError):
            self.path.rmdir()  # nothing was stored


def cannot_write(error: OSError) -> MethodError:
    """The error for a folder that does not take a store."""
    return MethodError(f"trunk_cache cannot write its store: {error}. Give another folder=.")


def _temporary() -> Path:
    """A temporary folder, the same for all processes."""
    mine = tempfile.mkdtemp(prefix="peft_plus_trunk_")
    first = gather(mine)[0]
    if first != mine:
        os.rmdir(mine)
    return Path(first)


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise cannot_write(error) from error
