"""Explicit schedules: phases that the user writes down."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from peft_plus import Param, Run

from .phased import Phased
from .phases import Phase, phases_of
from .select import any_matches, chosen, counts

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class FreezePlan(Phased):
    """Train what you say, phase after phase: who trains in each, and how it ends.

    The trainable set of step s is that of the phase in which s lies. A phase ends after `steps` or `epochs`, or when
    `patience` evaluations in a row brought no improvement; then the weights can go back to its best evaluation. The
    last phase may have no end; if it has one, it ends the run. `peft-plus schedule` writes the phases that another
    schedule would follow, to be edited.

    A phase is a mapping: `train`, and one of `steps`, `epochs` and `patience`; with `patience` also `metric`
    ("eval_loss"), `min_delta` (0), `greater_is_better` and `restore_best` (False); `lr_scale` (1) multiplies the
    learning rate in it. `train` is a pattern or a list of them: "all", "embeddings", "blocks", "head"; "block 3" counts
    from the input, "block -1" is the last, "blocks 1-4" a range; anything else is the name of parameters or modules,
    with * for anything ("layer.0.attention.*", "*.bias"), or a regular expression after "re:" that is found in names.

    Args:
        phases: the phases, in order, at least one.
    Raises:
        ValueError: a phase is empty, trains nothing, has no end though another follows, or two; a key is unknown; a
            pattern matches nothing that trains; an evaluation does not hold the metric.
    """

    name: ClassVar[str] = "freeze_plan"

    phases: Sequence[Mapping[str, Any]]

    def __post_init__(self) -> None:
        self._parsed = phases_of(self.phases)

    @property
    def restores_best(self) -> bool:
        return any(phase.restore_best for phase in self._parsed)

    def _phases(self, run: Run) -> Sequence[Phase]:
        return self._parsed

    def on_build(self, run: Run) -> None:
        for number, phase in enumerate(self._parsed):
            found = chosen(phase.train, run, f"phases[{number}]: train")
            names = {param.name for params in found.values() for param in params}
            trained = [param for param in run.params if param.name in names]
            if run.rehearsal:
                continue
            logger.info("freeze_plan, phase %d trains %s.", number + 1, counts(trained, run.num_blocks))
        never = [param for param in run.params if not self.ever_trains(run, param)]
        if never and not run.rehearsal:
            logger.info("freeze_plan: no phase trains %s.", counts(never, run.num_blocks))

    def ever_trains(self, run: Run, param: Param) -> bool:
        return any(any_matches(phase.train, param, run.num_blocks) for phase in self._parsed)
