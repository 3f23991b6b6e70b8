"""The loss of one optimizer step, under any loop: how much the step holds, each part's exact share, and the log."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import losses
from .batch_rows import number_of_rows
from .divergence import StepParts
from .errors import MethodError, TrainingError
from .layers import transformers_model
from .losses import StepTotals
from .plugin import LossTerm, Plugin, Run
from .tasks import Task
from .tasks.base import IGNORED

UNLABELLED_IN_A_ROW = 20
"""Steps without a single label, one after another: more than chance puts together where labels are rare."""


class StepLoss:
    """Knows the labels and rows of the whole optimizer step before its first micro-batch, and scales by them.

    Args:
        model: as built, not wrapped.
        task: counts the labels of a batch.
        gather: one process's numbers, shape (n,) → those of all processes, (processes, n).
        processes: how many share a step.
        rank: which of them this one is.
        together: average over the labels of all processes; otherwise each process averages over its own, and the
            means are averaged (`average_tokens_across_devices=False`).
    Attributes:
        done: how many of the step's micro-batches are done.
        copies: how often the micro-batch's rows come in the pass at work, whose loss is divided by it afterwards.
        parts: what the step is made of, for an error that has to say where it went wrong.
        needs_labels: whether a step without labels trains nothing; a loss of the user's own may do without.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        gather: Callable[[Tensor], Tensor] | None = None,
        processes: int = 1,
        rank: int = 0,
        together: bool = True,
    ) -> None:
        self._model: Any = transformers_model(model)
        self.task, self.processes = task, processes
        self._gather, self._rank, self._together = gather, rank, together
        self._totals = StepTotals(None, None, 1)
        self._uncounted = ""  # why the labels cannot be counted
        self._first_examples: list[int] = []
        self.done, self.copies = 0, 1
        self.parts = StepParts()
        self.needs_labels = True
        self._unlabelled = 0  # steps in a row without a label, up to the one before the step at work
        self._bare: bool | None = None  # whether that has none; None before the first, or where it has no batch
        self._means: dict[str, tuple[Tensor, int]] = {}  # loss term → sum of its means since the last log, how many

    def begin(self, batches: Sequence[Any], *, micro_batches: int) -> None:
        """Count what one optimizer step holds.

        Args:
            batches: this process's micro-batches of the step.
            micro_batches: as many as any process may have in a step; equal on all of them.
        Raises:
            TrainingError: no step has had a label for long.
        """
        self.check_labels(UNLABELLED_IN_A_ROW)
        self._unlabelled = self.unlabelled
        rows = [number_of_rows(batch) for batch in batches]
        labels, self._uncounted = 0.0, ""
        try:
            labels = float(sum(float(self.task.count(batch)) for batch in _mappings(batches)))
        except ValueError as without_labels:
            self._uncounted = str(without_labels)
        known = float(not self._uncounted and bool(batches))
        mine = torch.tensor([known, labels, *rows, *[0] * (micro_batches - len(rows))], dtype=torch.float64)
        # Every process takes part whatever it found, or the others would wait for it for ever.
        table = mine[None] if self.processes == 1 or self._gather is None else self._gather(mine)
        counts = table[:, 2:]  # (processes, micro-batches): rows
        before = counts.sum(0).cumsum(0) - counts.sum(0) + counts[: self._rank].sum(0)
        self._first_examples, self.done = [int(first) for first in before], 0
        self.parts = StepParts(batches=batches, first=self._first_examples)
        counted, filled = bool((table[:, 0] > 0).all()), bool((counts[:, : len(batches)] > 0).all())
        self._bare = counted and not bool(table[:, 1].any()) if bool(counts.any()) else None
        if not self._together:
            table, counts = mine[None], mine[None, 2:]
        self._totals = StepTotals(
            labels=float(table[:, 1].sum()) if counted else None,
            examples=float(counts.sum()) if filled else None,
            micro_batches=len(batches),
            processes=len(table),
        )

    @property
    def unlabelled(self) -> int:
        """Finished steps in a row, up to the last, in which nothing was to be learned."""
        if self._bare is None:
            return self._unlabelled
        other = self.parts.owners or (self.parts.batches and not self.parts.losses)  # a plugin's loss, or the loop's
        return self._unlabelled + 1 if self._bare and not other else 0

    def check_labels(self, steps: int) -> None:
        """Stop a run without labels, which would go on without training.

        Args:
            steps: so many in a row are too many; at the end of a run all that it made.
        Raises:
            TrainingError: they had no label at all, on any process.
        """
        if self.needs_labels and 0 < steps <= self.unlabelled:
            first = ", or the first of its row" if self.task.predicts_next else ""
            raise TrainingError(
                f"The last {self.unlabelled} steps had no label that the loss counts, so nothing was learned in them: "
                f"all are {IGNORED}{first}. Look at what makes them: a prompt that fills max_length, a mask over "
                "the wrong part, the collator."
            )

    @property
    def totals(self) -> StepTotals | None:
        """What the step holds, or None where its labels cannot be counted."""
        return self._totals if self._totals.labels is not None else None

    @property
    def first_example(self) -> int:
        """Position of the next micro-batch's first row in the step's rows, as one process would have ordered them."""
        return self._first_examples[self.done] if self.done < len(self._first_examples) else 0

    def weight(self, batch: Mapping[str, Any]) -> float:
        """By what the mean over this micro-batch's labels is multiplied to become its share of the whole step's."""
        totals = self._totals
        assert totals.labels is not None
        return float(self.task.count(batch)) * totals.processes / max(totals.labels, 1)

    def share(self, mean: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """The task's mean over this micro-batch → its share of the mean over the whole step."""
        weight = self.weight(batch)
        # The mean over nothing is NaN; its share of the step is nothing, still with a graph. Where the weight is 1, as
        # with a single micro-batch, the loss stays what it was, bit for bit.
        return mean * weight if weight else mean.nan_to_num() * 0

    def router_excess(self, output: Any, factor: float) -> Tensor | float:
        """How much too heavy a mixture of experts' router loss stands in a loss that was scaled by its labels.

        Its model adds coefficient · auxiliary loss to each micro-batch; right is the mean over all micro-batches.

        Args:
            output: of the micro-batch's pass.
            factor: by what the model's loss was multiplied since.
        """
        auxiliary = getattr(output, "aux_loss", None)
        excess = factor - self.copies / self._totals.micro_batches
        if auxiliary is None or excess == 0:
            return 0.0
        return excess * _router_coefficient(self._model) * auxiliary

    def terms(
        self, plugins: Sequence[Plugin], run: Run, batch: Mapping[str, Any], output: Any, *, weight: float = 1.0
    ) -> list[Tensor]:
        """What the plugins add to this micro-batch's loss, each exactly scaled.

        Args:
            weight: of the pass that gave `output`.
        Raises:
            MethodError: a term counts labels or examples, and the batches have none to count.
        """
        run.batch, run.first_example, run.copies = batch, self.first_example, self.copies
        terms = losses.collect(plugins, run, batch, output, self.parts.owners)
        for name, term in terms.items():
            self._check_countable(name, term)
            self._note(name, term)
            self.parts.add(name, term.sum)
        shares = [losses.contribution(term, self._totals, copies=self.copies) for term in terms.values()]
        return shares if weight == 1 else [weight * share for share in shares]

    def _check_countable(self, name: str, term: LossTerm) -> None:
        if term.per == "label" and self._totals.labels is None:
            why = self._uncounted or "another process has a batch without labels."
        elif term.per == "example" and self._totals.examples is None:
            why = "a batch has no tensor whose rows could be counted."
        else:
            return
        raise MethodError(
            f"The loss term {name!r} counts per {term.per}, and the {term.per}s of this step are unknown: {why} A term "
            'with per="step" needs no count.'
        )

    def advance(self) -> None:
        """A micro-batch is done."""
        self.done += 1

    def _note(self, name: str, term: LossTerm) -> None:
        total, number = self._means.get(name, (torch.zeros(()), 0))
        self._means[name] = (losses.mean(term) + total.to(term.sum.device), number + 1)

    def drain(self) -> dict[str, float]:
        """Loss term → its mean over the micro-batches since this was last asked."""
        means = {name: round(float(total) / number, 6) for name, (total, number) in self._means.items()}
        self._means.clear()
        return means


def _router_coefficient(model: Any) -> float:
    """What the model multiplies its router loss by. Most keep it, some look it up in their text model's config."""
    names = ("router_aux_loss_coef", "aux_loss_coef")
    holders = (model, model.config.get_text_config())
    return next((float(getattr(h, n)) for h in holders for n in names if getattr(h, n, None) is not None), 0.0)


def _mappings(batches: Sequence[Any]) -> list[Mapping[str, Any]]:
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise ValueError(f"a batch is a {type(batch).__name__}; expected a mapping of the model's arguments.")
    return list(batches)
