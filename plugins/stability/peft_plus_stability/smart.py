"""SMART: smoothness under the worst small noise, and small steps away from an average of earlier weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from peft_plus import LossTerm, Plugin, Run

from .divergences import Predictions, mean_distance, summed_distance
from .example_noise import example_noise


@dataclass(kw_only=True)
class SMART(Plugin):
    """Keep the prediction the same under the small noise that changes it most, and near that of earlier weights.

    loss = task loss + weight · D(f(e), f(e + δ)) + bregman · D(f, f̃) (Jiang et al. 2020, arXiv:1911.03437,
    algorithm 1), with D as in `r3f`: the symmetric KL, its Bernoulli form or the squared difference. δ starts from
    N(0, sigma²), drawn for each example from a stream of its own (seed, step, example) in fp32, and takes `steps` steps
    δ ← clip(δ + step_size · g / ‖g‖∞, −eps, eps), g being the gradient of D with respect to δ, ‖·‖∞ over all tokens of
    an example. So no element of δ exceeds eps. f̃ has the teacher's weights, θ̃ ← ema · θ̃ + (1 − ema) · θ after each
    optimizer step, θ̃ = θ at first; all that may train is averaged.

    Costs `steps` forward passes with a backward pass for the noise alone, and one more of both for the loss; a forward
    pass without gradient and a copy of all that trains for the teacher. With `at="trunk"` the noise goes to h, the
    output of the highest block below all that trains: D(g(h), g(h + δ)), g being what lies above. That is another
    objective, and cheaper: the frozen blocks run once for all passes, or, with `trunk_cache`, not at all.

    Args:
        weight: λ ≥ 0, in units of the loss; 0 leaves the noise out.
        eps: bound of each element of the noise, in units of the embeddings, > 0.
        step_size: η, in units of the embeddings, > 0; the element with the largest gradient moves by it.
        sigma: standard deviation of the noise at its start, in units of the embeddings, > 0.
        steps: K ≥ 1, ascent steps.
        at: `"embeddings"`, or `"trunk"`, which needs frozen lower blocks.
        bregman: μ ≥ 0, in units of the loss; 0 leaves the teacher out. With both at 0 the run is the plain one bit for
            bit.
        ema: β in [0, 1]: 0 makes the teacher the weights before the step at work, so that without dropout its term has
            no gradient; 1 makes it those before the first step.
    Raises:
        ValueError: a setting is out of its range.
    """

    name: ClassVar[str] = "smart"
    source: ClassVar[str] = "Jiang et al. 2020, arXiv:1911.03437"

    weight: float = 1.0
    eps: float = 1e-5
    step_size: float = 1e-3
    sigma: float = 1e-5
    steps: int = 1
    at: Literal["embeddings", "trunk"] = "embeddings"
    bregman: float = 1.0
    ema: float = 0.99

    teacher: dict[str, Tensor] = field(init=False, default_factory=dict)
    """Parameter → θ̃, at least in fp32: in bf16 an average would stand still."""

    def __post_init__(self) -> None:
        for name, symbol in (("weight", "λ"), ("bregman", "μ")):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: give {symbol} ≥ 0.")
        for name in ("eps", "step_size", "sigma"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: give a size > 0.")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: give a number ≥ 1. Noise that takes no step is r3f's.")
        if not 0 <= self.ema <= 1:
            raise ValueError(f"ema={self.ema}: give β in [0, 1].")

    def loss_terms(self, run: Run, batch: Mapping[str, Any], output: Any) -> Mapping[str, LossTerm]:
        if self.weight == 0 and self.bregman == 0:
            return {}
        clean, count = run.task.logits(output, batch), run.task.count(batch)

        def term(weight: float, other: Any) -> LossTerm:
            distance = mean_distance(clean, run.task.logits(other, batch), run.task.distribution)
            return LossTerm(weight * distance * count, count, per="label")

        terms: dict[str, LossTerm] = {}
        if self.bregman > 0:
            terms["smart_bregman"] = term(self.bregman, run.forward(batch, weights=self._teacher(run)))
        if self.weight > 0:
            delta = self._worst_noise(run, batch, clean)
            terms["smart"] = term(self.weight, run.forward(batch, perturb={self.at: delta}))
        return terms

    def on_step_end(self, run: Run) -> None:
        for param in run.params if self.bregman > 0 else ():
            weight, before = run.weight(param), self.teacher[param.name]
            self.teacher[param.name] = before.to(weight.device).lerp_(weight.to(before.dtype), 1 - self.ema)

    def _teacher(self, run: Run) -> dict[str, Tensor]:
        if run.step == 0 or not self.teacher:  # it may still be that of another run
            self.teacher = {param.name: _copy(run.weight(param)) for param in run.params}
        return self.teacher

    def _worst_noise(self, run: Run, batch: Mapping[str, Any], clean: Predictions) -> Tensor:
        """δ, without gradient."""
        rows, fixed = len(clean[0][0]), [(logits.detach(), mask) for logits, mask in clean]
        draw = partial(example_noise, rows=rows, eps=self.sigma, noise="normal", stream=partial(_stream, run))
        place = _Place(draw)
        for _ in range(self.steps):
            other = run.task.logits(run.forward(batch, perturb={self.at: place}), batch)
            distance = summed_distance(fixed, other, run.task.distribution)
            (gradient,) = torch.autograd.grad(distance, place.delta)
            place.delta = ascend(place.delta.detach(), gradient, rows=rows, step_size=self.step_size, eps=self.eps)
        return place.delta


class _Place:
    """δ as a pass asks for it: drawn by the first one, which alone knows its shape.

    Args:
        draw: the output that is noised → δ.
    Attributes:
        delta: δ; that of the last pass, to which its output has a gradient.
    """

    delta: Tensor

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        self._draw = draw

    def __call__(self, output: Tensor) -> Tensor:
        if not hasattr(self, "delta"):
            self.delta = self._draw(output)
        return self.delta.requires_grad_()


def ascend(delta: Tensor, gradient: Tensor, *, rows: int, step_size: float, eps: float) -> Tensor:
    """One step of projected ascent: clip(δ + η · g / ‖g‖∞, −eps, eps).

    (Jiang et al. 2020, arXiv:1911.03437, algorithm 1.) ‖·‖∞ runs over all texts and tokens of an example, so that no
    example's step depends on another's. At padding the gradient of a model that masks it is 0 and the noise without
    effect. Where all of g is 0, δ is only clipped.

    Args:
        delta, gradient: δ and g, (rows · texts, tokens, width).
        rows: examples.
        step_size: η > 0.
        eps: > 0.
    Returns: as `delta`.
    """
    flat = gradient.reshape(rows, -1)
    largest = flat.abs().amax(1, keepdim=True).clamp(min=torch.finfo(flat.dtype).tiny)
    return (delta + step_size * (flat / largest).view_as(delta)).clamp(-eps, eps)


def _copy(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)


def _stream(run: Run, row: int, text: int, device: torch.device) -> torch.Generator:
    return run.generator("smart", run.example(row), text, device=device)
