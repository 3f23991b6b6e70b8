"""Which checkpoint of a run to go on with, and which ones to delete."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from .checkpoint import MANIFEST, REPLACED, Checkpoint, is_unfinished, sealed_at, verify
from .errors import CheckpointError
from .stock_checkpoint import is_stock, lacking

logger = logging.getLogger(__name__)

_FOLDER = re.compile(rf"(?:{REPLACED})?checkpoint-(\d+)")


def check(folder: str | Path, *, processes: int = 1, own_layout: bool = False) -> Checkpoint:
    """The checkpoint in `folder`, if a run can go on with it.

    One that transformers' own Trainer wrote is taken too, with a warning, if it is complete.

    Args:
        processes: how many train now: each needs its random state.
        own_layout: an engine such as DeepSpeed or FSDP lays the files out; then only the Trainer's state is asked for.
    Raises:
        CheckpointError: it is missing, unfinished, incomplete or damaged; names what is wrong.
    """
    folder = Path(folder)
    if not is_stock(folder):
        return verify(folder)
    faults = lacking(folder, processes, own_layout)
    if faults:
        raise CheckpointError(f"{folder} was written without a manifest, and is incomplete: {'; '.join(faults)}.")
    logger.warning(
        "%s was written without a manifest (by transformers' own Trainer): it is complete, but whether its files are "
        "intact is unknown.",
        folder,
    )
    return Checkpoint(folder, _step(folder.name) or 0)


def newest_whole(run_dir: str | Path, *, processes: int = 1, own_layout: bool = False) -> Checkpoint | None:
    """The whole checkpoint that was sealed last. Damaged and unfinished ones stay where they are.

    Not that of the highest step: a run that went back, or began anew, takes another course, and an earlier one of the
    same folder may have come further.

    Args:
        run_dir: the run's `output_dir`.
        processes, own_layout: as for `check`.
    Returns: None where no checkpoint was ever finished: a run that was killed in its first save starts anew.
    Raises:
        CheckpointError: there are some, but none is whole.
    """
    torn: list[str] = []
    lost = False
    for folder in sorted(_checkpoints(Path(run_dir)), key=_age, reverse=True):
        try:
            found = check(folder, processes=processes, own_layout=own_layout)
        except CheckpointError as error:
            torn.append(f"  {error}")
            lost |= not is_unfinished(folder)
            continue
        if torn:
            logger.warning("Going back to %s, since newer ones cannot be used:\n%s", found.folder, "\n".join(torn))
        return found
    if lost:
        raise CheckpointError(
            f"No checkpoint in {run_dir} is whole:\n" + "\n".join(torn) + "\nNothing was loaded. Bring one back from a "
            "backup, or start anew without resume_from_checkpoint."
        )
    if torn:
        logger.warning("No checkpoint in %s was finished, so training begins anew:\n%s", run_dir, "\n".join(torn))
    return None


def begun(run_dir: str | Path) -> bool:
    """Whether there is any checkpoint, whole or not."""
    return bool(_checkpoints(Path(run_dir)))


def finished(run_dir: str | Path) -> bool:
    """Whether a checkpoint was ever finished, be it damaged since."""
    return any(not is_unfinished(folder) for folder in _checkpoints(Path(run_dir)))


def rotate(run_dir: str | Path, limit: int | None, keep: Collection[str | Path]) -> None:
    """Delete checkpoints until `limit` are left: unfinished ones first, then those that were sealed longest ago.

    Args:
        limit: `save_total_limit`; None or ≤ 0 deletes nothing.
        keep: folders that stay in any case, above all the one that was just sealed.
    """
    if limit is None or limit <= 0:
        return
    kept = {Path(folder).resolve() for folder in keep}
    found = _checkpoints(Path(run_dir))
    spare = sorted((folder for folder in found if folder.resolve() not in kept), key=_worth)
    for folder in spare[: max(0, len(found) - limit)]:
        shutil.rmtree(folder, ignore_errors=True)


def _checkpoints(run_dir: Path) -> list[Path]:
    """The folders of all checkpoints, also of one that was set aside."""
    return [p for p in run_dir.iterdir() if _step(p.name) is not None and p.is_dir()] if run_dir.is_dir() else []


def _step(name: str) -> int | None:
    match = _FOLDER.fullmatch(name)
    return int(match[1]) if match else None


def _age(folder: Path) -> tuple[int, int]:
    """What is newer is greater."""
    return sealed_at(folder), _step(folder.name) or 0


def _worth(folder: Path) -> tuple[bool, int, int]:
    """What has more worth is greater: one that cannot be whole has none."""
    return (folder / MANIFEST).is_file() or is_stock(folder), *_age(folder)
