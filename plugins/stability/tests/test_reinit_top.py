"""The top against transformers' own initialisation, and what lies below against what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import set_seed

from peft_plus import MethodError, PluginError, attach, get_model
from tests.bad_inputs import trainer, weights
from tests.models import batch, rows_of, tiny

MODELS = {
    "bert": (["bert.encoder.layer."], ["bert.pooler."]),
    "roberta": (["roberta.encoder.layer."], []),
    "distilbert": (["distilbert.transformer.layer."], []),
    "gpt2": (["transformer.h."], ["transformer.ln_f."]),
    "llama": (["model.layers."], ["model.norm."]),
    "t5": (["encoder.block.", "decoder.block."], ["decoder.final_layer_norm."]),
    "vit": (["vit.layers."], ["vit.layernorm."]),
}
"""Model → how the names of its blocks begin, and those of what lies between them and the head."""

TASK = {"t5": "SEQ_2_SEQ_LM"}


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def changed(model: nn.Module) -> nn.Module:
    """Every weight other than an initialisation leaves it, and marked as transformers marks what it loads."""
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.5 + torch.rand(parameter.shape, generator=draw)
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    for module in model.modules():
        module._is_hf_initialized = True  # type: ignore[assignment]
    return model


def tops(name: str, blocks: int, pooler: bool) -> tuple[str, ...]:
    """How the names begin of what is to be drawn."""
    stacks, above = MODELS[name]
    return (*(f"{s}{3 - i}." for i in range(1, blocks + 1) for s in stacks), *(above if pooler else ()))


def by_transformers(name: str, drawn: tuple[str, ...]) -> nn.Module:
    """The same by transformers' own traversal, which draws whatever is not marked."""
    model: Any = changed(tiny(name, TASK.get(name)))
    for full, module in model.named_modules():
        if f"{full}.".startswith(drawn):
            module._is_hf_initialized = False
            for parameter in module.parameters():
                parameter._is_hf_initialized = False
    set_seed(7)
    model.initialize_weights()
    return model


CASES = [(name, *case) for name in MODELS for case in ((1, True), (2, False), (3, True), (0, True))]


@pytest.mark.parametrize(("name", "blocks", "pooler"), [c for c in CASES if c[1] or MODELS[c[0]][1]])
def test_the_top_is_as_transformers_draws_it_and_the_rest_as_it_was(name: str, blocks: int, pooler: bool) -> None:
    base, drawn = changed(tiny(name, TASK.get(name))), tops(name, blocks, pooler)
    before = weights(base)
    wanted = weights(by_transformers(name, drawn))
    set_seed(7)
    model = get_model(base, {"full": {}, "reinit_top": {"blocks": blocks, "pooler": pooler}})
    moved = set()
    for key, tensor in model.named_parameters():
        assert torch.equal(tensor, wanted[key]), key
        if not torch.equal(tensor, before[key]):
            moved.add(key)
    assert moved == {key for key in before if key.startswith(drawn)}


def test_bert_s_matrices_are_normal_its_biases_zero_and_its_norms_one() -> None:
    model = get_model(changed(tiny("bert", hidden_size=128, intermediate_size=512)), {"reinit_top": {"blocks": 2}})
    for key, tensor in weights(model).items():
        if key.startswith(tops("bert", 2, pooler=True)):
            if "LayerNorm.weight" in key:
                assert torch.equal(tensor, torch.ones_like(tensor))
            elif key.endswith("bias"):
                assert not tensor.any()
            else:
                assert float(tensor.std()) == pytest.approx(0.02, rel=0.05)
                assert float(tensor.mean()) == pytest.approx(0, abs=5e-4)


def test_gpt2_s_residual_matrices_are_smaller() -> None:
    """Its attention and its MLP draw them again, smaller by √(2 · layers)."""
    model: Any = get_model(changed(tiny("gpt2", n_embd=128)), "reinit_top")
    block = model.transformer.h[2]
    for matrix in (block.attn.c_proj.weight, block.mlp.c_proj.weight):
        assert float(matrix.detach().std()) == pytest.approx(0.02 / 6**0.5, rel=0.05)
    assert float(block.mlp.c_fc.weight.detach().std()) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("how", ["loaded", "folder", "attached"])
