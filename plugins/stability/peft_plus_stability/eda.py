"""EDA: easy data augmentation, on tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from peft_plus import Plugin, Run
from peft_plus.data_columns import is_table
from peft_plus.layers import transformers_model
from peft_plus.random_state import rng_state, set_rng_state
from peft_plus.token_rows import positions_of

from .augmented_rows import BY_TOKEN, AugmentedRows, RowForm
from .nearest_tokens import nearest_tokens

_OPERATIONS = ("replace", "insert", "swap", "delete")
_LOOKED_AT = 64
_ROWS_AT_ONCE = 10_000


@dataclass(kw_only=True)
class EDA(Plugin):
    """Train on slightly changed copies of the examples: words replaced, inserted, exchanged or dropped.

    In each epoch an example is changed with probability `share`, by one of the operations at random (Wei & Zou 2019,
    arXiv:1901.11196). With l words: max(1, ⌊alpha · l⌋) of them are replaced by a neighbour, or as many neighbours
    inserted, or exchanges made; or each is dropped with probability `alpha`. Here words are tokens, a neighbour is one
    of the tokens nearest in the model's own input embeddings when the stage begins (cosine; there is no WordNet), and
    the changed example takes the place of the plain one. Special tokens and padding stay, a text pair stays a pair, and
    rows that are equally long remain so. A row depends on (seed, stage, epoch, index) alone.

    Args:
        alpha: how much of a row changes, in [0, 1]; 0 is the plain run bit for bit.
        share: of the examples that are changed in an epoch, in [0, 1]; 0 is the plain run bit for bit.
        operations: one or more of `"replace"`, `"insert"`, `"swap"`, `"delete"`.
        neighbours: from how many nearest tokens one is drawn, ≥ 1.
        special_ids: token ids that stay, in addition to those that the tokenizer calls special; needed where no
            tokenizer is known.
    Raises:
        ValueError: a setting is out of its range; the task has no label per example, or the model no tokens; the data
            are no rows of tokens, or it is not known which of these are special.
    """

    name: ClassVar[str] = "eda"
    source: ClassVar[str] = "Wei & Zou 2019, arXiv:1901.11196"

    alpha: float = 0.1
    share: float = 0.5
    operations: Sequence[str] = _OPERATIONS
    neighbours: int = 5
    special_ids: Sequence[int] | None = None

    nearest: dict[str, Tensor] = field(init=False, default_factory=dict)
    """`ids` → the tokens of the data, sorted, shape (n,); `table` → their neighbours, shape (n, neighbours)."""

    def __post_init__(self) -> None:
        for name in ("alpha", "share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: give a share in [0, 1].")
        given = self.operations
        if isinstance(given, str) or not given or len(set(given)) < len(given) or not {*given} <= {*_OPERATIONS}:
            raise ValueError(f"operations={given!r}: give a list of some of {', '.join(map(repr, _OPERATIONS))}.")
        if self.neighbours < 1:
            raise ValueError(f"neighbours={self.neighbours}: give a number of tokens ≥ 1.")

    @property
    def _idle(self) -> bool:
        return self.alpha == 0 or self.share == 0

    def on_build(self, run: Run) -> None:
        if self._idle:
            return
        if run.task.name != "SEQ_CLS":
            raise ValueError(
                f"it changes the tokens of an example that has one label, and the labels of {run.task.name!r} lie at "
                "the tokens or depend on them. It is for 'SEQ_CLS'. Drop the plugin."
            )
        _embeddings(run)

    def task_data(self, run: Run, dataset: Any) -> Any:
        if self._idle:
            return dataset
        _check_map_style(dataset)
        rows = _first_rows(dataset)
        self._check_columns(run, rows)
        special = self._special(run)
        self.nearest = {"ids": torch.zeros(0, dtype=torch.long)}
        self.nearest["table"] = torch.zeros(0, self.neighbours, dtype=torch.long)
        if {"replace", "insert"} & set(self.operations):
            self.nearest |= self._neighbours(run, dataset, special)
        return AugmentedRows(
            dataset,
            key=run.generator("eda").initial_seed(),
            alpha=self.alpha,
            share=self.share,
            operations=list(self.operations),
            form=self._form(run, rows, special),
            nearest=self.nearest,
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        # In place: the rows read it too. Where the embeddings train, those of now have other neighbours.
        own = self.nearest
        super().load_state_dict(state)
        own.clear()
        own.update(state["nearest"])
        self.nearest = own

    def _special(self, run: Run) -> frozenset[int]:
        """The ids that are never touched."""
        known = getattr(run.tokenizer, "all_special_ids", None)
        if known is None and self.special_ids is None:
            raise ValueError(
                "it must leave the special tokens alone, and no tokenizer tells which these are: tokenise with "
                "model.peft_plus.task.preprocess(dataset, tokenizer), give the Trainer processing_class=tokenizer, or "
                "set special_ids, e.g. [tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id]."
            )
        return frozenset({*(known or ()), *(self.special_ids or ())} - _unknown(run))

    def _neighbours(self, run: Run, dataset: Any, special: frozenset[int]) -> dict[str, Tensor]:
        weight = _embeddings(run)
        words = len(run.tokenizer) if hasattr(run.tokenizer, "__len__") else len(weight)  # a table may be padded
        barred = {*special, *_unknown(run), *range(words, len(weight))}
        ids = [token for token in _tokens_of(dataset) if token not in barred]
        ordered = torch.tensor(sorted(ids), dtype=torch.long)
        return {"ids": ordered, "table": nearest_tokens(weight, ordered, self.neighbours, without=barred)}

    def _form(self, run: Run, rows: Sequence[Mapping[str, Any]], special: frozenset[int]) -> RowForm:
        lengths = {len(row["input_ids"]) for row in rows}
        fixed, masked = len(lengths) == 1, all(row.get("attention_mask") is not None for row in rows)
        config: Any = getattr(transformers_model(run.model), "config", None)
        pad = getattr(run.tokenizer, "pad_token_id", None)
        pad = getattr(config, "pad_token_id", None) if pad is None else pad
        if fixed and "delete" in self.operations and (not masked or pad is None):
            lacks = "no attention_mask" if not masked else "no known pad token"
            raise ValueError(
                f"all rows are {lengths.pop()} tokens long and have {lacks}, so that nothing can take the place of a "
                "dropped token. Pad rows when they are batched (model.peft_plus.task.collator), or leave 'delete' out "
                "of operations."
            )
        positions = positions_of(run.model)
        return RowForm(
            special=special,
            fixed=fixed,
            longest=None if positions is None else positions.size - positions.virtual,
            pad={"input_ids": pad or 0, "attention_mask": 0, "token_type_ids": 0, "special_tokens_mask": 1},
            left=getattr(run.tokenizer, "padding_side", "right") == "left",
        )

    def _check_columns(self, run: Run, rows: Sequence[Mapping[str, Any]]) -> None:
        taken = inspect.signature(type(transformers_model(run.model)).forward).parameters
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping) or not _is_flat(row.get("input_ids")):
                raise ValueError(
                    f"row {number} has no 'input_ids' that are a list of token ids. Tokenise the data first: "
                    "model.peft_plus.task.preprocess(dataset, tokenizer)."
                )
            for name, value in row.items():
                by_token = name in taken and _is_flat(value) and len(value) == len(row["input_ids"])
                if by_token and name not in BY_TOKEN and not name.startswith("label"):
                    raise ValueError(
                        f"the column {name!r} has a value for each token, and how it follows a change of the tokens is "
                        "not known. Drop it, or drop the plugin."
                    )


def _embeddings(run: Run) -> Tensor:
    """The table of the model's input embeddings, shape (vocabulary, width)."""
    base: Any = transformers_model(run.model)
    try:
        weight: Any = base.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        weight = None
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(f"{type(base).__name__} has no embeddings of tokens, so there are no words to change.")
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight  # type: ignore[operator]


