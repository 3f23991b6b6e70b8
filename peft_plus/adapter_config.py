"""What an `adapter_config.json` asks for, as a PEFT config that makes PEFT import, open and follow nothing."""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import Any

from packaging.version import InvalidVersion, Version
from torch import nn

from . import registry
from .adapter_folder import CONFIG, AdapterFolder, Record, shortened
from .errors import MethodError

_ORIGIN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*) (\d[A-Za-z0-9.+!]*)")


def config_of(folder: AdapterFolder, base: nn.Module, *, is_trainable: bool) -> Any:
    """The config of a folder, for `base`, whatever base or modules the folder itself names.

    Raises:
        MethodError: a tuner that is not installed or that loads other files, or settings that PEFT refuses.
    """
    import peft

    known: dict[Any, Any] = peft.PEFT_TYPE_TO_CONFIG_MAPPING  # by PeftType, whose members equal their names
    attributes, where = dict(folder.config), folder.path / CONFIG
    kind = attributes.get("peft_type")
    if not isinstance(kind, str) or not re.fullmatch(r"[A-Z][A-Z0-9_]{0,99}", kind):
        raise MethodError(f"{where}: peft_type is {shortened(kind)}; expected the name of a tuner, e.g. 'LORA'.")
    if kind not in known:
        entry = registry.entries("tuner").get(kind.lower())
        if entry is not None and entry.target:
            registry.load(entry)  # of an installed distribution; makes itself known to PEFT
    if kind not in known:
        raise MethodError(_missing_tuner(kind, folder))
    _check_leads_nowhere(kind, attributes, str(where))
    for ignored in ("runtime_config", "auto_mapping", "revision"):
        attributes.pop(ignored, None)
    attributes["base_model_name_or_path"] = getattr(base, "name_or_path", "") or None
    if kind == "MULTITASK_PROMPT_TUNING":
        attributes["prompt_tuning_init"] = "RANDOM"  # the trained prompt is in the file; nothing to start from
    try:
        config: Any = known[kind].from_peft_type(**attributes)
    except Exception as error:
        raise MethodError(
            f"{where}: PEFT refuses these settings: {type(error).__name__}: {str(error)[:500]}"
        ) from error
    if config.is_prompt_learning and is_trainable:
        raise MethodError(
            f"PEFT cannot go on training {kind.lower()!r}: of its encoder only the resulting prompt is saved. Load it "
            "without is_trainable, or train anew with get_model."
        )
    config.inference_mode = not is_trainable
    return config


def requirement(origin: str) -> str | None:
    """A recorded origin such as `peft-plus-freezing 0.1.0` as pip's `peft-plus-freezing>=0.1.0`; None if it is none."""
    match = _ORIGIN.fullmatch(origin)
    return f"{match[1]}>={match[2]}" if match else None


def _missing_tuner(kind: str, folder: AdapterFolder) -> str:
    record: Record | None = folder.record
    asked = requirement(record.tuner_origin) if record is not None else None
    told = f"{str(folder.path)!r} holds a {kind!r} adapter, a tuner that the installed peft {version('peft')} lacks"
    if asked and not asked.startswith("peft>"):
        return f"{told}. The folder names {asked.partition('>')[0]!r} for it. If you trust that: pip install '{asked}'"
    try:
        saved_with = Version(str(folder.config.get("peft_version")))
    except InvalidVersion:
        return f"{told}. A newer peft may have it: pip install -U peft"
    if saved_with > Version(version("peft")):
        return f"{told}; it was saved with {saved_with}: pip install 'peft>={saved_with}'"
    return f"{told}, and so does the one it was saved with ({saved_with}): a plugin that is not installed provides it."


def _check_leads_nowhere(kind: str, attributes: dict[str, Any], where: str) -> None:
    """Refuse settings by which PEFT would import a module or open other files."""
    leads = {
        "adapters": kind == "XLORA",
        "shadow_model": kind == "SHADOW" and attributes.get("shadow_model", "mirror") != "mirror",
        "megatron_config": bool(attributes.get("megatron_config")),
    }
    for name, follows in leads.items():
        if follows:
            raise MethodError(
                f"{where}: PEFT would load what {name}={shortened(attributes.get(name))} names, which lies outside "
                "this folder. If you trust it, load it with PEFT's own from_pretrained."
            )
