"""The weights that are evaluated, saved and kept at the end, where a plugin has others than those that train."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager

from torch import Tensor

from .ask import ask
from .compose import Plan, who
from .errors import PluginError
from .plugin import Run
from .run_weights import RunWeights
from .stages import Stage


class EvalWeights:
    """Puts a plugin's `eval_weights` into the model for a while, or for good.

    Args:
        plan: what hangs on the model.
        stage: the stage that runs.
        weights: of all that may train in it.
    Attributes:
        inside: the weights that train, while others stand in the model.
    """

    def __init__(self, plan: Plan, stage: Stage, weights: RunWeights) -> None:
        self._plugin = next((p for p in plan.active(stage) if "eval_weights" in p.hooks()), None)
        self._origins, self._weights = plan.origins, weights
        self.inside: Mapping[str, Tensor] | None = None

    @contextmanager
    def standing(self, run: Run) -> Generator[None]:
        """While this is open they stand in the model; then those that train, bit for bit. Once open, it may be nested.

        Every process must open it.
        """
        others = None if self.inside is not None else self._asked(run)
        if others is None:
            yield
            return
        self.inside = {name: self._weights.whole(name).clone() for name in others}
        try:
            self._weights.write(others)
            yield
        finally:
            training, self.inside = self.inside, None
            self._weights.write(training)

    def stay(self, run: Run) -> None:
        """At the end of the stage."""
        others = self._asked(run)
        if others is not None:
            self._weights.write(others)

    def training(self, run: Run) -> dict[str, Tensor]:
        """The weights that train, where a checkpoint's model files hold others: whole, in memory."""
        names = list(self.inside if self.inside is not None else self._asked(run) or ())
        inside = self.inside or {}
        now = ((name, inside[name] if name in inside else self._weights.whole(name)) for name in names)
        return {name: tensor.to("cpu", copy=True) for name, tensor in now}

    def _asked(self, run: Run) -> Mapping[str, Tensor] | None:
        if self._plugin is None:
            return None
        answer = ask(self._plugin, "eval_weights", run)
        if answer is None:
            return None
        known = self._weights.tensors
        fits = isinstance(answer, Mapping) and all(
            name in known and isinstance(value, Tensor) and value.shape == known[name].shape
            for name, value in answer.items()
        )
        if not fits:
            raise PluginError(
                f"{who(self._plugin, self._origins)}: eval_weights must return a mapping from names of parameters that "
                "train to whole tensors of their shapes, or None."
            )
        return answer or None
