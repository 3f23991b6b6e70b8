"""FreeLB: adversarial augmentation of the embeddings for the price of its ascent steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_plus import Pass, Plugin, Run
from peft_plus.batch_rows import number_of_rows

from .example_noise import example_noise


@dataclass(kw_only=True)
class FreeLB(Plugin):
    """Train on the noise that raises the loss, while it is being looked for.

    Over K passes, loss = Σₜ L(f(e + δₜ)) / K (Zhu et al. 2020, arXiv:1909.11764, algorithm 1). δ₀ is drawn for each
    example from U(−1, 1) · init_magnitude / √(tokens · width), in fp32, at real tokens; then δₜ₊₁ = δₜ + step_size ·
    g / ‖g‖, g being the gradient of the loss with respect to δₜ, ‖·‖ the Frobenius norm over an example's tokens. Each
    pass's backward gives g and the gradient of the weights at once. All passes of a micro-batch see the same draw of
    dropout, as in the authors' code, so that they ascend on one function.

    This is adversarial augmentation: an example keeps its label while its embeddings are moved against the model.
    Costs K forward and backward passes. With `steps=2` and `init_magnitude=0` half of the loss is the plain one and
    half that of one adversarial step (Miyato et al. 2017, arXiv:1605.07725).

    Args:
        steps: K ≥ 1, passes.
        step_size: ≥ 0, in units of the embeddings: the norm that δ grows by in each step. At 0 nothing ascends: one
            pass on δ₀ alone, as with `steps=1`, since all K would be equal.
        init_magnitude: ≥ 0, in units of the embeddings: the bound of the norm of δ₀. At 0, with `steps=1` or
            `step_size=0`, the run is the plain one bit for bit.
        max_norm: bound of the norm of an example's δ, > 0; None for no bound.
    Raises:
        ValueError: a setting is out of its range.
    """

    name: ClassVar[str] = "freelb"
    source: ClassVar[str] = "Zhu et al. 2020, arXiv:1909.11764"
    conflicts: ClassVar[tuple[str, ...]] = ("r3f", "r4f", "smart", "token_cutoff")

    steps: int = 2
    step_size: float = 0.1
    init_magnitude: float = 0.6
    max_norm: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: give a number of passes ≥ 1.")
        if not 0 <= self.step_size < math.inf:
            raise ValueError(f"step_size={self.step_size}: give a size ≥ 0.")
        if not 0 <= self.init_magnitude < math.inf:
            raise ValueError(f"init_magnitude={self.init_magnitude}: give a size ≥ 0.")
        if self.max_norm is not None and not 0 < self.max_norm < math.inf:
            raise ValueError(f"max_norm={self.max_norm}: give a norm > 0, or None for no bound.")

    def passes(self, run: Run, batch: Mapping[str, Any]) -> Generator[Pass, Tensor | None, None] | None:
        steps = self.steps if self.step_size > 0 else 1
        if steps == 1 and self.init_magnitude == 0:
            return None
        return self._ascent(run, batch, steps)

    def _ascent(self, run: Run, batch: Mapping[str, Any], steps: int) -> Generator[Pass, Tensor | None, None]:
        rows = number_of_rows(batch)
        place = _Place(partial(self._draw, run, batch, rows), ascends=steps > 1)
        states = random_states(run.model)
        for left in reversed(range(steps)):
            gradient = yield Pass(perturb={"embeddings": place}, weight=1 / steps, final=left == 0)
            if gradient is None:
                raise ValueError("the loss has no gradient at the input embeddings, so no noise raises it.")
            delta = ascend(place.delta, gradient, rows=rows, step_size=self.step_size, max_norm=self.max_norm)
            place.delta = delta.requires_grad_(left > 1)  # the last one is not followed by another
            set_random_states(states)

    def _draw(self, run: Run, batch: Mapping[str, Any], rows: int, embeddings: Tensor) -> Tensor:
        stream = partial(_stream, run)
        delta = example_noise(embeddings, rows=rows, eps=self.init_magnitude, noise="uniform", stream=stream)
        real = real_tokens(batch, delta)
        tokens = real.sum(1).clamp(min=1)
        return delta * real / (tokens * delta.shape[-1]).sqrt()[:, None]


class _Place:
    """δ as a pass asks for it: drawn by the first one, which alone knows its shape.

    A plugin's own forward within the pass gets the same tensor, so that its share is in the gradient, too.

    Args:
        draw: embeddings → δ₀.
        ascends: whether a gradient on δ₀ is wanted.
    """

    delta: Tensor

    def __init__(self, draw: Callable[[Tensor], Tensor], *, ascends: bool) -> None:
        self._draw, self._ascends = draw, ascends

    def __call__(self, embeddings: Tensor) -> Tensor:
        if not hasattr(self, "delta"):
            self.delta = self._draw(embeddings).requires_grad_(self._ascends)
        return self.delta


def real_tokens(batch: Mapping[str, Any], embeddings: Tensor) -> Tensor:
    """Where tokens are no padding: fp32 ones and zeros, (texts, tokens, 1). Without an attention mask all are real."""
    mask = batch.get("attention_mask")
    texts, tokens = embeddings.shape[:2]
    if not isinstance(mask, Tensor) or mask.numel() != texts * tokens:
        return torch.ones(texts, tokens, 1, device=embeddings.device)
    return mask.reshape(texts, tokens, 1).to(embeddings.device, torch.float32)


def ascend(delta: Tensor, gradient: Tensor, *, rows: int, step_size: float, max_norm: float | None) -> Tensor:
    """One normalised step: δ + η · g / ‖g‖, scaled back to `max_norm` where it is longer.

    (Zhu et al. 2020, arXiv:1909.11764, algorithm 1.) ‖·‖ is the Frobenius norm over all texts and tokens of an example.
    Where g is 0, δ stays.

    Args:
        delta, gradient: δ and g, (rows · texts, tokens, width).
        rows: examples.
        step_size: η > 0.
        max_norm: > 0, or None.
    Returns: as `delta`, without gradient.
    """
    flat, g = delta.detach().reshape(rows, -1), gradient.float().reshape(rows, -1)
    smallest = torch.finfo(g.dtype).tiny
    g = g / g.abs().amax(1, keepdim=True).clamp(min=smallest)  # its squares would be 0 where it is small
    moved = flat + step_size * g / g.norm(dim=1, keepdim=True).clamp(min=smallest)
    if max_norm is not None:
        moved = moved * (max_norm / moved.norm(dim=1, keepdim=True).clamp(min=max_norm))
    return moved.view_as(delta)


def random_states(model: nn.Module) -> Mapping[torch.device, Tensor]:
    """The states of the generators that draw the model's dropout: of the CPU and of every device that it is on."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type not in ("cpu", "meta")}
    there = {device: torch.get_device_module(device).get_rng_state(*_which(device)) for device in devices}
    return {torch.device("cpu"): torch.get_rng_state(), **there}


def set_random_states(states: Mapping[torch.device, Tensor]) -> None:
    """Put back what `random_states` gave."""
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, *_which(device))


def _which(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # of which there is one, and torch asks for none


def _stream(run: Run, row: int, text: int, device: torch.device) -> torch.Generator:
    return run.generator("freelb", run.example(row), text, device=device)
