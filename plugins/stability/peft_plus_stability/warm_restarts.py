"""A learning rate that falls and starts again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from peft_plus import Plugin, Stage


@dataclass(kw_only=True)
class WarmRestarts(Plugin):
    """Cosine decay with restarts at full rate: transformers' `cosine_with_restarts`.

    η(t) = base · ½ (1 + cos(π · frac(cycles · t))), t being the share of the steps after warm-up (Loshchilov & Hutter
    2017, arXiv:1608.03983, eq. 5, with cycles of equal length). Warm-up is that of the arguments.

    Args:
        cycles: ≥ 1.
    Raises:
        ValueError: `cycles` is less than 1.
    """

    name: ClassVar[str] = "warm_restarts"
    source: ClassVar[str] = "Loshchilov & Hutter 2017, arXiv:1608.03983"

    cycles: int = 3

    def __post_init__(self) -> None:
        if self.cycles < 1:
            raise ValueError(f"cycles={self.cycles}: give a number ≥ 1.")

    def plan_stages(self, stages: Sequence[Stage]) -> Sequence[Stage]:
        args = {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": self.cycles}}
        return [replace(stage, args={**stage.args, **args}) for stage in stages]
