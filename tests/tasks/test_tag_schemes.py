"""Tag schemes against hand-made tables, random spans, and seqeval's own reading."""

from __future__ import annotations

import random

import pytest
from seqeval import scheme as seqeval_schemes
from seqeval.metrics.sequence_labeling import get_entities

from peft_plus.tasks.tag_schemes import SCHEMES, convert_tags, detect_scheme, read_spans, scheme_names, write_spans

# One row per sentence: the same spans in each scheme.
TABLE = [
    {
        "IOB1": "I-PER O O I-LOC I-LOC B-LOC",
        "IOB2": "B-PER O O B-LOC I-LOC B-LOC",
        "BIOES": "S-PER O O B-LOC E-LOC S-LOC",
        "BILOU": "U-PER O O B-LOC L-LOC U-LOC",
    },
    {
        "IOB1": "I-A I-B B-B I-B I-A",
        "IOB2": "B-A B-B B-B I-B B-A",
        "BIOES": "S-A S-B B-B E-B S-A",
        "BILOU": "U-A U-B B-B L-B U-A",
    },
    {
        "IOB1": "O I-geo-loc I-geo-loc I-geo-loc",
        "IOB2": "O B-geo-loc I-geo-loc I-geo-loc",
        "BIOES": "O B-geo-loc I-geo-loc E-geo-loc",
        "BILOU": "O B-geo-loc I-geo-loc L-geo-loc",
    },
    {"IOB1": "I I B O", "IOB2": "B I B O", "BIOES": "B E S O", "BILOU": "B L U O"},
]
SPANS = [
    [("PER", 0, 1), ("LOC", 3, 5), ("LOC", 5, 6)],
    [("A", 0, 1), ("B", 1, 2), ("B", 2, 4), ("A", 4, 5)],
    [("geo-loc", 1, 4)],
    [("", 0, 2), ("", 2, 3)],
]


@pytest.mark.parametrize("source", SCHEMES)
@pytest.mark.parametrize("target", SCHEMES)
@pytest.mark.parametrize("row", range(len(TABLE)))
def test_every_scheme_converts_to_every_other(row: int, source: str, target: str) -> None:
    tags = TABLE[row][source].split()
    assert read_spans(tags, source) == SPANS[row]
    assert convert_tags(tags, source, target) == TABLE[row][target].split()
    assert detect_scheme([tags]) == source


def random_spans(draw: random.Random) -> tuple[list[tuple[str, int, int]], int]:
    length, at, spans = draw.randint(1, 12), 0, []
    while at < length:
        at += draw.choice([0, 0, 1, 2])
        end = min(length, at + draw.randint(1, 4))
        if at < end:
            spans.append((draw.choice(["PER", "LOC"]), at, end))
        at = end
    return spans, length


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_written_reads_back_and_seqeval_agrees(scheme: str) -> None:
    draw = random.Random(0)
    strict = {"IOB1": "IOB1", "IOB2": "IOB2", "BIOES": "IOBES", "BILOU": "BILOU"}[scheme]
    for _ in range(300):
        spans, length = random_spans(draw)
        tags = write_spans(spans, length, scheme)
        assert read_spans(tags, scheme) == spans
        if spans:
            assert detect_scheme([tags]) == scheme
        reading = seqeval_schemes.Entities([tags], scheme=getattr(seqeval_schemes, strict)).entities[0]
        assert [(e.tag, e.start, e.end) for e in reading] == spans
        if scheme != "BILOU":  # seqeval's lenient reading has no L and U
            assert [(kind, first, last + 1) for kind, first, last in get_entities(tags)] == spans


@pytest.mark.parametrize(
    ("scheme", "tags", "message"),
    [
        ("IOB2", "O I-LOC", r"position 1: tag 'I-LOC' follows no 'B-LOC'"),
        ("IOB2", "B-PER I-LOC", r"position 1: tag 'I-LOC'"),
        ("IOB2", "B-PER E-PER", r"'E-PER' is not one of IOB2's"),
        ("IOB2", "O-PER", r"'O-PER' is not one of"),
        ("IOB2", "NOUN", r"'NOUN' is not one of"),
        ("IOB1", "O B-LOC", r"position 1: tag 'B-LOC' starts a span that touches none"),
        ("IOB1", "I-PER B-LOC", r"position 1: tag 'B-LOC'"),
        ("BIOES", "B-LOC O", r"position 0: the span of 'B-LOC' is not closed by 'E'"),
        ("BIOES", "B-LOC E-PER", r"position 0: the span of 'B-LOC' is not closed"),
        ("BIOES", "O B-LOC I-LOC", r"position 2: the sentence ends inside the span of 'I-LOC'"),
        ("BIOES", "O E-LOC", r"position 1: tag 'E-LOC' follows no open span"),
        ("BILOU", "S-LOC", r"'S-LOC' is not one of BILOU's"),
        ("BILOU", "U-LOC L-LOC", r"position 1: tag 'L-LOC' follows no open span"),
    ],
)
def test_invalid_sentences_are_named(scheme: str, tags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_spans(tags.split(), scheme)


def test_detection_reads_all_sentences_and_never_guesses() -> None:
    assert detect_scheme([["O", "O"], []]) == "IOB2"
    assert detect_scheme([["O"], ["I-PER", "O"], ["O"]]) == "IOB1"
    with pytest.raises(
        ValueError, match=r"no scheme.*IOB2: sentence 1, position 0: tag 'I-PER'.*BIOES: sentence 0, position 1"
    ):
        detect_scheme([["B-PER", "I-PER", "O"], ["I-PER", "O"], ["B-PER", "E-PER"]])


def test_all_names_of_a_scheme() -> None:
    names = ["O", "B-PER", "I-PER", "I-LOC"]
    assert scheme_names(names, "IOB2") == ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    assert scheme_names(names, "BILOU") == ["O", *(f"{c}-{k}" for k in ("PER", "LOC") for c in "BILU")]
