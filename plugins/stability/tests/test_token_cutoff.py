"""Token cutoff against plain torch: a second model, the same words cut out of `inputs_embeds`, autograd, scipy."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import chisquare
from torch import Tensor, nn
from torch.nn import functional as F

from peft_plus import MethodError, PluginError, Run, get_model
from peft_plus_stability.divergences import JENSEN_SHANNON
from peft_plus_stability.token_cutoff import TokenCutoff, chosen, too_short
from tests.consistency import (
    TASKS,
    Grab,
    accumulated,
    distance,
    gradients,
    lively,
    model_and_batch,
    sampler_order,
    trainer_of,
)
from tests.models import EOS, PAD, batch, rows_of, tiny

NAMES = ("token_cutoff", "token_cutoff_consistency")
"""Of the second view's loss, and of the consistency."""

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


# ---- the terms, task by task -------------------------------------------------------------------------------------


class Spy(Run):
    """Keeps where a plugin cut."""

    gone: Tensor

    def forward(self, batch: Mapping[str, Any], *, perturb: Any = None, **more: Any) -> Any:
        def kept(embeddings: Tensor) -> Tensor:
            delta = perturb["embeddings"](embeddings)
            self.gone = (delta != 0).any(-1)
            assert torch.equal(delta, -embeddings * self.gone[..., None])
            return delta

        return super().forward(batch, perturb={"embeddings": kept}, **more)


def spy(model: Any, data: Mapping[str, Any], **where: Any) -> Spy:
    return Spy(model=model, task=model.peft_plus.task, num_blocks=3, batch=data, **where)


def embeddings_of(name: str, model: Any) -> nn.Module:
    return model.get_encoder().embed_tokens if name in ("t5", "bart") else model.get_input_embeddings()


def pass_without(model: Any, name: str, data: Mapping[str, Tensor], gone: Tensor) -> Any:
    """The pass through `inputs_embeds`, 0 where `gone`."""
    inputs = dict(data)
    embedded = embeddings_of(name, model)(inputs.pop("input_ids"))
    return model(inputs_embeds=embedded * (~gone).view(embedded.shape[:-1])[..., None], **inputs)


def js(a: Tensor, b: Tensor) -> Tensor:
    p, q = a.softmax(-1), b.softmax(-1)
    middle = ((p + q) / 2).log()
    there = F.kl_div(middle, p, reduction="none").sum(-1)
    return 0.5 * there + 0.5 * F.kl_div(middle, q, reduction="none").sum(-1)


def mean_js(task: str, data: Mapping[str, Tensor], whole: Any, cut: Any) -> Tensor:
    match task:
        case "QUESTION_ANS":
            start = js(whole.start_logits, cut.start_logits)
            return (start + js(whole.end_logits, cut.end_logits)).mean() / 2
        case "regression":
            return 0.5 * F.mse_loss(whole.logits, cut.logits)
        case "multi_label_classification":
            return js(*(torch.stack([x.logits, torch.zeros_like(x.logits)], -1) for x in (whole, cut))).mean()
        case "SEQ_CLS" | "MULTIPLE_CHOICE":
            return js(whole.logits, cut.logits).mean()
    a, b, labels = whole.logits, cut.logits, data["labels"]
    if task == "CAUSAL_LM":
        a, b, labels = a[:, :-1], b[:, :-1], labels[:, 1:]
    return js(a, b)[labels != -100].mean()


@pytest.mark.parametrize(("weight", "consistency"), [(0.7, 1.3), (0.7, 0.0), (0.0, 1.3)])
@pytest.mark.parametrize(("name", "task"), TASKS)
def test_value_and_gradient_against_plain_torch(name: str, task: str, weight: float, consistency: float) -> None:
    """The gradient of the words' embeddings too, which a word that is cut out must not feel."""
    model, data = model_and_batch(name, task)
    twin = copy.deepcopy(model)
    model = get_model(model, ["full", TokenCutoff(weight=weight, consistency=consistency, share=0.5)])
    run = spy(model, data, seed=5, step=3)
    terms = model.peft_plus.plugins[0].loss_terms(run, data, model(**data))
    means = {key: term.sum / term.count for key, term in terms.items()}
    sum(means.values()).backward()  # type: ignore[union-attr]

    assert 0 < run.gone.sum() < run.gone.numel()
    whole, cut = twin(**data), pass_without(twin, name, data, run.gone)
    wanted = {"token_cutoff": weight * cut.loss}
    wanted["token_cutoff_consistency"] = consistency * mean_js(task, data, whole, cut)
    wanted = {key: value for key, value in wanted.items() if float(value.detach()) > 0}
    sum(wanted.values()).backward()  # type: ignore[union-attr]
    assert means.keys() == wanted.keys() == {k for k, w in zip(NAMES, (weight, consistency), strict=True) if w}
    for key, value in wanted.items():
        assert value.item() > 1e-4
        assert means[key].item() == pytest.approx(value.item(), rel=1e-4)
        assert terms[key].sum.dtype == torch.float32
        assert terms[key].per == "label"
    assert distance(gradients(model), gradients(twin)) < 1e-4


