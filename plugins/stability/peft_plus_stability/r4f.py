"""R4F: R3F with a head that cannot magnify."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from peft_plus import Param, Run

from .r3f import R3F

FIRST_ITERATIONS = 100
"""Power iterations before the first step. From then on the weights move little, and one in each step keeps up."""


@dataclass(kw_only=True)
class R4F(R3F):
    """R3F, with each matrix of the head divided by its largest singular value, so that its spectral norm is 1.

    loss as in `r3f`, with W/σ(W) in the place of each matrix W of the head, so that its linear maps have a Lipschitz
    constant of 1 (Aghajanyan et al. 2020, arXiv:2008.03156). σ(W) = uᵀWv, u and v by one power iteration after each
    optimizer step (Miyato et al. 2018, arXiv:1802.05957); the gradient flows through σ, not through u and v. What is
    evaluated, saved and kept at the end has W/σ(W), too, so the saved model needs no plugin.

    Args:
        weight: λ ≥ 0, in units of the loss; 0 leaves all of it out and gives the plain run bit for bit.
        eps: half width (uniform) or standard deviation (normal) of the noise, in units of the embeddings, > 0.
        noise: `"uniform"` or `"normal"`.
        at: `"embeddings"`, or `"trunk"`, which needs frozen lower blocks.
    Raises:
        ValueError: `weight` is negative or `eps` not positive; no matrix of the head trains, or one is 0.
    """

    name: ClassVar[str] = "r4f"
    source: ClassVar[str] = "Aghajanyan et al. 2020, arXiv:2008.03156; Miyato et al. 2018, arXiv:1802.05957"
    needs: ClassVar[tuple[str, ...]] = ("new_head",)
    conflicts: ClassVar[tuple[str, ...]] = ("r3f",)

    vectors: dict[str, tuple[Tensor, Tensor]] = field(init=False, default_factory=dict)
    """Matrix of the head → u (rows) and v (columns), of length 1, in fp32."""

    def on_build(self, run: Run) -> None:
        if self.weight > 0 and not self._matrices(run):
            raise ValueError("no matrix of the head trains, so there is nothing to normalise. Use r3f.")

    def on_stage_begin(self, run: Run) -> None:
        self.vectors = {}
        for param in self._matrices(run):
            weight = run.weight(param).float()
            if not weight.any():
                raise ValueError(f"{param.name} is 0 everywhere: it has no spectral norm. Start it from other values.")
            start = run.generator("r4f", param.name)
            v = torch.randn(weight.shape[1], generator=start).to(weight.device)
            self.vectors[param.name] = iterate(weight, v / v.norm(), times=FIRST_ITERATIONS)

    def effective_weight(self, run: Run, param: Param, value: Tensor) -> Tensor:
        vectors = self.vectors.get(param.name)
        return value if vectors is None else normalised(value, *vectors)

    def on_step_end(self, run: Run) -> None:
        for param in self._matrices(run):
            weight = run.weight(param).float()
            self.vectors[param.name] = iterate(weight, self.vectors[param.name][1].to(weight.device), times=1)

    def eval_weights(self, run: Run) -> Mapping[str, Tensor] | None:
        return {param.name: normalised(run.weight(param), *self.vectors[param.name]) for param in self._matrices(run)}

    def _matrices(self, run: Run) -> list[Param]:
        return [p for p in run.params if p.part == "head" and len(p.shape) == 2] if self.weight > 0 else []


def iterate(weight: Tensor, v: Tensor, *, times: int) -> tuple[Tensor, Tensor]:
    """Power iterations toward the first singular vectors: u = Wv / ‖Wv‖, v = Wᵀu / ‖Wᵀu‖.

    Args:
        weight: W, (rows, columns), fp32.
        v: (columns,), of length 1.
        times: ≥ 1.
    Returns: u, (rows,), and v.
    """
    u = weight.new_zeros(weight.shape[0])
    for _ in range(times):
        u = torch.nn.functional.normalize(weight @ v, dim=0)
        v = torch.nn.functional.normalize(weight.T @ u, dim=0)
    return u, v


def normalised(weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """W / (uᵀWv), in W's dtype; u and v get no gradient."""
    u, v = u.to(weight.device), v.to(weight.device)
    return (weight / (u @ weight.float() @ v)).to(weight.dtype)
