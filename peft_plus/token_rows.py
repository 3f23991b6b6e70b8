"""How long a row of tokens may be: what a model has learned positions for, read from its modules."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .layers import transformers_model
from .tuning import tuner_of


@dataclass(frozen=True)
class Positions:
    """Learned absolute positions; rotary and relative ones have no end.

    Attributes:
        size: tokens of a row that have a position.
        virtual: tokens that the tuner puts in front of the row or beside it; they take positions too.
        pad: a token id that takes none, in models that count the others (RoBERTa, OPT); None where all take one.
    """

    size: int
    virtual: int = 0
    pad: int | None = None

    def fault(self, row: Any) -> str | None:
        """What is wrong with a row of this length, or nothing.

        Args:
            row: token ids, shape (tokens,).
        """
        length = len(row) if self.pad is None else int((row != self.pad).sum())
        if length + self.virtual <= self.size:
            return None
        besides = f", of which {self.virtual} go to the virtual tokens" if self.virtual else ""
        return (
            f"has {length} tokens, and the model has positions for {self.size}{besides}. Cut the rows: "
            f"model.peft_plus.task.preprocess does, with max_length={self.size - self.virtual}"
        )


def positions_of(model: nn.Module) -> Positions | None:
    """The positions of the rows' tokens; None where there is no such limit, or where it is not known."""
    base: Any = transformers_model(model)
    seq2seq = getattr(base.config, "is_encoder_decoder", False)
    stack = base.get_encoder() if seq2seq else base
    found = [one for name, module in stack.named_modules() if (one := _size(stack, name, module)) is not None]
    if not found:
        return None
    size, pad = min(found, key=lambda one: one[0])
    config: Any = tuner_of(model).config
    virtual = 0
    if getattr(config, "is_prompt_learning", False):
        beside = getattr(config.peft_type, "value", config.peft_type) == "PREFIX_TUNING"
        # A prefix stands before the decoder of an encoder-decoder.
        virtual = 0 if beside and seq2seq else config.num_virtual_tokens
    return Positions(size, virtual, pad)


def segments_of(base: nn.Module) -> int | None:
    """How many `token_type_ids` the model has."""
    found = [m for name, m in base.named_modules() if name.rpartition(".")[2] == "token_type_embeddings"]
    sizes = {module.num_embeddings for module in found if isinstance(module, nn.Embedding)}
    return sizes.pop() if len(found) == len(sizes) == 1 else None


def _size(stack: nn.Module, name: str, module: Any) -> tuple[int, int | None] | None:
    """(positions, id that takes none) of a module of learned positions.

    The three forms of transformers are known by what they do, not by their model: positions that are taken from a
    buffer of as many, GPT-2's, and BART's with an offset.
    """
    parent, _, own = name.rpartition(".")
    module = getattr(module, "base_layer", module)
    if not isinstance(module, nn.Embedding):
        return None
    holder: Any = stack.get_submodule(parent)
    match own:
        case "position_embeddings":
            places = getattr(holder, "position_ids", None)
            if not isinstance(places, Tensor) or places.shape[-1] != module.num_embeddings:
                return None  # counted in another way, e.g. anew in each cell of a table
            pad = module.padding_idx
            if hasattr(holder, "create_position_ids_from_input_ids") and pad is not None:
                return module.num_embeddings - pad - 1, pad
            return module.num_embeddings, None
        case "wpe":
            return module.num_embeddings, None
        case "embed_positions" if "LearnedPositional" in type(module).__name__:
            by_mask = "attention_mask" in inspect.signature(type(module).forward).parameters
            pad = getattr(stack.config, "pad_token_id", None) if by_mask else None
            return module.num_embeddings - getattr(module, "offset", 0), pad
        case _:
            return None
