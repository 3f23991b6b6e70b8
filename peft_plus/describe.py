"""What one name means, for `peft-plus info`: read from its class, its docstring and its card.

Naming a thing is asking for it, so here its class is imported; listing (`registry.entries`) imports nothing.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from . import registry
from .cards import card_of
from .errors import MethodError
from .plugin import NEEDS, Plugin
from .registry import CORE_TUNERS, Entry
from .settings import _annotation


@dataclass(frozen=True)
class Setting:
    """One setting of a plugin, tuner or task.

    Attributes:
        name: as in `method={"…": {name: value}}`.
        type: as the class declares it, with `|` for alternatives.
        default: what it is when it is not given; None too where it is `required`.
        required: whether there is no default.
        meaning: unit, range and effect, from the docstring or PEFT's own help; empty where neither says.
    """

    name: str
    type: str
    default: Any
    required: bool
    meaning: str


@dataclass(frozen=True)
class Description:
    """Everything that `peft-plus info` shows of one name.

    Attributes:
        target: `module:Class`; empty for what the core builds in.
        paragraphs: the description, the first one in a sentence or two.
        hooks, needs, conflicts, after, source, verdict: of a plugin. `needs` is word → meaning.
        verdict: the card's section "Measured verdict"; empty when there is no card.
        card: where the card is.
    """

    name: str
    kind: str
    distribution: str
    version: str
    target: str
    paragraphs: tuple[str, ...]
    settings: tuple[Setting, ...]
    hooks: tuple[str, ...] = ()
    needs: Mapping[str, str] = field(default_factory=dict)
    conflicts: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    source: str = ""
    verdict: str = ""
    card: str = ""


def describe(name: str) -> Description:
    """What a name means.

    Raises:
        MethodError: nothing installed is called so; names the nearest match.
        PluginError: it does not import or breaks the contract.
    """
    entry = registry.find(name, ("task", "tuner", "plugin", "tool"))
    if entry.kind == "tuner":
        return _tuner(entry)
    if entry.kind == "tool":
        return _tool(entry)
    cls = registry.load(entry)
    common = _described(entry, entry.target, paragraphs_of(cls), settings_of(cls))
    return _plugin(entry, common, cls) if entry.kind == "plugin" else common


def _described(entry: Entry, target: str, paragraphs: tuple[str, ...], settings: tuple[Setting, ...]) -> Description:
    return Description(entry.name, entry.kind, entry.distribution, entry.version, target, paragraphs, settings)


def _plugin(entry: Entry, common: Description, cls: type[Plugin]) -> Description:
    card = card_of(entry)
    return dataclasses.replace(
        common,
        hooks=cls.hooks(),
        needs={word: NEEDS.get(word, "") for word in cls.needs},
        conflicts=cls.conflicts,
        after=cls.after,
        source=cls.source,
        verdict=" ".join(card.texts.get("Measured verdict", "").split()),
        card=card.place,
    )


def _tool(entry: Entry) -> Description:
    """A function with its parameters."""
    function, card = registry.load(entry), card_of(entry)
    meanings = items(sections(function.__doc__ or "").get("Args", ""))
    settings = tuple(
        Setting(
            one.name,
            type_text(one.annotation),
            None if one.default is one.empty else one.default,
            one.default is one.empty,
            meanings.get(one.name, ""),
        )
        for one in inspect.signature(function).parameters.values()
    )
    return dataclasses.replace(
        _described(entry, entry.target, paragraphs_of(function), settings),
        source=" ".join(card.texts.get("Source", "").split()),
        verdict=" ".join(card.texts.get("Measured verdict", "").split()),
        card=card.place,
    )


def _tuner(entry: Entry) -> Description:
    """A PEFT tuner with the defaults that it has when it is named in `get_model`."""
    if entry.name in CORE_TUNERS and not entry.target:
        return _described(entry, "", (entry.summary,), ())
    from peft import PeftConfig

    cls, made = _config(entry)
    shared = {f.name for f in dataclasses.fields(PeftConfig)}
    settings = tuple(
        dataclasses.replace(s, default=getattr(made, s.name), required=False) if made is not None else s
        for s in settings_of(cls)
        if s.name not in shared
    )
    # A config's docstring speaks of the config; the summary speaks of the tuner.
    paragraphs = (entry.summary,) if entry.summary else paragraphs_of(cls)
    return _described(entry, f"{cls.__module__}:{cls.__qualname__}", paragraphs, settings)


def _config(entry: Entry) -> tuple[type[Any], Any]:
    """The config class of a tuner, and a config as its name alone would make it; None where it needs settings."""
    from .compose import resolve

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT advises on settings that nobody has chosen yet
        try:
            made = resolve(entry.name).tuner
        except MethodError:
            made = None
    if made is not None and made.config is not None:
        return type(made.config), made.config
    if entry.target:
        return registry.load(entry), None
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[entry.name.upper()]], None


def settings_of(cls: type[Any]) -> tuple[Setting, ...]:
    """The settings of a dataclass, explained by its docstring, its bases' docstrings, or PEFT's `help`."""
    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        for section in ("Attributes", "Args"):
            meanings.update(items(sections(vars(base).get("__doc__") or "").get(section, "")))
    return tuple(_setting(cls, f, meanings.get(f.name, "")) for f in dataclasses.fields(cls) if f.init)


def _setting(cls: type[Any], one: dataclasses.Field[Any], meaning: str) -> Setting:
    default = one.default
    if one.default_factory is not dataclasses.MISSING:
        default = one.default_factory()
    required = default is dataclasses.MISSING
    text = one.metadata.get("help") or meaning
    if not isinstance(text, str):  # a stray comma has made a tuple of one of PEFT's
        text = " ".join(text)
    return Setting(
        one.name,
        type_text(_annotation(cls, one.name) or one.type),
        None if required else default,
        required,
        " ".join(text.split()),
    )


def type_text(annotation: Any) -> str:
    """An annotation as people read it: `Optional[Literal["a", "b"]]` → `'a' | 'b' | None`."""
    plain = isinstance(annotation, type) and "[" not in repr(annotation)
    text = annotation if isinstance(annotation, str) else annotation.__name__ if plain else str(annotation)
    try:
        return _spelled(ast.parse(text, mode="eval").body)
    except SyntaxError:
        return text


def _spelled(node: ast.expr) -> str:
    match node:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return f"{_spelled(left)} | {_spelled(right)}"
        case ast.Subscript(value=ast.Name(id=name) | ast.Attribute(attr=name), slice=inner):
            parts = [_spelled(part) for part in (inner.elts if isinstance(inner, ast.Tuple) else [inner])]
            if name in ("Union", "Literal", "Optional"):
                return " | ".join(dict.fromkeys([*parts, "None"] if name == "Optional" else parts))
            return f"{name}[{', '.join(parts)}]"
        case ast.Name(id="NoneType"):
            return "None"
        case ast.Attribute(attr=name):
            return name
        case _:
            return ast.unparse(node)


_HEADER = re.compile(r"(Args|Attributes|Class variables|Returns|Raises|Yields|Examples?|Notes?):(.*)")
_CODE = re.compile(r"^(```.*?^```)$", re.DOTALL | re.MULTILINE)
_ITEM = re.compile(r"(\w+(?:, \w+)*)\s*(?:\(.*?\))?\s*:(.*)", re.DOTALL)


def sections(docstring: str) -> dict[str, str]:
    """A Google-style docstring by header; what stands before the first header is under an empty one."""
    found: dict[str, list[str]] = {"": []}
    current = ""
    for line in inspect.cleandoc(docstring).splitlines():
        header = _HEADER.fullmatch(line)
        if header:
            current = header[1]
            found[current] = [header[2].strip()]
        else:
            found[current].append(line)
    return {header: "\n".join(lines).strip("\n") for header, lines in found.items()}


def items(section: str) -> dict[str, str]:
    """`name: text` items of an Args section, continuation lines joined; `a, b: text` gives both."""
    found: dict[str, str] = {}
    for item in re.split(r"\n(?=\S)", inspect.cleandoc(section)):
        match = _ITEM.fullmatch(item)
        if match:
            found.update(dict.fromkeys(match[1].split(", "), " ".join(match[2].split())))
    return found


def paragraphs_of(cls: Any) -> tuple[str, ...]:
    """A class's or function's own description, each paragraph on one line; code stays as it is."""
    own = vars(cls).get("__doc__") if isinstance(cls, type) else cls.__doc__  # a class inherits what it does not have
    body = sections(own or "")[""]
    if body.startswith(f"{cls.__name__}("):  # what `dataclass` writes where there is no docstring
        return ()
    found: list[str] = []
    for part in _CODE.split(body):
        found += [part] if part.startswith("```") else [" ".join(p.split()) for p in part.split("\n\n") if p.strip()]
    return tuple(found)
