"""The task that the user asked for, as an object, checked against the model where there is one."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING

from torch import nn

from .. import registry
from ..errors import MethodError
from ..layers import transformers_model
from ..settings import check_plain, make
from .base import Task
from .infer import builds, infer_task

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def choose_task(task: str | Task, num_labels: int | None, model: nn.Module | None = None) -> Task:
    """A name or an object as a Task of its own.

    Args:
        num_labels: for tasks that have classes; a loaded `model` tells its own.
    Raises:
        MethodError: unknown name, or labels that are missing, given twice or given to a task without classes.
    """
    if isinstance(task, Task):
        if num_labels not in (None, getattr(task, "num_labels", None)):
            raise MethodError(f"num_labels={num_labels}, but the task object says {task.num_labels}. Give it once.")
        check_plain(task.settings(), f"task {task.name!r}")
        return copy.deepcopy(task)
    if not isinstance(task, str):
        raise MethodError(f"task={task!r} is a {type(task).__name__}; give a name such as 'SEQ_CLS', or a Task object.")
    entry = registry.find(getattr(task, "value", task), ("task",))
    cls = registry.load(entry)
    takes_labels = any(f.name == "num_labels" for f in dataclasses.fields(cls))
    if num_labels is not None and not takes_labels:
        raise MethodError(f"num_labels={num_labels} was given, but the task {task!r} has no classes. Drop it.")
    config = getattr(transformers_model(model), "config", None) if model is not None else None
    if takes_labels and config is not None and num_labels in (None, config.num_labels):
        return cls.from_config(config)
    return make(cls, {} if num_labels is None else {"num_labels": num_labels}, f"task {entry.name!r} ({entry.origin})")


def agree_with_config(task: Task, config: PretrainedConfig, *, by_name: bool, new_head: bool = False) -> Task:
    """The task as the folder that it starts from tells it, where that folder holds a head for this very task.

    A trained head knows its classes by their order: numbering the names of the data anew would shuffle them.

    Args:
        config: as stored, before the task's own settings went in.
        by_name: whether the user gave the task's name only; then the problem type is the head's, too.
        new_head: whether the user asked for a head of another size (`ignore_mismatched_sizes`).
    Raises:
        MethodError: the stored head has another number of labels.
    """
    heads = getattr(task.auto_class(config), "_model_mapping", {})
    built = heads[type(config)] if type(config) in heads else ()  # noqa: SIM401  # transformers' own has no such get
    trained = {c.__name__ for c in (built if isinstance(built, tuple) else (built,))}
    if task.num_labels is None or not trained.intersection(config.architectures or ()) or new_head:
        return task
    if task.num_labels != config.num_labels:
        raise MethodError(
            f"The folder's head has {config.num_labels} labels, but num_labels={task.num_labels}. Give that number to "
            "go on with its head, or model_kwargs={'ignore_mismatched_sizes': True} to start with a new one."
        )
    own = type(task).from_config(config)
    if by_name:
        return own
    if task.settings().get("label_names", ()) is None:
        return dataclasses.replace(task, label_names=own.label_names_in_use)
    return task


def check_loaded(model: nn.Module, task: Task, num_labels: int | None) -> None:
    """What the user says about a loaded model must be true of it: its task, and the size of its head."""
    base = transformers_model(model)
    own = infer_task(base)
    if task.name and own.name and not builds(task, base):
        raise MethodError(f"A {type(base).__name__} does the task {own.name!r}, not {task.name!r}. Drop task=.")
    if num_labels is not None and task.num_labels is None:
        named = f"the task {task.name!r}" if task.name else f"{type(base).__name__}"
        raise MethodError(f"num_labels={num_labels} was given, but {named} has no classes. Drop it.")
    has = getattr(getattr(base, "config", None), "num_labels", None)
    wanted = num_labels if num_labels is not None else task.num_labels
    if wanted is not None and has is not None and wanted != has:
        raise MethodError(
            f"The loaded model's head has {has} labels, but num_labels={wanted}. Load it with num_labels={wanted}."
        )
