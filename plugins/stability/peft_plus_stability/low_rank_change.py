"""The low-rank changes ΔW = s · B·A that LoRA puts into a model, by the names of their factors, and their size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

_EXACT = ("Dora", "_Dora", "ALora", "MiCA")
"""What the names of PEFT's variants begin with in which the product of A and B is the change, or what DoRA rescales."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One adapter of one layer: as many products B·A as the layer has parts, one in most.

    Attributes:
        a, b: names of the parameters A and B.
        diagonal: name of the singular values between them (AdaLoRA); empty where there are none.
        scaling: s.
        experts: how many matrices a layer of experts has, whose factors PEFT keeps in one pair.
        groups: of a convolution, whose B is divided by them.
    """

    a: str
    b: str
    diagonal: str = ""
    scaling: float | Tensor = 1.0
    experts: int = 1
    groups: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        """Of all its parameters."""
        return (self.a, self.b, self.diagonal) if self.diagonal else (self.a, self.b)

    def factors(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """A and B, at least in fp32, as stacks of matrices: (parts, r, in) and (parts, out, r).

        Args:
            tensors: name → parameter.
        """
        a, b = wide(tensors[self.a]).flatten(1), wide(tensors[self.b]).flatten(1)
        if self.diagonal:
            a = a * wide(tensors[self.diagonal])
        parts = self.experts * self.groups
        a = a.reshape(parts, -1, a.shape[1])
        if self.experts > 1:  # PEFT lets the expert run fastest in B and slowest in A
            return a, b.reshape(len(b), -1, self.experts).permute(2, 0, 1)
        return a, b.reshape(self.groups, -1, b.shape[1])


def low_rank_changes(model: nn.Module) -> list[Change]:
    """Every active LoRA and AdaLoRA adapter whose change is a product of its factors."""
    found: list[Change] = []
    for prefix, module in model.named_modules():
        if isinstance(module, LoraLayer):
            found += [change for name in module.active_adapters if (change := _change(prefix, module, name))]
    return found


def _change(prefix: str, module: Any, name: str) -> Change | None:
    variant = module.lora_variant.get(name)
    if variant is not None and not type(variant).__name__.startswith(_EXACT):
        return None
    scaling = module.scaling.get(name, 1.0)
    if name in module.lora_embedding_A:
        a, b = (f"{prefix}.lora_embedding_{factor}.{name}" for factor in "AB")
        return Change(a=a, b=b, scaling=scaling)
    if name not in module.lora_A:
        return None
    if name in getattr(module, "lora_E", ()):
        a, b, diagonal = (f"{prefix}.lora_{factor}.{name}" for factor in "ABE")
        return Change(a=a, b=b, diagonal=diagonal, scaling=scaling / (module.ranknum[name].detach().squeeze() + 1e-5))
    a, b = (f"{prefix}.lora_{factor}.{name}.weight" for factor in "AB")
    groups = getattr(module.lora_B[name], "groups", 1)
    return Change(a=a, b=b, scaling=scaling, experts=getattr(module, "num_experts", 1), groups=groups)


def squared_norm(a: Tensor, b: Tensor, scaling: float | Tensor) -> Tensor:
    """‖s·BA‖² = s² · tr((BᵀB)(AAᵀ)), summed over the parts, shape (). BA, which is as large as W, is never formed.

    Args:
        a: A, (parts, r, in).
        b: B, (parts, out, r).
        scaling: s.
    """
    return scaling**2 * ((b.mT @ b) * (a @ a.mT)).sum()


def since(a: Tensor, b: Tensor, start_a: Tensor, start_b: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of BA − B₀A₀ = (B − B₀) A + B₀ (A − A₀), of twice the rank: no two large products cancel.

    Args:
        a, start_a: A and A₀, (parts, r, in).
        b, start_b: B and B₀, (parts, out, r).
    Returns: (parts, 2 r, in) and (parts, out, 2 r).
    """
    return torch.cat([a, a - start_a], 1), torch.cat([b - start_b, start_b], 2)


def wide(tensor: Tensor) -> Tensor:
    """The tensor itself, or in fp32 what is narrower."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
