"""Loading an adapter, rehearsed without memory: whatever would go wrong goes wrong on a skeleton of the user's model.

The tuner is built by PEFT itself and PEFT itself assigns the tensors, so the rehearsal knows no tuner by name and is
right for those to come. What it compares is what the file declares with what this model would take.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .adapter_folder import CONFIG, WEIGHTS, AdapterFolder, read_folder, shortened
from .errors import MethodError
from .layers import find_heads
from .module_tree import skeleton
from .parts import is_adapter, part_of
from .saving import THAWED

_INSTEAD = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model_fsdp.bin",
)
"""What a Trainer that finds it in a checkpoint loads instead of the adapter."""


class NeedsValues(Exception):
    """The tuner reads the base's weights while it is built, so it cannot be rehearsed without them."""


def check_adapter_folder(folder: str | os.PathLike[str], model: nn.Module, *, engine_owned: bool = False) -> None:
    """Whether a Trainer may load `folder` into a model that has its adapters already: before it resumes from there.

    Reads headers only and changes nothing.

    Args:
        folder: a checkpoint, or what `save_pretrained` wrote.
        model: the PeftModel that goes on from it.
        engine_owned: whether FSDP loads the weights: its file belongs there then, and what loads compares the tensors.
    Raises:
        MethodError: a file is damaged or could run code, does not hold the tensors of the model's adapter, or lies
            where a Trainer would load it instead.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise MethodError(f"check_adapter_folder is for models with an adapter; this is a {type(model).__name__}.")
    path = Path(folder)
    for name in _INSTEAD:
        if (path / name).exists() and not (engine_owned and name == "pytorch_model_fsdp.bin"):
            raise MethodError(
                f"{path / name} does not belong beside an adapter, and a Trainer would load it instead. Delete it if "
                "you did not put it there."
            )
    # PEFT keeps the adapter `default` in the folder itself, any other in a sub-folder of its name.
    places = {name: path if name == "default" else path / name for name in model.peft_config}
    for file in path.glob("*/adapter_model.*"):
        if file.parent not in places.values():
            raise MethodError(
                f"{str(file.parent)!r} holds an adapter that this model does not have, and a Trainer would load it. "
                "Delete it if you did not put it there."
            )
    for name, place in places.items():
        found, config = read_folder(place), model.peft_config[name]
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if found.config.get("peft_type") != kind:
            raise MethodError(
                f"{place / CONFIG} describes a {shortened(found.config.get('peft_type'))} adapter, the model has "
                f"{kind!r}."
            )
        if not engine_owned:  # FSDP2's modules cannot be copied
            try:
                _check_tensors(model, found, name, values=False)
            except NeedsValues:
                _check_tensors(model, found, name, values=True)
        _check_thawed(model, found)


def rehearse(base: Any, folder: AdapterFolder, config: Any, adapter_name: str, *, values: bool = False) -> None:
    """Build the tuner on a copy of the base without memory, and compare what it wants with what the file declares.

    Args:
        base: the user's model; not touched.
        folder: what is to be loaded.
        config: its config, tamed; not touched.
        values: whether the copy may look at the base's weights.
    Raises:
        MethodError: PEFT refuses the config, or file and model do not fit.
        NeedsValues: only with `values` can this tuner be built.
    """
    from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel

    stage: Any = skeleton(base, values=values)
    cls = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
    what = f"PEFT cannot build the adapter of {str(folder.path)!r} on this {type(base).__name__}"
    with explained(what, values=values), torch.random.fork_rng(devices=[]):
        if values:
            with Bounded(base, folder.weights, dry=False):
                model = cls(stage, _own(config), adapter_name)
        else:
            with Bounded(base, folder.weights), torch.device("meta"):
                model = cls(stage, _own(config), adapter_name)
    _check_tensors(model, folder, adapter_name, values=values)
    _check_thawed(model, folder)


def _check_tensors(model: Any, folder: AdapterFolder, adapter_name: str, *, values: bool) -> None:
    """Let PEFT assign the declared tensors to a copy of the model, and look at what would get which.

    Raises:
        MethodError: tensors are missing, left over, meant for the base, or of another shape or kind.
        NeedsValues: only with `values` can PEFT say.
    """
    from peft import get_peft_model_state_dict

    path = folder.path / WEIGHTS

    def stage() -> Any:
        copied = skeleton(model, values=values)  # a new one each time: AdaLoRA resizes what it is asked about
        if model.peft_config[adapter_name].is_prompt_learning:
            # PEFT would run the encoder and move the result to the CPU; only the names matter here.
            weight = copied.prompt_encoder[adapter_name].embedding.weight
            copied.get_prompt_embedding_to_save = lambda adapter_name: weight
        return copied

    def saved(embeddings: bool) -> Mapping[str, torch.Tensor]:
        return get_peft_model_state_dict(stage(), adapter_name=adapter_name, save_embedding_layers=embeddings)

    with explained(f"{path} does not fit this {type(model.get_base_model()).__name__}", values=values):
        needed, _ = _assigned(stage(), saved(False), adapter_name)
        try:
            known, _ = _assigned(stage(), saved(True), adapter_name)
        except NotImplementedError:
            known = needed  # a vision model, without embeddings
        try:
            given, own = _assigned(stage(), folder.weights, adapter_name)
        except KeyError as error:
            raise MethodError(f"{path} lacks {shortened(error.args[0])}. Is it the right base?") from error
    surplus = [name for name in given if name not in known and not (name in own and is_adapter(name, model))]
    for names, what in (([n for n in needed if n not in given], "lacks"), (surplus, "also holds")):
        if names:
            raise MethodError(
                f"{path} {what} {len(names)} tensors, e.g. {shortened(names[0])}, compared with what its {CONFIG} "
                f"makes on this {type(model.get_base_model()).__name__}. Is it the right base?"
            )
    for name in given.keys() & own.keys():
        mine, theirs = own[name], given[name]
        if mine.shape != theirs.shape:
            raise MethodError(
                f"{path}: {shortened(name)} has the shape {tuple(theirs.shape)}, this model wants {tuple(mine.shape)}. "
                "Is it the right base, with a head of the right size?"
            )
        if mine.is_floating_point() != theirs.is_floating_point():
            raise MethodError(f"{path}: {shortened(name)} is {theirs.dtype}, this model wants {mine.dtype}.")


@contextmanager
def explained(what: str, *, values: bool = True) -> Generator[None]:
    """PEFT's and torch's errors as ours; its warnings come again with the real build.

    Args:
        values: whether the weights were at hand; else what fails for want of them is a NeedsValues.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except MethodError:
        raise
    except Exception as error:
        if not values and isinstance(error, (NotImplementedError, RuntimeError)) and "meta" in str(error).lower():
            raise NeedsValues from error
        raise refusal(what, error) from error


