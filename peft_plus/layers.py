"""Depth of every parameter, any architecture: 0 = embeddings, 1..L = blocks from the input, L + 1 = head.

There is no table of models. The blocks are the module list that the config counts; what lies beside them is placed by
the order in which each module's own `forward` names its children, since registration order often differs from it (OPT
registers its final norm before the blocks, BART its embedding norm after them). Where there is no source to read,
registration order decides. Nothing runs and no weight is touched, so meta and quantised models are fine.

What everyone may rely on: a parameter that is used before the output of block k exists has a depth ≤ k, so freezing
depths 0..k freezes all that this output is computed from.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

from peft import PeftMixedModel, PeftModel
from torch import nn
from transformers import MODEL_MAPPING, PreTrainedConfig

Stack = tuple[str, ...]
"""Names of the blocks of one stack, from its input to its output."""

_COUNTS = (
    "num_hidden_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "num_encoder_layers",
    "num_decoder_layers",
)
"""Where configs say how many blocks there are; transformers maps the older words (`n_layer`, …) to the first."""


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
    stacks = _stacks(inner)
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
    itself (T5), it is what runs after the last stack, norms excepted. A base model has none.

    Raises:
        ValueError: the base model cannot be told from the head, and there is no list of blocks either.
    """
    inner = transformers_model(model)
    if isinstance(inner, _base_classes(inner)):
        return ()
    base = getattr(inner, "base_model", inner)
    if base is not inner:
        trunk = {name for name, child in inner.named_children() if any(module is base for module in child.modules())}
    else:
        trunk = {block.split(".")[0] for block in _block_depths(_stacks(inner))}
    children = _in_run_order(inner)
    last = max((i for i, child in enumerate(children) if child.name in trunk), default=-1)
    loops = set(children[last].use.loops)  # what runs between the blocks is no head
    return tuple(
        child.name
        for child in children[last + 1 :]
        if isinstance(child.place, nn.Module)
        and loops.isdisjoint(child.use.loops)
        and (base is not inner or not _is_norm(child.place))
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


# --- Which modules are the blocks ---


def _stacks(model: nn.Module) -> list[Stack]:
    """The stacks of blocks: two in an encoder-decoder, else one."""
    config: Any = getattr(model, "config", None)
    paired = bool(getattr(config, "is_encoder_decoder", False))
    configs = [config]
    root = ""
    if paired:
        configs += [sub for sub in vars(config).values() if isinstance(sub, PreTrainedConfig)]
    elif isinstance(config, PreTrainedConfig) and (text := config.get_text_config()) is not config:
        configs = [text]
        root = next((n for n, m in model.named_modules() if type(getattr(m, "config", None)) is type(text)), "")
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
        use = _uses(type(model.get_submodule(owner))).get(attribute)
        shares_weights = use is not None and use.loops and not use.iterated and len(module) < max(counts, default=0)
        if not shares_weights:
            return _items(name, module)
    sizes = " or ".join(map(str, sorted(counts))) or "config.num_hidden_layers"
    raise ValueError(
        f"{type(model).__name__} has no list of blocks, so its parameters have no depth. Looked for an nn.ModuleList "
        f"or nn.Sequential of {sizes} modules (what the config counts), for stages of config.depths blocks, and for the "
        "longest list of modules of one class. In a model that runs the same layers again and again every layer is the "
        "same weights: train it without methods that tell layers apart."
    )


def _lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList | nn.Sequential]]:
    """Every list all of whose items have parameters, outer ones first."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) and all(map(_has_parameters, module)):
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
    return tuple(f"{name}.{child}" if name else child for child in module._modules)


def _is_counts(value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(type(n) is int for n in value)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _is_norm(module: nn.Module) -> bool:
    return all(parameter.ndim <= 1 for parameter in module.parameters())


# --- What lies beside the blocks ---


class _Use(NamedTuple):
    """Where a `forward` first names an attribute: as the how-manieth, inside which loops, as what is looped over."""

    order: int
    loops: tuple[int, ...] = ()
    iterated: bool = False


class _Child(NamedTuple):
    name: str
    place: nn.Module | nn.Parameter
    use: _Use


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
        children = _in_run_order(module)
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


def _in_run_order(module: nn.Module) -> list[_Child]:
    """The children with parameters and the own parameters of `module`, sorted by where its `forward` names them first.

    One that `forward` does not name stays behind the one registered before it.
    """
    uses = _uses(type(module))
    children: list[_Child] = []
    before = _Use(-1)
    for name, place in chain(module.named_parameters(recurse=False), module.named_children()):
        if isinstance(place, nn.Parameter) or _has_parameters(place):
            before = uses.get(name, _Use(before.order))
            children.append(_Child(name, place, before))
    return sorted(children, key=lambda child: child.use.order)


@lru_cache(maxsize=512)
def _uses(cls: type[nn.Module]) -> Mapping[str, _Use]:
    """Attribute → its first use in `cls.forward`, with the methods of the same file that it calls read in place."""
    reader = _Reader(cls)
    reader.read("forward")
    return reader.uses


class _Reader(ast.NodeVisitor):
    """Reads `self.x` in the order of evaluation: in `self.head(self.norm(x))` the norm comes first."""

    def __init__(self, cls: type[nn.Module]) -> None:
        self.cls = cls
        self.uses: dict[str, _Use] = {}
        self.loops: tuple[int, ...] = ()
        self.num_loops = 0
        self.in_head = False
        self.reading: set[str] = set()

    def read(self, name: str) -> None:
        function = inspect.unwrap(getattr(self.cls, name, None))  # type: ignore[arg-type]
        if not inspect.isfunction(function) or name in self.reading:
            return
        if function.__module__ != inspect.unwrap(self.cls.forward).__module__:
            return
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, SyntaxError):  # no source: registration order decides
            return
        self.reading.add(name)
        for node in tree.body:
            for statement in getattr(node, "body", ()):
                self.visit(statement)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.visit(node.value)
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            self.uses.setdefault(node.attr, _Use(len(self.uses), self.loops, self.in_head))
            self.read(node.attr)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in ("len", "hasattr"):
            return  # asks about the module, does not run it
        for child in (*node.args, *node.keywords, node.func):
            self.visit(child)

    def visit_Compare(self, node: ast.Compare) -> None:
        if not isinstance(node.ops[0], ast.Is | ast.IsNot):
            self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        self._loop([node.iter], node.body)

    def visit_While(self, node: ast.While) -> None:
        self._loop([], node.body)

    def _loop(self, head: Sequence[ast.AST], body: Sequence[ast.AST]) -> None:
        outer, self.num_loops = self.loops, self.num_loops + 1
        self.loops = (*outer, self.num_loops)
        self.in_head = True
        for node in head:
            self.visit(node)
        self.in_head = False
        for node in body:
            self.visit(node)
        self.loops = outer


# --- Heads ---


def _base_classes(model: nn.Module) -> tuple[type, ...]:
    """The classes that AutoModel builds for this config, which have no head."""
    config: Any = getattr(model, "config", None)
    found = MODEL_MAPPING.get(type(config), ()) if isinstance(config, PreTrainedConfig) else ()
    return tuple(found) if isinstance(found, tuple | list) else (found,)


def _output_embeddings(model: nn.Module, base: nn.Module) -> tuple[str, ...]:
    """The vocabulary projection where it sits inside one of two joined models (EncoderDecoderModel)."""
    get = getattr(model, "get_output_embeddings", None)
    output = get() if base is model and callable(get) else None
    return tuple(name for name, module in model.named_modules() if module is output and output is not None)
