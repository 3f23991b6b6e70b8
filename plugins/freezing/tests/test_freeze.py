"""What is frozen for the whole run: the table of slices, training by hand with plain torch, and every loop."""

from __future__ import annotations

import logging
from typing import Any

import datasets
import pytest
import torch
import trl
from datasets import Dataset
from transformers import default_data_collator

import peft_plus
from peft_plus import MethodError, attach, get_model
from peft_plus_freezing.freeze import frozen_depths
from tests.bare_loop import BareLoop, check_resume, on_nf4
from tests.evaluated_loop import EvaluatedLoop, changed, weights
from tests.models import batch, tiny
from tests.multipliers import in_session, in_trainer, rows_of
from tests.test_effects import depth_of
from tests.tokenizers import tiny_tokenizer
from tests.training import quiet


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def test_the_frozen_blocks_are_those_of_a_slice() -> None:
    for number in range(1, 7):
        depths = list(range(1, number + 1))
        for k in range(-number, number + 1):
            assert list(frozen_depths(k, number)) == depths[:k]


@pytest.mark.parametrize(
    ("settings", "depths"),
    [
        ({"blocks": 2}, {0, 1, 2}),
        ({"blocks": -1}, {0, 1, 2}),
        ({"blocks": 3}, {0, 1, 2, 3}),
        ({"blocks": 2, "embeddings": False}, {1, 2}),
        ({"embeddings": True}, {0}),
        ({"patterns": "block 2"}, {2}),
        ({"patterns": ["layer.0", "re:layer[.]2[.]", "embeddings"]}, {0, 1, 3}),
        ({"all_but": ["head", "block -1"]}, {0, 1, 2}),
        ({"blocks": -1, "all_but": "block 1"}, {0, 2}),
    ],
    ids=str,
)
def test_what_is_frozen_stays_to_the_bit_and_the_rest_moves(settings: dict[str, Any], depths: set[int]) -> None:
    model = get_model(tiny("bert"), {"full": {}, "freeze": settings})
    names = list(weights(model))
    loop = EvaluatedLoop(model, steps=3).run()
    left = {name for name in names if depth_of(name, 3) not in depths}
    assert set.union(*loop.moved) <= left
    assert {depth_of(name, 3) for name in set.union(*loop.moved)} == {0, 1, 2, 3, 4} - depths
    assert {id(t) for g in loop.optimizer.param_groups for t in g["params"]} == {
        id(t) for name, t in model.named_parameters() if name in left
    }
    assert all(tensor.requires_grad for tensor in model.parameters()), "given back as get_model made it"


