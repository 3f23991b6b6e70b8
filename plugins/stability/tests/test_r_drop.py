"""R-Drop against plain torch: a second model, the same draw of dropout over the batch twice, autograd."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MixtralConfig, MixtralForCausalLM, default_data_collator

from peft_plus import MethodError, Run, Session, get_model
from peft_plus_stability.r_drop import RDrop, has_dropout, in_one_row
from tests.consistency import (
    TASKS,
    Grab,
    accumulated,
    distance,
    gradients,
    model_and_batch,
    sampler_order,
    summed_distance,
    trainer_of,
)
from tests.models import rows_of, tiny

pytestmark = pytest.mark.usefixtures("one_accelerator_at_a_time")
ONE_STEP = {"max_steps": 1, "max_grad_norm": 0.0}


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def dropping(model: nn.Module, rate: float) -> nn.Module:
    """The model with every dropout at `rate`, attention's own too."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
        for name in ("attention_dropout", "dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, rate)
    return model


class Draws:
    """Keeps the random state with which each training pass began."""

    def __init__(self, model: nn.Module) -> None:
        self.states: list[Tensor] = []
        model.register_forward_pre_hook(
            lambda *_: self.states.append(torch.get_rng_state()) if model.training else None
        )


def by_hand(twin: nn.Module, task: str, data: Mapping[str, Tensor], weight: float, draw: Tensor) -> Tensor:
    """½ (L₁ + L₂) + weight · ½ D of one pass over the batch twice; its gradient is left in `twin`."""
    twice = {name: torch.cat([value, value]) for name, value in data.items()}
    torch.set_rng_state(draw)
    output = twin.train()(**twice)
    halves = [_Half(output, side) for side in (0, 1)]
    total, count = summed_distance(task, data, *halves)
    loss = output.loss + weight * 0.5 * total / count
    loss.backward()
    return loss.detach()


class _Half:
    """One half of an output's rows."""

    def __init__(self, output: Any, side: int) -> None:
        self._output, self._side = output, side

    def __getattr__(self, name: str) -> Tensor:
        return getattr(self._output, name).chunk(2)[self._side]


@pytest.mark.parametrize(("name", "task"), TASKS)
def test_loss_and_gradient_against_plain_torch(name: str, task: str, tmp_path: Path) -> None:
    model, data = model_and_batch(name, task)
    twin = dropping(copy.deepcopy(model), 0.3)
    model = get_model(dropping(model, 0.3), ["full", RDrop(weight=0.7)])
    draws, grab = Draws(model), Grab()
    run = trainer_of(model, rows_of(data), tmp_path, [grab], logging_strategy="steps", logging_steps=1, **ONE_STEP)
    run.train()
    order = sampler_order(len(next(iter(data.values()))))
    loss = by_hand(twin, task, {key: value[order] for key, value in data.items()}, 0.7, draws.states[0])
    assert distance(grab.gradients, gradients(twin)) < 1e-5
    logged = run.state.log_history[0]
    assert logged["r_drop"] > 0
    assert logged["loss"] == pytest.approx(float(loss), rel=1e-3)


@pytest.mark.parametrize(("name", "task"), [("bert", "TOKEN_CLS"), ("llama", "CAUSAL_LM")])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_without_dropout_it_is_the_plain_run_whatever_the_micro_batches(
    name: str, task: str, micro_batches: int, tmp_path: Path
) -> None:
    """With labels of which each micro-batch has another number."""
    model, data = model_and_batch(name, task, rows=8)
    data["labels"] = data["labels"].masked_fill(
        torch.arange(data["labels"].shape[1]) >= 1 + torch.arange(8)[:, None], -100
    )
    got = []
    for method in ("full", ["full", RDrop()]):
        grab = Grab()
        own = get_model(copy.deepcopy(model), method, task=task)
        run = trainer_of(own, rows_of(data), tmp_path, [grab], **{**accumulated(8, micro_batches), "max_steps": 1})
        run.train()
        got.append(grab.gradients)
    assert distance(got[1], got[0]) < 1e-5


def test_without_dropout_the_divergence_is_zero_and_the_user_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, data = model_and_batch("bert", "SEQ_CLS")
    assert not has_dropout(model)
    run = trainer_of(
        get_model(model, ["full", RDrop()]),
        rows_of(data),
        tmp_path,
        logging_strategy="steps",
        logging_steps=1,
        **ONE_STEP,
    )
    with caplog.at_level(logging.WARNING):
        run.train()
    assert "this model draws no dropout" in caplog.text
    assert run.state.log_history[0]["r_drop"] == 0.0


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "gpt2"])
def test_dropout_is_found_wherever_a_model_keeps_it(name: str) -> None:
    model = tiny(name)
    assert has_dropout(dropping(model, 0.1))
    assert not has_dropout(dropping(model, 0.0))


