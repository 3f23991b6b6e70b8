"""Regular expressions of an adapter's config, replaced by what they match before PEFT sees them.

PEFT runs `target_modules` and its like with `re` over the names of the user's modules, and `re` can be made to run for
centuries. Here they run in a process of their own with a time limit; PEFT then gets expressions that spell out the
names which matched. They choose the same modules, and cannot be slow.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

from .adapter_folder import shortened
from .errors import MethodError

SECONDS = 10.0
"""How long all expressions of one folder may take together; honest ones take milliseconds."""

_WHOLE_NAMES = ("target_modules", "exclude_modules", "feedforward_modules")
"""Fields in which a string is an expression for whole names; a list holds plain names or their ends."""

_PLAIN_NAMES = (*_WHOLE_NAMES, "modules_to_save", "layers_pattern", "target_parameters", "trainable_token_indices")
"""Fields whose lists and keys hold plain names."""

_KEYED: dict[tuple[str, str], tuple[str, str]] = {
    ("FOURIERFT", "n_frequency_pattern"): ("match", r".*\.{}$"),
    ("C3A", "block_size_pattern"): ("match", r".*\.{}$"),
    ("OSF", "rank_pattern"): ("search", "{}"),
}
"""How PEFT matches the keys of a mapping from expression to value, where it is not the usual `_ENDS`."""

_ENDS = ("match", r"(.*\.)?({})$")
_NEVER = "(?!)"
_MAX_LENGTH = 100_000

_CHILD = """
import json, re, sys
names, expressions = json.load(sys.stdin)
json.dump([[n for n in names if getattr(re, how)(e, n)] for how, e in expressions], sys.stdout)
"""


def tame(config: Any, base: nn.Module) -> None:
    """Replace each regular expression in `config`, in place, by one that spells out the names that it matches.

    Args:
        config: a PEFT config, as a folder tells it.
        base: the model whose names are matched.
    Raises:
        MethodError: an expression is none, takes too long, or stands where PEFT wants a plain name.
    """
    _check_plain_names(config)
    kind = getattr(config.peft_type, "value", str(config.peft_type))
    wanted: dict[tuple[str, str | None], tuple[str, str]] = {}
    for field, value in vars(config).items():
        if field in _WHOLE_NAMES and isinstance(value, str) and not _is_word(value):
            wanted[field, None] = ("fullmatch", value)
        elif field.endswith("_pattern") and isinstance(value, dict):
            for key in value:
                if not isinstance(key, str) or (kind == "ADALORA" and not _is_plain(key)):
                    raise MethodError(f"{field} has the key {shortened(key)}, which is no name of a module.")
                if not _is_plain(key):
                    how, expression = _KEYED.get((kind, field), _ENDS)
                    wanted[field, key] = (how, expression.format(key))
    if not wanted:
        return
    found = dict(zip(wanted, _matches(list(wanted.values()), _names(base, config)), strict=True))
    for field in {field for field, _ in found}:
        value = getattr(config, field)
        if isinstance(value, str):
            matched = found[field, None]
            if not matched and field == "target_modules":
                raise MethodError(
                    f"target_modules={shortened(value)} matches no module of this {type(base).__name__}. Is it the "
                    "right base?"
                )
            setattr(config, field, "|".join(map(re.escape, matched)) or _NEVER)
        else:
            tamed: dict[str, Any] = {}
            for key, number in value.items():  # the first that matches counts, as in PEFT
                tamed.setdefault(_anchored(found[field, key]) if (field, key) in found else key, number)
            setattr(config, field, tamed)


def _check_plain_names(config: Any) -> None:
    for field in _PLAIN_NAMES:
        value = getattr(config, field, None)
        listed = [value] if field == "layers_pattern" and isinstance(value, str) else value
        for name in listed if isinstance(listed, (list, set, tuple, dict)) else ():
            if isinstance(name, str) and not _is_plain(name):
                raise MethodError(
                    f"{field} holds {shortened(name)}, which is no name of a module. A regular expression may stand in "
                    "target_modules and exclude_modules, as one string, and in the keys of rank_pattern and the like."
                )


def _is_plain(name: str) -> bool:
    """Whether an expression takes its name character by character: nothing is optional or repeated in it."""
    return re.fullmatch(r"\^?(?:[\w:-]|\\?\.)*\$?", name) is not None


def _is_word(text: str) -> bool:
    """Whether a string is a word to PEFT, like `all-linear`, and as an expression would match only itself."""
    return re.fullmatch(r"[\w-]+", text) is not None


def _anchored(names: Sequence[str]) -> str:
    """An expression for exactly these names, whatever PEFT lets come before it."""
    ways: list[str] = []
    for name in names:
        before, dot, last = name.rpartition(".")
        ways.append(f"(?<=^{re.escape(before + dot)}){re.escape(last)}$" if dot else f"^{re.escape(name)}$")
    return f"(?:{'|'.join(ways) or _NEVER})"


def _matches(expressions: list[tuple[str, str]], names: list[str]) -> list[list[str]]:
    """For each (function of `re`, expression) the names that it matches."""
    for _, expression in expressions:
        if len(expression) > _MAX_LENGTH:
            raise MethodError(f"The adapter's config holds a regular expression of {len(expression):,} characters.")
    if not sys.executable or getattr(sys, "frozen", False):
        raise MethodError(
            "The adapter's config holds regular expressions, which are matched in a separate Python process, and this "
            "program has no interpreter to start. Replace them by lists of names in adapter_config.json."
        )
    # Isolated and without site-packages: it starts in milliseconds and can import nothing but the standard library.
    command = [sys.executable, "-I", "-S", "-c", _CHILD]
    told = json.dumps([names, expressions])
    first = shortened(expressions[0][1])
    try:
        done = subprocess.run(command, input=told, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise MethodError(
            f"The regular expressions of the adapter's config, e.g. {first}, take more than {SECONDS:g} seconds on "
            "the names of this model: PEFT would hang. Replace them by lists of names in adapter_config.json."
        ) from None
    if done.returncode != 0:
        said = done.stderr.strip().rpartition("\n")[2]
        raise MethodError(f"The adapter's config holds an invalid regular expression, e.g. {first}: {said}")
    return json.loads(done.stdout)


def _names(base: nn.Module, config: Any) -> list[str]:
    """What PEFT matches expressions against: modules, and for mixtures of experts their parameters, old names too."""
    from peft.tuners.tuners_utils import replicate_layers
    from peft.utils.transformers_weight_conversion import _MOE_TARGET_MODULE_MAPPING

    from .module_tree import skeleton

    if getattr(config, "layer_replication", None):
        base = skeleton(base)
        replicate_layers(base, config.layer_replication)
    modules = [name for name, _ in base.named_modules() if name]
    moved = {(new, old) for renamed in _MOE_TARGET_MODULE_MAPPING.values() for old, new in renamed.items()}
    parameters: list[str] = []
    for name, _ in base.named_parameters():
        inside, _, leaf = name.rpartition(".")
        parameters += [name, *(f"{inside}.{old}" for new, old in moved if new == leaf)]
    return list(dict.fromkeys([*modules, *parameters]))
