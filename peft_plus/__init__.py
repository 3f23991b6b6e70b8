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
    from .compose import Plan as Plan
    from .errors import CheckpointError as CheckpointError
    from .errors import DataError as DataError
    from .errors import DivergenceError as DivergenceError
    from .errors import EngagementError as EngagementError
    from .errors import MethodError as MethodError
    from .errors import PluginError as PluginError
    from .errors import TrainingError as TrainingError
    from .hf import Trainer as Trainer
    from .hf import with_plugins as with_plugins
    from .plugin import LossTerm as LossTerm
    from .plugin import Param as Param
    from .plugin import Pass as Pass
    from .plugin import Plugin as Plugin
    from .plugin import Run as Run
    from .reload import from_pretrained as from_pretrained
    from .saving import load_thawed as load_thawed
    from .schedule import freezing_schedule as freezing_schedule
    from .seed_runs import Racing as Racing
    from .seed_runs import SeedRuns as SeedRuns
    from .seed_runs import Seeds as Seeds
    from .seed_runs import SuccessiveHalving as SuccessiveHalving
    from .seed_runs import seeds as seeds
    from .session import Session as Session
    from .stages import Stage as Stage
    from .stages import fit as fit
    from .tasks import Task as Task

    __version__: str

_VERSION = "0.1.0"

_HOMES = {
    "attach": "build",
    "get_model": "build",
    "from_pretrained": "reload",
    "load_thawed": "saving",
    "freezing_schedule": "schedule",
    "Plan": "compose",
    "CheckpointError": "errors",
    "DataError": "errors",
    "DivergenceError": "errors",
    "EngagementError": "errors",
    "MethodError": "errors",
    "PluginError": "errors",
    "TrainingError": "errors",
    "Trainer": "hf",
    "with_plugins": "hf",
    "LossTerm": "plugin",
    "Param": "plugin",
    "Pass": "plugin",
    "Plugin": "plugin",
    "Run": "plugin",
    "Racing": "seed_runs",
    "SeedRuns": "seed_runs",
    "Seeds": "seed_runs",
    "SuccessiveHalving": "seed_runs",
    "seeds": "seed_runs",
    "Session": "session",
    "Stage": "stages",
    "fit": "stages",
    "Task": "tasks",
}
"""Our public names → the module that defines them."""

_dropin.install()


def __getattr__(name: str) -> Any:
    # Nothing is kept here: PEFT's names then always are what PEFT has under them, also patched or reloaded.
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    if name == "__all__":
        return sorted({*_HOMES, *_dropin.peft_names()})
    if name == "__version__":
        # In PEFT's place we are asked for PEFT's: TRL, for one, compares it.
        return _dropin.peft().__version__ if _dropin.replaces_peft() else _VERSION
    if PathFinder.find_spec(f"{__name__}.{name}", __spec__.submodule_search_locations):
        # `from peft_plus import build` asks here before it looks for a submodule.
        return importlib.import_module(f".{name}", __name__)
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    peft = _dropin.peft()
    try:
        return getattr(peft, name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}, and neither has peft") from None


def __dir__() -> list[str]:
    return sorted({*globals(), "__version__", *_HOMES, *_dropin.peft_names(), *_dropin.peft_modules()})
