"""Bytes that training needs beside the weights, counted rather than sampled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Saved:
    """What autograd kept for the backward pass.

    Attributes:
        bytes: of all storages but the weights', each once.
    """

    bytes: int = 0


@contextmanager
def saved_activations(model: Any) -> Iterator[Saved]:
    """Count what is saved for the backward pass while this is open."""
    import torch

    weights = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    found: dict[int, int] = {}
    saved = Saved()

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        yield saved
    saved.bytes = sum(found.values())


def gradients_and_states(model: Any, optimizer: Any) -> int:
    """Bytes of all gradients and of the optimizer's state."""
    import torch

    gradients = sum(tensor.grad.nbytes for tensor in model.parameters() if tensor.grad is not None)
    states = [value for state in optimizer.state.values() for value in state.values()]
    return gradients + sum(value.nbytes for value in states if isinstance(value, torch.Tensor))
