"""Phases: who trains in each, how it ends, and where a run stands among them. Pure; `phased.py` runs them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft_plus.names import nearest
from peft_plus.settings import check_types
from peft_plus.watched_metric import better, rises

from .select import patterns_of

ENDS = ("steps", "epochs", "patience")
"""The keys that say how a phase ends, of which it has one."""

_BY_METRIC = ("metric", "min_delta", "greater_is_better", "restore_best")
"""The keys that go only with `patience`."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of a schedule. It ends by `steps`, `epochs` or `patience`; without any, with the run.

    Attributes:
        train: patterns of what trains in it; see `select.py`.
        steps: optimizer steps, ≥ 1.
        epochs: passes over the data, > 0, rounded up to whole steps.
        patience: evaluations in a row without an improvement of `metric`, ≥ 1.
        metric: with or without the Trainer's `eval_`.
        min_delta: by more than this an improvement is better than the best so far, in the metric's units, ≥ 0.
        greater_is_better: the metric's direction; None: lower is better of a loss or an error, by its name.
        restore_best: whether at its end the weights go back to those of its best evaluation.
        lr_scale: factor of the learning rate, > 0.
    """

    train: tuple[str, ...]
    steps: int | None = None
    epochs: float | None = None
    patience: int | None = None
    metric: str = "eval_loss"
    min_delta: float = 0.0
    greater_is_better: bool | None = None
    restore_best: bool = False
    lr_scale: float = 1.0

    def length(self, steps_per_epoch: int) -> int | None:
        """Its optimizer steps; None where nothing but a metric or the run ends it.

        Raises:
            ValueError: it is counted in epochs, and the data has no length.
        """
        if self.epochs is None:
            return self.steps
        if not steps_per_epoch:
            raise ValueError(f"a phase of epochs={self.epochs:g} needs data with a length; give steps= instead.")
        return max(1, math.ceil(self.epochs * steps_per_epoch - 1e-9))

    def improves(self, value: float, best: float | None) -> bool:
        """Whether a value of its metric is better than the best so far."""
        rising = rises(self.metric, self.greater_is_better)
        return better(value, best, greater_is_better=rising, min_delta=self.min_delta)

    def same_yardstick(self, other: Phase) -> bool:
        """Whether both judge by one metric in one direction, so that a best value holds in both."""
        return (self.metric, rises(self.metric, self.greater_is_better)) == (
            other.metric,
            rises(other.metric, other.greater_is_better),
        )


def phase_of(value: Any, where: str, *, last: bool) -> Phase:
    """A phase from the mapping that the user wrote.

    Args:
        where: which one, for messages: `phases[0]`.
        last: whether it is the last one, which needs no end.
    Raises:
        ValueError: an unknown key (with the nearest match), a value out of its range, no end or two.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}={value!r} is a {type(value).__name__}; give a mapping such as {{'train': 'head'}}.")
    known = [f.name for f in dataclasses.fields(Phase)]
    for key in value:
        if key not in known:
            raise ValueError(f"{where} has no key {key!r}.{nearest(key, known)} Its keys: {', '.join(known)}.")
    if "train" not in value:
        raise ValueError(f"{where} does not say what trains: give train=, a pattern or a list of them.")
    train = patterns_of(value["train"], f"{where}: train")
    if not train:
        raise ValueError(f"{where} trains nothing: train={value['train']!r}. Name at least one pattern, or drop it.")
    given = {key: item for key, item in value.items() if key != "train"}
    check_types(Phase, given, where)
    phase = Phase(train=train, **given)
    _check_numbers(phase, where)
    ends = [name for name in ENDS if getattr(phase, name) is not None]
    if len(ends) > 1:
        raise ValueError(f"{where} ends in {len(ends)} ways, by {' and '.join(ends)}. Give one of them.")
    if not ends and not last:
        raise ValueError(
            f"{where} has no end, so what follows is never reached: give {', '.join(ENDS[:-1])} or patience."
        )
    for key in _BY_METRIC:
        if phase.patience is None and key in given:
            raise ValueError(f"{where}: {key}={given[key]!r} goes only with patience=<evaluations>.")
    return phase


def _check_numbers(phase: Phase, where: str) -> None:
    for name in ("steps", "patience"):
        number = getattr(phase, name)
        if number is not None and number < 1:
            raise ValueError(f"{where} is empty: {name}={number}. Give a number ≥ 1, or drop the phase.")
    if phase.epochs is not None and not (math.isfinite(phase.epochs) and phase.epochs > 0):
        raise ValueError(f"{where} is empty: epochs={phase.epochs}. Give a finite number > 0, or drop the phase.")
    if not (math.isfinite(phase.min_delta) and phase.min_delta >= 0):
        raise ValueError(f"{where}: min_delta={phase.min_delta}; give a finite number ≥ 0.")
    if not (math.isfinite(phase.lr_scale) and phase.lr_scale > 0):
        raise ValueError(f"{where}: lr_scale={phase.lr_scale}; give a finite number > 0. What rests is not in train.")


def phases_of(value: Any) -> tuple[Phase, ...]:
    """All phases as the user wrote them.

    Raises:
        ValueError: there are none, or one is wrong; says which.
    """
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(
            f"phases={value!r}: give a list of phases, e.g. "
            "[{'train': 'head', 'steps': 100}, {'train': ['blocks 5-6', 'head']}]."
        )
    return tuple(phase_of(one, f"phases[{i}]", last=i == len(value) - 1) for i, one in enumerate(value))


@dataclass(frozen=True)
class Place:
    """Where a run stands: in phase `number`, which began at step `begin` and ends at step `end`.

    `end` is None while it is not known: the metric decides, or the run.
    """

    number: int
    begin: int
    end: int | None


def place_at(phases: Sequence[Phase], step: int, steps_per_epoch: int, stalled: Mapping[int, int]) -> Place:
    """Where a run stands at a step. Past the end of the last phase it still stands in that.

    Args:
        steps_per_epoch: 0 where the data has no length.
        stalled: number of a phase that its metric ended → the step at which it did.
    Raises:
        ValueError: one of them is counted in epochs, and the data has no length.
    """
    begin = 0
    lengths = [phase.length(steps_per_epoch) for phase in phases]  # of all, so that none is refused when it is reached
    for number, length in enumerate(lengths):
        end = stalled.get(number) if length is None else begin + length
        if end is None or step < end or number == len(phases) - 1:
            return Place(number, begin, end)
        begin = end
    raise ValueError("there are no phases.")
