"""How spans are written as tags, one per word: IOB1, IOB2, BIOES, BILOU; reading, checking, converting.

| words  | Alex  | works | in | New   | York  | Oslo  |
|--------|-------|-------|----|-------|-------|-------|
| IOB1   | I-PER | O     | O  | I-LOC | I-LOC | B-LOC |  B only where a span touches one of the same type
| IOB2   | B-PER | O     | O  | B-LOC | I-LOC | B-LOC |
| BIOES  | S-PER | O     | O  | B-LOC | E-LOC | S-LOC |
| BILOU  | U-PER | O     | O  | B-LOC | L-LOC | U-LOC |

A sentence with a span in it is valid in at most one of the four, so detection never guesses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

Scheme = Literal["IOB1", "IOB2", "BIOES", "BILOU"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)

Span = tuple[str, int, int]
"""Type, first word, word after the last."""

# Letters for (first of several, inside, last of several, alone).
_LETTERS = {"IOB2": "BIIB", "BIOES": "BIES", "BILOU": "BILU"}


def split_tag(tag: str) -> tuple[str, str]:
    """`B-LOC` → ("B", "LOC"). The type may hold hyphens and may be empty."""
    letter, _, kind = tag.partition("-")
    return letter, kind


def read_spans(tags: Sequence[str], scheme: Scheme) -> list[Span]:
    """The spans of one sentence, strictly.

    Raises: ValueError: a tag that the scheme does not allow there; names position and tag.
    """
    spans: list[Span] = []
    open_at: int | None = None
    before = ("O", "")
    for i, tag in enumerate([*tags, "O"]):
        letter, kind = split_tag(tag)
        starts, goes_on = _step(before, (letter, kind), scheme, open_at is not None, i, tag, len(tags))
        if open_at is not None and not goes_on:
            spans.append((before[1], open_at, i))
            open_at = None
        if starts:
            open_at = i
        before = (letter, kind)
    return spans


def _step(
    before: tuple[str, str], now: tuple[str, str], scheme: Scheme, inside: bool, i: int, tag: str, end: int
) -> tuple[bool, bool]:
    """Whether a span starts at this tag, and whether the open one goes on; an error where neither is allowed."""
    letter, kind = now
    same = inside and before[1] == kind
    allowed = {"IOB1": "OBI", "IOB2": "OBI", "BIOES": "OBIES", "BILOU": "OBILU"}[scheme]
    if letter not in tuple(allowed) or (letter == "O" and kind):
        raise ValueError(f"position {i}: tag {tag!r} is not one of {scheme}'s ({', '.join(allowed)})")
    if scheme == "IOB1":
        if letter == "B" and not same:
            raise ValueError(f"position {i}: tag {tag!r} starts a span that touches none of its type (IOB1 writes I-)")
        return letter == "B" or (letter == "I" and not same), letter == "I" and same
    if scheme == "IOB2":
        if letter == "I" and not same:
            raise ValueError(f"position {i}: tag {tag!r} follows no {'B' + tag[1:]!r} (IOB2 starts every span with B-)")
        return letter == "B", letter == "I"
    last, alone = _LETTERS[scheme][2:]
    # Here a span says itself where it ends: after B and I the same type must go on.
    unfinished = before[0] in ("B", "I")
    if unfinished and not (letter in ("I", last) and before[1] == kind):
        raise ValueError(
            f"position {i - 1}: the span of {'-'.join(filter(None, before))!r} is not closed by {last + tag[1:]!r}"
            if i < end
            else f"position {i - 1}: the sentence ends inside the span of {'-'.join(filter(None, before))!r}"
        )
    if letter in ("I", last) and not unfinished:
        raise ValueError(f"position {i}: tag {tag!r} follows no open span")
    return letter in ("B", alone), letter in ("I", last)


def write_spans(spans: Iterable[Span], length: int, scheme: Scheme) -> list[str]:
    """Tags of one sentence of `length` words; the spans must not overlap."""
    tags = ["O"] * length
    ends: dict[int, str] = {}
    for kind, start, end in sorted(spans, key=lambda s: s[1]):
        tail = f"-{kind}" if kind else ""
        if scheme == "IOB1":
            letters = ["B" if ends.get(start) == kind else "I"] + ["I"] * (end - start - 1)
        else:
            first, inside, last, alone = _LETTERS[scheme]
            letters = [alone] if end - start == 1 else [first, *[inside] * (end - start - 2), last]
        tags[start:end] = [letter + tail for letter in letters]
        ends[end] = kind
    return tags


def convert_tags(tags: Sequence[str], source: Scheme, target: Scheme) -> list[str]:
    """The same spans, written in another scheme.

    Raises: ValueError: `tags` are not valid in `source`.
    """
    return write_spans(read_spans(tags, source), len(tags), target)


def check_scheme(scheme: str, setting: str) -> Scheme:
    """`scheme` if it is one (IOBES is BIOES under another name)."""
    name = "BIOES" if scheme == "IOBES" else scheme
    for known in SCHEMES:
        if name == known:
            return known
    raise ValueError(f"`{setting}` is one of {list(SCHEMES)}, not {scheme!r}.")


def first_fault(sequences: Iterable[Sequence[str]], scheme: Scheme) -> str | None:
    """Where the sentences stop being valid, e.g. `sentence 3, position 0: tag 'I-PER' …`; None if they are."""
    for number, tags in enumerate(sequences):
        try:
            read_spans(tags, scheme)
        except ValueError as error:
            return f"sentence {number}, {error}"
    return None


def detect_scheme(sequences: Sequence[Sequence[str]]) -> Scheme:
    """The scheme in which every sentence is valid; IOB2 when there is no span at all.

    Raises: ValueError: no scheme reads them all; tells where each one fails.
    """
    order: tuple[Scheme, ...] = ("IOB2", "BIOES", "BILOU", "IOB1")
    faults = {scheme: first_fault(sequences, scheme) for scheme in order}
    for scheme in order:
        if faults[scheme] is None:
            return scheme
    told = "; ".join(f"{scheme}: {fault}" for scheme, fault in faults.items())
    raise ValueError(f"no scheme reads these tags. {told}. Mend the tags, or use `scheme=None` for plain classes.")


def scheme_names(names: Iterable[str], scheme: Scheme) -> list[str]:
    """Every tag of `scheme` for the span types in `names`: O first, then type by type in order of appearance."""
    kinds = dict.fromkeys(kind for letter, kind in map(split_tag, names) if letter != "O")
    letters = "BI" if scheme == "IOB1" else dict.fromkeys(_LETTERS[scheme])
    return ["O", *(f"{letter}-{kind}" if kind else letter for kind in kinds for letter in letters)]
