"""Passes served from a store, against the same passes computed: by the same model, without a cache, in a plain loop."""

from __future__ import annotations

import copy
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from peft_plus import MethodError
from peft_plus.layers import layer_map
from peft_plus.trunk import CacheOptions, TrainingData, TrunkCache
from peft_plus.trunk import segment as segment_module
from peft_plus.trunk import store as store_module
from peft_plus.trunk.choice import choose_depth, head_cost, step_ratio
from tests.models import EOS, NUM_CHOICES, batch, tiny

from .architectures import DROPOUT, NAMES, batch_of, frozen_below, model_of, padded_left, task_of
from .test_passes import assert_same_bits, in_front_of, step

CACHES: list[TrunkCache] = []


@pytest.fixture(autouse=True)
def _closes() -> Iterator[None]:
    yield
    while CACHES:
        CACHES.pop().close(finished=True)


def served(
    model: nn.Module, depth: int = 2, *, scratch: Path | None = None, data: TrainingData | None = None, **options: Any
) -> TrunkCache:
    """A cache that serves the passes of `model` up to a block."""
    layers = layer_map(model)
    cache = TrunkCache(model, layers, CacheOptions(**options), data=data or TrainingData(), scratch=scratch)
    CACHES.append(cache)
    cache.serve(depth)
    return cache


class Counted:
    """How many rows the second block really computes. (The first one may run for what it makes for all others.)"""

    def __init__(self, model: nn.Module) -> None:
        self.rows = 0
        block = model.get_submodule(layer_map(model).blocks[1][0])
        leaves = [module for module in block.modules() if any(True for _ in module.parameters(recurse=False))]
        own = [module for module in leaves if isinstance(module, nn.LayerNorm) or "Norm" in type(module).__name__]
        (own or leaves)[0].register_forward_hook(self._count)

    def _count(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.rows += len(output)


def batches_of(name: str, number: int = 3, **settings: Any) -> list[dict[str, Tensor]]:
    return [batch_of(name, seed=seed, **settings) for seed in range(number)]


def train(
    model: nn.Module,
    epochs: list[list[dict[str, Any]]],
    *,
    cache: TrunkCache | None = None,
    rest: Callable[[], Any] = lambda: None,
    **how: Any,
) -> list[dict[str, Tensor]]:
    """SGD over some epochs; the loss and the gradients of each step."""
    found = []
    parameters = dict(model.named_parameters())
    for number, epoch in enumerate(epochs):
        for place, inputs in enumerate(epoch):
            model.train()
            (cache.rest if cache else rest)()
            found.append(step(model, inputs, seed=100 * number + place, **how))
            with torch.no_grad():
                for name, gradient in found[-1].items():
                    if name:
                        parameters[name] -= 0.01 * gradient
        if cache is not None:
            cache.epoch_ends()
    return found


def assert_same_runs(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert_same_bits(a, b)


def assert_near(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]], bound: float = 1e-5) -> None:
    for a, b in zip(one, other, strict=True):
        for name in a:
            assert float((a[name] - b[name]).abs().max()) <= bound * max(1.0, float(b[name].abs().max()))


# ---- the same run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_epoch_from_the_store_is_the_computed_one_bit_for_bit(name: str) -> None:
    model = frozen_below(model_of(name), 2).train()
    plain = copy.deepcopy(model)
    epochs = [batches_of(name)] * 3
    counted, cache = Counted(model), served(model)
    cached = train(model, epochs, cache=cache)
    if name == "mixtral":  # its experts run on tokens that come to them, and padding goes elsewhere when it is zero
        assert_near(cached, train(plain, epochs), 1e-6)
    else:
        assert_same_runs(cached, train(plain, epochs))
    # Each row once, and the few rows of the first batch that are tried out.
    assert 12 < counted.rows <= 12 + 12


@pytest.mark.parametrize("name", list(DROPOUT))
def test_dropout_above_the_trunk_is_that_of_a_run_whose_trunk_is_in_eval_mode(name: str) -> None:
    """From the first step on: what runs in the trunk is known only after it ran once."""
    model = frozen_below(model_of(name, **DROPOUT[name]), 2).train()
    plain = copy.deepcopy(model)
    epochs = [batches_of(name, 2)] * 2
    resting = in_front_of(plain, 2, lambda: plain(**epochs[0][0]))
    resting += [plain.get_encoder()] if name == "bart" else []  # type: ignore[operator]

    def rest() -> None:
        for module in resting:
            module.training = False

    assert_same_runs(train(model, epochs, cache=served(model)), train(plain, epochs, rest=rest))


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5"])
def test_under_autocast_the_store_holds_what_autocast_computes(name: str) -> None:
    model = frozen_below(model_of(name), 2).train()
    plain = copy.deepcopy(model)
    epochs = [batches_of(name)] * 2
    cached = train(model, epochs, cache=served(model), precision=torch.bfloat16)
    assert_same_runs(cached, train(plain, epochs, precision=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_in_other_dtypes_are_stored_in_theirs(dtype: torch.dtype, tmp_path: Path) -> None:
    model = frozen_below(model_of("llama").to(dtype), 2).train()
    plain = copy.deepcopy(model)
    epochs = [batches_of("llama")] * 2
    cache = served(model, folder=str(tmp_path))
    assert_same_runs(train(model, epochs, cache=cache), train(plain, epochs))
    assert cache._store is not None
    assert cache._store.bytes == sum(int(b["attention_mask"].sum()) for b in epochs[0]) * 32 * dtype.itemsize


@pytest.mark.parametrize("task", ["MULTIPLE_CHOICE", "QUESTION_ANS", "TOKEN_CLS"])
def test_other_tasks_are_served_alike(task: str) -> None:
    model = frozen_below(tiny("bert", task), 2).train()
    plain = copy.deepcopy(model)
    epochs = [[batch("bert", task, seed=seed) for seed in range(2)]] * 2
    counted = Counted(model)
    assert_same_runs(train(model, epochs, cache=served(model)), train(plain, epochs))
    assert counted.rows <= (8 + 10) * (NUM_CHOICES if task == "MULTIPLE_CHOICE" else 1)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "opt", "vit", "modernbert", "deberta-v2"])
