"""Packages that only some calls need."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from .errors import CallError


def imported(name: str, purpose: str) -> Any:
    """An optional package.

    Args:
        name: as it is imported and installed.
        purpose: what needs it, as a sentence's beginning: `successive halving`.
    Raises:
        CallError: it is not installed.
    """
    if find_spec(name) is None:
        raise CallError(f"{purpose[0].upper()}{purpose[1:]} needs {name}, which is not installed: pip install {name}")
    return import_module(name)


@contextmanager
def quiet(optuna: Any) -> Generator[None]:
    """Without the lines that Optuna writes of every trial, unless the user asked for more than its default."""
    before = optuna.logging.get_verbosity()
    if before == optuna.logging.INFO:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
