"""Is a resumed run the same run? What it is made of, written into each checkpoint and compared on resume."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn

from .compose import Plan
from .errors import CheckpointError
from .saving import base_trains, fingerprint
from .stages import Stage
from .tuning import is_peft

logger = logging.getLogger(__name__)

LIBRARIES = ("peft-plus", "peft", "transformers", "accelerate", "torch", "bitsandbytes", "numpy", "datasets", "trl")

# Of a PEFT config: where the base lies, and what PEFT itself changes when it saves, loads or trains.
_NOT_THE_TUNER = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")

# Of TrainingArguments: what is told, written, or shown, but does not touch a weight.
_HARMLESS = (
    *("logging_", "save_", "log_", "hub_", "push_to_hub", "trackio_", "report_to", "run_name", "project"),
    *("disable_tqdm", "output_dir", "do_", "debug", "skip_memory_metrics", "include_", "resume_from_checkpoint"),
    *("local_rank", "ddp_", "restore_callback_states", "metric_for_best_model", "greater_is_better"),
    *("load_best_model_at_end", "batch_eval", "dataloader_pin", "dataloader_prefetch", "dataloader_persistent"),
    *("eval_accumulation_steps", "prediction_loss_only", "eval_do_concat", "eval_use_gather", "per_device_eval"),
    *("torch_empty_cache", "enable_jit_checkpoint", "use_cpu"),  # the device itself is compared
)
# What an optimizer and its schedule take back from their saved state, whatever is asked for now.
_KEPT = ("learning_rate:", "weight_decay:", "adam_beta1:", "adam_beta2:", "adam_epsilon:", "optimizer settings.")
_STEADY = ("constant", "constant_with_warmup", "reduce_lr_on_plateau")  # schedules that do not ask how long a run is


def identity(
    model: nn.Module,
    plan: Plan | None,
    stage: Stage | None,
    *,
    settings: Mapping[str, Any],
    processes: int,
    device: str,
    examples: int | None = None,
    sample: str | None = None,
) -> dict[str, Any]:
    """Plain values that tell one run from another; equal to what JSON makes of them.

    Args:
        model: as the run trains it.
        plan: what hangs on it; None for a model without one.
        stage: the stage that runs.
        settings: name → value of everything that may change the course of training; see `training_settings`.
        processes: how many train together.
        device: type of the device, and how many of them one process uses.
        examples: rows in the training data, where they can be counted.
        sample: a digest of some of them; see `data_sample`.
    Returns: three groups. `run` must stay as it is; `course` may change, with a warning; `versions` likewise.
    """
    run: dict[str, Any] = {"model": type(model).__name__, "adapters": _adapters(model)}
    versions = {name: _version(name) for name in LIBRARIES}
    if plan is not None:
        stage = stage or plan.stages[0]
        run |= {
            "base": {key: value for key, value in plan.base.items() if key != "name_or_path"},
            "tuner": plan.tuner,
            "quantization": plan.quantization,
            "task": {"name": plan.task.name, **plan.task.settings()},
            "stage": {"name": stage.name, "train": stage.train},
            "plugins": [plugin.name for plugin in plan.plugins],
            "plugin": {},
        }
        for plugin in plan.plugins:
            distribution, _, number = plan.origins.get(plugin.name, "").partition(" ")
            run["plugin"][plugin.name] = {"distribution": distribution, **plugin.settings()}
            versions |= {distribution: number} if number else {}
    elif is_peft(model) and not base_trains(model):
        run["base"] = {"fingerprint": fingerprint(model)}
    course = {**settings, "processes": processes, "device": device, "training examples": examples}
    course["training data, a sample"] = sample
    return _plain({"run": run, "course": course, "versions": versions})


def training_settings(args: Any) -> dict[str, Any]:
    """Of TrainingArguments (or a subclass, such as TRL's) all but what is known not to touch a weight."""
    return {name: value for name, value in args.to_dict().items() if not name.startswith(_HARMLESS)}


def compare(old: Mapping[str, Any], new: Mapping[str, Any], where: str) -> None:
    """Raise where `new` is another run than the one that wrote the checkpoint; warn once where its course differs.

    Args:
        old, new: from `identity`.
        where: what to call the checkpoint.
    Raises:
        CheckpointError: another model, tuner, task, stage or plugin, or other settings of them; names each.
    """
    refuse_another_run(old, new, where)
    course = list(_differences(_shared(old, new, "course"), _shared(new, old, "course")))
    versions = list(_differences(_shared(old, new, "versions"), _shared(new, old, "versions")))
    if course and not versions and _only_longer(old["course"], new["course"]):
        logger.info("%s is trained on for longer: %s.", where, ", ".join(course))
    elif course or versions:
        logger.warning(
            "Resuming %s with changes. Unless a line says that it has no effect, the run will not end as it would have "
            "without the interruption (training longer or elsewhere is fine, if that is what you want). In the "
            "checkpoint → now:\n%s",
            where,
            "\n".join(f"  {line}{_effect(line)}" for line in course + versions),
        )


def refuse_another_run(old: Mapping[str, Any], new: Mapping[str, Any], where: str) -> None:
    """The part of `compare` that raises."""
    wrong = list(_differences(old.get("run", {}), new["run"]))
    if wrong:
        raise CheckpointError(
            f"{where} belongs to another run; nothing was loaded. In the checkpoint → now:\n"
            + "\n".join(f"  {line}" for line in wrong)
            + "\nBuild the model as it was to go on with this checkpoint, or start anew without "
            "resume_from_checkpoint and with another output_dir."
        )


def _effect(line: str) -> str:
    """What to say of a difference that changes nothing."""
    if not line.startswith(_KEPT):
        return ""
    return (
        " (no effect: the optimizer goes on with what the checkpoint holds; start anew from its weights to change it)"
    )


def _adapters(model: nn.Module) -> dict[str, Any]:
    """Adapter name → its PEFT config; empty for a model without."""
    found: dict[str, Any] = {}
    configs = getattr(model, "peft_config", None)
    for name, config in configs.items() if isinstance(configs, Mapping) else ():
        settings = {k: v for k, v in config.to_dict().items() if k not in _NOT_THE_TUNER}
        if getattr(config.peft_type, "value", config.peft_type) == "ADALORA":
            settings.pop("rank_pattern", None)  # AdaLoRA writes into it while it trains
        for key in ("target_modules", "modules_to_save"):
            if isinstance(settings.get(key), (list, set, tuple)):
                settings[key] = set(settings[key])  # PEFT appends the heads' names again at each load
        found[name] = settings
    return found


@cache
def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _plain(value: Any) -> Any:
    """The same in the words of JSON, so that what was read back compares equal to what was made."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    # Not repr: it may tell an address, which is another one in each process.
    return getattr(value, "__qualname__", None) or f"a {type(value).__qualname__}"


def _shared(one: Mapping[str, Any], other: Mapping[str, Any], group: str) -> dict[str, Any]:
    """One's values of a group, as far as the other has them: what another version of a library added is no change."""
    return {key: value for key, value in one.get(group, {}).items() if key in other.get(group, {})}


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """A line `name: old → new` for each value that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key, "(none)"), new.get(key, "(none)"), f"{path}.{key}" if path else key)
    elif old != new or isinstance(old, bool) != isinstance(new, bool):
        yield f"{path}: {_short(old)} → {_short(new)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "…"


def _only_longer(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether nothing but the length was raised, under a schedule that does not depend on it."""
    changed = {key for key in old.keys() & new.keys() if old[key] != new[key]}
    longer = all(new[key] > old[key] for key in changed & {"max_steps", "num_train_epochs"})
    warmup = new.get("warmup_steps", 0)
    return (
        changed <= {"max_steps", "num_train_epochs"}
        and longer
        and new.get("lr_scheduler_type") in _STEADY
        and (warmup == 0 or warmup >= 1)
    )