def test_in_other_batches_the_rows_are_found_and_the_run_is_the_same_up_to_rounding(name: str) -> None:
    model = frozen_below(model_of(name), 2).train()
    plain = copy.deepcopy(model)
    whole = batch_of(name, rows=12)
    epochs = []
    for seed in range(3):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
        epochs.append([{key: value[part] for key, value in whole.items()} for part in order.split(4)])
    counted, cache = Counted(model), served(model)
    assert_near(train(model, epochs, cache=cache), train(plain, epochs))
    assert 12 < counted.rows <= 12 + 12


def test_packed_rows_are_found_by_their_positions_too() -> None:
    model = frozen_below(model_of("llama", "CAUSAL_LM"), 2).train()
    plain = copy.deepcopy(model)
    packed = batch_of("llama", "CAUSAL_LM", rows=2)
    del packed["attention_mask"]
    one = {**packed, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]] * 2)}
    other = {**packed, "position_ids": torch.tensor([[0, 1, 0, 1, 2, 3, 4, 5]] * 2)}
    epochs = [[one, other]] * 2
    assert_same_runs(train(model, epochs, cache=served(model)), train(plain, epochs))


def test_rounded_to_bf16_losses_stay_within_a_ten_thousandth(tmp_path: Path) -> None:
    for name in ("bert", "llama"):
        model = lora(name=name)
        plain = copy.deepcopy(model)
        epochs = [batches_of(name)] * 2
        cache = served(model, folder=str(tmp_path / name), dtype="bf16")
        cached, computed = train(model, epochs, cache=cache), train(plain, epochs)
        losses = [torch.stack([found[""] for found in run]) for run in (cached, computed)]
        assert abs(float(losses[0].mean() - losses[1].mean())) < 1e-4
        assert float((losses[0] - losses[1]).abs().max()) < 5e-4
        assert any(not torch.equal(a[""], b[""]) for a, b in zip(cached, computed, strict=True))
        assert cache._store is not None
        assert cache._store.bytes == sum(int(b["attention_mask"].sum()) for b in epochs[0]) * 32 * 2


def test_the_first_steps_checks_draw_nothing_and_leave_no_gradient() -> None:
    model = frozen_below(model_of("bert", **DROPOUT["bert"]), 2).train()
    inputs = batch_of("bert")
    served(model)
    model.get_submodule(layer_map(model).blocks[2][0]).eval()
    torch.manual_seed(5)
    model(**inputs)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    model(**inputs)
    assert torch.equal(torch.get_rng_state(), after)
    assert all(p.grad is None for p in model.parameters())


# ---- padding -------------------------------------------------------------------------------------------------------

COUNTS = [("gpt2", True), ("bert", True), ("distilbert", True), ("bart", True), ("modernbert", False)]
COUNTS += [(name, False) for name in ("llama", "opt", "t5", "gemma3", "gpt-neox", "bloom")]
"""Whether positions are counted from the left edge, padding included. ModernBERT's rotate, OPT counts by the mask."""


def further(inputs: dict[str, Tensor], left: int, right: int = 0) -> dict[str, Tensor]:
    """The same rows, padded further."""
    width = inputs["attention_mask"].shape
    value = {"labels": -100}
    return {
        name: nn.functional.pad(tensor, (left, right), value=value.get(name, 0)) if tensor.shape == width else tensor
        for name, tensor in inputs.items()
    }


