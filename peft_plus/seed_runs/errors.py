"""What a call is told before, or instead of, all its runs."""

from __future__ import annotations

from ..errors import MethodError


class CallError(MethodError):
    """What is wrong with a call, with its folder or its factory's Trainer: each of its runs would say it."""
