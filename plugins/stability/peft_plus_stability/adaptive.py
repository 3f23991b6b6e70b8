"""A budget that follows the data, and training that follows its progress."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score

from peft_plus import Param, Plugin, Run, registry
from peft_plus.watched_metric import better, rises, value_of

logger = logging.getLogger(__name__)

WANTED_STEPS = 600
"""Optimizer steps that a run should have, at least, as far as `MOST_EPOCHS` allow."""
FEWEST_EPOCHS, MOST_EPOCHS = 3, 20
SOLVED = 0.9
"""The share of what a linear probe could win over the largest class, from which on the lower half is left frozen."""
PROBED = 1_000
FOLDS = 5


@dataclass(kw_only=True)
class Adaptive(Plugin):
    """Choose epochs, rate, warm-up, frozen depth and early stopping by the data, and say why; slow down on a plateau.

    Before a Trainer's run: passes over the data so that there are about 600 steps, from 3 to 20 (20 is Mosbach et al.
    2021's, arXiv:2006.04884, for small data); 2e-5 where base weights train, else your rate; a tenth of the steps of
    warm-up; the lower half of the blocks frozen where a linear probe of the last block wins 90 % of what there is to
    win over the largest class; early stopping where there is something to evaluate on. While it trains: after
    `patience` evaluations without improvement the rate is multiplied by `lr_factor`, and a run that goes on so is
    stopped. Each choice is logged with its reason. `freeze` and `early_stop` are found by name among what is installed.

    What you give is not chosen.

    Args:
        epochs: > 0; None: by the number of examples.
        learning_rate: > 0; None: by what trains.
        warmup_fraction: in [0, 1).
        frozen_blocks: ≥ 0; None: by a linear probe, for classification, else 0.
        metric: what an evaluation tells, with or without `eval_`.
        patience: evaluations without improvement, ≥ 1, until the rate falls; three times as many end the run.
        lr_factor: in (0, 1]; 1 leaves the rate alone.
    Raises:
        ValueError: a setting is out of its range; the data are read as a stream.
        MethodError: a technique that it chose is not installed; says which distribution brings it.
    """

    name: ClassVar[str] = "adaptive"
    source: ClassVar[str] = "Mosbach et al. 2021, arXiv:2006.04884, for the number of epochs, warm-up and rate"
    conflicts: ClassVar[tuple[str, ...]] = ("mosbach", "early_stop", "freeze", "ema", "swa", "r4f")

    epochs: float | None = None
    learning_rate: float | None = None
    warmup_fraction: float = 0.1
    frozen_blocks: int | None = None
    metric: str = "eval_loss"
    patience: int = 2
    lr_factor: float = 0.5

    chosen: dict[str, dict[str, Any]] = field(init=False, default_factory=dict)
    """Technique → its settings."""
    reasons: list[str] = field(init=False, default_factory=list)
    """Each choice, and why."""
    best: float | None = field(init=False, default=None)
    waited: int = field(init=False, default=0)
    lowered: int = field(init=False, default=0)
    """How often the rate has fallen."""
    techniques: list[Plugin] = field(init=False, default_factory=list)

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

    # ---- before ------------------------------------------------------------------------------------------------------

    def plan_budget(self, run: Run) -> Mapping[str, Any]:
        self.chosen, self.reasons = {}, []
        labels, features = look_at(run, probe=self.frozen_blocks is None)
        steps = run.steps_per_epoch
        epochs = self.epochs or epochs_for(steps)
        self._say(
            f"{epochs:g} epochs of {steps} steps",
            "as you said" if self.epochs else f"{len(labels)} examples; {WANTED_STEPS} steps are wanted",
        )
        args: dict[str, Any] = {"num_train_epochs": float(epochs), "warmup_steps": self.warmup_fraction}
        args["max_steps"] = -1  # it would win over the epochs
        self._say(f"warm-up over {self.warmup_fraction:g} of the steps", "a cold start scatters")
        pretrained = any(param.part == "base" for param in run.params)
        if self.learning_rate is not None or pretrained:
            args["learning_rate"] = self.learning_rate or 2e-5
            why = "as you said" if self.learning_rate else "pretrained weights train"
            self._say(f"learning rate {args['learning_rate']:g}", why)
        else:
            self._say(f"learning rate {run.base_lr:g}, yours", "only fresh weights train, and no rule fits all of them")
        self._choose_frozen(run, labels, features)
        if run.evaluates:
            args["eval_strategy"] = "epoch"
            self.chosen["early_stop"] = {"metric": self.metric, "patience": 3 * self.patience}
            self._say(f"early stopping after {3 * self.patience} evaluations", "there is data to evaluate on")
        else:
            self._say("no early stopping", "there is nothing to evaluate on")
        self._make()
        logger.warning("adaptive chose:\n%s", "\n".join(f"- {reason}" for reason in self.reasons))
        return args

    def _choose_frozen(self, run: Run, labels: np.ndarray, features: np.ndarray | None) -> None:
        frozen, why = self.frozen_blocks or 0, "as you said"
        if self.frozen_blocks is None:
            gain = None if features is None else probe_gain(features, labels)
            if gain is None:
                why = "no probe: no classification, or too few of a class"
            else:
                frozen = run.num_blocks // 2 if gain >= SOLVED else 0
                why = f"a linear probe wins {gain:.0%} of what there is over the largest class"
        if frozen and len({param.depth for param in run.params}) > 1:
            self.chosen["freeze"] = {"blocks": frozen}
        self._say(f"{frozen} blocks frozen", why)

    def _say(self, choice: str, why: str) -> None:
        self.reasons.append(f"{choice}: {why}")

    def _make(self) -> None:
        """The techniques that were chosen, from whatever distribution brings them."""
        found = {name: registry.load(registry.find(name, ("plugin",))) for name in self.chosen}
        self.techniques = [found[name](**settings) for name, settings in self.chosen.items()]

    # ---- while it trains: the techniques answer, and the plateau -----------------------------------------------------

    def on_stage_begin(self, run: Run) -> None:
        self.best, self.waited, self.lowered = None, 0, 0
        self._tell("on_stage_begin", run)

    def ever_trains(self, run: Run, param: Param) -> bool:
        return all(one.ever_trains(run, param) for one in self.techniques)

    def lr_scale(self, run: Run, param: Param) -> float:
        return self.lr_factor**self.lowered

    def lr_key(self, param: Param) -> tuple[Any, ...]:
        return ()

    def on_step_end(self, run: Run) -> None:
        self._tell("on_step_end", run)

    def on_evaluate(self, run: Run) -> None:
        value = value_of(run.last_metrics, self.metric)
        if better(value, self.best, greater_is_better=rises(self.metric, None)):
            self.best, self.waited = value, 0
        else:
            self.waited += 1
            if self.waited % self.patience == 0 and self.lr_factor < 1:
                self.lowered += 1
                logger.warning(
                    "adaptive: %s has not improved for %d evaluations, so the rate falls to %g of what it would be.",
                    self.metric,
                    self.waited,
                    self.lr_factor**self.lowered,
                )
        self._tell("on_evaluate", run)

    def on_stage_end(self, run: Run) -> None:
        self._tell("on_stage_end", run)

    def _tell(self, event: str, run: Run) -> None:
        for one in self.techniques:
            getattr(one, event)(run)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> Mapping[str, Any]:
        own = {"best": self.best, "waited": self.waited, "lowered": self.lowered, "reasons": list(self.reasons)}
        return own | {"techniques": {one.name: dict(one.state_dict()) for one in self.techniques}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.waited, self.lowered = state["best"], state["waited"], state["lowered"]
        self.reasons = list(state["reasons"])
        names = [one.name for one in self.techniques]
        if sorted(names) != sorted(state["techniques"]):
            raise ValueError(
                f"the checkpoint holds the state of {sorted(state['techniques'])}, now {names} were chosen."
            )
        for one in self.techniques:
            one.load_state_dict(state["techniques"][one.name])


def epochs_for(steps: int) -> int:
    """Passes over the data so that there are about 600 steps, from 3 to 20.

    Args:
        steps: of one pass, ≥ 1.
    """
    return min(MOST_EPOCHS, max(FEWEST_EPOCHS, round(WANTED_STEPS / max(1, steps))))


def look_at(run: Run, *, probe: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """The labels of all examples, and what the last block makes of the first thousand, each averaged over its tokens.

    Returns: labels, (examples,), −1 where there is no single one; features, (examples ≤ 1000, width), or None where
        there is nothing to classify.
    """
    labels: list[int] = []
    features: list[torch.Tensor] = []
    classifies = run.task.name == "SEQ_CLS" and run.task.distribution == "categorical"
    for batch in run.examples(16):
        own = batch.get("labels")
        single = isinstance(own, torch.Tensor) and own.dim() == 1 and not own.is_floating_point()
        rows = len(next(value for value in batch.values() if isinstance(value, torch.Tensor)))
        labels += own.tolist() if single else [-1] * rows  # type: ignore[union-attr]
        if probe and classifies and single and len(features) * 16 < PROBED and run.num_blocks:
            hidden = run.hidden(batch, run.num_blocks).float()
            mask = batch.get("attention_mask")
            if mask is not None:
                hidden = hidden[:, -mask.shape[1] :]  # without a prompt's virtual tokens
            weights = torch.ones(hidden.shape[:2]) if mask is None else mask.float()
            weights = weights.to(hidden.device)[..., None]
            features.append(((hidden * weights).sum(1) / weights.sum(1).clamp(min=1)).cpu())
    return np.array(labels), torch.cat(features).numpy() if features else None


def probe_gain(features: np.ndarray, labels: np.ndarray) -> float | None:
    """What a linear probe wins of what there is to win over the largest class: (accuracy − share) / (1 − share).

    By five-fold cross-validated logistic regression on standardised features.

    Args:
        features: (n, width).
        labels: (≥ n,), of the first n rows.
    Returns: at most 1, and less than 0 where it is worse than the largest class; None where a class has fewer than five
        examples, or there is only one.
    """
    labels = labels[: len(features)]
    counts = np.unique(labels, return_counts=True)[1]
    if len(counts) < 2 or counts.min() < FOLDS:
        return None
    scaled = (features - features.mean(0)) / (features.std(0) + 1e-6)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    accuracy = cross_val_score(LogisticRegression(max_iter=500), scaled, labels, cv=folds).mean()
    share = counts.max() / counts.sum()
    return float((accuracy - share) / (1 - share))
