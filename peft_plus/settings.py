"""Settings by name: every one must exist, and plain ones must have the type that their class declares."""

from __future__ import annotations

import dataclasses
import json
import sys
import typing
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union

from .errors import MethodError
from .names import nearest

_SCALARS = (int, float, bool, str, NoneType)


def make(cls: type[Any], settings: Mapping[str, Any], label: str) -> Any:
    """`cls(**settings)`, after checking names, types and that nothing required is missing.

    Args:
        cls: a dataclass: a plugin, a task or a PEFT config.
        label: what to call it in errors, e.g. `plugin 'llrd' (peft-plus-stability 0.1.0)`.
    Raises:
        MethodError: a setting is unknown (with the nearest match), has the wrong type, a value that the class refuses,
            or is required and missing.
    """
    known = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for name in settings:
        if name not in known:
            have = ", ".join(sorted(known)) or "none"
            raise MethodError(f"{label} has no setting {name!r}.{nearest(name, known)} Its settings: {have}.")
    check_types(cls, settings, label)
    required = [
        name
        for name, f in known.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and name not in settings
    ]
    if required:
        raise MethodError(f"{label} needs the setting {required[0]!r}, which has no default.")
    try:
        return cls(**settings)
    except (ValueError, TypeError) as error:
        raise MethodError(f"{label}: {error}") from error


def check_types(cls: type[Any], settings: Mapping[str, Any], label: str) -> None:
    """Raise MethodError where a plain setting (number, text, flag, or one of a few words) has another type."""
    for name, value in settings.items():
        allowed = _plain_types(_annotation(cls, name))
        if allowed is not None and not any(_fits(value, one) for one in allowed):
            expected = " or ".join(
                "None" if t is NoneType else repr(t) if isinstance(t, str) else t.__name__ for t in allowed
            )
            raise MethodError(f"{label}: {name}={value!r} is {type(value).__name__}; expected {expected}.")


def check_plain(settings: Mapping[str, Any], label: str) -> None:
    """Raise MethodError unless every setting can be saved as JSON: better now than when a trained model is saved."""
    for name, value in settings.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise MethodError(
                f"{label}: {name}={value!r} cannot be saved with the model; settings are plain values ({error})."
            ) from error


def _annotation(cls: type[Any], name: str) -> Any:
    """The resolved annotation of one field, or None where it needs names that exist only for type checkers."""
    for base in cls.__mro__:
        text = vars(base).get("__annotations__", {}).get(name)
        if text is None:
            continue
        if not isinstance(text, str):
            return text
        holder = type("_Holder", (), {"__annotations__": {name: text}, "__module__": base.__module__})
        try:
            return typing.get_type_hints(holder, vars(sys.modules[base.__module__]))[name]
        except NameError:
            return None
    return None


def _plain_types(annotation: Any) -> tuple[Any, ...] | None:
    """The types of a plain annotation; words of a Literal stand for themselves. None when it is not plain."""
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return typing.get_args(annotation)
    if origin in (Union, UnionType):
        parts = [_plain_types(a) for a in typing.get_args(annotation)]
        return None if any(p is None for p in parts) else tuple(t for p in parts if p for t in p)
    return (annotation,) if annotation in _SCALARS else None


def _fits(value: Any, allowed: Any) -> bool:
    if not isinstance(allowed, type):
        return type(value) is type(allowed) and value == allowed
    if allowed is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if allowed is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, allowed)
