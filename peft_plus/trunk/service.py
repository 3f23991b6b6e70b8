"""When the trunk of a run is served, from which step to which."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import MethodError
from ..layers import Layers
from .cache import TrunkCache
from .choice import choose_depth, head_cost, lowest_ahead, may_freeze_later, step_ratio
from .data import TrainingData
from .options import CacheOptions
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
        self._model, self._layers, self._effects = model, layers, effects
        if options is not None and data.masks_words:
            raise MethodError(
                f"trunk_cache stores what the lower blocks make of an example, and {type(data.collator).__name__} "
                "masks other words of it in each epoch. Leave trunk_cache out."
            )
        if options is not None and data.redrawn_by:
            raise MethodError(
                f"trunk_cache stores what the lower blocks make of an example, and {data.redrawn_by} makes other rows "
                "of it in each epoch. Leave one of them out."
            )
        self._cache = None if options is None else TrunkCache(model, layers, options, data=data, scratch=scratch)
        self._lowest = -1
        self._epoch = 0
        self._record: Any = None  # the hook
        self._last: Any = None  # what its last block put out in the last training pass
        self._top: Trunk | None = None  # up to the highest frozen block, where noise at the trunk goes
        self._second = False
        self._stays = False  # whether it was looked whether the trunk stays frozen

    def begin(self, run: Run, state: Mapping[str, Any] | None) -> None:
        """The stage begins, or goes on.

        Args:
            state: what `state_dict` gave when the checkpoint was written that it goes on from: the choice of blocks
                depends on the step at which it is made, and another one would round otherwise.
        """
        self._epoch = run.epoch
        if self._cache is not None and state and "depth" in state:
            self._lowest = state["lowest"]
            self._watch_top()
            self._cache.padding.load_state_dict(state["padding"])
            self._cache.serve(state["depth"], whole=_whole_epoch(run))
        self.step_begin(run)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain values."""
        if self._cache is None:
            return {}
        return {"lowest": self._lowest, "depth": self._cache.depth, "padding": self._cache.padding.state_dict()}

    def step_begin(self, run: Run) -> None:
        """At an update boundary, once it is known what trains."""
        self._last, self._run = None, run
        if self._cache is not None:
            if run.epoch != self._epoch:
                self._epoch = run.epoch
                self._cache.epoch_ends()
            self._cache.step_begins()
        if self._effects.lowest == self._lowest:
            return
        self._lowest = self._effects.lowest
        self._watch_top()
        if self._cache is not None:
            self._choose(run, self._cache)

    def _choose(self, run: Run, cache: TrunkCache) -> None:
        ahead = lowest_ahead(self._effects, run)
        before = cache.options.fill == "before"
        depth = choose_depth(
            ahead,
            step=run.step,
            max_steps=run.max_steps,
            steps_per_epoch=run.steps_per_epoch,
            serving=cache.depth,
            paid=before or cache.options.folder is not None,
            blocks=lambda depth: len(trunk_blocks(self._model, self._layers, depth)),
        )
        if run.step == 0 and depth == 0:
            self._tell_of_nothing(run, ahead[0][1])
        if depth == cache.depth:
            return
        cache.serve(depth, whole=_whole_epoch(run))
        if not depth:
            return
        until = next((at for at, low in ahead if low <= depth), run.max_steps)
        share = min(1.0, len(trunk_blocks(self._model, self._layers, depth)) / self._layers.num_blocks)
        head = head_cost(self._model, self._layers)
        logger.info(
            "trunk_cache: blocks 1 to %d of %d are frozen until step %d. Their output is stored %s; a step that finds "
            "it takes about %.2f of the time of one that computes it.",
            depth,
            self._layers.num_blocks,
            until,
            "first" if before else "in the first pass over the data",
            step_ratio(share, head),
        )
        if before:
            cache.fill(batch_size=run.batch_size)

    def _tell_of_nothing(self, run: Run, lowest: int) -> None:
        """Say why nothing is stored yet.

        Raises:
            MethodError: nothing ever will be.
        """
        if lowest > 1:
            logger.warning(
                "trunk_cache saves nothing here: the lower blocks stay frozen for less than the pass over the data (of "
                "%d steps) that it takes to store their output. It would in a longer run.",
                run.steps_per_epoch,
            )
            return
        what = "the embeddings or something in front of them" if lowest == 0 else "the lowest block"
        if may_freeze_later(self._effects, run):
            logger.info("trunk_cache waits: %s trains now, and may be frozen later.", what)
            return
        text = (
            f"trunk_cache has nothing to store: {what} trains from the first step. Freeze the lower blocks, e.g. with "
            '{"freeze": {"blocks": 4}} or the tuner\'s layers_to_transform, or leave trunk_cache out.'
        )
        if len(run.stages) < 2:
            raise MethodError(text)
        logger.warning("In stage %r %s", run.stage.name if run.stage else "", text)

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
        if torch.is_grad_enabled() and not self._second:
            self._last = output

    @contextmanager
    def changed(self, change: Callable[[Tensor], Tensor]) -> Generator[None]:
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
        with self.lifted(), self._top.skipping(change(self._top.learn(self._last))):
            yield

    def check_stays(self) -> None:
        """Look ahead, once, whether a block will be frozen in every step.

        Raises:
            ValueError: none will; now rather than at the step where the last one thaws.
        """
        if self._stays or self._top is None:
            return
        self._stays = True
        for step, lowest in lowest_ahead(self._effects, self._run):
            if not trunk_blocks(self._model, self._layers, lowest - 1):
                raise ValueError(
                    f"from step {step} on no block is frozen any more, and there will be no trunk to put noise on. "
                    "Keep the lower blocks frozen, or put the noise on the embeddings."
                )

    def also_of(self, weights: Mapping[str, Tensor]) -> bool:
        """Whether the trunk's output in the last training pass is known, and what a pass with other weights would make.

        Args:
            weights: name of a parameter → what it would be; those that are not named stay as they are.
        """
        if self._top is None or self._last is None:
            return False
        top, depths = self._top.depth, self._layers.depth
        below = [(self._model.get_parameter(n), t) for n, t in weights.items() if depths.get(n, 0) <= top]
        return all(torch.equal(own, other.to(own.device, own.dtype)) for own, other in below)

    @contextmanager
    def lifted(self) -> Generator[None]:
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

    def seal(self, beside: Path | None = None) -> None:
        """When a checkpoint is written, on every process.

        Args:
            beside: a folder beside the checkpoints, for a store that lies in a temporary one.
        """
        if self._cache is not None:
            self._cache.seal()
            if beside is not None:
                self._cache.move(beside)

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


def _whole_epoch(run: Run) -> bool:
    """Whether a pass over the data begins now."""
    return not run.steps_per_epoch or run.step % run.steps_per_epoch == 0
