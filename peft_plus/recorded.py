"""What `peft_plus.json` says about a folder's adapter, checked and put to use: its task, its plugins, its base."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from pathlib import PurePath
from typing import Any

from torch import nn

from . import loading, registry
from .adapter_config import requirement
from .adapter_folder import AdapterFolder, shortened
from .errors import MethodError
from .saving import dtype_of, fingerprint
from .settings import make
from .tasks import Task
from .tasks.choose import choose_task

logger = logging.getLogger(__name__)


def recorded_plugins(folder: AdapterFolder) -> dict[str, dict[str, Any]]:
    """The method that gives the recorded plugins again: name → settings. Looks at names only, and imports nothing.

    Raises:
        MethodError: a plugin is not installed; names the distribution.
    """
    if folder.record is None:
        return {}
    installed = registry.entries("plugin")
    for plugin in folder.record.plugins:
        if plugin.name in installed:
            continue
        asked, home = requirement(plugin.origin), registry.FIRST_PARTY.get(plugin.name)
        told = f"{str(folder.path)!r} was trained with the plugin {plugin.name!r}, which is not installed"
        leave = "Or reload it without is_trainable: what it learned needs no plugin."
        if asked is None:
            raise MethodError(
                f"{told}; it came from {shortened(plugin.origin)}, which is no distribution. Reload the adapter with "
                f"plain PEFT and give it your plugin with peft_plus.attach. {leave}"
            )
        if asked.partition(">")[0] == home:
            raise MethodError(f"{told}: pip install '{asked}'. {leave}")
        raise MethodError(
            f"{told}. The folder names {asked.partition('>')[0]!r} for it. If you trust that: pip install '{asked}'. "
            f"{leave}"
        )
    return {plugin.name: dict(plugin.settings) for plugin in folder.record.plugins}


def recorded_task(
    folder: AdapterFolder, task: str | Task | None, num_labels: int | None, *, base: nn.Module | None, imports: bool
) -> Task | None:
    """The user's task, else the recorded one with the names of its classes, else what the config's task type says.

    None where nobody says.

    Args:
        base: the loaded model, which tells its own task where the folder does not.
        imports: whether an installed third party's task may be imported because the folder names it.
    """
    if task is not None:
        return choose_task(task, num_labels, base)
    recorded = folder.record.task if folder.record is not None else None
    name = recorded.name if recorded is not None else folder.config.get("task_type")
    entry = registry.entries("task").get(name) if isinstance(name, str) else None
    if entry is None or (entry.distribution != "peft-plus" and not imports):
        return None
    if recorded is None:
        return None if base is not None else choose_task(entry.name, num_labels)
    cls, settings = registry.load(entry), dict(recorded.settings)
    if recorded.labels is not None and any(f.name == "label_names" for f in dataclasses.fields(cls)):
        settings["label_names"] = list(recorded.labels)
    return choose_task(make(cls, settings, f"the recorded task {entry.name!r} ({entry.origin})"), num_labels)


def name_labels(base: nn.Module, folder: AdapterFolder) -> None:
    """Give the base's config the recorded names of the classes."""
    names = folder.record.task.labels if folder.record is not None else None
    config: Any = getattr(base, "config", None)
    if names and getattr(config, "num_labels", None) == len(names):
        config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}


def check_base(base: nn.Module, folder: AdapterFolder, *, allow_other: bool) -> None:
    """Compare the base with the one that the adapter was trained on.

    Raises:
        MethodError: it is another one; the adapter means nothing on it, whatever its shape.
    """
    name = getattr(base, "name_or_path", "") or "without a name"
    if folder.record is None:
        named = folder.config.get("base_model_name_or_path")
        if isinstance(named, str) and named and PurePath(named).name != PurePath(name).name:
            logger.warning(
                "%s says it was trained on %s; you loaded it on %s. Plain PEFT records no fingerprint to compare.",
                folder.path,
                shortened(named),
                name,
            )
        return
    recorded, scheme = folder.record.base, loading.scheme_of_model(base)
    if fingerprint(base) == recorded.fingerprint or allow_other:
        return
    then = folder.record.quantization or recorded.dtype or "another precision"
    now = scheme or dtype_of(base)
    offloaded = any(tensor.is_meta for tensor in base.parameters())
    if type(base).__name__ == recorded.class_name and (then != now or offloaded):
        warnings.warn(
            f"{str(folder.path)!r} was trained on {shortened(recorded.name_or_path)} in {then}, this base is in "
            f"{'offloaded ' if offloaded else ''}{now}: whether it is the same one cannot be told from its values.",
            stacklevel=3,
        )
        return
    raise MethodError(
        f"{str(folder.path)!r} was trained on another base: {recorded.class_name} "
        f"{shortened(recorded.name_or_path or 'without a name')} (fingerprint {recorded.fingerprint[:12]!r}), and this "
        f"is {type(base).__name__} {name!r} ({fingerprint(base)[:12]!r}). On weights that it was not trained on an "
        "adapter means nothing. If that is on purpose, allow_other_base=True."
    )
