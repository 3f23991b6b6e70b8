"""A ceiling for the learning rate, by what was pretrained."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from peft_plus import Param, Plugin, Run
from peft_plus.plugin import Part

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class LowLR(Plugin):
    """Keep the learning rate of what was pretrained low, whatever rate the rest has.

    rate = min(base rate, ceiling of the part), times the schedule. Pretrained weights are easily driven out of the
    basin that makes them worth having: 2e-5 is the rate at which Mosbach et al. 2021 (arXiv:2006.04884, §6) find full
    fine-tuning stable. What starts fresh, an adapter or a head, can take ten times that and more. No rate is raised.

    Args:
        pretrained: ceiling for base weights that train, > 0; None for none.
        adapter: ceiling for adapters, > 0; None for none.
        head: ceiling for a head, > 0; None for none.
    Raises:
        ValueError: a ceiling is not positive, or none is given.
    """

    name: ClassVar[str] = "low_lr"
    source: ClassVar[str] = "Mosbach et al. 2021, arXiv:2006.04884, §6"

    pretrained: float | None = 2e-5
    adapter: float | None = 2e-4
    head: float | None = None

    def __post_init__(self) -> None:
        settings = {name: getattr(self, name) for name in ("pretrained", "adapter", "head")}
        for name, ceiling in settings.items():
            if ceiling is not None and not 0 < ceiling < math.inf:
                raise ValueError(f"{name}={ceiling}: give a rate > 0, or None for no ceiling.")
        if not any(settings.values()):
            raise ValueError("pretrained=None, adapter=None, head=None: that changes nothing. Give a ceiling.")

    def on_stage_begin(self, run: Run) -> None:
        if all(self.lr_scale(run, param) == 1 for param in run.params):
            parts = {param.part for param in run.params}
            logger.warning(
                "low_lr changes nothing: the learning rate %g lies above no ceiling of what trains (%s).",
                run.base_lr,
                ", ".join(f"{part}: {rate or 'none'}" for part, rate in self._ceilings.items() if part in parts),
            )

    def lr_scale(self, run: Run, param: Param) -> float:
        ceiling = self._ceilings[param.part]
        return 1.0 if ceiling is None or run.base_lr <= ceiling else ceiling / run.base_lr

    def lr_key(self, param: Param) -> tuple[Any, ...]:
        return (self._ceilings[param.part],)

    @property
    def _ceilings(self) -> Mapping[Part, float | None]:
        return {"base": self.pretrained, "adapter": self.adapter, "head": self.head}
