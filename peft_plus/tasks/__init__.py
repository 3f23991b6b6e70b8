"""Tasks: what is learned. Head, preprocessing, collator, loss, metrics; one file each."""

from __future__ import annotations

from .base import Task
from .infer import infer_task

__all__ = ["Task", "infer_task"]
