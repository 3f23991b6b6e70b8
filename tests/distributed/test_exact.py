"""Two gloo processes end with the weights of one process that has the doubled batch, and with each other's bits."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from peft_plus import load_thawed
from tests.models import tiny

from .conftest import AVERAGED, LAUNCHED, RESUMED, STORED
from .loops import run
from .scenarios import QUIET, SCENARIOS, Scenario, Weights

TOLERANCE = 1e-6
"""Of the change of all weights together, as `Scenario.bound` is; what differs is the order in which fp32 sums run."""

Launched = tuple[Path, subprocess.CompletedProcess[str]]
CASES = [(loop, name) for loop, names in LAUNCHED.items() for name in names]
SLOWEST_MOVE = 1e-3
"""The least that a run moves the weights, as a share of them, so that `TOLERANCE` of it says something."""


def norm(*parts: Weights) -> float:
    """‖a‖, or ‖a − b‖, over all tensors together."""
    first, second = parts[0], parts[1] if len(parts) > 1 else {}
    zero = torch.zeros(())
    return float(sum((t - second.get(n, zero)).double().square().sum() for n, t in first.items()) ** 0.5)


def weights(launched: Launched, name: str, rank: int) -> Weights:
    folder, ended = launched
    path = folder / f"{name}.{rank}.safetensors"
    assert path.is_file(), ended.stdout[-8000:]
    return load_file(path)


def on_one_process(loop: str, scenario: Scenario, launched: Launched, folder: Path) -> tuple[Weights, Weights]:
    return run(loop, scenario, processes=1, folder=folder, saved=launched[0] / "base")


@pytest.mark.parametrize(("loop", "name"), CASES)
def test_ranks_agree_to_the_bit(loop: str, name: str, two_processes: Launched) -> None:
    first, second = (weights(two_processes, f"{loop}:{name}", rank) for rank in (0, 1))
    assert first.keys() == second.keys()
    assert [n for n in first if not torch.equal(first[n], second[n])] == []


@pytest.mark.parametrize(("loop", "name"), CASES)
def test_two_processes_are_one_with_the_doubled_batch(
    loop: str, name: str, two_processes: Launched, tmp_path: Path
) -> None:
    two = weights(two_processes, f"{loop}:{name}", 0)
    before, one = on_one_process(loop, SCENARIOS[name], two_processes, tmp_path)
    change = norm(one, before)
    assert change > SLOWEST_MOVE * norm(before)
    assert two.keys() == one.keys()
    assert norm(two, one) < SCENARIOS[name].bound * change


@pytest.mark.parametrize("name", ["all", "accumulation, Llama", "accumulation, T5", "nf4"])
def test_the_noise_would_show(name: str, two_processes: Launched, tmp_path: Path) -> None:
    """Without R3F the same run ends elsewhere, by far more than the tolerance: its noise is no rounding error."""
    two = weights(two_processes, f"trainer:{name}", 0)
    before, one = on_one_process("trainer", replace(SCENARIOS[name], method=QUIET), two_processes, tmp_path)
    assert norm(two, one) > 1000 * TOLERANCE * norm(one, before)


@pytest.mark.parametrize("name", ["incomplete", "incomplete, accumulation", "incomplete by more"])
def test_rows_that_fill_up_the_last_batch_count(name: str, two_processes: Launched, tmp_path: Path) -> None:
    """Accelerate fills the last micro-batches with the first rows; one process without them ends elsewhere."""
    two = weights(two_processes, f"trainer:{name}", 0)
    before, one = on_one_process("trainer", replace(SCENARIOS[name], padded=0), two_processes, tmp_path)
    assert norm(two, one) > 1000 * TOLERANCE * norm(one, before)


@pytest.mark.parametrize("name", LAUNCHED["fsdp2"])
def test_a_sharded_model_saves_whole(name: str, two_processes: Launched) -> None:
    """Plain PEFT loads what FSDP2 trained."""
    folder = two_processes[0] / f"fsdp2:{name}" / "saved"
    loaded = PeftModel.from_pretrained(tiny("bert"), folder)
    if SCENARIOS[name].thawed:
        load_thawed(loaded, folder)
    whole = dict(loaded.named_parameters())
    for parameter, trained in weights(two_processes, f"fsdp2:{name}", 0).items():
        assert torch.equal(whole[parameter], trained), parameter


@pytest.mark.parametrize("name", RESUMED + AVERAGED)
def test_a_sharded_run_ends_as_if_it_had_not_been_interrupted(name: str, two_processes: Launched) -> None:
    """Though at step 3, where it was saved, some of what may train had not trained yet, or rested again."""
    for rank in (0, 1):
        whole = weights(two_processes, f"fsdp2:{name}", rank)
        resumed = weights(two_processes, f"fsdp2, resumed:{name}", rank)
        assert whole.keys() == resumed.keys()
        assert [n for n in whole if not torch.equal(whole[n], resumed[n])] == []


@pytest.mark.parametrize("name", STORED)
def test_what_each_process_stored_is_there_when_the_run_goes_on(name: str, two_processes: Launched) -> None:
    """Else it would be computed anew, in other batches, and rounded otherwise."""
    for rank in (0, 1):
        whole, resumed = (weights(two_processes, f"{loop}:{name}", rank) for loop in ("trainer", "resumed"))
        assert [n for n in whole if not torch.equal(whole[n], resumed[n])] == []


@pytest.mark.parametrize("name", RESUMED)
def test_the_best_model_of_a_sharded_run_is_all_of_it(name: str, two_processes: Launched) -> None:
    """The loop itself compares; weights are left only where nothing differed."""
    assert weights(two_processes, f"fsdp2, best:{name}", 1)


def refusals(launched: Launched, name: str) -> list[list[str]]:
    """For each rank, what it was told."""
    texts = [launched[0] / name / f"refused.{rank}" for rank in (0, 1)]
    assert all(text.is_file() for text in texts), launched[1].stdout[-8000:]
    return [text.read_text().splitlines() for text in texts]


def test_an_optimizer_without_state_is_refused_by_a_sharded_resume(two_processes: Launched) -> None:
    for told in refusals(two_processes, "fsdp2, refused:lora"):
        assert len(told) == 1
        assert "checkpoint-3 cannot be resumed under FSDP2: its optimizer keeps no state (SGD without mom" in told[0]


def test_a_sharded_session_neither_saves_nor_resumes(two_processes: Launched) -> None:
    for told in refusals(two_processes, "session, fsdp2:all"):
        assert len(told) == 2
        assert all("A Session neither saves nor resumes a model that FSDP2 has split" in line for line in told)


def test_an_error_on_one_rank_ends_the_launch(two_processes: Launched) -> None:
    ended = two_processes[1]
    assert ended.returncode == 1
    assert "PluginError: plugin 'fails' (" in ended.stdout
    assert "failed in loss_terms at step 2: ZeroDivisionError: on this rank only" in ended.stdout
    assert "Timeout" not in ended.stdout
