"""What a user's `compute_metrics` returns: looked at before it is logged, saved and compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from torch import Tensor
from transformers.trainer_utils import denumpify_detensorize

from .errors import MethodError, TrainingError


def named_metrics(
    compute: Callable[..., Any] | None, watched: Collection[str], *, saved: bool
) -> Callable[..., Any] | None:
    """`compute_metrics` with errors that name it.

    Args:
        watched: names of metrics that must be numbers; the others are only logged.
        saved: whether checkpoints hold the log.
    """
    if compute is None:
        return None

    def named(*args: Any, **kwargs: Any) -> Any:
        try:
            metrics = compute(*args, **kwargs)
        except Exception as error:
            raise TrainingError(  # of these predictions; those of another run may do
                f"compute_metrics ({_called(compute)}) failed: {type(error).__name__}: {error}. Mend it; "
                "trainer.evaluate() tries it without training."
            ) from error
        if not isinstance(metrics, Mapping):
            raise MethodError(
                f"compute_metrics ({_called(compute)}) returned {metrics!r}; expected a mapping from names to numbers."
            )
        for name, value in metrics.items():
            if str(name).removeprefix("eval_") in watched and not _is_number(value):
                raise MethodError(
                    f"compute_metrics ({_called(compute)}) returned {name!r}: {value!r}, and metric_for_best_model "
                    "compares it: return a single number, or choose another metric."
                )
            if saved and not _can_be_saved(value):
                raise MethodError(
                    f"compute_metrics ({_called(compute)}) returned {name!r}: {value!r}, a {type(value).__name__}, "
                    "which no checkpoint's log can hold. Return numbers, or lists of them (.tolist())."
                )
        return metrics

    return named


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, int | float | np.generic) and not isinstance(value, np.character)


def _can_be_saved(value: Any) -> bool:
    """Whether it is json, once the Trainer has made numbers of NumPy's and torch's."""
    try:
        json.dumps(denumpify_detensorize(value))
    except (TypeError, ValueError):
        return False
    return True


def _called(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__name__)
