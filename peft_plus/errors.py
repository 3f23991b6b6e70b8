"""The errors of the core. Each message names what was wrong, where, and the fix."""

from __future__ import annotations


class MethodError(ValueError):
    """What the user asked for cannot be built: an unknown name or setting, or two things that do not fit together."""


class PluginError(RuntimeError):
    """A plugin that was asked for is missing, does not import, or breaks the contract. Names its distribution."""


class EngagementError(RuntimeError):
    """What a run declared and which tensors really moved do not agree."""


class DataError(ValueError):
    """The data cannot be trained on. Names the column, the row and the value."""


class TrainingError(RuntimeError):
    """A run went wrong in a way from which training on would not recover: it stopped before the next update.

    Attributes:
        weights_lost: whether the weights are ruined already, so that there is nothing to save.
    """

    weights_lost: bool = False


class DivergenceError(TrainingError):
    """The loss or its gradients were no finite number, or gradients overflowed at every scale.

    Attributes:
        reason: the message as it was raised, to which a Trainer adds where it saved the weights.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.reason = message


class CheckpointError(RuntimeError):
    """A training checkpoint is missing, damaged, unwritable, or belongs to another run. Nothing was changed or lost."""
