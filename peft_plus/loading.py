"""Base models by id or folder: first the config and a weightless skeleton, to refuse early; then the weights."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import MethodError
from .layers import find_heads
from .names import nearest
from .tasks.choose import agree_with_config

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PretrainedConfig

    from .tasks import Task

SCHEMES = ("nf4", "int8")
_CONFIG_KWARGS = (
    "cache_dir",
    "force_download",
    "gguf_file",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)
_FROM_PRETRAINED = ("attn_implementation", "device_map", "dtype", "low_cpu_mem_usage", "max_memory", "offload_folder")
"""Of the many that `from_pretrained` takes without naming them in its signature: those that people misspell."""


@dataclass(frozen=True)
class Source:
    """A base model that is still to be loaded.

    Attributes:
        name: hub id or folder.
        task: the task; as its trained head tells it, where the folder holds one.
        config: its config, with the task's settings.
        auto_class: the AutoModel class that the task picks.
        skeleton: the model on the meta device: every module, no memory.
    """

    name: str
    task: Task
    config: PretrainedConfig
    auto_class: Any
    skeleton: nn.Module


def refuse_options(**options: Any) -> None:
    """Raise MethodError for an option that is for loading, where a loaded model was given."""
    for name, value in options.items():
        if value is not None:
            raise MethodError(
                f"{name}= is for loading, but a loaded model was given. Give it to from_pretrained, or give get_model "
                "the id or folder."
            )


def load_options(device_map: Any, dtype: Any, model_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """What `from_pretrained` gets, checked; raises MethodError for what is given twice or belongs elsewhere."""
    if model_kwargs is not None and not isinstance(model_kwargs, Mapping):
        raise MethodError(f"model_kwargs={model_kwargs!r} is a {type(model_kwargs).__name__}; expected a mapping.")
    options = dict(model_kwargs or {})
    named: Sequence[tuple[str, Any]] = (("device_map", device_map), ("dtype", dtype))
    for name in ("num_labels", "quantization_config", "config"):
        if name in options:
            instead = {"quantization_config": "quantization=", "num_labels": "num_labels=", "config": "a loaded model"}[
                name
            ]
            raise MethodError(f"model_kwargs holds {name!r}; give {instead} instead, so that it is checked.")
    for name, value in named:
        if value is None:
            continue
        if name in options:
            raise MethodError(f"{name} is given twice: as {name}= and in model_kwargs.")
        options[name] = value
    if dtype not in (None, "auto") and not isinstance(dtype, Mapping):
        kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if not (isinstance(kind, torch.dtype) and kind.is_floating_point):
            raise MethodError(f"dtype={dtype!r} is no floating-point torch dtype; e.g. 'bfloat16' or torch.bfloat16.")
    return options


def open_source(
    name: str | os.PathLike[str], task: Task, model_kwargs: Mapping[str, Any], *, by_name: bool = True
) -> Source:
    """Read the config and build the skeleton; loads no weights.

    Args:
        by_name: whether the user named the task only, so that a trained head in the folder may tell the rest.

    Raises:
        MethodError: the folder does not exist or holds an adapter, alone or beside the base; or the task does not fit
            the architecture.
        OSError: the hub does not know the id or cannot be reached.
    """
    from transformers import AutoConfig

    name = os.fspath(name)
    _check_folder(name)
    wanted = {k: v for k, v in model_kwargs.items() if k in _CONFIG_KWARGS}
    _check_no_adapter(name, wanted)
    stored = AutoConfig.from_pretrained(name, **wanted)
    new_head = bool(model_kwargs.get("ignore_mismatched_sizes"))
    task = agree_with_config(task, stored, by_name=by_name, new_head=new_head)
    config = AutoConfig.from_pretrained(name, **wanted, **task.config_kwargs())
    auto_class = task.auto_class(config)
    if type(config) not in auto_class._model_mapping and not wanted.get("trust_remote_code"):
        fitting = _tasks_of(config)
        raise MethodError(
            f"{name!r} is a {config.model_type!r} model, which transformers has no {auto_class.__name__} for, so it "
            f"cannot do the task {task.name!r}. Tasks it can do: {', '.join(fitting) or 'none'}."
        )
    with torch.device("meta"):
        skeleton = auto_class.from_config(config, trust_remote_code=bool(wanted.get("trust_remote_code")))
    stored = getattr(config, "quantization_config", None)
    if isinstance(stored, dict) and type(skeleton).__name__ not in (config.architectures or ()):
        # The body alone is stored, quantised; the head is new, and in packed weights it could not train.
        stored["llm_int8_skip_modules"] = [*(stored.get("llm_int8_skip_modules") or ()), *find_heads(skeleton)]
    return Source(name, task, config, auto_class, skeleton)


def stored_labels(name: str) -> int:
    """How many labels the config of a hub id or folder speaks of; transformers' 2 where it does not."""
    from transformers import AutoConfig

    _check_folder(name)
    return AutoConfig.from_pretrained(name).num_labels or 2


