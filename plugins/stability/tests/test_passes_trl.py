"""Several passes in TRL's SFTTrainer, however it computes its loss: each has the scale of the plain one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import trl
from torch import Tensor

from peft_plus import get_model, with_plugins
from tests.consistency import distance
from tests.test_trl import LORA, SFT, config, llama, trained, weights

pytestmark = pytest.mark.filterwarnings(
    # TRL 1.16's own: deprecated settings that users still pass.
    "ignore:`(label_smoothing_factor|compute_loss_func)` is deprecated:FutureWarning"
)

STILL = {
    "r_drop": {"weight": 1.0},  # without dropout both copies are the plain pass
    "freelb": {"steps": 2, "init_magnitude": 0.0, "step_size": 1e-9},
    "neftune": {"alpha": 1e-9},
}
"""Passes that differ from the plain one by nothing, or by less than rounding."""


@pytest.fixture(autouse=True)
def _no_bars() -> Any:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def moved_by(way: str, more: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    torch.manual_seed(1)
    model = get_model(llama(), {"lora": LORA, **more})
    before = weights(model)
    settings = {**SFT[way].settings, "optim": "sgd", "learning_rate": 0.1, "max_steps": 2, "max_grad_norm": 0.0}
    args = config(trl.SFTConfig, folder, **settings)
    trained(with_plugins(trl.SFTTrainer), model, args, SFT[way].dataset(), **SFT[way].arguments())
    return {name: tensor - before[name] for name, tensor in weights(model).items() if "lora" in name}


@pytest.mark.parametrize("way", ["default", "packing", "padding_free", "label_smoothing", "compute_loss_func", "dft"])
def test_passes_that_see_the_same_train_the_same(way: str, tmp_path: Path) -> None:
    plain = moved_by(way, {}, tmp_path)
    assert sum(float(step.norm()) for step in plain.values()) > 1e-3
    for name, settings in STILL.items():
        assert distance(moved_by(way, {name: settings}, tmp_path), plain) < 1e-4, name
