"""Training arguments for tests: on the CPU, silent, saving nothing unless asked."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainingArguments


def quiet(folder: Any, *, kind: type[TrainingArguments] = TrainingArguments, **settings: Any) -> Any:
    """TrainingArguments that write only into `folder`; `settings` come last and win.

    Args:
        kind: a subclass, such as TRL's configs.
    """
    silence = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    return kind(str(folder), **{**silence, **settings})


class StopAt(TrainerCallback):
    """Ends a run after a step, as if it had been interrupted there."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == self._step
