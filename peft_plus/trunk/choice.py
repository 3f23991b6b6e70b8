"""Which blocks are served from a step on, and what that saves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from ..layers import Layers, transformers_model

if TYPE_CHECKING:
    from ..effects import Effects
    from ..plugin import Run


def lowest_ahead(effects: Effects, run: Run) -> list[tuple[int, int]]:
    """(step, lowest depth that trains from there on), from the present on, as far as the plugins can tell ahead.

    It ends with the first at which the lowest block trains: nothing can be served after it.
    """
    found: list[tuple[int, int]] = []
    for step, lowest, known in _lowest_of_each_step(effects, run):
        if not found or found[-1][1] != lowest:
            found.append((step, lowest))
        if lowest <= 1 or not known:
            break
    return found


def may_freeze_later(effects: Effects, run: Run) -> bool:
    """Whether the lowest block rests at some step from the present on, or may for all that the plugins tell."""
    return any(lowest > 1 or not known for _, lowest, known in _lowest_of_each_step(effects, run))


def _lowest_of_each_step(effects: Effects, run: Run) -> Iterator[tuple[int, int, bool]]:
    """(step, lowest depth that trains from there on, whether the plugins can tell what comes after it)."""
    depths = {param.name: param.depth for param in effects.params}
    for step, names in effects.schedule(run, run.step, max(run.max_steps, run.step + 1)):
        lowest = min((depths[name] for name in names), default=run.num_blocks + 2)
        yield step, lowest, effects.unforeseen(run.at(step)) is None


def choose_depth(
    ahead: Sequence[tuple[int, int]],
    *,
    step: int,
    max_steps: int,
    steps_per_epoch: int,
    serving: int = 0,
    paid: bool = False,
    blocks: Callable[[int], int] = lambda depth: depth,
) -> int:
    """Which k to serve from `step` on: where most block passes are saved until block k thaws.

    Serving k saves k blocks of each step, but filling the store takes them for one pass over the data:
    k · (T_k − step − epoch), T_k being the step at which something at depth ≤ k trains. What is served already is
    filled.

    Args:
        ahead: (step, lowest depth that trains from there on), from the present on, in order.
        steps_per_epoch: 0 where it is not known; then filling counts nothing.
        serving: the depth that is served already, 0 for none.
        paid: whether the user wants the first store anyway, to be filled before training or for later runs.
        blocks: depth → how many blocks of the trunk lie at or below it; fewer in an encoder beside a longer decoder.
    Returns: 0 where nothing is saved.
    """
    lowest = ahead[0][1]
    best, saved = 0, 0
    for depth in range(lowest - 1, 0, -1):
        until = next((at for at, low in ahead if low <= depth), max_steps)
        filled = depth == serving or (paid and not serving)
        gain = blocks(depth) * (until - step - (0 if filled else steps_per_epoch))
        if gain > saved:
            best, saved = depth, gain
    return best


def step_ratio(share: float, head: float) -> float:
    """The time of a step that finds the trunk's output, over that of one that computes it.

    (2(1 − f) + 2h) / (2 − f + 2h): a forward pass of all blocks takes 1, a backward pass through a frozen weight as
    much as a forward pass, and a backward pass stops above the trunk.

    Args:
        share: f, the trunk's share of the blocks, 0..1.
        head: h, the head's forward pass as a multiple of that of all blocks.
    """
    return (2 * (1 - share) + 2 * head) / (2 - share + 2 * head)


def head_cost(model: nn.Module, layers: Layers) -> float:
    """What a head that is applied to every token costs, as a multiple of all blocks: by the number of weights."""
    inner: Any = transformers_model(model)
    output = getattr(inner, "get_output_embeddings", lambda: None)()
    weights = sum(
        t.numel() for name, t in model.named_parameters() if 1 <= layers.depth.get(name, 0) <= layers.num_blocks
    )
    weight = getattr(output, "weight", None)
    return 0.0 if weight is None else weight.numel() / max(weights, 1)
