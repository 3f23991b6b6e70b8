"""FSDP2: what Accelerate and torch leave out, or refuse, when a run over split weights is put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .compose import Plan
from .distributed import plain_parameters
from .errors import MethodError
from .run_weights import put

_WEIGHTS, _OPTIMIZER = "pytorch_model_fsdp.bin", "optimizer.bin"
"""What Accelerate writes under FSDP2 with full state dicts."""


def check_sharded_resume(accelerator: Any, model: nn.Module, folder: str | Path) -> None:
    """Refuse a checkpoint from which Accelerate and torch cannot put an FSDP2 run back. Before any of it is loaded.

    Args:
        accelerator: an `accelerate.Accelerator`; without FSDP2 nothing is looked at.
        model: with an adapter or without.
    Raises:
        MethodError: it holds sharded state dicts of an adapter, no optimizer, or one that keeps no state.
    """
    whole = _whole_dicts(accelerator)
    if whole is None:
        return
    says = f"{folder} cannot be resumed under FSDP2: "
    if not whole:
        if hasattr(model, "peft_config"):
            raise MethodError(
                f"{says}with sharded state dicts it holds no adapter folder, and nothing that trained in the base. Set "
                "fsdp_state_dict_type: FULL_STATE_DICT in the run that saves."
            )
    elif not Path(folder, _OPTIMIZER).is_file():
        raise MethodError(
            f"{says}it holds no {_OPTIMIZER} (was it saved with save_only_model=True?), and the run would go on with a "
            "fresh one. Load its weights into a new run."
        )
    elif not _stored(folder, _OPTIMIZER)["state"]:
        raise MethodError(
            f"{says}its optimizer keeps no state (SGD without momentum), and torch fails to load none. Use one that "
            "keeps some, e.g. AdamW, or DDP."
        )


def _whole_dicts(accelerator: Any) -> bool | None:
    """Whether FSDP2 saves full state dicts; None without FSDP2."""
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    return None if fsdp is None or fsdp.fsdp_version == 1 else "FULL" in str(fsdp.state_dict_type)


def _stored(folder: str | Path, name: str) -> Any:
    """What Accelerate saved, without running what a pickle might hold; mapped, so that only what is used is read."""
    return torch.load(Path(folder, name), map_location="cpu", mmap=True, weights_only=True)


def load_sharded_weights(accelerator: Any, model: nn.Module, folder: str | Path) -> None:
    """Complete the weights that Accelerate has loaded from a checkpoint into a model that FSDP2 has split.

    Beside a tuner it saves only what trains at that moment; the rest is in the adapter folder and the thawed weights.

    Args:
        accelerator: an `accelerate.Accelerator`; without FSDP2 nothing happens.
    Raises:
        MethodError: a tensor does not fit, or the checkpoint holds no values for something that may train.
    """
    plan: Plan | None = getattr(model, "peft_plus", None)
    if not _whole_dicts(accelerator) or plan is None or not hasattr(model, "peft_config"):
        return
    thawed = _load_thawed(plain_parameters(model), folder)
    found = {*_stored(folder, _WEIGHTS), *_load_adapters(model, folder), *thawed}
    lost = [name for name in plan.params if name not in found]
    if lost:
        raise MethodError(
            f"{folder} cannot be loaded under FSDP2: it holds no values for {len(lost)} parameters that may train, "
            f"e.g. {lost[0]!r}. Use DDP."
        )


def rest_stateless(accelerator: Any, model: nn.Module, folder: str | Path) -> None:
    """Freeze what has no state of the optimizer in a checkpoint, until the run begins and sets every flag anew.

    Under FSDP2 torch demands a state for all that trains when it loads, and that is everything then. What never trained
    before the checkpoint has none, and must get none: a state of zeros would count a step that never was.

    Args:
        accelerator: an `accelerate.Accelerator`; without FSDP2 nothing happens.
    """
    plan: Plan | None = getattr(model, "peft_plus", None)
    if not _whole_dicts(accelerator) or plan is None:
        return
    own, kept = plain_parameters(model), _stored(folder, _OPTIMIZER)["state"]
    for name in plan.params.keys() - kept:
        own[name].requires_grad_(False)


def _load_adapters(model: Any, folder: str | Path) -> Iterator[str]:
    """Put every adapter back from the files that PEFT reads, and return what is called how in the model."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    state = {name.replace("_checkpoint_wrapped_module.", ""): tensor for name, tensor in model.state_dict().items()}
    names = {id(tensor): name for name, tensor in state.items()}
    for adapter in model.peft_config:
        path = Path(folder, "" if adapter == "default" else adapter, "adapter_model.safetensors")
        saved: Any = get_peft_model_state_dict(
            model, state_dict=state, adapter_name=adapter, save_embedding_layers=False
        )
        for key, whole in load_file(path).items():
            own = saved.get(key, state.get(key))  # embeddings that were saved along have their own names
            if own is None or own.shape != whole.shape:
                raise MethodError(f"{path} does not fit this model: it has no {key!r} of shape {tuple(whole.shape)}.")
            if id(own) in names:  # else PEFT computes what it saves, as from a prompt's encoder
                put(own, whole)
                yield names[id(own)]


def _load_thawed(own: Mapping[str, torch.Tensor], folder: str | Path) -> Iterator[str]:
    from safetensors.torch import load_file

    from .saving import THAWED

    path = Path(folder, THAWED)
    for name, whole in load_file(path).items() if path.is_file() else ():
        put(own[name], whole)
        yield name
