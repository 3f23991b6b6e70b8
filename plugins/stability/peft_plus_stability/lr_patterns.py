"""Learning rates by the name of a parameter."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

from peft_plus import MethodError, Param, Plugin, Run
from peft_plus.patterns import searched


@dataclass(kw_only=True)
class LRPatterns(Plugin):
    """Multiply the learning rate of the parameters whose names a pattern is found in.

    The rate of a parameter is the base rate times the multipliers of all patterns that `re.search` finds in its name in
    `model.named_parameters()`; where none is found, the base rate itself. Since the multipliers multiply, as those of
    several plugins do, the order of the patterns does not matter. E.g. {"lora_B": 16} is LoRA+ (Hayou et al. 2024,
    arXiv:2402.12354), {"^(?!.*lora_B)": 0.1} slows down all but B.

    Args:
        patterns: regular expression → multiplier > 0. What shall not train at all is `freeze`'s.
    Raises:
        ValueError: no pattern is given; one is no regular expression, takes too long, or is found in no name of what
            trains; a multiplier is not positive.
    """

    name: ClassVar[str] = "lr_patterns"
    source: ClassVar[str] = "Hayou et al. 2024, arXiv:2402.12354, for one such pattern"

    patterns: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.patterns:
            raise ValueError("patterns={}: give at least one, e.g. {'lora_B': 16.0}.")
        for pattern, multiplier in self.patterns.items():
            if not isinstance(pattern, str) or type(multiplier) not in (int, float):
                raise ValueError(
                    f"patterns={{{pattern!r}: {multiplier!r}}}: give a text and a number, e.g. 'lora_B': 16.0."
                )
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"patterns holds {pattern!r}, an invalid regular expression: {error}.") from None
            if not 0 < multiplier < math.inf:
                raise ValueError(
                    f"patterns={{{pattern!r}: {multiplier}}}: give a multiplier > 0. What shall rest is for `freeze`."
                )

    def on_build(self, run: Run) -> None:
        trains = [param.name for param in run.params]
        names = list(dict.fromkeys([*trains, *(name for name, _ in run.model.named_parameters())]))
        try:  # in a process with a time limit, so that afterwards none can hang
            lists = searched(list(self.patterns), names, "lr_patterns(patterns=…)")
        except MethodError as error:
            raise ValueError(str(error)) from error
        for pattern, found in zip(self.patterns, lists, strict=True):
            if set(found).isdisjoint(trains):
                raise ValueError(f"patterns: {_why_nothing(pattern, found, trains)}")

    def lr_scale(self, run: Run, param: Param) -> float:
        return math.prod((self.patterns[pattern] for pattern in found_in(param.name, self.patterns)), start=1.0)

    def lr_key(self, param: Param) -> tuple[Any, ...]:
        return found_in(param.name, self.patterns)


def found_in(name: str, patterns: Iterable[str]) -> tuple[str, ...]:
    """Those of the patterns that are found in a name, sorted."""
    return tuple(sorted(pattern for pattern in patterns if _is_found(pattern, name)))


@lru_cache(maxsize=2**17)
def _is_found(pattern: str, name: str) -> bool:
    return re.search(pattern, name) is not None


def _why_nothing(pattern: str, found: list[str], trains: list[str]) -> str:
    if found:
        return (
            f"{pattern!r} is found only in weights that never train ({len(found)}, e.g. {found[0]!r}). What trains is, "
            f"e.g., {trains[0]!r}."
        )
    shown = ", ".join(map(repr, dict.fromkeys([*trains[:2], *trains[-2:]])))
    return f"{pattern!r} is found in no name. What trains is called, e.g., {shown}."
