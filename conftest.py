"""What every test stands on: one thread, no network, fixed seeds."""

from __future__ import annotations

import gc
import os

# Before anything reads them: the hub client and the tokenizers look at these once, when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _what_is_imported_is_no_garbage() -> None:
    """Trainer looks for garbage around each training; among all that a test's modules import, that takes 0.3 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def one_accelerator_at_a_time() -> Iterator[None]:
    """Accelerate keeps its state in classes: the test starts with none, and leaves none."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    def reset() -> None:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()

    reset()
    yield
    reset()


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Whatever the order of the tests, each starts from the same streams."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
