"""The output of the frozen lower blocks, computed once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from peft_plus import Plugin, Run
from peft_plus.trunk import CacheOptions


@dataclass(kw_only=True)
class TrunkCache(Plugin):
    """Store what the frozen lower blocks put out for each example, and look it up from the second epoch on.

    With the lowest k of L blocks frozen, f = k/L, and a head that costs h forward passes of all blocks, a step takes
    (2(1 − f) + 2h) / (2 − f + 2h) of its time. The frozen blocks are in eval mode then, so their dropout is off. Where
    a schedule thaws block j at a known step, the store serves until then, and training goes on exactly.

    Args:
        folder: where stores are kept, each under a fingerprint of all that it depends on, so that later runs and other
            processes find it. None: beside the run's checkpoints, until the run has finished.
        dtype: `"exact"` stores features as they are, `"bf16"` rounds them: half the disk of fp32.
        limit_gb: in gigabytes (10⁹ bytes), > 0; a store that would be larger is refused before training, or ends there.
        fill: `"first_epoch"` stores what the first epoch computes anyway; `"before"` goes through the data once before
            the first step, in batches sorted by length.
    Raises:
        ValueError: `limit_gb` is not above 0; something trains in front of the blocks.
    """

    name: ClassVar[str] = "trunk_cache"
    source: ClassVar[str] = "Liu et al. 2021, arXiv:2102.01386 (AutoFreeze, its cache)"

    folder: str | None = None
    dtype: Literal["exact", "bf16"] = "exact"
    limit_gb: float = 20.0
    fill: Literal["first_epoch", "before"] = "first_epoch"

    def __post_init__(self) -> None:
        if not 0 < self.limit_gb < math.inf:
            raise ValueError(f"limit_gb={self.limit_gb}: give a number of gigabytes > 0.")
        if self.folder == "":
            raise ValueError("folder='': give a folder, or None.")

    def on_build(self, run: Run) -> None:
        if not run.num_blocks:
            raise ValueError(
                "this model has no list of blocks (all its layers may share one set of weights, as ALBERT's do), so "
                "there is no trunk to store the output of. Leave trunk_cache out."
            )
        body = [param for param in run.params if param.part != "head"]
        if body and all(param.depth == 0 for param in body):
            raise ValueError(
                f"all that this tuner trains ({body[0].name}, …) lies in front of the blocks, so the output of every "
                "block changes with each step, and there is nothing to store. Use a tuner that works inside the "
                "blocks, or leave trunk_cache out."
            )

    def trunk_cache(self, run: Run) -> CacheOptions | None:
        return CacheOptions(folder=self.folder, dtype=self.dtype, limit_gb=self.limit_gb, fill=self.fill)
