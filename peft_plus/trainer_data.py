"""Random data that a resumed Trainer finds again: their order, their rows, and what the collator draws.

transformers puts the random state back when the first batch of a resumed epoch is there. By then the epoch's order and
its first batches were drawn, from another state than in the run that was interrupted.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoint_trouble import loading
from .epoch_data import Keyed, keyed
from .random_state import rng_state, set_rng_state
from .state_files import has_state, read_state, write_state
from .trainer_loss import owners
from .trainer_state import StateFiles


class RepeatableData(StateFiles):
    """Draws the order of an epoch from the state in which it began, and each batch from a stream of its own."""

    _data: Keyed | None = None
    _epoch_start: Mapping[str, Any] | None = None  # the random state in which the epoch at work began

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        self._data = keyed(loader, seed=self.args.seed, rank=self.args.process_index)
        return loader

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> Any:
        begin = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None or num_update_steps_per_epoch != max_steps or (self.state.epoch or 0) <= 1:
            return begin
        # The data have no length, so the Trainer takes all steps for one epoch, and would look for this one beyond the
        # data's end. How often they were read through stands before the point, how many batches since behind it.
        recorded = json.loads(Path(resume_from_checkpoint, "trainer_state.json").read_text(encoding="utf-8"))[
            "max_steps"
        ]
        passes, part = divmod(self.state.epoch, 1)
        batches = round(part * recorded * self.args.gradient_accumulation_steps)
        return int(passes), 0 if self.args.ignore_data_skip else batches

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        own = owners(type(self), "_run_epoch")[-1]._run_epoch  # transformers', whose parameters have names
        given = inspect.signature(own).bind(self, *args, **kwargs).arguments
        epoch, checkpoint = given["epoch"], given["resume_from_checkpoint"]
        first = 0  # batch that this process has not seen yet
        if checkpoint is not None and epoch == given["epochs_trained"]:
            first = 0 if self.args.ignore_data_skip else given["steps_trained_in_current_epoch"]
            if first:
                self._load_epoch_start(checkpoint)
            else:
                self._load_rng_state(checkpoint)
        if self._data is not None:
            self._data.begin(epoch, first)
        self._epoch_start = rng_state()
        super()._run_epoch(*args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._epoch_start is not None:
            write_state(self._epoch_start_stem(output_dir), self._epoch_start)

    def _load_epoch_start(self, checkpoint: str) -> None:
        stem = self._epoch_start_stem(checkpoint)
        with loading(checkpoint):
            if has_state(stem):  # transformers' own checkpoints have none
                set_rng_state(read_state(stem))

    def _epoch_start_stem(self, folder: str) -> Path:
        stem = self._rng_stem(folder)
        return stem.with_name(f"epoch_{stem.name}")
