"""The task contract, and the arithmetic every task shares: a model's own mean loss turned into a summed term."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from ..plugin import LossTerm
from .source import Source, splits

if TYPE_CHECKING:
    import numpy as np
    from transformers import EvalPrediction, PretrainedConfig

IGNORED = -100
"""A label that no loss and no metric counts (PyTorch's and transformers' own convention)."""

Distribution = Literal["categorical", "bernoulli", "real"]


@dataclass(kw_only=True)
class Task(ABC):
    """What is learned: the head, how data becomes tensors, over what the loss runs, how success is measured.

    Subclass it as a `@dataclass(kw_only=True)`; init fields are settings, checked in `__post_init__`, before anything
    heavy loads. A task never changes the dataset or the tokenizer it is given.

    Class variables:
        name: the entry-point name.
        peft_task_type: what PEFT's config is told; None where PEFT has no such task type.
        new_head: whether the head is freshly initialised, so that it must train whatever the tuner.
        num_labels: None; a setting (≥ 1) in the tasks whose head has classes or regression targets.
    Attributes:
        tokenizer: the one that `preprocess` was last given; the Trainer bridge makes the default collator from it.
        virtual_tokens: whether the model's tuner puts tokens in front of the input, the last of which then predicts
            a row's first label.
    """

    name: ClassVar[str]
    peft_task_type: ClassVar[str | None]
    new_head: ClassVar[bool]

    num_labels: ClassVar[int | None] = None

    tokenizer: Any = field(init=False, default=None, repr=False, compare=False)
    virtual_tokens: bool = field(init=False, default=False, repr=False, compare=False)

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> Task:
        """The task of a loaded model with this config, e.g. with its number of labels."""
        return cls()

    def settings(self) -> dict[str, Any]:
        """Name → value of every setting."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    @property
    def predicts_next(self) -> bool:
        """Whether the model's own loss compares logits[t] with labels[t + 1], as causal language models' do."""
        return False

    @property
    def label_names_in_use(self) -> list[str] | None:
        """The names of the classes, in the head's order: as set, or as learned from the data; None for none."""
        return None

    @abstractmethod
    def auto_class(self, config: PretrainedConfig) -> type:
        """The transformers Auto class that builds this task's model for `config`."""

    def config_kwargs(self) -> dict[str, Any]:
        """What the model's config gets: `num_labels`, `problem_type`, `id2label`, and so on."""
        return {}

    def preprocess(self, dataset: Any, tokenizer: Any) -> Any:
        """Tokenise. Row order is kept, no row is dropped, no text column stays, and nothing is random.

        Args:
            dataset: `datasets.Dataset` or `DatasetDict`; left as it is.
            tokenizer: the base model's own.
        Returns: the same kind of object, holding the model's inputs.
        Raises:
            TypeError: neither of the two kinds.
            ValueError: no rows, a missing column, or a value that cannot be used; names split, row and value.
        """
        named = splits(dataset, self.name)
        self.tokenizer = tokenizer
        self._learn(list(named.values()))
        encoded = {key: self._encode(source, tokenizer) for key, source in named.items()}
        return encoded[None] if None in encoded else type(dataset)(encoded)

    def _learn(self, sources: list[Source]) -> None:  # noqa: B027 - most tasks have nothing to learn
        """Once per `preprocess`, over all its splits: what must be the same in each (names of string labels)."""

    def _encode(self, source: Source, tokenizer: Any) -> Any:
        """One split, tokenised."""
        raise NotImplementedError(f"{type(self).__name__} defines neither `_encode` nor `preprocess`.")

    @abstractmethod
    def collator(self, tokenizer: Any, model: Any = None) -> Callable[..., Any]:
        """What turns a list of preprocessed rows into a padded batch: one of transformers' own collators.

        Args:
            model: whose inputs are made; some collators ask it for the decoder's.
        """

    def count(self, batch: Mapping[str, Any]) -> Tensor | int:
        """Over how many labels the model's own mean loss of `batch` averages: shape (), on the labels' device."""
        return (labels_of(batch, self.name) != IGNORED).sum()

    def loss(self, output: Any, batch: Mapping[str, Any]) -> LossTerm:
        """The model's own loss as a sum: mean × count, fp32, with gradient.

        The forward must not have been given `num_items_in_batch`: with it the model's loss is no longer the mean.
        """
        return summed(own_loss(output, batch, self.name), self.count(batch))

    @abstractmethod
    def logits(self, output: Any, batch: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """The predictions as (logits, mask) pairs; `mask` is bool, True where a prediction counts.

        Shapes are (..., classes) and (...). Virtual tokens that a prompt tuner put in front are cut off.
        """

    @property
    def distribution(self) -> Distribution:
        """What the last axis of `logits` parametrises: a consistency loss picks KL, Bernoulli KL or MSE by it."""
        return "categorical"

    @abstractmethod
    def metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        """Scores of a whole evaluation set. Arrays as `EvalPrediction` holds them, padded with −100."""

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """`metrics` in the form that `Trainer(compute_metrics=…)` takes."""
        return self.metrics(prediction.predictions, prediction.label_ids)


def labels_of(batch: Mapping[str, Any], where: str, key: str = "labels") -> Tensor:
    """`batch[key]`, or an error that says what the batch holds instead."""
    if batch.get(key) is None:
        raise ValueError(
            f"{where or 'the task'}: the batch has no {key!r}, only {sorted(batch)}. Tokenise with the task's own "
            "`preprocess` and `collator`, or name the column so; Trainer drops columns unless the model's forward "
            "takes them."
        )
    return batch[key]


def own_loss(output: Any, batch: Mapping[str, Any], where: str) -> Tensor:
    """The loss the model computed itself, shape ()."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise ValueError(
            f"{where or 'the task'}: the model returned no loss for a batch with {sorted(batch)}. The forward needs "
            "the labels, and the model must belong to the task (`task=`)."
        )
    return loss


def summed(mean: Tensor, count: Tensor | int) -> LossTerm:
    """A mean over `count` labels as a sum.

    Without any label the mean is 0 / 0; the sum is then exactly 0, still with a graph, so that every process runs the
    same backward. The choice is made on the device: no synchronisation.

    Args:
        mean: shape (), any float dtype; NaN is allowed where `count` is 0.
        count: ≥ 0.
    """
    number = torch.as_tensor(count, device=mean.device)
    total = mean.float() * number
    # The gradient of `where` is 0 on the untaken side, and cross-entropy writes no gradient for ignored labels, so the
    # NaN of an empty mean stays out of the backward too.
    return LossTerm(sum=torch.where(number > 0, total, torch.zeros_like(total)), count=count, per="label")


def keep_last(logits: Tensor, length: int, where: str) -> Tensor:
    """Cut virtual tokens off: PEFT puts them in front, so the last `length` positions are the real ones.

    Args:
        logits: (batch, positions, ...), positions ≥ length.
    Raises: ValueError: there are fewer positions than labels.
    """
    extra = logits.shape[1] - length
    if extra < 0:
        raise ValueError(
            f"{where or 'the task'}: logits of shape {tuple(logits.shape)} for {length} labels per row. The model "
            "returned logits for part of the sequence only (`logits_to_keep`?), or it belongs to another task."
        )
    return logits[:, extra:]


def first_array(predictions: Any) -> np.ndarray:
    """The logits among what Trainer collected: models that return more give a tuple, logits first."""
    return predictions[0] if isinstance(predictions, tuple | list) else predictions


def require_pad(tokenizer: Any, where: str) -> None:
    """Refuse a tokenizer that cannot pad, with the fix; the tokenizer is the user's and never changed here."""
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"{where}: the tokenizer has no pad token, so rows of different length cannot share a batch. "
            "Set `tokenizer.pad_token = tokenizer.eos_token` first (padding is never a label, real eos tokens are)."
        )


def check_positive(value: int | None, setting: str, where: str) -> None:
    """None or a whole number ≥ 1."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{where}: `{setting}` must be a whole number ≥ 1, got {value!r}.")
