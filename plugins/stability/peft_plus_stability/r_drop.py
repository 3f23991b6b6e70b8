"""R-Drop: the same prediction under any draw of dropout."""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from peft_plus import LossTerm, Pass, Plugin, Run

from .divergences import mean_distance

logger = logging.getLogger(__name__)

_RATES = ("attention_dropout", "dropout", "activation_dropout", "layerdrop", "drop_prob")
"""What transformers' modules call the rate of what they draw themselves."""


@dataclass(kw_only=True)
class RDrop(Plugin):
    """See each example under two draws of dropout, and keep the two predictions near each other.

    loss = ½ (L(f₁) + L(f₂)) + weight · ½ D(f₁, f₂) (Liang et al. 2021, arXiv:2106.14448, eq. 4), with D as in `r3f`:
    the symmetric KL(p‖q) + KL(q‖p), its Bernoulli form or the squared difference. The paper adds the two task losses
    instead of taking their mean, so that its α is twice this weight, at twice the loss.

    The batch goes through the model twice in one pass, whose rows draw dropout of their own. Costs about one more
    forward and backward pass.

    Args:
        weight: α/2 ≥ 0, in units of the loss; 0 gives the plain run bit for bit.
    Raises:
        ValueError: `weight` is negative; flash attention would mix packed texts.
    """

    name: ClassVar[str] = "r_drop"
    source: ClassVar[str] = "Liang et al. 2021, arXiv:2106.14448"

    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight={self.weight}: give a weight ≥ 0.")

    def on_stage_begin(self, run: Run) -> None:
        if self.weight > 0 and not has_dropout(run.model):
            logger.warning("r_drop: this model draws no dropout, so both predictions are equal and it changes nothing.")

    def passes(self, run: Run, batch: Mapping[str, Any]) -> Generator[Pass, Tensor | None, None] | None:
        if self.weight == 0:
            return None
        if in_one_row(batch) and "flash" in str(getattr(run.model.config, "_attn_implementation", "")):
            raise ValueError(
                "flash attention keeps packed texts apart only in a batch of one row, and r_drop makes two of it. Load "
                'the model with attn_implementation="sdpa", or do not pack.'
            )
        return _twice()

    def loss_terms(self, run: Run, batch: Mapping[str, Any], output: Any) -> Mapping[str, LossTerm]:
        if self.weight == 0:
            return {}
        halves = [(logits.chunk(2), mask.chunk(2)) for logits, mask in run.task.logits(output, batch)]
        first, second = ([(logits[i], mask[i]) for logits, mask in halves] for i in (0, 1))
        count = run.task.count(batch)
        distance = mean_distance(first, second, run.task.distribution)
        return {"r_drop": LossTerm(self.weight * 0.5 * distance * count, count, per="label")}


def _twice() -> Generator[Pass, Tensor | None, None]:
    yield Pass(copies=2)


def in_one_row(batch: Mapping[str, Any]) -> bool:
    """Whether the batch is one row of several texts, told apart by their positions or lengths alone."""
    if "cu_seq_lens_q" in batch:
        return True
    positions = batch.get("position_ids")
    if batch.get("attention_mask") is not None or not isinstance(positions, Tensor) or positions.shape[0] != 1:
        return False
    return bool((positions.diff(dim=-1) < 1).any())


def has_dropout(model: nn.Module) -> bool:
    """Whether anything in the model draws dropout while it trains: a module of torch's, or attention's own rate."""
    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
    for module in model.modules():
        names = ("p",) if isinstance(module, kinds) else _RATES
        if any(isinstance(rate := getattr(module, name, 0), float) and rate > 0 for name in names):
            return True
    return False