def test_the_divergences_against_scipy() -> None:
    a, b = 3 * torch.randn(6, 5), 3 * torch.randn(6, 5)
    wanted = jensenshannon(a.softmax(-1).numpy(), b.softmax(-1).numpy(), axis=-1) ** 2
    assert JENSEN_SHANNON["categorical"](a, b).tolist() == pytest.approx(wanted.tolist(), rel=1e-4)
    pairs = [torch.stack([x.sigmoid(), 1 - x.sigmoid()], -1).numpy() for x in (a, b)]
    each = jensenshannon(*pairs, axis=-1) ** 2
    assert JENSEN_SHANNON["bernoulli"](a, b).tolist() == pytest.approx(each.mean(-1).tolist(), rel=1e-4)
    assert JENSEN_SHANNON["real"](a, b).tolist() == pytest.approx((0.5 * ((a - b) ** 2).mean(-1)).tolist(), rel=1e-6)


# ---- which tokens go ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "length", "number"), [(0.1, 9, 0), (0.1, 10, 1), (0.3, 10, 3), (0.29, 100, 29)])
def test_the_share_is_rounded_down(share: float, length: int, number: int) -> None:
    allowed = torch.ones(length + 5, dtype=torch.bool)
    allowed[length:] = False
    gone = chosen(allowed, share=share, generator=torch.Generator().manual_seed(0))
    assert int(gone.sum()) == number
    assert not gone[length:].any()


def test_every_place_is_as_likely_as_another() -> None:
    allowed = torch.tensor([True] * 4 + [False] * 2 + [True] * 6)
    generator = torch.Generator().manual_seed(0)
    counts = sum(chosen(allowed, share=0.3, generator=generator).long() for _ in range(4000))
    assert isinstance(counts, Tensor)
    assert int(counts[~allowed].sum()) == 0
    assert chisquare(counts[allowed].tolist()).pvalue > 0.01


def test_padding_and_special_tokens_stay() -> None:
    """Those that the config tells, and those that the tokenizer does."""
    model = get_model(lively("bert"), ["full", TokenCutoff(share=0.9)])  # whose padding is no zero
    data = batch("bert", length=20)
    data["input_ids"][:, 3], data["input_ids"][:, 7] = EOS, 42
    run = spy(model, data)
    model.peft_plus.plugins[0].loss_terms(run, data, model(**data))
    words = (data["attention_mask"] == 1) & (data["input_ids"] != EOS)
    assert not run.gone[~words].any()
    assert run.gone[:, 7].any()
    assert run.gone.sum(1).tolist() == (0.9 * words.sum(1)).floor().tolist()

    model.peft_plus.task.tokenizer = SimpleNamespace(all_special_ids=[PAD, 42])
    model.peft_plus.plugins[0].loss_terms(run, data, model(**data))
    words &= data["input_ids"] != 42
    assert not run.gone[~words].any()
    assert run.gone.sum(1).tolist() == (0.9 * words.sum(1)).floor().tolist()


def test_neighbours_and_their_padding_change_nothing() -> None:
    model = get_model(lively("bert"), ["full", TokenCutoff(share=0.5)])
    plugin, data = model.peft_plus.plugins[0], batch("bert", rows=6, length=12)
    run = spy(model, data)
    plugin.loss_terms(run, data, model(**data))
    whole = run.gone
    tail = {key: value[4:] for key, value in data.items()}
    tail |= {key: F.pad(tail[key], (0, 7)) for key in ("input_ids", "attention_mask")}
    run = spy(model, tail, first_example=4)
    plugin.loss_terms(run, tail, model(**tail))
    assert torch.equal(run.gone[:, :12], whole[4:])
    assert not run.gone[:, 12:].any()


def test_steps_seeds_rows_and_choices_draw_their_own() -> None:
    model, data = model_and_batch("bert", "MULTIPLE_CHOICE")
    model = get_model(model, ["full", TokenCutoff(share=0.5)], task="MULTIPLE_CHOICE")
    data["attention_mask"][:] = 1
    data["input_ids"][:] = torch.arange(8) + 10
    seen = []
    for where in ({}, {"step": 1}, {"seed": 1}, {"first_example": 4}, {}):
        run = spy(model, data, **where)
        model.peft_plus.plugins[0].loss_terms(run, data, model(**data))
        seen.append(run.gone)
    assert seen[0].shape == (8, 8)  # four rows of two choices
    assert torch.equal(seen[0], seen[4])
    assert len({tuple(row.tolist()) for row in seen[0]}) > 4
    assert all(not torch.equal(seen[0], other) for other in seen[1:4])


