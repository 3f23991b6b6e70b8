"""`import peft_plus as peft`: PEFT's submodules under our name, as the same module objects."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder

TYPE_CHECKING = False  # what is imported on use, or not at all, is what takes time to import
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

_OURS, _THEIRS = "peft_plus", "peft"


class _Alias:
    """Finds `peft_plus.x.y` as `peft.x.y` where this package has no such module itself.

    A finder and loader by their methods alone: the abstract classes of `importlib.abc` cost 25 ms to import.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(_OURS + "."):
            return None
        parent = sys.modules[fullname.rpartition(".")[0]]
        if parent.__name__.startswith(_OURS) and PathFinder.find_spec(fullname, path):
            return None  # a module of our own
        from importlib.util import find_spec

        theirs = _THEIRS + fullname.removeprefix(_OURS)
        try:
            if find_spec(theirs) is None:
                return None
        except ModuleNotFoundError:  # PEFT has no such parent either
            return None
        return ModuleSpec(fullname, self)  # type: ignore[arg-type]  # a loader by its methods

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(_THEIRS + spec.name.removeprefix(_OURS))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has just written the alias's spec into PEFT's module; give it back its own.
        if module.__spec__ is not None:
            module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """Make `import peft_plus.tuners.lora` give `peft.tuners.lora`.

    Asked first: the path of `peft_plus.tuners` is PEFT's, so Python's own finder would run its modules a second time.
    """
    if not any(isinstance(finder, _Alias) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Alias())  # type: ignore[arg-type]  # a finder by its methods


def peft_names() -> list[str]:
    """What `peft` exports, read from its source without importing it."""
    import ast
    from importlib.util import find_spec
    from pathlib import Path

    spec = find_spec(_THEIRS)
    if spec is None or not spec.origin:
        return []
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return list(ast.literal_eval(node.value))
    return []
