"""L2-SP: a pull toward where training started."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from peft_plus import LossTerm, Plugin, Run


@dataclass(kw_only=True)
class L2SP(Plugin):
    """Pull what was pretrained back toward its start, and a new head toward 0.

    loss = task loss + alpha/2 · Σ‖w − w₀‖² + beta/2 · Σ‖w_head‖² (Li et al. 2018, arXiv:1802.01483, eq. 3). A low-rank
    adapter starts from ΔW = 0, and its change is penalised as a whole: ‖ΔW‖² = s² · tr((BᵀB)(AAᵀ)), s being its
    scaling, without forming ΔW. Other adapters are pulled to their own start. Only what trains in the step counts.

    Costs a pass over all that trains for each micro-batch, and a copy of base weights that train.

    Args:
        alpha: α ≥ 0, in units of the loss by squared unit of the weights.
        beta: β ≥ 0, likewise. With both at 0 the run is the plain one bit for bit.
    Raises:
        ValueError: one is negative; processes share the weights (FSDP).
    """

    name: ClassVar[str] = "l2_sp"
    source: ClassVar[str] = "Li et al. 2018, arXiv:1802.01483"

    alpha: float = 0.1
    beta: float = 0.01

    start: dict[str, Tensor] = field(init=False, default_factory=dict)
    """Parameter → w₀, at least in fp32; of a low-rank factor and of the head none."""

    def __post_init__(self) -> None:
        for name, symbol in (("alpha", "α"), ("beta", "β")):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: give {symbol} ≥ 0.")

    def on_stage_begin(self, run: Run) -> None:
        tensors = dict(run.model.named_parameters())
        if any(isinstance(tensors[param.name], DTensor) for param in run.params):
            raise ValueError("l2_sp reads whole weights in each step, and FSDP keeps them in pieces. Use DDP.")
        factors = {id(tensor) for a, b, _ in low_rank_factors(run.model) for tensor in (a, b)}
        pulled = [p for p in run.params if p.part != "head" and id(tensors[p.name]) not in factors]
        self.start = {p.name: _wide(tensors[p.name].detach()).clone() for p in pulled} if self.alpha > 0 else {}

    def loss_terms(self, run: Run, batch: Mapping[str, Any], output: Any) -> Mapping[str, LossTerm]:
        if self.alpha == 0 and self.beta == 0:
            return {}
        tensors = {name: tensor for name, tensor in run.model.named_parameters() if tensor.requires_grad}
        device = next(iter(tensors.values())).device
        pulled = [(tensors[name], start.to(device)) for name, start in self.start.items() if name in tensors]
        heads = [tensors[p.name] for p in run.params if p.part == "head" and p.name in tensors]
        total = torch.zeros((), device=device)
        if self.alpha > 0:
            change = squared_sum(_wide(weight) - start for weight, start in pulled)
            change = change + sum(
                (low_rank_norm(a, b, scaling) for a, b, scaling in low_rank_factors(run.model) if a.requires_grad),
                torch.zeros(()),
            ).to(device)
            total = total + self.alpha / 2 * change
        if self.beta > 0:
            total = total + self.beta / 2 * squared_sum(map(_wide, heads)).to(device)
        return {"l2_sp": LossTerm(total, 1, per="step")} if total.requires_grad else {}


def squared_sum(tensors: Iterable[Tensor]) -> Tensor:
    """Σ‖t‖², shape (), fp32; 0 for none."""
    norms = torch._foreach_norm(kept) if (kept := list(tensors)) else []
    return torch.stack(list(norms)).square().sum() if norms else torch.zeros(())


def low_rank_norm(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """‖s·BA‖² = s² · tr((BᵀB)(AAᵀ)), shape (), fp32.

    Args:
        a: A, (r, …).
        b: B, (out, r, …) with 1 for every further dimension.
        scaling: s.
    """
    flat_a, flat_b = _wide(a).flatten(1), _wide(b).flatten(1)
    return scaling**2 * ((flat_b.T @ flat_b) * (flat_a @ flat_a.T)).sum()


def low_rank_factors(model: nn.Module) -> list[tuple[Tensor, Tensor, float]]:
    """A, B and the scaling of every active LoRA layer."""
    found: list[tuple[Tensor, Tensor, float]] = []
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        for name in module.active_adapters:
            scaling = float(module.scaling.get(name, 1.0))
            if name in module.lora_A:
                a: Any = module.lora_A[name]
                b: Any = module.lora_B[name]
                found.append((a.weight, b.weight, scaling))
            elif name in module.lora_embedding_A:
                found.append((module.lora_embedding_A[name], module.lora_embedding_B[name], scaling))
    return found


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
