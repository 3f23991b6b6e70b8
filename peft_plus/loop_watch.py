"""What the body of a bare loop forgets or does twice is told: it would train on wrong gradients without a word."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import EngagementError, MethodError

_BODY = "Put the body of the loop into `with accelerator.accumulate(session.model):`."


class LoopWatch:
    """Follows one optimizer step after another.

    Attributes:
        size: micro-batches of the step at work; 0 between steps.
        updated: whether the optimizer has made this step.
        skipped: whether a gradient scaler is known to have left its update out.
    """

    def __init__(self) -> None:
        self.size, self.updated, self.skipped = 0, False, False
        self._place = 0  # of the micro-batch in hand
        self._step = 0
        self._cleared = True  # since the last update
        self._updates = self._at_rest = 0  # all, and those at a learning rate of 0
        self._held: tuple[nn.Parameter, Tensor] | None = None  # a gradient that the last update used

    def listen(self, optimizer: Optimizer, settle: Callable[[], None]) -> None:
        """Learn of each `zero_grad` that really acts: Accelerate's own wrapper leaves them out inside a step.

        Args:
            settle: finds out whether a gradient scaler has left the update out.
        """
        zero_grad = optimizer.zero_grad

        @functools.wraps(zero_grad)
        def noted(*args: Any, **kwargs: Any) -> Any:
            settle()
            if self.size > 1 and self._place and not self.over:
                raise MethodError(
                    f"optimizer.zero_grad() before optimizer.step() would throw away the gradients of {self._place} of "
                    f"the {self.size} micro-batches of step {self._step + 1}. Put it after optimizer.step()."
                )
            self._cleared = True
            return zero_grad(*args, **kwargs)

        optimizer.zero_grad = noted

    def begin(self, step: int, size: int) -> None:
        """`step` steps are finished; the next one has `size` micro-batches."""
        self._step, self.size, self._place = step, size, 0
        self.updated = self.skipped = False

    @property
    def over(self) -> bool:
        """Whether the step has made its update, or lost it."""
        return self.updated or self.skipped

    @property
    def at_last(self) -> bool:
        """Whether the body has the step's last micro-batch in hand."""
        return 0 < self.size == self._place + 1

    def turn(self, place: int) -> None:
        """The body of the loop gets the micro-batch number `place` of the step."""
        self._place = place

    def before_update(self, *, at_rest: bool) -> None:
        """Right before `optimizer.step()`.

        Args:
            at_rest: whether every learning rate is 0.
        """
        if not self.size:
            raise MethodError(f"optimizer.step() belongs into the body of the loop, once for each step. {_BODY}")
        if self.updated:
            raise MethodError(
                f"optimizer.step() was called twice in step {self._step + 1}: the same gradients would act twice, and "
                "schedules run ahead."
            )
        if self._place < self.size - 1:
            raise MethodError(f"The optimizer was stepped after micro-batch {self._place + 1} of {self.size}. {_BODY}")
        if self._held is not None and not self._cleared:
            tensor, gradient = self._held
            if tensor.grad is gradient:  # nor was it cleared in any other way
                raise MethodError(
                    f"optimizer.zero_grad() was not called after step {self._step}: its gradients would be added to "
                    f"those of step {self._step + 1}. Call it after optimizer.step()."
                )

        self._updates, self._at_rest = self._updates + 1, self._at_rest + at_rest

    def check_rates(self) -> None:
        """At the end of a run. A single update may have stood at the begin of a warm-up."""
        if self._updates > 1 and self._updates == self._at_rest:
            raise EngagementError(
                f"All {self._updates} updates were made at a learning rate of 0, so nothing was learned: a schedule "
                "with a warm-up waits for schedule.step() in the body of the loop."
            )

    def after_update(self, tensors: Collection[nn.Parameter]) -> None:
        """Right after `optimizer.step()`.

        Args:
            tensors: what may train.
        """
        self.updated, self._cleared = True, False
        held = min((t for t in tensors if t.grad is not None), key=lambda t: t.numel(), default=None)
        self._held = None if held is None or held.grad is None else (held, held.grad)

    def end(self) -> None:
        """The body has seen the step's last micro-batch."""
        if not self.over:
            raise MethodError(f"Nobody called optimizer.step() in step {self._step + 1}.")
        self.size = 0
