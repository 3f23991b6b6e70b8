"""A store of features on disk: ragged rows, found by name, written once and read through memory maps.

A store is a folder. What it was computed from stands in `store.json`; each process that fills it writes segments of its
own: `<segment>.rows`, the rows one after another, and, once these are safely on disk, `<segment>.index`, their names,
places and checksums, and what they are of. A segment without an index, or shorter than it says, was torn by a kill and
is not used; a row is checked against its checksum the first time it is read.

Where two segments hold the same row, a process takes its own, else the oldest, so that a resumed run reads what the
interrupted one did.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..distributed import rank
from .segment import BITS, Segment

logger = logging.getLogger(__name__)

_SPARE = 64 << 20
"""Bytes that are always left free on the disk."""
_ABANDONED = 24 * 3600
"""Seconds after which rows without an index, to which nobody wrote, are taken for those of a killed run."""


class FeatureStore:
    """The features of one trunk, by row.

    Args:
        folder: its own; made where it is missing.
        identity: what the features depend on, plain values; those of another identity are never read.
        dtype: in which rows are kept: float64, float32, bfloat16 or float16.
        limit: bytes it may take on disk; rows past it are not kept.
    Raises:
        OSError: the folder cannot be made or written.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any], *, dtype: torch.dtype, limit: float) -> None:
        self.folder, self.dtype, self.limit = Path(folder), dtype, limit
        self.full: str | None = None
        """Why no more rows are kept."""
        self._shape: tuple[int, ...] | None = None  # of one token
        self._where: dict[bytes, tuple[int, int]] = {}  # row → segment, place in its index
        self._segments: list[Segment] = []
        self._known: set[str] = set()
        self._bytes = 0
        self._open: Segment | None = None
        self._of = hashlib.blake2b(json.dumps(dict(identity), sort_keys=True).encode(), digest_size=8).hexdigest()
        self._own = f"{rank():04d}-"  # how the names of this process's segments begin
        self.folder.mkdir(parents=True, exist_ok=True)
        self._claim(dict(identity))
        self._tidy()
        self.refresh()

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, key: bytes) -> bool:
        return key in self._where

    @property
    def bytes(self) -> int:
        """What its rows take on disk, as far as this process knows."""
        return self._bytes

    def _claim(self, identity: dict[str, Any]) -> None:
        """Write down what the features are of; empty the folder where it holds those of something else."""
        file, text = self.folder / "store.json", json.dumps(identity, sort_keys=True, indent=1)
        if file.is_file():
            if file.read_bytes() == text.encode():
                return
            logger.warning("The features in %s are of another model or version, and are computed again.", self.folder)
            for path in self.folder.iterdir():
                if path.suffix in (".rows", ".index"):
                    path.unlink(missing_ok=True)
        part = file.with_name(f"store.{uuid.uuid4().hex}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(file)

    def _tidy(self) -> None:
        """Delete what a killed run left unfinished; nobody can read it."""
        for rows in self.folder.glob("*.rows"):
            try:
                left = not rows.with_suffix(".index").exists() and time.time() - rows.stat().st_mtime > _ABANDONED
                if left:
                    rows.unlink()
            except OSError:  # another process was faster
                continue

    def refresh(self) -> None:
        """Take in what other processes finished since."""
        for index in sorted(self.folder.glob("*.index"), key=lambda x: (not x.name.startswith(self._own), x.name[5:])):
            if index.stem not in self._known:
                self._known.add(index.stem)
                self._take(Segment.read(index))

    def _take(self, segment: Segment | None) -> None:
        if segment is None:
            return
        if (segment.of, segment.dtype) != (self._of, str(self.dtype)) or self._shape not in (None, segment.shape):
            segment.close()
            return
        self._shape = segment.shape
        number = len(self._segments)
        self._segments.append(segment)
        self._bytes += segment.size
        for place, key in enumerate(segment.keys()):
            self._where.setdefault(key, (number, place))

    def add(self, keys: Sequence[bytes], rows: Sequence[Tensor]) -> int:
        """Keep rows that are not there yet.

        Args:
            rows: each (tokens, …), on any device, in any floating dtype.
        Returns: how many of them are new; none once the store is full, see `full`.
        """
        added = 0
        for key, row in zip(keys, rows, strict=True):
            if key in self._where or self.full:
                continue
            array = self._bits(row)
            if self._shape is None:
                self._shape = array.shape[1:]
            if self._bytes + array.nbytes > self.limit:
                self.full = f"{self.folder} has reached its limit of {self.limit / 1e9:g} GB"
                break
            try:
                if self._open is None:
                    self._open = self._begin(array.shape[1:])
                place = self._open.append(key, array)
            except OSError as error:  # a full disk, or a folder that somebody removed
                self.full = str(error)
                break
            self._where[key] = (self._segments.index(self._open), place)
            self._bytes += array.nbytes
            added += 1
        return added

    def _begin(self, shape: tuple[int, ...]) -> Segment:
        if shutil.disk_usage(self.folder).free < _SPARE:
            raise OSError(f"the disk of {self.folder} is full")
        name = f"{self._own}{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
        self._known.add(name)
        segment = Segment(self.folder / f"{name}.rows", shape, str(self.dtype), BITS[self.dtype], self._of)
        segment.create()
        self._segments.append(segment)
        return segment

    def read(
        self,
        keys: Sequence[bytes],
        spans: Sequence[tuple[int, int]] | None,
        tokens: int | None,
        otherwise: Sequence[Tensor] | None = None,
    ) -> Tensor | None:
        """The rows of these names as one batch, zeros where a row has no real token.

        A row that does not agree with its checksum is forgotten, to be computed again.

        Args:
            keys: the names.
            spans: the places of the real tokens of each row; None where all are.
            tokens: of the batch, with its padding; None: of the first row.
            otherwise: what to take for a row that is missing, each as for `add`.
        Returns: (rows, tokens, …), in `dtype`, on the CPU; None if a row is missing.
        """
        arrays = []
        for place, key in enumerate(keys):
            where = self._where.get(key)
            array = None if where is None else self._segments[where[0]].row(where[1])
            if array is not None and spans is not None and len(array) != spans[place][1] - spans[place][0]:
                array = None
            if array is None:
                self._where.pop(key, None)
                if otherwise is None:
                    return None
                array = self._bits(otherwise[place])
            arrays.append(array)
        batch = torch.zeros(len(arrays), tokens or len(arrays[0]), *arrays[0].shape[1:], dtype=self.dtype)
        bits = batch.view(_torch_bits(self.dtype)).numpy()
        for row, array in enumerate(arrays):
            first, end = spans[row] if spans is not None else (0, bits.shape[1])
            bits[row, first:end] = array
        return batch

    def _bits(self, row: Tensor) -> np.ndarray:
        """A row in the dtype of the store, as unsigned integers, which numpy has for every dtype."""
        return row.detach().to(device="cpu", dtype=self.dtype).contiguous().view(_torch_bits(self.dtype)).numpy()

    def seal(self) -> None:
        """Make what was added since safe on disk, for later runs and other processes."""
        segment, self._open = self._open, None
        if segment is None:
            return
        try:
            segment.seal()
        except OSError as error:
            logger.warning(
                "The features in %s could not be finished (%s). This run goes on with those that it has; other "
                "processes and later runs will compute them again.",
                self.folder,
                error,
            )

    def close(self, *, remove: bool = False) -> None:
        """Let go of all files. With `remove`, delete them too."""
        if not remove:
            self.seal()
        for segment in self._segments:
            segment.close()
        self._segments, self._where, self._open = [], {}, None
        if remove:
            shutil.rmtree(self.folder, ignore_errors=True)


def _torch_bits(dtype: torch.dtype) -> torch.dtype:
    return {8: torch.uint64, 4: torch.uint32, 2: torch.uint16}[dtype.itemsize]
