"""One file of rows, one after another, and the index that stands over it once all of them are safely on disk."""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from .rows import KEY

logger = logging.getLogger(__name__)

BITS: Mapping[torch.dtype, Any] = {
    torch.float64: np.uint64,
    torch.float32: np.uint32,
    torch.bfloat16: np.uint16,
    torch.float16: np.uint16,
}
"""The dtypes that rows may have, and the unsigned integers as which numpy sees them."""

_INDEX = np.dtype([("key", f"V{KEY}"), ("start", "<i8"), ("length", "<i4"), ("check", "<u4")])
_MAGIC = b"peft_plus rows 1\n"


class Segment:
    """Rows that one process wrote, one after another."""

    def __init__(self, file: Path, shape: tuple[int, ...], dtype: str, bits: Any, of: str) -> None:
        self.file, self.shape, self.dtype, self._bits, self.of = file, shape, dtype, bits, of
        self.size = 0
        self._width = int(np.prod(shape, dtype=np.int64)) * np.dtype(bits).itemsize  # bytes of a token
        self._index: list[tuple[bytes, int, int, int]] = []
        self._checked: set[int] = set()
        self._writer: FileIO | None = None
        self._reader: BinaryIO | None = None
        self._map: np.memmap[Any, Any] | None = None

    def create(self) -> None:
        self._writer = open(self.file, "xb", buffering=0)  # noqa: SIM115 - it stays open while rows come
        self._reader = open(self.file, "rb")  # noqa: SIM115 - now, so that it outlives the file's name

    def append(self, key: bytes, array: np.ndarray) -> int:
        assert self._writer is not None
        if os.fstat(self._writer.fileno()).st_size != self.size:  # what was cut off would come back as zeros
            raise OSError(f"{self.file} was changed by somebody")
        data = array.tobytes()
        if self._writer.write(data) != len(data):
            os.truncate(self._writer.fileno(), self.size)  # half a row
            raise OSError(f"the disk of {self.file.parent} is full")
        self._index.append((key, self.size, len(array), zlib.crc32(data)))
        self._checked.add(len(self._index) - 1)
        self.size += len(data)
        return len(self._index) - 1

    def seal(self) -> None:
        """Rows first, their index last and at once: an index stands only over rows that are on disk."""
        assert self._writer is not None
        os.fsync(self._writer.fileno())
        if not self.file.exists():
            raise FileNotFoundError(f"{self.file} was deleted meanwhile")
        told = {"shape": list(self.shape), "dtype": self.dtype, "size": self.size, "of": self.of}
        head = json.dumps(told).encode() + b"\n"
        body = np.array([(key, *rest) for key, *rest in self._index], _INDEX).tobytes()
        part = self.file.with_suffix(".part")
        with open(part, "wb") as out:
            out.write(_MAGIC + head + zlib.crc32(head + body).to_bytes(4, "little") + body)
            out.flush()
            os.fsync(out.fileno())
        part.replace(self.file.with_suffix(".index"))
        self._writer.close()
        self._writer = None

    @classmethod
    def read(cls, index: Path) -> Segment | None:
        """A finished segment, or None where it is torn."""
        try:
            magic, head, rest = index.read_bytes().split(b"\n", 2)
            body = rest[4:]
            if magic + b"\n" != _MAGIC or zlib.crc32(head + b"\n" + body) != int.from_bytes(rest[:4], "little"):
                raise ValueError("it is damaged")
            told = json.loads(head)
            file = index.with_suffix(".rows")
            if file.stat().st_size < told["size"]:
                raise ValueError("its rows are cut short")
            bits = next(bits for dtype, bits in BITS.items() if str(dtype) == told["dtype"])
            segment = cls(file, tuple(told["shape"]), told["dtype"], bits, told["of"])
            table = np.frombuffer(body, _INDEX)
            segment._index = [(bytes(key), int(at), int(n), int(check)) for key, at, n, check in table.tolist()]
            segment.size, segment._reader = told["size"], open(file, "rb")  # noqa: SIM115 - as in `create`
        except (OSError, ValueError, KeyError, StopIteration) as error:
            logger.warning("The features in %s are not used (%s), and are computed again.", index, error)
            return None
        return segment

    def keys(self) -> list[bytes]:
        return [key for key, *_ in self._index]

    def row(self, place: int) -> np.ndarray | None:
        """One row, shape (tokens, …), or None where the file no longer holds it."""
        _, start, length, check = self._index[place]
        if not length:
            return np.zeros((0, *self.shape), self._bits)
        end = start + length * self._width
        assert self._reader is not None
        if os.fstat(self._reader.fileno()).st_size < end:  # cut off meanwhile: to touch it would kill the process
            return None
        if self._map is None or self._map.nbytes < end:
            self._map = np.memmap(self._reader, np.uint8, "r", shape=(self.size,))
        data = self._map[start:end]
        if place not in self._checked:
            if zlib.crc32(data.data) != check:
                logger.warning("A row of %s is damaged, and is computed again.", self.file)
                return None
            self._checked.add(place)
        return np.frombuffer(data, self._bits).reshape(length, *self.shape)

    def close(self) -> None:
        for file in (self._writer, self._reader):
            if file is not None:
                file.close()
        self._map = None
