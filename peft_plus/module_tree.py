"""A model's tree of modules, without its weights: copied to try something out, or put back after a failure."""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def skeleton(model: nn.Module, *, values: bool = False) -> Any:
    """The same tree of modules, of the same classes, over tensors of its own.

    What is added, replaced, frozen or hooked there does not touch `model`. A quantised linear layer becomes a plain
    one of its logical size, since packed weights do not exist without memory.

    Args:
        values: whether its tensors look at the memory of `model`'s; else they have none (device meta).
    """
    return _copied(model, {}, values)


def _copied(module: nn.Module, memo: dict[int, Any], values: bool) -> Any:
    if id(module) in memo:
        return memo[id(module)]
    if not values and isinstance(module, nn.Linear) and not module.weight.is_floating_point():
        with torch.device("meta"):
            made = nn.Linear(module.in_features, module.out_features, bias="bias" in dict(module.named_parameters()))
        memo[id(module)] = made
        return made
    made = type(module).__new__(type(module))
    memo[id(module)] = made
    for name, value in vars(module).items():
        if name == "_modules":
            value = {k: None if m is None else _copied(m, memo, values) for k, m in value.items()}
        elif name in ("_parameters", "_buffers"):
            value = {k: None if t is None else _tensor(t, memo, values) for k, t in value.items()}
        elif name == "config":
            value = _config_copy(value, memo)
        elif isinstance(value, (dict, list, set)):
            value = value.copy()  # hooks, flags by adapter
        made.__dict__[name] = value
    return made


def _config_copy(config: Any, memo: dict[int, Any]) -> Any:
    if id(config) not in memo:  # one for all modules that share it
        memo[id(config)] = copy.deepcopy(config)
    return memo[id(config)]


def _tensor(tensor: torch.Tensor, memo: dict[int, Any], values: bool) -> torch.Tensor:
    if values and not tensor.is_floating_point():
        return tensor  # packed: nothing trains or replaces it
    if id(tensor) not in memo:  # tied weights stay tied
        made = tensor.detach() if values else torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        if isinstance(tensor, nn.Parameter):
            made = nn.Parameter(made, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = made
    return memo[id(tensor)]


@contextmanager
def restored_on_error(model: nn.Module) -> Generator[None]:
    """Whatever fails inside leaves the model as it was: its modules, hooks, flags, config, and where weights lie."""
    holders = [*model.modules(), *(c for c in {id(c): c for c in map(_config, model.modules())}.values() if c)]
    states = [(vars(h), dict(vars(h)), [(v, v.copy()) for v in vars(h).values() if _plain(v)]) for h in holders]
    tensors = [(t, t.data, t.requires_grad) for t in model.parameters()]
    try:
        yield
    except BaseException:
        for namespace, before, inner in states:
            namespace.clear()
            namespace.update(before)
            for container, content in inner:
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)
        for tensor, data, trains in tensors:
            tensor.data = data
            if tensor.requires_grad != trains:
                tensor.requires_grad_(trains)
        raise


def _config(module: nn.Module) -> Any:
    config = vars(module).get("config")
    return config if hasattr(config, "__dict__") else None


def _plain(value: Any) -> bool:
    return isinstance(value, (dict, list, set))
