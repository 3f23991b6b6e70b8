"""How far two predictions of one batch are apart, by what the task predicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Predictions = Sequence[tuple[Tensor, Tensor]]
"""What `Task.logits` gives: (logits, mask) pairs of shapes (..., classes) and (...), two for spans."""


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


def jensen_shannon(a: Tensor, b: Tensor) -> Tensor:
    """½ KL(p‖m) + ½ KL(q‖m), m = ½ (p + q), p = softmax(a), q = softmax(b), in fp32 and nats.

    Args:
        a, b: logits, (..., classes).
    Returns: (...), in [0, log 2].
    """
    log_p, log_q = F.log_softmax(a.float(), -1), F.log_softmax(b.float(), -1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1)


def bernoulli_jensen_shannon(a: Tensor, b: Tensor) -> Tensor:
    """The mean over labels of the Jensen–Shannon divergence of two yes/no predictions. (..., labels) → (...)."""
    return jensen_shannon(*(torch.stack([x, torch.zeros_like(x)], -1) for x in (a, b))).mean(-1)


def half_squared_difference(a: Tensor, b: Tensor) -> Tensor:
    """½ · the mean over the last dimension of (a − b)², in fp32. Shapes (..., values) → (...)."""
    return 0.5 * squared_difference(a, b)


JENSEN_SHANNON: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "categorical": jensen_shannon,
    "bernoulli": bernoulli_jensen_shannon,
    "real": half_squared_difference,
}
"""What a task predicts → a bounded distance of two predictions, where there is one."""

DISTANCES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "categorical": symmetric_kl,
    "bernoulli": symmetric_bernoulli_kl,
    "real": squared_difference,
}
"""What a task predicts → how far two predictions are apart."""


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of `values` where `mask` holds, 0 where it holds nowhere. Equal shapes → ()."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def mean_distance(a: Predictions, b: Predictions, distribution: str) -> Tensor:
    """The mean distance of two predictions, over what the task's own loss averages over, shape (), in fp32.

    A span has two distributions (start and end) for one label; the task's own loss averages them too.

    Args:
        a, b: of the same batch; the masks of `a` count.
        distribution: a key of `DISTANCES`.
    """
    return _mean_of(DISTANCES[distribution], a, b)


def mean_jensen_shannon(a: Predictions, b: Predictions, distribution: str) -> Tensor:
    """As `mean_distance`, by `JENSEN_SHANNON`."""
    return _mean_of(JENSEN_SHANNON[distribution], a, b)


def _mean_of(distance: Callable[[Tensor, Tensor], Tensor], a: Predictions, b: Predictions) -> Tensor:
    return torch.stack([masked_mean(distance(x, y), mask) for (x, mask), (y, _) in zip(a, b, strict=True)]).mean()


def summed_distance(a: Predictions, b: Predictions, distribution: str) -> Tensor:
    """The sum over all that counts: what an example adds to it depends on no other example. As `mean_distance`."""
    distance = DISTANCES[distribution]
    return torch.stack([(distance(x, y) * mask).sum() for (x, mask), (y, _) in zip(a, b, strict=True)]).sum()
