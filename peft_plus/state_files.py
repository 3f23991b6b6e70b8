"""Training state as files that hold no code: one JSON file for the tree, one safetensors file for its tensors.

`torch.save` writes pickles, and a pickle may run anything when it is loaded. Optimizers, schedulers, gradient scalers,
random generators and plugins keep nothing but plain values and tensors, so nothing but those is written: exactly, to
the last bit, and what is something else is refused by its place in the tree.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .errors import CheckpointError

FORMAT = 1
_MAX_DEPTH = 100
_JSON_INT = 2**63
_RAW = (torch.complex32, torch.complex128)  # dtypes that safetensors does not know: stored as bytes
_MAPPINGS: Mapping[str, type[Any]] = {"$dict": dict, "$ordered": OrderedDict, "$counter": Counter}


def write_state(stem: str | Path, tree: Any) -> None:
    """Write a tree of plain values, tensors and numpy arrays to `stem.json`, and its tensors to `stem.safetensors`.

    One tensor that stands in several places is stored once and comes back as one; views that merely overlap come back
    separate. Tensors come back detached and contiguous. Without a tensor in the tree there is no safetensors file.

    Raises:
        TypeError: the tree holds something else; names its place.
    """
    stem = Path(stem)
    encoder = _Encoder(stem.name)
    node = encoder.encode(tree)
    path = stem.with_name(stem.name + ".safetensors")
    if encoder.tensors:
        save_file(_plain(encoder.tensors), path)
    else:
        path.unlink(missing_ok=True)
    text = json.dumps({"format": FORMAT, "tensors": len(encoder.tensors), "tree": node}, allow_nan=False)
    stem.with_name(stem.name + ".json").write_text(text + "\n", encoding="utf-8")


def read_state(stem: str | Path, device: Any = "cpu") -> Any:
    """The tree that `write_state` wrote.

    Args:
        device: where tensors are put; numpy arrays stay in memory.
    Raises:
        CheckpointError: a file is missing, damaged, or of a later format.
    """
    stem = Path(stem)
    path = stem.with_name(stem.name + ".json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {content['format']!r}; this peft_plus reads {FORMAT}: update it.")
        tensors = load_file(stem.with_name(stem.name + ".safetensors")) if content["tensors"] else {}
        if len(tensors) != content["tensors"]:
            raise CheckpointError(f"{path} speaks of {content['tensors']} tensors, beside it are {len(tensors)}.")
        # Cloned: what safetensors returns may be a view of the mapped file, at any address.
        return _Decoder({name: tensor.clone() for name, tensor in tensors.items()}, device).decode(content["tree"])
    except OSError as error:
        raise CheckpointError(f"{stem} cannot be read: {error}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{stem} is damaged: {type(error).__name__}: {error}.") from error


def has_state(stem: str | Path) -> bool:
    """Whether `write_state` wrote there."""
    stem = Path(stem)
    return stem.with_name(stem.name + ".json").is_file()


def check_state(tree: Any, label: str) -> None:
    """Raise TypeError, naming the place, where `write_state` would; writes and copies nothing."""
    _Encoder(label).encode(tree)


class _Encoder:
    """Turns a tree into what JSON can say, and collects its tensors by name."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._names: dict[Any, str] = {}
        self.tensors: dict[str, Tensor] = {}

    def encode(self, value: Any, path: tuple[str, ...] = ()) -> Any:
        if len(path) > _MAX_DEPTH:
            raise TypeError(f"{self._where(path[:3])} … is nested more than {_MAX_DEPTH} deep, or holds itself.")
        kind = type(value)  # exact types only: a subclass would come back as something else
        if value is None or kind is bool:
            return value
        if kind is int:
            return value if abs(value) < _JSON_INT else {"$int": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"$float": struct.pack("<d", value).hex()}
        if kind is str:
            return value if value.isascii() or _encodable(value) else {"$str": _bytes(value).hex()}
        if kind is bytes:
            return {"$bytes": value.hex()}
        if kind in (list, tuple):
            items = [self.encode(item, (*path, str(i))) for i, item in enumerate(value)]
            return items if kind is list else {"$tuple": items}
        if kind in (dict, OrderedDict, Counter):
            return self._mapping(value, path)
        if kind is torch.dtype:
            return {"$dtype": str(value).removeprefix("torch.")}
        if kind in (Tensor, nn.Parameter):
            return self._tensor(value, path)
        if (kind is np.ndarray or isinstance(value, np.generic)) and value.dtype.kind in "biufc":
            return self._numpy(value, path)
        raise TypeError(
            f"{self._where(path)} is a {kind.__module__}.{kind.__qualname__}, which cannot be saved without pickle. "
            "Let its state_dict() return only None, numbers, text, lists, tuples, dicts, tensors and numpy arrays."
        )

    def _mapping(self, value: Mapping[Any, Any], path: tuple[str, ...]) -> Any:
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"{self._where(path)} has the key {key!r}; keys of a saved state are text or integers.")
        pairs = [(key, self.encode(item, (*path, str(key)))) for key, item in value.items()]
        plain = (type(key) is str and not key.startswith("$") and _encodable(key) for key in value)
        if type(value) is dict and all(plain):
            return dict(pairs)
        tag = next(tag for tag, kind in _MAPPINGS.items() if kind is type(value))
        return {tag: [[self.encode(key, path), item] for key, item in pairs]}

    def _tensor(self, value: Tensor, path: tuple[str, ...]) -> Any:
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            raise TypeError(f"{self._where(path)} is a tensor that is sparse, quantised or without data; not savable.")
        same = (
            value.device,
            value.data_ptr(),
            value.dtype,
            value.shape,
            value.stride(),
            value.is_conj(),
            value.is_neg(),
        )
        name = self._store(value, path, same if value.numel() else id(value))
        if value.dtype in _RAW:
            return {"$tensor": name, "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
        return {"$tensor": name}

    def _numpy(self, value: Any, path: tuple[str, ...]) -> Any:
        dtype = value.dtype.str
        if isinstance(value, np.generic):
            return {"$scalar": value.tobytes().hex(), "dtype": dtype}
        raw = torch.frombuffer(bytearray(value.tobytes()), dtype=torch.uint8) if value.size else torch.empty(0).byte()
        return {"$array": self._store(raw, path, id(value)), "dtype": dtype, "shape": list(value.shape)}

    def _store(self, tensor: Tensor, path: tuple[str, ...], same: Any) -> str:
        if same not in self._names:
            name = ".".join(path) or "tensor"
            while name in self.tensors or name == "__metadata__" or not _encodable(name):
                name = f"tensor {len(self.tensors)}"
            self._names[same], self.tensors[name] = name, tensor
        return self._names[same]

    def _where(self, path: tuple[str, ...]) -> str:
        return f"{self._label}: {'.'.join(path) or 'the whole'}"


class _Decoder:
    """The way back."""

    def __init__(self, tensors: Mapping[str, Tensor], device: Any) -> None:
        self._stored, self._device = tensors, device
        self._made: dict[str, Tensor] = {}
        self._kinds: Mapping[str, Callable[[Any, dict[str, Any]], Any]] = {
            "$int": lambda x, _: int(x, 16),
            "$float": lambda x, _: struct.unpack("<d", bytes.fromhex(x))[0],
            "$str": lambda x, _: bytes.fromhex(x).decode("utf-8", "surrogatepass"),
            "$bytes": lambda x, _: bytes.fromhex(x),
            "$tuple": lambda x, _: tuple(self.decode(item) for item in x),
            "$dtype": lambda x, _: _dtype(x),
            "$tensor": self._tensor,
            "$scalar": lambda x, node: np.frombuffer(bytes.fromhex(x), _number(node["dtype"]))[0],
            "$array": self._array,
        }

    def decode(self, node: Any) -> Any:
        if isinstance(node, list):
            return [self.decode(item) for item in node]
        if not isinstance(node, dict):
            return node
        tag = next((key for key in node if key.startswith("$")), None)
        if tag is None:
            return {key: self.decode(item) for key, item in node.items()}
        if tag in _MAPPINGS:
            return _MAPPINGS[tag]({self.decode(key): self.decode(item) for key, item in node[tag]})
        if tag not in self._kinds:
            raise ValueError(f"unknown kind of value {tag!r}")
        return self._kinds[tag](node[tag], node)

    def _tensor(self, name: str, node: dict[str, Any]) -> Tensor:
        if name not in self._made:
            tensor = self._stored[name]
            if "dtype" in node:
                tensor = tensor.view(_dtype(node["dtype"])).reshape(node["shape"])
            self._made[name] = tensor.to(self._device)
        return self._made[name]

    def _array(self, name: str, node: dict[str, Any]) -> Any:
        raw = self._stored[name].numpy().tobytes()
        return np.frombuffer(raw, _number(node["dtype"])).reshape(node["shape"]).copy()


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What safetensors takes: on the CPU, contiguous, of a dtype that it knows, no two in one piece of memory."""
    plain: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        if tensor.dtype in _RAW:
            tensor = tensor.reshape(-1).view(torch.uint8)
        own = tensor.untyped_storage()
        plain[name] = tensor.clone() if own.data_ptr() in taken or own.nbytes() != tensor.nbytes else tensor
        taken.add(own.data_ptr())
    return plain


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return dtype


def _number(name: str) -> np.dtype[Any]:
    dtype = np.dtype(name)
    if dtype.kind not in "biufc":  # above all not "O", whose bytes are addresses
        raise ValueError(f"{name!r} is no dtype of numbers")
    return dtype


def _encodable(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
