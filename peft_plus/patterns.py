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
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .adapter_folder import shortened
from .errors import MethodError
from .module_tree import skeleton
from .rehearsal import Bounded, explained

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

_COMPILED = ("modules_to_save", "layers_pattern")
"""Fields whose names PEFT makes into expressions, as it does with the keys of a mapping."""

_MAX_COMPILED = 500
"""`re` keeps 512 compiled expressions. PEFT tries all of them on every module, so with more, each is compiled anew for
each module: a minute where it was a second."""

_LONG_MAPPING = 100
"""Mappings with more keys are given to PEFT by value: one expression for all names that have it."""

_CHILD = """
import json, re, sys
names, groups = json.load(sys.stdin)
found = []
for first_only, expressions in groups:
    left, matched = names, []
    for how, expression in expressions:
        match = getattr(re.compile(expression), how)
        matched.append([n for n in left if match(n)])
        if first_only and matched[-1]:
            taken = set(matched[-1])
            left = [n for n in left if n not in taken]
    found.append(matched)
json.dump(found, sys.stdout)
"""


def tame(config: Any, base: nn.Module) -> None:
    """Replace each regular expression in `config`, in place, by one that spells out the names that it matches.

    Args:
        config: a PEFT config, as a folder tells it.
        base: the model whose names are matched.
    Raises:
        MethodError: an expression is none, takes too long, or stands where PEFT wants a plain name; or there are more
            names than this base could have a use for.
    """
    names = _names(base, config)
    _check_number(config, names)
    _check_plain_names(config, max(map(len, names), default=0))
    kind = getattr(config.peft_type, "value", str(config.peft_type))
    wanted: dict[str, dict[str, tuple[str, str]]] = {}  # field → what stands there → how it is matched
    for field, value in vars(config).items():
        if field in _WHOLE_NAMES and isinstance(value, str) and not _is_word(value):
            wanted[field] = {value: ("fullmatch", value)}
        elif field.endswith("_pattern") and isinstance(value, dict):
            exact = kind == "ADALORA" and field == "rank_pattern"  # looked up, not matched
            for key in value:
                if not isinstance(key, str) or (kind == "ADALORA" and not _is_plain(key)):
                    raise MethodError(f"{field} has the key {shortened(key)}, which is no name of a module.")
                if not _is_plain(key) or (len(value) > _LONG_MAPPING and not exact):
                    how, expression = _KEYED.get((kind, field), _ENDS)
                    wanted.setdefault(field, {})[key] = (how, expression.format(key))
    groups = [(len(getattr(config, field)) > _LONG_MAPPING, list(group.values())) for field, group in wanted.items()]
    for (field, group), lists in zip(wanted.items(), _matches(groups, names), strict=True):
        value, matched = getattr(config, field), dict(zip(group, lists, strict=True))
        if isinstance(value, str):
            if not matched[value] and field == "target_modules":
                raise MethodError(
                    f"target_modules={shortened(value)} matches no module of this {type(base).__name__}. Is it the "
                    "right base?"
                )
            setattr(config, field, "|".join(map(re.escape, matched[value])) or _NEVER)
        elif len(value) > _LONG_MAPPING:
            setattr(config, field, _by_value(value, matched))
        else:
            tamed: dict[str, Any] = {}
            for key, number in value.items():  # the first that matches counts, as in PEFT
                tamed.setdefault(_anchored(matched[key]) if key in matched else key, number)
            setattr(config, field, tamed)
    _check_compiled(config, kind)


def _check_number(config: Any, names: Sequence[str]) -> None:
    """PEFT tries every name of a field on every module: refuse a field that holds more names than the base."""
    for field, value in vars(config).items():
        count = max(_count_words(value), len(_listed(config, field)) if field in _PLAIN_NAMES else 0)
        if field == "layers_to_transform" and isinstance(value, list):
            count = len(value)
        if count > len(names):
            raise MethodError(
                f"{field} in the adapter's config holds {count:,} entries, more than the {len(names):,} modules and "
                "parameters of this base: PEFT would try each on every module. Is it the right base? Else delete "
                "those that it does not have from adapter_config.json."
            )


def _count_words(value: Any) -> int:
    count, rest = 0, [value] if isinstance(value, (list, set, tuple, dict)) else []
    while rest:  # no recursion: a folder chooses the depth
        inner = rest.pop()
        if isinstance(inner, dict):
            rest += [*inner, *inner.values()]
        elif isinstance(inner, (list, set, tuple)):
            rest += inner
        else:
            count += isinstance(inner, str)
    return count


def _check_plain_names(config: Any, longest: int) -> None:
    """Args: longest: characters of the longest name in the base."""
    for field in _PLAIN_NAMES:
        for name in _listed(config, field):
            _check_length(name, field, longest)
            if not _is_plain(name):
                raise MethodError(
                    f"{field} holds {shortened(name)}, which is no name of a module. A regular expression may stand in "
                    "target_modules and exclude_modules, as one string, and in the keys of rank_pattern and the like."
                )
    for field, value in vars(config).items():
        if isinstance(value, str) and field in _WHOLE_NAMES:
            words = [value]
        else:
            words = value if isinstance(value, dict) and field.endswith("_pattern") else ()
        for word in words:
            if isinstance(word, str) and _is_plain(word[:_MAX_LENGTH]):  # else an expression, which may be longer
                _check_length(word, field, longest)


