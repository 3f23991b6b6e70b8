"""`get_model` and `attach`: base → quantised → tuner → plan."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from . import loading, registry
from .checkpoint import SavePretrained, fingerprint
from .compose import Method, Plan, Tuner, check_needs, plan_stages, resolve
from .effects import trainable_names
from .errors import MethodError
from .layers import Layers, find_heads, is_tied_head, layer_map, transformers_model
from .names import nearest
from .parts import part_of
from .plugin import NEEDS, Param
from .settings import check_plain, make
from .tasks import Task, infer_task
from .tasks.infer import builds

_DATA_DEPENDENT_INITS = ("pissa", "olora", "corda", "eva", "loftq", "lora_ga")


def get_model(
    model: str | os.PathLike[str] | nn.Module,
    method: Any,
    *,
    task: str | Task | None = None,
    num_labels: int | None = None,
    quantization: Any = None,
    device_map: Any = None,
    dtype: Any = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """A model ready to train: the base, one tuner, and any number of plugins.

    ```python
    get_model("org/base", method="lora", task="SEQ_CLS", num_labels=2, r=8)
    get_model("org/base", method={"lora": {"r": 8}, "llrd": {"decay": 0.9}}, task="CAUSAL_LM", quantization="nf4")
    ```

    Names, settings and combinations are checked before any weights load: the tuner is first built on a skeleton of
    the model without memory.

    Args:
        model: hub id, folder, or a loaded model (which then keeps its own dtype, placement and quantisation).
        method: what trains and how: a name, a PEFT config or plugin object, a list of those, or a mapping name →
            settings. At most one tuner; `full` where none is named.
        task: what is learned: a name such as `"SEQ_CLS"`, or a Task object. Picks the AutoModel class of an id or
            folder; a loaded model tells its own.
        num_labels: number of classes, for tasks that have them.
        quantization: `"nf4"`, `"int8"` or a BitsAndBytesConfig. K-bit preparation is done here.
        device_map, dtype: handed to `from_pretrained`, so placement is Accelerate's.
        model_kwargs: anything else for `from_pretrained`.
        settings: settings of the method, when it is a single name.
    Returns: the PeftModel of the tuner, of PEFT's own class; for `full` the transformers model. Its plan hangs on it
        as `model.peft_plus`.
    Raises:
        MethodError: an unknown name or setting, or a combination that cannot work.
        PluginError: a named plugin does not import or breaks the contract.
    """
    if isinstance(model, nn.Module):
        _refuse_loading_options(
            quantization=quantization, device_map=device_map, dtype=dtype, model_kwargs=model_kwargs
        )
        if _is_peft(model):
            return _attach(model, resolve(method, settings), task, num_labels)
        chosen = _task(task, num_labels, model) if task is not None else infer_task(model)
        _check_loaded(model, chosen, num_labels)
        resolved = resolve(method, settings, chosen.peft_task_type)
        tuner = resolved.tuner or Tuner("full")
        _check(resolved, tuner, chosen, loading.scheme_of_model(model))
        return _finish(model, resolved, tuner, chosen)
    if not isinstance(model, (str, os.PathLike)):
        raise MethodError(
            f"model={model!r} is a {type(model).__name__}; give a hub id, a folder, or a loaded torch model."
        )
    if task is None:
        raise MethodError(
            f"task= is missing: it picks the class that loads {model!r}. One of: {', '.join(registry.entries('task'))}."
        )
    chosen = _task(task, num_labels)
    resolved = resolve(method, settings, chosen.peft_task_type)
    options = _load_options(device_map, dtype, model_kwargs)
    tuner = resolved.tuner or Tuner("full")
    scheme = loading.scheme_of(quantization)
    if scheme is not None and options.get("gguf_file"):
        raise MethodError(
            "GGUF weights cannot be loaded quantised. Load them once without quantization, save_pretrained into a "
            "folder, and give that folder."
        )
    _check(resolved, tuner, chosen, scheme)
    source = loading.open_source(model, chosen, options)
    stored = loading.scheme_of_model(source.skeleton)
    if stored is not None:
        if scheme is not None:
            raise MethodError(f"The weights of {source.name!r} are stored as {stored} already; drop quantization.")
        _check(resolved, tuner, chosen, stored)
    bits = loading.quantization_config(quantization, source.skeleton, dtype)
    _rehearse(source, tuner, chosen, resolved)
    return _finish(loading.load(source, bits, options), resolved, tuner, chosen)


def attach(model: nn.Module, method: Any, *, task: str | Task | None = None) -> Any:
    """Give plugins to a model as it stands, e.g. one that plain PEFT made; again after changing what trains.

    Args:
        model: a PeftModel, or a transformers model that trains as a whole.
        method: plugins only: a name, an object, a list or a mapping. An empty list gives a plan without plugins.
        task: the task, where the model's class does not tell it.
    Returns: the same model, with its plan as `model.peft_plus`.
    Raises:
        MethodError: the method names a tuner, or a plugin does not fit the model.
    """
    if not isinstance(model, nn.Module):
        raise MethodError(f"attach takes a loaded model, not {model!r}; get_model loads one.")
    resolved = resolve(method) if method != [] else Method(None, (), {})
    return _attach(model, resolved, task)


def _attach(model: nn.Module, resolved: Method, task: str | Task | None, num_labels: int | None = None) -> nn.Module:
    if resolved.tuner is not None:
        raise MethodError(
            f"This {type(model).__name__} already has its tuner, but the method names {resolved.tuner.name!r}. Name "
            "only plugins, or start from the base model."
        )
    chosen = _task(task, num_labels, model) if task is not None else infer_task(model)
    _check_loaded(model, chosen, num_labels)
    tuner = _tuner_of(model)
    _check(resolved, tuner, chosen, loading.scheme_of_model(transformers_model(model)))
    return _with_plan(model, resolved, tuner, chosen)


def _check(method: Method, tuner: Tuner, task: Task, scheme: str | None) -> None:
    """Everything that tuner, task, plugins and quantisation say against each other, without a model."""
    if tuner.name == "full" and scheme is not None:
        raise MethodError(
            "method 'full' trains the base weights, but quantised weights get no gradient. Use a tuner such as 'lora' "
            "on the quantised base, or drop quantization."
        )
    config = tuner.config
    if config is not None:
        if getattr(config, "use_dora", False) and scheme == "int8" and not torch.accelerator.is_available():
            # PEFT's dequantize_module_weight replaces the weight there, without its scales.
            raise MethodError(
                "DoRA reads the base weights in every step, and on a CPU int8 weights lose their scales when PEFT "
                "reads them. Use quantization='nf4', or 'lora' instead of 'dora'."
            )
        given = getattr(config.task_type, "value", config.task_type)
        if given is not None and given != task.peft_task_type:
            raise MethodError(
                f"The {tuner.name!r} config says task_type={given!r}, the task is {task.name!r}. Make them agree."
            )
        if config.is_prompt_learning and task.peft_task_type is None:
            raise MethodError(
                f"{tuner.name!r} inserts its prompt where PEFT knows the task, and PEFT has no task type for "
                f"{task.name or 'this model'!r}. Use a tuner that works inside the model, e.g. 'lora'."
            )
        tokens = getattr(config, "num_virtual_tokens", None)
        if config.is_prompt_learning and not (tokens or 0) >= 1:
            raise MethodError(f"{tuner.name!r} has num_virtual_tokens={tokens}; give a number ≥ 1, e.g. 20.")
        if task.new_head and not hasattr(config, "modules_to_save"):
            raise MethodError(
                f"{tuner.name!r} cannot train a new head (its config has no modules_to_save); {task.name!r} needs one."
            )
    check_needs(method.plugins, method.origins, tuner, task)
    plan_stages(method.plugins, method.origins)


def _rehearse(source: loading.Source, tuner: Tuner, task: Task, method: Method) -> None:
    """Build the tuner on the skeleton, so that what PEFT would refuse is refused before the weights load."""
    init = getattr(tuner.config, "init_lora_weights", True)
    if isinstance(init, str) and init.startswith(_DATA_DEPENDENT_INITS):
        return
    try:
        model = _with_tuner(source.skeleton, tuner, task)
    except (NotImplementedError, RuntimeError):
        # Some initialisations read weights, which the skeleton has none of; the real build will tell.
        return
    _check_layered(method, _params(model, _layers(model, method)))


def _finish(base: nn.Module, method: Method, tuner: Tuner, task: Task) -> nn.Module:
    return _with_plan(_with_tuner(base, tuner, task), method, tuner, task)


def _with_tuner(base: nn.Module, tuner: Tuner, task: Task) -> nn.Module:
    if tuner.name == "full":
        return base
    from peft import LoraConfig, get_peft_model
    from peft.utils.constants import DUMMY_TARGET_MODULES

    if tuner.name == "linear_probe":
        heads = find_heads(base)
        if not heads:
            raise MethodError(
                f"'linear_probe' trains the head, and {type(base).__name__} has none. Pick a task with a head."
            )
        if is_tied_head(base):
            raise MethodError(
                f"'linear_probe' trains the head, but the head of {type(base).__name__} is the input embeddings (tied "
                "weights). Use a tuner, or a task with a head of its own such as 'SEQ_CLS'."
            )
        # PEFT's own way to train a head alone: a LoRA that targets nothing. Loads in plain PEFT.
        config = LoraConfig(
            target_modules=DUMMY_TARGET_MODULES, modules_to_save=list(heads), task_type=task.peft_task_type
        )
        return get_peft_model(base, config)
    # PEFT appends to the lists of the config that it is given: hand it a copy.
    config: Any = copy.deepcopy(tuner.config)
    config.task_type = task.peft_task_type
    if task.new_head:
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *find_heads(base)]))
    _check_modules_to_save(config, base, tuner)
    try:
        return get_peft_model(base, config)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        changed, unset = _settings(tuner.config)
        given = f" with {changed}" if changed else ""
        # PEFT computes with settings that it has no default for; its error then speaks of None, not of which one.
        hint = f". Settings without a value: {', '.join(unset)}." if "NoneType" in str(error) else ""
        raise MethodError(
            f"The tuner {tuner.name!r}{given} cannot be built on {type(base).__name__}: {error}{hint}"
        ) from error


def _check_modules_to_save(config: Any, base: nn.Module, tuner: Tuner) -> None:
    """PEFT passes over a name that matches nothing, and so would leave untrained what the user asked to train."""
    names = [name for name, _ in base.named_modules()]
    for wanted in getattr(config, "modules_to_save", None) or ():
        if not any(name.endswith(wanted) for name in names):
            hint = nearest(wanted, (name.rpartition(".")[2] for name in names))
            raise MethodError(
                f"The tuner {tuner.name!r}: modules_to_save names {wanted!r}, and {type(base).__name__} has no such "
                f"module.{hint}"
            )


def _settings(config: Any) -> tuple[dict[str, Any], list[str]]:
    """A tuner's settings that are not PEFT's defaults, and the names of those without a value."""
    from peft import PeftConfig

    shared = {f.name for f in dataclasses.fields(PeftConfig)}
    changed, unset = {}, []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if field.name in shared:
            continue
        if value is None:
            unset.append(field.name)
        elif value != default:
            changed[field.name] = value
    return changed, unset


def _with_plan(model: nn.Module, method: Method, tuner: Tuner, task: Task) -> nn.Module:
    loading.keep_differentiable(model)
    layers = _layers(model, method)
    params = _params(model, layers)
    _check_layered(method, params)
    base = transformers_model(model)
    plan = Plan(
        tuner=tuner.name,
        plugins=method.plugins,
        origins=method.origins,
        task=task,
        layers=layers,
        params=params,
        stages=plan_stages(method.plugins, method.origins),
        quantization=loading.scheme_of_model(base),
        base={
            "name_or_path": getattr(base, "name_or_path", "") or "",
            "class": type(base).__name__,
            "fingerprint": fingerprint(model),
        },
    )
    model.peft_plus = plan  # type: ignore[assignment]
    if hasattr(type(model), "save_pretrained"):
        model.save_pretrained = SavePretrained(model)  # type: ignore[assignment]
    return model


def _layers(model: nn.Module, method: Method) -> Layers:
    """The depths; where nothing needs them and the model has no list of blocks, a flat map."""
    try:
        return layer_map(model)
    except ValueError as error:
        for plugin in method.plugins:
            if "layers" in plugin.needs:
                who = f"plugin {plugin.name!r} ({method.origins[plugin.name]})"
                raise MethodError(f"{who} needs {NEEDS['layers']}; {error}") from error
        return Layers(num_blocks=0, depth={name: 0 for name, _ in model.named_parameters()}, blocks=())


def _params(model: nn.Module, layers: Layers) -> dict[str, Param]:
    heads = find_heads(model)
    tensors = dict(model.named_parameters())
    return {
        name: Param(name, tuple(tensors[name].shape), layers.depth[name], part_of(name, model, heads))
        for name in trainable_names(model)
    }


def _check_layered(method: Method, params: Mapping[str, Param]) -> None:
    depths = {p.depth for p in params.values()}
    for plugin in method.plugins:
        if "layers" in plugin.needs and len(depths) < 2:
            raise MethodError(
                f"plugin {plugin.name!r} ({method.origins[plugin.name]}) needs {NEEDS['layers']}; here everything that "
                f"trains lies at depth {sorted(depths)}. Drop the plugin, or let the tuner reach more layers."
            )


def _tuner_of(model: nn.Module) -> Tuner:
    configs = getattr(model, "peft_config", None)
    if not _is_peft(model) or not configs:
        return Tuner("full")
    from peft.utils.constants import DUMMY_TARGET_MODULES

    active = model.active_adapters if isinstance(model.active_adapters, list) else [model.active_adapter]
    config = configs[active[0]]
    if getattr(config, "target_modules", None) in (DUMMY_TARGET_MODULES, {DUMMY_TARGET_MODULES}):
        return Tuner("linear_probe", config, "peft")
    return Tuner(getattr(config.peft_type, "value", str(config.peft_type)).lower(), config, "peft")


def _task(task: str | Task, num_labels: int | None, model: nn.Module | None = None) -> Task:
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


def _check_loaded(model: nn.Module, task: Task, num_labels: int | None) -> None:
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


def _refuse_loading_options(**options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise MethodError(
                f"{name}= is for loading, but a loaded model was given. Give it to from_pretrained, or give get_model "
                "the id or folder."
            )


def _load_options(device_map: Any, dtype: Any, model_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
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


def _is_peft(model: nn.Module) -> bool:
    from peft import PeftMixedModel, PeftModel

    return isinstance(model, (PeftModel, PeftMixedModel))
