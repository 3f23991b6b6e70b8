"""A saved folder as read before anything is built from it: plain files, bounded sizes, strict JSON, safetensors only.

Nothing here imports, executes or follows what a folder names, and no weight is read: of safetensors files only the
header, which tells every tensor's name, shape and dtype.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError, safe_open

from .errors import MethodError
from .saving import RECORD, THAWED

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
FILES = (CONFIG, WEIGHTS, RECORD, THAWED)
"""All that is ever read from a folder, or fetched from the hub."""

MAX_JSON = 2 * 2**20
"""Bytes of a JSON file that are read; a list of 30,000 modules fits."""

MAX_HEADER = 32 * 2**20
"""Bytes of a safetensors header that are read; 200,000 tensors fit."""

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class RecordedPlugin(BaseModel):
    """One plugin of `peft_plus.json`. A name, never a path to a module: it is looked up among what is installed."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=100)
    origin: str = Field(max_length=200)
    settings: dict[str, Any]


class RecordedTask(BaseModel):
    """The task of `peft_plus.json`."""

    name: str = Field(pattern=r"^[A-Za-z0-9_]*$", max_length=100)
    settings: dict[str, Any]
    labels: list[str] | None


class RecordedBase(BaseModel):
    """The base that was trained on, of `peft_plus.json`."""

    name_or_path: str
    class_name: str = Field(alias="class")
    fingerprint: str
    dtype: str | None = None


class Record(BaseModel):
    """What is used of `peft_plus.json`."""

    format: int = Field(ge=1, le=1)
    tuner: str = Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=100)
    tuner_origin: str = Field(default="", max_length=200)
    plugins: list[RecordedPlugin]
    task: RecordedTask
    quantization: str | None
    base: RecordedBase
    thawed_tensors: list[str]


@dataclass(frozen=True)
class AdapterFolder:
    """What a folder says, checked in itself but not yet against a model.

    Attributes:
        path: the folder.
        config: `adapter_config.json`.
        record: `peft_plus.json`; None where plain PEFT saved.
        weights, thawed: name → a tensor without memory, of the shape and dtype that the file declares.
    """

    path: Path
    config: Mapping[str, Any]
    record: Record | None
    weights: Mapping[str, torch.Tensor]
    thawed: Mapping[str, torch.Tensor]


