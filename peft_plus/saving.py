"""What is saved beside the weights: `peft_plus.json`, and base weights that were thawed.

PEFT's folder stays PEFT's: plain `PeftModel.from_pretrained` reads it. `peft_plus.json` says how it was trained, by
which versions, and on which base; `thawed.safetensors` holds exactly those base weights that trained, which PEFT
itself would drop.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache, update_wrapper
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from . import registry
from .compose import Plan
from .layers import find_heads, transformers_model
from .parts import bare_name, part_of

logger = logging.getLogger(__name__)

RECORD = "peft_plus.json"
THAWED = "thawed.safetensors"
_FORMAT = 1
_SAMPLE = 64


class SavePretrained:
    """Stands on a model instance as `save_pretrained`: does what the class does, then writes what belongs to the plan.

    An object rather than a closure, so that a model with a plan still copies and pickles, and an attribute of the
    instance rather than a subclass, so that its class stays PEFT's or transformers' own. It must hold the model, which
    `get_model(…).save_pretrained(folder)` would lose otherwise; so a deleted model waits for the garbage collector.
    """

    def __init__(self, model: Any) -> None:
        save = type(model).save_pretrained
        self._model, self._built = model, _sample(model, trainable=True)
        update_wrapper(self, save, updated=())
        self.__signature__ = signature(MethodType(save, model))

    def __getstate__(self) -> dict[str, Any]:
        return {"_model": self._model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Not through update_wrapper: the model may be half restored when a pickle comes back.
        self.__dict__.update(state, _built=None)

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        model, save = self._model, type(self._model).save_pretrained
        if "peft_plus" not in vars(model):  # the user deleted the plan
            return save(model, save_directory, *args, **kwargs)
        _name_labels(model, model.peft_plus)
        given = signature(save).bind(model, save_directory, *args, **kwargs).arguments
        given |= given.get("kwargs", {})
        main = given.get("is_main_process", True)
        uploads = main and given.get("push_to_hub") and hasattr(model, "_upload_modified_files")
        whole = given.get("state_dict")
        with _written_before_upload(model, Path(save_directory), whole) if uploads else nullcontext():
            result = save(model, save_directory, *args, **kwargs)
        if main:
            write(Path(save_directory), model, model.peft_plus, whole)
            self._tell_what_never_ran(model)
        return result

    def _tell_what_never_ran(self, model: Any) -> None:
        """A loop that does not know the plan trains on without a word, and leaves its plugins out."""
        plan: Plan = model.peft_plus
        if plan.plugins and not plan.timeline and self._built not in (None, _sample(model, trainable=True)):
            logger.warning(
                "The weights were changed, but no plugin of this model (%s) ever ran: was it trained by a loop that "
                "does not know them? Use peft_plus.Trainer, with_plugins(TheTrainerClass) or Session.",
                ", ".join(plugin.name for plugin in plan.plugins),
            )


@contextmanager
def _written_before_upload(model: Any, folder: Path, whole: Mapping[str, torch.Tensor] | None) -> Generator[None]:
    """transformers uploads before `save_pretrained` returns: what is ours must lie in the folder by then."""
    upload = model._upload_modified_files

    def write_and_upload(*args: Any, **kwargs: Any) -> Any:
        write(folder, model, model.peft_plus, whole)
        return upload(*args, **kwargs)

    model._upload_modified_files = write_and_upload
    try:
        yield
    finally:
        del model._upload_modified_files


def _name_labels(model: nn.Module, plan: Plan) -> None:
    """Write into the config what the task learned of its classes, before it is saved with the weights."""
    names, config = plan.task.label_names_in_use, getattr(transformers_model(model), "config", None)
    if names and config is not None:
        config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}


def write(folder: Path, model: nn.Module, plan: Plan, whole: Mapping[str, torch.Tensor] | None = None) -> None:
    """Add `peft_plus.json`, and the thawed base weights if there are any, to a folder that holds the weights.

    Args:
        whole: name → weight, where the model itself holds only a share of each (FSDP, ZeRO-3).
    """
    thawed = thawed_weights(model, plan, whole)
    if thawed:
        _replace(folder / THAWED, lambda path: save_file(thawed, path, metadata={"format": "pt"}))
        logger.info(
            "%d tensors of the base trained too; they are in %s, which plain PEFT does not read: reload with "
            "peft_plus.load_thawed(model, folder).",
            len(thawed),
            folder / THAWED,
        )
    elif (folder / THAWED).exists():
        (folder / THAWED).unlink()
    text = json.dumps(record(plan, thawed), indent=2, sort_keys=True) + "\n"
    _replace(folder / RECORD, lambda path: path.write_text(text, encoding="utf-8"))


def thawed_weights(
    model: nn.Module, plan: Plan, whole: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Base weights that may train beside a tuner's own, and that PEFT does not save: name → tensor.

    Empty for `full`, which saves everything. PEFT itself saves what `bias="all"` trains.
    """
    names = {name for name, param in plan.params.items() if param.part == "base"}
    if plan.tuner == "full" or not names:
        return {}
    from peft import get_peft_model_state_dict

    adapters: Any = model.peft_config
    for adapter in adapters:
        saved: Any = get_peft_model_state_dict(
            model, state_dict=whole, adapter_name=adapter, save_embedding_layers=False
        )
        names -= saved.keys()
    tensors: dict[str, torch.Tensor] = {**dict(model.named_parameters()), **(whole or {})}
    return {name: tensors[name].detach().contiguous().cpu() for name in sorted(names)}