@pytest.mark.parametrize(("name", "counts"), COUNTS)
def test_padding_on_the_left_is_served_exactly_whoever_counts_positions(name: str, counts: bool) -> None:
    model = frozen_below(model_of(name), 2).train()
    plain = copy.deepcopy(model)
    epochs = [batches_of(name, left=True)] * 2
    counted, cache = Counted(model), served(model)
    assert_same_runs(train(model, epochs, cache=cache), train(plain, epochs))
    assert cache.padding.by_place is counts
    before, other = counted.rows, further(epochs[0][0], 3)
    assert_near([step(model, other)], [step(plain, other)])
    # Found again where neither positions move nor anything looks at the padding.
    assert (counted.rows > before) == (counts or name in ("gpt-neox", "bloom", "modernbert", "t5"))


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_in_half_precision_padding_on_the_left_is_served_exactly_too(name: str) -> None:
    model = frozen_below(model_of(name).bfloat16(), 2).train()
    plain = copy.deepcopy(model)
    epochs = [batches_of(name, left=True)] * 2
    cache = served(model)
    assert_same_runs(train(model, epochs, cache=cache), train(plain, epochs))
    assert cache.padding.by_place or name != "gpt2"  # elsewhere rounding may look like it


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt-neox", "bloom"])
def test_the_first_token_that_is_predicted_from_padding_is_predicted_from_the_same(name: str) -> None:
    """A causal model with padding on its left, and a label for its first token, as most collators make it."""
    model = frozen_below(model_of(name, "CAUSAL_LM"), 2).train()
    plain = copy.deepcopy(model)
    epochs = [batches_of(name, task="CAUSAL_LM", left=True)] * 2
    for inputs in epochs[0]:  # most use the end of a text as padding, whose embedding is not zero
        inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, EOS)
    cache = served(model)
    assert_same_runs(train(model, epochs, cache=cache), train(plain, epochs))
    assert cache.padding.matters[True]
    other = further(epochs[0][0], 2)
    assert_near([step(model, other)], [step(plain, other)])


def test_padding_on_the_left_does_not_count_where_nothing_is_predicted_from_it() -> None:
    """A classifier that reads the last token."""
    model = frozen_below(model_of("llama"), 2).train()
    cache = served(model)
    inputs = batch_of("llama", left=True)
    step(model, inputs)
    counted = Counted(model)
    step(model, further(inputs, 3))
    assert (cache.padding.matters, counted.rows) == ({True: False}, 0)


@pytest.mark.parametrize("task", ["QUESTION_ANS", "MULTIPLE_CHOICE"])
def test_a_head_that_looks_at_padding_gets_what_it_would_have_got(task: str) -> None:
    """Where an answer begins is chosen among all tokens, padding too."""
    model = frozen_below(tiny("bert", task), 2).train()
    plain = copy.deepcopy(model)
    inputs = batch("bert", task)
    if task == "MULTIPLE_CHOICE":  # with padding on the left BERT reads it as its first token
        flat = {name: value.flatten(0, 1) for name, value in inputs.items() if name != "labels"}
        left = {name: value.view(4, NUM_CHOICES, -1) for name, value in padded_left(flat).items()}
        inputs = {**left, "labels": inputs["labels"]}
        other = {n: nn.functional.pad(v, (2, 0)) if v.dim() == 3 else v for n, v in inputs.items()}
    else:
        other = further(inputs, 0, 2)
    epochs = [[inputs, other]] * 2
    cache = served(model)
    assert_same_runs(train(model, epochs, cache=cache), train(plain, epochs))
    assert cache.padding.matters == {task == "MULTIPLE_CHOICE": True}


def test_a_trunk_that_mixes_padding_in_is_served_for_rows_that_are_padded_alike() -> None:
    """As convolutions do that do not know the mask."""
    model = frozen_below(model_of("bert"), 2).train()
    block = model.get_submodule(layer_map(model).blocks[0][0])
    plain = copy.deepcopy(model)
    for one in (block, plain.get_submodule(layer_map(model).blocks[0][0])):
        attention = one.get_submodule("attention")  # it does not run when the block is skipped
        attention.register_forward_hook(
            lambda module, args, output: (output[0] + output[0].mean(1, keepdim=True), *output[1:])
        )
    inputs = batch_of("bert")
    epochs = [[inputs, further(inputs, 0, 2)]] * 2
    cache = served(model)
    assert_same_runs(train(model, epochs, cache=cache), train(plain, epochs))
    assert cache.padding.matters == {False: True}


def test_padding_that_comes_later_is_looked_at_when_it_comes() -> None:
    model = frozen_below(tiny("bert", "QUESTION_ANS"), 2).train()
    plain = copy.deepcopy(model)
    padded = batch("bert", "QUESTION_ANS")
    full = {**padded, "attention_mask": torch.ones(4, 8, dtype=torch.long)}
    epochs = [[full, padded, further(padded, 0, 1)]] * 2
    cache = served(model)
    assert_same_runs(train(model, epochs, cache=cache), train(plain, epochs))
    assert cache.padding.matters == {False: True}


# ---- a store that is found again -----------------------------------------------------------------------------------


def lora(seed: int = 0, *, name: str = "bert", change: Callable[[nn.Module], Any] = lambda _: None) -> nn.Module:
    """LoRA as it begins, with B = 0, above two frozen blocks."""
    base = model_of(name)
    change(base)
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", r=2))
    depths = layer_map(model).depth
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(depths[parameter_name] > 2)
    return model.train()


def new_rows(model: nn.Module, folder: Path, *, depth: int = 2, precision: Any = None, **options: Any) -> int:
    """How many rows a run adds to the stores in a folder."""
    before = sum(file.stat().st_size for file in folder.rglob("*.rows"))
    cache = served(model, depth, folder=str(folder), **options)
    train(model, [batches_of("bert", 2)], cache=cache, precision=precision)
    width = 32 * (2 if options.get("dtype") == "bf16" else 4)
    cache.close(finished=True)
    after = sum(file.stat().st_size for file in folder.rglob("*.rows"))
    return round((after - before) / width)


