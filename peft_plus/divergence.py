"""The last look before an update: a gradient that is NaN or infinite would turn every weight into NaN.

transformers leaves such losses out of its log, clips by a norm that is no number, and trains on with ruined weights.
What is looked at here is the gradients' norm, which the loop has anyway; the search for the cause begins only when the
run has to stop.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import gather, plain_parameters
from .errors import DivergenceError

logger = logging.getLogger(__name__)

SKIPPED_IN_A_ROW = 30
"""Updates that a gradient scaler may skip one after another: from its usual 2¹⁶ it is then at 2⁻¹⁴."""
_SHOWN = 8


@dataclass
class StepParts:
    """What one optimizer step was made of on this process. Kept by reference; nothing is read unless the run stops.

    Attributes:
        batches: the micro-batches.
        first: position of each one's first row in the step, over all processes.
        rows: rows of the dataset in each one; empty where unknown.
        losses: for each finished micro-batch its parts by name, scalars on their device; "" is the task's own loss.
        owners: loss term → the plugin that added it, as messages name it.
        constant: the loss terms that carry no gradient.
    """

    batches: Sequence[Any] = ()
    first: Sequence[int] = ()
    rows: Sequence[Sequence[int]] = ()
    losses: list[dict[str, Tensor]] = field(default_factory=list)
    owners: dict[str, str] = field(default_factory=dict)
    constant: set[str] = field(default_factory=set)

    def begin(self, loss: Tensor, *, number: int) -> None:
        """Note the task's own loss of a pass.

        Args:
            number: of the micro-batch, from 0; the parts of several passes over it are added.
        """
        if number >= len(self.losses):
            self.losses.append({})
        self.losses[-1][""] = self.losses[-1].get("", 0) + loss.detach()

    def add(self, name: str, term: Tensor) -> None:
        """Note a loss term of the micro-batch at work."""
        if not self.losses:  # of a loop that does not tell
            self.losses.append({})
        self.losses[-1][name] = self.losses[-1].get(name, 0) + term.detach()
        if not term.requires_grad:
            self.constant.add(name)

    @property
    def task_loss(self) -> float:
        """The task's loss over all micro-batches. It waits for the device."""
        return sum(float(one[""]) for one in self.losses if "" in one)


