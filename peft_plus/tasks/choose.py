"""The task that the user asked for, as an object, checked against the model where there is one."""

from __future__ import annotations

import copy
import dataclasses

from torch import nn

from .. import registry
from ..errors import MethodError
from ..layers import transformers_model
from ..settings import check_plain, make
from .base import Task
from .infer import builds, infer_task


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
    if num_labels is None and takes_labels and model is not None:
        num_labels = getattr(getattr(transformers_model(model), "config", None), "num_labels", None)
    return make(cls, {} if num_labels is None else {"num_labels": num_labels}, f"task {entry.name!r} ({entry.origin})")


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
