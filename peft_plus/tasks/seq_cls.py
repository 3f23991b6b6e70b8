"""SEQ_CLS: one label, several labels or a number for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from .base import Distribution, Task, check_positive, first_array, labels_of, require_pad
from .class_labels import check_classes, class_id, config_names, feature_names, learned_names, multi_hot, name_maps
from .source import Source, token_columns, truncation

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Problem = Literal["single_label", "multi_label", "regression"]

_PROBLEM_TYPES: Mapping[Problem, str] = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
_DISTRIBUTIONS: Mapping[Problem, Distribution] = {
    "single_label": "categorical",
    "multi_label": "bernoulli",
    "regression": "real",
}
TEXTS = ("text", "sentence")
PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("question", "sentence"),
)


@dataclass(kw_only=True)
class SequenceClassification(Task):
    """A label, a set of labels or a number per text.

    Attributes:
        num_labels: classes, or numbers per row for regression; may be left out when `label_names` is given.
        problem: which of the three; None = regression for one label, single_label otherwise.
        text, text_pair: columns; None = found by name (text, sentence, or a known pair such as premise + hypothesis).
        label: column; None = `label` or `labels`.
        max_length: tokens per row, ≥ 1; None = the tokenizer's own limit.
        label_names: the classes in the head's order. String labels without it are numbered alphabetically.
    """

    name: ClassVar[str] = "SEQ_CLS"
    peft_task_type: ClassVar[str | None] = "SEQ_CLS"
    new_head: ClassVar[bool] = True

    num_labels: int | None = None
    problem: Problem | None = None
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    max_length: int | None = None
    label_names: Sequence[str] | None = None
    _learned: list[str] | None = field(init=False, default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        classes = check_classes(self.num_labels, self.label_names, self.name)
        self.num_labels = classes  # pyright: ignore[reportIncompatibleVariableOverride]
        check_positive(self.max_length, "max_length", self.name)
        if self.problem is None:
            self.problem = "regression" if self.num_labels == 1 else "single_label"
        if self.problem not in _PROBLEM_TYPES:
            raise ValueError(f"{self.name}: `problem` is one of {list(_PROBLEM_TYPES)}, not {self.problem!r}.")
        if self.problem == "single_label" and self.num_labels == 1:
            raise ValueError(
                f"{self.name}: one class is nothing to tell apart. Use num_labels=2, or problem='regression'."
            )
        if self.text_pair is not None and self.text is None:
            raise ValueError(f"{self.name}: `text_pair={self.text_pair!r}` needs `text` named too.")

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> SequenceClassification:
        """With the config's labels, and its problem type where it names one."""
        problem: Problem | None = next((p for p, kind in _PROBLEM_TYPES.items() if kind == config.problem_type), None)
        return cls(num_labels=config.num_labels, problem=problem, label_names=config_names(config))

    @property
    def label_names_in_use(self) -> list[str] | None:
        """As set, or as numbered by the first `preprocess`."""
        return list(self.label_names) if self.label_names is not None else self._learned

    def auto_class(self, config: PretrainedConfig) -> type:
        """AutoModelForSequenceClassification, or the image or audio classifier where the model type has only that."""
        import transformers
        from transformers.models.auto import modeling_auto as auto

        if config.model_type not in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
            if config.model_type in auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
                return transformers.AutoModelForImageClassification
            if config.model_type in auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES:
                return transformers.AutoModelForAudioClassification
        return transformers.AutoModelForSequenceClassification

    def config_kwargs(self) -> dict[str, Any]:
        """`num_labels`, `problem_type`, and the names if there are any."""
        return {
            "num_labels": self.num_labels,
            "problem_type": _PROBLEM_TYPES[self._problem],
            **name_maps(self.label_names),
        }

    @property
    def _problem(self) -> Problem:
        return self.problem or "single_label"

    @property
    def _classes(self) -> int:
        return self.num_labels or 0

    def _learn(self, sources: list[Source]) -> None:
        if self._problem == "regression" or self.label_names is not None or self._learned is not None:
            return
        columns = [(s, s.find("label", self.label, ("label", "labels"))) for s in sources]
        values = [v for source, column in columns for v in source.dataset[column]]
        self._learned = learned_names(values, self._classes, self.name)

    def _encode(self, source: Source, tokenizer: Any) -> Any:
        text, pair = text_columns(source, self.text, self.text_pair)
        label = source.find("label", self.label, ("label", "labels"))
        declared = feature_names(source.dataset.features[label])
        cut = truncation(tokenizer, self.max_length)

        def encode(columns: dict[str, list[Any]], rows: list[int]) -> dict[str, Any]:
            texts = [source.texts(columns[c], rows, c) for c in (text, pair) if c is not None]
            encoding = source.filled(token_columns(tokenizer(*texts, **cut)), rows)
            wheres = [f"{source.where}, row {row}" for row in rows]
            encoding["labels"] = [self._target(v, declared, w) for v, w in zip(columns[label], wheres, strict=True)]
            return encoding

        return source.map(encode)

    def _target(self, value: Any, declared: list[str] | None, where: str) -> Any:
        if self._problem == "regression":
            return regression_target(value, self._classes, where)
        names = self.label_names_in_use
        convert = multi_hot if self._problem == "multi_label" else class_id
        return convert(value, self._classes, names, declared, where)

    def collator(self, tokenizer: Any, model: Any = None) -> Callable[..., Any]:
        """DataCollatorWithPadding; images, which need no padding, get the default collator."""
        from transformers import DataCollatorWithPadding, DefaultDataCollator

        if not hasattr(tokenizer, "pad_token_id"):
            return DefaultDataCollator()
        require_pad(tokenizer, self.name)
        return DataCollatorWithPadding(tokenizer)

    def count(self, batch: Mapping[str, Any]) -> Tensor | int:
        """Labels that are not −100; for float labels (several labels, regression) every number."""
        labels = labels_of(batch, self.name)
        return labels.numel() if labels.is_floating_point() else (labels != -100).sum()

    def logits(self, output: Any, batch: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """[(logits (B, num_labels), mask (B,))]; every row counts."""
        return [(output.logits, torch.ones(output.logits.shape[0], dtype=torch.bool, device=output.logits.device))]

    @property
    def distribution(self) -> Distribution:
        """Categorical for one label per row, Bernoulli for several, real for regression."""
        return _DISTRIBUTIONS[self._problem]

    def metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        """By problem: accuracy, macro F1, MCC; micro and macro F1, subset accuracy; MSE, Pearson, Spearman."""
        scores = {"single_label": single_label, "multi_label": multi_label, "regression": regression}[self._problem]
        return scores(np.asarray(first_array(predictions)), np.asarray(labels))


def text_columns(source: Source, text: str | None, pair: str | None) -> tuple[str, str | None]:
    """The text column and the second of a pair, named by the user or found by name."""
    if text is not None:
        return source.require("text", text), None if pair is None else source.require("text_pair", pair)
    pairs = [p for p in PAIRS if set(p) <= set(source.columns)]
    singles = [t for t in TEXTS if t in source.columns and not any(t in p for p in pairs)]
    if len(pairs) + len(singles) > 1:
        found = [*pairs, *singles]
        raise ValueError(f"{source.where}: {found} could each be the text. Name it: `text=…` (and `text_pair=…`).")
    return pairs[0] if pairs else (source.find("text", None, TEXTS), None)


def regression_target(value: Any, size: int, where: str) -> float | list[float]:
    """One finite number, or a list of `size` of them, as floats."""
    numbers = list(value) if isinstance(value, list | tuple) else [value]
    bad = [n for n in numbers if isinstance(n, bool) or not isinstance(n, int | float) or not np.isfinite(n)]
    if bad or len(numbers) != size:
        raise ValueError(f"{where}: a regression target is {size} finite number(s), got {value!r}.")
    floats = [float(n) for n in numbers]
    return floats[0] if size == 1 else floats


def single_label(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, macro F1 over the classes seen or predicted, Matthews correlation. Shapes (N, C), (N,)."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    known = labels != -100
    predicted, labels = logits.argmax(-1)[known], labels[known]
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "f1": float(f1_score(labels, predicted, average="macro", zero_division=0)),  # pyright: ignore[reportArgumentType]
        "mcc": float(matthews_corrcoef(labels, predicted)),
    }


def multi_label(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """F1 over all decisions and averaged over classes, and the share of rows right in full. Shapes (N, C), (N, C)."""
    from sklearn.metrics import accuracy_score, f1_score

    predicted, truth = (logits > 0).astype(int), labels.astype(int)
    return {
        "f1_micro": float(f1_score(truth, predicted, average="micro", zero_division=0)),  # pyright: ignore[reportArgumentType]
        "f1_macro": float(f1_score(truth, predicted, average="macro", zero_division=0)),  # pyright: ignore[reportArgumentType]
        "subset_accuracy": float(accuracy_score(truth, predicted)),
    }


def regression(outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Mean squared error and correlations over all numbers; a correlation with a constant is given as 0."""
    from scipy.stats import pearsonr, spearmanr

    x, y = outputs.reshape(-1).astype(np.float64), labels.reshape(-1).astype(np.float64)
    flat = len(x) < 2 or bool(np.ptp(x) == 0 or np.ptp(y) == 0)
    return {
        "mse": float(((x - y) ** 2).mean()),
        "pearson": 0.0 if flat else float(pearsonr(x, y)[0]),  # pyright: ignore[reportArgumentType]
        "spearman": 0.0 if flat else float(spearmanr(x, y)[0]),  # pyright: ignore[reportArgumentType]
    }
