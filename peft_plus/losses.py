"""The exact scale of loss terms: each is divided once, by the whole optimizer step's count.

Σ over micro-batches and processes of `sum`, over Σ of `count`, is what one big batch would give. Dividing each
micro-batch by its own count instead gives a mean of means, which differs as soon as batches are ragged.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from .ask import ask, origin_of
from .errors import PluginError
from .layers import transformers_model
from .plugin import LossTerm, Plugin, Run, Unit
from .tasks.infer import has_causal_loss

UNITS = get_args(Unit)


@dataclass(frozen=True)
class StepTotals:
    """How much one optimizer step holds, over all its micro-batches and all processes.

    Attributes:
        labels: labels that the task's loss averages over; None where they cannot be counted.
        examples: rows; None where a batch has none.
        micro_batches: of one process.
        processes: how many share the counts; their gradients are averaged afterwards.
    """

    labels: float | None
    examples: float | None
    micro_batches: int
    processes: int = 1


def collect(
    plugins: Sequence[Plugin],
    run: Run,
    batch: Mapping[str, Any],
    output: Any,
    owners: dict[str, str] | None = None,
) -> dict[str, LossTerm]:
    """Ask each plugin for its terms.

    Args:
        owners: filled with term → the plugin that added it, as messages name it.
    Raises:
        PluginError: the answer is no mapping, a name came twice, or a term is no scalar tensor.
    """
    terms: dict[str, LossTerm] = {}
    owner: dict[str, str] = {} if owners is None else owners
    for plugin in plugins:
        answer = ask(plugin, "loss_terms", run, batch, output)
        label = f"plugin {plugin.name!r} ({origin_of(plugin)})"
        if not isinstance(answer, Mapping) or not all(isinstance(name, str) for name in answer):
            raise PluginError(
                f"{label}: loss_terms returned {_shape(answer)}; expected a mapping from names to LossTerms, {{}} for "
                "none."
            )
        for name, term in answer.items():
            if name in terms:
                raise PluginError(f"{owner[name]} and {label} both add a loss term called {name!r}.")
            if not isinstance(term, LossTerm) or not isinstance(term.sum, Tensor) or term.sum.dim() != 0:
                raise PluginError(
                    f"{label}: the loss term {name!r} is {_shape(term)}; expected LossTerm(sum=a scalar tensor, "
                    "count=…)."
                )
            if term.per not in UNITS:
                raise PluginError(f"{label}: the loss term {name!r} has per={term.per!r}; one of {list(UNITS)}.")
            terms[name], owner[name] = term, label
    return terms


def contribution(term: LossTerm, totals: StepTotals, *, copies: int = 1) -> Tensor:
    """What this micro-batch adds to the loss of its optimizer step, to be backpropagated with no further scaling.

    Averaging the gradients of several processes divides by their number, so a sum over processes is multiplied by it
    first; a `per="step"` term is an average already.

    Args:
        copies: how often each row came in the pass that the term was taken over.
    """
    if term.per == "step":
        return term.sum / totals.micro_batches
    total = totals.labels if term.per == "label" else totals.examples
    assert total is not None
    return term.sum * (totals.processes / max(total, 1) / copies)


def mean(term: LossTerm) -> Tensor:
    """The term's mean over its own micro-batch, without gradient, for the log."""
    if term.per == "step":
        return term.sum.detach()
    return term.sum.detach() / torch.as_tensor(term.count, device=term.sum.device).clamp(min=1)


def scales_by_items(model: nn.Module) -> bool:
    """Whether the model's own loss really divides by `num_items_in_batch`.

    Only `ForCausalLMLoss`, called by the model's forward through `self.loss_function`, is known to; a model may also
    say so itself (`accepts_loss_kwargs`).
    """
    base = transformers_model(model)
    declared = getattr(base, "accepts_loss_kwargs", None)
    if declared is not None:
        return bool(declared)
    return has_causal_loss(base) and "loss_function(" in inspect.getsource(inspect.unwrap(type(base).forward))


def _shape(term: Any) -> str:
    if isinstance(term, LossTerm):
        return f"LossTerm with sum {tuple(term.sum.shape) if isinstance(term.sum, Tensor) else type(term.sum).__name__}"
    return type(term).__name__
