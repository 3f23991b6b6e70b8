"""The weights of a running stage as plugins get them: whole, also where processes share them, and kept under a name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from .proof import Engagement


class RunWeights:
    """Stands behind `Run.weight`, `gradient`, `keep` and `restore`.

    Args:
        model: as built, or as FSDP2 split it in place.
        tensors: name → parameter of all that may train in this stage; the ones that the optimizer holds.
    Attributes:
        kept: name → what was kept under it, name of a parameter → a whole copy in memory.
        refused: why nothing may be kept or put back now; empty where it may.
        watch: sees what moves, and must not take what is put back for training.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, nn.Parameter]) -> None:
        self.model, self.tensors = model, tensors
        self.kept: dict[str, dict[str, Tensor]] = {}
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

    def keep(self, name: str) -> None:
        """See `Run.keep`."""
        self._check(f"keep({name!r})")
        self.kept[name] = {own: _whole(tensor).to("cpu", copy=True) for own, tensor in self.tensors.items()}

    def restore(self, name: str) -> None:
        """See `Run.restore`."""
        self._check(f"restore({name!r})")
        if name not in self.kept:
            known = ", ".join(map(repr, self.kept)) or "nothing"
            raise ValueError(f"run.restore({name!r}): nothing is kept under that name, but {known}.")
        if self.watch is None:
            self._put(self.kept[name])
        else:
            with self.watch.rewriting():
                self._put(self.kept[name])

    def _put(self, kept: Mapping[str, Tensor]) -> None:
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
