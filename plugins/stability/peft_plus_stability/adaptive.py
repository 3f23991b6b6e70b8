"""A budget that follows the data, and training that follows its progress."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft_plus import Param, Plugin, Run, registry
from peft_plus.watched_metric import better, rises, value_of

from .adaptive_budget import can_freeze, choose, stopping

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Adaptive(Plugin):
    """Choose epochs, rate, warm-up, frozen depth and early stopping by the data, say why, and follow the progress.

    Before a Trainer's run: passes over the data so that there are about 600 steps, from 3 to 20 (20 is Mosbach et al.
    2021's, arXiv:2006.04884, for small data), where a class that holds 80 % or more counts as much as all others
    together; 2e-5 where base weights train, else your rate, divided by as much as your epochs are multiplied; a tenth
    of the steps of warm-up; the lower half of the blocks frozen where a linear probe of the last block wins 90 % of
    what there is to win over the largest class; an evaluation after each epoch, unless you chose when, and early
    stopping where there is something to evaluate on.
    While it trains: after `patience` evaluations without improvement the highest frozen block thaws; where none is
    frozen the rate is multiplied by `lr_factor`; and a run that goes on so is stopped with its best weights. Each
    choice is logged with its reason. `freeze` and `early_stop` are found by name among what is installed.

    What you give is not chosen, and `max_steps` of the arguments counts unless `epochs` is given. A rate is chosen for
    the arguments: an optimizer of your own keeps its own, and a warning says so. A `Session` has no arguments and shows
    no data before it begins: there nothing is chosen, a warning says so, and only what follows the progress acts, with
    the `frozen_blocks` that you give.

    Args:
        epochs: > 0; None: by the number of examples and their balance.
        learning_rate: > 0; None: by what trains, and how long.
        warmup_fraction: of all steps, in [0, 1).
        frozen_blocks: ≥ 0, the embeddings with them; None: by a linear probe, for classification, else 0.
        thaw: whether a plateau thaws; False: what is frozen stays so, and holds no optimizer state. It also does
            where nothing is evaluated.
        metric: what an evaluation tells, with or without `eval_`.
        patience: evaluations without improvement, ≥ 1, until a block thaws or the rate falls; three times as many end
            the run.
        lr_factor: in (0, 1]; 1 leaves the rate alone.
        stop: whether a run that does not improve is ended.
    Raises:
        ValueError: a setting is out of its range or does not fit the model; the data are read as a stream.
        MethodError: a technique that it chose is not installed; says which distribution brings it.
    """

    name: ClassVar[str] = "adaptive"
    source: ClassVar[str] = "Mosbach et al. 2021, arXiv:2006.04884, for the number of epochs, warm-up and rate"
    conflicts: ClassVar[tuple[str, ...]] = ("mosbach", "early_stop", "freeze")

    epochs: float | None = None
    learning_rate: float | None = None
    warmup_fraction: float = 0.1
    frozen_blocks: int | None = None
    thaw: bool = True
    metric: str = "eval_loss"
    patience: int = 2
    lr_factor: float = 0.5
    stop: bool = True

    chosen: dict[str, dict[str, Any]] = field(init=False, default_factory=dict)
    """Technique → its settings."""
    reasons: list[str] = field(init=False, default_factory=list)
    """Each choice, and why."""
    settled: bool = field(init=False, default=False)
    """Whether `chosen` and what follows are of the stage at work."""
    thaws: bool = field(init=False, default=False)
    planned_rate: float | None = field(init=False, default=None)
    stopper: Plugin | None = field(init=False, default=None)
    """`early_stop`, where it was chosen."""
    freezers: dict[int, Plugin] = field(init=False, default_factory=dict)
    """`freeze` of so many blocks."""
    frozen: int = field(init=False, default=0)
    """How many of the lowest blocks are frozen now."""
    best: float | None = field(init=False, default=None)
    waited: int = field(init=False, default=0)
    """Evaluations since the best one."""
    lowered: int = field(init=False, default=0)
    """How often the rate has fallen."""

    def __post_init__(self) -> None:
        for name in ("epochs", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value}: give a number > 0, or None to have it chosen.")
        if not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"warmup_fraction={self.warmup_fraction}: give a fraction of all steps in [0, 1).")
        if self.frozen_blocks is not None and self.frozen_blocks < 0:
            raise ValueError(f"frozen_blocks={self.frozen_blocks}: give a number ≥ 0, or None to have it chosen.")
        if self.patience < 1:
            raise ValueError(f"patience={self.patience}: give a number of evaluations ≥ 1.")
        if not 0 < self.lr_factor <= 1:
            raise ValueError(f"lr_factor={self.lr_factor}: give a factor in (0, 1].")

    @property
    def restores_best(self) -> bool:
        return self.stop

    # ---- before ------------------------------------------------------------------------------------------------------

    def on_build(self, run: Run) -> None:
        given = self.frozen_blocks
        if not given:
            return
        if given > run.num_blocks:
            raise ValueError(
                f"frozen_blocks={given} is past the depth of this model, which has {run.num_blocks} blocks. Give "
                f"{run.num_blocks} at most."
            )
        if not can_freeze(run, given):
            lies = "nothing trains there" if min(run.depths) > given else "nothing else trains"
            raise ValueError(
                f"frozen_blocks={given} does not fit: {lies}, for the tuner trains at the depths "
                f"{sorted(run.depths)} (0: embeddings, {run.num_blocks + 1}: head). Give another number, 0, or another "
                "tuner."
            )
        _technique("freeze")  # rather told now than when the run begins

    def plan_budget(self, run: Run) -> Mapping[str, Any]:
        choices = choose(self, run)
        self.chosen, self.reasons, self.settled = choices.techniques, choices.reasons, True
        self.thaws, self.planned_rate = choices.thaws, choices.args.get("learning_rate")
        for name in self.chosen:
            _technique(name)  # rather missing now than once it is needed
        self.stopper = _made("early_stop", self.chosen)
        logger.warning("adaptive chose:\n%s", "\n".join(f"- {reason}" for reason in self.reasons))
        return choices.args

    def _settle(self) -> None:
        """In a loop that asked for no plan: what the settings alone say."""
        self.chosen, self.thaws, self.planned_rate = {}, self.thaw, None
        if self.frozen_blocks:
            self.chosen["freeze"] = {"blocks": self.frozen_blocks}
        if self.stop:
            self.chosen |= stopping(self)
        self.stopper = _made("early_stop", self.chosen)
        self.settled = True

    # ---- while it trains ---------------------------------------------------------------------------------------------

    def on_stage_begin(self, run: Run) -> None:
        if not self.settled or run.evaluates is None:  # a Trainer that broke off may have left its choices
            self._settle()
            logger.warning("adaptive plans nothing in a loop of your own. %s", self._acts())
        self.best, self.waited, self.lowered, self.frozen = None, 0, 0, self._first_frozen()
        self._check_rate(run)
        if self.stopper is not None:
            self.stopper.on_stage_begin(run)

    def _acts(self) -> str:
        frozen, lowers = self.frozen_blocks or 0, self.lr_factor < 1
        steps = ["the next block thaws"] if frozen and self.thaw else []
        steps += [f"the rate is multiplied by {self.lr_factor:g}"] if lowers else []
        plateau = f"after {self.patience} evaluations without improvement {', later '.join(steps)}" if steps else ""
        ends = f"after {3 * self.patience} the run ends with its best weights" if self.stop else ""
        acts = "; ".join(filter(None, [f"{frozen} blocks are frozen" if frozen else "", plateau, ends])) or "nothing"
        ignored = [f"{n}={getattr(self, n):g}" for n in ("epochs", "learning_rate") if getattr(self, n) is not None]
        return (
            f"What acts, once session.evaluated(metrics) tells {self.metric}: {acts}. What does not: the number of "
            "epochs, the learning rate, the warm-up and the linear probe are left to your loop"
            + (f", and {' and '.join(ignored)} has no effect." if ignored else ".")
        )

    def _check_rate(self, run: Run) -> None:
        """A rate that was chosen is none where the optimizer was not made from the arguments."""
        groups: Any = () if run.optimizer is None else run.optimizer.param_groups
        rates = {float(rate) for group in groups if (rate := group.get("initial_lr", group["lr"])) is not None}
        if self.planned_rate is not None and rates and self.planned_rate not in rates:
            logger.warning(
                "adaptive chose the learning rate %g, but the optimizer was made with %s, and that counts. Leave the "
                "optimizer to a new Trainer (a second train() keeps that of the first), or make it with the rate that "
                "you want.",
                self.planned_rate,
                ", ".join(f"{rate:g}" for rate in sorted(rates)),
            )

    def ever_trains(self, run: Run, param: Param) -> bool:
        thaws = self.thaws if self.settled else self.thaw
        return thaws or self._trains(run, param, self._first_frozen())

    def may_train(self, run: Run, param: Param) -> bool:
        return self._trains(run, param, self._frozen_at(run))

    def next_change(self, run: Run) -> int | None:
        if not self.settled and self.frozen_blocks is None:
            return NotImplemented  # the data will say
        thaws = self.thaws if self.settled else self.thaw
        return NotImplemented if thaws and self._frozen_at(run) else None

    def _first_frozen(self) -> int:
        """How many blocks are frozen when the stage begins."""
        return self.chosen.get("freeze", {"blocks": 0})["blocks"] if self.settled else self.frozen_blocks or 0

    def _frozen_at(self, run: Run) -> int:
        return self.frozen if run.step else self._first_frozen()  # what is known now is not of step 0

    def _trains(self, run: Run, param: Param, blocks: int) -> bool:
        if not blocks:
            return True
        if blocks not in self.freezers:
            self.freezers[blocks] = _technique("freeze")(blocks=blocks)
        return self.freezers[blocks].ever_trains(run, param)

    def lr_scale(self, run: Run, param: Param) -> float:
        return self.lr_factor**self.lowered

    def lr_key(self, param: Param) -> tuple[Any, ...]:
        return ()

    def on_evaluate(self, run: Run) -> None:
        value = value_of(run.last_metrics, self.metric)
        if better(value, self.best, greater_is_better=rises(self.metric, None)):
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        if self.stopper is not None:
            self.stopper.on_evaluate(run)
        if self.waited and self.waited % self.patience == 0 and not run.stop_reasons:
            self._follow_plateau(run)

    def _follow_plateau(self, run: Run) -> None:
        if self.thaws and self.frozen:
            top = max((depth for depth in run.depths if depth <= self.frozen), default=0)  # above it nothing is to thaw
            self.frozen = max(0, top - 1)
            thawed = [f"block {top}"] if top else []
            thawed += ["the embeddings"] if not self.frozen and 0 in run.depths else []
            done = f"{' and '.join(thawed) or 'nothing'} may train from now on; {self.frozen} blocks stay frozen"
        elif self.lr_factor < 1:
            self.lowered += 1
            done = f"the rate falls to {self.lr_factor**self.lowered:g} of what it would be"
        else:
            return
        logger.warning("adaptive: %s has not improved for %d evaluations, so %s.", self.metric, self.waited, done)

    def on_stage_end(self, run: Run) -> None:
        if self.stopper is not None:
            self.stopper.on_stage_end(run)
        self.settled = False

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> Mapping[str, Any]:
        names = ("best", "waited", "lowered", "frozen", "thaws", "chosen", "reasons")
        stopping = {} if self.stopper is None else dict(self.stopper.state_dict())
        return {name: getattr(self, name) for name in names} | {"early_stop": stopping}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if not self.settled:
            self._settle()
        for name in ("chosen", "thaws"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the checkpoint was written with {name}={state[name]}, and now it is {getattr(self, name)}: "
                    "go on with the data, the model and the settings that the run began with. A model that has trained "
                    "in this process is another one: build it anew."
                )
        for name in ("best", "waited", "lowered", "frozen", "reasons"):
            setattr(self, name, state[name])
        if self.stopper is not None:
            self.stopper.load_state_dict(state["early_stop"])


def _technique(name: str) -> Any:
    """The class of that name, from whatever distribution brings it."""
    return registry.load(registry.find(name, ("plugin",)))


def _made(name: str, chosen: Mapping[str, Mapping[str, Any]]) -> Plugin | None:
    return _technique(name)(**chosen[name]) if name in chosen else None
