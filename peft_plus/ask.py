"""Calling a hook: whatever goes wrong in a plugin is raised under its name, distribution and version."""

from __future__ import annotations

from typing import Any

from . import registry
from .errors import MethodError, PluginError
from .plugin import Plugin, Run


def ask(plugin: Plugin, hook: str, *args: Any) -> Any:
    """`plugin.hook(*args)`.

    Raises:
        PluginError: the plugin raised; says which, in which hook and at which step, with the cause chained.
    """
    try:
        return getattr(plugin, hook)(*args)
    except (MethodError, PluginError):
        raise
    except Exception as error:
        run = next((a for a in args if isinstance(a, Run)), None)
        when = f" at step {run.step}" if run else ""
        raise PluginError(
            f"plugin {plugin.name!r} ({origin_of(plugin)}) failed in {hook}{when}: {type(error).__name__}: {error}"
        ) from error


def origin_of(plugin: Plugin) -> str:
    """Distribution and version of a plugin's class where its name is registered, else its module."""
    cls = type(plugin)
    entry = registry.entries("plugin").get(plugin.name)
    return entry.origin if entry and entry.target == f"{cls.__module__}:{cls.__qualname__}" else cls.__module__