# ---- in a run ----------------------------------------------------------------------------------------------------


class Views:
    """What a BERT's first LayerNorm was given in each pass: what differs between two passes was cut."""

    def __init__(self, model: nn.Module) -> None:
        self.inputs: list[Tensor] = []
        norm = next(m for n, m in model.named_modules() if n.endswith("embeddings.LayerNorm"))
        norm.register_forward_pre_hook(lambda module, args: self.inputs.append(args[0].detach().clone()))

    def gone(self) -> list[Tensor]:
        return [(a != b).any(-1) for a, b in zip(self.inputs[::2], self.inputs[1::2], strict=True)]


@pytest.mark.parametrize(("name", "task"), [("bert", "SEQ_CLS"), ("bert", "MULTIPLE_CHOICE"), ("bert", "TOKEN_CLS")])
def test_the_whole_gradient_whatever_the_accumulation(name: str, task: str, tmp_path: Path) -> None:
    """Task loss and both terms of one big batch; the cut follows the example's place in the step."""
    found = []
    for micro_batches in (1, 2, 4):
        model, data = model_and_batch(name, task, rows=8)
        twin = copy.deepcopy(model).train()
        views, grab = Views(model), Grab()
        model = get_model(model, ["full", TokenCutoff(weight=0.7, consistency=1.3, share=0.5)])
        settings = {"max_steps": 1, **accumulated(8, micro_batches)}
        trainer_of(model, rows_of(data), tmp_path, [grab], **settings).train()
        found.append((torch.cat(views.gone()), grab.gradients))
    gone = found[0][0]
    assert all(torch.equal(other, gone) for other, _ in found[1:])
    order = sampler_order(8)
    data = {key: value[order] for key, value in data.items()}
    whole, cut = twin(**data), pass_without(twin, name, data, gone)
    (whole.loss + 0.7 * cut.loss + 1.3 * mean_js(task, data, whole, cut)).backward()
    for _, got in found:
        assert distance(got, gradients(twin)) < 1e-4


@pytest.mark.parametrize("settings", [{"weight": 0.0, "consistency": 0.0}, {"share": 0.0}])
@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_both_weights_or_the_share_at_zero_are_the_plain_run_bit_for_bit(
    tuner: str, settings: dict[str, float], tmp_path: Path
) -> None:
    rows = rows_of(batch("bert", rows=16))
    trained = []
    for method in ({tuner: {}}, {tuner: {}, "token_cutoff": settings}):
        torch.manual_seed(0)
        model = get_model(tiny("bert", hidden_dropout_prob=0.1), method)
        trainer_of(model, rows, tmp_path, max_steps=4, gradient_accumulation_steps=2).train()
        trained.append({n: p.detach().clone() for n, p in model.named_parameters()})
    assert all(torch.equal(trained[0][n], trained[1][n]) for n in trained[0])


