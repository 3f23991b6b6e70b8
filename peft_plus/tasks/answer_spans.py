"""Answers as spans: characters to tokens, windows over long contexts, and back to text."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

Offsets = Sequence[tuple[int, int] | None]
"""Per token its (first character, character after the last) in the context; None outside the context."""


def answer_of(answers: Any, context: str, where: str) -> tuple[int, int] | None:
    """The first answer's (first character, character after the last); None if the question has no answer.

    Raises: ValueError: not SQuAD's form, or the text is not at that place in the context.
    """
    if not isinstance(answers, dict) or not {"text", "answer_start"} <= set(answers):
        raise ValueError(f"{where}: answers have the form {{'text': […], 'answer_start': […]}}, got {answers!r}.")
    texts, starts = answers["text"], answers["answer_start"]
    if len(texts) != len(starts):
        raise ValueError(f"{where}: {len(texts)} answer texts but {len(starts)} `answer_start`.")
    if not texts:
        return None
    start, end = starts[0], starts[0] + len(texts[0])
    if not texts[0] or start < 0 or context[start:end] != texts[0]:
        raise ValueError(
            f"{where}: answer {texts[0]!r} is not at character {start} of the context, where there is "
            f"{context[max(start, 0) : end]!r}."
        )
    return start, end


def token_span(offsets: Offsets, answer: tuple[int, int] | None) -> tuple[int, int]:
    """First and last token of the answer; (0, 0) where there is none or the window does not hold it all."""
    inside = [t for t, o in enumerate(offsets) if o is not None]
    if answer is None or not inside:
        return 0, 0
    spans = [(t, o) for t, o in enumerate(offsets) if o is not None]
    if answer[0] < spans[0][1][0] or answer[1] > spans[-1][1][1]:
        return 0, 0
    covered = [t for t, (first, after) in spans if after > answer[0] and first < answer[1]]
    return (covered[0], covered[-1]) if covered else (0, 0)


def context_offsets(encoding: Any, window: int) -> list[tuple[int, int] | None]:
    """The offsets of one window's context tokens."""
    parts = encoding.sequence_ids(window)
    return [tuple(o) if part == 1 else None for o, part in zip(encoding["offset_mapping"][window], parts, strict=True)]


def best_spans(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per row the pair first ≤ last with the greatest start + end logit.

    Args:
        start, end: (N, T); exactly −100 is padding.
    Returns: two int arrays, (N,).
    """
    start, end = (np.where(x == -100, -np.inf, x.astype(np.float64)) for x in (start, end))
    rows = np.arange(len(start))
    # For each last token the best first one so far: linear in T, where all pairs would be T².
    best = np.maximum.accumulate(start, axis=1)
    last = (best + end).argmax(axis=1)
    allowed = np.arange(start.shape[1])[None] <= last[:, None]
    first = np.where(allowed, start, -np.inf).argmax(axis=1)
    return first[rows], last[rows]


def span_f1(predicted: tuple[int, int], truth: tuple[int, int]) -> float:
    """F1 over token positions; both ends belong to a span."""
    overlap = min(predicted[1], truth[1]) - max(predicted[0], truth[0]) + 1
    if overlap <= 0:
        return 0.0
    return 2 * overlap / (predicted[1] - predicted[0] + truth[1] - truth[0] + 2)


def best_answer(start: np.ndarray, end: np.ndarray, offsets: Offsets, longest: int) -> tuple[float, int, int] | None:
    """The best span in one window's context as (score, first character, character after the last).

    Args:
        start, end: (≥ tokens,) logits of the window.
        longest: tokens an answer may have.
    """
    best: tuple[float, int, int] | None = None
    for first, head in enumerate(offsets):
        if head is None:
            continue
        for last in range(first, min(first + longest, len(offsets))):
            tail = offsets[last]
            if tail is None:
                break
            score = float(start[first]) + float(end[last])
            if best is None or score > best[0]:
                best = (score, head[0], tail[1])
    return best


def normalised(text: str) -> list[str]:
    """SQuAD's words: lower case, without punctuation and the articles a, an, the."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def text_scores(predicted: Sequence[str], truth: Sequence[Sequence[str]]) -> dict[str, float]:
    """SQuAD's exact match and F1 over words, each question against the best of its true answers, 0 … 1.

    Args:
        truth: per question its answers; none means that the right prediction is the empty text.
    """
    if len(predicted) != len(truth) or not predicted:
        raise ValueError(f"{len(predicted)} predictions for {len(truth)} questions.")
    exact = f1 = 0.0
    for guess, answers in zip(predicted, truth, strict=True):
        options = [(normalised(guess), normalised(a)) for a in (answers or [""])]
        exact += max(float(g == a) for g, a in options)
        f1 += max(_word_f1(g, a) for g, a in options)
    return {"exact_match": exact / len(predicted), "f1": f1 / len(predicted)}


def _word_f1(guess: list[str], answer: list[str]) -> float:
    if not guess or not answer:
        return float(guess == answer)
    return 2 * sum((Counter(guess) & Counter(answer)).values()) / (len(guess) + len(answer))
