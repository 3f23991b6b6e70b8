"""In which order a module runs its children, read from the source of its `forward`.

Registration order often differs from it: OPT registers its final norm before the blocks, BART its embedding norm after
them. Where there is no source to read, registration order decides. Nothing runs.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

from torch import nn


class Use(NamedTuple):
    """Where a `forward` first names an attribute: as the how-manieth, inside which loops, as what is looped over."""

    order: int
    loops: tuple[int, ...] = ()
    iterated: bool = False


class Child(NamedTuple):
    """A child module or own parameter, and where it is used."""

    name: str
    place: nn.Module | nn.Parameter
    use: Use


def has_parameters(module: nn.Module) -> bool:
    """Whether it, or anything in it, has a parameter."""
    return next(module.parameters(), None) is not None


def in_run_order(module: nn.Module) -> list[Child]:
    """The children with parameters and the own parameters of `module`, sorted by where its `forward` names them first.

    One that `forward` does not name stays behind the one registered before it.
    """
    uses = uses_of(type(module))
    children: list[Child] = []
    before = Use(-1)
    for name, place in chain(module.named_parameters(recurse=False), module.named_children()):
        if isinstance(place, nn.Parameter) or has_parameters(place):
            before = uses.get(name, Use(before.order))
            children.append(Child(name, place, before))
    return sorted(children, key=lambda child: child.use.order)


@lru_cache(maxsize=512)
def uses_of(cls: type[nn.Module]) -> Mapping[str, Use]:
    """Attribute → its first use in `cls.forward`, with the methods of the same file that it calls read in place."""
    reader = _Reader(cls)
    reader.read("forward")
    return reader.uses


class _Reader(ast.NodeVisitor):
    """Reads `self.x` in the order of evaluation: in `self.head(self.norm(x))` the norm comes first."""

    def __init__(self, cls: type[nn.Module]) -> None:
        self.cls = cls
        self.uses: dict[str, Use] = {}
        self.loops: tuple[int, ...] = ()
        self.num_loops = 0
        self.in_head = False
        self.reading: set[str] = set()

    def read(self, name: str) -> None:
        function = inspect.unwrap(getattr(self.cls, name, None))  # type: ignore[arg-type]
        if not inspect.isfunction(function) or name in self.reading:
            return
        if function.__module__ != inspect.unwrap(self.cls.forward).__module__:
            return
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, SyntaxError):  # no source: registration order decides
            return
        self.reading.add(name)
        for node in tree.body:
            for statement in getattr(node, "body", ()):
                self.visit(statement)

    # NodeVisitor prescribes these names.
    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.visit(node.value)
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            self.uses.setdefault(node.attr, Use(len(self.uses), self.loops, self.in_head))
            self.read(node.attr)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in ("len", "hasattr"):
            return  # asks about the module, does not run it
        for child in (*node.args, *node.keywords, node.func):
            self.visit(child)

    def visit_Compare(self, node: ast.Compare) -> None:
        if not isinstance(node.ops[0], ast.Is | ast.IsNot):
            self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        self._loop([node.iter], node.body)

    def visit_While(self, node: ast.While) -> None:
        self._loop([], node.body)

    def _loop(self, head: Sequence[ast.AST], body: Sequence[ast.AST]) -> None:
        outer, self.num_loops = self.loops, self.num_loops + 1
        self.loops = (*outer, self.num_loops)
        self.in_head = True
        for node in head:
            self.visit(node)
        self.in_head = False
        for node in body:
            self.visit(node)
        self.loops = outer
