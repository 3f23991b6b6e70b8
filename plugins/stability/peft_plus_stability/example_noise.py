"""Noise that each example draws for itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


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
