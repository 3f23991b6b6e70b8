"""A store of rows on disk: what comes back is what went in, and what is torn, stale or of another model never comes."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_plus.trunk import FeatureStore
from peft_plus.trunk import segment as segment_module
from peft_plus.trunk import store as store_module

OF = {"weights": "abc", "block": 2}


OPEN: list[FeatureStore] = []


@pytest.fixture(autouse=True)
def _closes() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().close()


def opened(folder: Any, *, of: Any = None, dtype: torch.dtype = torch.float32, limit: float = 1e9) -> FeatureStore:
    OPEN.append(FeatureStore(folder, of or OF, dtype=dtype, limit=limit))
    return OPEN[-1]


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def rows(*lengths: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(length, 4, generator=draw).to(dtype) for length in lengths]


def row(store: FeatureStore, number: int) -> Tensor | None:
    batch = store.read([key(number)], None, None)
    return None if batch is None else batch[0]


def filled(folder: Any, *lengths: int, first: int = 0, seal: bool = True) -> list[Tensor]:
    """A store that some process filled, and left."""
    kept = rows(*lengths, seed=first)
    store = opened(folder)
    assert store.add([key(first + i) for i in range(len(lengths))], kept) == len(lengths)
    if seal:
        store.close()
    return kept


def segments(folder: Path, suffix: str) -> list[Path]:
    return sorted(folder.glob(f"*{suffix}"))


# ---- what goes in comes back ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_back_bit_for_bit_in_any_batch(dtype: torch.dtype, tmp_path: Path) -> None:
    kept = rows(5, 1, 0, 3, dtype=dtype)
    kept[0][0, 0], kept[0][1, 1], kept[0][2, 2] = float("nan"), float("-inf"), -0.0
    store = opened(tmp_path, dtype=dtype)
    store.add([key(i) for i in range(4)], kept)
    for found in (store, None):
        if found is None:
            store.close()
            found = opened(tmp_path, dtype=dtype)
        spans = [(1, 4), (0, 5), (2, 2), (5, 6)]
        batch = found.read([key(i) for i in (3, 0, 2, 1)], spans, 6)
        assert batch is not None
        assert (batch.dtype, batch.shape) == (dtype, (4, 6, 4))
        wanted = torch.zeros(4, 6, 4, dtype=dtype)
        for place, (number, (first, end)) in enumerate(zip((3, 0, 2, 1), spans, strict=True)):
            wanted[place, first:end] = kept[number]
        bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
        assert torch.equal(batch.view(bits), wanted.view(bits))


def test_rows_may_have_more_dimensions_and_come_in_another_dtype(tmp_path: Path) -> None:
    store = opened(tmp_path, dtype=torch.bfloat16)
    image = torch.randn(3, 2, 5)
    store.add([key(0)], [image])
    assert torch.equal(row(store, 0), image.bfloat16())  # type: ignore[arg-type]


def test_what_is_added_later_is_found_too_also_past_the_map_that_was_made_before(tmp_path: Path) -> None:
    store = opened(tmp_path)
    kept = rows(*range(1, 60))
    for number, one in enumerate(kept):
        store.add([key(number)], [one])
        assert torch.equal(row(store, number), one)  # type: ignore[arg-type]
        assert torch.equal(row(store, 0), kept[0])  # type: ignore[arg-type]
    store.seal()
    store.add([key(99)], [kept[7]])
    assert torch.equal(row(store, 99), kept[7])  # type: ignore[arg-type]
    assert store.bytes == sum(one.nbytes for one in kept) + kept[7].nbytes


def test_a_row_is_kept_once(tmp_path: Path) -> None:
    store = opened(tmp_path)
    first, second = rows(3, 3)
    assert store.add([key(0), key(0)], [first, second]) == 1
    assert store.add([key(0)], [second]) == 0
    assert torch.equal(row(store, 0), first)  # type: ignore[arg-type]
    assert store.bytes == first.nbytes


def test_a_row_that_is_not_there_may_come_from_elsewhere(tmp_path: Path) -> None:
    store = opened(tmp_path)
    there, missing = rows(2, 3)
    store.add([key(0)], [there])
    assert store.read([key(0), key(1)], None, None) is None
    other = torch.zeros(2, 4)
    batch = store.read([key(0), key(1)], [(0, 2), (1, 4)], 4, [other, missing])
    assert batch is not None
    assert torch.equal(batch[0, :2], there)
    assert torch.equal(batch[1, 1:], missing)
    assert key(1) not in store


# ---- who finds it --------------------------------------------------------------------------------------------------


def test_rows_are_found_again_after_they_were_sealed_and_only_then(tmp_path: Path) -> None:
    writer = opened(tmp_path)
    first, second = rows(3, 4)
    writer.add([key(0)], [first])
    assert len(opened(tmp_path)) == 0
    reader = opened(tmp_path)
    writer.seal()
    assert row(reader, 0) is None
    reader.refresh()
    assert torch.equal(row(reader, 0), first)  # type: ignore[arg-type]
    writer.add([key(1)], [second])
    reader.refresh()
    assert key(1) not in reader
    writer.close()
    assert len(opened(tmp_path)) == 2


@pytest.mark.parametrize("of", [{"weights": "abd", "block": 2}, {"weights": "abc", "block": 3}, {"weights": "abc"}])
def test_what_is_of_another_model_is_thrown_away(of: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    filled(tmp_path, 3, 3)
    store = opened(tmp_path, of=of)
    assert len(store) == 0
    assert "are of another model or version, and are computed again" in caplog.text
    assert segments(tmp_path, ".rows") == []
    assert json.loads((tmp_path / "store.json").read_text()) == of


@pytest.mark.parametrize("how", ["missing", "garbage", "cut"])
def test_a_folder_that_does_not_say_of_what_it_is_serves_only_its_own(how: str, tmp_path: Path) -> None:
    kept = filled(tmp_path, 3)
    told = tmp_path / "store.json"
    if how == "missing":
        told.unlink()
        assert torch.equal(row(opened(tmp_path), 0), kept[0])  # type: ignore[arg-type]
        told.unlink()
        assert len(opened(tmp_path, of={"weights": "other"})) == 0  # each segment says it, too
    else:
        told.write_bytes(b"\xff\x00" if how == "garbage" else told.read_bytes()[:-3])
        assert len(opened(tmp_path)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rows_of_another_dtype_are_not_taken_for_these(dtype: torch.dtype, tmp_path: Path) -> None:
    filled(tmp_path, 3)
    assert len(opened(tmp_path, dtype=dtype)) == 0


def test_rows_of_another_width_are_not_taken_for_these(tmp_path: Path) -> None:
    filled(tmp_path, 3)
    store = opened(tmp_path / "other")
    store.add([key(5)], [torch.zeros(2, 6)])
    store.close()
    for file in (tmp_path / "other").glob("*-*"):
        shutil.move(file, tmp_path)
    found = opened(tmp_path)
    assert len(found) == 1


# ---- torn ----------------------------------------------------------------------------------------------------------


def tear(folder: Path, how: str) -> None:
    index, data = segments(folder, ".index")[0], segments(folder, ".rows")[0]
    match how:
        case "index cut":
            index.write_bytes(index.read_bytes()[:-7])
        case "index emptied":
            index.write_bytes(b"")
        case "index of another version":
            index.write_bytes(index.read_bytes().replace(b"rows 1", b"rows 2", 1))
        case "a bit of the index":
            content = bytearray(index.read_bytes())
            content[-20] ^= 4
            index.write_bytes(bytes(content))
        case "rows cut":
            os.truncate(data, data.stat().st_size - 1)
        case "rows gone":
            data.unlink()
        case "index gone":
            index.unlink()


TORN = ["index cut", "index emptied", "index of another version", "a bit of the index", "rows cut", "rows gone"]


@pytest.mark.parametrize("how", [*TORN, "index gone"])
def test_a_torn_segment_is_not_used_and_its_rows_are_stored_again(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = filled(tmp_path, 3, 5)
    whole = filled(tmp_path, 2, first=10)
    tear(tmp_path, how)
    store = opened(tmp_path)
    assert [row(store, number) for number in (0, 1)] == [None, None]
    assert torch.equal(row(store, 10), whole[0])  # type: ignore[arg-type]
    assert ("are not used (" in caplog.text) == (how != "index gone")  # without one nothing was ever promised
    assert store.add([key(0), key(1)], kept) == 2
    assert torch.equal(row(store, 1), kept[1])  # type: ignore[arg-type]
    store.close()
    assert torch.equal(row(opened(tmp_path), 0), kept[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("place", [0, 47, 48, 127])
def test_a_flipped_bit_is_noticed_and_the_row_computed_again(
    place: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = filled(tmp_path, 3, 5)  # 48 and 80 bytes
    data = segments(tmp_path, ".rows")[0]
    content = bytearray(data.read_bytes())
    content[place] ^= 1
    data.write_bytes(bytes(content))
    store = opened(tmp_path)
    hurt, sound = (0, 1) if place < 48 else (1, 0)
    assert row(store, hurt) is None
    assert "is damaged, and is computed again" in caplog.text
    assert torch.equal(row(store, sound), kept[sound])  # type: ignore[arg-type]
    assert store.add([key(hurt)], [kept[hurt]]) == 1
    assert torch.equal(row(store, hurt), kept[hurt])  # type: ignore[arg-type]


@pytest.mark.parametrize("opened_before", [False, True])
def test_a_file_that_is_cut_off_while_it_is_mapped_does_not_crash_the_process(
    opened_before: bool, tmp_path: Path
) -> None:
    """To touch a map beyond the end of its file kills a process with SIGBUS."""
    kept = [torch.randn(3000, 4) for _ in range(3)]
    writer = opened(tmp_path)
    writer.add([key(i) for i in range(3)], kept)
    writer.seal()
    store = writer if opened_before else opened(tmp_path)
    assert torch.equal(row(store, 1), kept[1])  # type: ignore[arg-type]
    os.truncate(segments(tmp_path, ".rows")[0], kept[0].nbytes + 100)
    assert row(store, 2) is None
    assert row(store, 1) is None
    assert torch.equal(row(store, 0), kept[0])  # type: ignore[arg-type]
    assert store.add([key(2)], [kept[2]]) == 1
    assert torch.equal(row(store, 2), kept[2])  # type: ignore[arg-type]


def test_what_a_killed_run_left_unfinished_is_deleted_after_a_day(tmp_path: Path) -> None:
    filled(tmp_path, 3)
    killed, running = (opened(tmp_path) for _ in range(2))
    killed.add([key(1)], rows(5))
    running.add([key(2)], rows(6))
    old = time.time() - 2 * 24 * 3600
    for file in segments(tmp_path, ".rows"):
        if file.stat().st_size != 6 * 16:
            os.utime(file, (old, old))
    store = opened(tmp_path)
    assert sorted(file.stat().st_size for file in segments(tmp_path, ".rows")) == [3 * 16, 6 * 16]
    assert len(store) == 1


# ---- no space, no folder -------------------------------------------------------------------------------------------


def test_past_its_limit_nothing_more_is_kept(tmp_path: Path) -> None:
    kept = rows(3, 3, 3)
    store = opened(tmp_path, limit=2 * kept[0].nbytes)
    assert store.add([key(i) for i in range(3)], kept) == 2
    assert store.full is not None
    assert "has reached its limit" in store.full
    assert store.add([key(7)], rows(1)) == 0
    assert [row(store, number) is None for number in range(3)] == [False, False, True]
    store.close()
    again = opened(tmp_path, limit=2 * kept[0].nbytes)
    assert (len(again), again.add([key(2)], [kept[2]])) == (2, 0)


class FullDisk:
    """A raw file on a disk that becomes full: it writes some of what it is given, or nothing with an error."""

    def __init__(self, file: Any, left: int) -> None:
        self._file, self._left = file, left

    def write(self, data: bytes) -> int:
        if not self._left:
            raise OSError(28, "No space left on device")
        part = data[: self._left]
        self._left -= len(part)
        return self._file.write(part)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize("left", [0, 10, 48])
def test_a_full_disk_ends_the_store_and_loses_nothing_that_is_in_it(left: int, tmp_path: Path) -> None:
    kept = rows(3, 3, 3)
    store = opened(tmp_path)
    store.add([key(0)], kept[:1])
    segment = store._open
    assert segment is not None
    segment._writer = FullDisk(segment._writer, left)  # type: ignore[assignment]
    whole = left // kept[1].nbytes
    assert store.add([key(1), key(2)], kept[1:]) == whole
    assert store.full is not None
    assert ("No space left" in store.full) or ("is full" in store.full)
    assert store.add([key(8)], kept[:1]) == 0
    for found in (store, None):
        if found is None:
            store.close()
            found = opened(tmp_path)
            assert segments(tmp_path, ".rows")[0].stat().st_size == (1 + whole) * kept[0].nbytes
        assert torch.equal(row(found, 0), kept[0])  # type: ignore[arg-type]
        assert [row(found, number) is None for number in (1, 2)] == [whole < 1, True]


def test_a_disk_that_is_nearly_full_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda _: usage)
    assert store.add([key(0)], rows(3)) == 0
    assert store.full == f"the disk of {tmp_path} is full"
    assert segments(tmp_path, ".rows") == []


def test_an_index_that_cannot_be_written_is_told_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened(tmp_path)
    kept = rows(3)
    store.add([key(0)], kept)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(segment_module.os, "fsync", full)
    store.seal()
    assert "could not be finished" in caplog.text
    assert torch.equal(row(store, 0), kept[0])  # type: ignore[arg-type]
    monkeypatch.undo()
    assert len(opened(tmp_path)) == 0


def test_a_folder_that_is_deleted_under_a_running_job_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "store"
    kept = rows(3, 4, 5)
    store = opened(folder)
    store.add([key(0)], kept[:1])
    shutil.rmtree(folder)
    assert store.add([key(1)], kept[1:2]) == 1  # into a file that has lost its name
    assert torch.equal(row(store, 0), kept[0])  # type: ignore[arg-type]
    assert torch.equal(row(store, 1), kept[1])  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        store.seal()
    assert "was deleted meanwhile" in caplog.text
    assert store.add([key(2)], kept[2:]) == 0
    assert store.full is not None
    assert torch.equal(row(store, 1), kept[1])  # type: ignore[arg-type]
    store.refresh()
    store.close()
    assert not folder.exists()


def test_a_folder_that_cannot_be_made_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        opened(tmp_path / "file" / "store")


def test_closed_with_remove_nothing_is_left(tmp_path: Path) -> None:
    filled(tmp_path / "store", 3)
    store = opened(tmp_path / "store")
    store.add([key(9)], rows(2))
    store.close(remove=True)
    assert list(tmp_path.iterdir()) == []


# ---- several at once -----------------------------------------------------------------------------------------------


def test_two_writers_of_one_folder_find_each_others_rows(tmp_path: Path) -> None:
    one, other = opened(tmp_path), opened(tmp_path)
    first, second = rows(3, 3, seed=1), rows(3, 3, seed=2)
    one.add([key(0), key(1)], first)
    other.add([key(1), key(2)], second)
    for store in (one, other):
        store.seal()
    for store in (one, other):
        store.refresh()
    assert torch.equal(row(one, 1), first[1])  # type: ignore[arg-type]
    assert torch.equal(row(other, 1), second[0])  # type: ignore[arg-type]
    assert [len(one), len(other)] == [3, 3]
    assert torch.equal(row(one, 2), second[1])  # type: ignore[arg-type]
    # What a resumed run finds is what the first writer found: its own, else the oldest.
    assert torch.equal(row(opened(tmp_path), 1), first[1])  # type: ignore[arg-type]


def test_a_process_takes_its_own_rows_before_older_ones_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a resumed process reads what it read before it was interrupted."""
    kept = {}
    for rank in (0, 1):
        monkeypatch.setattr(store_module, "rank", lambda rank=rank: rank)
        store = opened(tmp_path / f"{rank}")
        kept[rank] = rows(3, seed=rank)[0]
        store.add([key(0)], [kept[rank]])
        store.close()
    for rank in (1, 0):
        for file in (tmp_path / f"{rank}").glob("*-*"):
            (tmp_path / "both").mkdir(exist_ok=True)
            shutil.copy(file, tmp_path / "both")
    for rank in (0, 1):
        monkeypatch.setattr(store_module, "rank", lambda rank=rank: rank)
        assert torch.equal(row(opened(tmp_path / "both"), 0), kept[rank])  # type: ignore[arg-type]


def write(folder: Path, first: int) -> None:
    """200 rows, sealed now and then."""
    store = FeatureStore(folder, OF, dtype=torch.float32, limit=1e9)
    for number in range(first, first + 200):
        store.add([key(number)], [torch.full((1 + number % 5, 4), float(number))])
        if number % 20 == 19:
            store.seal()
    store.close()


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    children = []
    for first in (0, 100, 150):
        child = os.fork()
        if not child:
            code = 1
            try:
                write(tmp_path, first)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    store = opened(tmp_path)
    assert len(store) == 350
    for number in range(350):
        assert torch.equal(row(store, number), torch.full((1 + number % 5, 4), float(number)))  # type: ignore[arg-type]
