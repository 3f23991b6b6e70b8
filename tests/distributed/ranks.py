"""What each of two processes runs: every scenario in turn, since their start costs more than the runs.

`accelerate launch … -m tests.distributed.ranks FOLDER SECONDS LOOP:SCENARIO…` leaves the weights of rank r in
`LOOP:SCENARIO.r.safetensors`, and its error, or its stacks when the time is over, in `r.txt`. In the end rank 1 raises,
as the last scenario: nothing may hang then.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import traceback
from pathlib import Path

import torch
from accelerate import PartialState
from peft import LoraConfig
from safetensors.torch import save_file

from peft_plus import Plugin

from .loops import run
from .scenarios import LORA, SCENARIOS, Scenario


class Fails(Plugin):
    """Raises in the third step of rank 1."""

    name = "fails"

    def loss_terms(self, run, batch, output):
        if run.step == 2 and os.environ["RANK"] == "1":
            raise ZeroDivisionError("on this rank only")
        return {}


def main(folder: Path, names: list[str]) -> None:
    state = PartialState(cpu=True)
    if state.num_processes != 2 or state.backend != "gloo":
        raise RuntimeError(f"expected two gloo processes, not {state.num_processes} with {state.backend}")
    torch.set_num_threads(1)
    for name in names:
        loop, scenario = name.split(":")
        scratch = folder / name
        _, after = run(loop, SCENARIOS[scenario], processes=2, folder=scratch, saved=folder / "base")
        save_file(after, folder / f"{name}.{state.process_index}.safetensors")
    failing = Scenario([LoraConfig(**LORA), Fails()])
    run("trainer", failing, processes=2, folder=folder / "failing", saved=folder / "base")


if __name__ == "__main__":
    place, limit, *names = sys.argv[1:]
    with (Path(place) / f"{os.environ['RANK']}.txt").open("w") as report:
        faulthandler.dump_traceback_later(float(limit), exit=True, file=report)
        try:
            main(Path(place), names)
        except BaseException:
            traceback.print_exc(file=report)
            raise
