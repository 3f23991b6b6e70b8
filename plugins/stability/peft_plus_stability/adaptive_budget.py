"""The choices of `adaptive` before a run, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peft_plus import Run

from .adaptive_probe import SKEWED, SOLVED, WANTED_STEPS, Seen, counted, epochs_for, look_at, probe_gain, share_of

if TYPE_CHECKING:
    from .adaptive import Adaptive

PRETRAINED_RATE = 2e-5
"""Mosbach et al. 2021, arXiv:2006.04884, §6."""


@dataclass
class Choices:
    """What was chosen.

    Attributes:
        args: name → value of TrainingArguments.
        techniques: name → its settings.
        thaws: whether a plateau thaws what is frozen.
        reasons: each choice, and why.
    """

    args: dict[str, Any] = field(default_factory=dict)
    techniques: dict[str, dict[str, Any]] = field(default_factory=dict)
    thaws: bool = False
    reasons: list[str] = field(default_factory=list)

    def say(self, choice: str, why: str) -> None:
        """One more reason."""
        self.reasons.append(f"{choice}: {why}")


def choose(settings: Adaptive, run: Run) -> Choices:
    """What the settings, the data and the model ask for. Every process must call it, and gets the same.

    Args:
        run: as `plan_budget` gets it.
    """
    choices = Choices()
    max_steps = run.arguments.max_steps
    keeps_steps = settings.epochs is None and max_steps > 0
    probe = settings.frozen_blocks is None
    seen = look_at(run, probe=probe) if probe or (settings.epochs is None and not keeps_steps) else None
    if keeps_steps:
        choices.say(f"{max_steps} steps, yours", "max_steps is given, and epochs is not")
    else:
        _passes(choices, settings, run, seen)
        if max_steps > 0:  # they would win over the epochs
            choices.args["max_steps"] = -1
            choices.say(f"max_steps={max_steps} of the arguments does not count", "the number of epochs does")
    choices.args["warmup_steps"] = settings.warmup_fraction  # below 1 it is a fraction
    choices.say(f"warm-up over {settings.warmup_fraction:g} of the steps", "a cold start scatters")
    _rate(choices, settings, run)
    _depth(choices, settings, run, seen)
    _evaluations(choices, settings, run, seen)
    return choices


def stopping(settings: Adaptive) -> dict[str, dict[str, Any]]:
    """`early_stop`, with its settings."""
    return {"early_stop": {"metric": settings.metric, "patience": 3 * settings.patience}}


def can_freeze(run: Run, blocks: int) -> bool:
    """Whether freezing so many blocks, with the embeddings, freezes something and leaves something."""
    return any(depth <= blocks for depth in run.depths) and any(depth > blocks for depth in run.depths)


def _passes(choices: Choices, settings: Adaptive, run: Run, seen: Seen | None) -> None:
    steps, epochs, why = run.steps_per_epoch, settings.epochs, "as you said"
    if epochs is None:
        assert seen is not None
        share = share_of(seen.labels)
        count = counted(seen.rows, share)
        epochs, why = epochs_for(steps * count / max(seen.rows, 1)), f"{seen.rows} examples"
        why += "" if share is None else f", {share:.0%} of them of the largest class"
        why += f", which count as {count}" if count != seen.rows else ""
        why += f"; {WANTED_STEPS} steps are wanted"
    choices.say(f"{epochs:g} epochs of {steps} steps", why)
    choices.args["num_train_epochs"] = float(epochs)


def _rate(choices: Choices, settings: Adaptive, run: Run) -> None:
    if settings.learning_rate is not None:
        choices.args["learning_rate"] = settings.learning_rate
        choices.say(f"learning rate {settings.learning_rate:g}", "as you said")
    elif any(param.part == "base" for param in run.params):
        choices.args["learning_rate"] = PRETRAINED_RATE
        choices.say(f"learning rate {PRETRAINED_RATE:g} instead of {run.base_lr:g}", "pretrained weights train")
    elif settings.epochs is None and choices.args.get("num_train_epochs", 0.0) > run.arguments.num_train_epochs:
        yours, chosen = run.arguments.num_train_epochs, choices.args["num_train_epochs"]
        rate = choices.args["learning_rate"] = run.base_lr * yours / chosen
        choices.say(
            f"learning rate {rate:g} instead of {run.base_lr:g}",
            f"yours is for {yours:g} epochs, and in {chosen:g} the rates of all steps come to the same sum",
        )
    else:
        choices.say(f"learning rate {run.base_lr:g}, yours", "only fresh weights train, and no rule fits all of them")


def _depth(choices: Choices, settings: Adaptive, run: Run, seen: Seen | None) -> None:
    blocks, why = settings.frozen_blocks or 0, "as you said"
    if settings.frozen_blocks is None:
        gain = None
        if seen is not None and seen.features is not None and seen.of is not None:
            gain = probe_gain(seen.features, seen.of)
        if gain is None:
            why = "no probe: no classification, or too few of a class"
        else:
            gain = run.mean(gain)  # processes may round otherwise, and all must freeze the same
            blocks = run.num_blocks // 2 if gain >= SOLVED else 0
            why = f"a linear probe wins {gain:.0%} of what there is over the largest class"
    if blocks and not can_freeze(run, blocks):
        blocks, why = 0, "all that trains in this stage lies on one side of them"
    if blocks:
        choices.techniques["freeze"] = {"blocks": blocks}
    choices.thaws = bool(blocks) and settings.thaw and bool(run.evaluates)
    until = ", until a plateau thaws them one by one" if choices.thaws else " for the whole run" if blocks else ""
    choices.say(f"{blocks} blocks frozen{until}", why)


def _evaluations(choices: Choices, settings: Adaptive, run: Run, seen: Seen | None) -> None:
    if not run.evaluates:
        choices.say("no early stopping, and nothing follows a plateau", "there is nothing to evaluate on")
        return
    if settings.stop:
        choices.techniques |= stopping(settings)
        choices.say(f"early stopping after {3 * settings.patience} evaluations", "there is data to evaluate on")
    else:
        choices.say("no early stopping", "as you said")
    if not (settings.stop or choices.thaws or settings.lr_factor < 1):
        return  # nothing that looks at them
    share = None if seen is None else share_of(seen.labels)
    if share is not None and SKEWED <= share < 1 and "accuracy" in settings.metric.lower():
        choices.say(f"{settings.metric} is watched, a poor measure here", f"the largest class alone makes {share:.0%}")
    strategy = run.arguments.eval_strategy.value
    if strategy == "no":
        choices.args["eval_strategy"] = "epoch"
        choices.say("an evaluation after each epoch", "what follows the progress needs them, and there were none")
    else:
        choices.say(f"evaluations by {strategy}, yours", "eval_strategy is given")