def test_it_equals_freezing_by_hand_with_plain_torch() -> None:
    frozen = get_model(tiny("bert"), {"full": {}, "freeze": {"blocks": 2, "patterns": "*.bias"}})
    BareLoop(frozen, steps=5).run()
    plain = tiny("bert")
    for name, tensor in plain.named_parameters():
        tensor.requires_grad_(depth_of(name, 3) > 2 and not name.endswith(".bias"))
    optimizer = torch.optim.AdamW([t for t in plain.parameters() if t.requires_grad], lr=1e-2, weight_decay=0.1)
    for step in range(5):
        plain.train()(**batch("bert", seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not changed(weights(plain), weights(frozen))


@pytest.mark.parametrize("tuner", ["lora", "ia3"])
def test_adapters_by_depth_under_the_trainer_and_in_a_session(tuner: str, tmp_path: Any) -> None:
    for train in (lambda model: in_trainer(model, tmp_path, steps=2), lambda model: in_session(model, steps=2)):
        model = get_model(tiny("bert"), {tuner: {}, "freeze": {"blocks": 2}})
        before = weights(model)
        train(model)
        assert {depth_of(name, 3) for name in changed(before, weights(model))} == {3, 4}


def test_adapters_on_nf4_by_depth_and_packed_weights_are_refused(tmp_path: Any) -> None:
    model = on_nf4({"lora": {}, "freeze": {"blocks": -1}}, tmp_path)
    loop = EvaluatedLoop(model, steps=2).run()
    assert {depth_of(name, 3) for name in set.union(*loop.moved)} == {3, 4}
    message = "matches only weights that never train .*: the tuner leaves the base frozen, and packed into 4 or 8 bits"
    with pytest.raises(MethodError, match=message):
        on_nf4({"lora": {}, "freeze": {"patterns": "query.weight"}}, tmp_path)
    with pytest.raises(MethodError, match=message):
        attach(model, {"freeze": {"patterns": "query.base_layer.weight"}})


def test_trls_sft_trainer_with_checkpointing(tmp_path: Any) -> None:
    datasets.disable_progress_bars()
    tokenizer = tiny_tokenizer("decoder")
    model = get_model(tiny("llama", "CAUSAL_LM", vocab_size=len(tokenizer)), {"lora": {}, "freeze": {"blocks": 2}})
    before = weights(model)
    args = quiet(
        tmp_path, kind=trl.SFTConfig, max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, bf16=False
    )
    data = Dataset.from_list([{"text": "the cat is good"}, {"text": "a dog in paris is bad"}] * 4)
    trainer = peft_plus.with_plugins(trl.SFTTrainer)(
        model=model, args=args, train_dataset=data, processing_class=tokenizer
    )
    trainer.train()
    assert {depth_of(name, 3) for name in changed(before, weights(model))} == {3}
    datasets.enable_progress_bars()


def test_frozen_depths_take_no_phase_of_another_schedule() -> None:
    model = get_model(tiny("bert"), {"full": {}, "freeze": {"patterns": "block 2"}, "gradual_unfreeze": {"every": 2}})
    EvaluatedLoop(model, steps=8).run()
    found = [(change.step, sorted({d for d, _ in change.groups}, reverse=True)) for change in model.peft_plus.timeline]
    assert found == [(0, [4]), (2, [4, 3]), (4, [4, 3, 1]), (6, [4, 3, 1, 0])]


def test_rates_by_depth_are_those_without_it(tmp_path: Any) -> None:
    rates = [
        in_trainer(get_model(tiny("bert"), {"full": {}, "llrd": {"decay": 0.5}, **more}), tmp_path, steps=1)[0]
        for more in ({}, {"freeze": {"blocks": 2}})
    ]
    assert rates[1] == pytest.approx({depth: rates[0][depth] for depth in (3, 4)}, rel=1e-4)


def test_resumed_after_any_step_the_end_is_bit_identical() -> None:
    check_resume(lambda: get_model(tiny("bert"), {"full": {}, "freeze": {"blocks": 2}}), steps=4)


def test_it_says_what_matched(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "peft_plus_freezing.freeze")
    get_model(tiny("bert"), {"lora": {"r": 4}, "freeze": {"blocks": 2}})
    assert caplog.messages == [
        "freeze: frozen is block 1: 4 tensors, 512 parameters; block 2: 4 tensors, 512 parameters. What trains is "
        "block 3: 4 tensors, 512 parameters; head: 2 tensors, 99 parameters."
    ]


def test_nobody_warns_of_what_is_frozen_on_purpose(caplog: pytest.LogCaptureFixture) -> None:
    model = get_model(tiny("bert"), {"full": {}, "freeze": {"blocks": 2}, "gradual_unfreeze": {"every": 1}})
    BareLoop(model, steps=3).run()
    assert "never" not in caplog.text.lower()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "names nothing to freeze: give blocks="),
        ({"embeddings": False}, "names nothing to freeze"),
        ({"embeddings": False, "all_but": "head"}, "embeddings=False goes only with blocks="),
        ({"patterns": "block 0"}, "blocks count from 1"),
        ({"patterns": "head", "all_but": ["head"]}, "patterns and all_but both name 'head'"),
        ({"blocks": 4}, "blocks=4 is past the depth of this model, which has 3 blocks. Give 3 at most, or -2 at least"),
        ({"blocks": -4}, "past the depth"),
        ({"blocks": -3}, "blocks=-3 freezes nothing: this model has just 3 blocks"),
        ({"blocks": 1.5}, "expected int"),
        ({"patterns": ["embedings"]}, "patterns: 'embedings' matches nothing. Did you mean 'embeddings'?"),
        ({"all_but": "block 7"}, "all_but: 'block 7' is past the depth"),
        ({"blocks": 1, "all_but": "block 3"}, "all_but names 'block 3', of which nothing else freezes anything"),
        ({"all_but": "all"}, r"all_but=\['all'\] leaves nothing to freeze"),
        ({"patterns": "all"}, "nothing is left to train: freeze matches all of embeddings: "),
        ({"blocks": 3, "patterns": "head"}, "nothing is left to train"),
        ({"patterns": ["re:(.*"]}, "an invalid regular expression"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused_with_the_plugins_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=rf"'freeze' \(peft-plus-freezing .*{message}"):
        get_model(tiny("bert"), {"full": {}, "freeze": settings})


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"lora": {}, "freeze": {"embeddings": True}}, "embeddings=True matches nothing that trains"),
        ({"linear_probe": {}, "freeze": {"blocks": 1}}, "blocks=1 matches nothing that trains: the tuner trains head"),
        ({"linear_probe": {}, "freeze": {"patterns": "head"}}, "nothing is left to train"),
    ],
    ids=str,
)
def test_a_tuner_that_trains_nothing_there_is_named(method: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        get_model(tiny("bert"), method)


def test_a_probed_head_can_be_kept_as_it_is(tmp_path: Any) -> None:
    """lp_ft trains the head alone, without other plugins; the stage after it leaves that head untouched."""
    model = get_model(tiny("bert"), {"lora": {}, "lp_ft": {}, "freeze": {"patterns": "head"}})
    arguments = {"train_dataset": rows_of(8), "data_collator": default_data_collator}
    peft_plus.fit(model, quiet(tmp_path, max_steps=1), **arguments)
    trained = [{depth for depth, _ in change.groups} for change in model.peft_plus.timeline]
    assert trained == [{4}, {1, 2, 3}]


def test_a_loaded_adapter_freezes_again(tmp_path: Any) -> None:
    model = get_model(tiny("bert"), {"lora": {}, "freeze": {"blocks": 2, "all_but": ["block 1"]}})
    model.save_pretrained(tmp_path)
    again = peft_plus.from_pretrained(tiny("bert"), tmp_path, is_trainable=True)
    assert again.peft_plus.plugins[0].settings() == {**model.peft_plus.plugins[0].settings(), "patterns": []}
    loop = EvaluatedLoop(again, steps=2).run()
    assert {depth_of(name, 3) for name in set.union(*loop.moved)} == {1, 3, 4}
