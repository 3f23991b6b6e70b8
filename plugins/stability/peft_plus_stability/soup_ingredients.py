"""The folder of a finished run as a soup needs it: what is in it, and whether it can be averaged with another."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from peft_plus import MethodError
from peft_plus.adapter_folder import (
    CONFIG,
    RECORD,
    THAWED,
    WEIGHTS,
    check_finite,
    declared_tensors,
    read_folder,
    read_json,
    shortened,
)
from peft_plus.patterns import searched

MODEL_CONFIG, MODEL, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?A(?P<weight>\.weight)?")
_PREFIX = "base_model.model."

_LINEAR = ("LORA", "IA3", "LN_TUNING")
"""Tuners whose merged weights have a mean that can be saved as one adapter; of all but LoRA it is the plain mean."""

_FREE = frozenset(
    (
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "modules_to_save",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
        "init_ia3_weights",
        "loftq_config",
        "eva_config",
        "velora_config",
        "qalora_group_size",
        "megatron_core",
        "runtime_config",
        "base_model_name_or_path",
        "revision",
        "auto_mapping",
        "peft_version",
        "inference_mode",
    )
)
"""Settings of an adapter that may differ: the names of tensors, their shapes or `Factors` say what they say, or they
mattered to training alone."""

_NOT_A_PRODUCT = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "target_parameters",
    "megatron_config",
)
"""Settings with which LoRA's change of a weight is not s · BA with a B and an A of that weight's own."""

_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""`init_lora_weights` that leave the base as it is."""

_OWN = ("model_type", "architectures", "id2label", "num_labels")
"""What must be equal in the config of a whole model; shapes tell the rest."""


@dataclass(frozen=True)
class Factors:
    """Where a low-rank change lies: the names of A, B and, with `lora_bias`, B's bias; and its scaling."""

    a: str
    b: str
    bias: str | None
    scaling: float


@dataclass(frozen=True)
class Ingredient:
    """What a folder holds; the weights stay on the disk.

    Attributes:
        path: the folder, as it was given.
        adapter: whether it is an adapter, and not a whole model.
        config: `adapter_config.json`, or `config.json` of a whole model.
        record: `peft_plus.json`; None where something else saved.
        files: file → name of a tensor → one without memory, of its shape and dtype.
        factors: module → low-rank change; empty where there is none.
    """

    path: Path
    adapter: bool
    config: Mapping[str, Any]
    record: Mapping[str, Any] | None
    files: Mapping[str, Mapping[str, Tensor]]
    factors: Mapping[str, Factors]

    def tensor(self, file: str, name: str) -> Tensor:
        """One of its tensors, read from the disk."""
        with safe_open(self.path / file, framework="pt") as stored:
            return stored.get_tensor(name)


def read_ingredient(path: Path) -> Ingredient:
    """Read what a folder declares, and see that its weights are finite.

    Raises:
        MethodError: it is damaged, holds neither an adapter nor a whole model in safetensors, or a tuner whose merged
            weights no single adapter could average.
    """
    if not path.is_dir():
        raise MethodError(f"The folder {str(path)!r} does not exist.")
    adapter = (path / CONFIG).exists()
    if adapter:
        folder = read_folder(path)
        config: Mapping[str, Any] = folder.config
        files = {WEIGHTS: folder.weights} | ({THAWED: folder.thawed} if folder.thawed else {})
        _check_tuner(path, config)
        factors = _factors(path, config, folder.weights)
    else:
        config, files, factors = _whole_model(path)
    for file in files:
        check_finite(path / file)
    record = read_json(path / RECORD) if (path / RECORD).exists() else None
    return Ingredient(path, adapter, config, record, files, factors)


def _whole_model(path: Path) -> tuple[Mapping[str, Any], dict[str, Mapping[str, Tensor]], dict[str, Factors]]:
    if not (path / MODEL_CONFIG).exists():
        raise MethodError(f"{str(path)!r} holds neither an adapter ({CONFIG}) nor a model ({MODEL_CONFIG}).")
    names = [MODEL]
    if (path / INDEX).exists():
        names = sorted(set(map(str, dict(read_json(path / INDEX).get("weight_map") or {}).values())))
    for name in names:
        if not re.fullmatch(r"[\w.-]+\.safetensors", name) or not (path / name).exists():
            raise MethodError(f"{str(path)!r} holds no {shortened(name)}. Save the model as safetensors.")
    return read_json(path / MODEL_CONFIG), {name: declared_tensors(path / name) for name in names}, {}


