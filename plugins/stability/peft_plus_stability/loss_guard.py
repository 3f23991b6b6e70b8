"""Loss guard: leave broken updates out, go back where they do not end, and stop with a report."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft_plus import Param, Plugin, Run

logger = logging.getLogger(__name__)

FLAT = 0.01
"""Least spread of the losses, as a share of their mean: a smooth run must not take its own rounding for a spike."""
SHOWN = 12
"""How many of the last refusals and returns the report names."""
_SLOTS = ("loss_guard_0", "loss_guard_1")


@dataclass(kw_only=True)
class LossGuard(Plugin):
    """Leave out updates of a broken or jumping loss, go back where they come in a row, and stop with a report.

    An update is refused where the loss or the gradients' norm is no finite number, or where loss > mean + `sigmas` · s,
    with the mean and the standard deviation s of the last `window` losses, once half as many are known. A refused loss
    joins them with the next accepted one, so that examples that are just hard are refused once and not for ever. After
    `patience` refusals in a row the last good state comes back, weights and optimizer, and the learning rate is
    multiplied by `backoff` from then on. After `max_backoffs` such returns the next one ends the run.

    Copies are made each `keep_every` accepted updates, in memory and in checkpoints. The older of the last two is the
    good one: of a fresh copy nobody knows yet where it leads.

    It reads the loss in each step, for which an accelerator has to be waited for. A run in which nothing is refused is
    the plain one bit for bit.

    Args:
        sigmas: > 0, in standard deviations of the loss; None refuses only what is not finite.
        window: losses, ≥ 4.
        patience: refusals in a row, ≥ 1.
        keep_every: accepted updates, ≥ 1.
        backoff: factor of the learning rate, in (0, 1].
        max_backoffs: ≥ 0; at 0 nothing is copied, and `patience` refusals in a row end the run where they began.
    Raises:
        ValueError: a setting is out of its range; a copy cannot be made, since processes share the weights.
    """

    name: ClassVar[str] = "loss_guard"
    source: ClassVar[str] = "Chowdhery et al. 2022, arXiv:2204.02311, §5.1, for going back and leaving batches out"

    sigmas: float | None = 6.0
    window: int = 128
    patience: int = 3
    keep_every: int = 100
    backoff: float = 0.5
    max_backoffs: int = 3

    losses: list[float] = field(init=False, default_factory=list)
    """Those against which the next one is judged."""
    waiting: list[float] = field(init=False, default_factory=list)
    """Finite losses that were refused since the last accepted update."""
    in_a_row: int = field(init=False, default=0)
    """Refusals since the last accepted update."""
    refused: int = field(init=False, default=0)
    accepted: int = field(init=False, default=0)
    """Updates since the last copy or return."""
    copies: list[int] = field(init=False, default_factory=list)
    """After how many steps the copies were made, the older one first."""
    newest: int = field(init=False, default=0)
    """Which slot holds the newest copy."""
    backoffs: int = field(init=False, default=0)
    report: list[str] = field(init=False, default_factory=list)
    """The last refusals and returns, in words."""

    def __post_init__(self) -> None:
        if self.sigmas is not None and not 0 < self.sigmas < math.inf:
            raise ValueError(f"sigmas={self.sigmas}: give a number of standard deviations > 0, or None.")
        for name, least in (("window", 4), ("patience", 1), ("keep_every", 1), ("max_backoffs", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: give a number ≥ {least}.")
        if not 0 < self.backoff <= 1:
            raise ValueError(f"backoff={self.backoff}: give a factor in (0, 1].")

    def on_stage_begin(self, run: Run) -> None:
        self.losses, self.waiting, self.copies, self.report = [], [], [], []
        self.in_a_row = self.refused = self.accepted = self.newest = self.backoffs = 0
        if self.max_backoffs > 0:
            try:
                self._copy(run)
            except RuntimeError as error:
                raise ValueError(f"{error} Or set max_backoffs=0, for which nothing is copied.") from error

    def accept_update(self, run: Run, loss: float, norm: float) -> bool:
        trouble = fault(loss, norm, self.losses, sigmas=self.sigmas, least=self.window // 2)
        if trouble:
            self.in_a_row += 1
            self.refused += 1
            if math.isfinite(loss):
                self.waiting.append(loss)
            self._note(f"step {run.step}: {trouble}")
            return False
        self.losses = [*self.losses, *self.waiting, loss][-self.window :]
        self.waiting, self.in_a_row = [], 0
        self.accepted += 1
        return True

    def on_step_end(self, run: Run) -> None:
        if self.in_a_row >= self.patience:
            self._go_back(run)
        elif self.accepted >= self.keep_every and self.max_backoffs > 0:
            self._copy(run)
        if self.refused:
            run.log(loss_guard_refused=self.refused, loss_guard_backoffs=self.backoffs)

    def lr_scale(self, run: Run, param: Param) -> float:
        return self.backoff**self.backoffs

    def lr_key(self, param: Param) -> tuple[Any, ...]:
        return ()

    def _copy(self, run: Run) -> None:
        self.newest = 1 - self.newest
        run.keep(_SLOTS[self.newest], optimizer=True)
        self.copies = [*self.copies[-1:], run.step]
        self.accepted = 0

    def _go_back(self, run: Run) -> None:
        row, finished = self.in_a_row, run.step - self.in_a_row
        if self.copies:
            if len(self.copies) == 2:
                self.newest = 1 - self.newest
            run.restore(_SLOTS[self.newest])
            self.copies = self.copies[:1]
            finished = self.copies[0]
        self.in_a_row, self.waiting, self.accepted = 0, [], 0
        if self.backoffs >= self.max_backoffs:
            run.stop(
                f"loss_guard: {row} updates in a row were refused, after {self.backoffs} returns of at most "
                f"{self.max_backoffs}; {self.refused} in all. The weights are those after {finished} finished steps. "
                f"The last of it: {'; '.join(self.report)}. Look at the data of these steps, or lower the learning "
                "rate; where such a jump of the loss is right, raise sigmas."
            )
            return
        self.backoffs += 1
        rate = self.backoff**self.backoffs
        self._note(f"after step {run.step}: back to the state after {finished} steps, learning rate × {rate:g}")

    def _note(self, text: str) -> None:
        logger.warning("loss_guard: %s", text)
        self.report = [*self.report, text][-SHOWN:]


def fault(loss: float, norm: float, losses: Sequence[float], *, sigmas: float | None, least: int) -> str:
    """Why an update is refused; empty where it is not.

    Args:
        loss, norm: of the step.
        losses: of the steps before.
        sigmas: standard deviations above their mean at which a loss is a spike; None for never.
        least: of how many losses, ≥ 2, a spread can be told.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(norm):
        return f"the norm of the gradients is {norm}"
    if sigmas is not None and len(losses) >= least and loss > spike_limit(losses, sigmas=sigmas):
        return f"the loss is {loss:.4g}, the limit {spike_limit(losses, sigmas=sigmas):.4g}"
    return ""


def spike_limit(losses: Sequence[float], *, sigmas: float) -> float:
    """mean + sigmas · s, past which a loss is a spike.

    s is the standard deviation, with n − 1, or a hundredth of the mean where that is larger.

    Args:
        losses: at least two.
        sigmas: > 0.
    """
    mean = statistics.fmean(losses)
    return mean + sigmas * max(statistics.stdev(losses), FLAT * abs(mean))
