"""Discriminative learning rates (ULMFiT)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from peft_plus import Param, Plugin, Run

logger = logging.getLogger(__name__)

HARDLY = 1e-6
"""Below this share of the base rate a weight in fp32 hardly moves."""


@dataclass(kw_only=True)
class DiscriminativeLR(Plugin):
    """Each depth learns more slowly than the one above it: its rate is that rate ÷ 2.6.

    multiplier = factor^−n, n = the number of depths above at which something may train: the topmost keeps the base rate
    (Howard & Ruder 2018, arXiv:1801.06146, §3.1: η^(l−1) = η^l / 2.6).

    Args:
        factor: what a rate is divided by from one depth to the next below, ≥ 1; 1 changes nothing.
    Raises:
        ValueError: `factor` is below 1 or not finite.
    """

    name: ClassVar[str] = "discriminative_lr"
    source: ClassVar[str] = "Howard & Ruder 2018, arXiv:1801.06146, §3.1"
    needs: ClassVar[tuple[str, ...]] = ("layers",)

    factor: float = 2.6

    def __post_init__(self) -> None:
        if not 1 <= self.factor < float("inf"):
            raise ValueError(f"factor={self.factor}: give a finite number ≥ 1.")

    def on_build(self, run: Run) -> None:
        lowest = discriminative_rate(run.depths[-1], run.depths, factor=self.factor)
        if lowest < HARDLY and not run.rehearsal:
            logger.warning(
                "discriminative_lr(factor=%g): of %d depths the lowest gets %.1e of the learning rate, and will hardly "
                "move. With factor=%.2f it would get a thousandth.",
                self.factor,
                len(run.depths),
                lowest,
                1000 ** (1 / (len(run.depths) - 1)),
            )

    def lr_scale(self, run: Run, param: Param) -> float:
        return discriminative_rate(param.depth, run.depths, factor=self.factor)

    def lr_key(self, param: Param) -> tuple[Any, ...]:
        return (param.depth,)


def discriminative_rate(depth: int, depths: Sequence[int], *, factor: float) -> float:
    """factor^−n, n = how many of `depths` lie above `depth`.

    Args:
        depth: 0 = embeddings, 1..L = blocks, L + 1 = head.
        depths: where something may train.
        factor: ≥ 1.
    """
    return float(factor ** -sum(above > depth for above in depths))