ALL = sum(int(inputs["attention_mask"].sum()) for inputs in batches_of("bert", 2))


def test_another_run_finds_everything_also_with_another_seed(tmp_path: Path) -> None:
    assert new_rows(lora(), tmp_path) == ALL
    assert new_rows(lora(), tmp_path) == 0
    assert new_rows(lora(seed=1), tmp_path) == 0  # A differs, and B = 0 makes nothing of it
    used = lora(seed=2)
    used(**batch_of("bert"))  # in which transformers writes the kind of the problem into the config
    assert new_rows(used, tmp_path) == 0
    assert len(list(tmp_path.iterdir())) == 1


def changes() -> dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]]:
    def weight(base: nn.Module) -> None:
        with torch.no_grad():
            base.get_parameter("bert.encoder.layer.1.output.dense.bias")[3] += 1e-6

    def embedding(base: nn.Module) -> None:
        with torch.no_grad():
            base.get_parameter("bert.embeddings.word_embeddings.weight")[0, 0] += 1e-6

    def at_work() -> nn.Module:
        model = lora()
        with torch.no_grad():
            model.get_parameter(
                "base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.default.weight"
            ).fill_(1e-6)
        return model

    def epsilon(base: Any) -> None:
        base.config.layer_norm_eps = 1e-11

    return {
        "a weight": (lambda: lora(change=weight), {}),
        "an embedding": (lambda: lora(change=embedding), {}),
        "an adapter at work": (at_work, {}),
        "a setting": (lambda: lora(change=epsilon), {}),
        "k": (lora, {"depth": 1}),
        "the dtype of the store": (lora, {"dtype": "bf16"}),
        "the dtype of the model": (lambda: lora(change=lambda base: base.double()), {}),
        "autocast": (lora, {"precision": torch.bfloat16}),
        "the attention": (lambda: lora(change=lambda base: base.set_attn_implementation("eager")), {}),
    }


@pytest.mark.parametrize("what", list(changes()))
def test_another_run_does_not_find_what_depends_on_something_else(what: str, tmp_path: Path) -> None:
    new_rows(lora(), tmp_path)
    make, settings = changes()[what]
    wanted = 2 * ALL if what == "the dtype of the model" else ALL
    assert new_rows(make(), tmp_path, **settings) == wanted
    assert len(list(tmp_path.iterdir())) == 2


def test_a_change_above_the_trunk_and_in_the_head_is_found(tmp_path: Path) -> None:
    def above(base: Any) -> None:
        with torch.no_grad():
            base.get_parameter("bert.encoder.layer.2.output.dense.bias").fill_(1.0)
            base.classifier.weight.fill_(1.0)
        base.config.id2label = {0: "a", 1: "b", 2: "c"}

    new_rows(lora(), tmp_path)
    assert new_rows(lora(change=above), tmp_path) == 0


def test_which_adapter_is_active_counts_where_adapters_work_in_the_trunk(tmp_path: Path) -> None:
    for name in ("default", "other"):
        torch.manual_seed(0)
        config = LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
        model = get_peft_model(model_of("bert"), config)
        model.add_adapter("other", config)
        model.set_adapter(name)
        depths = layer_map(model).depth
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and depths[parameter_name] > 2)
        assert new_rows(model.train(), tmp_path) == ALL


