"""A plugin that is a learning-rate schedule itself: a constant one must run under it, in whatever loop."""

from __future__ import annotations

import logging
from typing import Any

from transformers.trainer_utils import SchedulerType

from .compose import Plan, schedule_plugin, who
from .errors import MethodError
from .stages import Stage

logger = logging.getLogger(__name__)

_DEFAULT = SchedulerType.LINEAR
"""What transformers takes where the user says nothing; as good as nothing said where there is no warm-up either."""


def check_own_schedule(plan: Plan, stage: Stage, args: Any) -> None:
    """Refuse a scheduler that the user asked for under a plugin that is one.

    Args:
        args: TrainingArguments.
    Raises:
        MethodError: names the plugin and the argument.
    """
    plugin = schedule_plugin(plan, stage)
    if plugin is None:
        return
    asked = SchedulerType(args.lr_scheduler_type)
    wrong = "" if asked in (_DEFAULT, SchedulerType.CONSTANT) else f"lr_scheduler_type={asked.value!r}"
    if not wrong and args.get_warmup_steps(10**9) > 0:
        wrong = f"warmup_steps={args.warmup_steps!r}"
    if wrong:
        raise MethodError(
            f"{who(plugin, plan.origins)} is a learning-rate schedule itself, and {wrong} puts another one under it. "
            "Leave it out: the rate stays constant but for the plugin."
        )


def replaces_scheduler(plan: Plan, stage: Stage, args: Any) -> bool:
    """Whether a constant scheduler takes the place of transformers' default one; said in the log."""
    plugin = schedule_plugin(plan, stage)
    if plugin is None or SchedulerType(args.lr_scheduler_type) != _DEFAULT:
        return False
    logger.info(
        "%s is a learning-rate schedule itself: lr_scheduler_type is 'constant' instead of transformers' default %r.",
        who(plugin, plan.origins),
        _DEFAULT.value,
    )
    return True


def check_named(plan: Plan, stage: Stage, name: str) -> None:
    """Refuse a scheduler by name for a bare loop, under a plugin that is one.

    Raises:
        MethodError: it is not the constant one.
    """
    plugin = schedule_plugin(plan, stage)
    if plugin is not None and name != SchedulerType.CONSTANT.value:
        raise MethodError(
            f"{who(plugin, plan.origins)} is a learning-rate schedule itself, and session.scheduler({name!r}) puts "
            "another one under it. Leave the scheduler out."
        )