def test_whichever_way_the_model_is_built_one_seed_gives_the_same(how: str, tmp_path: Path) -> None:
    changed(tiny("bert")).save_pretrained(tmp_path)
    set_seed(7)
    wanted = get_model(changed(tiny("bert")), "reinit_top")
    set_seed(7)
    if how == "folder":
        model = get_model(tmp_path, "reinit_top", task="SEQ_CLS", num_labels=3)
    else:
        base = changed(tiny("bert"))
        model = get_model(base, ["full", "reinit_top"]) if how == "loaded" else attach(base, "reinit_top")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), wanted.parameters(), strict=True))


def test_what_was_marked_as_loaded_still_is() -> None:
    base = changed(tiny("bert"))
    model = get_model(base, "reinit_top")
    assert all(vars(thing)["_is_hf_initialized"] for thing in [*model.modules(), *model.parameters()])
    fresh = tiny("bert")
    marks = [vars(thing).get("_is_hf_initialized") for thing in [*fresh.modules(), *fresh.parameters()]]
    model = get_model(fresh, "reinit_top")
    assert [vars(thing).get("_is_hf_initialized") for thing in [*model.modules(), *model.parameters()]] == marks


def test_the_redrawn_top_trains(tmp_path: Path) -> None:
    model = get_model(tiny("bert"), ["full", "reinit_top"])
    before = weights(model)
    trainer(model, tmp_path, rows_of(batch("bert", rows=8)), max_steps=2).train()
    assert all(not torch.equal(t, before[n]) for n, t in model.named_parameters() if n.startswith("bert.encoder"))


@pytest.mark.parametrize(("name", "pooler"), [("bert", False), ("roberta", True)])
def test_with_nothing_to_draw_it_is_the_plain_run_bit_for_bit(
    name: str, pooler: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """RoBERTa has no pooler, which is told of, since one was asked for."""
    ends = []
    for method in ("full", {"full": {}, "reinit_top": {"blocks": 0, "pooler": pooler}}):
        set_seed(7)
        model = get_model(tiny(name, hidden_dropout_prob=0.1), method)
        trainer(model, tmp_path, rows_of(batch(name, rows=8)), max_steps=2).train()
        ends.append((weights(model), torch.get_rng_state()))
    (plain, state), (drawn, after) = ends
    assert all(torch.equal(plain[key], drawn[key]) for key in plain)
    assert torch.equal(state, after)
    told = [r.getMessage() for r in caplog.records if r.name.endswith("reinit_top")]
    assert len(told) == pooler
    assert all("blocks=0, and this model has nothing between its last block and its head" in text for text in told)


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_more_blocks_than_there_are_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    base = tiny("bert")
    before = weights(base)
    with pytest.raises(MethodError, match=r"'reinit_top' .*blocks=4: the model has 3 blocks"):
        get_model(base, {"full": {}, "reinit_top": {"blocks": 4}})
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.named_parameters())


def test_by_name_it_is_refused_before_the_weights_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("bert").save_pretrained(tmp_path)

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("The base's weights were loaded.")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", load)
    with pytest.raises(MethodError, match="blocks=4: the model has 3 blocks"):
        get_model(tmp_path, {"full": {}, "reinit_top": {"blocks": 4}}, task="SEQ_CLS", num_labels=3)


@pytest.mark.parametrize("tuner", ["lora", "linear_probe"])
def test_an_adapter_that_would_be_saved_without_the_new_blocks_is_refused(tuner: str, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=rf"'reinit_top'.*needs base weights that train.*{tuner!r} keeps the base"):
        get_model(tmp_path / "nothing", [tuner, "reinit_top"], task="SEQ_CLS", num_labels=2)


def test_blocks_that_share_their_weights_are_refused() -> None:
    with pytest.raises((MethodError, PluginError), match="reinit_top"):
        get_model(tiny("albert"), ["full", "reinit_top"])


@pytest.mark.parametrize("settings", [{"blocks": -1}, {"blocks": 1.5}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match=r"reinit_top.*blocks"):
        get_model(tiny("bert"), {"full": {}, "reinit_top": settings})