def _check_tuner(path: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind not in _LINEAR:
        raise MethodError(
            f"{str(path)!r} holds a {shortened(kind)} adapter: the mean of several such changes is no adapter of that "
            f"kind. A soup needs one of {', '.join(_LINEAR)}, or whole models: merge it, and save the merged model."
        )
    found = [name for name in _NOT_A_PRODUCT if config.get(name)]
    start = config.get("init_lora_weights", True)
    if found or start not in _STARTS:
        name = found[0] if found else "init_lora_weights"
        raise MethodError(
            f"{str(path)!r} has {name}={shortened(config.get(name))}, with which its change of the weights is not s · "
            "BA on the base as it is. Merge it into the base, and make a soup of the merged models."
        )


def _factors(path: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Factors]:
    """The low-rank changes of an adapter. Their factors, and nothing else, have `.lora_` in their names."""
    found = {match["module"]: match for name in weights if (match := _FACTOR.fullmatch(name))}
    scalings = _scalings(path, config, {module: len(weights[match[0]]) for module, match in found.items()})
    factors: dict[str, Factors] = {}
    for module, match in found.items():
        b = f"{module}.lora_{match['embedding'] or ''}B{match['weight'] or ''}"
        bias = f"{module}.lora_B.bias"
        factors[module] = Factors(match[0], b, bias if bias in weights else None, scalings[module])
        if b not in weights or not _is_product(weights[match[0]], weights[b]):
            raise MethodError(
                f"{path / WEIGHTS}: {shortened(match[0])} and its B are not two matrices to multiply, as those of a "
                "grouped convolution are not. Merge the adapters, and make a soup of the merged models."
            )
    known = {name for one in factors.values() for name in (one.a, one.b, one.bias)}
    strange = [name for name in weights if ".lora_" in name and name not in known]
    if strange:
        raise MethodError(
            f"{path / WEIGHTS} holds {shortened(strange[0])}, which is neither A nor B of a low-rank change. Merge the "
            "adapters, and make a soup of the merged models."
        )
    return factors


def _is_product(a: Tensor, b: Tensor) -> bool:
    return a.dim() > 1 and b.dim() > 1 and b.shape[1] == len(a) and b[0, 0].numel() == 1


def _scalings(path: Path, config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """Module → s, by PEFT's rule: α / r, or α / √r for rsLoRA; the first pattern that matches gives α."""
    names = {module.removeprefix(_PREFIX): module for module in ranks}
    patterns = dict(config.get("alpha_pattern") or {})
    alphas: dict[str, Any] = {}
    whose = f"alpha_pattern in {path / CONFIG}"
    lists = searched([rf"^(.*\.)?({key})$" for key in patterns], list(names), whose)
    for alpha, matched in zip(patterns.values(), lists, strict=True):
        for name in matched:
            alphas.setdefault(names[name], alpha)
    usual, power = config.get("lora_alpha", 8), 0.5 if config.get("use_rslora") else 1.0
    return {module: float(alphas.get(module, usual)) / rank**power for module, rank in ranks.items()}


def check_alike(ingredients: Sequence[Ingredient]) -> None:
    """Look whether the weights of all are changes of the same base, tensor by tensor.

    Raises:
        MethodError: two are not; names both folders.
    """
    first = ingredients[0]
    for other in ingredients[1:]:
        told = _difference(first, other)
        if told:
            raise MethodError(f"{str(first.path)!r} and {str(other.path)!r} cannot be averaged: {told}")


def _difference(one: Ingredient, other: Ingredient) -> str:
    """How two differ where they may not; empty for nowhere."""
    if one.adapter != other.adapter:
        return "one is an adapter, the other a whole model. Merge the adapter first."
    settings = sorted((one.config.keys() | other.config.keys()) - _FREE) if one.adapter else _OWN
    for name in ("peft_type", *settings):
        values = [_plain(ingredient.config.get(name)) for ingredient in (one, other)]
        if values[0] != values[1]:
            return f"{name} is {shortened(values[0])} and {shortened(values[1])}."
    prints = [_recorded(ingredient, "base", "fingerprint") for ingredient in (one, other)]
    if all(prints) and prints[0] != prints[1]:
        return f"they were trained on different bases ({shortened(prints[0][:12])} and {shortened(prints[1][:12])})."
    for key in ("name", "labels"):
        values = [_recorded(ingredient, "task", key) for ingredient in (one, other)]
        if all(values) and values[0] != values[1]:
            return f"the {key} of their tasks are {shortened(values[0])} and {shortened(values[1])}."
    return _other_tensors(one, other)


def _recorded(ingredient: Ingredient, part: str, key: str) -> Any:
    """What `peft_plus.json` says; None where it does not."""
    inside = (ingredient.record or {}).get(part)
    return inside.get(key) if isinstance(inside, dict) else None


def _plain(value: Any) -> Any:
    """PEFT saves sets of words as lists in any order."""
    words = isinstance(value, list) and all(isinstance(word, str) for word in value)
    return sorted(set(value)) if words else value


def _other_tensors(one: Ingredient, other: Ingredient) -> str:
    free = {name for factors in one.factors.values() for name in (factors.a, factors.b)}
    mine, theirs = ({n: t for tensors in i.files.values() for n, t in tensors.items()} for i in (one, other))
    for name in sorted(mine.keys() ^ theirs.keys()):
        has, lacks = (one, other) if name in mine else (other, one)
        return f"{shortened(name)} is in {str(has.path)!r}, and not in {str(lacks.path)!r}."
    for name, tensor in mine.items():
        shapes = [list(tensor.shape), list(theirs[name].shape)]
        if name in free:  # but for the rank
            for shape in shapes:
                shape.pop(0 if _FACTOR.fullmatch(name) else 1)
        if shapes[0] != shapes[1] or tensor.is_floating_point() != theirs[name].is_floating_point():
            return (
                f"{shortened(name)} is {tuple(tensor.shape)} {tensor.dtype} and {tuple(theirs[name].shape)} "
                f"{theirs[name].dtype}."
            )
    return ""
