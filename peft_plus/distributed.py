"""Several processes: what DDP, FSDP and DeepSpeed need for a plan, and what they would get silently wrong."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from .compose import Plan, who
from .errors import MethodError
from .plugin import Plugin

logger = logging.getLogger(__name__)

_LETTING_GO = 0.05
"""Seconds without Python's lock, in which gloo's threads let go of what was exchanged."""


def flipping(plan: Plan) -> Plugin | None:
    """The first plugin that may freeze or thaw something while a stage runs, or None."""
    return next((plugin for plugin in plan.plugins if "may_train" in plugin.hooks()), None)


def is_split(model: nn.Module) -> bool:
    """Whether processes share the weights of a model (FSDP, DeepSpeed ZeRO-3), so that none has them whole."""
    return any(isinstance(module, FSDPModule) for module in model.modules()) or any(
        hasattr(tensor, "ds_id") for tensor in model.parameters()
    )


def check_ddp(plan: Plan, args: Any) -> None:
    """Set what DDP needs for the plan, refuse what it cannot do.

    Args:
        args: TrainingArguments; `ddp_find_unused_parameters` is set where the user said nothing.
    Raises:
        MethodError: an explicit setting contradicts the plan.
    """
    plugin = flipping(plan)
    if plugin is None:
        return
    name = who(plugin, plan.origins)
    if args.ddp_find_unused_parameters is None:
        # A frozen parameter gets no gradient, and DDP would wait for it for ever.
        args.ddp_find_unused_parameters = True
    elif not args.ddp_find_unused_parameters and args.world_size > 1:
        raise MethodError(
            f"{name} freezes parameters during training, and with ddp_find_unused_parameters=False DDP waits for "
            "their gradients. Leave it out: it is set to True where a plan needs it."
        )
    if args.ddp_static_graph and args.world_size > 1:
        raise MethodError(
            f"{name} changes during training which parameters get gradients, and ddp_static_graph=True promises DDP "
            "that this never changes. Leave it out."
        )


def check_batches(args: Any) -> None:
    """Refuse data that would give the processes different numbers of steps.

    Raises:
        MethodError: `even_batches=False` on several processes.
    """
    if args.world_size > 1 and not args.accelerator_config.even_batches:
        raise MethodError(
            "accelerator_config={'even_batches': False} may give one process a batch more than another, which would "
            "wait there for ever. Leave it out: then the first rows fill up the last batches."
        )


def check_checkpointing(plan: Plan, args: Any) -> None:
    """Refuse reentrant activation checkpointing where DDP would get it wrong; choose the other where nothing was said.

    Its recomputation runs a backward of its own inside the backward. DDP then counts gradients twice: with a second
    pass some models raise, others train on wrong gradients that differ from rank to rank.

    Args:
        args: TrainingArguments; a missing `use_reentrant` is set to False.
    Raises:
        MethodError: the plan has a plugin with a second pass or with flips, and several processes run.
    """
    settings = args.activation_checkpointing_kwargs
    if settings and "use_reentrant" not in settings:  # torch's own default is the reentrant one
        args.activation_checkpointing_kwargs = settings = {**settings, "use_reentrant": False}
    if args.activation_checkpointing and settings and settings["use_reentrant"] and args.world_size > 1:
        _refuse_reentrant(plan, "activation_checkpointing_kwargs={'use_reentrant': False}")


def _refuse_reentrant(plan: Plan, fix: str) -> None:
    hooks = {"may_train", "loss_terms", "passes"}
    plugin = next((p for p in plan.plugins if hooks & set(p.hooks())), None)
    if plugin is not None:
        raise MethodError(
            f"Reentrant activation checkpointing under DDP counts gradients twice when {who(plugin, plan.origins)} "
            f"adds a pass or freezes layers: the ranks would silently train on wrong gradients. Write {fix}."
        )


def _checkpoints_reentrantly(model: nn.Module) -> bool:
    """Whether somebody switched reentrant checkpointing on in the model itself."""
    functions = [
        getattr(module, "_gradient_checkpointing_func", None)
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False)
    ]
    return any(isinstance(f, partial) and f.keywords.get("use_reentrant", True) for f in functions)


def check_accelerator(plan: Plan, model: nn.Module, accelerator: Any) -> None:
    """Refuse what DDP, FSDP or DeepSpeed would get wrong. Before the model is wrapped.

    Args:
        accelerator: an `accelerate.Accelerator`.
    Raises:
        MethodError: the plan cannot run exactly there; names the plugin and what to use instead.
    """
    guard = next((plugin for plugin in plan.plugins if "accept_update" in plugin.hooks()), None)
    if guard is not None and accelerator.mixed_precision == "fp16":
        raise MethodError(
            f"{who(guard, plan.origins)} looks at each update, and in fp16 the gradient scaler leaves updates out "
            "itself, before anybody can look. Use bf16, or drop it."
        )
    if accelerator.num_processes > 1 and _checkpoints_reentrantly(model):
        _refuse_reentrant(plan, "model.gradient_checkpointing_enable({'use_reentrant': False})")
    if flipping(plan) is not None and accelerator.ddp_handler is not None:
        accelerator.ddp_handler.find_unused_parameters = True  # a model from model_init came after the arguments
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if deepspeed is not None:
        _check_deepspeed(plan, int(deepspeed.zero_stage))
    storing = next((plugin for plugin in plan.plugins if "trunk_cache" in plugin.hooks()), None)
    if storing is not None and (deepspeed is not None or fsdp is not None):
        raise MethodError(
            f"{who(storing, plan.origins)} runs the lower blocks alone, and FSDP and DeepSpeed gather their weights in "
            "the order of whole passes. Use DDP, or leave it out."
        )
    if deepspeed is not None or fsdp is not None:
        _check_same_start(plan, model)
    if fsdp is None:
        return
    if fsdp.fsdp_version == 1:
        raise MethodError(
            "FSDP1 renames and flattens the parameters that the plan knows by name. Use FSDP2: fsdp_version: 2 in "
            "accelerate's config file, or fsdp_config={'version': 2}."
        )
    if plan.tuner != "full" and "FULL" not in str(fsdp.state_dict_type):
        logger.warning(
            "With sharded state dicts the Trainer saves no adapter folder, and resumes from no checkpoint. Set "
            "fsdp_state_dict_type: FULL_STATE_DICT."
        )
    if accelerator.mixed_precision == "no" or plan.quantization:  # else Accelerate keeps all that trains in fp32
        check_fsdp(model, plan, wraps_blocks=fsdp.auto_wrap_policy is not None)


def _check_same_start(plan: Plan, model: nn.Module) -> None:
    """DDP hands the first process's weights to all; a sharded model is put together from what each of them drew."""
    from .proof import checksum

    tensors = dict(model.named_parameters())
    mine = {name: checksum(tensors[name]) for name in plan.params}
    others = gather(mine)
    apart = [name for name in mine if any(other.get(name) != mine[name] for other in others)]
    if apart:
        raise MethodError(
            f"The processes drew different first values for {len(apart)} parameters, e.g. {apart[0]!r}, and a sharded "
            "model would be put together from pieces of all. Call transformers.set_seed(…) before get_model."
        )


