"""Class labels as users write them — ids, names, sets of either, 0/1 vectors — turned into what a loss takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..names import nearest


def check_classes(num_labels: int | None, label_names: Sequence[str] | None, where: str) -> int:
    """The number of classes, from either setting.

    Raises: ValueError: neither is given, they contradict each other, or a name comes twice.
    """
    if label_names is not None:
        twice = sorted({n for n in label_names if list(label_names).count(n) > 1})
        if isinstance(label_names, str) or not label_names or twice:
            raise ValueError(f"{where}: `label_names` must be different names, one per class, got {label_names!r}.")
        if num_labels is not None and num_labels != len(label_names):
            raise ValueError(
                f"{where}: num_labels={num_labels} but `label_names` has {len(label_names)}: {label_names}."
            )
        return len(label_names)
    if num_labels is None:
        raise ValueError(f"{where} needs `num_labels` (or `label_names`): how many outputs the new head has.")
    if isinstance(num_labels, bool) or not isinstance(num_labels, int) or num_labels < 1:
        raise ValueError(f"{where}: `num_labels` must be a whole number ≥ 1, got {num_labels!r}.")
    return num_labels


def name_maps(label_names: Sequence[str] | None) -> dict[str, Any]:
    """`id2label` and `label2id` for a model's config; nothing when the classes have no names."""
    if label_names is None:
        return {}
    return {"id2label": dict(enumerate(label_names)), "label2id": {n: i for i, n in enumerate(label_names)}}


def config_names(config: Any) -> list[str] | None:
    """The class names of a model's config, by id; None for none and for transformers' own `LABEL_0`, …."""
    names = [config.id2label[i] for i in sorted(config.id2label)]
    filled_in = names == [f"LABEL_{i}" for i in range(len(names))]
    usable = 0 < len(names) == len(set(names)) == config.num_labels
    return names if usable and not filled_in else None


def feature_names(feature: Any) -> list[str] | None:
    """The class names that a datasets feature declares: `ClassLabel`, or a list of them; else None."""
    inner = getattr(feature, "feature", feature)
    names = getattr(inner, "names", None)
    return list(names) if names is not None else None


def class_id(
    value: Any, num_labels: int, names: Sequence[str] | None, declared: Sequence[str] | None, where: str
) -> int:
    """One class as an id in 0 … num_labels − 1.

    Args:
        value: an id, or a name.
        names: the task's classes, in the head's order; None if they have no names.
        declared: the names behind the dataset's ids (`ClassLabel`). Where both are known, ids go through the names.
        where: what an error starts with: task, split, row.
    """
    if isinstance(value, int) and declared is not None and names is not None:
        if not 0 <= value < len(declared):
            raise ValueError(f"{where}: label {value} is outside the dataset's own classes {list(declared)}.")
        value = declared[value]
    if isinstance(value, str):
        if names is None:
            raise ValueError(f"{where}: label {value!r} is a name, and the classes have none. Pass `label_names=[…]`.")
        if value not in names:
            raise ValueError(f"{where}: label {value!r} is none of {list(names)}.{nearest(value, names)}")
        return list(names).index(value)
    if not isinstance(value, int):
        raise ValueError(f"{where}: label {value!r} is neither a class id nor a name.")
    if not 0 <= value < num_labels:
        raise ValueError(
            f"{where}: label {value} is outside 0..{num_labels - 1} (num_labels={num_labels}). Raise `num_labels` or "
            "mend the row; a split whose labels are hidden (−1) cannot be used for training or metrics."
        )
    return int(value)


def multi_hot(
    value: Any, num_labels: int, names: Sequence[str] | None, declared: Sequence[str] | None, where: str
) -> list[float]:
    """One row's set of classes as 0/1 floats, length `num_labels`.

    Whole numbers and names are the classes that apply; floats and bools are the 0/1 vector itself. (So [0, 1] means
    "classes 0 and 1" and [0.0, 1.0] means "class 1".)
    """
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where}: a multi-label row is a list of classes or of 0/1 floats, got {value!r}.")
    if value and all(isinstance(v, bool | float) for v in value):
        if len(value) != num_labels or any(v not in (0, 1) for v in value):
            raise ValueError(
                f"{where}: {value!r} is not a vector of {num_labels} zeros and ones (num_labels={num_labels})."
            )
        return [float(v) for v in value]
    ids = [class_id(v, num_labels, names, declared, where) for v in value]
    if len(set(ids)) != len(ids):
        raise ValueError(f"{where}: {value!r} names a class twice. If it is a 0/1 vector, write it as floats.")
    return [1.0 if i in ids else 0.0 for i in range(num_labels)]


def names_in(values: Sequence[Any]) -> list[str]:
    """The different strings among labels (or lists of labels), sorted; empty when the labels are not names."""
    flat = [v for value in values for v in (value if isinstance(value, list | tuple) else [value])]
    return sorted({v for v in flat if isinstance(v, str)})


def learned_names(values: Sequence[Any], num_labels: int, where: str) -> list[str] | None:
    """Names of string labels in alphabetical order, so that a second run gives the same ids; None if they are ids.

    Raises: ValueError: the data has more or fewer names than the head has classes.
    """
    names = names_in(values)
    if not names:
        return None
    if len(names) != num_labels:
        shown = f"{names[:10]}{' …' if len(names) > 10 else ''}"
        raise ValueError(
            f"{where}: num_labels={num_labels} but the labels are {len(names)} names: {shown}. Pass "
            "`label_names=[…]` with every class in the head's order."
        )
    return names