def test_weight_zero_is_the_plain_run_bit_for_bit(tmp_path: Path) -> None:
    ends = []
    for method in ("lora", ["lora", RDrop(weight=0.0)]):
        torch.manual_seed(0)
        model, data = model_and_batch("bert", "SEQ_CLS")
        run = trainer_of(get_model(dropping(model, 0.1), method), rows_of(data), tmp_path, max_steps=4)
        run.train()
        ends.append(dict(run.model.named_parameters()))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("user", ["smoothing", "function"])
def test_both_copies_go_through_the_users_own_loss(user: str, tmp_path: Path) -> None:
    from peft_plus import Trainer
    from tests.consistency import arguments

    model, data = model_and_batch("bert", "SEQ_CLS")
    twin = dropping(copy.deepcopy(model), 0.3)
    model = get_model(dropping(model, 0.3), ["full", RDrop(weight=0.7)])
    draws, grab = Draws(model), Grab()
    settings = {"label_smoothing_factor": 0.2} if user == "smoothing" else {}
    function = (lambda output, labels, num_items_in_batch=None: 3 * F.cross_entropy(output["logits"], labels)) if user == "function" else None  # noqa: E501 # fmt: skip
    Trainer(
        model,
        arguments(tmp_path, **ONE_STEP, **settings),
        train_dataset=rows_of(data),
        data_collator=default_data_collator,
        callbacks=[grab],
        compute_loss_func=function,
    ).train()
    order = sampler_order(4)
    shuffled = {key: value[order] for key, value in data.items()}
    twice = {key: torch.cat([value, value]) for key, value in shuffled.items()}
    torch.set_rng_state(draws.states[0])
    output = twin.train()(**twice)
    smoothing = 0.2 if user == "smoothing" else 0.0
    own = F.cross_entropy(output.logits, twice["labels"], label_smoothing=smoothing) * (3 if user == "function" else 1)
    total, count = summed_distance("SEQ_CLS", shuffled, *[_Half(output, side) for side in (0, 1)])
    (own + 0.35 * total / count).backward()
    assert distance(grab.gradients, gradients(twin)) < 1e-5


def test_packed_rows_stay_apart_in_both_copies(tmp_path: Path) -> None:
    """One long row whose positions begin anew: doubled, the first copy's tokens see no other text either."""
    model, _ = model_and_batch("llama", "CAUSAL_LM")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 100, (1, 12), generator=generator)
    packed = {"input_ids": ids, "position_ids": torch.tensor([[*range(5), *range(7)]]), "labels": ids.clone()}
    packed["labels"][0, 5] = -100
    got = []
    for method in ("full", ["full", RDrop()]):
        grab = Grab()
        own = get_model(copy.deepcopy(model), method, task="CAUSAL_LM")
        run = trainer_of(own, rows_of(packed), tmp_path, [grab], **{**ONE_STEP, "per_device_train_batch_size": 1})
        run.train()
        got.append(grab.gradients)
    assert distance(got[1], got[0]) < 1e-5


def test_a_mixture_of_experts_keeps_the_weight_of_its_router_loss(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
        pad_token_id=0,
    )
    model = MixtralForCausalLM(config)
    _, data = model_and_batch("llama", "CAUSAL_LM")
    got = []
    for method in ("full", ["full", RDrop()]):
        grab = Grab()
        own = get_model(copy.deepcopy(model), method, task="CAUSAL_LM")
        trainer_of(own, rows_of(data), tmp_path, [grab], **ONE_STEP).train()
        got.append(grab.gradients)
    assert distance(got[1], got[0]) < 1e-5