def read_folder(path: Path) -> AdapterFolder:
    """Read what a folder declares; sub-folders and all other files are ignored.

    Raises:
        MethodError: a file is missing, no plain file, too large, damaged, or of a format that could run code.
    """
    if not path.is_dir():
        raise MethodError(f"The folder {str(path)!r} does not exist.")
    record = None
    if os.path.lexists(path / RECORD):
        record = _record(path / RECORD)
    if record is not None and record.tuner == "full":
        plugins = {plugin.name: plugin.settings for plugin in record.plugins}
        raise MethodError(
            f"{str(path)!r} holds a whole model (method 'full'), not an adapter: there is no base to put it on. Load "
            f"it with transformers' own from_pretrained, or to train on, get_model({str(path)!r}, "
            f"method={shortened({'full': {}} | plugins)}, task={record.task.name!r})."
        )
    if os.path.lexists(path / PICKLED):
        raise MethodError(
            f"{path / PICKLED} is a pickle, which can run code when it is loaded. If you trust it, load it once with "
            "plain PEFT and save it again, which writes safetensors; else delete it."
        )
    if not os.path.lexists(path / CONFIG):
        inside = sorted(p.parent.name for p in path.glob(f"*/{CONFIG}"))
        hint = f" Adapters lie in its sub-folders {shortened(inside)}: name one of those." if inside else ""
        raise MethodError(f"{str(path)!r} holds no {CONFIG}, so it is no adapter that PEFT saved.{hint}")
    config = read_json(path / CONFIG)
    thawed: dict[str, torch.Tensor] = {}
    if os.path.lexists(path / THAWED):
        thawed = declared_tensors(path / THAWED)
    if sorted(thawed) != sorted(record.thawed_tensors if record else ()):
        raise MethodError(
            f"{path / THAWED} does not hold what {RECORD} lists under 'thawed_tensors': {shortened(sorted(thawed))}. "
            "Copy both from where they were saved."
        )
    return AdapterFolder(path, config, record, declared_tensors(path / WEIGHTS), thawed)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object: UTF-8, no key twice, no NaN or infinity, at most `MAX_JSON` bytes."""
    check_plain_file(path)
    size = path.stat().st_size
    if size > MAX_JSON:
        raise MethodError(f"{path} has {size:,} bytes; more than {MAX_JSON:,} are not read.")
    try:
        value = json.loads(
            path.read_bytes().decode("utf-8"),
            object_pairs_hook=_without_repeats,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except RecursionError:
        raise MethodError(f"{path} is nested too deeply.") from None
    except ValueError as error:  # bad UTF-8, bad JSON, or one of the hooks
        raise MethodError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise MethodError(f"{path} holds a {type(value).__name__}, not an object of settings.")
    return value


def declared_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, by name, without memory: its header, and that it covers the file exactly."""
    check_plain_file(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > min(MAX_HEADER, max(0, path.stat().st_size - 8)):
        raise MethodError(f"{path} is damaged: it declares a header of {length:,} bytes.")
    try:
        with safe_open(path, framework="pt") as stored:
            # Maps the file, reads the header alone.
            slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118  # no mapping
            declared = {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}
    except SafetensorError as error:
        raise MethodError(f"{path} is damaged: {error}") from error
    for name, (shape, dtype) in declared.items():
        if dtype not in _DTYPES:
            raise MethodError(
                f"{path}: {shortened(name)} is stored as {dtype}, which no adapter is. Known: {', '.join(_DTYPES)}."
            )
        if math.prod(shape) >= 2**62:
            raise MethodError(f"{path}: {shortened(name)} declares the shape {shortened(shape)}.")
    return {name: torch.empty(shape, dtype=_DTYPES[dtype], device="meta") for name, (shape, dtype) in declared.items()}


def check_finite(path: Path) -> None:
    """Refuse weights that are NaN or infinite: every output would be. Reads one tensor at a time."""
    with safe_open(path, framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118  # no mapping
            tensor = stored.get_tensor(name)
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise MethodError(
                    f"{path}: {shortened(name)} holds NaN or infinity, so whatever it is used for is NaN. The training "
                    "that wrote it diverged, or the file is damaged: go back to an earlier checkpoint."
                )


def check_plain_file(path: Path) -> None:
    """Refuse what is missing, no plain file (a FIFO would block), or a link out of the folder."""
    try:
        target = path.resolve(strict=True)
        kind = os.stat(target).st_mode
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise MethodError(f"{path} does not exist, or is a link that leads nowhere.") from error
    folder = path.parent.resolve()
    # The hub's cache keeps a snapshot as links to the blobs beside it.
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    if target.parent not in (folder, blobs):
        raise MethodError(f"{path} is a link out of its folder, to {target}. Put the file itself there.")
    if not stat.S_ISREG(kind):
        raise MethodError(f"{path} is no plain file ({stat.filemode(kind)}).")


def shortened(value: Any, limit: int = 200) -> str:
    """A value of a folder as messages show it: a folder must not flood the terminal."""
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "…"


def _record(path: Path) -> Record:
    text = read_json(path)
    if isinstance(text.get("format"), int) and text["format"] > 1:
        raise MethodError(
            f"{path} has format {shortened(text['format'])}, which a newer peft_plus wrote; this one reads format 1. "
            "Update it: pip install -U peft-plus"
        )
    try:
        return Record.model_validate(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise MethodError(
            f"{path}: {where}: {first['msg']}, not {shortened(first['input'])}. Delete the file to load the adapter as "
            "plain PEFT would."
        ) from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) < len(pairs):
        raise ValueError(f"a key stands twice among {shortened([key for key, _ in pairs])}")
    return seen


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{shortened(digits)} is no finite number")
    return number
