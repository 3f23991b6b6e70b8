"""The global random generators of a process: their state, taken and put back."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from .errors import CheckpointError

logger = logging.getLogger(__name__)


def rng_state() -> dict[str, Any]:
    """The state of every global random generator of this process: Python's, numpy's, torch's, the accelerators'."""
    state: dict[str, Any] = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    accelerator = _accelerator()
    if accelerator is not None:
        kind, module = accelerator
        if everywhere := _function(module, "get_rng_state_all"):
            state[kind] = list(everywhere())
        else:
            state[kind] = [_function(module, "get_rng_state", required=True)()]
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put back what `rng_state` returned. On other or fewer accelerators than it was taken on, says so in a warning."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    accelerator = _accelerator()
    kind, module = accelerator or ("", None)
    saved = {name: len(states) for name, states in state.items() if name not in ("python", "numpy", "cpu")}
    here = {kind: _devices(module)} if accelerator else {}
    if saved != here:
        logger.warning(
            "The random state was saved on %s, this process has %s: random numbers drawn there will be others.",
            *(" and ".join(f"{count} {name}" for name, count in found.items()) or "a CPU" for found in (saved, here)),
        )
    if kind not in saved:
        return
    if everywhere := _function(module, "set_rng_state_all"):
        everywhere(state[kind][: here[kind]])
    else:
        _function(module, "set_rng_state", required=True)(state[kind][0])


def _devices(module: Any) -> int:
    return module.device_count() if _function(module, "set_rng_state_all") else 1


def _accelerator() -> tuple[str, Any] | None:
    """Kind and torch module of the accelerator in use (`cuda`, `xpu`, `npu`, `mps`, …), or None on a CPU."""
    if not torch.accelerator.is_available():
        return None
    device: Any = torch.accelerator.current_accelerator()
    return device.type, torch.get_device_module(device)


def _function(module: Any, name: str, required: bool = False) -> Any:
    """`torch.cuda.get_rng_state_all`; some vendors have it only in `torch.npu.random`."""
    found = getattr(module, name, None) or getattr(getattr(module, "random", None), name, None)
    if found is None and required:
        raise CheckpointError(f"{module.__name__} cannot tell its random state, so no run on it can be resumed.")
    return found
