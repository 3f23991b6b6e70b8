"""A checkpoint is whole, or not taken for one: sealing, verifying, finding, rotating, transformers' own folders."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

import peft_plus.checkpoint
import peft_plus.random_state
from peft_plus import get_model
from peft_plus.checkpoint import MANIFEST, seal, unseal, verify
from peft_plus.errors import CheckpointError
from peft_plus.find_checkpoint import check, newest_whole, rotate
from peft_plus.random_state import rng_state, set_rng_state
from peft_plus.run_identity import compare, identity, training_settings
from tests.models import tiny
from tests.training import quiet

FILES = {"a.json": b"{}", "model.safetensors": b"weights", "inner/deep/b.bin": b"\x00" * 3000, "empty": b""}


def written(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def sealed(folder: Path, step: int = 1) -> Path:
    unseal(folder)
    seal(written(folder), {"run": {"tuner": "lora"}}, step)
    return folder


# --- sealing ---


def test_a_sealed_folder_is_whole_and_says_whose_it_is(tmp_path: Path) -> None:
    found = verify(sealed(tmp_path / "checkpoint-7", 7))
    assert (found.step, found.identity, found.sealed) == (7, {"run": {"tuner": "lora"}}, True)
    assert set(found.files) == set(FILES)
    assert found.size == sum(map(len, FILES.values()))
    assert {path.name for path in found.folder.iterdir()} == {"a.json", "model.safetensors", "inner", "empty", MANIFEST}


@pytest.mark.parametrize("name", sorted([*FILES, MANIFEST]))
@pytest.mark.parametrize("damage", ["deleted", "truncated", "one byte more", "bytes flipped"])
def test_any_damage_to_any_file_is_seen(name: str, damage: str, tmp_path: Path) -> None:
    folder = sealed(tmp_path / "checkpoint-1")
    path = folder / name
    content = path.read_bytes()
    damaged: list[bytes | None] = []
    match damage:
        case "deleted":
            damaged.append(None)
        case "truncated":
            damaged += [content[:-1], b""] if content else []
        case "one byte more":
            damaged.append(content + b"\n")
        case _:
            places = range(0, len(content), max(1, len(content) // 40))
            damaged += [content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :] for i in places]
    for new in damaged:
        path.unlink(missing_ok=True)
        if new is not None:
            path.write_bytes(new)
        with pytest.raises(CheckpointError, match=name):
            verify(folder)
    path.write_bytes(content)
    verify(folder)


def test_nothing_is_sealed_before_every_file_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("manifest appears"), replace(a, b)))
    folder = sealed(tmp_path / "checkpoint-1")
    appears = events.index("manifest appears")
    before, after = set(events[:appears]), events[appears + 1 :]
    assert {str(folder / name) for name in FILES} < before
    assert {str(folder), str(folder / "inner"), str(folder / "inner/deep"), str(folder / ".manifest.json.tmp")} < before
    assert after == [str(folder), str(tmp_path)]


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_disk_that_fails_while_sealing_leaves_no_manifest(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = tmp_path / "checkpoint-1"
    unseal(folder)
    written(folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, where, full)
        with pytest.raises(OSError, match="No space left"):
            seal(folder, {}, 1)
    with pytest.raises(CheckpointError, match=r"was never finished: it has no manifest\.json"):
        verify(folder)
    with pytest.raises(CheckpointError, match="never finished"):
        check(folder)  # nor does it pass for transformers' own


def test_what_an_unfinished_attempt_left_is_not_sealed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    unseal(folder)
    written(folder, {"left_over.bin": b"old"})
    sealed(folder)
    assert "left_over.bin" not in verify(folder).files
    assert not (folder / "left_over.bin").exists()


def test_a_whole_checkpoint_stays_whole_until_its_replacement_is(tmp_path: Path) -> None:
    folder = sealed(tmp_path / "checkpoint-4", 4)
    unseal(folder)
    written(folder, {"half": b"new"})
    found = newest_whole(tmp_path)
    assert found is not None
    assert (found.step, found.folder.name) == (4, "replaced-checkpoint-4")
    unseal(folder)  # interrupted again: what is whole stays, what is half goes
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["checkpoint-4", "replaced-checkpoint-4"]
    seal(written(folder, {"new": b"new"}), {}, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    assert set(verify(folder).files) == {"new"}


@pytest.mark.parametrize("kind", ["folder", "fifo", "device"])
def test_what_is_no_plain_file_cannot_be_sealed(kind: str, tmp_path: Path) -> None:
    folder = sealed(tmp_path / "checkpoint-1")
    match kind:
        case "folder":
            (folder / "link").symlink_to(tmp_path)
        case "fifo":
            os.mkfifo(folder / "link")
        case "device":
            (folder / "link").symlink_to("/dev/zero")
    for attempt in (lambda: verify(folder), lambda: seal(folder, {}, 1)):
        with pytest.raises(CheckpointError, match="link is a link to a folder, or no plain file"):
            attempt()


def test_a_linked_file_is_sealed_by_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "shared").write_bytes(b"one")
    folder = tmp_path / "checkpoint-1"
    unseal(folder)
    (written(folder) / "link").symlink_to(tmp_path / "shared")
    seal(folder, {}, 1)
    verify(folder)
    (tmp_path / "shared").write_bytes(b"two")
    with pytest.raises(CheckpointError, match=r"link was changed"):
        verify(folder)


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "adapter_model.safetensors",
        "optimizer.pt",
        "rng_state_1.pth",
        "other/adapter_model.bin",
        "optimizer_0/shard.distcp",
        "plan_state.json",
    ],
)
def test_a_planted_file_that_a_resume_would_read_is_refused(name: str, tmp_path: Path) -> None:
    folder = sealed(tmp_path / "checkpoint-1")
    written(folder, {name: b"x"})
    with pytest.raises(CheckpointError, match=f"{name} was put there after the checkpoint was finished"):
        verify(folder)


def test_a_file_that_nothing_reads_may_be_added(tmp_path: Path) -> None:
    folder = sealed(tmp_path / "checkpoint-1")
    written(folder, {"notes.txt": b"mine", "plots/loss.png": b"mine"})
    verify(folder)


# --- crafted manifests ---

GOOD = {"size": 2, "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}  # of b"{}"


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(format=2),
        lambda m: m.update(step=-1),
        lambda m: m.update(step=True),
        lambda m: m.update(step="1"),
        lambda m: m.update(identity=[]),
        lambda m: m.update(files={}),
        lambda m: m.update(files=[1]),
        lambda m: m.pop("files"),
        lambda m: m["files"].update({"../a.json": GOOD}),
        lambda m: m["files"].update({"inner/../a.json": GOOD}),
        lambda m: m["files"].update({"./a.json": GOOD}),
        lambda m: m["files"].update({"inner//a.json": GOOD}),
        lambda m: m["files"].update({"/etc/hostname": GOOD}),
        lambda m: m["files"].update({"C:a.json": GOOD}),
        lambda m: m["files"].update({"inner\\a.json": GOOD}),
        lambda m: m["files"].update({"a\n.json": GOOD}),
        lambda m: m["files"].update({"": GOOD}),
        lambda m: m["files"].update({".": GOOD}),
        lambda m: m["files"].update({"manifest.json": GOOD}),
        lambda m: m["files"].update({"a.json": {**GOOD, "size": -1}}),
        lambda m: m["files"].update({"a.json": {**GOOD, "size": 1e300}}),
        lambda m: m["files"].update({"a.json": {**GOOD, "sha256": "x"}}),
        lambda m: m["files"].update({"a.json": {**GOOD, "sha256": None}}),
        lambda m: m["files"].update({"a.json": "x"}),
        lambda m: m["files"].update({"a.json": {**GOOD, "size": 10**30}}),
    ],
)
def test_a_crafted_manifest_is_refused(change: Callable[[Any], Any], tmp_path: Path) -> None:
    folder = sealed(tmp_path / "checkpoint-1")
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    del manifest["sha256"]
    change(manifest)
    (folder / MANIFEST).write_text(peft_plus.checkpoint._manifest(manifest), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged, or no manifest of ours|a\.json has 2 bytes"):
        verify(folder)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"format": 1, "format": 1}', "[" * 100_000, "\udcff", "NaN"])
def test_a_manifest_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    folder = sealed(tmp_path / "checkpoint-1")
    (folder / MANIFEST).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        verify(folder)


def test_a_manifest_that_names_a_file_twice_is_refused(tmp_path: Path) -> None:
    folder = sealed(tmp_path / "checkpoint-1")
    text = (folder / MANIFEST).read_text(encoding="utf-8")
    (folder / MANIFEST).write_text(text.replace('"empty": {', '"a.json": {'), encoding="utf-8")
    with pytest.raises(CheckpointError, match="names something twice"):
        verify(folder)


def test_an_endless_manifest_is_not_read(tmp_path: Path) -> None:
    folder = sealed(tmp_path / "checkpoint-1")
    with open(folder / MANIFEST, "r+b") as file:
        file.truncate(10**12)  # sparse: takes no room
    with pytest.raises(CheckpointError, match="1000000000000 bytes long"):
        verify(folder)


# --- finding and rotating ---


def test_the_newest_whole_one_is_found_and_torn_ones_are_told_in_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (2, 9, 10, 11, 100):
        sealed(tmp_path / f"checkpoint-{step}", step)
    (tmp_path / "checkpoint-100" / MANIFEST).unlink()
    (tmp_path / "checkpoint-11" / "model.safetensors").unlink()
    (tmp_path / "checkpoint-2" / "a.json").unlink()  # older: nobody looks
    written(tmp_path / "checkpoint-last")
    written(tmp_path / "something")
    with caplog.at_level(logging.WARNING):
        found = newest_whole(tmp_path)
    assert found is not None
    assert found.folder == tmp_path / "checkpoint-10"
    (warning,) = caplog.messages
    assert "Going back to" in warning
    assert "checkpoint-100 was written without a manifest, and is incomplete" in warning
    assert "checkpoint-11 is damaged: model.safetensors is missing" in warning
    assert (tmp_path / "checkpoint-100").is_dir()
    assert (tmp_path / "checkpoint-11").is_dir()


def test_what_was_sealed_last_is_the_newest_whatever_its_step(tmp_path: Path) -> None:
    for step in (8, 6):  # went back to 4, and took another course
        sealed(tmp_path / f"checkpoint-{step}", step)
    shutil.copytree(tmp_path, tmp_path / "copy")  # with other times of the files
    for folder in (tmp_path, tmp_path / "copy"):
        found = newest_whole(folder)
        assert found is not None
        assert found.step == 6


def test_without_any_checkpoint_nothing_is_found(tmp_path: Path) -> None:
    assert newest_whole(tmp_path) is None
    assert newest_whole(tmp_path / "not there") is None
    written(tmp_path / "model")
    assert newest_whole(tmp_path) is None


def test_with_torn_ones_alone_the_error_names_each(tmp_path: Path) -> None:
    for step in (1, 2):
        (sealed(tmp_path / f"checkpoint-{step}", step) / "empty").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is whole") as error:
        newest_whole(tmp_path)
    assert "checkpoint-1 is damaged: empty has 1 bytes instead of 0" in str(error.value)
    assert "checkpoint-2 is damaged" in str(error.value)
    assert "start anew without resume_from_checkpoint" in str(error.value)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_rotation_deletes_unfinished_then_oldest_and_keeps_what_it_must(tmp_path: Path) -> None:
    for step in (30, 10, 20, 40):  # 30 is of an earlier course of the run
        sealed(tmp_path / f"checkpoint-{step}", step)
    unseal(tmp_path / "checkpoint-50")
    written(tmp_path / "not-a-checkpoint")
    last = tmp_path / "checkpoint-40"
    rotate(tmp_path, 4, keep=[last])
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-20", "checkpoint-30", "checkpoint-40", "not-a-checkpoint"]
    rotate(tmp_path, 3, keep=[last])
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-20", "checkpoint-40", "not-a-checkpoint"]
    rotate(tmp_path, 1, keep=[last, tmp_path / "checkpoint-10"])
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-40", "not-a-checkpoint"]
    for limit in (None, 0, -1, 5):
        rotate(tmp_path, limit, keep=[])
    assert len(names(tmp_path)) == 3


# --- transformers' own ---


def stock(folder: Path, processes: int = 1) -> Path:
    """A complete folder as transformers writes it."""
    folder.mkdir()
    save_file({"x": torch.ones(100)}, folder / "adapter_model.safetensors")
    random_states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{i}.pth" for i in range(processes)]
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", *random_states):
        torch.save({"x": torch.ones(100)}, folder / name)
    (folder / "trainer_state.json").write_text('{"global_step": 3}', encoding="utf-8")
    return folder


@pytest.mark.parametrize("processes", [1, 2])
def test_a_complete_stock_checkpoint_is_taken_with_a_warning(
    processes: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stock(tmp_path / "checkpoint-3", processes)
    with caplog.at_level(logging.WARNING):
        found = newest_whole(tmp_path, processes=processes)
    assert found is not None
    assert (found.step, found.sealed) == (3, False)
    (warning,) = caplog.messages
    assert "whether its files are intact is unknown" in warning


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_an_incomplete_stock_checkpoint_is_refused_by_name(name: str, damage: str, tmp_path: Path) -> None:
    path = stock(tmp_path / "checkpoint-3") / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=rf"incomplete: .*{name}.*is {damage}"):
        check(path.parent)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_changed_byte_in_a_stock_checkpoint_is_seen(name: str, tmp_path: Path) -> None:
    path = stock(tmp_path / "checkpoint-3") / name
    content = bytearray(path.read_bytes())
    content[content.index(torch.ones(1).numpy().tobytes() * 3)] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        check(path.parent)


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ('{"global_step": 1000000000000}', "tells the step 1000000000000, which is not that of its folder"),
        ('{"global_step": "3"}', "tells the step '3'"),
        ('{"global_step": -3}', "tells the step -3"),
        ('{"step": 3}', "is damaged"),
        ("[" * 100_000, "is damaged"),
    ],
)
def test_a_stock_state_that_cannot_be_is_refused(state: str, says: str, tmp_path: Path) -> None:
    folder = stock(tmp_path / "checkpoint-3")
    (folder / "trainer_state.json").write_text(state, encoding="utf-8")
    with pytest.raises(CheckpointError, match=says):
        check(folder)


@pytest.mark.parametrize(("wrote", "now", "lacks"), [(1, 2, "rng_state_0.pth"), (2, 1, "rng_state.pth"), (2, 3, "_2")])
def test_a_stock_checkpoint_of_other_processes_is_refused(wrote: int, now: int, lacks: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{lacks}.* is missing.*another number of processes than the {now}"):
        check(stock(tmp_path / "checkpoint-3", wrote), processes=now)


def test_stock_weights_may_be_shards_or_adapters_in_folders(tmp_path: Path) -> None:
    folder = stock(tmp_path / "checkpoint-3")
    (folder / "extra").mkdir()
    shutil.move(folder / "adapter_model.safetensors", folder / "extra/adapter_model.safetensors")
    check(folder)
    shutil.move(folder / "extra/adapter_model.safetensors", folder / "model-1-of-2.safetensors")
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"model-2-of-2\.safetensors is missing"):
        check(folder)
    shutil.copy(folder / "model-1-of-2.safetensors", folder / "model-2-of-2.safetensors")
    check(folder)
    (folder / "model.safetensors.index.json").write_text("[]", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        check(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin"])
def test_pickled_stock_weights_are_refused(name: str, tmp_path: Path) -> None:
    folder = stock(tmp_path / "checkpoint-3")
    torch.save({}, folder / name)
    with pytest.raises(CheckpointError, match="only safetensors"):
        check(folder)


def test_an_engines_own_layout_asks_for_the_trainers_state_only(tmp_path: Path) -> None:
    folder = stock(tmp_path / "checkpoint-3")
    (folder / "optimizer.pt").unlink()
    check(folder, own_layout=True)
    (folder / "trainer_state.json").unlink()
    with pytest.raises(CheckpointError, match=r"trainer_state\.json is missing"):
        check(folder, own_layout=True)


# --- is it the same run? ---


def described(method: Any = ("lora", "llrd"), base: Any = None, examples: int = 8, **arguments: Any) -> dict[str, Any]:
    model = get_model(base or tiny("bert"), list(method))
    settings = training_settings(quiet("unused", **arguments))
    made = identity(model, model.peft_plus, None, settings=settings, processes=1, device="cpu", examples=examples)
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    return made


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"method": ("lora",)}, r"plugins: \['llrd'\] → \[\]"),
        ({"method": ("lora", "llrd", "r3f")}, r"plugins: \['llrd'\] → \['llrd', 'r3f'\]"),
        ({"method": ("dora", "llrd")}, r"adapters\.default\.use_dora: False → True"),
        ({"method": (LoraConfig(r=4, task_type="SEQ_CLS"), "llrd")}, r"adapters\.default\.r: 8 → 4"),
        ({"method": ("full", "llrd")}, "tuner: 'lora' → 'full'"),
        ({"base": "seed"}, r"base\.fingerprint: '[0-9a-f]+' → '[0-9a-f]+'"),
        ({"base": "roberta"}, r"base\.class: 'BertForSequenceClassification' → 'Roberta"),
        ({"base": "labels"}, r"task\.num_labels: 3 → 5"),
    ],
)
def test_another_run_is_refused_and_each_difference_named(other: dict[str, Any], named: str) -> None:
    bases = {"seed": ("bert", {"seed": 1}), "roberta": ("roberta", {}), "labels": ("bert", {"num_labels": 5})}
    if "base" in other:
        name, settings = bases[other["base"]]
        other = {"base": tiny(name, **settings)}
    with pytest.raises(CheckpointError, match=named) as error:
        compare(described(), described(**other), "out/checkpoint-3")
    assert "out/checkpoint-3 belongs to another run; nothing was loaded" in str(error.value)


def test_another_plugin_setting_is_refused() -> None:
    from peft_plus_stability.llrd import LLRD

    with pytest.raises(CheckpointError, match=r"plugin\.llrd\.decay: 0\.9\d* → 0\.5"):
        compare(described(), described(method=("lora", LLRD(decay=0.5))), "c")


def test_the_order_of_plugins_belongs_to_the_run() -> None:
    with pytest.raises(CheckpointError, match=r"plugins: \['llrd', 'r3f'\] → \['r3f', 'llrd'\]"):
        compare(described(method=("lora", "llrd", "r3f")), described(method=("lora", "r3f", "llrd")), "c")


def warnings_of(old: dict[str, Any], new: dict[str, Any], caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        compare(old, new, "c")
    return caplog.messages


def test_changes_of_course_are_told_in_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    changes = {"learning_rate": 1e-3, "seed": 7, "per_device_train_batch_size": 4, "optim": "sgd", "examples": 9}
    changes |= {"lr_scheduler_type": "cosine", "gradient_accumulation_steps": 2, "eval_strategy": "epoch"}
    (warning,) = warnings_of(described(), described(**changes), caplog)
    for line in (
        "learning_rate: 5e-05 → 0.001",
        "seed: 42 → 7",
        "training examples: 8 → 9",
        "optim: ",
        "eval_strategy",
    ):
        assert f"\n  {line}" in warning
    assert "lr_scheduler_type: 'linear' → 'cosine'" in warning
    assert "learning_rate: 5e-05 → 0.001 (no effect" in warning
    assert "seed: 42 → 7\n" in warning
    assert "the run will not end as it would have without the interruption" in warning


def test_other_versions_are_told(caplog: pytest.LogCaptureFixture) -> None:
    old, new = described(), described()
    old["versions"]["torch"] = "1.0"
    old["versions"]["peft-plus-stability"] = "0.0.1"
    old["versions"]["gone"] = "3"
    (warning,) = warnings_of(old, new, caplog)
    assert f"torch: '1.0' → '{torch.__version__}'" in warning
    assert "peft-plus-stability: '0.0.1' → " in warning
    assert "gone" not in warning


def test_what_touches_no_weight_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    quiet_changes = {"logging_steps": 3, "save_steps": 9, "save_total_limit": 1, "run_name": "x", "disable_tqdm": False}
    assert warnings_of(described(), described(**quiet_changes), caplog) == []


@pytest.mark.parametrize(("schedule", "told"), [("constant", 0), ("linear", 1), ("cosine", 1)])
def test_training_on_for_longer_is_told_only_where_the_rates_depend_on_it(
    schedule: str, told: int, caplog: pytest.LogCaptureFixture
) -> None:
    old = described(max_steps=5, lr_scheduler_type=schedule)
    assert len(warnings_of(old, described(max_steps=9, lr_scheduler_type=schedule), caplog)) == told
    assert len(warnings_of(old, described(max_steps=3, lr_scheduler_type=schedule), caplog)) == 1


def test_peft_adding_head_names_again_is_no_difference(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old, model = described(), get_model(tiny("bert"), ["lora", "llrd"])
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    settings = training_settings(quiet("unused"))
    new = identity(model, model.peft_plus, None, settings=settings, processes=1, device="cpu", examples=8)
    assert warnings_of(old, new, caplog) == []


def test_a_model_without_a_plan_has_an_identity_too() -> None:
    made = identity(tiny("bert"), None, None, settings={"f": print, "n": float("nan")}, processes=1, device="cpu")
    assert made["run"] == {"model": "BertForSequenceClassification", "adapters": {}}
    assert made["course"]["f"] == "print"
    assert json.loads(json.dumps(made, allow_nan=False)) == made


# --- random generators ---


def draws() -> list[Any]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(2).tolist()]


def test_all_random_generators_go_on_where_they_were() -> None:
    random.gauss(0, 1)  # leaves a second number waiting, as numpy's does
    np.random.randn()
    state = rng_state()
    first = draws()
    draws()
    set_rng_state(state)
    assert draws() == first


class Device:
    """A stand-in for `torch.cuda` or a vendor's module."""

    __name__ = "torch.fake"

    def __init__(self, count: int) -> None:
        self.states = [torch.tensor([i], dtype=torch.uint8) for i in range(count)]

    def device_count(self) -> int:
        return len(self.states)

    def get_rng_state_all(self) -> list[torch.Tensor]:
        return list(self.states)

    def set_rng_state_all(self, states: list[torch.Tensor]) -> None:
        for i, state in enumerate(states):
            self.states[i] = state


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    def use(module: Any) -> Any:
        monkeypatch.setattr(peft_plus.random_state, "_accelerator", lambda: module and ("fake", module))
        return module

    return use


