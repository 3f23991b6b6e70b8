"""What only GPUs can show: each config of `examples/launch` trains there, and all end with nearly the same adapter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.models import tiny

from .launch import ROOT
from .test_launch import FOLDER, inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
LIMIT = 300
BERT = "--fsdp_transformer_layer_cls_to_wrap=BertLayer"
LAUNCHES = {
    "ddp.yaml": (["lora", "gradual_unfreeze", "llrd", "r3f"], ()),
    "fsdp2.yaml": (["lora", "gradual_unfreeze", "llrd", "r3f"], (BERT,)),
    "zero2.yaml": (["lora", "r3f"], ()),
    "zero3.yaml": (["lora", "r3f"], ()),
}
"""Config → method, and what a tiny BERT needs beside it."""
TOLERANCE = 1e-3
"""NCCL and the GPU's kernels sum in another order than one process does."""


def adapter(config: str | None, method: list[str], options: tuple[str, ...], folder: Path) -> dict[str, torch.Tensor]:
    """Train with the script, in fp32, on two GPUs or (without a config) on one with the doubled batch."""
    out = folder / "out"
    given = [*inputs(folder), "--output", str(out), "--method", *method]
    launcher: list[str] = []
    if config is not None:
        launcher = ["accelerate.commands.launch", "--config_file", str(FOLDER / config), "--num_processes", "2"]
        launcher += ["--mixed_precision", "no", "--main_process_port", "0", *options, "-m"]
    else:
        given += ["--batch", "8"]
    visible = {} if config is not None else {"CUDA_VISIBLE_DEVICES": "0"}
    subprocess.run(
        [sys.executable, "-m", *launcher, "examples.launch.train", *given],
        cwd=ROOT,
        env={**os.environ, **visible},
        check=True,
        timeout=LIMIT,
    )
    PeftModel.from_pretrained(tiny("bert", num_labels=2), out / "adapter")
    return load_file(out / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("config", LAUNCHES)
def test_two_gpus_end_like_one(config: str, tmp_path: Path) -> None:
    if config.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    method, options = LAUNCHES[config]
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    one = adapter(None, method, (), folders[0])
    two = adapter(config, method, options, folders[1])
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=TOLERANCE, atol=TOLERANCE * float(one[name].abs().max()))