def test_texts_too_short_for_the_share_are_told_of_once_and_with_the_share_they_need(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A tenth of six words is none. The loss keeps the scale that it has where words go: twice the plain one."""
    data = batch("bert", rows=8, length=6)
    data["attention_mask"][:] = 1
    data["input_ids"] = data["input_ids"].clamp(min=10)
    found, needed = {}, 0.17
    for name, share in (("short", 0.1), ("needed", needed), ("a little less", needed - 0.01)):
        caplog.clear()
        model = get_model(lively("bert"), ["full", TokenCutoff(share=share)])
        views, grab = Views(model), Grab()
        with caplog.at_level(logging.WARNING, logger="peft_plus_stability"):
            trainer_of(model, rows_of(data), tmp_path, [grab], max_steps=2, max_grad_norm=0.0).train()
        found[name] = [record.getMessage() for record in caplog.records]
        assert any(bool(gone.any()) for gone in views.gone()) == (share == needed)
        if name == "short":
            twin, order = lively("bert"), sampler_order(8)[:4]
            (2 * twin(**{key: value[order] for key, value in data.items()}).loss).backward()
            assert distance(grab.gradients, gradients(twin)) < 1e-4
    assert not found["needed"]
    assert len(found["short"]) == len(found["a little less"]) == 1
    assert "share=0.1 takes none of a text with fewer than 10 tokens that may go" in found["short"][0]
    assert "its longest has 6. Its second pass costs as much and shows" in found["short"][0]
    assert found["short"][0].endswith(f"Give share ≥ {needed}.")


@pytest.mark.parametrize("longest", [*range(2, 40), 99, 101, 1000])
def test_the_share_that_the_warning_asks_for_takes_a_token(longest: int) -> None:
    text = too_short(longest, share=0.5 / longest)
    share = float(text.split("Give share ≥ ")[1][:-1])
    allowed = torch.ones(longest, dtype=torch.bool)
    assert chosen(allowed, share=share, generator=torch.Generator().manual_seed(0)).any()
    assert f"fewer than {2 * longest} tokens" in text


def test_where_no_text_can_lose_a_token_it_says_so() -> None:
    assert too_short(1, share=0.9).endswith("Leave it out for such texts.")


def test_a_resumed_run_cuts_the_same_words(tmp_path: Path) -> None:
    def run(resume: str | None) -> tuple[list[Tensor], list[Tensor]]:
        torch.manual_seed(0)
        model = tiny("bert", hidden_dropout_prob=0.1)
        views = Views(model)
        model = get_model(model, {"lora": {}, "token_cutoff": {"share": 0.5}})
        saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
        trainer = trainer_of(model, rows_of(batch("bert", rows=20)), tmp_path, **saving)
        trainer.train(resume_from_checkpoint=resume)
        return views.inputs, [p.detach().clone() for p in model.parameters()]

    whole, end = run(None)
    for step in (2, 3):
        again, ended = run(str(tmp_path / f"checkpoint-{step}"))
        assert len(again) == len(whole) - 2 * step
        assert all(torch.equal(x, y) for x, y in zip(again, whole[2 * step :], strict=True))
        assert all(torch.equal(x, y) for x, y in zip(ended, end, strict=True))


@pytest.mark.parametrize("tuner", ["lora", "prompt_tuning"])
@pytest.mark.parametrize(("name", "task"), [("bert", "SEQ_CLS"), ("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM")])
def test_the_value_inside_a_peft_model(name: str, task: str, tuner: str) -> None:
    """The second pass through PEFT's own `inputs_embeds`; virtual tokens are neither cut nor compared."""
    settings = {"num_virtual_tokens": 3} if tuner == "prompt_tuning" else {}
    model = get_model(lively(name, task), {tuner: settings, "token_cutoff": {"share": 0.5}})
    for n, p in model.named_parameters():
        if "lora_B" in n:
            nn.init.normal_(p, std=0.3)
    data = batch(name, task)
    run = spy(model, data)
    terms = model.peft_plus.plugins[0].loss_terms(run, data, model(**data))
    assert run.gone.shape == data["input_ids"].shape

    inputs = dict(data)
    ids = inputs.pop("input_ids")
    embedded = embeddings_of(name, model.get_base_model())(ids)
    with torch.no_grad():
        whole = model(**data)
        cut = model(inputs_embeds=embedded * ~run.gone[..., None], **inputs)
    first, second = NAMES
    assert (terms[first].sum / terms[first].count).item() == pytest.approx(cut.loss.item(), rel=1e-4)
    a, b, labels = whole.logits, cut.logits, data["labels"]
    if task != "SEQ_CLS":
        a, b = a[:, -labels.shape[1] :], b[:, -labels.shape[1] :]
    if task == "CAUSAL_LM":
        a, b, labels = a[:, :-1], b[:, :-1], labels[:, 1:]
    wanted = js(a, b)[labels != -100].mean().item()
    assert wanted > 1e-4
    assert (terms[second].sum / terms[second].count).item() == pytest.approx(wanted, rel=1e-4)


def test_in_bf16_the_cut_is_not_lost(tmp_path: Path) -> None:
    model = get_model(tiny("bert").bfloat16(), {"full": {}, "token_cutoff": {"share": 0.5}})
    trainer = trainer_of(model, rows_of(batch("bert")), tmp_path, logging_strategy="steps", logging_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["token_cutoff_consistency"] > 1e-6


def test_patches_of_an_image_are_cut_too() -> None:
    model = get_model(tiny("vit"), ["full", TokenCutoff(share=0.5)])
    data = batch("vit")
    run = spy(model, data)
    model.peft_plus.plugins[0].loss_terms(run, data, model(**data))
    assert run.gone.sum(1).tolist() == [8] * 4  # of 16 patches


def test_a_model_without_embeddings_is_an_error(tmp_path: Path) -> None:
    model = get_model(tiny("resnet"), ["full", "token_cutoff"])
    with pytest.raises(PluginError, match=r"'token_cutoff'.*ResNetForImageClassification has no input embeddings"):
        trainer_of(model, rows_of(batch("resnet")), tmp_path).train()


@pytest.mark.parametrize(
    "settings", [{"weight": -1.0}, {"consistency": float("nan")}, {"share": -0.1}, {"share": 1.0}, {"share": "half"}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match=f"token_cutoff.*{next(iter(settings))}"):
        get_model(tiny("bert"), {"lora": {}, "token_cutoff": settings})
