"""Whole or not there: the manifest that seals a training checkpoint.

A checkpoint is whole when `manifest.json` is there and every file that it lists has the size and SHA-256 that it tells.
It is written last, by rename, after everything else has reached the disk; so a run that is killed, or a disk that is
full, leaves a folder that nothing takes for a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1
UNFINISHED = ".unfinished"
"""Empty file in a folder that is being written: tells an unfinished checkpoint from one of transformers' own."""

REPLACED = "replaced-"
"""Prefix of a whole checkpoint's folder while a new one of the same step is being written."""

_CHUNK = 1 << 18
_THREADS = 4
_LONGEST_MANIFEST = 64 << 20
_READ_ON_RESUME = re.compile(
    r"((pytorch_)?model|adapter_(model|config)|optimizer|scheduler|scaler|plan_state|session|thawed|(epoch_)?rng_state|pytorch_model_fsdp)"
    r"(_\d+)?(\.(safetensors|bin|pt|pth|json|safetensors\.index\.json|bin\.index\.json))?"
)


@dataclass(frozen=True)
class Checkpoint:
    """One whole checkpoint.

    Attributes:
        folder: where it lies.
        step: finished optimizer steps.
        identity: of the run that wrote it; empty where transformers' own Trainer did.
        files: relative path, with `/`, → size in bytes and SHA-256; empty where transformers' own Trainer wrote it.
    """

    folder: Path
    step: int
    identity: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def sealed(self) -> bool:
        """Whether its integrity is known."""
        return bool(self.files)

    @property
    def size(self) -> int:
        """In bytes, as far as it is known."""
        return sum(size for size, _ in self.files.values())


def unseal(folder: str | Path) -> None:
    """Make `folder` an empty one, into which a checkpoint is about to be written.

    A sealed one of the same step is set aside, still whole and found, until `seal` has replaced it. What an unfinished
    attempt left is removed, so that the new checkpoint holds nothing of it.
    """
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        aside = folder.with_name(REPLACED + folder.name)
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
        _sync_folder(folder.parent)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / UNFINISHED).touch()  # before anything goes: what a kill leaves half-deleted is marked, too
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != UNFINISHED:
            path.unlink()


def is_unfinished(folder: str | Path) -> bool:
    """Whether it is what a save left that never came to its end: nothing is lost with it."""
    folder = Path(folder)
    return not (folder / MANIFEST).exists() and ((folder / UNFINISHED).exists() or not any(folder.iterdir()))


def seal(folder: str | Path, identity: Mapping[str, Any], step: int) -> Checkpoint:
    """Declare what lies in `folder` a whole checkpoint. Call when every process has written its part.

    Each file is read once, hashed, and brought to the disk before the manifest that lists it.

    Args:
        identity: plain values that tell which run this is; see `run_identity`.
        step: finished optimizer steps.
    Raises:
        CheckpointError: the folder holds something that cannot be sealed (a link to a folder, a device).
        OSError: the disk is full, or the like; the folder stays unsealed.
    """
    folder = Path(folder)
    paths = sorted(set(_files(folder)) - {MANIFEST, UNFINISHED})
    files = dict(zip(paths, _measure([folder / path for path in paths], sync=True), strict=True))
    for place, _, _ in os.walk(folder):
        _sync_folder(Path(place))
    listed = {path: {"size": size, "sha256": digest} for path, (size, digest) in files.items()}
    body = {"format": FORMAT, "step": step, "sealed_at": time.time_ns(), "identity": identity, "files": listed}
    text = _manifest(body)
    temporary = folder / f".{MANIFEST}.tmp"
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / MANIFEST)
    (folder / UNFINISHED).unlink(missing_ok=True)
    _sync_folder(folder)
    _sync_folder(folder.parent)
    shutil.rmtree(folder.with_name(REPLACED + folder.name), ignore_errors=True)
    return Checkpoint(folder, step, identity, files)


def sealed_at(folder: str | Path) -> int:
    """When a checkpoint was sealed, in nanoseconds since 1970: as its manifest tells, else when its folder changed.

    Tells which of two courses of a run is the later one. A time of the files alone would not survive a copy.
    """
    folder = Path(folder)
    try:
        told = json.loads((folder / MANIFEST).read_bytes())["sealed_at"]
        if type(told) is int:
            return told
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # told by `verify`, where it matters
        pass
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return 0


