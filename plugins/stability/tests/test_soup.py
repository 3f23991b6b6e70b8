"""Soups against PEFT: each adapter merged by `merge_and_unload`, the merged weights averaged by hand."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from peft_plus import MethodError, attach, from_pretrained, get_model
from peft_plus.adapter_folder import WEIGHTS
from peft_plus_stability.soup import greedy_soup, uniform_soup
from tests.consistency import trainer_of
from tests.models import batch, rows_of, tiny

DENSE = ["query", "value", "output.dense"]
VALIDATION = batch("bert", rows=32, seed=9)


def stirred(model: Any, seed: int, size: float = 0.2) -> Any:
    """All that trains gets other values, as training would give it."""
    draw = torch.Generator().manual_seed(seed)
    for tensor in model.parameters():
        if tensor.requires_grad:
            tensor.data = tensor.data + size * torch.randn(tensor.shape, generator=draw)
    return model


def saved(folder: Path, seed: int, config: Any = None, name: str = "bert", **more: Any) -> Path:
    """A finished run: its folder.

    Args:
        config: of the tuner; None for a plain LoRA.
        more: of the base.
    """
    config = config if config is not None else LoraConfig(r=4, target_modules=DENSE)
    stirred(get_model(tiny(name, **more), config), seed).save_pretrained(folder)
    return folder


def merged(folder: Path, name: str = "bert") -> dict[str, Tensor]:
    model: Any = PeftModel.from_pretrained(tiny(name), str(folder))
    return {key: value.double() for key, value in model.merge_and_unload().state_dict().items()}


def mean_of_merged(folders: list[Path], name: str = "bert") -> dict[str, Tensor]:
    states = [merged(folder, name) for folder in folders]
    return {key: torch.stack([state[key] for state in states]).mean(0) for key in states[0]}


def check_merged(folder: Path, wanted: dict[str, Tensor], name: str = "bert", atol: float = 2e-6) -> None:
    got = merged(folder, name)
    assert got.keys() == wanted.keys()
    for key, value in got.items():
        torch.testing.assert_close(value, wanted[key], rtol=0, atol=atol, msg=lambda told, key=key: f"{key}: {told}")


def logits(model: nn.Module, name: str = "bert") -> Tensor:
    with torch.no_grad():
        return model.eval()(**batch(name)).logits


# ---- the uniform soup ----------------------------------------------------------------------------------------------


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": DENSE, **settings})


MIXED: dict[str, tuple[str, list[Callable[[], Any]]]] = {
    "equal ranks": ("bert", [lora, lora, lora]),
    "ranks, alphas and rsLoRA": (
        "bert",
        [lambda: lora(r=2), lambda: lora(r=8, lora_alpha=3), lambda: lora(use_rslora=True, lora_alpha=5)],
    ),
    "patterns": (
        "bert",
        [
            lora,
            lambda: lora(
                rank_pattern={r".*\.0\..*query": 2, "value": 6}, alpha_pattern={r".*\.[01]\..*query": 3, "value": 7}
            ),
        ],
    ),
    "more ranks than the weight has": ("bert", [lambda: lora(r=30), lambda: lora(r=20)]),
    "other starts": ("bert", [lambda: lora(init_lora_weights="gaussian"), lambda: lora(lora_dropout=0.3)]),
    "a bias beside B": ("bert", [lambda: lora(lora_bias=True, r=2), lambda: lora(lora_bias=True, lora_alpha=3)]),
    "the base's biases": ("bert", [lambda: lora(bias="all"), lambda: lora(bias="all", r=2)]),
    "the adapter's biases": ("bert", [lambda: lora(bias="lora_only"), lambda: lora(bias="lora_only", r=2)]),
    "embeddings": (
        "bert",
        [
            lambda: lora(target_modules=["word_embeddings", "query"]),
            lambda: lora(target_modules=["word_embeddings", "query"], r=3),
        ],
    ),
    "a module saved whole": (
        "bert",
        [lambda: lora(modules_to_save=["pooler"]), lambda: lora(modules_to_save=["pooler"], r=2)],
    ),
    "transposed weights": (
        "gpt2",
        [partial(LoraConfig, target_modules=["c_attn"], fan_in_fan_out=True, r=r) for r in (2, 3)],
    ),
    "convolutions": ("resnet", [partial(LoraConfig, target_modules=["convolution"], r=r) for r in (2, 3)]),
    "IA3": (
        "bert",
        [lambda: IA3Config(target_modules=["query", "output.dense"], feedforward_modules=["output.dense"])] * 3,
    ),
    "norms": ("bert", [lambda: LNTuningConfig(target_modules=["LayerNorm"])] * 2),
    "the head alone": ("bert", [lambda: "linear_probe"] * 2),
}


@pytest.mark.filterwarnings("ignore:.*invalid shape.*lora_B.bias")  # PEFT's, of any bias beside B
@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # PEFT's, of any LayerNorm
@pytest.mark.parametrize("case", MIXED)
def test_merged_it_is_the_mean_of_the_merged_runs(case: str, tmp_path: Path) -> None:
    name, configs = MIXED[case]
    runs = [saved(tmp_path / f"run-{n}", n, make(), name) for n, make in enumerate(configs)]
    soup = uniform_soup(runs, tmp_path / "soup")
    check_merged(soup.folder, mean_of_merged(runs, name), name)
    assert soup.relative_error < 1e-7
    assert soup.ingredients == tuple(runs)
    again = from_pretrained(tiny(name), soup.folder)
    plain = PeftModel.from_pretrained(tiny(name), str(soup.folder))
    assert torch.equal(logits(again, name), logits(plain, name))


def test_it_goes_on_training_and_names_no_plugin(tmp_path: Path) -> None:
    runs = []
    for n in range(2):
        model = get_model(tiny("bert"), [lora(), "llrd"])
        stirred(model, n).save_pretrained(tmp_path / f"run-{n}")
        runs.append(tmp_path / f"run-{n}")
    soup = uniform_soup(runs, tmp_path / "soup")
    model = from_pretrained(tiny("bert"), soup.folder, is_trainable=True)
    assert model.peft_plus.plugins == ()
    assert any("lora_A" in name for name in model.peft_plus.params)


def test_averaging_the_factors_would_be_another_model(tmp_path: Path) -> None:
    runs = [saved(tmp_path / f"run-{n}", n) for n in range(3)]
    wanted = mean_of_merged(runs)
    wrong = tmp_path / "wrong"
    shutil.copytree(runs[0], wrong)
    files = [load_file(run / WEIGHTS) for run in runs]
    save_file({key: sum(file[key] for file in files) / 3 for key in files[0]}, wrong / WEIGHTS, {"format": "pt"})
    got = merged(wrong)
    assert max(float((got[key] - wanted[key]).abs().max()) for key in got) > 0.05
    check_merged(uniform_soup(runs, tmp_path / "soup").folder, wanted)


@pytest.mark.parametrize("rank", [None, 4, 9])
@pytest.mark.parametrize("copies", [1, 2, 5])
def test_copies_of_one_run_give_that_run(copies: int, rank: int | None, tmp_path: Path) -> None:
    run = saved(tmp_path / "run", 0, lora(r=4, lora_alpha=7))
    soup = uniform_soup([run] * copies, tmp_path / "soup", rank=rank)
    models = [PeftModel.from_pretrained(tiny("bert"), str(folder)) for folder in (run, soup.folder)]
    assert float((logits(models[0]) - logits(models[1])).abs().max()) < 1e-5
    assert soup.rank == min(rank or 4 * copies, 4 * copies)
    assert soup.relative_error < 1e-6


def test_a_lower_rank_is_the_best_there_is_and_says_what_it_loses(tmp_path: Path) -> None:
    runs = [saved(tmp_path / f"run-{n}", n) for n in range(3)]
    base, wanted = {k: v.double() for k, v in tiny("bert").state_dict().items()}, mean_of_merged(runs)
    soup = uniform_soup(runs, tmp_path / "soup", rank=5)
    lost = whole = 0.0
    for key in base:
        change = wanted[key] - base[key]
        if key.endswith("weight") and any(part in key for part in DENSE):
            u, values, v = torch.linalg.svd(change, full_matrices=False)
            wanted[key] = base[key] + u[:, :5] * values[:5] @ v[:5]
            lost, whole = lost + float(values[5:].square().sum()), whole + float(values.square().sum())
    check_merged(soup.folder, wanted)
    assert soup.rank == 5
    assert soup.relative_error == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    assert soup.relative_error > 0.1


def test_its_folder_says_what_it_was_made_of(tmp_path: Path) -> None:
    runs = [saved(tmp_path / f"run-{n}", n) for n in range(2)]
    soup = uniform_soup(runs, tmp_path / "deep" / "soup", rank=3)
    told = json.loads((soup.folder / "soup.json").read_text())
    assert told["ingredients"] == [str(run) for run in runs]
    assert told["rank"] == 3
    assert told["relative_error"] == soup.relative_error
    assert sorted(path.name for path in soup.folder.parent.iterdir()) == ["soup"]


def test_thawed_base_weights_are_averaged_too(tmp_path: Path) -> None:
    runs = []
    for n in range(2):
        model = get_peft_model(tiny("bert"), lora(task_type="SEQ_CLS"))
        model.get_parameter("base_model.model.bert.embeddings.LayerNorm.weight").requires_grad_(True)
        stirred(attach(model, []), n).save_pretrained(tmp_path / f"run-{n}")
        runs.append(tmp_path / f"run-{n}")
    soup = uniform_soup(runs, tmp_path / "soup")
    states = [from_pretrained(tiny("bert"), folder).merge_and_unload().state_dict() for folder in [*runs, soup.folder]]
    for key, value in states[2].items():
        torch.testing.assert_close(value, (states[0][key] + states[1][key]) / 2, rtol=0, atol=2e-6)
    thawed = "bert.embeddings.LayerNorm.weight"
    assert not torch.equal(states[2][thawed], tiny("bert").state_dict()[thawed])


def test_runs_of_plain_peft_need_no_record(tmp_path: Path) -> None:
    runs = [tmp_path / f"run-{n}" for n in range(2)]
    for n, run in enumerate(runs):
        stirred(get_peft_model(tiny("bert"), lora(task_type="SEQ_CLS")), n).save_pretrained(run)
    soup = uniform_soup(runs, tmp_path / "soup")
    check_merged(soup.folder, mean_of_merged(runs))
    assert not (soup.folder / "peft_plus.json").exists()


# ---- whole models --------------------------------------------------------------------------------------------------


def whole(folder: Path, seed: int, **more: Any) -> Path:
    stirred(get_model(tiny("bert"), "full"), seed).save_pretrained(folder, **more)
    return folder


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "40KB"}])
def test_whole_models_are_averaged_weight_by_weight(shards: dict[str, Any], tmp_path: Path) -> None:
    runs = [whole(tmp_path / f"run-{n}", n, **shards) for n in range(3)]
    assert (len(list(runs[0].glob("*.safetensors"))) > 1) == bool(shards)
    soup = uniform_soup(runs, tmp_path / "soup")
    states = [
        AutoModelForSequenceClassification.from_pretrained(folder).state_dict() for folder in [*runs, soup.folder]
    ]
    for key, value in states[3].items():
        wanted = torch.stack([state[key].double() for state in states[:3]]).mean(0)
        torch.testing.assert_close(value.double(), wanted, rtol=0, atol=1e-7)
    assert soup.rank is None
    assert get_model(soup.folder, "full", task="SEQ_CLS", num_labels=3).peft_plus.tuner == "full"


def test_copies_of_a_whole_model_are_the_model_bit_for_bit(tmp_path: Path) -> None:
    run = whole(tmp_path / "run", 0)
    uniform_soup([run] * 3, tmp_path / "soup")
    one, other = (load_file(folder / "model.safetensors") for folder in (run, tmp_path / "soup"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_shards_cut_elsewhere_are_found(tmp_path: Path) -> None:
    runs = [whole(tmp_path / "a", 0), whole(tmp_path / "b", 1, max_shard_size="40KB")]
    uniform_soup(runs, tmp_path / "soup")
    states = [AutoModelForSequenceClassification.from_pretrained(f).state_dict() for f in [*runs, tmp_path / "soup"]]
    assert all(torch.allclose(states[2][k], (states[0][k] + states[1][k]) / 2, atol=1e-7) for k in states[0])


@pytest.mark.usefixtures("one_accelerator_at_a_time")
@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_checkpoints_of_a_trainer_are_runs_too(tuner: str, tmp_path: Path) -> None:
    """Their folders hold more than a model, and nothing of that may come along."""
    model, rows = get_model(tiny("bert"), tuner), rows_of(batch("bert", rows=8))
    trainer_of(model, rows, tmp_path / "out", max_steps=3, save_strategy="steps", save_steps=1).train()
    runs = [tmp_path / "out" / f"checkpoint-{step}" for step in (1, 2, 3)]
    soup = uniform_soup(runs, tmp_path / "soup")
    if tuner == "lora":
        check_merged(soup.folder, mean_of_merged(runs))
        return
    files = [load_file(folder / "model.safetensors") for folder in [*runs, soup.folder]]
    assert all(torch.allclose(sum(f[k] for f in files[:3]) / 3, files[3][k], atol=1e-7) for k in files[3])
    assert {path.name for path in soup.folder.iterdir()} == {
        "config.json", "model.safetensors", "peft_plus.json", "soup.json"
    }  # fmt: skip


# ---- the greedy soup -----------------------------------------------------------------------------------------------


def loss_of(folder: Path) -> float:
    model = from_pretrained(tiny("bert"), folder)
    with torch.no_grad():
        return float(model.eval()(**VALIDATION).loss)


def around_a_good_model(folder: Path) -> list[Path]:
    """Runs that lie about a model of low validation loss, one of them far off: the mean of the others is nearer."""
    model = get_model(tiny("bert"), lora())
    torch.manual_seed(0)
    optimizer = torch.optim.Adam([tensor for tensor in model.parameters() if tensor.requires_grad], lr=2e-2)
    for _ in range(30):
        model(**VALIDATION).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    good, runs = copy.deepcopy(model.state_dict()), []
    for n, size in enumerate((0.2, 1.0, 0.2, 0.2)):
        model.load_state_dict(good)
        stirred(model, n, size).save_pretrained(folder / f"run-{n}")
        runs.append(folder / f"run-{n}")
    return runs


@pytest.mark.parametrize("rank", [None, 2])
def test_it_is_never_worse_than_the_best_run(rank: int | None, tmp_path: Path) -> None:
    runs = around_a_good_model(tmp_path)
    soup = greedy_soup(runs, tmp_path / "soup", loss_of, greater_is_better=False, rank=rank)
    alone = [loss_of(run) for run in runs]
    assert soup.score == pytest.approx(loss_of(soup.folder), abs=1e-9)
    assert soup.score <= min(alone)
    assert soup.scores == tuple(zip(runs, alone, strict=True))
    assert soup.ingredients[0] == runs[alone.index(min(alone))]


def test_it_is_what_adding_one_after_the_other_by_hand_gives(tmp_path: Path) -> None:
    """Recipe 1 of the paper, over merged weights in plain torch."""
    runs = around_a_good_model(tmp_path)
    states = [merged(run) for run in runs]
    model = tiny("bert")

    def loss(chosen: list[int]) -> float:
        model.load_state_dict({key: torch.stack([states[n][key] for n in chosen]).mean(0) for key in states[0]})
        with torch.no_grad():
            return float(model(**VALIDATION).loss)

    order = sorted(range(4), key=lambda n: loss([n]))
    kept = [order[0]]
    for n in order[1:]:
        if loss([*kept, n]) <= loss(kept):
            kept.append(n)
    assert 1 < len(kept) < 4
    soup = greedy_soup(runs, tmp_path / "soup", loss_of, greater_is_better=False)
    assert soup.ingredients == tuple(runs[n] for n in kept)
    check_merged(soup.folder, {key: torch.stack([states[n][key] for n in kept]).mean(0) for key in states[0]})


def scripted(*scores: float) -> tuple[Callable[[Path], float], list[Path]]:
    script, asked = iter(scores), []

    def evaluate(folder: Path) -> float:
        asked.append(folder)
        assert (folder / WEIGHTS).is_file()
        return next(script)

    return evaluate, asked


def test_from_the_best_to_the_worst_and_what_does_no_harm_stays(tmp_path: Path) -> None:
    runs = [saved(tmp_path / f"run-{n}", n) for n in range(4)]
    evaluate, asked = scripted(0.6, 0.8, float("nan"), 0.7, 0.8, 0.79)  # with 3 as good, with 0 worse
    soup = greedy_soup(runs, tmp_path / "soup", evaluate)
    assert soup.ingredients == (runs[1], runs[3])
    assert soup.score == 0.8
    assert asked[:4] == runs
    assert len(asked) == 6
    check_merged(soup.folder, mean_of_merged([runs[1], runs[3]]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run-0", "run-1", "run-2", "run-3", "soup"]
    told = json.loads((soup.folder / "soup.json").read_text())
    assert told["ingredients"] == [str(runs[1]), str(runs[3])]
    assert told["score"] == 0.8


@pytest.mark.parametrize("made", [saved, whole])
def test_where_nothing_helps_it_is_a_copy_of_the_best(made: Any, tmp_path: Path) -> None:
    runs = [made(tmp_path / f"run-{n}", n) for n in range(3)]
    soup = greedy_soup(runs, tmp_path / "soup", lambda f: {"run-0": 1.0, "run-1": 3.0, "run-2": 2.0}.get(f.name, 0.0))
    assert soup.ingredients == (runs[1],)
    for file in soup.folder.iterdir():
        assert file.name == "soup.json" or file.read_bytes() == (runs[1] / file.name).read_bytes()
    assert soup.rank == (4 if made is saved else None)


def test_an_evaluation_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    runs = [saved(tmp_path / f"run-{n}", n) for n in range(2)]
    evaluate, _ = scripted(1.0, 2.0)
    with pytest.raises(RuntimeError):  # StopIteration of the script
        greedy_soup(runs, tmp_path / "soup", lambda folder: _raise(evaluate, folder))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run-0", "run-1"]


def _raise(evaluate: Callable[[Path], float], folder: Path) -> float:
    try:
        return evaluate(folder)
    except StopIteration:
        raise RuntimeError("out of memory") from None


@pytest.mark.parametrize("answer", [{"eval_accuracy": 0.5}, None, "0.5", True])
def test_an_evaluation_must_give_a_number(answer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluate gave .*run.*give a number"):
        greedy_soup([saved(tmp_path / "run", 0)], tmp_path / "soup", lambda _: answer)


def test_runs_that_all_failed_are_no_soup(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="NaN for every folder"):
        greedy_soup([saved(tmp_path / "run", 0)], tmp_path / "soup", lambda _: float("nan"))


# ---- refusals ------------------------------------------------------------------------------------------------------


def other_values(folder: Path) -> Path:
    """The run of another base of the same shape."""
    stirred(get_model(tiny("bert", seed=1), lora()), 0).save_pretrained(folder)
    return folder


def with_labels(folder: Path, *names: str) -> Path:
    run = saved(folder, 0)
    record = json.loads((run / "peft_plus.json").read_text())
    record["task"]["labels"] = list(names)
    (run / "peft_plus.json").write_text(json.dumps(record))
    return run


PAIRS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Path], str]] = {
    "bases": (lambda f: saved(f, 0), other_values, "different bases"),
    "modules": (
        lambda f: saved(f, 0),
        lambda f: saved(f, 0, lora(target_modules=["query"])),
        "is in .*a'.* not in .*b'",
    ),
    "shapes": (lambda f: saved(f, 0), lambda f: saved(f, 0, num_labels=2), r"classifier.*\(3,\).*\(2,\)"),
    "labels": (
        lambda f: with_labels(f, "a", "b", "c"),
        lambda f: with_labels(f, "c", "b", "a"),
        "labels of their tasks",
    ),
    "kinds": (lambda f: saved(f, 0), lambda f: whole(f, 0), "one is an adapter, the other a whole model"),
    "tuners": (
        lambda f: saved(f, 0),
        lambda f: saved(f, 0, IA3Config(target_modules=DENSE, feedforward_modules=[])),
        "'LORA' and 'IA3'",
    ),
    "biases": (lambda f: saved(f, 0), lambda f: saved(f, 0, lora(bias="all")), "bias is 'none' and 'all'"),
}


@pytest.mark.parametrize("case", PAIRS)
@pytest.mark.parametrize("greedy", [False, True])
def test_runs_that_do_not_fit_together_are_named(case: str, greedy: bool, tmp_path: Path) -> None:
    one, other, told = PAIRS[case]
    runs = [one(tmp_path / "a"), other(tmp_path / "b")]
    mix = partial(greedy_soup, evaluate=lambda _: 1.0) if greedy else uniform_soup
    with pytest.raises(MethodError, match=rf"a' and '.*b' cannot be averaged: .*{told}"):
        mix(runs, tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


ALONE: dict[str, tuple[Callable[[], Any], str]] = {
    "DoRA": (lambda: lora(use_dora=True), "use_dora=True.*Merge it"),
    "PiSSA": (lambda: lora(init_lora_weights="pissa"), "init_lora_weights='pissa'.*Merge it"),
    "VeRA": (lambda: VeraConfig(target_modules=["query"], r=4), "holds a 'VERA' adapter.*LORA, IA3, LN_TUNING"),
}


@pytest.mark.parametrize("case", ALONE)
def test_changes_that_have_no_mean_are_refused(case: str, tmp_path: Path) -> None:
    make, told = ALONE[case]
    with pytest.raises(MethodError, match=told):
        uniform_soup([saved(tmp_path / "run", 0, make())], tmp_path / "soup")


def test_a_run_that_diverged_is_named(tmp_path: Path) -> None:
    runs = [saved(tmp_path / f"run-{n}", n) for n in range(2)]
    file = load_file(runs[1] / WEIGHTS)
    next(iter(file.values())).fill_(float("nan"))
    save_file(file, runs[1] / WEIGHTS, {"format": "pt"})
    with pytest.raises(MethodError, match=r"run-1.*holds NaN or infinity"):
        uniform_soup(runs, tmp_path / "soup")


def test_factors_that_are_no_product_are_refused(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", 0)
    file = load_file(run / WEIGHTS)
    name = next(key for key in file if "lora_B" in key)
    file[name] = file[name][:, :2].contiguous()
    save_file(file, run / WEIGHTS, {"format": "pt"})
    with pytest.raises(MethodError, match="are not two matrices to multiply"):
        uniform_soup([run], tmp_path / "soup")


def test_a_strange_tensor_is_refused(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", 0)
    file = load_file(run / WEIGHTS)
    save_file({**file, "base_model.model.bert.lora_C.weight": torch.zeros(2)}, run / WEIGHTS, {"format": "pt"})
    with pytest.raises(MethodError, match=r"lora_C.*neither A nor B"):
        uniform_soup([run], tmp_path / "soup")


@pytest.mark.parametrize("rank", [0, -1, 1.5, True, "4"])
def test_a_rank_that_is_none_is_refused(rank: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rank=.*whole number ≥ 1"):
        uniform_soup([saved(tmp_path / "run", 0)], tmp_path / "soup", rank=rank)


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    run, full = saved(tmp_path / "run", 0), whole(tmp_path / "full", 0)
    with pytest.raises(MethodError, match=r"rank=3 has no effect: .*full"):
        uniform_soup([full], tmp_path / "soup", rank=3)
    with pytest.raises(ValueError, match=r"out=.*run.* exists already"):
        uniform_soup([run], run)
    with pytest.raises(MethodError, match="nowhere' does not exist"):
        uniform_soup([run, tmp_path / "nowhere"], tmp_path / "soup")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MethodError, match=r"neither an adapter .* nor a model"):
        uniform_soup([tmp_path / "empty"], tmp_path / "soup")
    for none in ([], str(run), run):
        with pytest.raises(ValueError, match="give a list of one folder or more"):
            uniform_soup(none, tmp_path / "soup")
    (full / "model.safetensors").unlink()
    with pytest.raises(MethodError, match=r"full' holds no 'model.safetensors'"):
        uniform_soup([full], tmp_path / "soup")
    assert uniform_soup([run], tmp_path / "empty").folder == tmp_path / "empty"