def _check_deepspeed(plan: Plan, stage: int) -> None:
    logger.warning("DeepSpeed updates flat copies of its own: what moved is not compared with what was declared.")
    own = next((p for p in plan.plugins if {"passes", "edit_gradient", "moves", "eval_weights"} & set(p.hooks())), None)
    if own is not None:
        raise MethodError(
            f"{who(own, plan.origins)} makes passes, gradients or weights of its own, and DeepSpeed owns the backward "
            "and updates flat copies of all parameters. Use DDP or FSDP2."
        )
    plugin = flipping(plan)
    if plugin is not None and stage >= 1:
        raise MethodError(
            f"{who(plugin, plan.origins)} freezes parameters during training. DeepSpeed ZeRO-{stage} updates its own "
            "flat copies of all parameters, frozen ones too, so weight decay and momentum would silently move them. "
            "Use DDP, FSDP2 or zero_stage: 0."
        )
    told = next((p for p in plan.plugins if "on_pre_optimizer_step" in p.hooks()), None)
    if told is not None:
        raise MethodError(
            f"{who(told, plan.origins)} looks at the gradients before each update, but DeepSpeed updates inside the "
            "backward. Use DDP or FSDP2."
        )
    dropping = next((p for p in plan.plugins if p.on_freeze == "drop_state"), None)
    if dropping is not None:
        raise MethodError(
            f"{who(dropping, plan.origins)} drops the optimizer's state of what it freezes, which DeepSpeed keeps over "
            "flat copies of its own. Use DDP or FSDP2."
        )
    rated = next((p for p in plan.plugins if "lr_scale" in p.hooks()), None)
    if rated is not None:
        raise MethodError(
            f"{who(rated, plan.origins)} sets a rate for each layer at every update, but DeepSpeed updates inside the "
            "backward, over groups of its own. Use DDP or FSDP2."
        )


