"""Does plain PEFT load what was saved, and is it the same model?"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from examples import inputs

PLAIN_PEFT = Path(__file__).with_name("plain_peft.py")


@dataclass(frozen=True)
class Reloaded:
    """What came back.

    Attributes:
        sentences: how many were compared.
        max_difference: the largest |Δ logit| between the trained model and the reloaded one.
        adapter_bytes, base_bytes: sizes of the two files of weights.
    """

    sentences: int
    max_difference: float
    adapter_bytes: int
    base_bytes: int


def save_and_reload(model: Any, texts: Sequence[str], folder: Path) -> Reloaded:
    """Save `model`, load it in a fresh process that never imports peft_plus, and compare the logits.

    Raises:
        RuntimeError: the fresh process failed; carries what it said.
    """
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(inputs.minilm())
    with torch.no_grad():
        here = model.eval()(**tokenizer(list(texts), padding=True, return_tensors="pt")).logits

    # -I: neither this folder nor PYTHONPATH is on the path. As many threads as here, since their number decides in
    # which order a sum is added up.
    command = [sys.executable, "-I", str(PLAIN_PEFT), str(inputs.minilm()), str(folder), str(torch.get_num_threads())]
    done = subprocess.run(command, input=json.dumps(list(texts)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"Reloading {folder} in plain PEFT failed:\n{done.stderr}")
    there = torch.tensor(json.loads(done.stdout))
    return Reloaded(
        sentences=len(texts),
        max_difference=float((here - there).abs().max()),
        adapter_bytes=(folder / "adapter_model.safetensors").stat().st_size,
        base_bytes=(inputs.minilm() / "model.safetensors").stat().st_size,
    )
