"""`get_model` and `attach`: base → quantised → tuner → plan."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from . import loading, registry
from .ask import ask
from .compose import Method, Plan, Tuner, check_needs, resolve, who
from .distributed import check_unpartitioned
from .effects import trainable_names
from .errors import MethodError, PluginError
from .layers import Layers, find_heads, layer_map, transformers_model
from .parts import part_of
from .plugin import NEEDS, Param
from .saving import SavePretrained, dtype_of, fingerprint
from .stage_start import check_settings_fit
from .tasks import Task, infer_task
from .tasks.choose import check_loaded, choose_task
from .tuning import is_peft, prepends_tokens, tuner_of, with_tuner

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
        model: hub id, folder, or a loaded model (which then keeps its own placement and quantisation).
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
        loading.refuse_options(quantization=quantization, device_map=device_map, dtype=dtype, model_kwargs=model_kwargs)
        if is_peft(model) or getattr(model, "_hf_peft_config_loaded", False):
            return _attach(model, resolve(method, settings), task, num_labels)
        if all(tensor.is_meta for tensor in model.parameters()):  # some may be offloaded; before a tuner goes in
            _check_filled([name for name, _ in model.named_parameters()])
        chosen = choose_task(task, num_labels, model) if task is not None else infer_task(model)
        check_loaded(model, chosen, num_labels)
        resolved = resolve(method, settings, chosen.peft_task_type)
        tuner = resolved.tuner or Tuner("full")
        _check(resolved, tuner, chosen, loading.scheme_of_model(model))
        return _finish(loading.prepare_quantised(model), resolved, tuner, chosen)
    if not isinstance(model, (str, os.PathLike)):
        raise MethodError(
            f"model={model!r} is a {type(model).__name__}; give a hub id, a folder, or a loaded torch model."
        )
    if task is None:
        raise MethodError(
            f"task= is missing: it picks the class that loads {model!r}. One of: {', '.join(registry.entries('task'))}."
        )
    chosen = choose_task(task, num_labels)
    resolved = resolve(method, settings, chosen.peft_task_type)
    options = loading.load_options(device_map, dtype, model_kwargs)
    tuner = resolved.tuner or Tuner("full")
    scheme = loading.scheme_of(quantization)
    if scheme is not None and options.get("gguf_file"):
        raise MethodError(
            "GGUF weights cannot be loaded quantised. Load them once without quantization, save_pretrained into a "
            "folder, and give that folder."
        )
    _check(resolved, tuner, chosen, scheme)
    source = loading.open_source(model, chosen, options, by_name=not isinstance(task, Task))
    chosen = source.task
    stored = loading.scheme_of_model(source.skeleton)
    if stored is not None:
        if scheme is not None:
            raise MethodError(f"The weights of {source.name!r} are stored as {stored} already; drop quantization.")
        _check(resolved, tuner, chosen, stored)
    bits = loading.quantization_config(quantization, source.skeleton, dtype)
    _rehearse(source, tuner, chosen, resolved)
    return _finish(loading.load(source, bits, options), resolved, tuner, chosen)


def outline(name: str, method: Any, *, task: str) -> nn.Module:
    """What `get_model` would build, without its weights: on the meta device, with its plan, to be asked about.

    Args:
        name: hub id or folder of the base. A new head gets some number of classes.
        method, task: as for `get_model`.
    Raises:
        MethodError: as `get_model`; or the tuner cannot be built without weights.
    """
    fields = dataclasses.fields(registry.load(registry.find(task, ("task",))))
    takes_labels = any(field.name == "num_labels" for field in fields)
    chosen = choose_task(task, loading.stored_labels(name) if takes_labels else None)
    resolved = resolve(method, {}, chosen.peft_task_type)
    tuner = resolved.tuner or Tuner("full")
    _check(resolved, tuner, chosen, None)
    source = loading.open_source(name, chosen, {})
    try:
        model = with_tuner(source.skeleton, tuner, chosen)
    except (NotImplementedError, RuntimeError) as error:
        raise MethodError(f"The tuner {tuner.name!r} cannot be built without weights: {error}") from error
    model.peft_plus = _plan(model, resolved, tuner, chosen, {})  # type: ignore[assignment]
    return model


def attach(model: nn.Module, method: Any, *, task: str | Task | None = None) -> Any:
    """Give plugins to a model as it stands, e.g. one that plain PEFT made; again after changing what trains.

    A plan that hangs there already is replaced, plugins and stages included: name all of them.

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
    if getattr(model, "_hf_peft_config_loaded", False):
        raise MethodError(
            f"This {type(model).__name__} got its adapter from transformers' add_adapter or load_adapter, whose "
            "folders and checkpoints are others than PEFT's. Let PEFT put it there: get_peft_model(base, config), then "
            "attach; or get_model(base, method=[config, …])."
        )
    chosen = choose_task(task, num_labels, model) if task is not None else infer_task(model)
    check_loaded(model, chosen, num_labels)
    tuner = tuner_of(model)
    _check(resolved, tuner, chosen, loading.scheme_of_model(transformers_model(model)))
    if _prepared(model, resolved) is not model:
        raise MethodError("A plugin puts another model in the place of the one that it is attached to: use get_model.")
    return _with_plan(model, resolved, tuner, chosen)