def load(source: Source, quantization: BitsAndBytesConfig | None, kwargs: Mapping[str, Any]) -> nn.Module:
    """Load the weights, quantised where asked; k-bit preparation included.

    Args:
        kwargs: for `from_pretrained`: `device_map`, `dtype` and the user's `model_kwargs`.
    Raises:
        MethodError: one of them is unknown, or transformers put an adapter into the base.
    """
    from transformers import PreTrainedModel

    extra = dict(kwargs)
    if quantization is not None:
        extra["quantization_config"] = quantization
    try:
        model = source.auto_class.from_pretrained(source.name, config=source.config, **extra)
    except TypeError as error:  # what nobody took on the way is handed to the model's constructor, before the weights
        stranger = next((name for name in extra if f"unexpected keyword argument '{name}'" in str(error)), None)
        if stranger is None:
            raise
        known = inspect.signature(PreTrainedModel.from_pretrained).parameters
        raise MethodError(
            f"model_kwargs holds {stranger!r}, which neither from_pretrained nor {type(source.skeleton).__name__} "
            f"takes.{nearest(stranger, [*known, *_FROM_PRETRAINED])} No weights were loaded."
        ) from error
    if getattr(model, "_hf_peft_config_loaded", False):  # on the hub since the check, or by adapter_kwargs
        raise MethodError(_adapter_beside(source.name, "an adapter"))
    return prepare_quantised(model)


def prepare_quantised(model: nn.Module) -> nn.Module:
    """PEFT's k-bit preparation where the model is quantised: base frozen, what is not packed in fp32. In place."""
    if scheme_of_model(model) in ("int8", "nf4", "fp4"):
        from peft import prepare_model_for_kbit_training

        # Gradient checkpointing is the Trainer's to switch on (TrainingArguments), not a side effect of quantising.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model


def keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes' 4-bit layers in the form that a gradient passes through.

    On a CPU with AVX512-BF16, their first forward in eval mode repacks the weights, for good, for a kernel that
    computes in bf16 and has no backward (bitsandbytes 0.50): after one evaluation, training would go on without a
    gradient below the topmost layer, and each frozen weight would be rounded. A layer that is packed already is
    unpacked.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                module.state_dict()  # unpacks in place, to store the portable form


def quantization_config(quantization: Any, skeleton: nn.Module, dtype: Any) -> BitsAndBytesConfig | None:
    """What the user asked for as a `BitsAndBytesConfig`, with the task's head left unquantised so that it can train."""
    if quantization is None:
        return None
    from transformers import BitsAndBytesConfig

    skip = list(find_heads(skeleton))
    if isinstance(quantization, BitsAndBytesConfig):
        # transformers' own default leaves out the head only where its last tensor is a weight: not BERT's classifier.
        config = copy.deepcopy(quantization)
        config.llm_int8_skip_modules = [*(config.llm_int8_skip_modules or []), *skip] or None
        return config
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=_compute_dtype(dtype),
        llm_int8_skip_modules=skip,
    )