def load_thawed(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Put the base weights that trained beside a tuner back into a model that PEFT has reloaded.

    Args:
        model: from `PeftModel.from_pretrained(base, folder)`.
        folder: what `save_pretrained` wrote.
    Returns: the same model, changed in place.
    Raises:
        FileNotFoundError: the folder holds no thawed weights.
        ValueError: a tensor does not fit the model; nothing was changed.
    """
    path = Path(folder) / THAWED
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: no base weights trained in this run, PEFT's folder is complete."
        )
    own = dict(model.named_parameters())
    with safe_open(path, framework="pt") as stored:
        names = list(stored.keys())
        for name in names:
            shape = tuple(stored.get_slice(name).get_shape())
            if name not in own:
                raise ValueError(
                    f"{path}: {name!r} is not a parameter of this {type(model).__name__}; is it the right base?"
                )
            if shape != tuple(own[name].shape):
                raise ValueError(f"{path}: {name!r} has shape {shape}, the model's has {tuple(own[name].shape)}.")
        with torch.no_grad():
            for name in names:
                own[name].copy_(stored.get_tensor(name))
    return model


def record(plan: Plan, thawed: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The content of `peft_plus.json`: plain values only."""
    tuner_origin, versions = _installed(plan.tuner)
    return {
        "format": _FORMAT,
        "tuner": plan.tuner,
        "tuner_origin": tuner_origin,
        "plugins": [{"name": p.name, "origin": plan.origins[p.name], "settings": p.settings()} for p in plan.plugins],
        "task": {
            "name": plan.task.name,
            "settings": plan.task.settings(),
            "labels": plan.task.label_names_in_use,
        },
        "quantization": plan.quantization,
        "base": dict(plan.base),
        "stages_run": list(dict.fromkeys(change.stage for change in plan.timeline)),
        "trained_parameters": sum(math.prod(p.shape) for p in plan.params.values()),
        "thawed_tensors": sorted(thawed),
        "versions": dict(versions),
    }


@cache
def _installed(tuner: str) -> tuple[str, dict[str, str]]:
    """Where a tuner comes from, and the versions in use. Looked up once: it took a third of a checkpoint's time."""
    tuners = registry.entries("tuner")
    names = ("peft-plus", "peft", "transformers", "accelerate", "torch", "bitsandbytes")
    return tuners[tuner].origin if tuner in tuners else "", {name: version(name) for name in names}


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the name, shape, dtype and 64 evenly spaced values of every parameter of the base.

    Adapters and the task's head are left out, so the base alone gives the same as the base inside a PeftModel. Enough
    to tell one base from another of equal shape, cheap enough (milliseconds) to take at every build.
    """
    return _sample(model, trainable=False)


def _sample(model: nn.Module, *, trainable: bool) -> str:
    """SHA-256 over a little of every parameter that may train, or else of every parameter of the base."""
    digest = hashlib.sha256()
    heads = find_heads(model)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if not (tensor.requires_grad if trainable else part_of(name, model, heads) == "base"):
                continue
            name = bare_name(name, model)
            digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
            if tensor.is_meta:  # offloaded by Accelerate: its values are not at hand
                continue
            flat = tensor.detach().reshape(-1)
            step = max(1, flat.numel() // _SAMPLE)
            digest.update(flat[::step][:_SAMPLE].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


def base_trains(model: nn.Module) -> bool:
    """Whether any weight of the base may train, so that its fingerprint tells one state of it from another."""
    heads = find_heads(model)
    return any(t.requires_grad and part_of(n, model, heads) == "base" for n, t in model.named_parameters())


def dtype_of(model: nn.Module) -> str:
    """The floating-point types of the base's parameters, e.g. `bfloat16` or `bfloat16+float32`."""
    heads = find_heads(model)
    own = {t.dtype for n, t in model.named_parameters() if t.is_floating_point() and part_of(n, model, heads) == "base"}
    return "+".join(sorted(str(dtype).removeprefix("torch.") for dtype in own))


def _replace(path: Path, write_to: Any) -> None:
    """Write to a temporary name, then rename: the file is whole or not there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_to(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
