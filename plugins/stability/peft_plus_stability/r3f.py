"""R3F: robust fine-tuning by consistency under noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch

from peft_plus import LossTerm, Plugin, Run

from .divergences import mean_distance
from .example_noise import example_noise


@dataclass(kw_only=True)
class R3F(Plugin):
    """Keep the prediction the same when the input embeddings, or the trunk's output, are slightly noised.

    loss = task loss + weight · D(f(e), f(e + z)), z ~ U(−eps, eps) or N(0, eps²) (Aghajanyan et al. 2020,
    arXiv:2008.03156, eq. 2), with D the symmetric KL(p‖q) + KL(q‖p) for classes and tokens, its Bernoulli form for
    multi-label tasks and the squared difference for regression. Gradients flow through both passes. The noise of each
    example is drawn from a stream of its own (seed, step, example), in fp32.

    Costs one more forward and backward pass: about twice the time of a plain step. With `at="trunk"` the noise goes to
    h, the output of the highest block below all that trains: D(g(h), g(h + z)), g being what lies above. That is
    another objective, and cheaper: the frozen blocks run once for both passes, or, with `trunk_cache`, not at all.

    Args:
        weight: λ ≥ 0, in units of the loss; 0 gives the plain run bit for bit.
        eps: half width (uniform) or standard deviation (normal) of the noise, in units of the embeddings, > 0.
        noise: `"uniform"` or `"normal"`.
        at: `"embeddings"`, or `"trunk"`, which needs frozen lower blocks.
    Raises:
        ValueError: `weight` is negative or `eps` not positive.
    """

    name: ClassVar[str] = "r3f"
    source: ClassVar[str] = "Aghajanyan et al. 2020, arXiv:2008.03156"

    weight: float = 1.0
    eps: float = 1e-5
    noise: Literal["uniform", "normal"] = "uniform"
    at: Literal["embeddings", "trunk"] = "embeddings"

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight={self.weight}: give λ ≥ 0.")
        if not 0 < self.eps < math.inf:
            raise ValueError(f"eps={self.eps}: give a size > 0.")

    def loss_terms(self, run: Run, batch: Mapping[str, Any], output: Any) -> Mapping[str, LossTerm]:
        if self.weight == 0:
            return {}
        clean = run.task.logits(output, batch)
        rows = len(clean[0][0])
        draw = partial(example_noise, rows=rows, eps=self.eps, noise=self.noise, stream=partial(_stream, run))
        other = run.task.logits(run.forward(batch, perturb={self.at: draw}), batch)
        count = run.task.count(batch)
        distance = mean_distance(clean, other, run.task.distribution)
        return {self.name: LossTerm(self.weight * distance * count, count, per="label")}


def _stream(run: Run, row: int, text: int, device: torch.device) -> torch.Generator:
    return run.generator("r3f", run.example(row), text, device=device)
