"""Freezing for the whole run: the first blocks, the embeddings, or what names match."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from peft_plus import Param, Plugin, Run

from .select import any_matches, chosen, counts, patterns_of

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Freeze(Plugin):
    """Some weights never train: the first blocks with the embeddings, what patterns match, or all but that.

    Frozen is what `blocks`, `embeddings` or `patterns` name (everything, where none of them is given), except what
    `all_but` names. It holds no optimizer state, and takes no phase in other schedules.

    A pattern is a word: "all", "embeddings", "blocks", "head"; "block 3" counts from the input, "block -1" is the last,
    "blocks 1-4" a range; or the name of parameters or modules, with * for anything ("layer.0.attention.*", "*.bias");
    or a regular expression after "re:" that is found in the names.

    Args:
        blocks: how many blocks to freeze, from the input; negative: all but that many at the top. Like `blocks[:k]`.
        embeddings: whether to freeze them; None: together with the first blocks. False goes only with `blocks`.
        patterns: a pattern, or a list of them: what to freeze.
        all_but: a pattern, or a list of them: what trains all the same.
    Raises:
        ValueError: no setting names anything, or one has no effect; `blocks` is past the depth; a pattern matches
            nothing that would train; or nothing is left to train.
    """

    name: ClassVar[str] = "freeze"
    source: ClassVar[str] = "Lee et al. 2019, arXiv:1911.03090"

    blocks: int = 0
    embeddings: bool | None = None
    patterns: Sequence[str] | str = ()
    all_but: Sequence[str] | str = ()

    def __post_init__(self) -> None:
        self._patterns = patterns_of(self.patterns, "patterns")
        self._all_but = patterns_of(self.all_but, "all_but")
        if not (self.blocks or self.embeddings or self._patterns or self._all_but):
            raise ValueError(
                "freeze names nothing to freeze: give blocks=, embeddings=True, patterns=, or all_but= for what trains."
            )
        if self.embeddings is False and not self.blocks:
            raise ValueError(
                "embeddings=False goes only with blocks=, whose first blocks freeze them too. Name what trains all the "
                "same in all_but."
            )
        both = sorted(set(self._patterns) & set(self._all_but))
        if both:
            raise ValueError(f"patterns and all_but both name {both[0]!r}. Keep it in one of them.")

    def on_build(self, run: Run) -> None:
        if abs(self.blocks) > run.num_blocks:
            raise ValueError(
                f"blocks={self.blocks} is past the depth of this model, which has {run.num_blocks} blocks. Give "
                f"{run.num_blocks} at most, or {1 - run.num_blocks} at least."
            )
        if self.blocks and not self._frozen_blocks(run.num_blocks):
            raise ValueError(f"blocks={self.blocks} freezes nothing: this model has just {run.num_blocks} blocks.")
        for depths, setting in (
            (self._frozen_blocks(run.num_blocks), f"blocks={self.blocks}"),
            (range(1) if self.embeddings else range(0), "embeddings=True"),
        ):
            if depths and not any(param.depth in depths for param in run.params):
                there = counts(run.params, run.num_blocks)
                raise ValueError(
                    f"{setting} matches nothing that trains: the tuner trains {there}. Drop it, or take another tuner."
                )
        chosen(self._patterns, run, "patterns")
        for pattern, params in chosen(self._all_but, run, "all_but").items():
            if not any(self._named(param, run.num_blocks) for param in params):
                raise ValueError(f"all_but names {pattern!r}, of which nothing else freezes anything. Drop it.")
        frozen = [param for param in run.params if not self.ever_trains(run, param)]
        left = [param for param in run.params if self.ever_trains(run, param)]
        if not frozen:
            raise ValueError(f"all_but={list(self._all_but)} leaves nothing to freeze. Name less there.")
        if not left:
            raise ValueError(
                f"nothing is left to train: freeze matches all of {counts(frozen, run.num_blocks)}. Freeze less, name "
                "what trains in all_but, or let the tuner reach more."
            )
        if not run.rehearsal:
            there, here = counts(frozen, run.num_blocks), counts(left, run.num_blocks)
            logger.info("freeze: frozen is %s. What trains is %s.", there, here)

    def ever_trains(self, run: Run, param: Param) -> bool:
        return not self._named(param, run.num_blocks) or any_matches(self._all_but, param, run.num_blocks)

    def _named(self, param: Param, num_blocks: int) -> bool:
        """Whether something other than `all_but` freezes it."""
        if not (self.blocks or self.embeddings or self._patterns):
            return True
        with_blocks = bool(self.blocks) if self.embeddings is None else self.embeddings
        return (
            (with_blocks and param.depth == 0)
            or param.depth in self._frozen_blocks(num_blocks)
            or any_matches(self._patterns, param, num_blocks)
        )

    def _frozen_blocks(self, num_blocks: int) -> range:
        return frozen_depths(self.blocks, num_blocks)


def frozen_depths(blocks: int, num_blocks: int) -> range:
    """The depths of `list_of_blocks[:blocks]`, which a model of `num_blocks` has at depths 1 and up."""
    return range(1, num_blocks + 1)[:blocks]
