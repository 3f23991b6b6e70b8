"""LISA: layerwise importance sampled AdamW."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator

from peft_plus import Param, Plugin, Run

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class LISA(Plugin):
    """Train a few blocks at a time, drawn anew every 20 steps, with the embeddings and the head always on.

    In the steps [pK, (p + 1)K) the γ blocks of draw p train, uniform and without replacement among the blocks at which
    something may train (Pan et al. 2024, arXiv:2403.17919, Algorithm 1). The optimizer's state of a block is dropped
    when the draw leaves it, so that only γ blocks hold any.

    Args:
        layers: γ, how many blocks train at a time, ≥ 1; as many as there are is full training.
        period_steps: K, for how many optimizer steps a draw holds, ≥ 1.
        embeddings: whether the embeddings train, always; if not, never.
        head: likewise for everything above the last block.
    Raises:
        ValueError: a setting is out of its range, or there are fewer blocks than `layers`.
    """

    name: ClassVar[str] = "lisa"
    source: ClassVar[str] = "Pan et al. 2024, arXiv:2403.17919, Algorithm 1"
    needs: ClassVar[tuple[str, ...]] = ("layers",)
    on_freeze: ClassVar[Literal["keep", "drop_state"]] = "drop_state"

    layers: int = 2
    period_steps: int = 20
    embeddings: bool = True
    head: bool = True

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ValueError(f"layers={self.layers}: give a number of blocks ≥ 1.")
        if self.period_steps < 1:
            raise ValueError(f"period_steps={self.period_steps}: give a number of optimizer steps ≥ 1.")

    def on_build(self, run: Run) -> None:
        blocks = _blocks(run)
        if self.layers > len(blocks):
            raise ValueError(
                f"layers={self.layers}: something may train in {len(blocks)} of the model's {run.num_blocks} blocks; "
                f"give at most {len(blocks)}."
            )
        fresh = run.task.new_head and any(param.part == "head" for param in run.params)
        if fresh and not self.head and not run.rehearsal:
            logger.warning("lisa(head=False) leaves the freshly drawn head as it is: nothing will ever train it.")

    def ever_trains(self, run: Run, param: Param) -> bool:
        if param.depth == 0:
            return self.embeddings
        return self.head or param.depth <= run.num_blocks

    def may_train(self, run: Run, param: Param) -> bool:
        return not 1 <= param.depth <= run.num_blocks or param.depth in self._drawn(run, run.step // self.period_steps)

    def next_change(self, run: Run) -> int | None:
        if self.layers >= len(_blocks(run)):
            return None
        period = run.step // self.period_steps
        now = self._drawn(run, period)
        return self.period_steps * next(p for p in itertools.count(period + 1) if self._drawn(run, p) != now)

    def _drawn(self, run: Run, period: int) -> set[int]:
        return drawn(_blocks(run), self.layers, run.at(period * self.period_steps).generator("lisa"))


def drawn(blocks: Sequence[int], number: int, generator: Generator) -> set[int]:
    """`number` of the blocks, uniform and without replacement; all of them where there are no more."""
    order = torch.randperm(len(blocks), generator=generator)
    return {blocks[i] for i in order[:number].tolist()}


def _blocks(run: Run) -> list[int]:
    return [depth for depth in run.depths if 1 <= depth <= run.num_blocks]