@pytest.mark.parametrize("how", ["index", "rows", "bit"])
def test_a_store_that_was_torn_between_two_runs_is_computed_again_and_the_run_is_the_same(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = train(lora(), [batches_of("bert")] * 2)
    cache = served(model := lora(), folder=str(tmp_path))
    assert_same_runs(train(model, [batches_of("bert")] * 2, cache=cache), plain)
    cache.close(finished=True)
    file = next(tmp_path.rglob("*.index" if how == "index" else "*.rows"))
    content = bytearray(file.read_bytes())
    if how == "bit":
        content[40] ^= 1
    file.write_bytes(bytes(content) if how == "bit" else bytes(content[:-9]))
    cache = served(model := lora(), folder=str(tmp_path))
    assert_same_runs(train(model, [batches_of("bert")] * 2, cache=cache), plain)
    assert "computed again" in caplog.text


def test_features_of_something_else_under_the_right_names_are_refused(tmp_path: Path) -> None:
    """With valid checksums: what a fault in the names or in a driver would leave."""
    cache = served(model := lora(), folder=str(tmp_path))
    inputs = batch_of("bert")
    with pytest.MonkeyPatch.context() as patch:
        add = store_module.FeatureStore.add
        patch.setattr(store_module.FeatureStore, "add", lambda self, keys, rows: add(self, keys, [r + 1 for r in rows]))
        with pytest.raises(MethodError, match=r"are not those that this model computes\. Delete that folder"):
            model(**inputs)
    cache.close(finished=True)
    served(model := lora(), folder=str(tmp_path))
    with pytest.raises(MethodError, match="Delete that folder"):
        model(**inputs)


def test_the_weights_of_the_trunk_may_be_changed_by_somebody_and_are_noticed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = lora()
    plain = copy.deepcopy(model)
    cache = served(model, scratch=tmp_path / "scratch")
    inputs = batch_of("bert")
    name = "base_model.model.bert.encoder.layer.0.output.dense.bias"
    cache.step_begins()
    step(model, inputs)
    cache.step_begins()
    for one in (model, plain):
        with torch.no_grad():
            one.get_parameter(name).add_(0.1)
    cache.step_begins()
    assert "The frozen blocks 1 to 2 were changed" in caplog.text
    assert_same_bits(step(model, inputs), step(plain, inputs))
    caplog.clear()
    for _ in range(2):
        with torch.no_grad():
            model.get_parameter(name).copy_(plain.get_parameter(name))  # the same again
        cache.step_begins()
    assert caplog.text == ""
    assert cache._store is not None


# ---- trouble while it runs -----------------------------------------------------------------------------------------


def test_a_store_without_a_name_is_removed_when_the_run_has_finished(tmp_path: Path) -> None:
    for finished in (True, False):
        model = lora()
        cache = served(model, scratch=tmp_path / "output" / "_trunk")
        train(model, [batches_of("bert")], cache=cache)
        cache.close(finished=finished)
        assert (tmp_path / "output" / "_trunk").exists() != finished
    cache = served(model := lora())
    train(model, [batches_of("bert", 1)], cache=cache)
    base = cache.folder.path
    assert base.is_dir()
    cache.close(finished=False)  # nobody would find it again
    assert not base.exists()


def test_nothing_is_left_where_nothing_was_stored(tmp_path: Path) -> None:
    for finished in (True, False):
        model = lora()
        before = vars(model.get_base_model()).copy()  # type: ignore[operator]
        cache = served(model, scratch=tmp_path / "_trunk")
        cache.close(finished=finished)
        assert list(tmp_path.iterdir()) == []
        assert vars(model.get_base_model()) == before  # type: ignore[operator]


def test_a_store_that_another_block_needed_stays_until_a_checkpoint_after_it_is_whole(tmp_path: Path) -> None:
    """Else a run that goes on from the checkpoint before would compute it anew, in other batches."""
    model = frozen_below(model_of("bert"), 2).train()
    cache = served(model, scratch=tmp_path / "_trunk")
    step(model, batch_of("bert"))
    cache.seal()
    cache.serve(1)
    step(model, batch_of("bert"))
    assert len(list((tmp_path / "_trunk").iterdir())) == 2
    cache.seal()  # a checkpoint begins, and may never be finished
    assert len(list((tmp_path / "_trunk").iterdir())) == 2
    cache.seal()
    assert len(list((tmp_path / "_trunk").iterdir())) == 1
    step(model, batch_of("bert", seed=1))
    cache.serve(0)
    cache.close(finished=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("trouble", ["folder deleted", "disk full", "file cut off", "limit"])
def test_trouble_with_the_disk_changes_no_bit_of_the_run(
    trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = train(lora(), [batches_of("bert", 4)] * 3)
    model = lora()
    limit = {"limit_gb": 60 * 32 * 4 / 1e9} if trouble == "limit" else {}
    cache = served(model, folder=str(tmp_path / "f"), **limit)

    class Troubled(list[dict[str, Tensor]]):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            for place, inputs in enumerate(batches_of("bert", 4)):
                if place == 2:
                    make_trouble()
                yield inputs

    def make_trouble() -> None:
        match trouble:
            case "folder deleted":
                shutil.rmtree(tmp_path / "f", ignore_errors=True)
            case "file cut off":
                for file in (tmp_path / "f").rglob("*.rows"):
                    os.truncate(file, 100)
            case "disk full":

                def fail(self: Any, key: bytes, array: Any) -> int:
                    raise OSError(28, "No space left on device")

                monkeypatch.setattr(segment_module.Segment, "append", fail)

    assert_same_runs(train(model, [Troubled()] * 3, cache=cache), plain)
    cache.close(finished=True)
    wanted = {
        "folder deleted": "was deleted meanwhile",
        "disk full": "No more features are stored: [Errno 28] No space left on device",
        "file cut off": "was changed by somebody",
        "limit": "has reached its limit of",
    }
    assert wanted[trouble] in caplog.text


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = lora()
    with pytest.raises(MethodError, match=r"trunk_cache cannot write its store: .*file.*Give another folder="):
        served(model, folder=str(tmp_path / "file"))
    assert "forward" not in vars(model.get_base_model())  # type: ignore[operator]


def data_of(number: int, length: int | None = None) -> list[dict[str, Any]]:
    """Rows of 1, 2, 3, … tokens, or all padded to one length."""
    return [{"input_ids": [5] * (length or 1 + i), "labels": 0} for i in range(number)]


def test_a_store_that_would_be_too_large_is_refused_at_the_first_batch(tmp_path: Path) -> None:
    wanted = sum(range(1, 101)) * 32 * 4  # bytes
    for limit, fits in ((wanted + 1, True), (wanted - 1, False)):
        cache = served(
            model := lora(), folder=str(tmp_path), limit_gb=limit / 1e9, data=TrainingData(dataset=data_of(100))
        )
        if fits:
            step(model, batch_of("bert"))
        else:
            with pytest.raises(MethodError, match=r"would store 646\.4 kB, more than limit_gb=0\.000646.*dtype='bf16'"):
                step(model, batch_of("bert", seed=1))
        cache.close(finished=False)
        shutil.rmtree(tmp_path)


def test_it_is_said_before_how_much_will_be_stored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def said(dataset: Any) -> str:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            cache = served(model := lora(), scratch=tmp_path / "_trunk", data=TrainingData(dataset=dataset))
            step(model, batch_of("bert"))  # 28 tokens in 4 rows
            cache.close(finished=True)
        return next(m for m in caplog.messages if m.startswith("trunk_cache stores"))

    assert "the output of block 2: 55 tokens × 128 bytes = 7.0 kB, in " in said(data_of(10))
    # Where each example was padded to one length, and where lengths are not known, the first batch tells.
    assert "72 tokens × 128 bytes = 9.2 kB, as far as the first batch tells, in" in said(data_of(10, 8))

    class Made:
        """A dataset that makes its rows when it is asked."""

        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> Any:
            raise AssertionError("nobody asked for rows")

    assert "72 tokens × 128 bytes" in said(Made())

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            raise AssertionError("nobody asked for rows")

    assert said(Stream()).startswith("trunk_cache stores 128 bytes per token in ")


def test_a_store_larger_than_the_free_space_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    data = TrainingData(dataset=[{"input_ids": range(n)} for n in (1_000_000, 1)])
    served(model := lora(), folder=str(tmp_path), data=data)
    with pytest.raises(MethodError, match=r"would store 128\.0 MB in .*, where 104\.9 MB are free"):
        step(model, batch_of("bert"))


# ---- data that change ----------------------------------------------------------------------------------------------


def test_data_that_change_are_told_of_after_the_second_epoch_and_the_trunk_stays_at_rest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = "bert"
    model = frozen_below(model_of(name, **DROPOUT[name]), 2).train()
    plain = copy.deepcopy(model)
    epochs = [[batch_of(name, seed=10 * epoch + place) for place in range(2)] for epoch in range(4)]
    resting = in_front_of(plain, 2, lambda: plain(**epochs[0][0]))

    def rest() -> None:
        for module in resting:
            module.training = False

    cache = served(model, scratch=tmp_path / "_trunk")
    told = []

    class Told(list[dict[str, Tensor]]):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            told.append("saves nothing" in caplog.text)
            return super().__iter__()

    assert_same_runs(train(model, [Told(e) for e in epochs], cache=cache), train(plain, epochs, rest=rest))
    assert told == [False, False, True, True]
    assert "8 of 8 examples of this epoch were never seen before" in caplog.text


def test_a_run_that_goes_on_in_the_middle_of_an_epoch_is_not_taken_for_data_that_change(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = lora()
    cache = served(model, 1)
    cache.serve(2, whole=False)
    epoch = batches_of("bert", 4)
    train(model, [epoch[3:], epoch, epoch, epoch], cache=cache)
    assert "saves nothing" not in caplog.text
    assert cache.depth == 2


# ---- passes that are none of its business --------------------------------------------------------------------------


def test_evaluation_computes_all_and_stores_nothing() -> None:
    model = lora()
    plain = copy.deepcopy(model)
    cache = served(model)
    step(model, batch_of("bert"))
    assert cache._store is not None
    before = len(cache._store)
    other = batch_of("bert", seed=5)
    with torch.no_grad():
        for mode in (True, False):
            assert torch.equal(model.train(mode)(**other).logits, plain.train(mode)(**other).logits)
    assert torch.equal(model.eval()(**other).logits, plain.eval()(**other).logits)
    assert len(cache._store) == before


def test_a_copy_of_a_served_model_runs_on_its_own_weights() -> None:
    """As an average of weights is kept by some callbacks; a copied `forward` would still run the original."""
    for tuner in ("lora", "full"):
        model = frozen_below(model_of("bert"), 2, tuner).train()
        served(model)
        inputs = batch_of("bert")
        step(model, inputs)
        other = copy.deepcopy(model)
        fresh = frozen_below(model_of("bert"), 2, tuner).train()
        with torch.no_grad():
            for a, b in zip(other.parameters(), fresh.parameters(), strict=True):
                a.mul_(0.5)
                b.mul_(0.5)
        assert_same_bits(step(other, inputs), step(fresh, inputs))


def test_lifted_passes_run_the_trunk_themselves() -> None:
    model = lora()
    cache = served(model)
    inputs = batch_of("bert")
    step(model, inputs)
    counted = Counted(model)
    with cache.lifted():
        lifted = step(model, inputs)
    assert counted.rows == 4
    assert_same_bits(step(model, inputs), lifted)
    assert counted.rows == 4


def test_a_forward_that_was_wrapped_meanwhile_stays_wrapped_and_works() -> None:
    model: Any = frozen_below(model_of("bert"), 2, "full").train()
    cache = served(model)
    inner, calls = model.forward, []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(*args, **kwargs)

    model.forward = wrapped
    step(model, batch_of("bert"))
    cache.close(finished=True)
    counted = Counted(model)
    step(model, batch_of("bert"))
    assert (model.forward, len(calls), counted.rows) == (wrapped, 2, 4)


# ---- what it refuses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("bert", "output_hidden_states", True),
        ("bert", "output_attentions", True),
        ("mixtral", "output_router_logits", True),
        ("opt", "layerdrop", 0.1),
        ("bart", "encoder_layerdrop", 0.1),
    ],
)
def test_a_model_that_needs_all_blocks_is_refused_before_anything_runs(name: str, setting: str, value: Any) -> None:
    kwargs = {"attn_implementation": "eager"} if setting == "output_attentions" else {}
    model = frozen_below(model_of(name, **{setting: value}, **kwargs), 2)
    with pytest.raises(MethodError, match=rf"config\.{setting}={value}"):
        served(model)
    assert len(CACHES) == 0


def test_layerdrop_in_the_decoder_is_no_hindrance() -> None:
    model = frozen_below(model_of("bart", decoder_layerdrop=0.2), 2).train()
    plain = copy.deepcopy(model)
    epochs = [batches_of("bart")] * 2
    assert_same_runs(train(model, epochs, cache=served(model)), train(plain, epochs))


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_a_pass_that_asks_for_the_trunks_inside_is_refused(name: str) -> None:
    served(model := lora())
    with pytest.raises(MethodError, match=rf"this pass sets '{name}'"):
        model(**batch_of("bert"), **{name: True})


@pytest.mark.parametrize("tokens", [4, 8])
def test_xlnet_whose_rows_come_second_is_refused(tokens: int) -> None:
    """With as many rows as tokens each row would be taken for a token of all."""
    model = frozen_below(tiny("xlnet", mem_len=0), 2).train()
    served(model)
    inputs = batch("xlnet", length=tokens)
    with pytest.raises(MethodError, match=r"expected block 2 to put out|makes something else of an example when"):
        model(**inputs)


def test_a_model_without_blocks_has_no_trunk() -> None:
    with pytest.raises(ValueError, match="no list of blocks"):
        layer_map(tiny("albert"))


def test_a_trunk_in_which_examples_feel_each_other_is_refused() -> None:
    model = frozen_below(model_of("bert"), 2).train()
    block = model.get_submodule(layer_map(model).blocks[0][0])
    block.register_forward_hook(lambda module, args, output: output + output.mean(0, keepdim=True))
    served(model)
    with pytest.raises(MethodError, match="makes something else of an example when it stands in another batch"):
        model(**batch_of("bert"))


@pytest.mark.parametrize("how", ["differs", "fails"])
def test_upper_blocks_that_use_more_than_the_trunks_output_are_refused(how: str) -> None:
    model = frozen_below(model_of("bert"), 2).train()
    names = [row[0] for row in layer_map(model).blocks]
    kept: list[Tensor] = []
    attention = model.get_submodule(f"{names[0]}.attention")  # which does not run when the block is skipped
    attention.register_forward_hook(lambda module, args, output: kept.append(output[0]))
    model.get_submodule("base_model.model.bert.embeddings").register_forward_pre_hook(lambda *_: kept.clear())

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + (kept[0] if kept or how == "fails" else 0)

    model.get_submodule(names[2]).register_forward_hook(add)
    served(model)
    says = "gives another" if how == "differs" else "fails .IndexError: list index out of range"
    with pytest.raises(MethodError, match=f"this BertForSequenceClassification {says}.*Train without trunk_cache"):
        model(**batch_of("bert"))


@pytest.mark.parametrize("given", [{"inputs_embeds": torch.randn(4, 8, 32, requires_grad=True)}])
def test_embeddings_that_are_learnt_are_refused(given: dict[str, Any]) -> None:
    served(model := lora())
    inputs = {"attention_mask": batch_of("bert")["attention_mask"], "labels": torch.zeros(4, dtype=torch.long)}
    with pytest.raises(MethodError, match="cannot tell the examples of a batch apart: 'inputs_embeds' carries a grad"):
        model(**inputs, **given)


# ---- the data, before training -------------------------------------------------------------------------------------


def test_the_data_are_filled_in_from_the_longest_to_the_shortest() -> None:
    seen: list[list[int]] = []

    def loader(order: Any, rows: int) -> Any:
        indices = list(order)
        seen.extend(indices[i : i + rows] for i in range(0, len(indices), rows))
        return []

    lengths = [3, 9, 9, 1, 700]
    data = TrainingData(dataset=[{"input_ids": [5] * n} for n in lengths], loader=loader)
    assert (data.examples, data.tokens) == (5, 722)
    data.batches()
    assert seen == [[4, 1, 2, 0, 3]]
    seen.clear()
    TrainingData(dataset=data_of(100, 3000), loader=loader).batches()
    assert {len(rows) for rows in seen} == {10}
    assert sorted(index for rows in seen for index in rows) == list(range(100))


def test_looking_at_lengths_draws_no_random_number() -> None:
    class Row(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            return [5] * int(torch.randint(1, 9, ()))

    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert TrainingData(dataset=[Row(input_ids=0)] * 3).tokens is not None
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stream_cannot_be_filled_in_before() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(())

    for data in (TrainingData(dataset=Stream()), TrainingData()):
        with pytest.raises(MethodError, match=r"fill='before'.*read as a stream\. Use fill='first_epoch'"):
            data.batches()


# ---- which blocks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ahead", "settings", "depth"),
    [
        # Frozen for ever: all of it, if there is more than the pass that fills the store.
        ([(0, 5)], {"max_steps": 30}, 4),
        ([(0, 5)], {"max_steps": 10}, 0),
        ([(0, 5)], {"max_steps": 10, "paid": True}, 4),
        ([(0, 5)], {"max_steps": 10, "steps_per_epoch": 0}, 4),
        ([(0, 1)], {"max_steps": 30}, 0),
        ([(0, 0)], {"max_steps": 30}, 0),
        # Block 4 thaws at step 15: 4 · (15 − 10) = 20 block passes saved against 3 · (30 − 10) = 60.
        ([(0, 5), (15, 4)], {"max_steps": 30}, 3),
        # Block 2 at 20, block 1 at 25: 4 · (15 − 10) = 20, 3 · (20 − 10) = 30, 1 · (25 − 10) = 15.
        ([(0, 5), (15, 4), (20, 2), (25, 1)], {"max_steps": 30}, 3),
        # From step 10 on, with nothing in a store: 3 · (20 − 10 − 10) = 0, 1 · (25 − 10 − 10) = 5.
        ([(10, 5), (15, 4), (20, 2), (25, 1)], {"step": 10, "max_steps": 30}, 1),
        # What is served already costs nothing more: 3 · (20 − 10) = 30.
        ([(10, 5), (15, 4), (20, 2), (25, 1)], {"step": 10, "max_steps": 30, "serving": 3}, 3),
        # Only the first store is paid for.
        ([(10, 5), (15, 4), (20, 2), (25, 1)], {"step": 10, "max_steps": 30, "serving": 3, "paid": True}, 3),
        ([(20, 2), (25, 1)], {"step": 20, "max_steps": 30, "serving": 3, "paid": True}, 0),
        # An encoder whose first block lies at depth 3, beside a decoder of four.
        ([(0, 3)], {"max_steps": 30, "blocks": lambda depth: max(0, depth - 2)}, 0),
        ([(0, 5)], {"max_steps": 30, "blocks": lambda depth: max(0, depth - 2)}, 4),
    ],
)
def test_the_blocks_that_save_most_until_they_thaw(ahead: Any, settings: dict[str, Any], depth: int) -> None:
    assert choose_depth(ahead, **{"step": 0, "steps_per_epoch": 10, **settings}) == depth


def test_the_best_choice_is_the_best_of_all() -> None:
    """Against counting the block passes of every choice, step by step."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(200):
        thaws = torch.randint(0, 40, (5,), generator=draw).sort(descending=True).values.tolist()  # of blocks 1 to 5
        ahead, low = [], 7
        for at in sorted({0, *thaws}):
            new = min([block for block, thaw in enumerate(thaws, start=1) if thaw <= at], default=6)
            if new != low:
                ahead.append((at, new))
                low = new

        def saved(depth: int, thaws: list[int] = thaws) -> int:
            return sum(depth for step in range(40) if step >= 8 and step < min(thaws[:depth], default=40))

        chosen = choose_depth(ahead, step=0, max_steps=40, steps_per_epoch=8)
        best = max(saved(depth) for depth in range(1, 6))
        assert (saved(chosen) if chosen else 0) == best


def test_how_long_a_step_takes() -> None:
    """By hand: of three blocks one trains. Forward 3 and backward 2 for it (inputs and weights count as one each)."""
    assert step_ratio(0.0, 0.0) == 1.0
    assert step_ratio(1.0, 0.5) == pytest.approx(1 / 2)
    assert step_ratio(2 / 3, 0.0) == pytest.approx((1 + 1) / (3 + 1))
    model = tiny("llama", "CAUSAL_LM")
    blocks = sum(p.numel() for n, p in model.named_parameters() if "layers" in n)
    assert head_cost(model, layer_map(model)) == pytest.approx(100 * 32 / blocks)
    assert head_cost(tiny("bert"), layer_map(tiny("bert"))) == 0.0


def test_every_task_here_is_known() -> None:
    assert {task_of(name) for name in NAMES} == {"SEQ_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM", "IMAGE_CLS"}


# ---- where stores lie ----------------------------------------------------------------------------------------------


def test_a_temporary_store_moves_beside_the_checkpoints_and_goes_on_there(tmp_path: Path) -> None:
    epochs = [batches_of("bert")] * 2
    plain = train(lora(), [*epochs, *epochs])
    model = lora()
    cache, place = served(model), tmp_path / "out" / "_trunk"
    before = cache.folder.path
    found = train(model, epochs, cache=cache)
    cache.seal()
    cache.move(place)
    assert not before.exists()
    assert list(place.rglob("*.index"))
    counted = Counted(model)
    found += train(model, epochs, cache=cache)
    assert counted.rows == 0
    assert_same_runs(found[:6], plain[:6])
    cache.close(finished=True)
    assert not place.exists()


def test_a_place_that_cannot_take_a_temporary_store_leaves_it_where_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    model = lora()
    cache = served(model)
    step(model, batch_of("bert"))
    cache.seal()
    cache.move(tmp_path / "file" / "_trunk")
    assert "could not be kept beside the checkpoints" in caplog.text
    counted = Counted(model)
    step(model, batch_of("bert"))
    assert counted.rows == 0
