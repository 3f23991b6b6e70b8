"""Which modules are the blocks: the module lists that the config counts, found by looking."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from .run_order import has_parameters, uses_of

Stack = tuple[str, ...]
"""Names of the blocks of one stack, from its input to its output."""

_COUNTS = (
    *("num_hidden_layers", "num_layers"),
    *("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"),
)
"""Where configs say how many blocks there are; transformers maps the older words (`n_layer`, …) to the first."""


def stacks_of(model: nn.Module) -> list[Stack]:
    """The stacks of blocks: two in an encoder-decoder, else one."""
    config: Any = getattr(model, "config", None)
    paired = bool(getattr(config, "is_encoder_decoder", False))
    configs = [config]
    root = ""
    if paired:
        configs += [sub for sub in vars(config).values() if isinstance(sub, PreTrainedConfig)]
    elif isinstance(config, PreTrainedConfig) and (text := config.get_text_config()) is not config:
        configs = [text]
        part = next((n for n, m in model.named_modules() if type(getattr(m, "config", None)) is type(text)), "")
        root = f"{part}." if part else ""
    counts = {n for c in configs for key in _COUNTS if isinstance(n := getattr(c, key, None), int)}
    stages = [v for c in configs for v in getattr(c, "__dict__", {}).values() if _is_counts(v)]
    found: dict[str, Stack] = {}
    for name, module in _lists(model):
        if not name.startswith(root) or any(name.startswith(f"{outer}.") for outer in found):
            continue  # the sub-layers of a block may be as many as the blocks
        if staged := next(filter(None, (_staged(name, module, lengths) for lengths in stages)), None):
            found[name] = staged
        elif len(module) in counts:
            found[name] = _items(name, module)
    if not found:
        return [_longest(model, counts)]
    # A head may be as long as the stack: the blocks are what most parameters are in.
    largest = sorted(found, key=lambda name: _size(model.get_submodule(name)), reverse=True)[: 1 + paired]
    return [found[name] for name in found if name in largest]


def _longest(model: nn.Module, counts: set[int]) -> Stack:
    """Without a config that counts them: the longest list of modules of one class, of which there are two or more."""
    alike = [(name, x) for name, x in _lists(model) if len(x) > 1 and len({type(child) for child in x}) == 1]
    if alike:
        name, module = max(alike, key=lambda item: (len(item[1]), _size(item[1])))
        owner, _, attribute = name.rpartition(".")
        use = uses_of(type(model.get_submodule(owner))).get(attribute)
        shares_weights = use is not None and use.loops and not use.iterated and len(module) < max(counts, default=0)
        if not shares_weights:
            return _items(name, module)
    sizes = " or ".join(map(str, sorted(counts))) or "config.num_hidden_layers"
    raise ValueError(
        f"{type(model).__name__} has no list of blocks, so its parameters have no depth. Looked for an nn.ModuleList "
        f"or nn.Sequential of {sizes} modules (what the config counts), for stages as long as config.depths says, and "
        "for the longest list of two or more different modules of one class. A model that runs one set of weights as "
        "every layer has no depths: train it without methods that tell layers apart."
    )


def _lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList | nn.Sequential]]:
    """Every list of different modules that all have parameters, outer ones first."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(set(module)) < len(module):
            continue
        if len(module) and all(map(has_parameters, module)):
            yield name, module


def _staged(name: str, stages: nn.ModuleList | nn.Sequential, lengths: Sequence[int]) -> Stack:
    """The blocks of all stages in order, or () when stage i does not hold a list of `lengths[i]` of them."""
    if len(stages) != len(lengths):
        return ()
    blocks: list[str] = []
    for stage, length in zip(_items(name, stages), lengths, strict=True):
        lists = [(path, x) for path, x in _lists(stages.get_submodule(stage.rpartition(".")[2])) if len(x) == length]
        if not lists:
            return ()
        path, blocks_of_stage = max(lists, key=lambda item: _size(item[1]))  # not its downsampling, if a list as well
        blocks += _items(f"{stage}.{path}" if path else stage, blocks_of_stage)
    return tuple(blocks)


def _items(name: str, module: nn.Module) -> Stack:
    return tuple(f"{name}.{child}" if name else child for child, _ in module.named_children())


def _is_counts(value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(type(n) is int for n in value)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def is_norm(module: nn.Module) -> bool:
    """Whether all its parameters are vectors or scalars, as in a normalisation."""
    return all(parameter.ndim <= 1 for parameter in module.parameters())