def test_a_session_gives_the_same_gradient(tmp_path: Path) -> None:
    model, data = model_and_batch("bert", "SEQ_CLS")
    twin = dropping(copy.deepcopy(model), 0.3)
    model = get_model(dropping(model, 0.3), ["full", RDrop(weight=0.7)])
    draws = Draws(model)
    session = Session(model, Accelerator(cpu=True), max_steps=1)
    optimizer = session.optimizer(torch.optim.SGD, lr=1e-2)
    loader = session.loader(rows_of(data), 4, shuffle=False, collate_fn=default_data_collator)
    got: dict[str, Tensor] = {}
    for batch in session.batches(loader):
        session.accelerator.backward(session.loss(batch))
        got = gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    by_hand(twin, "SEQ_CLS", data, 0.7, draws.states[0])
    assert distance(got, gradients(twin)) < 1e-5


def test_a_wrong_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="weight=-1"):
        RDrop(weight=-1)
    with pytest.raises(MethodError, match="both make the passes"):
        get_model(tiny("bert"), {"full": {}, "r_drop": {}, "freelb": {}})


# ---- packed texts, checkpointing, resume, TRL ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "packed"),
    [
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1]])}, True),
        ({"position_ids": torch.tensor([[0, 1, 2, 3, 4]])}, False),
        ({"position_ids": torch.tensor([[0, 1, 0, 1, 2]]), "attention_mask": torch.ones(1, 5)}, False),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 5])}, True),
        ({}, False),
    ],
)
def test_packed_texts_under_flash_attention_are_refused(more: dict[str, Tensor], packed: bool) -> None:
    """It tells them apart by position in a batch of one row alone; the others make a mask, as in the test above."""
    data = {"input_ids": torch.ones(1, 5, dtype=torch.long), **more}
    assert in_one_row(data) == packed
    model = tiny("llama", "CAUSAL_LM")
    run = Run(model=model, task=None, num_blocks=3)  # type: ignore[arg-type]
    assert RDrop().passes(run, data) is not None
    model.config._attn_implementation = "flash_attention_2"  # type: ignore[union-attr]
    if packed:
        with pytest.raises(ValueError, match=r"flash attention.*batch of one row.*sdpa"):
            RDrop().passes(run, data)
    else:
        assert RDrop().passes(run, data) is not None


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_bit_of_it(reentrant: bool, tmp_path: Path) -> None:
    ends = []
    for more in (
        {},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}},
    ):
        torch.manual_seed(0)
        model, data = model_and_batch("bert", "SEQ_CLS")
        model = get_model(dropping(model, 0.3), {"lora": {}, "r_drop": {"weight": 0.7}})
        trainer_of(model, rows_of(data), tmp_path, max_steps=2, **more).train()
        ends.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_run_resumed_after_any_step_ends_the_same_bit_for_bit(tmp_path: Path) -> None:
    def run(resume: str | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model, data = model_and_batch("bert", "SEQ_CLS", rows=20)
        model = get_model(dropping(model, 0.3), {"lora": {}, "r_drop": {}})
        settings: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
        settings["gradient_accumulation_steps"] = 2
        trainer_of(model, rows_of(data), tmp_path, **settings).train(resume_from_checkpoint=resume)
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    whole = run(None)
    for step in (1, 2, 3):
        again = run(str(tmp_path / f"checkpoint-{step}"))
        assert all(torch.equal(whole[name], again[name]) for name in whole), step


@pytest.mark.parametrize("tuner", ["prompt_tuning", "prefix_tuning"])
@pytest.mark.parametrize(("name", "task"), [("bert", "SEQ_CLS"), ("llama", "CAUSAL_LM")])
def test_both_copies_have_the_same_prompt(name: str, task: str, tuner: str, tmp_path: Path) -> None:
    """Without dropout its gradient is the plain one."""
    got = []
    for more in ({}, {"r_drop": {}}):
        torch.manual_seed(0)
        model, data = model_and_batch(name, task)
        grab = Grab()
        model = get_model(model, {tuner: {"num_virtual_tokens": 3}, **more}, task=task)
        trainer_of(model, rows_of(data), tmp_path, [grab], **ONE_STEP).train()
        got.append(grab.gradients)
    assert got[0]
    assert distance(got[1], got[0]) < 1e-5
