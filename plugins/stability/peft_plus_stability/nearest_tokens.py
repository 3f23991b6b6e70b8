"""The tokens whose embeddings lie nearest to those of others."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn import functional as F

_ROWS_AT_ONCE = 512


@torch.no_grad()
def nearest_tokens(weight: Tensor, ids: Tensor, number: int, *, without: Collection[int] = ()) -> Tensor:
    """The `number` tokens of the highest cosine to each of `ids`, the nearest first; a token is none of its own.

    Args:
        weight: the table of embeddings, shape (vocabulary, width).
        ids: of tokens, shape (n,).
        number: ≥ 1.
        without: token ids that are nobody's neighbour.
    Returns: token ids, on the CPU, shape (n, number).
    Raises:
        ValueError: there are not so many tokens.
    """
    left = len(weight) - len({token for token in without if 0 <= token < len(weight)}) - 1
    if number > left:
        raise ValueError(f"neighbours={number}: the vocabulary of {len(weight)} leaves {left} for a token. Give fewer.")
    unit = F.normalize(weight.detach().float(), dim=1)
    barred = torch.tensor([token for token in without if 0 <= token < len(weight)], dtype=torch.long)
    found = [torch.zeros(0, number, dtype=torch.long)]
    for some in ids.to(weight.device).split(_ROWS_AT_ONCE):
        cosine = unit[some] @ unit.T
        cosine[:, barred.to(cosine.device)] = -torch.inf
        cosine[torch.arange(len(some), device=cosine.device), some] = -torch.inf
        found.append(cosine.topk(number, dim=1).indices.cpu())
    return torch.cat(found)
