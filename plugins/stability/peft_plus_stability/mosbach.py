"""The recipe of Mosbach et al. for stable fine-tuning on small data."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from peft_plus import Plugin, Run, Stage

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Mosbach(Plugin):
    """Train long, with a small warmed-up rate and an Adam that corrects its bias.

    Sets the training arguments (Mosbach et al. 2021, arXiv:2006.04884, §6): `epochs` passes, AdamW with bias
    correction, linear warm-up over `warmup_fraction` of all steps and linear decay to 0, clipping at `max_grad_norm`.
    What you set there yourself is replaced; a setting of None leaves yours. `optim` becomes `adamw_torch`, whose first
    step moves a weight by the learning rate; without bias correction it is (1 − β₁) / √(1 − β₂) = 3.16 times that.

    Args:
        learning_rate: > 0. The paper's is for full fine-tuning; an adapter starts fresh and needs more: give its own
            rate, or None.
        epochs: > 0.
        warmup_fraction: of all steps, in [0, 1).
        adam_epsilon: > 0.
        weight_decay: ≥ 0.
        max_grad_norm: > 0, or 0 for no clipping.
    Raises:
        ValueError: a setting is out of its range.
    """

    name: ClassVar[str] = "mosbach"
    source: ClassVar[str] = "Mosbach et al. 2021, arXiv:2006.04884"

    learning_rate: float | None = 2e-5
    epochs: float | None = 20.0
    warmup_fraction: float | None = 0.1
    adam_epsilon: float | None = 1e-6
    weight_decay: float | None = 0.01
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epochs", "adam_epsilon"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: give a number > 0, or None to keep yours.")
        for name in ("weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name}={value}: give a number ≥ 0, or None to keep yours.")
        if self.warmup_fraction is not None and not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"warmup_fraction={self.warmup_fraction}: give a fraction of all steps in [0, 1).")

    def plan_stages(self, stages: Sequence[Stage]) -> Sequence[Stage]:
        args: dict[str, Any] = {
            "learning_rate": self.learning_rate,
            "num_train_epochs": self.epochs,
            "warmup_steps": self.warmup_fraction,  # below 1 it is a fraction
            "adam_epsilon": self.adam_epsilon,
            "weight_decay": self.weight_decay,
            "max_grad_norm": self.max_grad_norm,
        }
        args = {name: value for name, value in args.items() if value is not None}
        if self.epochs is not None:
            args["max_steps"] = -1  # which would count before the epochs
        args |= {"lr_scheduler_type": "linear", "optim": "adamw_torch"}
        return [replace(stage, args={**stage.args, **args}) if stage.train == "all" else stage for stage in stages]

    def on_build(self, run: Run) -> None:
        fresh = all(param.part != "base" for param in run.params)
        if fresh and self.learning_rate == type(self).learning_rate and not run.rehearsal:
            logger.warning(
                "mosbach: learning_rate=%g is the paper's for pretrained weights, and here only fresh ones train. Give "
                "a rate that suits the tuner, or None to keep that of the TrainingArguments.",
                self.learning_rate,
            )
