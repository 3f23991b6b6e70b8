"""When the trunk of a run is served: up to which block, from which step to which, and what that saves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import MethodError
from ..layers import Layers, transformers_model
from .cache import CacheOptions, TrunkCache
from .data import TrainingData
from .passes import Trunk, trunk_blocks

if TYPE_CHECKING:
    from ..effects import Effects
    from ..plugin import Run

logger = logging.getLogger(__name__)


class TrunkService:
    """Serves one run.

    Args:
        model: as built, not wrapped.
        layers: where its parameters lie.
        effects: tells what trains, now and later.
        options: what a plugin asked for; None where nothing is to be stored.
        data: of the stage.
        scratch: where a store goes that nobody named a folder for.
    Raises:
        MethodError: the model cannot be served.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers,
        effects: Effects,
        options: CacheOptions | None,
        *,
        data: TrainingData,
        scratch: Path | None,
    ) -> None:
        self._model, self._layers, self._effects, self._data = model, layers, effects, data
        if options is not None and data.masks_words:
            raise MethodError(
                f"trunk_cache stores what the lower blocks make of an example, and {type(data.collator).__name__} "
                "masks other words of it in each epoch. Leave trunk_cache out."
            )
        self._cache = None if options is None else TrunkCache(model, layers, options, data=data, scratch=scratch)
        self._lowest = -1
        self._epoch = 0
        self._record: Any = None  # the hook
        self._last: Tensor | None = None  # the trunk's output in the last training pass
        self._top: Trunk | None = None  # up to the highest frozen block, where noise at the trunk goes
        self._second = False

    def step_begin(self, run: Run) -> None:
        """At an update boundary, once it is known what trains."""
        self._last = None
        if self._cache is not None and run.epoch != self._epoch:
            self._epoch = run.epoch
            self._cache.epoch_ends(run.epoch)
        if self._effects.lowest == self._lowest:
            return
        self._lowest = self._effects.lowest
        self._watch_top()
        if self._cache is not None:
            self._choose(run, self._cache)

    def _choose(self, run: Run, cache: TrunkCache) -> None:
        ahead = lowest_ahead(self._effects, run)
        filled = cache.options.fill == "before"
        depth = choose_depth(
            ahead, step=run.step, max_steps=run.max_steps, steps_per_epoch=run.steps_per_epoch, filled=filled
        )
        if run.step == 0 and depth == 0:
            logger.warning("%s", self._nothing_to_save(run, ahead))
        cache.serve(depth)
        if not depth:
            return
        until = next((at for at, low in ahead if low <= depth), run.max_steps)
        share = depth / self._layers.num_blocks
        head = head_cost(self._model, self._layers)
        logger.info(
            "trunk_cache: blocks 1 to %d of %d are frozen until step %d. Their output is stored %s; a step that finds "
            "it takes about %.2f of the time of one that computes it.",
            depth,
            self._layers.num_blocks,
            until,
            "before the first step" if filled else "in the first pass over the data",
            step_ratio(share, head),
        )
        if filled:
            cache.fill()

    def _nothing_to_save(self, run: Run, ahead: Sequence[tuple[int, int]]) -> str:
        lowest = ahead[0][1]
        if lowest <= 1:
            what = "the embeddings or something in front of them" if lowest == 0 else "the lowest block"
            raise MethodError(
                f"trunk_cache has nothing to store: {what} trains from the first step. Freeze the lower blocks, e.g. "
                'with {"freeze": {"blocks": 4}} or the tuner\'s layers_to_transform, or leave trunk_cache out.'
            )
        return (
            f"trunk_cache saves nothing here: the lower blocks stay frozen for less than the pass over the data (of "
            f"{run.steps_per_epoch} steps) that it takes to store their output. It would in a longer run."
        )

    # ---- noise above the trunk ---------------------------------------------------------------------------------------

    def _watch_top(self) -> None:
        if self._record is not None:
            self._record.remove()
            self._record = None
        self._top, depth = None, self._lowest - 1
        if depth < 1 or not trunk_blocks(self._model, self._layers, depth):
            return
        self._top = Trunk(self._model, self._layers, depth)
        self._record = self._top.blocks[-1].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.is_grad_enabled() and not self._second and self._top is not None:
            self._last = self._top.learn(output)

    @contextmanager
    def changed(self, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """While this is open, a pass starts from what `change` makes of the trunk's output in the last training pass.

        Args:
            change: (rows, tokens, width) → the same shape.
        Raises:
            ValueError: no block is frozen, or no training pass came before.
        """
        if self._top is None or self._last is None:
            why = "no block is frozen now" if self._top is None else "no training pass came before this one"
            raise ValueError(
                f"there is no trunk to put noise on: {why}. Freeze the lower blocks, e.g. with "
                '{"freeze": {"blocks": 4}}, or put the noise on the embeddings.'
            )
        with self.lifted(), self._top.skipping(change(self._last)):
            yield

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Passes run the trunk themselves for a while, and are not looked at."""
        before, self._second = self._second, True
        try:
            if self._cache is None:
                yield
            else:
                with self._cache.lifted():
                    yield
        finally:
            self._second = before

    # ---- the life of a run -------------------------------------------------------------------------------------------

    def rest(self) -> None:
        """Once the model is in train mode."""
        if self._cache is not None:
            self._cache.rest()

    def seal(self) -> None:
        """When a checkpoint is written."""
        if self._cache is not None:
            self._cache.seal()

    def close(self, *, finished: bool) -> None:
        """Give the model back.

        Args:
            finished: the run came to its end, and will not be resumed.
        """
        if self._record is not None:
            self._record.remove()
            self._record = None
        self._last = None
        if self._cache is not None:
            self._cache.close(finished=finished)


def lowest_ahead(effects: Effects, run: Run) -> list[tuple[int, int]]:
    """(step, lowest depth that trains from there on), from the present on, as far as the plugins can tell ahead.

    It ends with the first at which the lowest block trains: nothing can be served after it.
    """
    depths = {param.name: param.depth for param in effects.params}
    found: list[tuple[int, int]] = []
    for step, names in effects.schedule(run, run.step, max(run.max_steps, run.step + 1)):
        lowest = min((depths[name] for name in names), default=run.num_blocks + 2)
        if not found or found[-1][1] != lowest:
            found.append((step, lowest))
        if lowest <= 1 or effects.unforeseen(run.at(step)) is not None:
            break
    return found


def choose_depth(
    ahead: Sequence[tuple[int, int]], *, step: int, max_steps: int, steps_per_epoch: int, filled: bool = False
) -> int:
    """Which k to serve from `step` on: where most block passes are saved until block k thaws.

    Serving k saves k blocks of each step after the first epoch, which fills the store: k · (T_k − step − epoch), T_k
    being the step at which something at depth ≤ k trains.

    Args:
        ahead: (step, lowest depth that trains from there on), from the present on, in order.
        steps_per_epoch: 0 where it is not known; then filling counts nothing.
        filled: whether the store is filled before training.
    Returns: 0 where nothing is saved.
    """
    lowest = ahead[0][1]
    best, saved = 0, 0
    for depth in range(lowest - 1, 0, -1):
        until = next((at for at, low in ahead if low <= depth), max_steps)
        gain = depth * (until - step - (0 if filled else steps_per_epoch))
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
