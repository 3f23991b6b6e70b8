"""A Trainer's events, handed to the engine of the plan that it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from .engine import Engine


class Events(TrainerCallback):
    """Added to a Trainer last, so that it runs after the user's callbacks.

    Args:
        trainer: a `Bridge`.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    @property
    def _engine(self) -> Engine | None:
        return self._trainer._engine

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._trainer._begin()

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self._trainer._begin_epoch()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if self._engine is not None:
            self._engine.step_begin(self._trainer.state.global_step)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        if self._engine is not None:
            if not self._trainer._step_loss.done:
                raise self._trainer._bypassed("training_step")
            self._engine.before_update(may_overflow=self._trainer.accelerator.scaler is not None)

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        if self._engine is not None:
            self._engine.after_update(skipped=self._trainer.accelerator.optimizer_step_was_skipped)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self._engine is not None:
            self._engine.step_end(self._trainer.state.global_step)
            self._trainer._stop_if_told()

    def on_evaluate(self, *_: Any, metrics: Mapping[str, float] | None = None, **__: Any) -> None:
        if self._engine is not None:
            self._engine.evaluated(metrics or {})

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._trainer._prove()
