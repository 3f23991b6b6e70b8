"""R3F: robust fine-tuning by consistency under noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from peft_plus import LossTerm, Plugin, Run


@dataclass(kw_only=True)
class R3F(Plugin):
    """Keep the prediction the same when the input embeddings are slightly noised.

    loss = task loss + weight · D(f(e), f(e + z)), z ~ U(−eps, eps) or N(0, eps²) (Aghajanyan et al. 2020,
    arXiv:2008.03156, eq. 2), with D the symmetric KL(p‖q) + KL(q‖p) for classes and tokens, its Bernoulli form for
    multi-label tasks and the squared difference for regression. Gradients flow through both passes. The noise of each
    example is drawn from a stream of its own (seed, step, example), in fp32.

    Costs one more forward and backward pass: about twice the time of a plain step.

    Args:
        weight: λ ≥ 0, in units of the loss; 0 gives the plain run bit for bit.
        eps: half width (uniform) or standard deviation (normal) of the noise, in units of the embeddings, > 0.
        noise: `"uniform"` or `"normal"`.
    Raises:
        ValueError: `weight` is negative or `eps` not positive.
    """

    name: ClassVar[str] = "r3f"
    source: ClassVar[str] = "Aghajanyan et al. 2020, arXiv:2008.03156"

    weight: float = 1.0
    eps: float = 1e-5
    noise: Literal["uniform", "normal"] = "uniform"

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
        other = run.task.logits(run.forward(batch, perturb={"embeddings": draw}), batch)
        distance = DISTANCES[run.task.distribution]
        means = [masked_mean(distance(a, b), mask) for (a, mask), (b, _) in zip(clean, other, strict=True)]
        # A span has two distributions (start and end) for one label; the task's own loss averages them too.
        count = run.task.count(batch)
        return {"r3f": LossTerm(self.weight * torch.stack(means).mean() * count, count, per="label")}


def _stream(run: Run, row: int, text: int, device: torch.device) -> torch.Generator:
    return run.generator("r3f", run.first_example + row, text, device=device)


def example_noise(
    embeddings: Tensor,
    *,
    rows: int,
    eps: float,
    noise: str,
    stream: Callable[[int, int, torch.device], torch.Generator],
) -> Tensor:
    """Noise of the embeddings' shape, each text from its own stream, so that it does not depend on its neighbours.

    Args:
        embeddings: (rows · texts, tokens, width); only its shape and device are used.
        rows: examples in the batch; each has one text, or as many as it has choices.
        eps: half width or standard deviation.
        noise: `uniform` or `normal`.
        stream: (row, text of the row, device) → generator.
    Returns: fp32, same shape.
    """
    z = torch.empty(embeddings.shape, dtype=torch.float32, device=embeddings.device)
    texts = len(z) // rows
    for i in range(len(z)):
        generator = stream(i // texts, i % texts, z.device)
        if noise == "uniform":
            z[i].uniform_(-eps, eps, generator=generator)
        else:
            z[i].normal_(0.0, eps, generator=generator)
    return z


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of `values` where `mask` holds, 0 where it holds nowhere. Equal shapes → ()."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def symmetric_kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(p‖q) + KL(q‖p) = Σ (p − q)(log p − log q), p = softmax(a), q = softmax(b), in fp32.

    Args:
        a, b: logits, (..., classes).
    Returns: (...), ≥ 0.
    """
    log_p, log_q = F.log_softmax(a.float(), -1), F.log_softmax(b.float(), -1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)


def symmetric_bernoulli_kl(a: Tensor, b: Tensor) -> Tensor:
    """The mean over labels of (p − q)(a − b), p = σ(a), q = σ(b): the symmetric KL of independent yes/no labels.

    Args:
        a, b: logits, (..., labels).
    Returns: (...), ≥ 0.
    """
    a, b = a.float(), b.float()
    return ((a.sigmoid() - b.sigmoid()) * (a - b)).mean(-1)


def squared_difference(a: Tensor, b: Tensor) -> Tensor:
    """The mean over the last dimension of (a − b)², in fp32. Shapes (..., values) → (...)."""
    return (a.float() - b.float()).square().mean(-1)


DISTANCES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "categorical": symmetric_kl,
    "bernoulli": symmetric_bernoulli_kl,
    "real": squared_difference,
}
"""What a task predicts → how far two predictions are apart."""
