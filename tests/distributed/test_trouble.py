"""What goes wrong on one rank ends all of them, with a message that says what, and nothing hangs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import once
from .launch import ROOT

LIMIT = 60
"""Seconds for a rank, of which it takes one or two; past them it prints its stacks and fails."""

Ends = dict[str, list[list[Any]]]


@pytest.fixture(scope="session")
def trouble(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ends]:
    """The folder that the ranks wrote into; case → exit code and output of rank 0 and of rank 1."""

    def make(folder: Path) -> Any:
        command = [sys.executable, "-m", "tests.distributed.trouble", str(folder), str(LIMIT)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=600)
        return json.loads((folder / "ends.json").read_text(encoding="utf-8"))

    return once(tmp_path_factory, "trouble", make)


@pytest.fixture
def ends(trouble: tuple[Path, Ends]) -> Ends:
    return trouble[1]


FAILING = {
    "a_hook_raises": "PluginError: plugin 'gate' (__main__) failed in may_train at step 1: ZeroDivisionError: on this",
    "a_batch_without_labels": "ValueError: The model did not return a loss from the inputs",
    "a_batch_without_labels_for_a_term": "ValueError: The model did not return a loss from the inputs",
}
"""What happens on rank 1 alone → what it says there."""


@pytest.mark.parametrize(("name", "message"), FAILING.items(), ids=FAILING)
def test_both_ranks_end(name: str, message: str, ends: Ends) -> None:
    (code, _), (other, said) = ends[name]
    assert (code, other) == (1, 1)
    assert message in said
    assert "Timeout" not in "".join(text for _, text in ends[name])


def test_a_loss_that_is_no_number_on_one_rank_stops_all_before_the_update(ends: Ends) -> None:
    for code, said in ends["a_term_is_not_a_number"]:
        assert code == 1
        assert "DivergenceError: The loss of step 1 is nan." in said


def test_a_rank_that_cannot_count_says_why(ends: Ends) -> None:
    assert "another process has a batch without labels" in ends["a_batch_without_labels_for_a_term"][0][1]


def test_a_frozen_weight_that_moved_on_one_rank_fails_on_all_and_is_saved_once(trouble: tuple[Path, Ends]) -> None:
    for code, said in trouble[1]["a_frozen_weight_moves"]:
        assert code == 1
        assert "EngagementError" in said
        assert "1 frozen tensors moved, e.g. 'base_model.model.bert.encoder.layer.0.attention.self.query.base" in said
    folder = trouble[0] / "a_frozen_weight_moves" / "unproven"
    assert (folder / "adapter_model.safetensors").is_file()


def test_different_seeds_are_found_before_sharding(ends: Ends) -> None:
    for code, said in ends["a_sharded_model_from_different_seeds"]:
        assert code == 1
        assert "MethodError: The processes drew different first values for" in said
        assert "set_seed(…) before get_model" in said


def test_copies_that_drifted_apart_are_told_of(ends: Ends) -> None:
    for code, said in ends["a_trained_weight_moves"]:
        assert code == 0
        assert "1 tensors differ from process to process" in said
        assert "layer.0.attention.self.query.lora_A" in said


def test_ranks_may_have_different_numbers_of_micro_batches(ends: Ends) -> None:
    """3 + 2 rows on rank 0, 3 on rank 1: each of the 8 counts the same, and the gradients' average divides by 2."""
    said = [text for _, text in ends["a_step_of_different_length"]]
    assert [code for code, _ in ends["a_step_of_different_length"]] == [0, 0], said
    assert "SHARE 0.75 first 0" in said[0]  # 3 rows of 8, times 2 processes
    assert "SHARE 0.75 first 3" in said[1]
