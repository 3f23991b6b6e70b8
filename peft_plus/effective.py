"""The weights that a micro-batch computes with, where plugins put others in the place of those that train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .ask import ask
from .compose import who
from .distributed import is_split
from .errors import MethodError, PluginError
from .plugin import Param, Plugin, Run


class EffectiveWeights:
    """Puts tensors into a model's modules for a micro-batch, from its forward until its backward is done.

    Parametrizations would rename what PEFT saves; here the modules' entries are exchanged, as
    `torch.func.functional_call` does for one call. That has to outlast the call: activation checkpointing computes once
    more in the backward, and must find the same weights.

    Args:
        model: as built, or as Accelerate prepared it in place.
        tensors: name → parameter of all that may train.
        plugins: those with `effective_weight`, in order.
        origins: for messages.
    Raises:
        MethodError: processes share the weights.
    """

    def __init__(
        self,
        model: nn.Module,
        tensors: Mapping[str, nn.Parameter],
        plugins: Sequence[Plugin],
        origins: Mapping[str, str],
    ) -> None:
        self._plugins, self._tensors, self._origins = plugins, tensors, origins
        if plugins and is_split(model):
            raise MethodError(
                f"{who(plugins[0], origins)} computes with other weights than those that train, and FSDP or DeepSpeed "
                "ZeRO-3 keeps them in pieces. Use DDP."
            )
        # A tied weight stands in several modules.
        ids = {id(tensor): name for name, tensor in tensors.items()} if plugins else {}
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}
        for module in model.modules() if plugins else ():
            for entry, tensor in module._parameters.items():
                if id(tensor) in ids:
                    self._places.setdefault(ids[id(tensor)], []).append((module, entry))
        self._replaced: list[str] = []

    def put(self, run: Run) -> None:
        """Ask the plugins, and put what they answer in place; what stood there before is taken out first.

        Raises:
            PluginError: an answer is no tensor that could stand for the weight.
        """
        self.take_back()
        for param in run.params if self._plugins else ():
            weight = self._tensors[param.name]
            value = self._answer(run, param, weight)
            if value is not weight:
                self._set(param.name, value)

    def take_back(self) -> None:
        """The weights that train stand in the modules again."""
        for name in self._replaced:
            for module, entry in self._places[name]:
                module._parameters[entry] = self._tensors[name]
        self._replaced.clear()

    def take_back_with(self, loss: Tensor) -> None:
        """As `take_back`, as soon as the backward of `loss` is done."""
        if self._replaced and loss.requires_grad:
            engine: Any = torch.autograd.Variable._execution_engine
            loss.register_hook(lambda _: engine.queue_callback(self.take_back))

    def _set(self, name: str, value: Tensor) -> None:
        self._replaced.append(name)
        for module, entry in self._places[name]:
            module._parameters[entry] = value  # type: ignore[assignment]

    def _answer(self, run: Run, param: Param, weight: nn.Parameter) -> Tensor:
        value: Tensor = weight
        for plugin in self._plugins:
            answer = ask(plugin, "effective_weight", run, param, value)
            same = isinstance(answer, Tensor) and (answer.shape, answer.dtype, answer.device) == (
                weight.shape,
                weight.dtype,
                weight.device,
            )
            if not same:
                told = (
                    f"{tuple(answer.shape)} {answer.dtype} on {answer.device}" if isinstance(answer, Tensor) else answer
                )
                raise PluginError(
                    f"{who(plugin, self._origins)}: effective_weight returned {told} for {param.name}; expected "
                    f"{tuple(weight.shape)} {weight.dtype} on {weight.device}."
                )
            value = answer
        return value
