"""Layer-wise learning-rate decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from peft_plus import Param, Plugin, Run


@dataclass(kw_only=True)
class LLRD(Plugin):
    """A smaller learning rate the deeper a layer lies below the head.

    multiplier = decay^(L + 1 − depth): the head (depth L + 1) keeps the base rate, the top block gets base · decay, the
    embeddings (depth 0) base · decay^(L + 1). Some write base · decay^(L − depth), which is one step higher everywhere.

    Args:
        decay: factor from one depth to the next below, in (0, 1]; 1 changes nothing.
    Raises:
        ValueError: `decay` lies outside (0, 1].
    """

    name: ClassVar[str] = "llrd"
    source: ClassVar[str] = "Zhang et al. 2021, arXiv:2006.05987, §2; Howard & Ruder 2018, arXiv:1801.06146, §3.1"
    needs: ClassVar[tuple[str, ...]] = ("layers",)

    decay: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay={self.decay}: give a factor in (0, 1].")

    def lr_scale(self, run: Run, param: Param) -> float:
        return layer_rate(param.depth, run.num_blocks, decay=self.decay)

    def lr_key(self, param: Param) -> tuple[Any, ...]:
        return (param.depth,)


def layer_rate(depth: int, num_blocks: int, *, decay: float) -> float:
    """decay^(L + 1 − depth).

    Args:
        depth: 0 = embeddings, 1..L = blocks, L + 1 = head.
        num_blocks: L.
        decay: in (0, 1].
    """
    return float(decay ** (num_blocks + 1 - depth))
