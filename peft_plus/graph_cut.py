"""No graph below what trains, also with activation checkpointing.

Reentrant checkpointing gives a block no gradients where none of its inputs requires one. So transformers and PEFT make
the input embeddings' output require one, whatever the kind of checkpointing, and autograd then keeps all frozen blocks
above it in the graph: they are computed anew and passed through backward, for nobody.

During a run those hooks rest, and a block that checkpoints reentrantly looks itself: where no input requires a gradient
it makes the first one require it if something in the block trains, and else runs as it is. Which blocks are frozen
stands nowhere. Autograd finds it out in each pass, also after a block has thawed, in a decoder that reads the encoder's
output, and where a perturbation of the embeddings wants its gradient. Losses, gradients and random draws stay the same,
bit by bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, CheckpointWrapper
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

_HOOKS = frozenset({"make_inputs_require_grads", "make_inputs_require_grad"})
"""What the hook is called in transformers, and in PEFT and TRL."""
_FUNCTION = "_gradient_checkpointing_func"
"""Where transformers keeps what a module checkpoints with."""


def cut_graph(model: nn.Module) -> Callable[[], None]:
    """Let no graph reach below what trains, as far as checkpointing is what keeps it there.

    Does nothing where nothing checkpoints, or something does in a way that is not known to work without the hooks.

    Args:
        model: as it will run; checkpointing is switched on already.
    Returns: a function that puts everything back.
    """
    checkpointing = [module for module in model.modules() if _checkpoints(module)]
    if not checkpointing or not all(map(_is_known, checkpointing)):
        return lambda: None
    resting = [
        (module, key, hook)
        for module in model.modules()
        for key, hook in module._forward_hooks.items()
        if getattr(hook, "__name__", "") in _HOOKS
    ]
    for module, key, _ in resting:
        module._forward_hooks[key] = _rest
    looking = [_Looking(module) for module in checkpointing if _function(module) is not None and _reenters(module)]
    for one in looking:
        setattr(one.module, _FUNCTION, one)

    def restore() -> None:
        for module, key, hook in resting:
            if module._forward_hooks.get(key) is _rest:  # nobody took it away meanwhile
                module._forward_hooks[key] = hook
        for one in looking:
            if _function(one.module) is one:
                setattr(one.module, _FUNCTION, one.checkpoint)

    return restore


def _rest(module: nn.Module, args: Any, output: Any) -> None:
    """Stands in the place of a hook, so that whoever holds its handle can still remove it."""


class _Looking:
    """What a reentrant module checkpoints with: looks first whether an input requires a gradient.

    Args:
        module: in which something may train or not.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.checkpoint = module, _function(module)

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and not any(isinstance(x, Tensor) and x.requires_grad for x in args):
            if not any(parameter.requires_grad for parameter in self.module.parameters()):
                return function(*args)
            first = next((i for i, x in enumerate(args) if isinstance(x, Tensor) and x.is_floating_point()), None)
            if first is not None:
                args = (*args[:first], args[first].detach().requires_grad_(), *args[first + 1 :])
        return self.checkpoint(function, *args, **kwargs)


def _checkpoints(module: nn.Module) -> bool:
    # Not `getattr`, by which a wrapper answers for what it wraps.
    flag = vars(module).get("gradient_checkpointing", getattr(type(module), "gradient_checkpointing", False))
    return bool(flag) or isinstance(module, CheckpointWrapper)


def _function(module: nn.Module) -> Any:
    return vars(module).get(_FUNCTION)


def _reenters(module: nn.Module) -> bool:
    function = _function(module)
    return not isinstance(function, partial) or bool(function.keywords.get("use_reentrant", True))


def _is_known(module: nn.Module) -> bool:
    """Whether it is certain that a module checkpoints with what transformers gave it, or not reentrantly."""
    if isinstance(module, CheckpointWrapper):
        return module.checkpoint_impl is CheckpointImpl.NO_REENTRANT
    if _function(module) is None:
        return False
    return isinstance(module, GradientCheckpointingLayer) or not any(map(_calls_checkpoint, type(module).__mro__))


def _calls_checkpoint(cls: type) -> bool:
    """Whether a class calls `torch.utils.checkpoint.checkpoint` itself, which is reentrant unless told otherwise."""
    if cls in (object, nn.Module) or issubclass(PreTrainedModel, cls):
        return False
    try:
        return "checkpoint(" in inspect.getsource(cls)
    except (OSError, TypeError):  # there is no source to read
        return True
