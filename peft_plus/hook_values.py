"""What hooks are told of a parameter, and what they answer with. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Part = Literal["adapter", "base", "head"]
Unit = Literal["label", "example", "step"]

NEEDS: Mapping[str, str] = {
    "layers": "trainable parameters in the model's blocks, so that something can be told apart by depth",
    "body": "something to train beside the head",
    "new_head": "a task with a freshly initialised head",
    "base": "base weights that train, as with the tuner 'full'",
}
"""What a plugin may put into `needs`, and what each word means."""


@dataclass(frozen=True)
class Param:
    """One parameter as a plugin sees it.

    Attributes:
        name: its name in `model.named_parameters()`.
        shape: its logical shape.
        depth: 0 = embeddings, 1..L = blocks counted from the input, L + 1 = everything above the last block.
        part: `adapter` (what the tuner added), `head` (the task's own head) or `base`.
        quantised: True for packed 4- or 8-bit weights, which can never train.
    """

    name: str
    shape: tuple[int, ...]
    depth: int
    part: Part
    quantised: bool = False


@dataclass(frozen=True)
class LossTerm:
    """A summed, already weighted part of the loss, and over how much it was summed.

    The core divides by how many labels or examples the *whole* optimizer step holds (every micro-batch of every
    process), so a term weighs the same whatever the accumulation, the number of processes and the raggedness of the
    batches: contribution = Σ sum / N.

    Attributes:
        sum: scalar tensor, shape (), fp32, with gradient; already multiplied by the plugin's weight.
        count: over how many labels or examples `sum` runs in this micro-batch (tensor or number, > 0); for the mean in
            the log. For `per="step"` it is not used.
        per: the unit, and so which N. `label` = what the task's own loss averages over (tokens for language models),
            `example` = rows of the batch, `step` = the term counts once per optimizer step.
    """

    sum: Tensor
    count: Tensor | int
    per: Unit = "label"


@dataclass(frozen=True)
class Pass:
    """One of the passes that `passes` puts in the place of a micro-batch's plain one.

    Its loss is what the plain pass's would be, with every plugin's terms, times `weight`. The gradients of all passes
    of a micro-batch add up.

    Attributes:
        perturb: `{"embeddings": δ}` adds δ to the output of the input embeddings, in fp32; δ has its shape, e.g.
            (rows, tokens, width), or is a function from that output to δ.
        weight: by what the pass's loss is multiplied; the weights of a micro-batch's passes add up to 1 where its loss
            is to keep its scale.
        copies: how often the batch's rows come, one whole batch after another, e.g. to see them with several draws of
            dropout in one pass. The loss is the mean over the copies; `loss_terms` gets the long batch and counts it.
        final: whether it is the micro-batch's last pass, whose backward is the loop's own.
    """

    perturb: Mapping[str, Tensor | Callable[[Tensor], Tensor]] = field(default_factory=dict)
    weight: float = 1.0
    copies: int = 1
    final: bool = True
