"""PEFT's modules under our name, as the same objects; and ours under PEFT's name, where someone puts us there.

`import peft_plus as peft` needs the first: `peft_plus.tuners.lora` is `peft.tuners.lora`.
`sys.modules["peft"] = peft_plus` needs the second: Python then looks for `peft.tuners` in our folder, and our own
`from peft import …` meets ourselves.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder

TYPE_CHECKING = False  # what is imported on use, or not at all, is what takes time to import
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType
    from typing import Any

_OURS, _THEIRS = "peft_plus", "peft"
_peft: ModuleType | None = None
"""PEFT itself, once it was loaded while we stood in its place."""


class _Alias:
    """Finds `peft_plus.x.y` as `peft.x.y` where this package has no such module itself.

    A finder and loader by their methods alone: the abstract classes of `importlib.abc` cost 25 ms to import.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith((_OURS + ".", _THEIRS + ".")):
            return None
        name = _real_name(fullname)
        if name is None or not _exists(name):
            return None
        return ModuleSpec(fullname, self, loader_state=name)  # type: ignore[arg-type]  # a loader by its methods

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = _with_peft_in_its_place(importlib.import_module, spec.loader_state)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has just written the alias's spec into the module; give it back its own.
        if module.__spec__ is not None:
            module.__spec__ = module.__spec__.loader_state


def _real_name(fullname: str) -> str | None:
    """Under which name the module asked for as `fullname` is to be loaded; None where it is that one."""
    parent_name, _, tail = fullname.rpartition(".")
    parent = sys.modules[parent_name].__name__  # a module under an alias still knows its own name
    if parent == _OURS and not PathFinder.find_spec(f"{parent}.{tail}", sys.modules[_OURS].__path__):
        return f"{_THEIRS}.{tail}"
    return None if parent == parent_name else f"{parent}.{tail}"


def _exists(name: str) -> bool:
    parent, _, _ = name.rpartition(".")
    if parent == _THEIRS:
        # Without importing PEFT: Python does not expect that looking for a module loads it, and loads it again.
        package = find_spec(_THEIRS)
        return package is not None and PathFinder.find_spec(name, package.submodule_search_locations) is not None
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # nor is there such a parent
        return False


def install() -> None:
    """Make `import peft_plus.tuners.lora` give `peft.tuners.lora`.

    Asked first: the path of `peft_plus.tuners` is PEFT's, so Python's own finder would run its modules a second time.
    """
    if not any(isinstance(finder, _Alias) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Alias())  # type: ignore[arg-type]  # a finder by its methods


def replaces_peft() -> bool:
    """Whether someone has put us in PEFT's place: `sys.modules["peft"] = peft_plus`."""
    return getattr(sys.modules.get(_THEIRS), "__name__", None) == _OURS


def peft() -> ModuleType:
    """PEFT itself, imported if need be, also where we stand in its place."""
    global _peft
    if not replaces_peft():
        module = importlib.import_module(_THEIRS)
        if not replaces_peft():  # a `peft.py` may just have put us there
            return module
    if _peft is None:
        _peft = _loaded()
    return _peft


def _loaded() -> ModuleType:
    from importlib.util import module_from_spec

    spec = find_spec(_THEIRS)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError("No module named 'peft'", name=_THEIRS)
    # While it loads, PEFT must find itself under its name.
    ourselves, module = sys.modules[_THEIRS], module_from_spec(spec)
    sys.modules[_THEIRS] = module
    try:
        spec.loader.exec_module(module)
    finally:
        sys.modules[_THEIRS] = ourselves
    for name, loaded in list(sys.modules.items()):
        parent, _, child = name.rpartition(".")
        if parent == _THEIRS:  # loaded before we took its place, and so not set on this copy of the package
            setattr(module, child, loaded)
    return module


def find_spec(name: str) -> ModuleSpec | None:
    """`importlib.util.find_spec`, for which PEFT stands under its name."""
    if name != _THEIRS:
        from importlib.util import find_spec

        return _with_peft_in_its_place(find_spec, name)
    # What only stands in for PEFT, such as a `peft.py` that puts us there, has no tuners; it may hide what has.
    everywhere: list[list[str] | None] = [None, *([entry] for entry in sys.path)]
    for path in everywhere:
        for finder in sys.meta_path:
            spec = finder.find_spec(_THEIRS, path)
            inside = spec and spec.submodule_search_locations
            if inside and PathFinder.find_spec(_THEIRS + ".tuners", inside):
                return spec
    return None


def _with_peft_in_its_place(call: Callable[[str], Any], name: str) -> Any:
    if not replaces_peft() or name.partition(".")[0] != _THEIRS:
        return call(name)
    ourselves, sys.modules[_THEIRS] = sys.modules[_THEIRS], peft()
    try:
        return call(name)
    finally:
        sys.modules[_THEIRS] = ourselves


def peft_modules() -> list[str]:
    """The names of PEFT's submodules, read from its folder."""
    from pkgutil import iter_modules

    spec = find_spec(_THEIRS)
    return [] if spec is None else [module.name for module in iter_modules(spec.submodule_search_locations)]


def peft_names() -> list[str]:
    """What `peft` exports, read from its source without importing it."""
    import ast
    from pathlib import Path

    spec = find_spec(_THEIRS)
    if spec is None or not spec.origin:
        return []
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return list(ast.literal_eval(node.value))
    return []
