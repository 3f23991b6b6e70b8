"""How a run ended, and what tells it from the uninterrupted one: every weight, the optimizer, every loss on the way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor


def ending(model: Any, kept: list[Any], more: Mapping[str, Any]) -> dict[str, str]:
    """Place → a digest of all that is there at the end, to the last bit.

    Args:
        model: with a plan; its weights, buffers, timeline and plugins' state.
        kept: optimizer and schedulers.
        more: what else must be equal.
    """
    plan = model.peft_plus
    tree = {
        "model": dict(model.named_parameters()) | dict(model.named_buffers()),
        "kept": [part.state_dict() for part in kept],
        "timeline": plan.timeline,
        "plugins": {plugin.name: plugin.state_dict() for plugin in plan.plugins},
        **more,
    }
    return dict(_flat(tree))


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if is_dataclass(value) and not isinstance(value, type):
        value = {part.name: getattr(value, part.name) for part in fields(value)}
    if isinstance(value, Mapping):
        for key in value:
            yield from _flat(value[key], f"{path}/{key}")
    elif isinstance(value, list | tuple):
        yield f"{path}#", str(len(value))
        for place, item in enumerate(value):
            yield from _flat(item, f"{path}/{place}")
    elif isinstance(value, Tensor | np.ndarray):
        array = value.detach().cpu().contiguous().numpy() if isinstance(value, Tensor) else value
        yield path, f"{array.dtype} {array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"
    elif isinstance(value, set | frozenset):
        yield path, repr(sorted(value))
    else:
        yield path, value.hex() if isinstance(value, float) else repr(value)


Line = tuple[float, str, int, str]


def lives(log: Path) -> list[list[Line]]:
    """The lines of each life: time, event, number, value. A line that a kill cut is left out."""
    found: list[list[Line]] = []
    for text in log.read_text(encoding="utf-8").split("\n")[:-1] if log.is_file() else []:
        time, event, number, value = text.split(" ", 3)
        if event == "begin":
            found.append([])
        found[-1].append((float(time), event, int(number), value))
    return found


def differences(folder: Path, reference: Path, rank: int = 0) -> list[str]:
    """What tells the run in `folder`, of several lives, from the uninterrupted one; empty where nothing does."""
    faults: list[str] = []
    name = f"end.{rank}.json"
    if not (folder / name).is_file():
        report = folder / f"error.{rank}.txt"
        return [f"it never ended: {report.read_text(encoding='utf-8')[-3000:] if report.is_file() else 'no report'}"]
    ours, theirs = (json.loads((place / name).read_text(encoding="utf-8")) for place in (folder, reference))
    odd = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
    if odd:
        faults.append(f"{len(odd)} of {len(theirs)} things differ at the end, first {', '.join(odd[:5])}")
    whole = {number: value for _, event, number, value in lives(reference / f"log.{rank}.txt")[0] if event == "step"}
    done = 0
    for life, lines in enumerate(lives(folder / f"log.{rank}.txt")):
        steps = [(number, value) for _, event, number, value in lines if event == "step"]
        numbers = [number for number, _ in steps]
        if numbers and (numbers != list(range(numbers[0], numbers[-1] + 1)) or numbers[0] > done + 1):
            faults.append(f"life {life} made the steps {numbers} after step {done}")
        faults += [
            f"life {life}, step {number}: {value} instead of {whole.get(number)}"
            for number, value in steps
            if value != whole.get(number)
        ]
        done = max(done, *numbers) if numbers else done
    if done != max(whole):
        faults.append(f"{done} steps were made instead of {max(whole)}")
    return faults
