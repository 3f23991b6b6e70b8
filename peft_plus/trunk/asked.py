"""Which plugin wants the trunk's output stored, and how."""

from __future__ import annotations

from ..ask import ask
from ..compose import Plan, who
from ..errors import MethodError, PluginError
from ..plugin import Run
from ..stages import Stage
from .options import CacheOptions


def asked_options(plan: Plan, stage: Stage, run: Run) -> CacheOptions | None:
    """The plugins' answers to `trunk_cache`; None where none wants it.

    Raises:
        PluginError: an answer is none.
        MethodError: two want it.
    """
    found: list[tuple[str, CacheOptions]] = []
    for plugin in plan.active(stage):
        answer = ask(plugin, "trunk_cache", run) if "trunk_cache" in plugin.hooks() else None
        if answer is None:
            continue
        if not isinstance(answer, CacheOptions):
            raise PluginError(
                f"{who(plugin, plan.origins)}: trunk_cache returned {answer!r}; expected CacheOptions or None."
            )
        found.append((who(plugin, plan.origins), answer))
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        raise MethodError(f"{names} both want to store the trunk's output. Leave one of them out.")
    return found[0][1] if found else None
