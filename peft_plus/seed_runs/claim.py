"""Whose results a folder holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from .errors import CallError
from .results import write_whole


def claim(file: Path, body: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    """Note whose results lie beside `file`, or see that they are the same's.

    Args:
        file: made with its folder where it is missing.
        body: what tells one call from another, as JSON knows it.
        told: what else is noted; it may change.
    Raises:
        CallError: they are another's; names the first thing that differs.
    """
    check_claim(file, body)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps({**body, **told}, indent=2) + "\n")


def check_claim(file: Path, body: Mapping[str, Any]) -> None:
    """See whether results beside `file` are of another call; changes nothing.

    Raises:
        CallError: they are; names the first thing that differs.
    """
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        name = next((name for name in body if name in before and before[name] != body[name]), None)
        if name is not None:
            raise CallError(
                f"{file.parent} holds runs with {name}={before[name]!r}, this call has {body[name]!r}. Give another "
                "out, or delete that folder."
            )


def named(factory: Callable[..., Any]) -> dict[str, Any]:
    """A factory's name, and what `functools.partial` gave it."""
    function: Any = factory
    arguments: list[Any] = []
    while isinstance(function, partial):
        arguments.append([plain(function.args), plain(function.keywords)])
        function = function.func
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return {"factory": f"{getattr(function, '__module__', '')}.{name}", "arguments": arguments}


def plain(value: Any) -> Any:
    """What of a value JSON can hold; of anything else its type, since its text may differ between processes."""
    match value:
        case str() | int() | float() | None:
            return value
        case Mapping():
            return {str(key): plain(part) for key, part in value.items()}
        case list() | tuple():
            return [plain(part) for part in value]
        case Path():
            return str(value)
        case _:
            return getattr(value, "__qualname__", type(value).__qualname__)
