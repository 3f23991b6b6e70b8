"""The config files of `examples/launch` say what docs/launch.md says they do, as far as a CPU can tell."""

from __future__ import annotations

import argparse
import csv
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from peft import PeftModel

from examples.launch import train
from peft_plus import MethodError, get_model
from peft_plus.distributed import check_accelerator
from tests.models import tiny
from tests.tokenizers import tiny_tokenizer

from .launch import ROOT
from .test_distributed import accelerator

FOLDER = ROOT / "examples" / "launch"
CONFIGS = sorted(path.name for path in FOLDER.glob("*.yaml"))
LIMIT = 120
TEXTS = ["good cat", "bad dog", "what works in paris", "the dog is bad", "a good york", "where is the cat", "on", "and"]


def launch_arguments(name: str, *options: str) -> argparse.Namespace:
    """What `accelerate launch --config_file NAME` makes of the file."""
    parser = launch_command_parser()
    args, defaults, _ = _validate_launch_command(
        parser.parse_args(["--config_file", str(FOLDER / name), *options, "train.py"])
    )
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return args


def environment(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the launcher tells each process, put into the environment of this one."""
    args = launch_arguments(name, "--main_process_port", "0")
    told = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    for key, value in told.items():
        if os.environ.get(key) != value:
            monkeypatch.setenv(key, value)
    return told


def test_every_config_is_tested_and_documented() -> None:
    assert CONFIGS == ["ddp.yaml", "fsdp2.yaml", "several_machines.yaml", "zero2.yaml", "zero3.yaml"]
    page = (ROOT / "docs" / "launch.md").read_text(encoding="utf-8")
    assert [name for name in CONFIGS if f"../examples/launch/{name}" not in page] == []


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_the_file_and_knows_every_key(name: str) -> None:
    config = load_config_from_file(str(FOLDER / name))
    assert config.use_cpu is False
    assert config.mixed_precision == "bf16"
    known = vars(launch_command_parser().parse_args(["train.py"])).keys()
    nested = [key for key, value in yaml.safe_load((FOLDER / name).read_text()).items() if isinstance(value, dict)]
    for section in nested:
        assert [key for key in getattr(config, section) if key not in known] == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ddp.yaml", "multi_gpu"),
        ("several_machines.yaml", "multi_gpu"),
        ("fsdp2.yaml", "use_fsdp"),
        ("zero2.yaml", "use_deepspeed"),
        ("zero3.yaml", "use_deepspeed"),
    ],
)
def test_each_starts_its_kind_of_run(name: str, kind: str) -> None:
    args = launch_arguments(name)
    assert [k for k in ("multi_gpu", "use_fsdp", "use_deepspeed") if getattr(args, k)] == [kind]
    assert (args.num_machines, args.num_processes) == ((2, 16) if name == "several_machines.yaml" else (1, 8))


def test_fsdp2_shards_blocks_and_saves_whole_adapters(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    told = environment("fsdp2.yaml", monkeypatch)
    assert told["ACCELERATE_USE_FSDP"] == "true"
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    model = get_model(tiny("bert"), {"lora": {}, "gradual_unfreeze": {}, "llrd": {}, "r3f": {}})
    check_accelerator(model.peft_plus, model, accelerator(fsdp=plugin))
    assert caplog.text == ""


@pytest.mark.parametrize(("name", "stage"), [("zero2.yaml", 2), ("zero3.yaml", 3)])
def test_zero_says_its_stage(name: str, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    told = environment(name, monkeypatch)
    assert told["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert told["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == str(stage)
    model = get_model(tiny("bert"), ["lora", "gradual_unfreeze"])
    with pytest.raises(MethodError, match=f"ZeRO-{stage}"):
        check_accelerator(model.peft_plus, model, accelerator(deepspeed=int(told["ACCELERATE_DEEPSPEED_ZERO_STAGE"])))


# ---- the script --------------------------------------------------------------------------------------------------


def inputs(folder: Path) -> list[str]:
    """A tiny pretrained model with its tokenizer, and sentences: the script's arguments for them."""
    tiny("bert", "MASKED_LM").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    with (folder / "sentences.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((text, i % 2) for i, text in enumerate(TEXTS * 4))])
    return ["--model", str(folder / "model"), "--data", str(folder / "sentences.csv"), "--epochs", "1", "--batch", "4"]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # torch's, without a GPU
def test_the_script_runs_on_one_cpu(tmp_path: Path, capsys: Any) -> None:
    train.main([*inputs(tmp_path), "--output", str(tmp_path / "out"), "--method", "lora", "llrd", "r3f"])
    assert "1 process(es), 8 steps" in capsys.readouterr().out
    PeftModel.from_pretrained(tiny("bert", num_labels=2), tmp_path / "out" / "adapter")


def test_the_script_runs_on_two_machines(tmp_path: Path) -> None:
    """Two launchers, as two machines would start them, that only know each other's address."""
    given = [*inputs(tmp_path), "--output", str(tmp_path / "out")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def machine(rank: int) -> subprocess.CompletedProcess[str]:
        options = ["--config_file", str(FOLDER / "several_machines.yaml"), "--machine_rank", str(rank)]
        options += ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
        command = [sys.executable, "-m", "accelerate.commands.launch", *options, "--mixed_precision", "no"]
        told = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        told |= {"HF_DATASETS_CACHE": str(tmp_path / f"cache {rank}")}  # machines share no disk
        return subprocess.run(
            [*command, "-m", "examples.launch.train", *given],
            cwd=ROOT,
            env=told,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=LIMIT,
        )

    with ThreadPoolExecutor() as pool:
        ended = list(pool.map(machine, (0, 1)))
    assert [process.returncode for process in ended] == [0, 0], "\n".join(process.stdout for process in ended)
    assert "2 process(es), 4 steps" in ended[0].stdout
    assert "steps" not in ended[1].stdout.replace("train_steps_per_second", "")
    PeftModel.from_pretrained(tiny("bert", num_labels=2), tmp_path / "out" / "adapter")