def test_accelerators_go_on_too(accelerator: Callable[[Any], Any], caplog: pytest.LogCaptureFixture) -> None:
    device = accelerator(Device(3))
    state = rng_state()
    device.states = [torch.tensor([9], dtype=torch.uint8)] * 3
    set_rng_state(state)
    assert [int(s) for s in device.states] == [0, 1, 2]
    assert caplog.messages == []


def test_a_vendor_whose_functions_are_elsewhere_goes_on(accelerator: Callable[[Any], Any]) -> None:
    held = [torch.tensor([5], dtype=torch.uint8)]
    inner = SimpleNamespace(get_rng_state=lambda: held[0], set_rng_state=lambda s: held.__setitem__(0, s))
    accelerator(SimpleNamespace(random=inner, __name__="torch.fake"))
    state = rng_state()
    held[0] = torch.tensor([6], dtype=torch.uint8)
    set_rng_state(state)
    assert int(held[0]) == 5


@pytest.mark.parametrize(
    ("now", "said"), [(1, "3 fake, this process has 1 fake"), (0, "3 fake, this process has a CPU")]
)
def test_other_accelerators_are_told(
    now: int, said: str, accelerator: Callable[[Any], Any], caplog: pytest.LogCaptureFixture
) -> None:
    accelerator(Device(3))
    state = rng_state()
    device = accelerator(Device(now) if now else None)
    with caplog.at_level(logging.WARNING):
        set_rng_state(state)
    (warning,) = caplog.messages
    assert said in warning
    assert [int(s) for s in device.states] == [0] if now else device is None


def test_an_accelerator_that_tells_nothing_is_an_error(accelerator: Callable[[Any], Any]) -> None:
    accelerator(SimpleNamespace(__name__="torch.fake"))
    with pytest.raises(CheckpointError, match=r"torch\.fake cannot tell its random state"):
        rng_state()
