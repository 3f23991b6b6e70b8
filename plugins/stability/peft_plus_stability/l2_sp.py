"""L2-SP: a pull toward where training started."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from peft_plus import LossTerm, Param, Plugin, Run

from .low_rank_change import Change, low_rank_changes, since, squared_norm, wide


@dataclass(kw_only=True)
class L2SP(Plugin):
    """Pull what was pretrained back toward its start, and a new head toward 0.

    loss = task loss + alpha/2 · Σ‖w − w₀‖² + beta/2 · Σ‖w_head‖² (Li et al. 2018, arXiv:1802.01483, eq. 3), w₀ being
    the weights as the stage begins. What LoRA changes is penalised as a whole: ‖ΔW‖² = s² · tr((BᵀB)(AAᵀ)), s being
    its scaling, without forming ΔW; where ΔW does not start from 0, its distance from there. Other adapters are pulled
    to their own start. Only what trains in the step counts. A head that was pretrained, as that of a language model,
    is pulled to its start, too.

    Costs a pass over all that trains for each micro-batch, and a copy of it; of LoRA's factors none.

    Args:
        alpha: α ≥ 0, in units of the loss by squared unit of the weights.
        beta: β ≥ 0, likewise. With both at 0 the run is the plain one bit for bit.
    Raises:
        ValueError: one is negative; nothing that trains would be pulled; processes share the weights (FSDP, ZeRO-3).
    """

    name: ClassVar[str] = "l2_sp"
    source: ClassVar[str] = "Li et al. 2018, arXiv:1802.01483"

    alpha: float = 0.1
    beta: float = 0.01

    start: dict[str, Tensor] = field(init=False, default_factory=dict)
    """Parameter → w₀, at least in fp32; of the factors of a low-rank change only where it does not start from 0, as
    `Change.factors` gives them; of a new head none."""

    def __post_init__(self) -> None:
        for name, symbol in (("alpha", "α"), ("beta", "β")):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: give {symbol} ≥ 0.")

    def on_build(self, run: Run) -> None:
        new = {_is_new(run, param) for param in run.params}
        if self.alpha + self.beta > 0 and not ((self.alpha > 0 and False in new) or (self.beta > 0 and True in new)):
            raise ValueError(
                f"alpha={self.alpha}, beta={self.beta}: nothing that trains would be pulled. alpha is for all but a "
                "new head, beta for that."
            )

    def on_stage_begin(self, run: Run) -> None:
        self.start = {}
        if self.alpha == 0:
            return
        tensors = _tensors(run)
        trains = {param.name for param in run.params}
        changes = [change for change in low_rank_changes(run.model) if not trains.isdisjoint(change.names)]
        for change in changes:
            a, b = (factor.detach() for factor in change.factors(tensors))
            if a.any() and b.any():
                self.start |= {change.a: a.clone(), change.b: b.clone()}
        factors = {name for change in changes for name in change.names}
        others = [param.name for param in run.params if param.name not in factors and not _is_new(run, param)]
        self.start |= {name: wide(tensors[name].detach()).clone() for name in others}

    def loss_terms(self, run: Run, batch: Mapping[str, Any], output: Any) -> Mapping[str, LossTerm]:
        if self.alpha == 0 and self.beta == 0:
            return {}
        tensors = _tensors(run)
        trains = {param.name: param for param in run.params if tensors[param.name].requires_grad}
        parts: list[tuple[float, Tensor]] = []
        if self.alpha > 0:
            changes = [change for change in low_rank_changes(run.model) if not trains.keys().isdisjoint(change.names)]
            parts += [(self.alpha, self._change(change, tensors)) for change in changes]
            factors = {name for change in changes for name in change.names}
            pulled = [name for name in self.start if name in trains and name not in factors]
            starts = [self._start(name, tensors[name]) for name in pulled]
            parts += [(self.alpha, squared_distance([tensors[name] for name in pulled], starts))] if pulled else []
        heads = [tensors[name] for name, param in trains.items() if _is_new(run, param)] if self.beta > 0 else []
        parts += [(self.beta, squared_distance(heads))] if heads else []
        if not parts:
            return {}
        device = parts[0][1].device
        total = torch.stack([weight / 2 * norm.to(device) for weight, norm in parts]).sum().float()
        return {"l2_sp": LossTerm(total, 1, per="step")}

    def _change(self, change: Change, tensors: Mapping[str, Tensor]) -> Tensor:
        a, b = change.factors(tensors)
        if change.a in self.start:
            a, b = since(a, b, self._start(change.a, a), self._start(change.b, b))
        return squared_norm(a, b, change.scaling)

    def _start(self, name: str, like: Tensor) -> Tensor:
        start = self.start[name] = self.start[name].to(like.device)
        return start


def squared_distance(weights: Sequence[Tensor], starts: Sequence[Tensor] = ()) -> Tensor:
    """Σ‖w − w₀‖², shape (), at least in fp32.

    Args:
        weights: w, one at least, in whatever dtypes.
        starts: w₀, of equal shapes; none stand for 0.
    """
    apart = [wide(weight) for weight in weights]
    if starts:
        apart = [weight - start for weight, start in zip(apart, starts, strict=True)]
    norms = torch._foreach_norm(apart)
    return torch.stack([norm.to(norms[0].device) for norm in norms]).square().sum()


def _is_new(run: Run, param: Param) -> bool:
    """Whether it begins at random, so that its start is worth nothing."""
    return param.part == "head" and run.task.new_head


def _tensors(run: Run) -> dict[str, Tensor]:
    """Name → parameter; of what trains the weights themselves, whatever the micro-batch computes with."""
    tensors: dict[str, Tensor] = dict(run.model.named_parameters(remove_duplicate=False))
    if run.weights is not None:
        tensors |= run.weights.tensors
    if any(isinstance(tensors[param.name], DTensor) or hasattr(tensors[param.name], "ds_id") for param in run.params):
        raise ValueError("l2_sp needs weights that are whole on each process, and FSDP and ZeRO-3 split them. Use DDP.")
    return tensors
