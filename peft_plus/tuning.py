"""Putting a tuner onto a base model, and telling which one a model has."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from torch import nn

from .compose import Tuner
from .errors import MethodError
from .layers import find_heads, is_tied_head
from .names import nearest
from .tasks import Task


def with_tuner(base: nn.Module, tuner: Tuner, task: Task) -> nn.Module:
    """The base with the tuner's parameters, and with the task's new head trainable, by PEFT's own means.

    Raises:
        MethodError: PEFT refuses it, a name in `modules_to_save` matches nothing, or there is no head to probe.
    """
    if tuner.name == "full":
        return base
    from peft import LoraConfig, get_peft_model
    from peft.utils.constants import DUMMY_TARGET_MODULES

    if tuner.name == "linear_probe":
        heads = find_heads(base)
        if not heads:
            raise MethodError(
                f"'linear_probe' trains the head, and {type(base).__name__} has none. Pick a task with a head."
            )
        if is_tied_head(base):
            raise MethodError(
                f"'linear_probe' trains the head, but the head of {type(base).__name__} is the input embeddings (tied "
                "weights). Use a tuner, or a task with a head of its own such as 'SEQ_CLS'."
            )
        # PEFT's own way to train a head alone: a LoRA that targets nothing. Loads in plain PEFT.
        config = LoraConfig(
            target_modules=DUMMY_TARGET_MODULES, modules_to_save=list(heads), task_type=task.peft_task_type
        )
        return get_peft_model(base, config)
    # PEFT appends to the lists of the config that it is given: hand it a copy.
    config: Any = copy.deepcopy(tuner.config)
    config.task_type = task.peft_task_type
    if task.new_head:
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *find_heads(base)]))
    _check_modules_to_save(config, base, tuner)
    try:
        return get_peft_model(base, config)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        changed, unset = _settings(tuner.config)
        given = f" with {changed}" if changed else ""
        # PEFT computes with settings that it has no default for; its error then speaks of None, not of which one.
        hint = f". Settings without a value: {', '.join(unset)}." if "NoneType" in str(error) else ""
        raise MethodError(
            f"The tuner {tuner.name!r}{given} cannot be built on {type(base).__name__}: {error}{hint}"
        ) from error


def _check_modules_to_save(config: Any, base: nn.Module, tuner: Tuner) -> None:
    """PEFT passes over a name that matches nothing, and so would leave untrained what the user asked to train."""
    names = [name for name, _ in base.named_modules()]
    for wanted in getattr(config, "modules_to_save", None) or ():
        if not any(name.endswith(wanted) for name in names):
            hint = nearest(wanted, (name.rpartition(".")[2] for name in names))
            raise MethodError(
                f"The tuner {tuner.name!r}: modules_to_save names {wanted!r}, and {type(base).__name__} has no such "
                f"module.{hint}"
            )


def _settings(config: Any) -> tuple[dict[str, Any], list[str]]:
    """A tuner's settings that are not PEFT's defaults, and the names of those without a value."""
    from peft import PeftConfig

    shared = {f.name for f in dataclasses.fields(PeftConfig)}
    changed, unset = {}, []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if field.name in shared:
            continue
        if value is None:
            unset.append(field.name)
        elif value != default:
            changed[field.name] = value
    return changed, unset


def tuner_of(model: nn.Module) -> Tuner:
    """The tuner of a model as it stands: that of its active adapter, `full` where PEFT is not at work."""
    configs = getattr(model, "peft_config", None)
    if not is_peft(model) or not configs:
        return Tuner("full")
    from peft.utils.constants import DUMMY_TARGET_MODULES

    active = model.active_adapters if isinstance(model.active_adapters, list) else [model.active_adapter]
    config = configs.get(active[0]) or next(iter(configs.values()))  # X-LoRA names the experts inside it
    if getattr(config, "target_modules", None) in (DUMMY_TARGET_MODULES, {DUMMY_TARGET_MODULES}):
        return Tuner("linear_probe", config, "peft")
    return Tuner(getattr(config.peft_type, "value", str(config.peft_type)).lower(), config, "peft")


def is_peft(model: nn.Module) -> bool:
    """Whether PEFT wraps the model."""
    from peft import PeftMixedModel, PeftModel

    return isinstance(model, (PeftModel, PeftMixedModel))


def prepends_tokens(model: nn.Module) -> bool:
    """Whether the active tuner puts virtual tokens in front of the input (prefix tuning puts them beside it)."""
    config: Any = tuner_of(model).config
    if config is None or not getattr(config, "is_prompt_learning", False):
        return False
    return getattr(config.peft_type, "value", config.peft_type) != "PREFIX_TUNING"
