"""TOKEN_CLS: a tag per word; spans in any of the usual schemes, aligned to sub-tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

from .base import IGNORED, Task, check_positive, first_array, keep_last, labels_of, require_pad
from .class_labels import check_classes, class_id, config_names, feature_names, name_maps
from .source import Source, token_columns, truncation
from .tag_schemes import (
    Scheme,
    check_scheme,
    detect_scheme,
    first_fault,
    read_spans,
    scheme_names,
    split_tag,
    write_spans,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_AS_SEQEVAL_READS = str.maketrans("LU", "ES")


@dataclass(kw_only=True)
class TokenClassification(Task):
    """A tag per word.

    Attributes:
        num_labels: tags of the head, in `scheme_out`; may be left out when `label_names` is given.
        label_names: the tags in the head's order. Without it they come from the dataset's ClassLabel, or from the tags
            themselves: O, then B-, I-, … for each span type in alphabetical order.
        tokens, tags: columns of lists; None = found by name.
        scheme: how the data's tags are written: auto, IOB1, IOB2, BIOES, BILOU; None for plain classes (e.g. parts of
            speech), which are left as they are.
        scheme_out: how the model learns them.
        label_all_tokens: tag every sub-token of a word; False tags the first and leaves the others −100.
        max_length: tokens per row, ≥ 1; None = the tokenizer's own limit. Words cut off get no label.
    """

    name: ClassVar[str] = "TOKEN_CLS"
    peft_task_type: ClassVar[str | None] = "TOKEN_CLS"
    new_head: ClassVar[bool] = True

    num_labels: int | None = None
    label_names: Sequence[str] | None = None
    tokens: str | None = None
    tags: str | None = None
    scheme: str | None = "auto"
    scheme_out: str = "IOB2"
    label_all_tokens: bool = False
    max_length: int | None = None
    _learned: list[str] | None = field(init=False, default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        classes = check_classes(self.num_labels, self.label_names, self.name)
        self.num_labels = classes  # pyright: ignore[reportIncompatibleVariableOverride]
        check_positive(self.max_length, "max_length", self.name)
        if self.scheme not in (None, "auto"):
            self.scheme = check_scheme(self.scheme or "", "scheme")
        self.scheme_out = check_scheme(self.scheme_out, "scheme_out")

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> TokenClassification:
        """With the config's number of labels."""
        return cls(num_labels=config.num_labels, label_names=config_names(config))

    def auto_class(self, config: PretrainedConfig) -> type:
        """AutoModelForTokenClassification."""
        from transformers import AutoModelForTokenClassification

        return AutoModelForTokenClassification

    def config_kwargs(self) -> dict[str, Any]:
        """`num_labels`, and the tags if they are known by name."""
        return {"num_labels": self.num_labels, **name_maps(self.label_names)}

    @property
    def _out(self) -> Scheme:
        return check_scheme(self.scheme_out, "scheme_out")

    @property
    def label_names_in_use(self) -> list[str] | None:
        """As set, or as numbered by the first `preprocess`."""
        return list(self.label_names) if self.label_names is not None else self._learned

    def _columns(self, source: Source) -> tuple[str, str]:
        tokens = source.find("tokens", self.tokens, ("tokens", "words"))
        return tokens, source.find("tags", self.tags, ("tags", "ner_tags", "labels"))

    def _learn(self, sources: list[Source]) -> None:
        """Name the tags, once: a second dataset must fit the first one's numbers."""
        if self.label_names_in_use is not None:
            return
        names: list[str] = []
        numbered = False
        for source in sources:
            _, column = self._columns(source)
            declared = feature_names(source.dataset.features[column])
            found = declared or sorted({t for row in source.dataset[column] for t in row if isinstance(t, str)})
            numbered = declared is not None
            names += [n for n in found if n not in names]
            if not found and self.scheme is not None:
                raise ValueError(
                    f"{source.where}: column {column!r} holds numbers without names. Pass `label_names=[…]`, or "
                    "`scheme=None` if they are plain classes and no spans."
                )
        if not names:
            return
        if self.scheme is not None:
            # By type, the letters in the scheme's order. A ClassLabel that is already in this scheme keeps its numbers.
            full = scheme_names(sorted(names, key=lambda n: split_tag(n)[1]), self._out)
            fits = numbered and set(names) <= set(full) and len(names) == self.num_labels
            names = names if fits else full
        if len(names) != self.num_labels:
            raise ValueError(
                f"{self.name}: num_labels={self.num_labels} but the data's tags make {len(names)} in "
                f"{self.scheme_out}: {names}. Set `num_labels={len(names)}` or pass `label_names=[…]`."
            )
        self._learned = names

    def _encode(self, source: Source, tokenizer: Any) -> Any:
        if not tokenizer.is_fast:
            raise ValueError(f"{self.name} aligns words to sub-tokens, which needs a fast tokenizer.")
        tokens, tags = self._columns(source)
        declared = feature_names(source.dataset.features[tags])
        scheme = self._source_scheme(source, tags, declared)
        cut = truncation(tokenizer, self.max_length)

        def encode(columns: dict[str, list[Any]], rows: list[int]) -> dict[str, Any]:
            for row, words, row_tags in zip(rows, columns[tokens], columns[tags], strict=True):
                check_words(words, row_tags, f"{source.where}, row {row}")
            encoding = tokenizer(columns[tokens], is_split_into_words=True, **cut)
            result = source.filled(token_columns(encoding), rows)
            result["labels"] = [
                self._labels(encoding.word_ids(i), columns[tags][i], declared, scheme, f"{source.where}, row {row}")
                for i, row in enumerate(rows)
            ]
            return result

        return source.map(encode)

    def _source_scheme(self, source: Source, column: str, declared: list[str] | None) -> Scheme | None:
        """The scheme of this split's tags, every sentence checked in it."""
        if self.scheme is None:
            return None
        sequences = [
            [self._tag(t, declared, f"{source.where}, row {row}") for t in tags]
            for row, tags in enumerate(source.dataset[column])
        ]
        try:
            scheme = detect_scheme(sequences) if self.scheme == "auto" else check_scheme(self.scheme, "scheme")
        except ValueError as error:
            raise ValueError(f"{source.where}: {error}") from None
        fault = first_fault(sequences, scheme)
        if fault is not None:
            raise ValueError(f"{source.where}: the tags are not {scheme}: {fault}.")
        return scheme

    def _tag(self, value: Any, declared: list[str] | None, where: str) -> str:
        """One tag as a string, whatever the data holds."""
        if isinstance(value, str):
            return value
        names = declared if declared is not None else (self.label_names_in_use or [])
        if not isinstance(value, int) or not 0 <= value < len(names):
            raise ValueError(f"{where}: tag {value!r} is none of {names}.")
        return names[value]

    def _labels(
        self, words: list[int | None], tags: list[Any], declared: list[str] | None, scheme: Scheme | None, where: str
    ) -> list[int]:
        """Label ids for one row's sub-tokens; `words[t]` is the word that sub-token t belongs to, or None."""
        starts = [w is not None and (t == 0 or words[t - 1] != w) for t, w in enumerate(words)]
        labelled = [t for t, w in enumerate(words) if w is not None and (self.label_all_tokens or starts[t])]
        values: list[Any]
        if scheme is None:
            values = [tags[words[t] or 0] for t in labelled]
        else:
            spans = read_spans([self._tag(v, declared, where) for v in tags], scheme)
            values = list(spread([words[t] or 0 for t in labelled], spans, len(tags), self._out, self.label_all_tokens))
        labels = [IGNORED] * len(words)
        for t, value in zip(labelled, values, strict=True):
            labels[t] = class_id(value, self.num_labels or 0, self.label_names_in_use, declared, where)
        return labels

    def collator(self, tokenizer: Any, model: Any = None) -> Callable[..., Any]:
        """DataCollatorForTokenClassification."""
        from transformers import DataCollatorForTokenClassification

        require_pad(tokenizer, self.name)
        return DataCollatorForTokenClassification(tokenizer)

    def logits(self, output: Any, batch: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """[(logits (B, T, num_labels), mask (B, T))]: sub-tokens that carry a label count."""
        labels = labels_of(batch, self.name)
        return [(keep_last(output.logits, labels.shape[1], self.name), labels != IGNORED)]

    def metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        """Span precision, recall and F1 as conlleval and seqeval count them, and tag accuracy.

        Plain classes (`scheme=None`): accuracy and macro F1.
        """
        predicted, labels = np.asarray(first_array(predictions)).argmax(-1), np.asarray(labels)
        predicted = predicted[:, predicted.shape[1] - labels.shape[1] :]
        known = labels != IGNORED
        if self.scheme is None:
            from sklearn.metrics import accuracy_score, f1_score

            return {
                "accuracy": float(accuracy_score(labels[known], predicted[known])),
                "f1": float(f1_score(labels[known], predicted[known], average="macro", zero_division=0)),  # pyright: ignore[reportArgumentType]
            }
        if self.label_names_in_use is None:
            raise ValueError(f"{self.name}: spans are scored by tag names. Pass `label_names=[…]`.")
        rows = [row for row in range(len(labels)) if known[row].any()]
        names = np.asarray(self.label_names_in_use)
        truth = [names[labels[row][known[row]]].tolist() for row in rows]
        return span_scores(truth, [names[predicted[row][known[row]]].tolist() for row in rows], self._out)


def check_words(words: Any, tags: Any, where: str) -> None:
    """One tag per word, and words that are strings."""
    if not isinstance(words, list) or not isinstance(tags, list):
        raise ValueError(f"{where}: words and tags are lists, one entry per word; got {words!r} and {tags!r}.")
    if len(words) != len(tags):
        raise ValueError(f"{where}: {len(words)} words but {len(tags)} tags.")
    bad = [w for w in words if not isinstance(w, str)]
    if bad:
        raise ValueError(f"{where}: {bad[0]!r} among the words is not text.")


def spread(words: Sequence[int], spans: Sequence[tuple[str, int, int]], length: int, scheme: Scheme, all_tokens: bool):
    """Tags for the labelled sub-tokens, `words[i]` being the word of the i-th.

    With a tag on the first sub-token only, a sub-token gets its word's tag. With a tag on all, the spans run over
    sub-tokens and are written anew, so that the result is again valid (S-LOC on three of them: B-LOC, I-LOC, E-LOC).
    """
    if not all_tokens:
        tags = write_spans(spans, length, scheme)
        return [tags[w] for w in words]
    inside = [(kind, [i for i, w in enumerate(words) if start <= w < end]) for kind, start, end in spans]
    return write_spans([(kind, at[0], at[-1] + 1) for kind, at in inside if at], len(words), scheme)


def span_scores(truth: list[list[str]], predicted: list[list[str]], scheme: Scheme) -> dict[str, float]:
    """Micro precision, recall and F1 of whole spans; accuracy of single tags. 0 where there is no span."""
    from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score

    accuracy = float(accuracy_score(truth, predicted))
    if scheme == "BILOU":
        # seqeval's lenient reading knows E and S, not L and U.
        truth, predicted = (
            [[t[:1].translate(_AS_SEQEVAL_READS) + t[1:] for t in s] for s in x] for x in (truth, predicted)
        )
    return {
        "precision": float(precision_score(truth, predicted, zero_division=0)),  # pyright: ignore[reportArgumentType]
        "recall": float(recall_score(truth, predicted, zero_division=0)),  # pyright: ignore[reportArgumentType]
        "f1": float(f1_score(truth, predicted, zero_division=0)),  # pyright: ignore[reportArgumentType]
        "accuracy": accuracy,
    }
