"""What several processes need is set, and what they would get wrong is refused, before anything runs."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.integrations
from accelerate.utils import FullyShardedDataParallelPlugin
from peft import LoraConfig
from torch import nn

import peft_plus
from peft_plus import MethodError, Plugin, get_model
from peft_plus.arguments import check_arguments
from peft_plus.distributed import (
    check_accelerator,
    check_batches,
    check_checkpointing,
    check_ddp,
    check_fsdp,
)
from peft_plus.rehearsal import check_adapter_folder
from peft_plus.sharded_resume import check_sharded_resume
from tests.models import NUM_LABELS, tiny
from tests.training import quiet

FLIPS = {"lora": {}, "gradual_unfreeze": {"every": 2}}
NOISY = {"lora": {}, "r3f": {"eps": 0.1}}
RATED = {"lora": {}, "llrd": {}}
REENTRANT = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}


def plan(method: Any) -> Any:
    return get_model(tiny("bert"), method).peft_plus


class TwoProcesses(SimpleNamespace):
    """TrainingArguments as they are in one of two processes."""

    def __init__(self, folder: Any, **settings: Any) -> None:
        super().__init__(**{**vars(quiet(folder, **settings)), "world_size": 2})


def accelerator(*, processes: int = 2, deepspeed: int | None = None, fsdp: Any = None, precision: str = "no") -> Any:
    """What the checks read of an Accelerator."""
    plugin = None if deepspeed is None else SimpleNamespace(zero_stage=deepspeed)
    return SimpleNamespace(
        num_processes=processes,
        mixed_precision=precision,
        ddp_handler=None,
        state=SimpleNamespace(deepspeed_plugin=plugin, fsdp_plugin=fsdp),
    )


def fsdp2(**settings: Any) -> FullyShardedDataParallelPlugin:
    given = {"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT", "auto_wrap_policy": "transformer_based_wrap"}
    return FullyShardedDataParallelPlugin(**{**given, **settings})


# ---- DDP ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"ddp_find_unused_parameters": False}, "'gradual_unfreeze'.*with ddp_find_unused_parameters=False DDP waits"),
        ({"ddp_static_graph": True}, "'gradual_unfreeze'.*ddp_static_graph=True promises"),
    ],
)
def test_settings_of_ddp_that_contradict_a_freezing_plan(settings: dict[str, Any], says: str, tmp_path: Any) -> None:
    with pytest.raises(MethodError, match=says):
        check_ddp(plan(FLIPS), TwoProcesses(tmp_path, **settings))
    check_ddp(plan(NOISY), TwoProcesses(tmp_path, **settings))  # nothing freezes
    check_ddp(plan(FLIPS), quiet(tmp_path, **settings))  # one process has no DDP


def test_uneven_batches_are_refused(tmp_path: Any) -> None:
    uneven = {"accelerator_config": {"even_batches": False}}
    with pytest.raises(MethodError, match="one process a batch more than another"):
        check_batches(TwoProcesses(tmp_path, **uneven))
    check_batches(quiet(tmp_path, **uneven))
    check_batches(TwoProcesses(tmp_path))


@pytest.mark.parametrize("method", [FLIPS, NOISY])
def test_reentrant_checkpointing_is_refused(method: Any, tmp_path: Any) -> None:
    with pytest.raises(MethodError, match=r"the ranks would silently train on wrong gradients.*'use_reentrant': False"):
        check_checkpointing(plan(method), TwoProcesses(tmp_path, **REENTRANT))
    check_checkpointing(plan(method), quiet(tmp_path, **REENTRANT))  # exact on one process


def test_reentrant_checkpointing_of_a_plain_plan_is_the_users_affair(tmp_path: Any) -> None:
    check_checkpointing(plan("lora"), TwoProcesses(tmp_path, **REENTRANT))


def test_checkpointing_settings_that_leave_it_open_are_not_reentrant(tmp_path: Any) -> None:
    args = TwoProcesses(
        tmp_path, activation_checkpointing=True, activation_checkpointing_kwargs={"preserve_rng_state": False}
    )
    check_checkpointing(plan(NOISY), args)
    assert args.activation_checkpointing_kwargs == {"preserve_rng_state": False, "use_reentrant": False}


@pytest.mark.parametrize("given", [{}, {"activation_checkpointing_kwargs": {"preserve_rng_state": False}}])
def test_the_trainer_checkpoints_without_reentrance(given: dict[str, Any], tmp_path: Any) -> None:
    model = get_model(tiny("bert"), "lora")
    args = quiet(tmp_path, activation_checkpointing=True, max_steps=1, **given)
    data = [{"input_ids": torch.tensor([5, 6, 7]), "labels": 0}] * 4
    peft_plus.Trainer(model, args, train_dataset=data).train()
    functions = [
        module._gradient_checkpointing_func
        for module in model.modules()
        if hasattr(module, "_gradient_checkpointing_func")
    ]
    assert functions
    assert all(function.keywords["use_reentrant"] is False for function in functions)


@pytest.mark.parametrize(("reentrant", "refused"), [(True, True), (False, False)])
def test_checkpointing_switched_on_by_hand(reentrant: bool, refused: bool) -> None:
    model = get_model(tiny("bert"), NOISY)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    check_accelerator(model.peft_plus, model, accelerator(processes=1))
    if refused:
        with pytest.raises(MethodError, match=r"model.gradient_checkpointing_enable\({'use_reentrant': False}\)"):
            check_accelerator(model.peft_plus, model, accelerator())
    else:
        check_accelerator(model.peft_plus, model, accelerator())


def test_a_launch_whose_processes_would_train_alone(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch` on a machine without GPUs, and without ACCELERATE_USE_CPU."""
    args = SimpleNamespace(**{**vars(quiet(tmp_path)), "world_size": 1, "n_gpu": 1})
    method = plan("lora")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(MethodError, match=r"8 processes were launched, but each would train alone.*_USE_CPU=1"):
        check_arguments(method, args)


