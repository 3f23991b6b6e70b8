"""`from_pretrained`: a saved adapter back onto the user's own base, without trusting the folder that it comes from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import loading
from .adapter_config import config_of
from .adapter_folder import (
    CONFIG,
    FILES,
    RECORD,
    WEIGHTS,
    AdapterFolder,
    check_finite,
    read_folder,
    read_json,
    shortened,
)
from .build import attach
from .errors import MethodError
from .module_tree import restored_on_error
from .patterns import tame
from .recorded import check_base, name_labels, recorded_plugins, recorded_task
from .rehearsal import Bounded, NeedsValues, refusal, rehearse
from .saving import THAWED, fingerprint, load_thawed
from .tasks import Task, infer_task
from .tasks.choose import check_loaded
from .tuning import is_peft


def from_pretrained(
    base: str | os.PathLike[str] | nn.Module | None,
    folder: str | os.PathLike[str] | None = None,
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
    task: str | Task | None = None,
    num_labels: int | None = None,
    quantization: Any = None,
    device_map: Any = None,
    dtype: Any = None,
    model_kwargs: Mapping[str, Any] | None = None,
    allow_other_base: bool = False,
) -> Any:
    """Reload what `save_pretrained` wrote, by us or by plain PEFT, onto a base that you name.

    ```python
    model = from_pretrained("org/base", "adapter")
    model = from_pretrained(base, "adapter", is_trainable=True)     # with the plugins that it was trained with
    ```

    The folder is checked before anything is built, and its adapter is first built without memory, on a copy of the
    base's modules. Whatever is refused leaves a loaded base as it was. See `docs/safety.md`.

    Args:
        base: hub id, folder, or a loaded model. Never the one that the folder names.
        folder: what was saved; or a hub id, of which only the four files that are read are fetched.
        adapter_name: what the adapter is called in the model.
        is_trainable: whether training goes on: the adapter trains, and the recorded plugins hang on the model as
            `model.peft_plus`. Only then must they be installed, and only then are they imported.
        task, num_labels: of a base given by id or folder, where the adapter's folder does not tell them.
        quantization, device_map, dtype, model_kwargs: as in `get_model`.
        allow_other_base: go on where the base is not the one that was trained on.
    Returns: the PeftModel, of PEFT's own class.
    Raises:
        MethodError: no base, a folder that is damaged, unsafe or does not fit, another base, or a missing plugin.
    """
    if base is None or folder is None:
        raise MethodError(_ask_for_base(base if folder is None else folder))
    if not adapter_name or "." in adapter_name:
        raise MethodError(f"adapter_name={adapter_name!r} is no name for an adapter: give a word without dots.")
    saved = read_folder(_local(folder))
    plugins = recorded_plugins(saved) if is_trainable else {}
    if isinstance(base, nn.Module):
        loading.refuse_options(quantization=quantization, device_map=device_map, dtype=dtype, model_kwargs=model_kwargs)
        if is_peft(base):
            raise MethodError("The base has an adapter already. Give the model below it: model.get_base_model().")
        check_base(base, saved, allow_other=allow_other_base)
        chosen = recorded_task(saved, task, num_labels, base=base, imports=is_trainable)
        if task is not None or num_labels is not None:
            check_loaded(base, chosen or infer_task(base), num_labels)
        model = base
        config, fits = _fitting(model, saved, adapter_name, is_trainable)
    else:
        scheme, options = loading.scheme_of(quantization), loading.load_options(device_map, dtype, model_kwargs)
        chosen = recorded_task(saved, task, num_labels, base=None, imports=is_trainable)
        if chosen is None:
            raise MethodError(f"task= is missing: {str(saved.path)!r} does not tell which class loads {base!r}.")
        by_name = isinstance(task, str) or (task is None and saved.record is None)
        source = loading.open_source(base, chosen, options, by_name=by_name)
        if scheme is not None and loading.scheme_of_model(source.skeleton) is not None:
            raise MethodError(f"The weights of {source.name!r} are stored quantised already; drop quantization.")
        config, fits = _fitting(source.skeleton, saved, adapter_name, is_trainable)
        model = loading.load(source, loading.quantization_config(quantization, source.skeleton, dtype), options)
        check_base(model, saved, allow_other=allow_other_base)
    if not fits:
        rehearse(model, saved, config, adapter_name, values=True)
    with restored_on_error(model):
        return _load(model, saved, config, adapter_name, chosen, plugins)


def _fitting(base: nn.Module, saved: AdapterFolder, adapter_name: str, is_trainable: bool) -> tuple[Any, bool]:
    """The config, and whether the file is known to fit; else the base's weights are needed to tell."""
    config = config_of(saved, base, is_trainable=is_trainable)
    tame(config, base)
    fits = True
    try:
        rehearse(base, saved, config, adapter_name)
    except NeedsValues:
        fits = False
    for name in (WEIGHTS, THAWED) if saved.thawed else (WEIGHTS,):
        check_finite(saved.path / name)
    return config, fits


def _load(
    base: nn.Module,
    saved: AdapterFolder,
    config: Any,
    adapter_name: str,
    task: Task | None,
    plugins: Mapping[str, Any],
) -> Any:
    """What the rehearsal showed to fit, for real, by PEFT's own means."""
    from peft import PeftModel

    is_trainable, untouched = not config.inference_mode, ""
    if is_trainable:
        loading.prepare_quantised(base)
        untouched = fingerprint(base)  # before the tuner, and what was thawed, change it
    try:
        with Bounded(base, saved.weights, dry=False):  # some of PEFT's code waits until there is memory
            model: Any = PeftModel.from_pretrained(
                base, str(saved.path), adapter_name=adapter_name, is_trainable=is_trainable, config=config
            )
    except (MethodError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        what = f"PEFT cannot load the adapter of {str(saved.path)!r} on this {type(base).__name__}"
        raise refusal(what, error) from error
    if is_trainable:
        for name in saved.thawed:
            model.get_parameter(name).requires_grad_(True)
        attach(model, dict(plugins) or [], task=task)
        model.peft_plus.base = {**model.peft_plus.base, "fingerprint": untouched}
    if saved.thawed:
        load_thawed(model, saved.path)
    name_labels(base, saved)
    return model


def _local(folder: str | os.PathLike[str]) -> Path:
    """The folder, fetched first if it is a hub id: the four files that are read, and nothing else."""
    path = Path(folder)
    name = os.fspath(folder)
    if path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:
        raise MethodError(f"{name!r} is no folder here, nor can it be fetched from the hub: {error}") from error


def _ask_for_base(folder: Any) -> str:
    """The base that a folder was trained on, for the user to judge; nothing is loaded from it."""
    told = "from_pretrained(base, folder) takes two things: the base model that you trust, and the adapter's folder."
    if not isinstance(folder, (str, os.PathLike)) or not Path(folder).is_dir():
        return told
    path = Path(folder)
    named = read_json(path / CONFIG).get("base_model_name_or_path") if (path / CONFIG).is_file() else None
    if not named and (path / RECORD).is_file():
        base = read_json(path / RECORD).get("base")
        named = base.get("name_or_path") if isinstance(base, dict) else None
    if not named:
        return f"{told} {str(path)!r} does not say what it was trained on."
    return (
        f"{told} {str(path)!r} says that it was trained on {shortened(named)}. If you trust that one: "
        f"from_pretrained({shortened(named)}, {str(path)!r})."
    )
