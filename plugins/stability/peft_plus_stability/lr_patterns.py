"""Learning rates by the name of a parameter."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft_plus import Param, Plugin, Run


@dataclass(kw_only=True)
class LRPatterns(Plugin):
    """Multiply the learning rate of the parameters whose names a pattern finds.

    The rate of a parameter is the base rate times the multiplier of the first pattern, in the order written, that
    `re.search` finds in its name in `model.named_parameters()`; 1 where none is found. E.g. {"lora_B": 16} is LoRA+
    (Hayou et al. 2024, arXiv:2402.12354).

    Args:
        patterns: regular expression → multiplier > 0. What shall not train at all is `freeze`'s.
    Raises:
        ValueError: no pattern is given, one is no regular expression, finds nothing, or is always preceded by another;
            a multiplier is not positive.
    """

    name: ClassVar[str] = "lr_patterns"
    source: ClassVar[str] = "Hayou et al. 2024, arXiv:2402.12354, for one such pattern"

    patterns: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.patterns:
            raise ValueError("patterns={}: give at least one, e.g. {'lora_B': 16.0}.")
        for pattern, multiplier in self.patterns.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"the pattern {pattern!r} is no regular expression: {error}.") from None
            if not 0 < multiplier < math.inf:
                raise ValueError(f"patterns[{pattern!r}]={multiplier}: give a multiplier > 0. `freeze` rests a layer.")

    def on_build(self, run: Run) -> None:
        names = [param.name for param in run.params]
        used = {first_match(self.patterns, name) for name in names}
        for pattern in self.patterns:
            if pattern in used:
                continue
            if any(re.search(pattern, name) for name in names):
                raise ValueError(f"the pattern {pattern!r} comes after others that find all its names: write it first.")
            shown = ", ".join(map(repr, names[:3] + names[-3:]))
            raise ValueError(f"the pattern {pattern!r} finds no parameter that trains, such as {shown}.")

    def lr_scale(self, run: Run, param: Param) -> float:
        found = first_match(self.patterns, param.name)
        return 1.0 if found is None else float(self.patterns[found])

    def lr_key(self, param: Param) -> tuple[Any, ...]:
        return (first_match(self.patterns, param.name),)


def first_match(patterns: dict[str, float], name: str) -> str | None:
    """The first pattern that is found in a name, or None."""
    return next((pattern for pattern in patterns if re.search(pattern, name)), None)