def _unknown(run: Run) -> set[int]:
    """The id of the token that stands for unknown words, which may be exchanged or dropped, but has no neighbours."""
    found = getattr(run.tokenizer, "unk_token_id", None)
    return set() if found is None else {found}


def _check_map_style(dataset: Any) -> None:
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(
            f"it finds an example by its index, and {type(dataset).__name__} is read as a stream. Give map-style data, "
            "e.g. a datasets.Dataset."
        )


def _first_rows(dataset: Any) -> list[Any]:
    random = rng_state()
    try:
        return [dataset[index] for index in range(min(len(dataset), _LOOKED_AT))]
    finally:
        set_rng_state(random)  # rows may be drawn, and training draws what it would have drawn


def _is_flat(value: Any) -> bool:
    """Whether it is a list of numbers, in whatever form."""
    return isinstance(value, list | tuple | np.ndarray | Tensor) and np.ndim(value) == 1  # type: ignore[arg-type]


def _tokens_of(dataset: Any) -> set[int]:
    """All token ids that the rows hold."""
    if is_table(dataset) and "input_ids" in dataset.column_names:
        import pyarrow.compute

        compute: Any = pyarrow.compute  # its functions are made when it is imported
        tables: Iterator[Any] = dataset.select_columns(["input_ids"]).with_format("arrow").iter(_ROWS_AT_ONCE)
        return {token for t in tables for token in compute.unique(compute.list_flatten(t.column(0))).to_pylist()}
    random = rng_state()
    try:
        return {int(token) for index in range(len(dataset)) for token in dataset[index]["input_ids"]}
    finally:
        set_rng_state(random)
