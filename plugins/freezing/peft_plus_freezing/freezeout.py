"""FreezeOut."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from peft_plus import Param, Plugin, Run

Scale = Literal["cubic", "squared", "linear"]

EXPONENT: Mapping[str, int] = {"cubic": 3, "squared": 2, "linear": 1}


@dataclass(kw_only=True)
class FreezeOut(Plugin):
    """Every layer's rate follows a cosine to zero, the lower the sooner; where it ends the layer is frozen for good.

    α_l = s(t0 + (1 − t0) l / L) is the share of the run in which layer l trains, with rate_l(j) = base / (2 α_l) ·
    (1 + cos(π j / (J α_l))) at step j of J; it is frozen from the first j > J α_l on (Brock et al. 2017,
    arXiv:1706.04983, §2). Layer 0 is the lowest depth at which something may train, layer L the highest, which trains
    to the end; depths without trainable parameters do not count.

    Args:
        t0: when layer 0 ends, as a share of the run before `scale` is applied, in (0, 1]; 1 freezes nothing.
        scale: s, "cubic" x³, "squared" x² or "linear" x.
        scale_lr: divide the rate by α_l, so that the summed rates of all layers are equal; else all begin at the base
            rate.
    Raises:
        ValueError: `t0` is out of its range.
    """

    name: ClassVar[str] = "freezeout"
    source: ClassVar[str] = "Brock et al. 2017, arXiv:1706.04983, §2"
    needs: ClassVar[tuple[str, ...]] = ("layers",)
    on_freeze: ClassVar[Literal["keep", "drop_state"]] = "drop_state"
    schedule: ClassVar[bool] = True

    t0: float = 0.8
    scale: Scale = "cubic"
    scale_lr: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.t0 <= 1:
            raise ValueError(f"t0={self.t0}: give a share of the run in (0, 1].")

    def may_train(self, run: Run, param: Param) -> bool:
        return run.step <= run.max_steps * self._share(run, param.depth)

    def next_change(self, run: Run) -> int | None:
        ends = (math.floor(run.max_steps * self._share(run, depth)) + 1 for depth in run.depths[1:])
        return min((end for end in ends if run.step < end <= run.max_steps), default=None)

    def lr_scale(self, run: Run, param: Param) -> float:
        share = self._share(run, param.depth)
        rate = annealed(run.step, run.max_steps * share)
        return rate / share if self.scale_lr else rate

    def lr_key(self, param: Param) -> tuple[Any, ...]:
        return (param.depth,)

    def _share(self, run: Run, depth: int) -> float:
        return share(depth, run.depths, t0=self.t0, scale=self.scale)


def share(depth: int, depths: Sequence[int], *, t0: float, scale: Scale) -> float:
    """α_l, the share of the run in which the layer at `depth` trains.

    Args:
        depth: one of `depths`.
        depths: where something may train.
        t0: in (0, 1].
        scale: s.
    Returns: in (0, 1]; 1 for the topmost.
    """
    layer, top = sum(below < depth for below in depths), len(depths) - 1
    return float((t0 + (1 - t0) * layer / top) ** EXPONENT[scale]) if layer < top else 1.0


def annealed(step: int, end: float) -> float:
    """½ (1 + cos(π j / end)): from 1 at j = 0 to 0 at `end`, and 0 from there on."""
    return (1 + math.cos(math.pi * step / end)) / 2 if step < end else 0.0
