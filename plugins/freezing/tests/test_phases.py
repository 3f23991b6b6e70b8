"""Phases on paper: what is no phase, and where a run stands, against a simulation step by step."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from peft_plus import MethodError
from peft_plus_freezing.phases import Phase, Place, phases_of, place_at


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([], r"phases=\[\]: give a list of phases"),
        ("head", "give a list of phases"),
        (["head"], r"phases\[0\]='head' is a str; give a mapping"),
        ([{}], r"phases\[0\] does not say what trains"),
        ([{"train": []}], r"phases\[0\] trains nothing"),
        ([{"train": "head", "step": 3}], r"no key 'step'\. Did you mean 'steps'\? Its keys: train, steps"),
        ([{"train": "head"}, {"train": "all"}], r"phases\[0\] has no end, so what follows is never reached"),
        ([{"train": "head", "metric": "f1"}, {"train": "all"}], r"phases\[0\] has no end"),
        ([{"train": "head", "steps": 3, "epochs": 1}], "ends in 2 ways, by steps and epochs"),
        ([{"train": "head", "epochs": 1, "patience": 1}], "by epochs and patience"),
        ([{"train": "head", "steps": 0}], r"is empty: steps=0"),
        ([{"train": "head", "epochs": 0}], "is empty: epochs=0"),
        ([{"train": "head", "epochs": float("inf")}], "epochs=inf"),
        ([{"train": "head", "patience": 0}], "patience=0"),
        ([{"train": "head", "patience": 1, "min_delta": -1}], "min_delta=-1"),
        ([{"train": "head", "lr_scale": 0}], "lr_scale=0"),
        ([{"train": "head", "steps": 3, "metric": "f1"}], "metric='f1' goes only with patience="),
        ([{"train": "head", "steps": 3, "restore_best": True}], "restore_best=True goes only with patience"),
        ([{"train": "head", "steps": 3}, {"train": "block 0"}], r"phases\[1\]: train holds 'block 0', but blocks"),
    ],
)
def test_what_is_no_phase_is_refused_with_its_place(phases: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        phases_of(phases)


@pytest.mark.parametrize("value", [{"steps": 2.5}, {"steps": "3"}, {"patience": True}, {"restore_best": 1}])
def test_a_value_of_another_kind_is_refused_by_name(value: Mapping[str, Any]) -> None:
    (name,) = value
    with pytest.raises(MethodError, match=rf"phases\[0\]: {name}=.* expected"):
        phases_of([{"train": "head", **value}])


def simulated(phases: Sequence[Phase], steps: int, per_epoch: int, stalled: Mapping[int, int]) -> list[int]:
    """The number of the phase at each step, by counting."""
    numbers, number, inside = [], 0, 0
    for step in range(steps):
        phase = phases[number]
        length = phase.steps
        if phase.epochs is not None:
            length = next(n for n in range(1, 10**6) if n >= phase.epochs * per_epoch)
        ended = step >= stalled[number] if number in stalled else length is not None and inside >= length
        if ended and number < len(phases) - 1:
            number, inside = number + 1, 0
        inside += 1
        numbers.append(number)
    return numbers


def test_the_place_in_random_plans_is_that_of_counting() -> None:
    draw = random.Random(0)
    for _ in range(200):
        phases, stalled, begin = [], {}, 0
        for number in range(draw.randint(1, 5)):
            kind = draw.choice(["steps", "epochs", "patience"])
            value: Any = draw.randint(1, 7) if kind != "epochs" else draw.choice([0.3, 0.5, 1, 1.25, 2])
            phases.append(Phase(train=("all",), **{kind: value}))
            length = draw.randint(1, 7) if kind == "patience" else phases[-1].length(4)
            assert length
            begin += length
            if kind == "patience":
                stalled[number] = begin
        steps = begin + 5
        assert [place_at(phases, s, 4, stalled).number for s in range(steps)] == simulated(phases, steps, 4, stalled)
        for step in range(steps):  # looking ahead agrees with going there
            place = place_at(phases, step, 4, stalled)
            if place.number < len(phases) - 1:
                assert place.end is not None
                assert place_at(phases, place.end - 1, 4, stalled).number == place.number
                assert place_at(phases, place.end, 4, stalled) == Place(
                    place.number + 1, place.end, place_at(phases, place.end, 4, stalled).end
                )


def test_a_phase_whose_metric_still_improves_has_no_end() -> None:
    phases = phases_of([{"train": "head", "steps": 3}, {"train": "blocks", "patience": 2}, {"train": "all"}])
    assert place_at(phases, 2, 0, {}) == Place(0, 0, 3)
    assert place_at(phases, 99, 0, {}) == Place(1, 3, None)
    assert place_at(phases, 99, 0, {1: 50}) == Place(2, 50, None)


def test_epochs_need_data_with_a_length() -> None:
    with pytest.raises(ValueError, match="epochs=2 needs data with a length; give steps="):
        place_at(phases_of([{"train": "head", "epochs": 2}, {"train": "all"}]), 0, 0, {})
    later = phases_of([{"train": "head", "patience": 1}, {"train": "blocks", "epochs": 2}, {"train": "all"}])
    with pytest.raises(ValueError, match="epochs=2 needs data with a length"):  # now, not when it is reached
        place_at(later, 0, 0, {})