def gradient_norm(tensors: Iterable[nn.Parameter]) -> Tensor:
    """The norm of all gradients, shape (): finite exactly where each of them is (up to squares past 3e38)."""
    norm = torch.nn.utils.get_total_norm([t.grad for t in tensors if t.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # type: ignore[operator]


def unscale(optimizer: torch.optim.Optimizer) -> bool:
    """Within `step()` of a fused optimizer: divide the gradients by what a gradient scaler left to its kernel.

    Returns: whether the kernel will update nothing, because gradients overflowed.
    """
    held: Any = optimizer
    scale, overflow = getattr(held, "grad_scale", None), getattr(held, "found_inf", None)
    if scale is not None:
        for tensor in (tensor for group in optimizer.param_groups for tensor in group["params"]):
            if tensor.grad is not None:
                tensor.grad.div_(scale.to(tensor.grad.device))
        held.grad_scale = None
    return overflow is not None and bool(overflow)


def check_update(norm: Any, parts: StepParts, model: nn.Module, *, step: int, rate: float) -> None:
    """Stop before an update that would ruin the weights. All processes have the same norm, so all of them stop.

    Args:
        norm: of all gradients; a tensor of shape () or a number.
        step: finished optimizer steps.
        rate: the learning rate.
    Raises:
        DivergenceError: it is no finite number; says what in which rows is not, and what to change.
    """
    value = float(norm)
    if math.isfinite(value):
        return
    found = [one for per_process in gather(_find(parts)) for one in per_process]
    lost = _lost(model)
    for tensor in model.parameters():
        tensor.grad = None
    loss = next((one for one in found if one.loss is not None), None)
    head = f"The loss of step {step} is {loss.loss}." if loss else f"The gradient of step {step} has the norm {value}."
    if not loss:
        head += " Its loss is finite."
    causes = " ".join(one.text for one in found[:_SHOWN])
    kept = f"This update was not made: the weights are those after {step} finished steps, learning rate {rate:g}."
    if lost:
        kept = f"{len(lost)} tensors of the model hold NaN or infinite values already, e.g. {lost[0]!r}: "
        if not step:
            kept += "they came so, for no update was made yet. Load or build the model anew."
        elif step == 1:
            kept += f"they came so, or the first update made them so (learning rate {rate:g}). Build the model anew."
        else:
            kept += f"they came so, or the last update made them so (learning rate {rate:g}). "
            kept += "Go back to a checkpoint from before, or build the model anew."
    message = " ".join(filter(None, (head, causes, kept, "" if lost and not step else _fix(found))))
    error = DivergenceError(message)
    error.weights_lost = bool(lost)
    raise error


def check_scaler(skipped: int, *, step: int) -> None:
    """Stop a half-precision run whose every update the gradient scaler skips: it would go on without training.

    Args:
        skipped: updates skipped one after another.
        step: finished optimizer steps, skipped ones too.
    Raises:
        DivergenceError: more than any choice of scale explains.
    """
    if skipped >= SKIPPED_IN_A_ROW:
        raise DivergenceError(
            f"The last {skipped} updates before step {step} were all skipped, because gradients overflowed in fp16 at "
            "every scale. Nothing trains any more; the weights are those of the last update that was made. Train in "
            "bf16 or fp32, lower the learning rate, or look for NaN in the data."
        )


@dataclass(frozen=True)
class _Found:
    """One thing that is no finite number: a part of a micro-batch's loss, or one of its inputs."""

    text: str
    loss: float | None = None
    term: str = ""
    data: bool = False


def _find(parts: StepParts) -> list[_Found]:
    found: list[_Found] = []
    for place, losses in enumerate(parts.losses):
        where = _where(parts, place)
        for name, value in losses.items():
            number = float(value)
            if not math.isfinite(number):
                owner = parts.owners.get(name, "")
                what = f"The loss term {name!r} of {owner}" if name else "The task's loss"
                found.append(_Found(f"{what} is {number} in {where}.", loss=number, term=owner))
        if any(one.loss is not None for one in found):
            found += [_Found(f"{text} in {where}.", data=True) for text in _bad_inputs(parts.batches[place])]
            break  # what comes later in the step follows from the same weights
    return found


def _where(parts: StepParts, place: int) -> str:
    batch, count = parts.batches[place], len(parts.batches)
    rows = next((len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim()), 0)
    text = f"micro-batch {place + 1} of {count}" if count > 1 else "the batch"
    if rows:
        text += f", rows {parts.first[place] + 1} to {parts.first[place] + rows} of the step"
    if place < len(parts.rows) and parts.rows[place]:
        known = list(parts.rows[place])
        shown = ", ".join(map(str, known[:_SHOWN])) + (", …" if len(known) > _SHOWN else "")
        text += f" (dataset[i], i = {shown})"
    return text


def _bad_inputs(batch: Mapping[str, Any]) -> list[str]:
    texts = []
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim():
            bad = (~torch.isfinite(value)).flatten(1).any(1) if value.dim() > 1 else ~torch.isfinite(value)
            if bad.any():
                texts.append(f"{name!r} holds NaN or infinite values at position {int(bad.nonzero()[0])}")
    return texts


def _lost(model: nn.Module) -> list[str]:
    """Names of the tensors that hold a value that is no finite number, on any process."""
    mine = [name for name, tensor in plain_parameters(model).items() if not finite(tensor)]
    return sorted({name for names in gather(mine) for name in names})


@torch.no_grad()
def finite(tensor: Tensor) -> bool:
    """Whether all values are finite numbers, at a tenth of the cost of looking at each: their sum tells."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]
    if not local.is_floating_point() or local.is_meta or local.element_size() == 1:
        return True  # packed weights; out of reach
    wide = torch.float64 if local.dtype == torch.float64 else torch.float32
    return bool(torch.isfinite(local.sum(dtype=wide))) or bool(torch.isfinite(local).all())


def _fix(found: Sequence[_Found]) -> str:
    if any(one.data for one in found):
        return "Mend or drop these rows."
    term = next((one.term for one in found if one.term), "")
    if term:
        return f"Weaken {term} by its settings, or drop it."
    return "Lower the learning rate, warm it up (warmup_steps), or train in fp32 or bf16 instead of fp16."
