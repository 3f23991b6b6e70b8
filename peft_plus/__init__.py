"""peft_plus: training practice for PEFT, as plugins that compose with any tuner.

Names load on first use, so that importing this package costs nothing; whatever it does not define is PEFT's own.
"""

from __future__ import annotations

import importlib
from importlib.machinery import PathFinder

from . import dropin as _dropin

TYPE_CHECKING = False  # importing typing for it would take longer than all the rest
if TYPE_CHECKING:
    from typing import Any

    from peft import *  # noqa: F403  # pyright: ignore[reportWildcardImportFromLibrary]

    from .build import attach as attach
    from .build import get_model as get_model
    from .checkpoint import load_thawed as load_thawed
    from .compose import Plan as Plan
    from .errors import EngagementError as EngagementError
    from .errors import MethodError as MethodError
    from .errors import PluginError as PluginError
    from .hf import Trainer as Trainer
    from .hf import with_plugins as with_plugins
    from .plugin import LossTerm as LossTerm
    from .plugin import Param as Param
    from .plugin import Plugin as Plugin
    from .plugin import Run as Run
    from .stages import Stage as Stage
    from .stages import fit as fit
    from .tasks import Task as Task

__version__ = "0.1.0"

_HOMES = {
    "attach": "build",
    "get_model": "build",
    "load_thawed": "checkpoint",
    "Plan": "compose",
    "EngagementError": "errors",
    "MethodError": "errors",
    "PluginError": "errors",
    "Trainer": "hf",
    "with_plugins": "hf",
    "LossTerm": "plugin",
    "Param": "plugin",
    "Plugin": "plugin",
    "Run": "plugin",
    "Stage": "stages",
    "fit": "stages",
    "Task": "tasks",
}
"""Our public names → the module that defines them."""

_dropin.install()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    elif name == "__all__":
        return sorted({*_HOMES, *_dropin.peft_names()})
    elif PathFinder.find_spec(f"{__name__}.{name}", __spec__.submodule_search_locations):
        # `from peft_plus import build` asks here before it looks for a submodule.
        value = importlib.import_module(f".{name}", __name__)
    elif name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    else:
        try:
            value = getattr(importlib.import_module("peft"), name)
        except AttributeError:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}, and neither has peft") from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_dropin.peft_names()})
