"""The weights of a running stage as plugins get them: whole, also where processes share them, and kept under a name."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from .distributed import is_split
from .proof import Engagement


class RunWeights:
    """Stands behind `Run.weight`, `gradient`, `keep` and `restore`.

    Args:
        model: as built, or as FSDP2 split it in place.
        tensors: name → parameter of all that may train in this stage; the ones that the optimizer holds.
    Attributes:
        kept: name → what was kept under it, name of a parameter → a whole copy in memory.
        kept_states: name → the optimizer's state that was kept with it.
        optimizer: that of the stage, once it begins.
        refused: why nothing may be kept or put back now; empty where it may.
        watch: sees what moves, and must not take what is put back for training.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, nn.Parameter]) -> None:
        self.model, self.tensors = model, tensors
        self.kept: dict[str, dict[str, Tensor]] = {}
        self.kept_states: dict[str, dict[str, Any]] = {}
        self.optimizer: Optimizer | None = None
        self.refused = ""
        self.watch: Engagement | None = None

    def whole(self, name: str) -> Tensor:
        """See `Run.weight`."""
        return _whole(self._tensor(name))

    def gradient(self, name: str) -> Tensor | None:
        """See `Run.gradient`."""
        gradient = self._tensor(name).grad
        return None if gradient is None else _whole(gradient)

    def _tensor(self, name: str) -> nn.Parameter:
        return self.tensors[name] if name in self.tensors else self.model.get_parameter(name)

    def keep(self, name: str, *, optimizer: bool = False) -> None:
        """See `Run.keep`."""
        self._check(f"keep({name!r})")
        self.kept_states.pop(name, None)
        if optimizer:
            assert self.optimizer is not None
            if is_split(self.model):
                raise RuntimeError(
                    f"run.keep({name!r}, optimizer=True): FSDP and DeepSpeed keep the optimizer's state in pieces, of "
                    "which no whole copy is made. Use DDP."
                )
            self.kept_states[name] = copy.deepcopy(self.optimizer.state_dict()["state"])
        self.kept[name] = {own: _whole(tensor).to("cpu", copy=True) for own, tensor in self.tensors.items()}

    def restore(self, name: str) -> None:
        """See `Run.restore`."""
        self._check(f"restore({name!r})")
        if name not in self.kept:
            known = ", ".join(map(repr, self.kept)) or "nothing"
            raise ValueError(f"run.restore({name!r}): nothing is kept under that name, but {known}.")
        with nullcontext() if self.watch is None else self.watch.rewriting():
            self.write(self.kept[name])
        if name in self.kept_states:
            assert self.optimizer is not None
            # The groups stay: their rates are the scheduler's.
            groups = self.optimizer.state_dict()["param_groups"]
            state = copy.deepcopy(self.kept_states[name])
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def write(self, kept: Mapping[str, Tensor]) -> None:
        """Put whole values into the weights, in place, on every process."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # an evaluation may have left whole copies, with which it would compute on
        for name, whole in kept.items():
            put(self.tensors[name], whole)

    def _check(self, call: str) -> None:
        if self.refused:
            raise RuntimeError(f"run.{call}: {self.refused}")


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put(tensor: Tensor, whole: Tensor) -> None:
    """Write a value that all processes have into a tensor, of which each may hold only its share."""
    if isinstance(tensor, DTensor):
        whole = whole.to(tensor.device, tensor.dtype)
        tensor.copy_(distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None))
    else:
        tensor.copy_(whole)
