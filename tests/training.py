"""Training arguments for tests: on the CPU, silent, saving nothing unless asked."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments


def quiet(folder: Any, *, kind: type[TrainingArguments] = TrainingArguments, **settings: Any) -> Any:
    """TrainingArguments that write only into `folder`; `settings` come last and win.

    Args:
        kind: a subclass, such as TRL's configs.
    """
    silence = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    return kind(str(folder), **{**silence, **settings})
