"""How users say which weights are meant: words for places in the model, globs and regular expressions for names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from peft_plus import MethodError, Param, Run
from peft_plus.layers import depth_label
from peft_plus.names import nearest
from peft_plus.patterns import searched

REGEX = "re:"
"""What a regular expression starts with."""

WORDS = ("all", "embeddings", "blocks", "head")
"""The words that stand alone; `block 3` and `blocks 1-4` name single blocks."""

GRAMMAR = (
    "A pattern is 'all', 'embeddings', 'blocks', 'head', 'block 3' (counted from the input, 'block -1' is the last), "
    "'blocks 1-4', a name of parameters or modules with * for anything ('layer.0.attention.*', '*.bias'), or a "
    "regular expression that is found in the names ('re:layer\\.[0-3]\\.')."
)

_BLOCKS = re.compile(r"blocks?\s+(-?\d+)(?:\s*-\s*(-?\d+))?")


def patterns_of(value: Any, setting: str) -> tuple[str, ...]:
    """The patterns of a setting: one text, or a list of them.

    Args:
        value: as the user wrote it.
        setting: its name, for messages.
    Raises:
        ValueError: it is neither, or one of them is no pattern.
    """
    patterns = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple)) else None
    if patterns is None:
        raise ValueError(f"{setting}={value!r} is a {type(value).__name__}; give a pattern or a list. {GRAMMAR}")
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise ValueError(f"{setting} holds {pattern!r}, which is no pattern. {GRAMMAR}")
        _check(pattern, setting)
    twice = next((p for i, p in enumerate(patterns) if p in patterns[:i]), None)
    if twice is not None:
        raise ValueError(f"{setting} names {twice!r} twice.")
    return patterns


def _check(pattern: str, setting: str) -> None:
    if pattern.startswith(REGEX):
        try:
            re.compile(pattern[len(REGEX) :])
        except re.error as error:
            raise ValueError(f"{setting} holds {pattern!r}, an invalid regular expression: {error}.") from error
        return
    numbers = _BLOCKS.fullmatch(pattern)
    if numbers is None:
        if re.search(r"\s", pattern):  # no name of a parameter holds a space
            raise ValueError(f"{setting} holds {pattern!r}, which is no pattern.{nearest(pattern, WORDS)} {GRAMMAR}")
        return
    first, last = int(numbers[1]), int(numbers[2] or numbers[1])
    if 0 in (first, last):
        raise ValueError(f"{setting} holds {pattern!r}, but blocks count from 1. The embeddings are 'embeddings'.")
    if (first < 0) == (last < 0) and first > last:
        raise ValueError(f"{setting} holds {pattern!r}, which ends before it begins. Write the lower block first.")


@lru_cache(maxsize=2**17)
def matches(pattern: str, name: str, depth: int, num_blocks: int) -> bool:
    """Whether a pattern means the parameter `name` at `depth` of a model of `num_blocks` blocks.

    A name with or without `*`, `?`, `[…]` means a parameter or everything in a module: it matches the whole name, or
    what is left of it when whole components are dropped at either end. A word means a depth.
    """
    if pattern == "all":
        return True
    depths = depths_of(pattern, num_blocks)
    if depths is not None:
        return depth in depths
    if pattern.startswith(REGEX):
        return re.search(pattern[len(REGEX) :], name) is not None
    return any(fnmatchcase(name, form) for form in (pattern, f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*"))


@lru_cache(maxsize=2**10)
def depths_of(pattern: str, num_blocks: int) -> range | None:
    """The depths that a word means; None for a pattern of names.

    Args:
        num_blocks: L; numbers past it give an empty range, see `chosen`.
    """
    if pattern == "embeddings":
        return range(1)
    if pattern == "blocks":
        return range(1, num_blocks + 1)
    if pattern == "head":
        return range(num_blocks + 1, num_blocks + 2)
    numbers = _BLOCKS.fullmatch(pattern)
    if numbers is None:
        return None
    first, last = (int(n) if int(n) > 0 else num_blocks + 1 + int(n) for n in (numbers[1], numbers[2] or numbers[1]))
    return range(first, last + 1) if 1 <= first <= last <= num_blocks else range(0)


def any_matches(patterns: Iterable[str], param: Param, num_blocks: int) -> bool:
    """Whether one of the patterns means the parameter."""
    return any(matches(pattern, param.name, param.depth, num_blocks) for pattern in patterns)


def place(depth: int, num_blocks: int) -> str:
    """The word for a depth: `embeddings`, `block 3` or `head`."""
    return depth_label(depth, num_blocks)


def chosen(patterns: Sequence[str], run: Run, setting: str) -> Mapping[str, list[Param]]:
    """Pattern → the parameters of `run.params` that it means, each at least one.

    Also runs the regular expressions once in a process with a time limit, so that afterwards none can hang.

    Args:
        run: as `on_build` gets it.
        setting: what holds the patterns, for messages: `freeze(patterns=…)`.
    Raises:
        ValueError: a pattern matches nothing that trains, and what is nearest; or a regular expression takes too long.
    """
    names = [name for name, _ in run.model.named_parameters()]
    expressions = [pattern[len(REGEX) :] for pattern in patterns if pattern.startswith(REGEX)]
    try:
        searched(expressions, list(dict.fromkeys([*names, *(param.name for param in run.params)])), setting)
    except MethodError as error:
        raise ValueError(str(error)) from error
    found: dict[str, list[Param]] = {}
    for pattern in patterns:
        found[pattern] = [param for param in run.params if any_matches((pattern,), param, run.num_blocks)]
        if not found[pattern]:
            raise ValueError(f"{setting}: {_why_nothing(pattern, names, run)}")
    return found


def _why_nothing(pattern: str, names: Sequence[str], run: Run) -> str:
    depths = depths_of(pattern, run.num_blocks)
    here = sorted({param.depth for param in run.params})
    there = ", ".join(place(depth, run.num_blocks) for depth in here)
    if depths is not None:
        if not depths:
            return f"{pattern!r} is past the depth of this model, which has {run.num_blocks} blocks."
        return f"{pattern!r} matches nothing that trains; what trains lies in: {there}. Drop it, or name one of these."
    spelt = ((name, {name, name.replace(".base_layer.", ".")}) for name in names)  # as before PEFT wrapped it
    still = [name for name, ways in spelt if any(matches(pattern, way, -1, run.num_blocks) for way in ways)]
    if still:
        return (
            f"{pattern!r} matches only weights that never train ({len(still)}, e.g. {still[0]!r}): the tuner leaves "
            "the base frozen, and packed into 4 or 8 bits it gets no gradient at all. What trains is, e.g., "
            f"{run.params[0].name!r}."
        )
    words = {*WORDS, *(place(depth, run.num_blocks) for depth in here)}
    pieces = {piece for name in names for piece in name.split(".") if not piece.isdigit()}
    return (
        f"{pattern!r} matches nothing.{nearest(pattern.strip('*.'), sorted({*words, *pieces}))} What trains is called, "
        f"e.g., {run.params[0].name!r}, and lies in: {there}."
    )


def counts(params: Iterable[Param], num_blocks: int) -> str:
    """How much lies where, for logs: `embeddings: 5 tensors, 3,264 parameters; block 1: …`."""
    groups: dict[int, list[int]] = {}
    for param in params:
        size = 1
        for length in param.shape:
            size *= length
        groups.setdefault(param.depth, []).append(size)
    parts = (
        f"{place(depth, num_blocks)}: {len(sizes)} tensor{'s' if len(sizes) > 1 else ''}, {sum(sizes):,} parameters"
        for depth, sizes in sorted(groups.items())
    )
    return "; ".join(parts) or "nothing"
