"""The selection language: what each pattern means, and what is said where it means nothing."""

from __future__ import annotations

from typing import Any

import pytest

from peft_plus import get_model, patterns
from peft_plus.stage_start import run_at_start
from peft_plus_freezing.select import any_matches, chosen, depths_of, matches, patterns_of
from tests.models import tiny

QUERY = "base_model.model.bert.encoder.layer.1.attention.self.query.lora_A.default.weight"


@pytest.mark.parametrize(
    ("pattern", "depths"),
    [
        ("all", {0, 1, 2, 3, 4}),
        ("embeddings", {0}),
        ("blocks", {1, 2, 3}),
        ("head", {4}),
        ("block 1", {1}),
        ("block -1", {3}),
        ("block -3", {1}),
        ("blocks 2-3", {2, 3}),
        ("blocks 2", {2}),
        ("blocks 1 - 2", {1, 2}),
        ("blocks -2--1", {2, 3}),
        ("blocks 2--1", {2, 3}),
        ("block 4", set()),
        ("block -4", set()),
        ("blocks 2-4", set()),  # half of it is past the depth: refused as a whole
        ("blocks 3--2", set()),
    ],
)
def test_words_mean_depths(pattern: str, depths: set[int]) -> None:
    assert patterns_of(pattern, "train") == (pattern,)
    assert {depth for depth in range(5) if matches(pattern, "any.name", depth, 3)} == depths


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        (QUERY, True),
        ("*.weight", True),
        ("*.bias", False),
        ("layer.1", True),  # a module: everything in it
        ("layer.1.*", True),
        ("layer.11", False),
        ("ayer.1", False),  # components are whole
        ("layer.1.attention.*.lora_A", True),
        ("lora_?", True),
        ("layer.[0-1]", True),
        ("LAYER.1", False),
        ("query", True),
        ("key", False),
        (r"re:layer\.[01]\.", True),
        (r"re:^layer", False),
        (r"re:lora_[AB]\.default\.weight$", True),
    ],
)
def test_names_match_whole_components_and_expressions_anywhere(pattern: str, matched: bool) -> None:
    assert patterns_of([pattern], "train") == (pattern,)
    assert matches(pattern, QUERY, 2, 3) is matched
    assert depths_of(pattern, 3) is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "patterns=3 is a int; give a pattern or a list"),
        (None, "patterns=None is a NoneType"),
        ({"head": 1}, "is a dict"),
        ([""], "holds '', which is no pattern"),
        (["head", 2], "holds 2, which is no pattern"),
        (["head", "head"], "names 'head' twice"),
        ("block 0", "blocks count from 1"),
        ("blocks 0-2", "blocks count from 1"),
        ("blocks 3-1", "ends before it begins"),
        ("blocks -1--2", "ends before it begins"),
        ("block one", r"'block one', which is no pattern.* A pattern is 'all'"),
        ("top 2 blocks", "is no pattern"),
        ("re:(", "an invalid regular expression"),
    ],
)
def test_what_is_no_pattern_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patterns_of(value, "patterns")


def run_of(tuner: str = "lora", **settings: Any) -> Any:
    model = get_model(tiny("bert"), {tuner: settings})
    return run_at_start(model.peft_plus, model, model.peft_plus.stages[0])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("block 4", "'block 4' is past the depth of this model, which has 3 blocks"),
        ("blocks 2-9", "past the depth"),
        ("embeddings", r"'embeddings' matches nothing that trains; what trains lies in: block 1, block 2, .*head"),
        ("*.base_layer.*", r"matches only weights that never train \(12, .*: the tuner leaves the base frozen"),
        ("lora_C", r"matches nothing\. Did you mean 'lora_B'\?"),
        ("haed", "Did you mean 'head'?"),
        ("re:layer[.]7", "'re:layer.*7' matches nothing"),
    ],
)
def test_a_pattern_that_means_nothing_here_says_why(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^patterns: .*{message}"):
        chosen([pattern], run_of(), "patterns")


def test_what_is_chosen_is_what_matches_in_the_models_order() -> None:
    run = run_of()
    found = chosen(["block 2", "re:lora_B", "head"], run, "patterns")
    assert [p.name for p in found["block 2"]] == [p.name for p in run.params if ".layer.1." in p.name]
    assert [p.name for p in found["re:lora_B"]] == [p.name for p in run.params if "lora_B" in p.name]
    assert {p.part for p in found["head"]} == {"head"}
    assert all(any_matches(("embeddings", "block 2"), p, 3) for p in found["block 2"])


def test_an_expression_that_would_run_for_centuries_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    with pytest.raises(ValueError, match=r"regular expressions of patterns.*'\(\.\*\.\*\.\*\)\+\$\^'.* 0\.5 seconds"):
        chosen([r"re:(.*.*.*)+$^"], run_of(), "patterns")