def refusal(what: str, error: Exception) -> MethodError:
    """What PEFT or torch raised, as ours."""
    return MethodError(f"{what}: {type(error).__name__}: {str(error)[:500]}")


class Bounded(TorchDispatchMode):
    """Stops a build that asks for absurdly many or large tensors; where it is dry, gives new ones no memory.

    `torch.device("meta")` alone leaves out what names its device, and functions such as `torch.normal`.

    Args:
        base, weights: what the build is for; absurd is a multiple of the numbers that they hold.
        dry: whether new tensors get no memory. Else what a tuner computes on the way is counted as well (FRoD on every
            linear layer: 24 times the base), and the number of steps is not (BOFT: one for each row of a layer).
    """

    def __init__(self, base: nn.Module, weights: Mapping[str, torch.Tensor] | None = None, *, dry: bool = True) -> None:
        super().__init__()
        known = [*base.parameters(), *base.buffers(), *(weights or {}).values()]
        self.dry = dry
        self.steps = 2_000 + 50 * len(known) if dry else math.inf
        self.numbers = 2**20 + (8 if dry else 100) * sum(math.prod(t.shape) for t in known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, inputs = dict(kwargs or {}), list(_tensors((args, kwargs)))
        self.steps -= 1
        if not inputs and any(argument.name == "device" for argument in func._schema.arguments):
            hollow = {"device": torch.device("meta"), **({"generator": None} if "generator" in kwargs else {})}
            result = func(*args, **{**kwargs, **hollow})  # there is nothing to draw
            self._count(result, inputs)  # before memory is taken
            return result if self.dry else func(*args, **kwargs)
        result = func(*args, **kwargs)
        self._count(result, inputs)
        return result

    def _count(self, result: Any, inputs: list[torch.Tensor]) -> None:
        seen = {_memory(t) for t in inputs}
        self.numbers -= sum(math.prod(t.shape) for t in _tensors(result) if _memory(t) not in seen)
        if self.steps < 0 or self.numbers < 0:
            raise MethodError(
                f"A number in the adapter's {CONFIG} is absurd: what it asks for is far more than its file holds, and "
                "than the base itself."
            )


def _memory(tensor: torch.Tensor) -> int:
    """What two tensors share where one is a view of the other. A sparse tensor has no single storage."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def _own(config: Any) -> Any:
    """A copy whose lists and mappings PEFT may change."""
    made = copy.copy(config)
    for name, value in vars(config).items():
        if isinstance(value, (list, set, dict)):
            setattr(made, name, value.copy())
    return made


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _assigned(
    model: Any, tensors: Mapping[str, torch.Tensor], adapter_name: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What PEFT would load into the model, by the names that it has there, and what is there. `model` is used up."""
    from peft import set_peft_model_state_dict
    from torch.nn.modules.module import _IncompatibleKeys

    received: dict[str, torch.Tensor] = {}

    def receive(state: Mapping[str, torch.Tensor], **_: Any) -> Any:
        received.update(state)
        return _IncompatibleKeys([], [])

    model.load_state_dict = receive
    with torch.device("meta"):
        set_peft_model_state_dict(model, dict(tensors), adapter_name=adapter_name)
    return received, model.state_dict()


def _check_thawed(model: Any, folder: AdapterFolder) -> None:
    own, heads = dict(model.named_parameters()), find_heads(model)
    for name, tensor in folder.thawed.items():
        mine = own.get(name)
        if mine is None or part_of(name, model, heads) != "base":
            raise MethodError(
                f"{folder.path / THAWED}: {shortened(name)} is no weight of this base. Is it the right base?"
            )
        if mine.shape != tensor.shape or not (mine.is_floating_point() and tensor.is_floating_point()):
            raise MethodError(
                f"{folder.path / THAWED}: {shortened(name)} is {tuple(tensor.shape)} {tensor.dtype}, "
                f"this base has {tuple(mine.shape)} {mine.dtype}."
            )