# ---- DeepSpeed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_with_flips_is_refused(stage: int) -> None:
    model = get_model(tiny("bert"), FLIPS)
    with pytest.raises(
        MethodError, match=rf"ZeRO-{stage} .* would silently move them.*Use DDP, FSDP2 or zero_stage: 0"
    ):
        check_accelerator(model.peft_plus, model, accelerator(deepspeed=stage))


@pytest.mark.parametrize(("method", "stage"), [("lora", 3), (NOISY, 2), (FLIPS, 0), ("full", 3)])
def test_deepspeed_without_flips_is_fine(method: Any, stage: int) -> None:
    model = get_model(tiny("bert"), method)
    check_accelerator(model.peft_plus, model, accelerator(deepspeed=stage))


class Looks(Plugin):
    name = "looks"

    def on_pre_optimizer_step(self, run):
        pass


class Forgets(Plugin):
    name = "forgets"
    on_freeze = "drop_state"

    def may_train(self, run, param):
        return True


@pytest.mark.parametrize(
    ("plugin", "says"),
    [
        (Looks(), "'looks'.*looks at the gradients before each update, but DeepSpeed updates inside the backward"),
        (Forgets(), "'forgets'.*drops the optimizer's state of what it freezes, which DeepSpeed keeps"),
    ],
)
def test_deepspeed_hides_gradients_and_states(plugin: Plugin, says: str) -> None:
    model = get_model(tiny("bert"), ["lora", plugin])
    with pytest.raises(MethodError, match=says):
        check_accelerator(model.peft_plus, model, accelerator(deepspeed=0))


def test_deepspeed_with_rates_is_refused() -> None:
    model = get_model(tiny("bert"), RATED)
    with pytest.raises(MethodError, match=r"'llrd' .*DeepSpeed updates inside the backward.*Use DDP or FSDP2"):
        check_accelerator(model.peft_plus, model, accelerator(deepspeed=0))


def test_a_model_made_after_zero_3_was_switched_on_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.integrations, "is_deepspeed_zero3_enabled", lambda: True)
    for model in (tiny("bert"), "no such folder"):
        with pytest.raises(MethodError, match=r"Call get_model before TrainingArguments"):
            get_model(model, "lora", task="SEQ_CLS", num_labels=NUM_LABELS)


# ---- FSDP --------------------------------------------------------------------------------------------------------


def test_fsdp1_is_refused() -> None:
    model = get_model(tiny("bert"), "lora")
    with pytest.raises(MethodError, match="Use FSDP2: fsdp_version: 2"):
        check_accelerator(model.peft_plus, model, accelerator(fsdp=SimpleNamespace(fsdp_version=1)))


