"""What a user's own loss is divided by, so that it can be told from a micro-batch's mean."""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from collections.abc import Sequence
from typing import Any

import torch

ITEMS = "num_items_in_batch"
ACCUMULATION = ("gradient_accumulation_steps", "current_gradient_accumulation_steps")
"""By what a loss of a user's own may divide, so that it is right under accumulation."""


def chain(methods: Sequence[Any]) -> list[Any]:
    """Of the `compute_loss` methods of a class and its bases, in the order of resolution: those that run.

    Each hands over to the next by `super`; one that does not is the last.
    """
    running: list[Any] = []
    for method in methods:
        running.append(method)
        if not hands_over(method):
            break
    return running


def hands_over(method: Any) -> bool:
    """Whether a user's `compute_loss` calls that of a base class. False where its source cannot be read."""
    function = _source(method)
    return function is not None and "super" in _names(_body(function))


def is_readable(method: Any) -> bool:
    """Whether its source can be read."""
    return _source(method) is not None


def ignores_items(method: Any) -> bool:
    """Whether a user's `compute_loss` provably looks at no count itself, so that what it computes is a mean.

    transformers trusts every such function to have divided by the whole step's count, and a mean then counts once per
    micro-batch. False where the source cannot be read.
    """
    function = _source(method)
    if function is None:
        return False
    catch_all = {function.args.kwarg.arg} if function.args.kwarg else set[str]()
    return not _names(_body(function), into_super=False) & {ITEMS, *ACCUMULATION, *catch_all}


def is_mean(function: Any, outputs: Any, labels: Any, items: Any, device: torch.device) -> bool:
    """Whether a user's `compute_loss_func` does not change when it is told of twice as many items.

    A mean stays what it is, up to what its kernels round differently from call to call; a sum over the items is halved.

    Args:
        device: of the loss.
    """
    values: list[float] = []
    for number in (items, 2 * items):  # both with the same random numbers
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            values.append(float(function(outputs, labels, num_items_in_batch=number)))
    return math.isclose(*values, rel_tol=1e-2)


def divides_by(method: Any, *names: str, handed_on: bool = True) -> bool:
    """Whether a user's `compute_loss` divides by one of these, or hands it to a function that may.

    Handing it on to the model, or to the Trainer's own loss, is no sign.

    Args:
        handed_on: whether handing it to another function counts.
    """
    function = _source(method)
    for node in ast.walk(function) if function is not None else ():
        match node:
            case ast.BinOp(op=ast.Div(), right=part) | ast.AugAssign(op=ast.Div(), value=part):
                parts: list[ast.AST] = [part]
            case ast.Call(func=called) if handed_on and not _names([called]) & {"model", "super"}:
                parts = [*node.args, *(keyword.value for keyword in node.keywords)]
            case _:
                continue
        if _names(parts).intersection(names):
            return True
    return False


def _source(function: Any) -> ast.FunctionDef | ast.Lambda | None:
    """The syntax of a function, or None where its source cannot be read."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):
        return None
    return next((n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.Lambda)), None)


def _body(function: ast.FunctionDef | ast.Lambda) -> list[ast.AST]:
    return list(function.body) if isinstance(function.body, list) else [function.body]


def _names(nodes: Sequence[ast.AST], *, into_super: bool = True) -> set[str]:
    """Every variable and attribute named below `nodes`.

    Args:
        into_super: whether also in calls such as `super().compute_loss(…)`.
    """
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Call) and not into_super and "super" in _names([node.func]):
            continue
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        found |= _names(list(ast.iter_child_nodes(node)), into_super=into_super)
    return found
