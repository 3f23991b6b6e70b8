"""A stage's training data as plugins get them before its first step, e.g. for a Fisher estimate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from .distributed import is_split
from .random_state import rng_state, set_rng_state
from .tasks import Task
from .tasks.base import own_loss
from .trunk import TrainingData


class RunData:
    """Stands behind `Run.examples` and `Run.task_gradients`.

    Args:
        model: as built, not wrapped.
        task: finds the loss.
        tensors: name → parameter of all that may train.
        data: what the loop knows of its data.
    """

    def __init__(self, model: nn.Module, task: Task, tensors: Mapping[str, nn.Parameter], data: TrainingData) -> None:
        self._model, self._task, self._tensors, self._data = model, task, tensors, data

    def batches(self, rows: int, limit: int | None) -> Iterator[Mapping[str, Any]]:
        """See `Run.examples`."""
        dataset, collate = self._data.dataset, self._data.collate or self._data.collator
        if self._data.examples is None or collate is None or isinstance(dataset, IterableDataset):
            raise ValueError(
                "this needs a pass over the training data before the first step, and they are read as a stream, or "
                "their loader is not known. Give a dataset with a length."
            )
        number = min(self._data.examples, limit or self._data.examples)
        device = next(tensor.device for tensor in self._tensors.values())
        random = rng_state()
        try:
            for batch in DataLoader(Subset(dataset, range(number)), batch_size=rows, collate_fn=collate):
                yield {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        finally:
            set_rng_state(random)

    def gradients(self, batch: Mapping[str, Any], names: Sequence[str]) -> dict[str, Tensor]:
        """See `Run.task_gradients`."""
        if is_split(self._model):
            raise ValueError("gradients of its own need a model that is whole on each process. Use DDP.")
        tensors = [self._tensors[name] for name in names]
        modes = [(module, module.training) for module in self._model.modules()]
        self._model.eval()
        try:
            with torch.enable_grad():
                loss = own_loss(self._model.forward(**batch), batch, self._task.name)
                found = torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)
        finally:
            for module, training in modes:
                module.training = training
        return dict(zip(names, found, strict=True))
