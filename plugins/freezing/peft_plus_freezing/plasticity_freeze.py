"""Freezing by training plasticity, as Egeria does it."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from peft_plus import Param, Plugin, Run
from peft_plus.layers import transformers_model

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class PlasticityFreeze(Plugin):
    """Freeze the frontmost block once its output no longer changes faster or slower than before, then the next one.

    Every few steps the plasticity P = ‖G − G₀‖² / b² compares the frontmost block that still trains with itself a while
    ago (the reference): G and G₀ hold how similar the batch's b rows are to each other in the two outputs A, G = A·Aᵀ
    with each row divided by its norm (Tung & Mori 2019, arXiv:1907.09682). P is averaged over the last `window`
    measurements, and a line fitted to the last `window` averages. Where its slope was at most `tolerance` of the
    steepest so far, for `patience` measurements in a row, the block is frozen with all below it (Egeria: Wang et al.
    2023, arXiv:2201.06227). Once the learning rate has fallen far enough since, everything thaws. The topmost depth
    at which something trains is never frozen.

    Args:
        every: optimizer steps from one measurement to the next, ≥ 1.
        window: measurements that are averaged, and averages that a line is fitted to, ≥ 2.
        tolerance: of the steepest slope in this run, either way, in [0, 1): a slope no steeper than that share is flat.
        patience: flat slopes in a row that freeze a block, ≥ 1.
        refresh: measurements that one reference serves, ≥ 1; `window` must be a multiple of it.
        thaw_lr_fraction: everything thaws once the learning rate is this share, in (0, 1), of what it was when the
            first block froze; None never thaws.
    Raises:
        ValueError: a setting is out of its range, the model is an encoder-decoder or split over processes, batches have
            one row, or the run is too short to freeze anything.
    """

    name: ClassVar[str] = "plasticity_freeze"
    source: ClassVar[str] = "Wang et al. 2023, arXiv:2201.06227; Tung & Mori 2019, arXiv:1907.09682"
    needs: ClassVar[tuple[str, ...]] = ("layers",)
    conflicts: ClassVar[tuple[str, ...]] = ("lisa",)
    on_freeze: ClassVar[Literal["keep", "drop_state"]] = "drop_state"

    every: int = 20
    window: int = 5
    tolerance: float = 0.2
    patience: int = 5
    refresh: int = 1
    thaw_lr_fraction: float | None = 0.1

    steps: int = field(init=False, default=0)
    """Finished steps of the run that this state is of."""
    lowest: int = field(init=False, default=0)
    """What lies below this depth is frozen."""
    frozen_lr: float | None = field(init=False, default=None)
    """The learning rate when the first block froze since everything trained."""
    front: int = field(init=False, default=0)
    """Depth of the block that the fields below are of; 0 where there is none."""
    reference: dict[str, Tensor] = field(init=False, default_factory=dict)
    """Parameter → its weight a while ago, of all that trains up to the front."""
    age: int = field(init=False, default=0)
    """Measurements against this reference."""
    measured: list[float] = field(init=False, default_factory=list)
    """The last P."""
    averages: list[float] = field(init=False, default_factory=list)
    """Their last averages."""
    flat: int = field(init=False, default=0)
    """Flat slopes in a row."""
    steepest: float = field(init=False, default=0.0)
    """The steepest slope of any block since everything trained."""

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("window", 2), ("patience", 1), ("refresh", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: give a number ≥ {least}.")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance={self.tolerance}: give a share in [0, 1).")
        if self.window % self.refresh:
            raise ValueError(
                f"window={self.window}, refresh={self.refresh}: an older reference differs more, which only evens out "
                "over windows that are a multiple of refresh."
            )
        if self.thaw_lr_fraction is not None and not 0 < self.thaw_lr_fraction < 1:
            raise ValueError(f"thaw_lr_fraction={self.thaw_lr_fraction}: give a share in (0, 1), or None.")

    def on_build(self, run: Run) -> None:
        if getattr(getattr(transformers_model(run.model), "config", None), "is_encoder_decoder", False):
            raise ValueError(
                "it judges blocks by their place before all others, and an encoder-decoder has two at each depth, of "
                "which the decoder's reads the whole encoder. Use gradual_unfreeze, freezeout or autofreeze."
            )

    def may_train(self, run: Run, param: Param) -> bool:
        return param.depth >= (self.lowest if run.step else 0)  # the state may still be that of another run

    def next_change(self, run: Run) -> int | None:
        soonest = self.every * (self.window + self.patience)
        if 0 < run.max_steps <= soonest:
            raise ValueError(
                f"with every={self.every}, window={self.window} and patience={self.patience} nothing can freeze before "
                f"step {soonest}, and this run has {run.max_steps} steps. Give smaller ones, or a longer run."
            )
        if run.batch_size == 1:
            raise ValueError(
                "it compares the rows of a micro-batch with each other, and batches have one row: give two."
            )
        if any(isinstance(parameter, DTensor) for parameter in run.model.parameters()):
            raise ValueError("it computes with older weights, which a model split by FSDP does not let it: use DDP.")
        return NotImplemented

    def on_step_end(self, run: Run) -> None:
        if run.step - 1 < self.steps:
            self._thaw()  # what an earlier run found out does not count in this one
        self.steps = run.step
        if run.step % self.every:
            return
        rate = _learning_rate(run)
        if self._has_fallen(rate):
            self._thaw()
        blocks = [depth for depth in sorted(run.depths)[:-1] if max(self.lowest, 1) <= depth <= run.num_blocks]
        if not blocks:
            return
        params = [param for param in run.params if self.lowest <= param.depth <= blocks[0]]
        tensors = dict(run.model.named_parameters())
        if not any(tensors[param.name].requires_grad for param in params if param.depth == blocks[0]):
            self._begin(0)  # another plugin keeps it frozen, so that it stands still and says nothing
        elif blocks[0] != self.front:
            self._begin(blocks[0])
            self._refer(run, params)
        elif self._measure(run):
            self.lowest = blocks[0] + 1
            self.frozen_lr = rate if self.frozen_lr is None else self.frozen_lr
            self._begin(min(blocks[1:], default=0))
            self._refer(run, [param for param in run.params if self.lowest <= param.depth <= self.front])
        elif self.age == self.refresh:
            self._refer(run, params)

    def _measure(self, run: Run) -> bool:
        """Whether the front has been flat for long enough."""
        inputs = _arguments(run)
        now = run.hidden(inputs, self.front)
        before = run.hidden(inputs, self.front, weights=self.reference)
        judged = len(now) > 1
        mine = similarity_loss(_tokens(now, inputs), _tokens(before, inputs)) if judged else 0.0
        total, share = run.mean(mine), run.mean(float(judged))
        if not share:
            logger.warning("Step %d: a micro-batch of one row has no similarities to look at.", run.step)
            return False
        self.age += 1
        self.measured = [*self.measured, total / share][-self.window :]
        run.log(plasticity=self.measured[-1])
        self.averages = [*self.averages, sum(self.measured) / len(self.measured)][-self.window :]
        if len(self.averages) < self.window:
            return False
        steep = abs(slope(self.averages))
        self.steepest = max(self.steepest, steep)
        self.flat = self.flat + 1 if steep <= self.tolerance * self.steepest else 0
        return self.flat >= self.patience

    def _begin(self, front: int) -> None:
        self.front, self.reference, self.age, self.measured, self.averages, self.flat = front, {}, 0, [], [], 0

    def _refer(self, run: Run, params: Sequence[Param]) -> None:
        self.reference = {param.name: run.weight(param).clone() for param in params}
        self.age = 0

    def _thaw(self) -> None:
        self.lowest, self.frozen_lr, self.steepest = 0, None, 0.0
        self._begin(0)

    def _has_fallen(self, rate: float | None) -> bool:
        if self.frozen_lr is None or self.thaw_lr_fraction is None or rate is None:
            return False
        return rate <= self.frozen_lr * self.thaw_lr_fraction * (1 + 1e-9)  # 1e-3 · 0.1 is not quite 1e-4


def similarity_loss(one: Tensor, other: Tensor) -> float:
    """‖G̃ − G̃'‖²_F / b², with G = A·Aᵀ and each row of G̃ of norm 1: how differently two models relate a batch's rows.

    The similarity-preserving loss of Tung & Mori 2019, arXiv:1907.09682.

    Args:
        one, other: activations A, shape (b, …).
    Returns: in [0, 4 / b]; 0 for equal activations, and always with b = 1.
    """
    first, second = (_similarities(activations) for activations in (one, other))
    return float((first - second).square().sum()) / len(one) ** 2


def _similarities(activations: Tensor) -> Tensor:
    rows = activations.float().flatten(1)
    return torch.nn.functional.normalize(rows @ rows.T, dim=1)


def slope(values: Sequence[float]) -> float:
    """Of the least-squares line through (0, v₀), (1, v₁), …; two values or more."""
    places = np.arange(len(values)) - (len(values) - 1) / 2
    return float(places @ np.asarray(values) / (places @ places))


def _tokens(hidden: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """What stands at padding set to 0: shape as `hidden`, (rows, tokens, width)."""
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape == hidden.shape[:2]:
        return hidden * mask[..., None].to(hidden)
    return hidden


def _arguments(run: Run) -> dict[str, Any]:
    """The batch without what the model does not take, such as TRL's masks."""
    known = inspect.signature(transformers_model(run.model).forward).parameters
    inputs = {name: value for name, value in run.batch.items() if name in known}
    if not inputs:
        raise ValueError(f"the batch ({', '.join(run.batch) or 'empty'}) holds none of the model's arguments.")
    return inputs


def _learning_rate(run: Run) -> float | None:
    """The highest of all groups, or None where the optimizer computes its own."""
    assert run.optimizer is not None
    rates = [group["lr"] for group in run.optimizer.param_groups]
    return None if None in rates else max(map(float, rates))