def check_unpartitioned() -> None:
    """Refuse to build a model whose weights DeepSpeed ZeRO-3 would split while they load.

    Nothing could tell their shapes, dtypes and fingerprints then. Split later, by the Trainer, they are the same.

    Raises:
        MethodError: ZeRO-3 is switched on already, by TrainingArguments or an Accelerator.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        raise MethodError(
            "DeepSpeed ZeRO-3 is switched on already and would split the weights while they load. Call get_model "
            "before TrainingArguments(…) or Accelerator(…): the Trainer splits them later."
        )


def check_fsdp(model: nn.Module, plan: Plan, *, wraps_blocks: bool = True) -> None:
    """Find mixed dtypes that FSDP2 cannot reduce together, before wrapping.

    All gradients of one FSDP group are reduced in one buffer, so whatever may ever train in it needs one dtype. FSDP2
    itself looks at the first backward only, when a layer that thaws later is still frozen.

    Args:
        model: not wrapped yet.
        plan: what hangs on it.
        wraps_blocks: whether each block is a group of its own, as with `TRANSFORMER_BASED_WRAP`; the rest is one more.
    Raises:
        MethodError: names two parameters of one group and their dtypes.
    """
    tensors = dict(model.named_parameters())
    seen: dict[int, str] = {}
    for name, param in plan.params.items():
        group = param.depth if wraps_blocks and 1 <= param.depth <= plan.layers.num_blocks else 0
        first = seen.setdefault(group, name)
        if tensors[first].dtype != tensors[name].dtype:
            raise MethodError(
                f"{first} is {tensors[first].dtype} and {name} is {tensors[name].dtype}; both may train, and FSDP "
                "reduces their gradients together, which needs one dtype. Load the model in float32 and train with "
                "bf16=True, or cast what trains to one dtype."
            )


def plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter under the names that the plan knows, whatever FSDP or torch.compile put between modules."""
    return {
        name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", ""): tensor
        for name, tensor in model.named_parameters()
    }


def rank() -> int:
    """Of this process."""
    return torch.distributed.get_rank() if _several() else 0


def gather(value: Any) -> list[Any]:
    """One small value of each process, in the order of their ranks. Every process must call it."""
    if not _several():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def leave_together() -> None:
    """After the last exchange of a run: wait until every process is here. Every process must call it.

    Gloo's threads let go of the exchanged tensors a little later than the exchange ends. One that wants to when the
    interpreter ends already cannot, and aborts the process: exit code -6 after all was done, in about one of eight
    launches whose script ended right after training (torch 2.13). They need Python's lock for it, which a barrier alone
    may give back too briefly.
    """
    if _several() and torch.distributed.get_backend() == "gloo":
        torch.distributed.barrier()
        time.sleep(_LETTING_GO)


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
