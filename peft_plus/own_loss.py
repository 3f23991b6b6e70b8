"""What a user's own loss is divided by, so that it can be told from a micro-batch's mean."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

ITEMS = "num_items_in_batch"
ACCUMULATION = ("gradient_accumulation_steps", "current_gradient_accumulation_steps")
"""By what a loss of a user's own may divide, so that it is right under accumulation."""


def ignores_items(loss_function: Any) -> bool:
    """Whether a user's `compute_loss` provably looks at no count, so that it can only be a micro-batch's mean.

    transformers trusts every such function to have divided by the whole step's count, and a mean then counts once per
    micro-batch. False where the source cannot be read, or where the function hands over to another one.
    """
    function = _source(loss_function)
    if function is None:
        return False
    catch_all = {function.args.kwarg.arg} if function.args.kwarg else set[str]()
    return not _names(_body(function)) & {ITEMS, *ACCUMULATION, "super", *catch_all}


def is_mean(function: Any, outputs: Any, labels: Any, items: Any, loss: Tensor) -> bool:
    """Whether a user's `compute_loss_func` does not change when it is told of twice as many items.

    Args:
        loss: what it returned for `items`.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[loss.device] if loss.is_cuda else []):
        return torch.equal(function(outputs, labels, num_items_in_batch=2 * items), loss)


def divides_by(loss_function: Any, *names: str) -> bool:
    """Whether a user's `compute_loss` divides by one of these, or hands it to a function that may.

    Handing it on to the model, or to the Trainer's own loss, is no sign.
    """
    function = _source(loss_function)
    for node in ast.walk(function) if function is not None else ():
        match node:
            case ast.BinOp(op=ast.Div(), right=part) | ast.AugAssign(op=ast.Div(), value=part):
                parts: list[ast.AST] = [part]
            case ast.Call(func=called) if not _names([called]) & {"model", "super"}:
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


def _names(nodes: Sequence[ast.AST]) -> set[str]:
    """Every variable and attribute named below `nodes`."""
    below = [node for top in nodes for node in ast.walk(top)]
    return {n.id for n in below if isinstance(n, ast.Name)} | {n.attr for n in below if isinstance(n, ast.Attribute)}
