"""The passes of a micro-batch, where a plugin makes several, or another one, in the place of the plain one."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from .ask import ask, origin_of
from .batch_rows import repeated
from .compose import Plan
from .errors import PluginError
from .forward import NoiseError, perturbed
from .plugin import Pass, Plugin, Run
from .stages import Stage


class Passes:
    """Asks the plugin of a stage that makes them.

    Args:
        model: as built, not wrapped.
        plan: what hangs on it.
        stage: the stage that runs.
    """

    def __init__(self, model: nn.Module, plan: Plan, stage: Stage) -> None:
        self._model = model
        self._plugin = next((p for p in plan.active(stage) if "passes" in p.hooks()), None)

    def of(self, run: Run, batch: Mapping[str, Any]) -> MicroBatchPasses | None:
        """Those of a micro-batch; None for the plain one."""
        answer = None if self._plugin is None else ask(self._plugin, "passes", run, batch)
        return None if answer is None else MicroBatchPasses(self._model, self._plugin, run, batch, answer)  # type: ignore[arg-type]


class MicroBatchPasses:
    """The passes of one micro-batch.

    Args:
        answer: the plugin's generator.
    """

    def __init__(
        self,
        model: nn.Module,
        plugin: Plugin,
        run: Run,
        batch: Mapping[str, Any],
        answer: Generator[Pass, Tensor | None, None],
    ) -> None:
        self._model, self._plugin, self._run, self._batch, self._answer = model, plugin, run, batch, answer

    def make(
        self,
        loss: Callable[[Mapping[str, Any], Pass], Tensor],
        *,
        backward: Callable[[Tensor], None],
        alone: Callable[[], AbstractContextManager[Any]],
    ) -> Tensor:
        """Every pass, and every backward but the last.

        Args:
            loss: (batch with its copies, what pass it is) → the weighted loss of the pass, with all terms.
            backward: of a pass that is not the last.
            alone: a context in which processes exchange no gradients.
        Returns: the loss of the final pass, to be backpropagated, with the value of the others' added to it.
        Raises:
            PluginError: the plugin's generator fails, answers with something else, or ends without a final pass; its
                noise does not fit, or would be lost.
        """
        gradient: Tensor | None = None
        others: Tensor | None = None
        while True:
            one = self._next(gradient)
            with ExitStack() as stack:
                stack.enter_context(nullcontext() if one.final else alone())
                stack.enter_context(self._own_errors())
                noise = stack.enter_context(perturbed(self._model, one.perturb, self._run.trunk))
                part = loss(repeated(self._batch, one.copies), one)
                if one.final:
                    self._answer.close()
                    return part if others is None else part + others
                others = part.detach() + (0 if others is None else others)
                backward(part)
            gradient = None if noise is None or noise.delta is None else noise.delta.grad

    @contextmanager
    def _own_errors(self) -> Generator[None]:
        """What is wrong with the noise is told under the plugin's name."""
        try:
            yield
        except NoiseError as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> PluginError:
        label = f"plugin {self._plugin.name!r} ({origin_of(self._plugin)})"
        return PluginError(f"{label} failed in passes at step {self._run.step}: {type(error).__name__}: {error}")

    def _next(self, gradient: Tensor | None) -> Pass:
        label = f"plugin {self._plugin.name!r} ({origin_of(self._plugin)})"
        try:
            one = self._answer.send(gradient) if gradient is not None else next(self._answer)
        except StopIteration:
            raise PluginError(
                f"{label}: its passes ended without a final one: yield Pass(…, final=True) last."
            ) from None
        except Exception as error:
            raise self._failed(error) from error
        if not isinstance(one, Pass) or one.copies < 1:
            raise PluginError(f"{label}: its passes gave {one!r}; expected a Pass with copies ≥ 1.")
        return one