def verify(folder: str | Path) -> Checkpoint:
    """The sealed checkpoint in `folder`, if it is whole. Reads every file once; loads nothing.

    Raises:
        CheckpointError: it is missing, unfinished or damaged, or its manifest is not one of ours; names what is wrong.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist.")
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder} was never finished: it has no {MANIFEST}.")
    checkpoint = _read_manifest(folder)
    try:
        faults = list(_faults(checkpoint))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}.") from error
    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(f"{folder} is damaged: {'; '.join(faults[:3])}{more}.")
    return checkpoint


def _read_manifest(folder: Path) -> Checkpoint:
    """What a manifest says, after checking that it says nothing that a manifest of ours could not."""
    path = folder / MANIFEST
    try:
        if path.stat().st_size > _LONGEST_MANIFEST:
            raise ValueError(f"it is {path.stat().st_size} bytes long")
        text = path.read_bytes().decode("utf-8")
        content = json.loads(text, object_pairs_hook=_unique)
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, this peft_plus reads {FORMAT}; update it")
        step, identity = content["step"], content["identity"]
        if type(step) is not int or step < 0 or not isinstance(identity, dict) or not content["files"]:
            raise ValueError("step, identity or files are not what they should be")
        if type(content["sealed_at"]) is not int:
            raise ValueError("when it was sealed is no number")
        if _manifest({key: value for key, value in content.items() if key != "sha256"}) != text:
            raise ValueError("its own SHA-256 differs")
        files: dict[str, tuple[int, str]] = {}
        for name, entry in content["files"].items():
            size, digest = entry["size"], entry["sha256"]
            if not _is_inside(name) or type(size) is not int or size < 0 or not re.fullmatch("[0-9a-f]{64}", digest):
                raise ValueError(f"the entry {name!r} is not allowed")
            files[name] = (size, digest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged, or no manifest of ours: {type(error).__name__}: {error}.") from error
    return Checkpoint(folder, step, identity, files)


def _manifest(body: Mapping[str, Any]) -> str:
    """The text of a manifest, which ends with the SHA-256 of all that it says before."""
    digest = hashlib.sha256(json.dumps(body, allow_nan=False).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1, allow_nan=False) + "\n"


def _faults(checkpoint: Checkpoint) -> Iterator[str]:
    """What differs from the manifest: first what is cheap to see, and only if nothing does, the contents."""
    present = set(_files(checkpoint.folder))
    sound = True
    for path, (size, _) in checkpoint.files.items():
        if path not in present:
            yield f"{path} is missing"
        elif (actual := (checkpoint.folder / path).stat().st_size) != size:
            yield f"{path} has {actual} bytes instead of {size}"
        else:
            continue
        sound = False
    for path in sorted(present - checkpoint.files.keys() - {MANIFEST}):
        if any(_READ_ON_RESUME.fullmatch(part) for part in PurePosixPath(path).parts):
            yield f"{path} was put there after the checkpoint was finished, and would be loaded"
            sound = False
    if sound:
        measured = _measure([checkpoint.folder / path for path in checkpoint.files])
        for (path, expected), actual in zip(checkpoint.files.items(), measured, strict=True):
            if actual != expected:
                yield f"{path} was changed (its SHA-256 differs)"


def _files(folder: Path) -> Iterator[str]:
    """Relative path, with `/`, of every file, through sub-folders."""
    for place, folders, names in os.walk(folder, onerror=_raise):
        linked = [name for name in folders if (Path(place) / name).is_symlink()]
        odd = [name for name in names if not stat.S_ISREG((Path(place) / name).stat().st_mode)]
        for name in linked + odd:
            raise CheckpointError(
                f"{Path(place) / name} is a link to a folder, or no plain file, which a checkpoint cannot hold."
            )
        yield from ((Path(place) / name).relative_to(folder).as_posix() for name in names)


def _measure(paths: list[Path], *, sync: bool = False) -> list[tuple[int, str]]:
    """Size and SHA-256 of each file, read once; with `sync`, all on the disk when this returns."""

    def one(path: Path) -> tuple[int, str]:
        digest, size = hashlib.sha256(), 0
        buffer = memoryview(bytearray(_CHUNK))
        with open(path, "rb+" if sync and os.name == "nt" else "rb", buffering=0) as file:  # Windows syncs only writers
            if sync:
                os.fsync(file.fileno())
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                size += count
        return size, digest.hexdigest()

    with ThreadPoolExecutor(_THREADS) as pool:  # hashing and waiting for the disk both let go of the interpreter
        return list(pool.map(one, paths))


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return  # folders cannot be opened there
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_inside(name: str) -> bool:
    """Whether a manifest's path stays in its folder, on any system, and is written in the one way that we write."""
    path = PurePosixPath(name)
    return (
        path.as_posix() == name != MANIFEST
        and not path.is_absolute()
        and not {"..", "."} & {name, *path.parts}
        and not re.search(r"[\\:\x00-\x1f]", name)
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("it names something twice")
    return dict(pairs)


def _raise(error: OSError) -> None:
    raise error
