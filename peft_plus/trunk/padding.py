"""What padding does to a row: whether it is part of it, and whether it moves the rest."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .passes import Trunk
from .trial import difference, far, part, trial

logger = logging.getLogger(__name__)

_MOVED = {torch.float64: 1e-6, torch.float32: 1e-3}
_MOVED_IN_HALF_PRECISION = 0.01


class Padding:
    """What is known of a model's padding; found out by a trial when there is some for the first time.

    Attributes:
        by_place: whether padding on the left moves positions, so that a row that is padded further is another one.
        matters: left or right → whether anything that counts depends on it.
    """

    def __init__(self) -> None:
        self.by_place: bool | None = None
        self.matters: dict[bool, bool] = {}

    @property
    def whole(self) -> bool:
        """Whether padding is part of a row."""
        return any(self.matters.values())

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: a resumed run must name rows as the interrupted one did."""
        return {"by_place": self.by_place, "left": self.matters.get(True), "right": self.matters.get(False)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.by_place = state["by_place"]
        self.matters = {side == "left": state[side] for side in ("left", "right") if state[side] is not None}

    def look(
        self, model: nn.Module, forward: Callable[..., Any], trunk: Trunk, given: Mapping[str, Any], mask: Tensor
    ) -> None:
        """Look at a batch.

        Args:
            model: which `forward` belongs to, with all that wraps it.
            mask: of the batch, (…, tokens).
        """
        for left in (True, False):
            if left in self.matters or bool(mask[..., 0 if left else -1].all()):
                continue
            self.matters[left] = padding_matters(model, forward, trunk, given, mask, left=left)
            if self.matters[left]:
                logger.info(
                    "Padding on the %s counts in this model, so an example that is padded further is stored anew.",
                    "left" if left else "right",
                )
        if self.by_place is None and mask.dim() == 2 and bool(((mask[:, 0] == 0) & mask.bool().any(1)).any()):
            self.by_place = moves(forward, trunk, given, mask)


def padding_matters(
    model: nn.Module, forward: Callable[..., Any], trunk: Trunk, given: Mapping[str, Any], mask: Tensor, *, left: bool
) -> bool:
    """Whether anything that counts depends on what the trunk makes of padding, or on how much of it there is.

    It does where a head looks at it (spans are chosen among all tokens, a causal model predicts its first token from
    the padding on its left, BERT reads its first token, which may be padding), or where the trunk does (convolutions).

    Args:
        mask: of the batch, (…, tokens).
        left: on the left, or on the right.
    """
    amount = (mask == 0).cumprod(-1).sum(-1) if left else (mask == 0).flip(-1).cumprod(-1).sum(-1)
    rows = amount.flatten(1).amax(1) if amount.dim() > 1 else amount
    few = part(given, rows.argsort(descending=True)[:2].sort().values)
    real = few["attention_mask"].flatten(0, -2).bool()
    features = trunk.features(forward, few)
    if not left and mask.dim() == 2:
        row = int(real.sum(1).argmin())
        end = int(real[row].nonzero()[-1]) + 1 if bool(real[row].any()) else real.shape[1]
        shorter = trunk.features(forward, part(few, slice(row, row + 1), slice(0, end)))
        if shorter.shape[1] != end or far(shorter, features[row : row + 1, :end]):
            return True
    counts = real.clone()
    counts[:, :-1] |= real[:, 1:]  # also what may predict the first one
    zero = features.masked_fill(~real.reshape(real.shape + (1,) * (features.dim() - 2)), 0.0)
    with trial(model):
        with trunk.skipping(features):
            plain = forward(**few)
        with trunk.skipping(zero):
            cut = forward(**few)
    return difference(plain, cut, counts) is not None


def moves(forward: Callable[..., Any], trunk: Trunk, given: Mapping[str, Any], mask: Tensor) -> bool:
    """Whether one more padding token on the left changes what the trunk makes of the real ones.

    It does where positions are counted from the left edge (GPT-2, BERT), not where they are relative or counted by the
    mask.

    Args:
        mask: of the batch, with padding on the left, (rows, tokens).
    """
    row = int(((mask[:, 0] == 0) & mask.bool().any(1)).nonzero()[0])
    first, pair = int(mask[row].nonzero()[0]), []
    for start in (first, first - 1):
        features = trunk.features(forward, part(given, slice(row, row + 1), slice(start, None)))
        pair.append(features[:, first - start :].float())
    apart = (pair[0] - pair[1]).abs() / pair[0].abs().clamp(min=1e-6)
    half = trunk.autocast != "off" or trunk.dtype not in _MOVED
    return float(apart.median()) > (_MOVED_IN_HALF_PRECISION if half else _MOVED[trunk.dtype])
