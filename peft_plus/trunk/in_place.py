"""In the place of a model's `forward`, which PEFT calls past all hooks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

from torch import nn


class InPlace:
    """Lets a model run something else than its own forward.

    Args:
        inner: the transformers model.
        run: gets the arguments of a pass, `(args, kwargs)`, and returns its output.
    Attributes:
        native: the model's own forward, with whatever stood around it already.
    """

    def __init__(self, inner: Any, run: Callable[[Sequence[Any], Mapping[str, Any]], Any]) -> None:
        self._inner = inner
        self.native: Callable[..., Any] = inner.forward
        self._signature = inspect.signature(self.native)
        self._before = vars(inner).get("forward")

        @functools.wraps(self.native)
        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if module is not inner:  # a copy of the model, which took this along
                return type(module).forward(module, *args, **kwargs)
            return run(args, kwargs)

        module = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        signature = self._signature.replace(parameters=[module, *self._signature.parameters.values()])
        forward.__signature__ = signature  # type: ignore[attr-defined]
        self._forward = MethodType(forward, inner)
        inner.forward = self._forward

    def named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments of a pass by name."""
        given = dict(self._signature.bind_partial(*args, **kwargs).arguments)
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        return given

    def takes(self, name: str) -> bool:
        """Whether the model has such an argument, or any."""
        parameters = self._signature.parameters
        return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def remove(self) -> None:
        """Put the model's own forward back, unless somebody has wrapped this one meanwhile."""
        if vars(self._inner).get("forward") is not self._forward:
            return
        if self._before is None:
            del self._inner.forward
        else:
            self._inner.forward = self._before