def mixed() -> nn.Module:
    """A bf16 base whose layer norms train beside fp32 LoRA, in each block."""
    model = get_model(tiny("bert").bfloat16(), LoraConfig())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or "output.LayerNorm" in name)
    return peft_plus.attach(model, FLIPS_ONLY)


FLIPS_ONLY = {"gradual_unfreeze": {"every": 2}}


def test_mixed_dtypes_in_one_group_are_found_before_wrapping() -> None:
    model = mixed()
    with pytest.raises(MethodError, match=r"layer\.0.* is torch\.\w+ and .*layer\.0.* is torch\.\w+; both may train"):
        check_fsdp(model, model.peft_plus)
    with pytest.raises(MethodError, match="both may train"):
        check_accelerator(model.peft_plus, model, accelerator(fsdp=fsdp2()))
    check_accelerator(model.peft_plus, model, accelerator(fsdp=fsdp2(), precision="bf16"))  # Accelerate upcasts


def test_a_bf16_head_is_a_group_of_its_own() -> None:
    """LoRA in fp32 lies in the blocks, the head in the root: each group has one dtype, unless all are one group."""
    model = get_model(tiny("bert").bfloat16(), "lora")
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    if len(dtypes) == 1:
        pytest.fail("PEFT keeps heads in the dtype of the adapter now: the second check below has lost its case")
    check_accelerator(model.peft_plus, model, accelerator(fsdp=fsdp2()))
    with pytest.raises(MethodError, match="both may train"):
        check_accelerator(model.peft_plus, model, accelerator(fsdp=fsdp2(auto_wrap_policy="no_wrap")))


@pytest.mark.parametrize("engine", [{"deepspeed": 0}, {"deepspeed": 3}, {"fsdp": fsdp2()}])
def test_a_store_of_the_trunks_output_needs_whole_weights(engine: dict[str, Any]) -> None:
    model = get_model(tiny("bert"), {"lora": {}, "freeze": {"blocks": 1}, "trunk_cache": {}})
    with pytest.raises(MethodError, match=r"'trunk_cache' .*runs the lower blocks alone.*Use DDP, or leave it out"):
        check_accelerator(model.peft_plus, model, accelerator(**engine))
    check_accelerator(model.peft_plus, model, accelerator())


def test_sharded_state_dicts_are_warned_of(caplog: Any) -> None:
    model = get_model(tiny("bert"), "lora")
    check_accelerator(model.peft_plus, model, accelerator(fsdp=fsdp2(state_dict_type="SHARDED_STATE_DICT")))
    assert "saves no adapter folder, and resumes from no checkpoint" in caplog.text


# ---- FSDP2, resuming ---------------------------------------------------------------------------------------------


def test_sharded_state_dicts_of_an_adapter_are_not_resumed(tmp_path: Path) -> None:
    sharded = accelerator(fsdp=fsdp2(state_dict_type="SHARDED_STATE_DICT"))
    with pytest.raises(MethodError, match="with sharded state dicts it holds no adapter folder"):
        check_sharded_resume(sharded, get_model(tiny("bert"), "lora"), tmp_path)
    check_sharded_resume(sharded, get_model(tiny("bert"), "full"), tmp_path)
    check_sharded_resume(accelerator(), get_model(tiny("bert"), "lora"), tmp_path)


def test_a_sharded_run_does_not_go_on_with_a_fresh_optimizer(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"holds no optimizer\.bin .*go on with a fresh one"):
        check_sharded_resume(accelerator(fsdp=fsdp2()), get_model(tiny("bert"), "lora"), tmp_path)


class Writes:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)


def test_what_accelerate_pickled_runs_no_code(tmp_path: Path) -> None:
    torch.save({"state": {"weight": Writes(tmp_path / "ran")}}, tmp_path / "optimizer.bin")
    with pytest.raises(pickle.UnpicklingError):
        check_sharded_resume(accelerator(fsdp=fsdp2()), get_model(tiny("bert"), "lora"), tmp_path)
    assert not (tmp_path / "ran").exists()


def test_the_file_of_fsdp_belongs_beside_an_adapter_under_fsdp_alone(tmp_path: Path) -> None:
    model = get_model(tiny("bert"), "lora")
    model.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model_fsdp.bin").touch()
    with pytest.raises(MethodError, match=r"pytorch_model_fsdp\.bin does not belong beside an adapter"):
        check_adapter_folder(tmp_path, model)
    check_adapter_folder(tmp_path, model, engine_owned=True)
