"""Depth of every parameter, any architecture: 0 = embeddings, 1..L = blocks from the input, L + 1 = head.

There is no table of models. The blocks are the module list that the config counts; what lies beside them is placed by
the order in which each module's own `forward` names its children, since registration order often differs from it (OPT
registers its final norm before the blocks, BART its embedding norm after them). Where there is no source to read,
registration order decides. Nothing runs and no weight is touched, so meta and quantised models are fine.

What everyone may rely on, within one stack: a parameter that is used before the output of block k exists has a depth
≤ k, so freezing depths 0..k freezes all that this output is computed from. (A decoder block reads the encoder too.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftMixedModel, PeftModel
from torch import nn
from transformers import MODEL_MAPPING, PreTrainedConfig

from .blocks import Stack, is_norm, stacks_of
from .run_order import in_run_order


@dataclass(frozen=True)
class Layers:
    """Where each parameter of a model sits.

    Attributes:
        num_blocks: L. For encoder-decoders the longer stack; the shorter one is aligned with its top.
        depth: every name of `model.named_parameters()` → 0..L + 1. A shared tensor counts where it is used first.
        blocks: `blocks[i]` names the modules at depth i + 1: one, or two where encoder and decoder run side by side.
    """

    num_blocks: int
    depth: Mapping[str, int]
    blocks: tuple[tuple[str, ...], ...]


def layer_map(model: nn.Module) -> Layers:
    """Number the blocks of `model` and give each of its parameters a depth.

    Encoder and decoder are aligned at the top (T5, Raffel et al. 2020, §3.5.1): block i of n has depth i + (L − n), the
    encoder's own final norm L, the decoder's L + 1. Convolutional stages are counted through; what lies between two
    blocks belongs to the one that it feeds. A module called inside the loop over the blocks has the depth of the first
    one (DeBERTa's convolution), or, as a list of equal length, goes item by item. In a multimodal model the blocks are
    the language model's, and a vision tower that feeds it has depth 0.

    Args:
        model: a transformers model, a PeftModel over one, or any module that holds a list of blocks.
    Raises:
        ValueError: no list of blocks, e.g. because all layers share one set of weights.
    """
    inner = transformers_model(model)
    stacks = stacks_of(inner)
    num_blocks = max(map(len, stacks))
    depth_of: dict[int, int] = {}
    for place, depth in _places(inner, stacks):
        for parameter in place.parameters() if isinstance(place, nn.Module) else (place,):
            depth_of[id(parameter)] = min(depth, depth_of.get(id(parameter), depth))
    # What PEFT keeps outside the model it wraps (prompt and prefix encoders) feeds the first block.
    depth = {name: depth_of.get(id(parameter), 0) for name, parameter in model.named_parameters()}
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is inner)
    rows: list[list[str]] = [[] for _ in range(num_blocks)]
    for name, at in _block_depths(stacks).items():
        rows[at - 1].append(prefix + name)
    return Layers(num_blocks, depth, tuple(map(tuple, rows)))


def transformers_model(model: nn.Module) -> nn.Module:
    """The model that PEFT wraps, or `model` itself."""
    if isinstance(model, PeftModel):
        return model.get_base_model()
    if isinstance(model, PeftMixedModel):
        return model.base_model.model
    return model


def find_heads(model: nn.Module) -> tuple[str, ...]:
    """Names of the task's heads within `transformers_model(model)`, e.g. `("pre_classifier", "classifier")`.

    A head is what has parameters, sits outside the base model and runs after it. Where the task model holds its stacks
    itself (T5), it is what runs after the last stack, norms excepted. A base model has none; where neither a base model
    nor blocks can be told, none is found.
    """
    inner = transformers_model(model)
    if isinstance(inner, _base_classes(inner)):
        return ()
    base = getattr(inner, "base_model", inner)
    if base is not inner:
        trunk = {name for name, child in inner.named_children() if any(module is base for module in child.modules())}
    else:
        try:
            stacks = stacks_of(inner)
        except ValueError:
            return ()
        trunk = {block.split(".")[0] for block in _block_depths(stacks)}
    children = in_run_order(inner)
    last = max((i for i, child in enumerate(children) if child.name in trunk), default=-1)
    loops = set(children[last].use.loops)  # what runs between the blocks is no head
    return tuple(
        child.name
        for child in children[last + 1 :]
        if isinstance(child.place, nn.Module)
        and loops.isdisjoint(child.use.loops)
        and (base is not inner or not is_norm(child.place))
    ) or _output_embeddings(inner, base)


def is_tied_head(model: nn.Module) -> bool:
    """Whether a head computes with a tensor that the rest of the model uses too: the input embeddings.

    A head that PEFT copied to train it (`modules_to_save`) is no longer tied, though the idle original still is.
    """
    inner = transformers_model(model)
    heads = [inner.get_submodule(name) for name in find_heads(inner)]
    inside = {id(module) for head in heads for module in head.modules()}
    elsewhere = {
        id(tensor)
        for module in inner.modules()
        if id(module) not in inside
        for tensor in module.parameters(recurse=False)
    }
    idle = {
        id(tensor)
        for head in heads
        for module in head.modules()
        if getattr(module, "modules_to_save", None)
        for tensor in module.get_submodule("original_module").parameters()
    }
    return any(id(tensor) in elsewhere - idle for head in heads for tensor in head.parameters())


def depth_label(depth: int, num_blocks: int) -> str:
    """`embeddings`, `block 3` or `head`, for tables.

    Raises:
        ValueError: `depth` is not in 0..`num_blocks` + 1.
    """
    if not 0 <= depth <= num_blocks + 1:
        raise ValueError(f"depth {depth} is not in 0..{num_blocks + 1}.")
    return "embeddings" if depth == 0 else "head" if depth > num_blocks else f"block {depth}"


# --- What lies beside the blocks ---


def _block_depths(stacks: Sequence[Stack]) -> dict[str, int]:
    """Block → depth, the stacks aligned at the top."""
    top = max(map(len, stacks))
    return {name: i + top - len(stack) for stack in stacks for i, name in enumerate(stack, start=1)}


def _places(model: nn.Module, stacks: Sequence[Stack]) -> list[tuple[nn.Module | nn.Parameter, int]]:
    """Cut the model into blocks and what lies beside them, each with its depth, in the order in which they run."""
    blocks = _block_depths(stacks)
    top = max(map(len, stacks))
    last = {stack[-1] for stack in stacks}
    holders = {name for block in blocks for name in _ancestors(block)}
    openings = {name for stack in stacks for name in _ancestors(stack[0])}
    places: list[tuple[nn.Module | nn.Parameter, int]] = []
    unfinished = len(stacks)

    def first_block(name: str) -> int:
        return min(at for block, at in blocks.items() if f"{block}.".startswith(f"{name}."))

    def walk(module: nn.Module, prefix: str, now: int) -> int:
        """Place all that is in `module`; `now` is the depth of what runs next."""
        nonlocal unfinished
        children = in_run_order(module)
        looped = [child for child in children if prefix + child.name in holders and child.use.loops]
        for child in children:
            name, place = prefix + child.name, child.place
            partner = next((x for x in looped if x is not child and x.use.loops[-1] in child.use.loops), None)
            if name in blocks:
                places.append((place, blocks[name]))
                now = blocks[name] + 1
                if name in last:
                    unfinished -= 1
                    now = top if unfinished else top + 1
            elif name in holders and isinstance(place, nn.Module):
                # The second stack of an encoder-decoder starts with embeddings of its own.
                now = walk(place, f"{name}.", 0 if name in openings else now)
            elif partner is None:
                places.append((place, now))
            else:
                beside = list(partner.place.children()) if isinstance(partner.place, nn.Module) else []
                items = list(place.children()) if isinstance(place, nn.ModuleList) else []
                if len(items) == len(beside):
                    places.extend((x, first_block(f"{prefix}{partner.name}.{i}")) for i, x in enumerate(items))
                else:
                    places.append((place, first_block(prefix + partner.name)))
        return now

    walk(model, "", 0)
    return places


def _ancestors(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


# --- Heads ---


def _base_classes(model: nn.Module) -> tuple[type, ...]:
    """The classes that AutoModel builds for this config, which have no head."""
    config = getattr(model, "config", None)
    found: Any = MODEL_MAPPING.get(type(config), ()) if isinstance(config, PreTrainedConfig) else ()
    return tuple(found) if isinstance(found, tuple | list) else (found,)


def _output_embeddings(model: nn.Module, base: nn.Module) -> tuple[str, ...]:
    """The vocabulary projection where it sits inside one of two joined models (EncoderDecoderModel)."""
    get = getattr(model, "get_output_embeddings", None)
    output = get() if base is model and callable(get) else None
    return tuple(name for name, module in model.named_modules() if module is output and output is not None)
