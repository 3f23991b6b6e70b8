"""What a trunk's output depends on beside the input: when a store may be used, and when it is another's."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from ..errors import MethodError
from ..layers import Layers, transformers_model
from ..proof import checksum
from .passes import trunk_blocks

_NOT_FOR_THE_TRUNK = frozenset(
    {"problem_type", "id2label", "label2id", "use_cache", "_name_or_path", "architectures", "dtype", "torch_dtype"}
)
"""Settings of a model that change nothing below its head. Some are written by its first pass, or when it is saved."""


def settings_of(model: nn.Module) -> dict[str, str]:
    """Digests of the settings of a model and of its adapters, taken before training: saving a model changes some."""
    inner: Any = transformers_model(model)
    config = {name: value for name, value in inner.config.to_dict().items() if name not in _NOT_FOR_THE_TRUNK}
    adapters = {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()}
    return {"config": _digest(config), "adapters": _digest(adapters)}


def identity(
    model: nn.Module, layers: Layers, depth: int, *, settings: dict[str, str], autocast: str
) -> dict[str, Any]:
    """All that the output of block `depth` depends on: weights, settings, and the kernels that compute it.

    Args:
        settings: see `settings_of`.
        autocast: in which dtype the pass computes, or `off`.
    Returns: plain values, equal where features may be shared.
    Raises:
        MethodError: a weight is out of reach (offloaded, or sharded over processes).
    """
    from .. import __version__

    inner: Any = transformers_model(model)
    weights = _weights(model, layers, depth)
    adapters = _adapter_weights(model)
    idle = _idle_lora(model)
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in weights.items():
        if name in idle:
            continue
        if tensor.is_meta or type(tensor).__name__ == "DTensor":
            place = "offloaded" if tensor.is_meta else "sharded over processes (FSDP)"
            raise MethodError(f"trunk_cache cannot read the frozen weight {name!r}, which is {place}. Leave it out.")
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}{checksum(tensor)}".encode())
    at_work = [name for name in weights if name in adapters and name not in idle]
    return {
        "model": type(inner).__name__,
        "config": settings["config"],
        "attention": str(getattr(inner.config, "_attn_implementation", None)),
        "adapters": [settings["adapters"], *getattr(model, "active_adapters", ())] if at_work else [],
        "block": depth,
        "weights": digest.hexdigest(),
        "device": next(iter(weights.values())).device.type,
        "autocast": autocast,
        "precision": torch.get_float32_matmul_precision(),
        "versions": [torch.__version__, transformers.__version__, peft.__version__, __version__],
    }


def _digest(settings: dict[str, Any]) -> str:
    """Of settings as plain values; sets are sorted, since their order is another in each process."""
    text = json.dumps(settings, sort_keys=True, default=lambda x: sorted(map(str, x)) if isinstance(x, set) else str(x))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _weights(model: nn.Module, layers: Layers, depth: int) -> dict[str, Tensor]:
    """Name → every tensor that the output of block `depth` may depend on, scales of quantised weights among them."""
    blocks = trunk_blocks(model, layers, depth)
    modules = {module: name for name, module in model.named_modules()}
    found: dict[str, Tensor] = {}
    found |= {name: tensor for name, tensor in model.named_parameters() if layers.depth.get(name, depth + 1) <= depth}
    for block in blocks:
        for name, value in block.state_dict().items():
            if isinstance(value, Tensor):
                found.setdefault(f"{modules[block]}.{name}", value)
    return found


def _adapter_weights(model: nn.Module) -> set[str]:
    prefix = getattr(getattr(model, "base_model", None), "prefix", None)
    return {name for name, _ in model.named_parameters() if prefix and prefix in name}


def _idle_lora(model: nn.Module) -> set[str]:
    """The LoRA weights that change nothing, since their B is zero: so runs of different seeds share a store."""
    idle: set[str] = set()
    for name, module in model.named_modules():
        downs, ups = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
        if not (isinstance(downs, nn.ModuleDict) and isinstance(ups, nn.ModuleDict)):
            continue
        for adapter, up in ups.items():
            plain = not getattr(module, "use_dora", {}).get(adapter)
            if plain and not any(bool(weight.any()) for weight in up.parameters()):
                idle |= {f"{name}.lora_B.{adapter}.{own}" for own, _ in up.named_parameters()}
                idle |= {f"{name}.lora_A.{adapter}.{own}" for own, _ in downs[adapter].named_parameters()}
    return idle