def scheme_of(quantization: Any) -> str | None:
    """`int8`, `nf4` or `fp4`, or None.

    Raises:
        MethodError: an unknown scheme, or a config object of another kind.
    """
    from transformers import BitsAndBytesConfig

    if isinstance(quantization, BitsAndBytesConfig):
        return "int8" if quantization.load_in_8bit else str(quantization.bnb_4bit_quant_type)
    if quantization is not None and quantization not in SCHEMES:
        hint = nearest(quantization, SCHEMES) if isinstance(quantization, str) else ""
        raise MethodError(
            f"quantization={quantization!r} is unknown.{hint} Give 'nf4', 'int8' or a BitsAndBytesConfig."
        )
    return quantization


def scheme_of_model(model: nn.Module) -> str | None:
    """How a loaded model is quantised: `int8`, `nf4`, another scheme's name, or None."""
    from transformers import BitsAndBytesConfig

    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return None
    if isinstance(config, Mapping):  # as a folder stores it
        config = (
            BitsAndBytesConfig(**config) if config.get("quant_method") == "bitsandbytes" else config["quant_method"]
        )
    if isinstance(config, BitsAndBytesConfig):
        return scheme_of(config)
    return str(getattr(config, "quant_method", type(config).__name__))


def _compute_dtype(dtype: Any) -> torch.dtype:
    """The dtype that 4-bit layers compute in: the user's; else bf16 where the GPU has it, fp32 on a CPU."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if isinstance(dtype, str) and dtype != "auto":
        return getattr(torch, dtype)
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32


def _check_folder(name: str) -> None:
    path = Path(name)
    if path.is_dir():
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            raise MethodError(
                f"{name!r} holds a PEFT adapter, not a base model. Put it on its base with "
                f"peft_plus.from_pretrained(base, {name!r})."
            )
        if not (path / "config.json").is_file() and not any(path.glob("*.gguf")):
            raise MethodError(
                f"The folder {name!r} holds no config.json, so it is no model that transformers can load."
            )
    elif path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or not name:
        raise MethodError(f"The folder {name!r} does not exist.")


def _check_no_adapter(name: str, options: Mapping[str, Any]) -> None:
    """Refuse an adapter beside the weights: `from_pretrained` of transformers puts it into the base, unasked.

    Args:
        options: what `AutoConfig.from_pretrained` gets, so that the same revision is looked at.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    wanted = {k: v for k, v in options.items() if k not in ("gguf_file", "subfolder", "trust_remote_code")}
    for subfolder in dict.fromkeys(("", options.get("subfolder") or "")):  # transformers looks in both
        if find_adapter_config_file(name, subfolder=subfolder, **wanted) is not None:
            raise MethodError(_adapter_beside(name, os.path.join(subfolder, "adapter_config.json")))


def _adapter_beside(name: str, file: str) -> str:
    return (
        f"{name!r} holds {file} beside the base model, and transformers would put that adapter into the base. If you "
        "want it, move it into a folder of its own and load it with peft_plus.from_pretrained(base, folder); else "
        "delete the file."
    )


def _tasks_of(config: PretrainedConfig) -> list[str]:
    """Names of the core's tasks for which transformers has a model of this architecture."""
    from .registry import entries, load
    from .settings import make

    found = []
    for entry in entries("task").values():
        if entry.distribution == "peft-plus":
            cls = load(entry)
            needs_labels = any(f.name == "num_labels" for f in dataclasses.fields(cls))
            task = make(cls, {"num_labels": 2} if needs_labels else {}, entry.name)
            if type(config) in task.auto_class(config)._model_mapping:
                found.append(entry.name)
    return found
