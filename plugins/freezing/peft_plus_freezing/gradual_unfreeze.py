"""Gradual unfreezing (ULMFiT), from the top or from the bottom."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from peft_plus import Param, Plugin, Run
from peft_plus.watched_metric import better, check_patience, rises, value_of

logger = logging.getLogger(__name__)

_STALL = ("metric", "greater_is_better", "patience", "min_delta")
"""The settings that go only with `every="stall"`."""


@dataclass(kw_only=True)
class GradualUnfreeze(Plugin):
    """Thaw from the top: the head trains from the start, then one block more at a time, the embeddings last.

    Phase p trains the topmost p + 1 depths at which the tuner put something to train (Howard & Ruder 2018,
    arXiv:1801.06146, §3.3): p = ⌊step / interval⌋, or how many of the fractions `at` have passed, or with
    `every="stall"` how often the evaluated metric has stopped improving. In an encoder-decoder both stacks thaw in
    parallel, aligned from the top (Raffel et al. 2020, arXiv:1910.10683, §3.5.1).

    Args:
        every: the interval between two thaws: `"epoch"`, or a number of optimizer steps ≥ 1; or `"stall"`, then
            `metric` and what follows it apply.
        at: instead of an interval, the fractions of the run at which the next thaw happens, strictly rising between 0
            and 1.
        direction: `"top_down"`, or `"bottom_up"`: the embeddings thaw first and the last block last. The head, where
            there is one, trains from the start in both.
        blocks: how many depths a thaw brings, ≥ 1.
        keep: `"all"`: what was thawed trains on; `"newest"`: only the newest depths do, and the head.
        metric: name of the metric, with or without the Trainer's `eval_`.
        greater_is_better: its direction; None: lower is better of a loss or an error, by its name, else higher.
        patience: how many evaluations in a row without an improvement let the next depth thaw, ≥ 1.
        min_delta: what counts as an improvement: better than the best so far by more than this, in the metric's units,
            ≥ 0.
    Raises:
        ValueError: a setting is out of its range, or goes only with another one; there are fewer depths than `blocks`
            or `at` ask for; `every` is `"epoch"` and the data has no length; an evaluation does not hold the metric.
    """

    name: ClassVar[str] = "gradual_unfreeze"
    source: ClassVar[str] = "Howard & Ruder 2018, arXiv:1801.06146, §3.3"
    needs: ClassVar[tuple[str, ...]] = ("layers",)

    every: Literal["epoch", "stall"] | int = "epoch"
    at: Sequence[float] | None = None
    direction: Literal["top_down", "bottom_up"] = "top_down"
    blocks: int = 1
    keep: Literal["all", "newest"] = "all"
    metric: str = "eval_loss"
    greater_is_better: bool | None = None
    patience: int = 1
    min_delta: float = 0.0

    phase: int = field(init=False, default=0)
    """How often the metric has stopped improving."""
    best: float | None = field(init=False, default=None)
    waited: int = field(init=False, default=0)
    """Evaluations since the best one, or since the last thaw."""
    judged: int | None = field(init=False, default=None)
    """The step of the last evaluation that was looked at."""

    def __post_init__(self) -> None:
        if isinstance(self.every, int) and self.every < 1:
            raise ValueError(f"every={self.every!r}: give 'epoch', 'stall' or a number of optimizer steps ≥ 1.")
        if self.at is not None:
            _check_fractions(self.at)
        if self.at and self.every != "epoch":
            raise ValueError(f"every={self.every!r} and at={self.at!r} both say when to thaw. Give one of them.")
        if self.blocks < 1:
            raise ValueError(f"blocks={self.blocks}: give a number of depths ≥ 1.")
        check_patience(self.patience, self.min_delta)
        if self.keep == "newest":  # only then does anything rest that has trained, and it never trains again
            vars(self)["on_freeze"] = "drop_state"
        for f in dataclasses.fields(self):
            if f.name in _STALL and self.every != "stall" and getattr(self, f.name) != f.default:
                raise ValueError(f"{f.name}={getattr(self, f.name)!r} goes only with every='stall'.")

    def on_build(self, run: Run) -> None:
        depths = len(run.depths)
        if self.blocks > depths:
            raise ValueError(f"blocks={self.blocks}, but this model trains at {depths} depths. Give {depths} or fewer.")
        thaws = len(self._groups(run)) - 1
        if self.at and len(self.at) > thaws:
            raise ValueError(
                f"at={self.at!r} holds {len(self.at)} thaws, but after the first phase only {thaws} are left. Drop "
                f"{len(self.at) - thaws}."
            )

    def may_train(self, run: Run, param: Param) -> bool:
        return param.depth in thawed(
            run.depths,
            self._phase(run),
            direction=self.direction,
            blocks=self.blocks,
            keep=self.keep,
            head=_head(run),
        )

    def next_change(self, run: Run) -> int | None:
        phase = self._phase(run) + 1
        if phase >= len(self._groups(run)):
            return None
        if self.every == "stall":
            return NotImplemented
        if self.at:
            return next((step for step in thaw_steps(self.at, run.max_steps) if step > run.step), None)
        return phase * self._interval(run)

    def on_step_end(self, run: Run) -> None:
        if self.every != "stall":
            return
        if run.step == 1:  # the first of a stage: what an earlier one found out does not count here
            self.phase, self.best, self.waited, self.judged = 0, None, 0, None
        if run.last_evaluation_step is not None and run.last_evaluation_step != self.judged:
            self.judged = run.last_evaluation_step
            self._judge(value_of(run.last_metrics, self.metric))
        if run.step == run.max_steps and self.judged is None:
            logger.warning(
                "gradual_unfreeze(every='stall') saw no evaluation in these %d steps, so nothing was thawed: set "
                "eval_strategy='steps' and eval_steps, and give an eval_dataset.",
                run.max_steps,
            )

    def _judge(self, value: float) -> None:
        """Take one more evaluation into account."""
        rising = rises(self.metric, self.greater_is_better)
        if better(value, self.best, greater_is_better=rising, min_delta=self.min_delta):
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        if self.waited >= self.patience:
            self.phase, self.waited = self.phase + 1, 0

    def _groups(self, run: Run) -> list[Sequence[int]]:
        return thaw_order(run.depths, direction=self.direction, blocks=self.blocks, head=_head(run))

    def _phase(self, run: Run) -> int:
        if self.every == "stall":
            return self.phase if run.step else 0  # before the first step the state may still be that of another stage
        if self.at:
            return sum(step <= run.step for step in thaw_steps(self.at, run.max_steps))
        return run.step // self._interval(run)

    def _interval(self, run: Run) -> int:
        if isinstance(self.every, int):
            return self.every
        if not run.steps_per_epoch:
            raise ValueError("gradual_unfreeze(every='epoch') needs data with a length; give every=<optimizer steps>.")
        return run.steps_per_epoch


def thaw_order(
    depths: Sequence[int], *, direction: str = "top_down", blocks: int = 1, head: int | None = None
) -> list[Sequence[int]]:
    """The groups of depths that thaw one after the other; the first trains from the start.

    Args:
        depths: where something may train, from the top down.
        direction: `top_down` or `bottom_up`.
        blocks: depths in a group, ≥ 1; the last one may hold fewer.
        head: the depth of the head, which is a group of its own and comes first.
    """
    rest = [depth for depth in depths if depth != head]
    if direction == "bottom_up":
        rest.reverse()
    groups = [rest[i : i + blocks] for i in range(0, len(rest), blocks)]
    return [[head], *groups] if head is not None and head in depths else [*groups]


def thawed(
    depths: Sequence[int],
    phase: int,
    *,
    direction: str = "top_down",
    blocks: int = 1,
    keep: str = "all",
    head: int | None = None,
) -> Sequence[int]:
    """The depths that train in a phase.

    Args:
        depths, direction, blocks, head: see `thaw_order`.
        phase: 0, 1, 2, …; phases past the last are like it.
        keep: `all`: what was thawed trains on; `newest`: only the newest group does, and the head.
    """
    groups = thaw_order(depths, direction=direction, blocks=blocks, head=head)[: phase + 1]
    if keep == "newest":
        groups = [group for group in groups[:-1] if head in group] + groups[-1:]
    return [depth for group in groups for depth in group]


def thaw_steps(fractions: Sequence[float], max_steps: int) -> list[int]:
    """The steps at which the fractions of a run have passed: ⌈fraction · max_steps⌉, without errors of rounding."""
    return [math.ceil(fraction * max_steps - 1e-9) for fraction in fractions]


def _head(run: Run) -> int:
    return run.num_blocks + 1


def _check_fractions(at: Any) -> None:
    numbers = isinstance(at, (list, tuple)) and all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in at)
    if not (at and numbers) or not all(0 < x < 1 for x in at) or any(a >= b for a, b in itertools.pairwise(at)):
        raise ValueError(f"at={at!r}: give a list of fractions of the run, strictly rising, each > 0 and < 1.")
