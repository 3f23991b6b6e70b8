"""Re-initialising the top blocks before training."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from peft_plus import Plugin, Run
from peft_plus.layers import find_heads, layer_map

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ReinitTop(Plugin):
    """Draw the top blocks, and what lies between them and the head, anew.

    As the model's own initialisation draws them: for BERT's kin matrices from N(0, initializer_range²), biases 0, norms
    1 and 0 (Zhang et al. 2021, arXiv:2006.05987). The pretrained top blocks fit pre-training's own task, and fresh
    ones may train better on little data. In an encoder-decoder the top blocks of both stacks are drawn. It draws from
    torch's global generator when the model is built, so `set_seed` before `get_model` rules it.

    Args:
        blocks: how many of the top blocks, in [0, L].
        pooler: whether the pooler, or whatever of the base lies above the last block, is drawn anew, too. With
            `blocks=0` and False the run is the plain one bit for bit; so it is, with a warning, with `blocks=0` and
            True where the model has no such thing.
    Raises:
        ValueError: `blocks` is negative or more than the model has; the model is none of transformers'.
    """

    name: ClassVar[str] = "reinit_top"
    source: ClassVar[str] = "Zhang et al. 2021, arXiv:2006.05987"
    needs: ClassVar[tuple[str, ...]] = ("base", "layers")

    blocks: int = 1
    pooler: bool = True

    def __post_init__(self) -> None:
        if self.blocks < 0:
            raise ValueError(f"blocks={self.blocks}: give a number of blocks ≥ 0.")

    def on_build(self, run: Run) -> None:
        if self.blocks > run.num_blocks:
            raise ValueError(f"blocks={self.blocks}: the model has {run.num_blocks} blocks.")
        if self.blocks == 0 and self.pooler and not run.rehearsal and not any(True for _ in self._places(run.model)):
            logger.warning(
                "reinit_top: blocks=0, and this model has nothing between its last block and its head, so nothing is "
                "drawn anew. Give blocks ≥ 1."
            )

    @torch.no_grad()
    def prepare_base(self, model: nn.Module) -> nn.Module:
        for name, module in self._places(model):
            redraw(_owner(model, name), module)
        return model

    def _places(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """What is drawn anew, in the model's order; nothing where `on_build` will refuse."""
        layers, heads = layer_map(model), find_heads(model)
        if self.blocks > layers.num_blocks:
            return
        top = {name for names in layers.blocks[layers.num_blocks - self.blocks :] for name in names}
        for name, module in model.named_modules():
            if name in top:
                yield name, module
            elif self.pooler and not any(name == head or name.startswith(f"{head}.") for head in heads):
                own = [f"{name}.{entry}" for entry, _ in module.named_parameters(recurse=False)]
                if any(layers.depth.get(full, 0) > layers.num_blocks for full in own):
                    yield name, module


def redraw(owner: Any, module: nn.Module) -> None:
    """Draw a module and all within it as `owner._init_weights` does, though transformers marked it as loaded.

    Children come before what holds them, as in transformers' own traversal: GPT-2's attention and T5's rescale what
    their linear layers drew.

    Args:
        owner: the PreTrainedModel whose config knows the sizes.
    """
    modules = list(module.modules())
    marked: list[Any] = [*modules, *module.parameters(), *module.buffers()]
    before = [vars(thing).pop("_is_hf_initialized", None) for thing in marked]
    try:
        module.apply(owner._init_weights)
    finally:
        for thing, mark in zip(marked, before, strict=True):
            if mark is not None:
                thing._is_hf_initialized = mark


def _owner(model: nn.Module, name: str) -> nn.Module:
    """The innermost part of the model around a module that knows how to draw weights.

    Raises:
        ValueError: there is none.
    """
    parts = name.split(".")
    for length in range(len(parts), -1, -1):
        outer = model.get_submodule(".".join(parts[:length]))
        if hasattr(outer, "_init_weights"):
            return outer
    raise ValueError(f"{type(model).__name__} does not say how its weights are drawn; transformers' models do.")
