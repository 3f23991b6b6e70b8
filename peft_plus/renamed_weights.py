"""Checkpoints of whole models whose files call some weights otherwise than the model does.

transformers saves a few architectures, ViT among them, under names of older releases. `from_pretrained` knows them; a
Trainer that resumes reads the file as it is, warns, and goes on with weights that were never loaded.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import CheckpointError


def left_out(model: nn.Module, missing: Collection[str]) -> list[str]:
    """Of the names that a file did not hold, those that no other name stands for (tied weights have several)."""
    state = model.state_dict()
    loaded = {tensor.data_ptr() for name, tensor in state.items() if name not in missing}
    return [name for name in missing if name in state and state[name].data_ptr() not in loaded]


@torch.no_grad()
def load_by_their_class(model: Any, folder: str | Path) -> None:
    """Load a folder as the model's own class does, into the tensors that an optimizer holds already.

    Raises:
        CheckpointError: it does not hold all of this model.
    """
    cls, double = type(model), any(tensor.dtype == torch.float64 for tensor in model.parameters())
    wide = torch.float64 if double else torch.float32  # so that parts of another dtype than the rest lose nothing
    fresh, told = cls.from_pretrained(folder, config=model.config, dtype=wide, output_loading_info=True)
    lacking = [*told["missing_keys"], *(str(key) for key in told["mismatched_keys"])]
    if lacking:
        raise CheckpointError(f"{folder} does not hold this model: {sorted(lacking)[0]!r} is not in it.")
    model.load_state_dict(fresh.state_dict())
