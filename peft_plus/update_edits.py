"""What plugins say of an update: whether it is made, of which gradients, and what it may not move."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .ask import ask
from .compose import who
from .errors import PluginError
from .plugin import Param, Plugin, Run
from .run_weights import RunWeights, put


class UpdateEdits:
    """Asks `edit_gradient` and `moves`, and does what they answer.

    Args:
        plugins: those of the stage, in order.
        weights: gradients and weights, whole.
        origins: for messages.
    """

    def __init__(self, plugins: Sequence[Plugin], weights: RunWeights, origins: Mapping[str, str]) -> None:
        self._editors = [plugin for plugin in plugins if "edit_gradient" in plugin.hooks()]
        self._movers = [plugin for plugin in plugins if "moves" in plugin.hooks()]
        self._weights, self._origins = weights, origins
        self._resting: list[tuple[nn.Parameter, Tensor, Tensor]] = []  # parameter, what may move, values before

    def before_update(self, run: Run, trains: Callable[[str], bool]) -> None:
        """Right before the update.

        Raises:
            PluginError: an answer has not the parameter's shape.
        """
        self._resting.clear()
        if not self._editors and not self._movers:
            return
        for param in run.params:
            tensor = self._weights.tensors[param.name]
            if not trains(param.name) or tensor.grad is None:
                continue
            self._edit(run, param, tensor)
            mask = self._mask(run, param)
            if mask is not None:
                self._resting.append((tensor, mask, _local(tensor.detach()).clone()))

    @torch.no_grad()
    def after_update(self) -> None:
        """Right after it: what may not have moved is as it was."""
        for tensor, mask, before in self._resting:
            local = _local(tensor.detach())
            local.copy_(torch.where(_share(mask, tensor), local, before))
        self._resting.clear()

    def _edit(self, run: Run, param: Param, tensor: nn.Parameter) -> None:
        if not self._editors:
            return
        whole = self._weights.gradient(param.name)
        assert whole is not None
        assert tensor.grad is not None
        edited = whole
        for plugin in self._editors:
            answer = ask(plugin, "edit_gradient", run, param, edited)
            self._check(plugin, "edit_gradient", param, answer)
            edited = answer
        if edited is not whole:
            put(tensor.grad, edited)

    def _mask(self, run: Run, param: Param) -> Tensor | None:
        mask: Tensor | None = None
        for plugin in self._movers:
            answer = ask(plugin, "moves", run, param)
            if answer is not None:
                self._check(plugin, "moves", param, answer)
                mask = answer.bool() if mask is None else mask & answer.bool()
        return mask

    def _check(self, plugin: Plugin, hook: str, param: Param, answer: object) -> None:
        if not isinstance(answer, Tensor) or tuple(answer.shape) != param.shape:
            told = tuple(answer.shape) if isinstance(answer, Tensor) else answer
            raise PluginError(
                f"{who(plugin, self._origins)}: {hook} returned {told} for {param.name}; expected a tensor of shape "
                f"{param.shape}."
            )


def accepted(guards: Sequence[Plugin], run: Run, loss: float, norm: float, origins: Mapping[str, str]) -> bool:
    """Whether every plugin lets an update happen. Every process must call it.

    Args:
        guards: those with `accept_update`.
        loss: the task's, of this process.
        norm: of all gradients.
    Raises:
        PluginError: an answer is no bool.
    """
    mean = run.mean(loss)
    answers = [ask(guard, "accept_update", run, mean, norm) for guard in guards]
    for guard, answer in zip(guards, answers, strict=True):
        if not isinstance(answer, bool):
            raise PluginError(
                f"{who(guard, origins)}: accept_update returned {answer!r} at step {run.step}; expected a bool."
            )
    return all(answers)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _share(mask: Tensor, tensor: nn.Parameter) -> Tensor:
    """This process's share of a mask that all processes have."""
    if isinstance(tensor, DTensor):
        whole = mask.to(tensor.device)
        return distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
    return mask.to(tensor.device)
