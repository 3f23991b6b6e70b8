"""The data of a bare loop: prepared, in an order that a resumed run finds again, with names for their rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Sampler

from .compose import Plan
from .data_columns import check_columns
from .data_limits import check_batch, limits_of
from .data_sample import data_sample
from .epoch_data import Keyed, StreamCollate, check_settings, epoch_loader
from .errors import DataError, MethodError
from .named_rows import Collate, Rows, hands_on
from .sampling import order
from .stage_data import StageData, stage_data
from .stage_start import check_without_epochs
from .stages import Stage
from .trunk import TrainingData


class SessionData:
    """What a Session trains on.

    Args:
        model: as built, not wrapped.
        plan, stage: what runs.
        seed: of their order and of random collators.
    Attributes:
        batch_size: rows of a micro-batch of one process; 0 before there is a loader.
        examples: rows of the user's data, or None where they have no length.
        steps_per_epoch: optimizer steps; 0 where the data have no length, or there is no loader yet.
        sample: a digest of some rows; see `data_sample`.
    """

    def __init__(self, model: nn.Module, plan: Plan, stage: Stage, accelerator: Accelerator, *, seed: int) -> None:
        self._model, self._plan, self._stage, self._accelerator = model, plan, stage, accelerator
        self._seed = seed
        self.batch_size, self.steps_per_epoch = 0, 0
        self.examples: int | None = None
        self.sample: str | None = None
        self._keyed: Keyed | None = None
        self._sampler: Any = None
        self._rows: Rows | None = None
        self._data = StageData(None)
        self._collate: Collate | None = None
        self._own_collate: Callable[[list[Any]], Any] | None = None  # without what looks at the rows
        self._judged = False  # whether the labels were compared with what the model takes
        self._taken = 0  # micro-batches of the epoch at work

    def loader(
        self,
        dataset: Any,
        batch_size: int,
        *,
        collate_fn: Callable[[list[Any]], Any] | None,
        shuffle: bool,
        max_steps: int | None,
        **settings: Any,
    ) -> Any:
        """See `Session.loader`.

        Args:
            max_steps: what the user said, if anything: data without a length need it.
        """
        if isinstance(dataset, DataLoader):
            raise MethodError(
                "session.loader takes the dataset, not a DataLoader, whose order a resumed run could not find again: "
                "session.loader(dataset, batch_size=…, collate_fn=…)."
            )
        if hasattr(dataset, "__len__") and len(dataset) == 0:
            raise DataError("The training data are empty: session.loader was given a dataset without rows.")
        self.batch_size, self.sample = batch_size, data_sample(dataset)
        sized = hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset)
        self.examples = len(dataset) if sized else None  # type: ignore[arg-type]
        start = {"seed": self._seed, "batch_size": batch_size, "processes": self._accelerator.num_processes}
        ids = limits_of(self._model, self._plan.task, own_loss=True)  # the labels may be meant for your own loss
        collate, accelerator = collate_fn or self._default_collate(), self._accelerator
        self._own_collate = collate
        if hands_on(collate):
            check_columns(dataset, ids, "dataset")
        plan, stage, model = self._plan, self._stage, self._model
        self._data = stage_data(plan, stage, model, dataset, tokenizer=plan.task.tokenizer, **start)
        dataset = self._data.dataset
        self._rows = Rows(dataset, "dataset") if sized else None
        collate = self._collate = Collate(collate, ids, self._rows, "dataset")
        wanted = order(plan, stage, model, dataset, **start)
        if self._rows is None:
            check_settings(settings)
            if max_steps is None:
                raise MethodError("The data have no length, so epochs cannot be counted: give Session max_steps=.")
            check_without_epochs(plan, stage, model, max_steps)
            self._keyed = StreamCollate(collate, seed=self._seed, rank=accelerator.process_index)
            return accelerator.prepare(DataLoader(dataset, batch_size, collate_fn=self._keyed, **settings))
        loader = epoch_loader(
            self._rows,
            batch_size=batch_size,
            collate=collate,
            order=wanted,
            shuffle=shuffle,
            seed=self._seed,
            rank=accelerator.process_index,
            **settings,
        )
        self._keyed, self._sampler = loader.dataset, loader.sampler  # type: ignore[assignment]
        prepared = accelerator.prepare(loader)
        self.steps_per_epoch = math.ceil(len(prepared) / accelerator.gradient_accumulation_steps)
        return prepared

    def _default_collate(self) -> Callable[[list[Any]], Any]:
        task = self._plan.task
        if task.tokenizer is not None and task.name:
            return task.collator(task.tokenizer, self._model)
        from transformers import default_data_collator

        return default_data_collator

    def training_data(self) -> TrainingData:
        """What is known of the data before training."""
        if self._rows is None or self._own_collate is None:
            return TrainingData()
        dataset, collate, accelerator = self._rows.dataset, self._own_collate, self._accelerator

        def loader(order: Sampler[int], rows: int) -> Iterator[Any]:
            places = list(order)
            for start in range(accelerator.process_index * rows, len(places), accelerator.num_processes * rows):
                batch = collate([dataset[row] for row in places[start : start + rows]])
                yield send_to_device(batch, accelerator.device)

        return TrainingData(dataset=dataset, loader=loader, collator=collate, redrawn_by=self._data.redrawn_by)

    def begin(self, loader: Any, epoch: int, first: int) -> None:
        """Before `loader` is iterated in an epoch, from its micro-batch number `first` on."""
        parts: list[Any] = [loader, self._sampler]
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        if self._keyed is not None:
            self._keyed.begin(epoch, first)
        if self._rows is not None:
            self._rows.begin()
        self._taken = 0

    def take(self, number: int) -> None:
        """So many more micro-batches were taken from the loader."""
        self._taken += number

    def rows_of_last(self, number: int) -> Sequence[Sequence[int]]:
        """The rows of the dataset in each of the last `number` micro-batches taken, as far as they are known."""
        if self._rows is None:
            return ()
        return [self._rows.of_batch(place) for place in range(self._taken - number, self._taken)]

    def judge_labels(self, batch: Mapping[str, Any]) -> None:
        """Once it is known that the loss is the model's own: this batch's labels, the whole column, and what comes."""
        if self._judged:
            return
        self._judged = True
        limits = limits_of(self._model, self._plan.task, own_loss=False)
        check_batch({name: v.cpu() for name, v in batch.items() if isinstance(v, Tensor)}, limits, "dataset", ())
        if self._collate is not None:
            self._collate.limits = limits
            if self._rows is not None and self._collate.hands_on:
                check_columns(self._rows.dataset, limits, "dataset")
