"""The errors of the core. Each message names what was wrong, where, and the fix."""

from __future__ import annotations


class MethodError(ValueError):
    """What the user asked for cannot be built: an unknown name or setting, or two things that do not fit together."""


class PluginError(RuntimeError):
    """A plugin that was asked for is missing, does not import, or breaks the contract. Names its distribution."""


class EngagementError(RuntimeError):
    """What a run declared and which tensors really moved do not agree."""
