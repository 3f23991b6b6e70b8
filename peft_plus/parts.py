"""Which part of the model a parameter belongs to: adapter, head or base."""

from __future__ import annotations

from torch import nn

from .plugin import Part

_SHORTER_PREFIX = {"ADAPTION_PROMPT": "adaption_"}
"""Where the prefix that PEFT registers is not how its parameters are called."""


def part_of(name: str, model: nn.Module, heads: tuple[str, ...]) -> Part:
    """The part of the parameter `name` of `model`.

    PEFT's own rule tells adapters: their names hold the tuner's prefix, the adapter's name, or the prompt encoder.
    """
    bare = bare_name(name, model)
    if any(bare == head or bare.startswith(head + ".") for head in heads) and not _has_prefix(name, model):
        return "head"
    return "adapter" if is_adapter(name, model) else "base"


def is_adapter(name: str, model: nn.Module) -> bool:
    """Whether PEFT added this parameter, copies in `modules_to_save` included."""
    adapters = getattr(model, "peft_config", None)
    if not adapters:
        return False
    pieces = name.split(".")
    return "prompt_encoder" in pieces or any(a in pieces for a in adapters) or _has_prefix(name, model)


def bare_name(name: str, model: nn.Module) -> str:
    """The name without what PEFT wraps around a module."""
    configs = getattr(model, "peft_config", None)
    if configs:
        prompted = any(config.is_prompt_learning for config in configs.values())
        name = name.removeprefix("base_model." if prompted else "base_model.model.")
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def _has_prefix(name: str, model: nn.Module) -> bool:
    configs = getattr(model, "peft_config", None)
    if not configs:
        return False
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    types = {config.peft_type for config in configs.values()}
    prefixes = {_SHORTER_PREFIX.get(kind, PEFT_TYPE_TO_PREFIX_MAPPING.get(kind)) for kind in types}
    return any(prefix and prefix in name for prefix in prefixes)
