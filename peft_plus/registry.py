"""Names → classes, from the metadata of installed distributions.

Nothing here imports a plugin until its name is asked for, and listing imports neither torch nor peft: entry points
are read with `importlib.metadata`, PEFT's tuners and all one-line summaries from source text.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path
from typing import Any, Literal

from . import dropin
from .errors import MethodError, PluginError
from .names import nearest
from .plugin import API, Plugin

Kind = Literal["plugin", "tuner", "task", "tool"]

GROUPS: Mapping[Kind, str] = {
    "plugin": "peft_plus.plugins",
    "tuner": "peft_plus.tuners",
    "task": "peft_plus.tasks",
    "tool": "peft_plus.tools",
}
"""What there is by name → its entry-point group. A tool is a function of its own, beside training: `model soups`."""

CORE_TUNERS: Mapping[str, str] = {
    "full": "Every parameter of the base model trains; saves and reloads with plain transformers.",
    "linear_probe": "Only the task's head trains; loads in plain PEFT.",
}
"""Tuners that the core itself provides, beside those of the installed PEFT."""

VARIANTS: Mapping[str, tuple[str, Mapping[str, Any], str]] = {
    "dora": ("lora", {"use_dora": True}, "LoRA with weight decomposition (`lora` with use_dora=True)."),
    "rslora": ("lora", {"use_rslora": True}, "Rank-stabilised LoRA (`lora` with use_rslora=True)."),
}
"""Well-known names that PEFT spells as a flag: name → (tuner, settings, summary)."""


@dataclass(frozen=True)
class Entry:
    """One name that can be used, and where it comes from.

    Attributes:
        name: what the user writes.
        kind: `plugin`, `tuner`, `task` or `tool`.
        distribution: the installed distribution that provides it, with its `version`.
        target: `module:attribute`, or an empty string for what is not an entry point.
        summary: one line, read from the source's docstring without importing it.
    """

    name: str
    kind: Kind
    distribution: str
    version: str
    target: str = ""
    summary: str = ""

    @property
    def origin(self) -> str:
        return f"{self.distribution} {self.version}"


def entries(kind: Kind) -> dict[str, Entry]:
    """Everything of a kind that is installed, by name, sorted. Imports nothing that is listed.

    Raises:
        PluginError: two distributions claim one name.
    """
    found: dict[str, Entry] = {}
    origins: dict[Any, tuple[str, str]] = {}  # each reading of a name parses the metadata of the whole distribution
    for point in entry_points(group=GROUPS[kind]):
        if point.dist not in origins:
            origins[point.dist] = _origin(point)
        entry = Entry(point.name, kind, *origins[point.dist], point.value, _summary(point.value))
        other = found.setdefault(entry.name, entry)
        if (other.distribution, other.target) != (entry.distribution, entry.target):
            raise PluginError(
                f"Two installed distributions provide the {kind} {entry.name!r}: {other.origin} ({other.target}) and "
                f"{entry.origin} ({entry.target}). Uninstall one of them: pip uninstall {entry.distribution}"
            )
    if kind == "tuner":
        core, peft = version("peft-plus"), version("peft")
        for name, summary in CORE_TUNERS.items():
            found.setdefault(name, Entry(name, kind, "peft-plus", core, summary=summary))
        for name, (_, _, summary) in VARIANTS.items():
            found.setdefault(name, Entry(name, kind, "peft-plus", core, summary=summary))
        for name in peft_tuners():
            found.setdefault(name, Entry(name, kind, "peft", peft, summary=_peft_summary(name)))
    return dict(sorted(found.items()))


def find(name: str, kinds: Iterable[Kind]) -> Entry:
    """The entry of that name among `kinds`.

    Raises:
        MethodError: nothing has that name; says what is nearest and, for plugins that this project ships, which
            distribution to install.
    """
    known: dict[str, Entry] = {}
    for kind in kinds:
        known.update(entries(kind))
    if name in known:
        return known[name]
    what = " or ".join(kinds)
    home = FIRST_PARTY.get(name)
    fix = f" It is provided by {home}: pip install {home}" if home else nearest(name, known)
    raise MethodError(f"No installed {what} is called {name!r}.{fix} `peft-plus list` shows what there is.")


def load(entry: Entry) -> Any:
    """Import what an entry points to, and check that it keeps the contract.

    Raises:
        PluginError: it does not import, is not what its group asks for, or was written for another contract.
    """
    if not entry.target:
        raise MethodError(f"{entry.name!r} is built into {entry.distribution}; there is no class to load.")
    try:
        loaded = EntryPoint(entry.name, entry.target, GROUPS[entry.kind]).load()
    except Exception as error:
        raise PluginError(
            f"The {entry.kind} {entry.name!r} of {entry.origin} does not import: {type(error).__name__}: {error}. "
            f"Reinstall or update it: pip install -U {entry.distribution}"
        ) from error
    if entry.kind == "plugin":
        check_plugin_class(loaded, entry)
    elif entry.kind == "tool":
        if not inspect.isfunction(loaded):
            raise PluginError(f"The tool {entry.name!r} of {entry.origin} is {loaded!r}, not a function.")
    elif not (isinstance(loaded, type) and dataclasses.is_dataclass(loaded)):
        expected = {"tuner": "the dataclass of a PEFT config", "task": "a dataclass, a subclass of peft_plus.Task"}
        raise PluginError(
            f"The {entry.kind} {entry.name!r} of {entry.origin} is {loaded!r}, not {expected[entry.kind]}."
        )
    return loaded


def check_plugin_class(cls: Any, entry: Entry | None = None) -> None:
    """Raise PluginError unless `cls` is a plugin of this contract, named as its entry point says."""
    where = entry.origin if entry else f"{getattr(cls, '__module__', '?')}"
    label = entry.name if entry else getattr(cls, "name", cls)
    if not (isinstance(cls, type) and issubclass(cls, Plugin)):
        raise PluginError(f"{label!r} of {where} is {cls!r}, not a subclass of peft_plus.Plugin.")
    if cls.api != API:
        raise PluginError(
            f"The plugin {label!r} of {where} was written for version {cls.api} of the plugin contract; this peft_plus "
            f"speaks version {API}. Update whichever is older."
        )
    if entry and cls.name != entry.name:
        raise PluginError(
            f"The plugin class {cls.__qualname__} of {where} calls itself {cls.name!r}, its entry point {entry.name!r}."
        )
    if not cls.name:
        raise PluginError(f"{cls.__module__}.{cls.__qualname__} has no `name`: set the class variable.")
    if cls.on_freeze not in ("keep", "drop_state"):
        raise PluginError(
            f"The plugin {label!r} of {where} has on_freeze={cls.on_freeze!r}; expected 'keep' or 'drop_state'."
        )
    for flag, hook in ((cls.on_freeze != "keep", "may_train"), (cls.schedule, "lr_scale")):
        if flag and hook not in cls.hooks():
            name = "on_freeze" if hook == "may_train" else "schedule"
            raise PluginError(f"The plugin {label!r} of {where} sets `{name}` but has no {hook}, so it means nothing.")
    for base in cls.__mro__:
        if "__annotations__" in vars(base) and "__dataclass_fields__" not in vars(base):
            raise PluginError(
                f"{base.__module__}.{base.__qualname__} annotates settings but is no dataclass, so they would be "
                "ignored: decorate it with @dataclass(kw_only=True)."
            )


FIRST_PARTY: Mapping[str, str] = {
    "gradual_unfreeze": "peft-plus-freezing",
    "autofreeze": "peft-plus-freezing",
    "chain_thaw": "peft-plus-freezing",
    "freeze": "peft-plus-freezing",
    "freeze_plan": "peft-plus-freezing",
    "discriminative_lr": "peft-plus-freezing",
    "freezeout": "peft-plus-freezing",
    "lisa": "peft-plus-freezing",
    "plasticity_freeze": "peft-plus-freezing",
    "slanted_triangular": "peft-plus-freezing",
    "surgical": "peft-plus-freezing",
    "trunk_cache": "peft-plus-freezing",
    "llrd": "peft-plus-stability",
    "r3f": "peft-plus-stability",
    "smart": "peft-plus-stability",
    "lp_ft": "peft-plus-probing",
    "length_buckets": "peft-plus-incremental",
    "adaptive": "peft-plus-stability",
    "child_tuning": "peft-plus-stability",
    "clip": "peft-plus-stability",
    "early_stop": "peft-plus-stability",
    "eda": "peft-plus-stability",
    "ema": "peft-plus-stability",
    "freelb": "peft-plus-stability",
    "l2_sp": "peft-plus-stability",
    "loss_guard": "peft-plus-stability",
    "low_lr": "peft-plus-stability",
    "lr_patterns": "peft-plus-stability",
    "mixout": "peft-plus-stability",
    "mosbach": "peft-plus-stability",
    "neftune": "peft-plus-stability",
    "noisy_tune": "peft-plus-stability",
    "plateau": "peft-plus-stability",
    "r4f": "peft-plus-stability",
    "r_drop": "peft-plus-stability",
    "reinit_top": "peft-plus-stability",
    "swa": "peft-plus-stability",
    "token_cutoff": "peft-plus-stability",
    "warm_restarts": "peft-plus-stability",
}
"""Plugins of this project that may not be installed, so that an error can name the distribution."""

FIRST_PARTY_TOOLS: Mapping[str, str] = {
    "search": "peft-plus-stability",
    "soup": "peft-plus-stability",
}
"""Its tools, likewise."""


@lru_cache(maxsize=1)
def peft_tuners() -> tuple[str, ...]:
    """Lower-case names of the tuners of the installed PEFT, also those newer than this file. Imports nothing."""
    tree = ast.parse((_package_folder("peft") / "utils" / "peft_types.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == "PeftType":
            names = [t.id for a in node.body if isinstance(a, ast.Assign) for t in a.targets if isinstance(t, ast.Name)]
            return tuple(sorted(name.lower() for name in names))
    raise PluginError("The installed peft has no PeftType enum where every release so far had one; update peft-plus.")


def _origin(point: EntryPoint) -> tuple[str, str]:
    """Name and version of the distribution that declares an entry point."""
    return (point.dist.name, point.dist.version) if point.dist else ("unknown", "?")


@cache
def _summary(target: str) -> str:
    """First line of the docstring of `module:Class`, from the source file; empty where that cannot be read.

    A distribution that is broken must not stop the work of those who did not name it; loading it tells what is wrong.
    """
    module, _, attribute = target.partition(":")
    package, *rest = module.split(".")
    try:
        path = _package_folder(package).joinpath(*rest)
        source = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError, PluginError):
        return ""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == attribute:
            return _first_line(ast.get_docstring(node))
    return ""


@cache
def _peft_summary(name: str) -> str:
    """First line of the docstring of a PEFT tuner's model or prompt encoder; empty where PEFT wrote none."""
    folder, stem = _package_folder("peft") / "tuners" / name, name.replace("_", "")
    source = folder / "model.py"
    if not source.is_file():
        return ""
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name.lower().endswith((f"{stem}model", "encoder", "embedding")):
            return _first_line(ast.get_docstring(node))
    return ""


def _package_folder(package: str) -> Path:
    """Where a top-level package lies, without importing it."""
    spec = dropin.find_spec(package)
    if spec is None or not spec.origin:
        raise PluginError(f"The package {package!r} is not installed.")
    return Path(spec.origin).parent


def _first_line(docstring: str | None) -> str:
    """The first sentence of the first paragraph, on one line."""
    paragraph = " ".join((docstring or "").strip().split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s+(?=[A-Z(])", paragraph, maxsplit=1)[0]
