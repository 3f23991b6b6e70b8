"""Checkpoints of a Session: weights as `save_pretrained` writes them, and everything else without pickle."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor

from .checkpoint import MANIFEST, Checkpoint, seal, unseal, verify
from .distributed import gather
from .errors import CheckpointError, MethodError
from .find_checkpoint import newest_whole, rotate
from .random_state import rng_state
from .renamed_weights import left_out, load_by_their_class
from .run_identity import compare, identity
from .saving import THAWED, load_thawed
from .state_files import has_state, read_state, write_state
from .tuning import is_peft

if TYPE_CHECKING:
    from .session import Session

logger = logging.getLogger(__name__)

_STATE = "session"
_SCRATCH = "_trunk"
"""Folder beside the checkpoints with what the run stored, until it has finished."""


def save(session: Session, output_dir: Path, limit: int | None) -> Path:
    """Write and seal `output_dir/checkpoint-<step>`. See `Session.save`."""
    _check_whole(session)
    folder = output_dir / f"checkpoint-{session.step}"
    main = session.accelerator.is_main_process
    _together(folder, lambda: unseal(folder) if main else None)
    _together(folder, lambda: _write(session, folder, main))
    _together(folder, lambda: seal(folder, _identity(session), session.step) if main else None)
    _together(folder, lambda: rotate(output_dir, limit, keep=[folder]) if main else None)
    return folder


def _write(session: Session, folder: Path, main: bool) -> None:
    session.engine.seal(beside=folder.parent / _SCRATCH)
    write_state(folder / f"rng_state_{session.accelerator.process_index}", rng_state())
    if not main:
        return
    model: Any = session.bare_model
    with session.engine.evaluating():  # no model is split here, so that nobody waits for the others
        model.save_pretrained(folder)
    scaler = session.accelerator.scaler
    write_state(
        folder / _STATE,
        {
            "step": session.step,
            "epoch": session.epoch,
            "epoch_steps": session.epoch_steps,
            "optimizers": [optimizer.optimizer.state_dict() for optimizer in session.optimizers],
            "schedulers": [scheduler.scheduler.state_dict() for scheduler in session.schedulers],
            "scaler": None if scaler is None else scaler.state_dict(),
            "engine": session.engine.state_dict(),
        },
    )


def resume(session: Session, source: Path) -> bool:
    """Put a session where a checkpoint was written. See `Session.resume`."""
    _check_whole(session)
    processes, rank = session.accelerator.num_processes, session.accelerator.process_index
    found = _together(source, lambda: _find(source))
    if found is None:
        logger.warning("There is no checkpoint in %s yet, so training begins.", source)
        return False
    folder = found.folder
    _together(folder, lambda: compare(found.identity, _identity(session), str(folder)))
    state = _together(folder, lambda: _read(session, folder))
    session.engine.load_state_dict(state["engine"])  # first: a plugin that refuses its state leaves the weights alone
    _load_weights(session.bare_model, folder)
    for held, saved in zip(session.optimizers, state["optimizers"], strict=True):
        held.optimizer.load_state_dict(saved)
    for held, saved in zip(session.schedulers, state["schedulers"], strict=True):
        held.scheduler.load_state_dict(saved)
    if session.accelerator.scaler is not None and state["scaler"] is not None:
        session.accelerator.scaler.load_state_dict(state["scaler"])
    session.scratch = folder.parent / _SCRATCH
    session.step, session.epoch, session.epoch_steps = state["step"], state["epoch"], state["epoch_steps"]
    stem = folder / f"rng_state_{rank}"
    if has_state(stem):
        session.random_state = read_state(stem)
    else:
        logger.warning("%s has no random state for process %d of %d.", folder, rank, processes)
    logger.info("Going on from %s.", folder)
    return True


def _check_whole(session: Session) -> None:
    if any(isinstance(tensor, DTensor) for tensor in session.bare_model.parameters()):
        raise MethodError(
            "A Session neither saves nor resumes a model that FSDP2 has split over processes. Use DDP, or there "
            "peft_plus.Trainer."
        )


def _find(source: Path) -> Checkpoint | None:
    if (source / MANIFEST).exists() or re.fullmatch(r"checkpoint-\d+", source.name):
        return verify(source)
    return newest_whole(source)


def _read(session: Session, folder: Path) -> dict[str, Any]:
    if not has_state(folder / _STATE):
        raise CheckpointError(f"{folder} was not written by a Session; resume it with the loop that wrote it.")
    state = read_state(folder / _STATE)
    for name in ("optimizers", "schedulers"):
        here, there = len(getattr(session, name)), len(state[name])
        if here != there:
            raise CheckpointError(
                f"{folder} holds {there} {name}, this session has {here}. Make the same ones before session.resume."
            )
    return state


def _load_weights(model: Any, folder: Path) -> None:
    """Into the tensors that optimizer and DDP hold already."""
    with torch.no_grad():
        if is_peft(model):
            from peft import set_peft_model_state_dict

            for name in model.peft_config:
                own = folder if name == "default" else folder / name
                result = set_peft_model_state_dict(
                    model, load_file(own / "adapter_model.safetensors"), adapter_name=name
                )
                if result.unexpected_keys:
                    raise CheckpointError(f"{own}: {result.unexpected_keys[0]!r} is no tensor of this model.")
            if (folder / THAWED).is_file():
                load_thawed(model, folder)
        else:
            _load_full(model, folder)


def _load_full(model: nn.Module, folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else []
    weights: dict[str, torch.Tensor] = {}
    for shard in shards or ["model.safetensors"]:
        weights |= load_file(folder / shard)
    result = model.load_state_dict(weights, strict=False)
    if left_out(model, result.missing_keys) or result.unexpected_keys:
        load_by_their_class(model, folder)


def _identity(session: Session) -> dict[str, Any]:
    accelerator, optimizer = session.accelerator, session.optimizers[0].optimizer
    return identity(
        session.bare_model,
        session.plan,
        session.stage,
        settings={
            "max_steps": session.max_steps,
            "seed": session.seed,
            "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
            "mixed_precision": accelerator.mixed_precision,
            "batch_size": session.data.batch_size,
            "optimizer": type(optimizer).__name__,
            "optimizer settings": optimizer.defaults,
            "schedulers": [type(scheduler.scheduler).__name__ for scheduler in session.schedulers],
        },
        processes=accelerator.num_processes,
        device=accelerator.device.type,
        examples=session.data.examples,
        sample=session.data.sample,
    )


def check_undisturbed(saved: Any) -> None:
    """Warn where random numbers were drawn between a checkpoint and the end of its step: a resume draws them not."""
    if not torch.equal(saved["cpu"], rng_state()["cpu"]):
        logger.warning(
            "Random numbers were drawn after session.save(…) in the same turn of the loop, e.g. by an evaluation. A "
            "resumed run does not draw them, and so differs. Save last."
        )


def _together(folder: Path, work: Callable[[], Any]) -> Any:
    """Do `work` on every process; where one fails, all raise, instead of waiting for it for ever."""
    answer, error = None, None
    try:
        answer = work()
    except Exception as raised:  # noqa: BLE001 - raised below, once the others know
        error = raised
    failures = [text for text in gather(f"{error}" if error else None) if text]
    if error is not None:
        if isinstance(error, OSError | SafetensorError):
            raise CheckpointError(
                f"{folder} could not be written or read: {error}. It is not taken for whole; earlier checkpoints and "
                "the model in memory are as they were."
            ) from error
        raise error
    if failures:
        raise CheckpointError(f"Another process failed at {folder}: {failures[0]}")
    return answer
