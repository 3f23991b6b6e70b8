"""What every technique of explicit phases does with them: hooks over `phases.py`."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from peft_plus import Param, Plugin, Run
from peft_plus.watched_metric import holds, value_of

from .phases import Phase, Place, place_at
from .select import any_matches

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Phased(Plugin):
    """A technique that trains in phases: a subclass says which, in `_phases`.

    The best weights of the phase at work are kept under the technique's name, since all plugins of a run share names.
    """

    on_freeze: ClassVar[Literal["keep", "drop_state"]] = "drop_state"

    stalled: dict[int, int] = field(init=False, default_factory=dict)
    """Number of a phase that its metric ended → the step at which it did."""
    best: float | None = field(init=False, default=None)
    """The best value in the phase at work."""
    waited: int = field(init=False, default=0)
    """Evaluations since then."""
    judged: int | None = field(init=False, default=None)
    """The step of the last evaluation that was looked at."""

    def _phases(self, run: Run) -> Sequence[Phase]:
        raise NotImplementedError

    def _place(self, run: Run) -> Place:
        # At step 0 the state may still be that of another stage, or of an earlier run.
        stalled = self.stalled if run.step else {}
        return place_at(self._phases(run), run.step, run.steps_per_epoch, stalled)

    def may_train(self, run: Run, param: Param) -> bool:
        return any_matches(self._phases(run)[self._place(run).number].train, param, run.num_blocks)

    def next_change(self, run: Run) -> int | None:
        phases, place = self._phases(run), self._place(run)
        if place.number == len(phases) - 1:
            return None
        return NotImplemented if place.end is None else place.end

    def lr_scale(self, run: Run, param: Param) -> float:
        return self._phases(run)[self._place(run).number].lr_scale

    def lr_key(self, param: Param) -> tuple[Any, ...]:
        return ()  # the factor is that of the phase: one for everything

    def on_evaluate(self, run: Run) -> None:
        if run.step == 0:  # before the first step: what an earlier run found out does not count here
            self._forget()
        if run.last_evaluation_step == self.judged:
            return  # another dataset of one evaluation
        phases, place = self._phases(run), self._place(run)
        phase = phases[place.number]
        if phase.patience is None:
            return
        if not holds(run.last_metrics, phase.metric):
            return  # it may come with another evaluation of this step; else the next step's end tells
        value = value_of(run.last_metrics, phase.metric)
        self.judged = run.last_evaluation_step
        if phase.improves(value, self.best):
            self.best, self.waited = value, 0
            if phase.restore_best:
                run.keep(self.name)
        elif run.step > place.begin:  # at its beginning an evaluation says nothing about the phase
            self.waited += 1
        if self.waited >= phase.patience:
            self._end(run, phases, place)
        elif run.step == run.max_steps and phase.restore_best and self.waited:
            run.restore(self.name)
            logger.info("%s: the run ends in a phase that was better before; its best weights are back.", self.name)

    def _end(self, run: Run, phases: Sequence[Phase], place: Place) -> None:
        """The metric of the phase has stopped improving."""
        phase, following = phases[place.number], phases[place.number + 1 :]
        restored = phase.restore_best and self.best is not None
        if restored:
            run.restore(self.name)
        logger.info(
            "%s: phase %d of %d ends at step %d, %s stopped at %s%s.",
            *(self.name, place.number + 1, len(phases), run.step, phase.metric, self.best),
            "; its best weights are back" if restored else "",
        )
        self.stalled = {**self.stalled, place.number: run.step}
        best, self.best, self.waited = self.best, None, 0
        if not following:
            run.stop(f"{self.name}: the last phase has ended, {phase.metric} stopped improving")
        elif following[0].patience is None:
            return
        elif restored:  # the next phase begins with the best weights, whose value is known
            self.best = best if phase.same_yardstick(following[0]) else None
        else:  # it begins with the weights that were just evaluated
            self._begin(run, following[0])

    def _begin(self, run: Run, phase: Phase) -> None:
        value = value_of(run.last_metrics, phase.metric) if holds(run.last_metrics, phase.metric) else math.nan
        if phase.improves(value, None):
            self.best = value
            if phase.restore_best:
                run.keep(self.name)

    def on_step_end(self, run: Run) -> None:
        if run.step == 1 and run.last_evaluation_step is None:
            self._forget()
        phases, place = self._phases(run), self._place(run)
        phase, last, evaluated = phases[place.number], len(phases) - 1, run.last_evaluation_step
        if phase.patience is not None and evaluated not in (None, self.judged) and evaluated >= place.begin:
            value_of(run.last_metrics, phase.metric)  # raises: it was not there
        if place.number == last and phases[last].patience is None and place.end is not None and run.step >= place.end:
            run.stop(f"{self.name}: the last phase has ended at step {place.end}")
        if run.step == run.max_steps:
            self._check_end(run, phases, place)

    def _check_end(self, run: Run, phases: Sequence[Phase], place: Place) -> None:
        if phases[place.number].patience is not None and self.judged is None:
            logger.warning(
                "%s saw no evaluation in these %d steps, so phase %d of %d did not end: set eval_strategy='steps' and "
                "eval_steps, and give an eval_dataset.",
                *(self.name, run.step, place.number + 1, len(phases)),
            )
        reached = place.number + (place.begin < run.step)
        if reached < len(phases):
            logger.warning(
                "%s: the run ends at step %d in phase %d of %d, so the rest was not reached. Train for longer, or "
                "shorten the phases.",
                *(self.name, run.step, reached, len(phases)),
            )

    def _forget(self) -> None:
        self.stalled, self.best, self.waited, self.judged = {}, None, 0, None
