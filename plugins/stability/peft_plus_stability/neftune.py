"""NEFTune: noise on the input embeddings."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from peft_plus import Pass, Plugin, Run
from peft_plus.batch_rows import number_of_rows

from .example_noise import example_noise


@dataclass(kw_only=True)
class NEFTune(Plugin):
    """Train on noised input embeddings: e + U(−1, 1) · alpha / √(L · d).

    L is the length of the micro-batch with its padding, d the embeddings' width (Jain et al. 2023, arXiv:2310.05914,
    §2). Evaluations see no noise. The formula is that of transformers' `neftune_noise_alpha`, whose noise depends on
    what else was drawn before; here each example draws from a stream of its own (seed, step, example), so that it is
    the same on one process and on several, but for L.

    Args:
        alpha: ≥ 0, in units of the embeddings; 0 gives the plain run bit for bit.
    Raises:
        ValueError: `alpha` is negative; the TrainingArguments ask for such noise, too.
    """

    name: ClassVar[str] = "neftune"
    source: ClassVar[str] = "Jain et al. 2023, arXiv:2310.05914"

    alpha: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha}: give a size ≥ 0.")

    def on_stage_begin(self, run: Run) -> None:
        # There is no other way to see the argument; only a run under a Trainer has it on its embeddings.
        if self.alpha > 0 and any(hasattr(module, "neftune_noise_alpha") for module in run.model.modules()):
            raise ValueError(
                "the noise would be added twice, since TrainingArguments(neftune_noise_alpha=…) is set. Leave that out."
            )

    def passes(self, run: Run, batch: Mapping[str, Any]) -> Generator[Pass, Tensor | None, None] | None:
        return None if self.alpha == 0 else self._noised(run, batch)

    def _noised(self, run: Run, batch: Mapping[str, Any]) -> Generator[Pass, Tensor | None, None]:
        rows = number_of_rows(batch)

        def noise(embeddings: Tensor) -> Tensor:
            eps = bound(self.alpha, tokens=embeddings.shape[1], width=embeddings.shape[2])
            return example_noise(embeddings, rows=rows, eps=eps, noise="uniform", stream=partial(_stream, run))

        yield Pass(perturb={"embeddings": noise})


def bound(alpha: float, *, tokens: int, width: int) -> float:
    """Of each element of the noise: alpha / √(L · d) (Jain et al. 2023, arXiv:2310.05914, algorithm 1).

    Args:
        alpha: ≥ 0.
        tokens, width: L, with padding, and d; ≥ 1.
    """
    return alpha / math.sqrt(tokens * width)


def _stream(run: Run, row: int, text: int, device: torch.device) -> torch.Generator:
    return run.generator("neftune", run.example(row), text, device=device)
