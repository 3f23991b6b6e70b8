"""Where a training run stands, and what it offers to the hooks that it asks. Imports no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Generator, Tensor
    from torch.nn import Module
    from torch.optim import Optimizer

    from .layers import Layers
    from .plugin import Param
    from .run_data import RunData
    from .run_weights import RunWeights
    from .stages import Stage
    from .tasks import Task
    from .trunk import TrunkService

logger = logging.getLogger(__name__)

_COPY = 1 << 40
"""More than a step has examples: what the numbers of one more copy begin with."""


@dataclass(kw_only=True)
class Run:
    """Where training stands, and the services a hook may call. Made and advanced by the loop, read by plugins.

    Attributes:
        model: the model as `get_model` returned it, never wrapped by DDP.
        task: the task, which knows where the logits are.
        num_blocks: L, the number of blocks; `Param.depth` runs from 0 to L + 1.
        params: every parameter that may train in this stage, in the model's order.
        depths: the depths at which something may train in this stage, from the top (head) down.
        layers: the depth of every parameter, and the names of the blocks.
        stage: the stage that is running; `stages` are all of them, in order.
        step: finished optimizer steps of this stage.
        max_steps: optimizer steps of this stage.
        steps_per_epoch: optimizer steps in one pass over the data.
        optimizer: the stage's optimizer, or None before it exists.
        base_lr: the learning rate that the user set for this stage.
        seed: seed of every random stream.
        batch: the micro-batch being worked on, with the labels.
        first_example: position, within the whole optimizer step over all processes, of this batch's first row.
        copies: how often the rows of `batch` come in it, one whole batch after another.
        batch_size: rows of one micro-batch of one process; 0 before the loop has made its loader.
        processes: how many processes share an optimizer step.
        last_metrics: what the last evaluation returned.
        last_evaluation_step: the step at which it did, or None before the first: how an evaluation is told from the
            next.
        logged: what `log` was given since the loop's last log line.
        trunk: what keeps the output of the frozen lower blocks, behind `forward(…, perturb={"trunk": δ})`.
        tokenizer: in `task_data`: what made tokens of the data; None where it is not known.
        arguments: in `plan_budget`: the Trainer's TrainingArguments as they were given, to be read only; else None.
        evaluates: whether the loop evaluates while it trains; None where it cannot be known, as in a Session.
        data: the stage's data, behind `examples` and `task_gradients`.
        weights: the tensors of `params`, behind `weight`, `gradient`, `keep` and `restore`.
        stop_reasons: what `stop` was given.
    """

    model: Module
    task: Task
    num_blocks: int
    params: tuple[Param, ...] = ()
    depths: tuple[int, ...] = ()
    layers: Layers | None = None
    stages: tuple[Stage, ...] = ()
    stage: Stage | None = None
    step: int = 0
    max_steps: int = 0
    steps_per_epoch: int = 0
    optimizer: Optimizer | None = None
    base_lr: float = 0.0
    seed: int = 0
    batch: Mapping[str, Any] = field(default_factory=dict)
    first_example: int = 0
    copies: int = 1
    batch_size: int = 0
    processes: int = 1
    last_metrics: Mapping[str, float] = field(default_factory=dict)
    last_evaluation_step: int | None = None
    logged: dict[str, float] = field(default_factory=dict)
    tokenizer: Any = field(default=None, repr=False)
    arguments: Any = field(default=None, repr=False)
    evaluates: bool | None = None
    data: RunData | None = field(default=None, repr=False)
    trunk: TrunkService | None = field(default=None, repr=False)
    weights: RunWeights | None = field(default=None, repr=False)
    stop_reasons: list[str] = field(default_factory=list)

    @property
    def epoch(self) -> int:
        """Finished passes over the data, derived from the step, so that a resumed run agrees with itself."""
        return self.step // self.steps_per_epoch if self.steps_per_epoch else 0

    @property
    def rehearsal(self) -> bool:
        """Whether the model is a skeleton without weights, in an `on_build` before any load: nothing to measure."""
        return all(parameter.is_meta for parameter in self.model.parameters())

    def forward(
        self,
        batch: Mapping[str, Any],
        *,
        perturb: Mapping[str, Tensor | Callable[[Tensor], Tensor]] | None = None,
        weights: Mapping[str, Tensor] | None = None,
        labels: bool = False,
    ) -> Any:
        """One more pass of the model over `batch`, in the same autocast and train mode as the first.

        Args:
            batch: the model's keyword arguments.
            perturb: `{"embeddings": δ}` adds δ to the output of the input embeddings, in fp32; `{"trunk": δ}` to the
                output of the highest block below all that trains now, which is not computed again but shared with the
                pass before. δ has that output's shape, e.g. (batch, tokens, width), or is a function from that output
                to δ.
            weights: name of a parameter → tensor to compute with in its place, on any device and in any dtype; there
                is no gradient then. Where they agree with the model's own up to the highest frozen block, its output
                is shared with the pass before.
            labels: whether the model gets them, so that its output has the mean loss that `task.loss` reads.
        Returns: the model's output.
        Raises:
            ValueError: the place to perturb is unknown, was never reached, or δ is lost in the embeddings' dtype; a
                name in `weights` is unknown, or the model is split over processes.
        """
        from .forward import second_pass

        trunk = self.trunk
        if weights is not None and batch is not self.batch:
            trunk = None  # it keeps that of the micro-batch at work
        return second_pass(self.model, batch, perturb or {}, trunk, weights, labels=labels)

    def generator(self, *key: int | str, device: Any = "cpu") -> Generator:
        """A random stream that depends only on the seed, the stage, the step and `key`.

        Equal on every process and after a resume. For noise by example, put the example's position in the step into
        the key: `run.generator("r3f", run.example(row))`.
        """
        import torch

        stage = self.stage.name if self.stage else ""
        text = "\x1f".join(map(str, (self.seed, stage, self.step, *key)))
        seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
        return torch.Generator(device=device).manual_seed(seed)

    def example(self, row: int) -> int:
        """The number of the example in a row of `batch`: its position in the optimizer step, over all processes.

        So it is the same on one process and on several. Where a pass has copies of the batch (`Pass.copies`), each has
        numbers of its own.
        """
        from .batch_rows import number_of_rows

        rows = max(1, number_of_rows(self.batch) // self.copies)
        return self.first_example + row % rows + (row // rows) * _COPY

    def log(self, **values: float) -> None:
        """Hand numbers to the loop's own log; they appear with its next line."""
        self.logged.update(values)

    def at(self, step: int) -> Run:
        """This run as it stands at another step, e.g. for a random stream that stays the same for a while."""
        return dataclasses.replace(self, step=step)

    def gradient(self, param: Param) -> Tensor | None:
        """The gradient of this step, detached and whole, in `on_pre_optimizer_step`; None where there is none.

        Where weights are split over processes, every process must call it.
        """
        return self._weights().gradient(param.name)

    def weight(self, param: Param) -> Tensor:
        """The weight as it is now, detached and whole. It changes with the next update: clone what is to stay.

        Where weights are split over processes, every process must call it.
        """
        return self._weights().whole(param.name)

    def keep(self, name: str, *, optimizer: bool = False) -> None:
        """Copy the weights of everything in `params` into memory, under a name; what was kept under it is replaced.

        In `on_stage_begin`, `on_step_end` and `on_evaluate`. Checkpoints hold the copies; they last as long as the
        stage.

        Args:
            optimizer: copy its state as well, which `restore` then puts back, too. Not where weights are split.
        """
        self._weights().keep(name, optimizer=optimizer)

    def kept(self, name: str) -> bool:
        """Whether something is kept under that name."""
        return name in self._weights().kept

    def restore(self, name: str) -> None:
        """Put the weights back that `keep` copied, bit for bit, at once. The optimizer's state stays, unless kept too.

        In `on_step_end`, `on_evaluate` and `on_stage_end`.

        Raises:
            ValueError: nothing is kept under that name.
        """
        self._weights().restore(name)

    def hidden(self, batch: Mapping[str, Any], depth: int, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """What block `depth` makes of a batch, in eval mode and without gradient; nothing above it is computed.

        Args:
            batch: the model's keyword arguments; labels do not matter.
            depth: 1..L.
            weights: name → tensor to compute with instead of the model's own.
        Returns: (rows, tokens, width).
        """
        from .trunk import hidden

        assert self.layers is not None
        return hidden(self.model, self.layers, batch, depth, weights)

    def examples(self, rows: int = 1, *, limit: int | None = None) -> Iterator[Mapping[str, Any]]:
        """A pass over the stage's training data in their own order, in `on_stage_begin`: batches on the model's device.

        Every process gets every row. It draws no random number that the run would draw.

        Args:
            rows: of a batch.
            limit: stop after so many rows; None for all.
        Raises:
            ValueError: the data are read as a stream, or the loop does not tell them.
        """
        return self._data().batches(rows, limit)

    def task_gradients(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The gradient of the task's own mean loss over a batch, in eval mode: name → tensor, of all in `params`.

        `.grad` stays as it is. In `on_stage_begin`, where nothing is frozen yet.

        Raises:
            ValueError: the model is split over processes.
        """
        return self._data().gradients(batch, [param.name for param in self.params])

    def _data(self) -> RunData:
        if self.data is None:
            raise ValueError("run.examples and run.task_gradients belong into on_stage_begin.")
        return self.data

    def mean(self, value: float) -> float:
        """The mean of a number over all processes, equal on each. Every process must call it."""
        from .distributed import gather

        values = gather(float(value))
        return sum(values) / len(values)

    def stop(self, reason: str) -> None:
        """End the run after this step. The reason is logged."""
        self.stop_reasons.append(reason)
        logger.warning("A plugin ends the training at step %d: %s", self.step, reason)

    def _weights(self) -> RunWeights:
        if self.weights is None:  # a run that nobody trains, as in a plugin's own tests
            from .distributed import plain_parameters
            from .run_weights import RunWeights

            tensors = plain_parameters(self.model)
            self.weights = RunWeights(self.model, {param.name: tensors[param.name] for param in self.params})
        return self.weights