def _check_length(name: str, field: str, longest: int) -> None:
    """Compiling a name takes PEFT as long as the name is."""
    if len(name) > 2 * longest + 100:  # its dots may be escaped, and PEFT's own prefix may stand before it
        raise MethodError(
            f"{field} holds a name of {len(name):,} characters, {shortened(name, 40)}; the longest of this base has "
            f"{longest}."
        )


def _listed(config: Any, field: str) -> list[str]:
    """The names in a field, as PEFT goes through them: the letters of a string where it expects a list."""
    value = getattr(config, field, None)
    if isinstance(value, str):
        if field in _WHOLE_NAMES:
            return []
        value = [value] if field == "layers_pattern" else list(value)
    return [name for name in value if isinstance(name, str)] if isinstance(value, (list, set, tuple, dict)) else []


def _check_compiled(config: Any, kind: str) -> None:
    """Refuse more expressions than `re` keeps."""
    counts = {field: len(_listed(config, field)) for field in _COMPILED}
    for field, value in vars(config).items():
        if field.endswith("_pattern") and isinstance(value, dict) and (kind, field) != ("ADALORA", "rank_pattern"):
            counts[field] = len(value)
    if sum(counts.values()) > _MAX_COMPILED:
        told = ", ".join(f"{count} in {field}" for field, count in counts.items() if count)
        raise MethodError(
            f"The adapter's config holds more names and values than PEFT can try on every module ({told}; "
            f"{_MAX_COMPILED} together are possible). Name modules by what their names end in, e.g. 'norm'."
        )


def _by_value(mapping: Mapping[str, Any], matched: Mapping[str, list[str]]) -> dict[str, Any]:
    """The same value for each name, in as few expressions as there are values."""
    groups: dict[str, tuple[Any, list[str]]] = {}
    for key, number in mapping.items():
        if matched[key]:
            groups.setdefault(repr(number), (number, []))[1].extend(matched[key])
    return {_anchored(names): number for number, names in groups.values()}


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


def searched(expressions: Sequence[str], names: Sequence[str], whose: str) -> list[list[str]]:
    """For each regular expression of a plugin's settings, the names that it is found in, within the same time limit.

    Args:
        whose: where the expressions stand, for messages: `freeze(patterns=…)`.
    Raises:
        MethodError: an expression is none, or takes too long.
    """
    group = [("search", expression) for expression in expressions]
    return _matches([(False, group)], list(names), whose, "Write simpler ones, or names with `*`.")[0] if group else []


def _matches(
    groups: list[tuple[bool, list[tuple[str, str]]]],
    names: list[str],
    whose: str = "the adapter's config",
    instead: str = "Replace them by lists of names in adapter_config.json.",
) -> list[list[list[str]]]:
    """For each group, for each (function of `re`, expression) in it, the names that it matches.

    Args:
        groups: with each, whether a name goes to the first expression that matches it, and to no other.
        whose, instead: for messages: where the expressions stand, and what to write there.
    """
    expressions = [expression for _, group in groups for _, expression in group]
    if not expressions:
        return []
    start = whose[0].upper() + whose[1:] if whose.startswith("the ") else whose
    for expression in expressions:
        if len(expression) > _MAX_LENGTH:
            raise MethodError(f"{start} holds a regular expression of {len(expression):,} characters.")
    if not sys.executable or getattr(sys, "frozen", False):
        raise MethodError(
            f"{start} holds regular expressions, which are matched in a separate Python process, and this program has "
            f"no interpreter to start. {instead}"
        )
    # Isolated and without site-packages: it starts in milliseconds and can import nothing but the standard library.
    command = [sys.executable, "-I", "-S", "-c", _CHILD]
    told = json.dumps([names, groups])
    first = shortened(expressions[0])
    try:
        done = subprocess.run(command, input=told, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise MethodError(
            f"The regular expressions of {whose}, e.g. {first}, take more than {SECONDS:g} seconds on the names of "
            f"this model: it would hang. {instead}"
        ) from None
    if done.returncode != 0:
        said = done.stderr.strip().rpartition("\n")[2]
        raise MethodError(f"{start} holds an invalid regular expression, e.g. {first}: {said}")
    return json.loads(done.stdout)


def _names(base: nn.Module, config: Any) -> list[str]:
    """What PEFT matches expressions against: modules, and for mixtures of experts their parameters, old names too."""
    from peft.tuners.tuners_utils import replicate_layers
    from peft.utils.transformers_weight_conversion import _MOE_TARGET_MODULE_MAPPING

    if getattr(config, "layer_replication", None):
        copied = skeleton(base)
        with explained(f"PEFT cannot replicate the layers of this {type(base).__name__} as asked"), Bounded(base):
            replicate_layers(copied, config.layer_replication)
        base = copied
    modules = [name for name, _ in base.named_modules() if name]
    moved = {(new, old) for renamed in _MOE_TARGET_MODULE_MAPPING.values() for old, new in renamed.items()}
    parameters: list[str] = []
    for name, _ in base.named_parameters():
        inside, _, leaf = name.rpartition(".")
        parameters += [name, *(f"{inside}.{old}" for new, old in moved if new == leaf)]
    return list(dict.fromkeys([*modules, *parameters]))