def _check(method: Method, tuner: Tuner, task: Task, scheme: str | None) -> None:
    """Everything that tuner, task, plugins and quantisation say against each other, without a model."""
    check_unpartitioned()
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


def _rehearse(source: loading.Source, tuner: Tuner, task: Task, method: Method) -> None:
    """Build the tuner on the skeleton, so that what PEFT would refuse is refused before the weights load."""
    init = getattr(tuner.config, "init_lora_weights", True)
    if isinstance(init, str) and init.startswith(_DATA_DEPENDENT_INITS):
        return
    try:
        # What is drawn here must not be missing later: the same seed gives the weights that plain PEFT draws.
        with torch.random.fork_rng(devices=[]):
            model = with_tuner(source.skeleton, tuner, task)
    except (NotImplementedError, RuntimeError):
        # Some initialisations read weights, which the skeleton has none of; the real build will tell.
        return
    _plan(model, method, tuner, task, {})


def _finish(base: nn.Module, method: Method, tuner: Tuner, task: Task) -> nn.Module:
    loading.keep_differentiable(base)
    untouched = fingerprint(base)  # before PiSSA and its like change the weights that they start from
    base = _prepared(base, method)
    return _with_plan(with_tuner(base, tuner, task), method, tuner, task, untouched)


def _prepared(base: nn.Module, method: Method) -> nn.Module:
    """The base with the weights that plugins want in it."""
    for plugin in method.plugins:
        if "prepare_base" in plugin.hooks():
            answer = ask(plugin, "prepare_base", base)
            if not isinstance(answer, nn.Module):
                raise PluginError(f"{who(plugin, method.origins)} returned {answer!r} from prepare_base, not a model.")
            base = answer
    return base


def _with_plan(
    model: nn.Module, method: Method, tuner: Tuner, task: Task, base_fingerprint: str | None = None
) -> nn.Module:
    loading.keep_differentiable(model)
    _check_filled([name for name, tensor in model.named_parameters() if tensor.requires_grad and tensor.is_meta])
    plan = _plan(
        model,
        method,
        tuner,
        task,
        {
            "name_or_path": getattr(transformers_model(model), "name_or_path", "") or "",
            "class": type(transformers_model(model)).__name__,
            "dtype": dtype_of(model),
            "fingerprint": base_fingerprint or fingerprint(model),
        },
    )
    model.peft_plus = plan  # type: ignore[assignment]
    if hasattr(type(model), "save_pretrained"):
        model.save_pretrained = SavePretrained(model)  # type: ignore[assignment]
    return model


def _plan(model: nn.Module, method: Method, tuner: Tuner, task: Task, base: Mapping[str, Any]) -> Plan:
    """The plan of a model that has its tuner, which every plugin has looked at."""
    task.virtual_tokens = prepends_tokens(model)
    layers = _layers(model, method)
    params = _params(model, layers)
    plan = Plan(
        tuner=tuner.name,
        plugins=method.plugins,
        origins=method.origins,
        task=task,
        layers=layers,
        params=params,
        stages=method.stages,
        quantization=loading.scheme_of_model(transformers_model(model)),
        base=base,
    )
    check_settings_fit(plan, model)
    return plan


def _check_filled(hollow: Sequence[str]) -> None:
    if hollow:
        raise MethodError(
            f"{len(hollow)} parameters that would train are on the meta device and hold no values, e.g. {hollow[0]!r}. "
            "Load the weights first, e.g. with from_pretrained, without offloading what trains."
        )


def _layers(model: nn.Module, method: Method) -> Layers:
    """The depths; where nothing needs them and the model has no list of blocks, a flat map."""
    try:
        return layer_map(model)
    except ValueError as error:
        for plugin in method.plugins:
            if "layers" in plugin.needs:
                raise MethodError(f"{who(plugin, method.origins)} needs {NEEDS['layers']}; {error}") from error
        return Layers(num_blocks=0, depth={name: 0 for name, _ in model.named_parameters()}, blocks=())


def _params(model: nn.Module, layers: Layers) -> dict[str, Param]:
    heads = find_heads(model)
    tensors = dict(model.named_parameters())
    return {
        name: Param(
            name,
            tuple(tensors[name].shape),
            layers.depth[name],
            part_of(name, model, heads),
            quantised=not tensors[name].is_floating_point(),
        )
        for name in trainable_names(model)
    }
