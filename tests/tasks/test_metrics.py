"""Metrics against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from peft_plus.tasks.answer_spans import best_spans, text_scores
from peft_plus.tasks.causal_lm import CausalLM
from peft_plus.tasks.masked_lm import MaskedLM
from peft_plus.tasks.multiple_choice import MultipleChoice
from peft_plus.tasks.question_ans import QuestionAnswering
from peft_plus.tasks.seq_2_seq_lm import Seq2SeqLM
from peft_plus.tasks.seq_cls import SequenceClassification
from peft_plus.tasks.token_cls import TokenClassification


def one_hot(ids, classes: int) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[np.asarray(ids)]


def test_single_label() -> None:
    # truth 0 0 1 1, predicted 0 1 1 1: recall 1/2 and 1, precision 1 and 2/3, F1 2/3 and 4/5.
    task = SequenceClassification(num_labels=2)
    scores = task.compute_metrics(EvalPrediction((one_hot([0, 1, 1, 1], 2), "more"), np.array([0, 0, 1, 1])))
    assert scores == pytest.approx({"accuracy": 0.75, "f1": (2 / 3 + 4 / 5) / 2, "mcc": 1 / math.sqrt(3)})


def test_multi_label() -> None:
    # Decisions: 2 right yes, 1 wrong yes, 1 missed; classes: F1 1, 2/3, 0.
    task = SequenceClassification(num_labels=3, problem="multi_label")
    logits, truth = np.array([[3.0, 1, -1], [-2, 2, -3]]), np.array([[1.0, 0, 0], [0, 1, 1]])
    expected = {"f1_micro": 2 / 3, "f1_macro": (1 + 2 / 3 + 0) / 3, "subset_accuracy": 0.0}
    assert task.metrics(logits, truth) == pytest.approx(expected)


def test_regression() -> None:
    task = SequenceClassification(num_labels=1)
    scores = task.metrics(np.array([[1.0], [2], [4]]), np.array([1.0, 3, 2]))
    # Deviations (-4/3, -1/3, 5/3) and (-1, 1, 0): product 1, lengths sqrt(14/3) and sqrt(2).
    assert scores == pytest.approx({"mse": 5 / 3, "pearson": 1 / math.sqrt(28 / 3), "spearman": 0.5})
    flat = task.metrics(np.array([[2.0], [2]]), np.array([1.0, 3]))
    assert flat == {"mse": 1.0, "pearson": 0.0, "spearman": 0.0}


NAMES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def test_spans() -> None:
    # Two true spans, two predicted, one in common; 4 of 5 tags right.
    task = TokenClassification(label_names=NAMES)
    truth = np.array([[-100, 1, 2, 0, -100], [3, 0, -100, -100, -100], [-100] * 5])
    guess = np.array([[4, 1, 2, 0, 1], [1, 0, 0, 0, 0], [0] * 5])
    scores = task.metrics(one_hot(guess, 5), truth)
    assert scores == pytest.approx({"precision": 0.5, "recall": 0.5, "f1": 0.5, "accuracy": 0.8})
    none = task.metrics(one_hot([[0, 0]], 5), np.array([[0, 0]]))
    assert none == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "accuracy": 1.0}


@pytest.mark.parametrize(("scheme", "letters"), [("IOB1", "BI"), ("IOB2", "BI"), ("BIOES", "BIES"), ("BILOU", "BILU")])
def test_spans_in_every_scheme(scheme: str, letters: str) -> None:
    names = ["O", *(f"{c}-X" for c in letters)]
    pair = {"IOB1": "I-X I-X", "IOB2": "B-X I-X", "BIOES": "B-X E-X", "BILOU": "B-X L-X"}[scheme].split()
    alone = {"IOB1": "I-X", "IOB2": "B-X", "BIOES": "S-X", "BILOU": "U-X"}[scheme]
    truth = np.array([[names.index(t) for t in ["O", *pair, "O", alone]]])
    task = TokenClassification(label_names=names, scheme_out=scheme)
    assert task.metrics(one_hot(truth, len(names)), truth)["f1"] == 1.0
    guess = truth.copy()
    guess[0, 4] = 0
    scores = task.metrics(one_hot(guess, len(names)), truth)
    assert scores == pytest.approx({"precision": 1.0, "recall": 0.5, "f1": 2 / 3, "accuracy": 0.8})


def test_plain_classes() -> None:
    scores = TokenClassification(num_labels=2, scheme=None).metrics(one_hot([[0, 1, 1]], 2), np.array([[0, 1, -100]]))
    assert scores == {"accuracy": 1.0, "f1": 1.0}


def test_positions() -> None:
    # Row 0 exact; row 1 predicts 2..4 for 3..6: overlap 2, F1 4/7; row 2 none.
    start, end = one_hot([1, 2, 0], 8), one_hot([2, 4, 0], 8)
    scores = QuestionAnswering().metrics((start, end), (np.array([1, 3, 5]), np.array([2, 6, 7])))
    assert scores == pytest.approx({"exact_match": 1 / 3, "f1": (1 + 4 / 7 + 0) / 3})


def test_best_span_is_the_best_of_all_valid_ones() -> None:
    draw = np.random.default_rng(0)
    start, end = draw.normal(size=(50, 9)) - 150, draw.normal(size=(50, 9)) - 150
    start[:, 7:] = end[:, 7:] = -100
    first, last = best_spans(start, end)
    for s, e, i, j in zip(start, end, first, last, strict=True):
        valid = {(a, b): s[a] + e[b] for a in range(7) for b in range(a, 7)}
        assert (i, j) == max(valid, key=valid.__getitem__)


def test_squad_scores() -> None:
    scores = text_scores(["The Cat!", "red dog", "", "x"], [["cat"], ["a big dog", "none"], [], []])
    assert scores == pytest.approx({"exact_match": 0.5, "f1": (1 + 0.5 + 1 + 0) / 4})


@pytest.mark.parametrize(("task", "shift"), [(CausalLM(), True), (Seq2SeqLM(), False), (MaskedLM(), False)])
def test_tokens(task, shift: bool) -> None:
    """p = 1/2 and 1/4 for the two labels: perplexity √8; the first is also the likeliest token."""
    rows = np.log(np.array([[[0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]], dtype=np.float32))
    labels = np.array([[2, 0, 1]]) if shift else np.array([[0, 1, -100]])
    expected = {"perplexity": math.sqrt(8), "accuracy": 0.5}
    assert task.metrics(rows, labels) == pytest.approx(expected)
    assert task.metrics((rows, "hidden"), labels) == pytest.approx(expected)
    virtual = np.concatenate([np.full((1, 2, 3), 7.0, np.float32), rows], 1)
    assert task.metrics(virtual, labels) == pytest.approx(expected)
    small = task.preprocess_logits_for_metrics((torch.tensor(virtual), None), torch.tensor(labels))
    assert all(part.shape == (1, 2 if shift else 3) for part in small)
    padded = tuple(np.pad(p.numpy(), ((0, 0), (0, 2)), constant_values=-100) for p in small)
    assert task.metrics(padded, np.pad(labels, ((0, 0), (0, 2)), constant_values=-100)) == pytest.approx(expected)
    assert task.metrics(rows * 1e6, labels)["perplexity"] == math.inf


def test_choices() -> None:
    assert MultipleChoice().metrics(one_hot([0, 2, 1], 3), np.array([0, 2, 2])) == pytest.approx({"accuracy": 2 / 3})
