"""How the trunk's output is to be stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """What a plugin asks for in `trunk_cache`.

    Attributes:
        folder: where stores lie, each in a sub-folder of its own; they are kept, and found again by later runs. None:
            beside the run's checkpoints, or in a temporary folder, until the run has finished.
        dtype: `exact` keeps features as the trunk puts them out; `bf16` rounds them, for half the space of fp32.
        limit_gb: a store that would be larger is refused, or ends there.
        fill: `first_epoch` stores what the first pass over the data computes; `before` computes it all before the
            first step, in batches sorted by length.
    """

    folder: str | None = None
    dtype: Literal["exact", "bf16"] = "exact"
    limit_gb: float = 20.0
    fill: Literal["first_epoch", "before"] = "first_epoch"
