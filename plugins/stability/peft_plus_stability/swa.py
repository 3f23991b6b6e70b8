"""SWA: the mean of the weights along the end of training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from peft_plus import Plugin, Run


@dataclass(kw_only=True)
class SWA(Plugin):
    """From a point of training on, collect the weights now and then; evaluate, save and end with their mean.

    θ̄ = Σ θₖ / K over the weights collected (Izmailov et al. 2018, arXiv:1803.05407, algorithm 1). Before the first one
    is collected the weights that train are evaluated; a run that is stopped early ends with the mean of what there is.
    The learning rate stays the user's: the paper collects under a constant or cyclic one, which
    `lr_scheduler_type="constant"` gives.

    Costs a pass over all that trains for each collection, and a copy of it.

    Args:
        start_fraction: of all steps, in [0, 1): nothing is collected before.
        every: "epoch", or so many optimizer steps. The last step is always collected.
    Raises:
        ValueError: a setting is out of its range; the model normalises by running statistics, which would not fit the
            mean; `every` is "epoch" and the data have no length.
    """

    name: ClassVar[str] = "swa"
    source: ClassVar[str] = "Izmailov et al. 2018, arXiv:1803.05407"

    start_fraction: float = 0.75
    every: Literal["epoch"] | int = "epoch"

    average: dict[str, Tensor] = field(init=False, default_factory=dict)
    """Parameter → θ̄."""
    collected: int = field(init=False, default=0)
    """K."""

    def __post_init__(self) -> None:
        if not 0 <= self.start_fraction < 1:
            raise ValueError(f"start_fraction={self.start_fraction}: give a fraction of the run in [0, 1).")
        if isinstance(self.every, int) and self.every < 1:
            raise ValueError(f"every={self.every}: give a number of steps ≥ 1, or 'epoch'.")

    def on_build(self, run: Run) -> None:
        for name, module in run.model.named_modules():
            if isinstance(module, _NormBase) and module.running_mean is not None:
                raise ValueError(
                    f"{name} normalises by running statistics, which would not be those of the mean of the weights. "
                    "Use a model without batch norm."
                )

    def on_stage_begin(self, run: Run) -> None:
        if self.every == "epoch" and not run.steps_per_epoch:
            raise ValueError("every='epoch' needs data with a length. Give a number of steps.")
        self.average, self.collected = {}, 0

    def on_step_end(self, run: Run) -> None:
        period = run.steps_per_epoch if self.every == "epoch" else self.every
        if is_due(run.step, run.max_steps, start_fraction=self.start_fraction, period=period):
            self.collected += 1
            weights = {param.name: run.weight(param) for param in run.params}
            self.average = {name: take_in(self.average.get(name), w, self.collected) for name, w in weights.items()}

    def eval_weights(self, run: Run) -> Mapping[str, Tensor] | None:
        return self.average or None


def is_due(step: int, max_steps: int, *, start_fraction: float, period: int) -> bool:
    """Whether the weights are collected after a step: each `period` steps from that point on, and after the last.

    Args:
        step: finished steps, ≥ 1.
    """
    begun = step >= start_fraction * max_steps - 1e-6  # .07 · 100 is a little more than 7
    return step == max_steps or (begun and step % period == 0)


@torch.no_grad()
def take_in(average: Tensor | None, weight: Tensor, number: int) -> Tensor:
    """The mean of `number` tensors: θ̄ + (θ − θ̄) / K, in fp32 at least.

    Args:
        average: θ̄, the mean of those before; None for none.
        weight: θ, the last of them.
        number: K ≥ 1.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    return wide if average is None else average.to(wide.device) + (wide - average.to(wide.device)) / number
