"""With activation checkpointing, what is frozen below all that trains is out of the graph, and nothing else changes."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from transformers import BitsAndBytesConfig

import peft_plus
from peft_plus import Session, engine
from peft_plus.forward import second_pass
from peft_plus.graph_cut import cut_graph
from peft_plus.layers import layer_map
from tests.models import CONFIGS, batch, default_task, has_task, tiny
from tests.training import quiet

DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
    "deberta-v2": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
    "gpt2": {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
    "llama": {"attention_dropout": 0.1},
    "t5": {"dropout_rate": 0.1},
    "bart": {"dropout": 0.1, "attention_dropout": 0.1, "encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5},
    "opt": {"dropout": 0.1, "layerdrop": 0.5},
    "vit": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
}
BLOCKS = 3


def task_of(name: str) -> str:
    return next((t for t in ("SEQ_2_SEQ_LM",) if has_task(name, t)), default_task(name))


def frozen_below(name: str, depth: int, tuner: str = "lora", **overrides: Any) -> nn.Module:
    """A tiny model in train mode with dropout, of which blocks from `depth` on and the head train."""
    model = tiny(name, task_of(name), **{**DROPOUT.get(name, {}), **overrides})
    if tuner != "full":
        transposed = {"fan_in_fan_out": name == "gpt2"}  # or PEFT warns
        peft = {
            "lora": {"r": 2, "init_lora_weights": False, **transposed},
            "ia3": {"init_ia3_weights": False, "feedforward_modules": []},
        }
        kind = {"lora": LoraConfig, "ia3": peft_plus.IA3Config}[tuner]
        torch.manual_seed(0)
        targets = ["c_attn"] if name == "gpt2" else "all-linear"
        model = get_peft_model(model, kind(target_modules=targets, **peft[tuner]))  # type: ignore[arg-type]
    depths = layer_map(model).depth
    for parameter_name, parameter in model.named_parameters():
        tuned = tuner == "full" or parameter.requires_grad or depths[parameter_name] > BLOCKS
        parameter.requires_grad_(tuned and depths[parameter_name] >= depth)
    return model.train()


def checkpointing(model: nn.Module, *, reentrant: bool = False, **settings: Any) -> nn.Module:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant}, **settings)  # type: ignore[operator]
    return model


def gradients(model: nn.Module, inputs: dict[str, Tensor], times: int = 3) -> list[Any]:
    """Losses and gradients of some passes, each with the same random draws."""
    found: list[Any] = []
    for seed in range(times):
        torch.manual_seed(seed)
        loss = model(**inputs).loss
        loss.backward()
        found.append({"": loss.detach().clone()})
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[-1][name] = parameter.grad.clone()
                parameter.grad = None
    return found


def assert_same(one: list[Any], other: list[Any]) -> None:
    assert [list(step) for step in one] == [list(step) for step in other]
    assert [n for a, b in zip(one, other, strict=True) for n in a if not torch.equal(a[n], b[n])] == []


@contextmanager
def graphs(model: nn.Module) -> Any:
    """(depth, stack) of the blocks that put out something that requires a gradient → how often they did."""
    paired = bool(model.config.is_encoder_decoder)  # type: ignore[union-attr]
    found: Counter[tuple[int, str]] = Counter()
    handles = []
    for depth, row in enumerate(layer_map(model).blocks, start=1):
        for name in row:

            def look(module: nn.Module, args: Any, output: Any, depth: int = depth, name: str = name) -> None:
                hidden = output if isinstance(output, Tensor) else output[0]
                if hidden.requires_grad:
                    found[depth, "decoder" if paired and "decoder" in name else "encoder"] += 1

            handles.append(model.get_submodule(name).register_forward_hook(look))
    yield found
    for handle in handles:
        handle.remove()


class _Kept:
    """A tensor that autograd keeps, for as long as it does."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(step: Callable[[], Any]) -> int:
    """How much autograd keeps between forward and backward, parameters aside."""
    alive: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        alive.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        output = step()  # held until everything is counted
    tensors = [kept.tensor for kept in alive if not isinstance(kept.tensor, nn.Parameter)]
    assert output is not None
    return sum({(t.data_ptr(), t.numel()): t.numel() * t.element_size() for t in tensors}.values())


CHECKPOINTED = [name for name in CONFIGS if name not in ("albert", "xlnet", "resnet", "convnext")]
"""Those that have blocks of their own, and that transformers can checkpoint."""


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_losses_and_gradients_are_those_of_the_uncut_run_bit_for_bit(name: str, reentrant: bool) -> None:
    model = checkpointing(frozen_below(name, BLOCKS), reentrant=reentrant)
    inputs = batch(name, task_of(name))
    if name == "vit" and reentrant:  # transformers hooks no pixels, so that its frozen blocks leave no gradients at all
        expected = gradients(checkpointing(frozen_below(name, BLOCKS)), inputs)
    else:
        expected = gradients(model, inputs)
    assert sum("lora" in n for n in expected[0]) > 0
    restore = cut_graph(model)
    with graphs(model) as kept:
        assert_same(gradients(model, inputs), expected)
    assert {depth for depth, stack in kept if stack == "encoder"} <= {BLOCKS}
    restore()
    if name != "vit":
        with graphs(model) as kept:
            assert_same(gradients(model, inputs), expected)
        assert (1, "encoder") in kept


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("tuner", ["full", "ia3"])
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "bart"])
def test_other_tuners_get_the_same_bits(name: str, tuner: str, reentrant: bool) -> None:
    model = checkpointing(frozen_below(name, 2, tuner), reentrant=reentrant)
    inputs = batch(name, task_of(name))
    expected = gradients(model, inputs)
    cut_graph(model)
    assert_same(gradients(model, inputs), expected)


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_so_does_what_trains_on_a_4_bit_base(name: str, reentrant: bool, tmp_path: Any) -> None:
    tiny(name).save_pretrained(tmp_path)
    bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["classifier", "score"],
    )
    base = type(tiny(name)).from_pretrained(tmp_path, quantization_config=bits, **DROPOUT[name])
    lora = LoraConfig(
        target_modules=["query", "q_proj", "dense", "o_proj"],
        layers_to_transform=[2],
        task_type="SEQ_CLS",
        init_lora_weights=False,
    )
    model = checkpointing(get_peft_model(base, lora).train(), reentrant=reentrant)
    expected = gradients(model, batch(name))
    cut_graph(model)
    with graphs(model) as kept:
        assert_same(gradients(model, batch(name)), expected)
    assert {depth for depth, _ in kept} == {3}


def graphs_when_cut(model: nn.Module, name: str, *, freeze: str) -> Any:
    """The `graphs` of a model whose parameters with `freeze` in their name rest; cut, it has the same gradients."""
    for parameter_name, parameter in model.named_parameters():
        if freeze in parameter_name:
            parameter.requires_grad_(False)
    inputs = batch(name, task_of(name))
    expected = gradients(model, inputs)
    cut_graph(model)
    with graphs(model) as kept:
        assert_same(gradients(model, inputs), expected)
    return kept


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_frozen_decoder_stays_in_the_graph_while_anything_in_the_encoder_trains(name: str, reentrant: bool) -> None:
    model = checkpointing(frozen_below(name, BLOCKS, encoder_layerdrop=0.0, decoder_layerdrop=0.0), reentrant=reentrant)
    kept = graphs_when_cut(model, name, freeze="decoder")
    assert set(kept) == {(3, "encoder"), (1, "decoder"), (2, "decoder"), (3, "decoder")}


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_wholly_frozen_encoder_is_cut_whatever_trains_in_the_decoder(name: str) -> None:
    model = checkpointing(frozen_below(name, 1, encoder_layerdrop=0.0, decoder_layerdrop=0.0))
    kept = graphs_when_cut(model, name, freeze="encoder.")
    assert {stack for _, stack in kept} == {"decoder"}


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_no_more_activations_are_kept_than_those_of_the_top_blocks(name: str, reentrant: bool) -> None:
    inputs = batch(name, rows=8)

    def kept(depth: int, blocks: int) -> int:
        """Of a model of `blocks` blocks, of which those from `depth` on train."""
        model = frozen_below(name, depth, num_hidden_layers=blocks)
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "lora" in parameter_name)
        cut_graph(checkpointing(model, reentrant=reentrant))
        return saved_bytes(lambda: model(**inputs))

    # What is kept of one block is what a model with nothing else keeps: the trunk adds not a byte.
    assert kept(6, 6) == kept(3, 3)
    assert kept(5, 6) <= 2 * kept(6, 6)
    uncut = checkpointing(frozen_below(name, 6, num_hidden_layers=6), reentrant=reentrant)
    assert saved_bytes(lambda: uncut(**inputs)) > kept(5, 6) > kept(6, 6)


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_what_checkpoints_every_second_layer_is_cut_too(reentrant: bool) -> None:
    model = checkpointing(frozen_below("llama", 3), reentrant=reentrant, every_n_layers=2)
    expected = gradients(model, batch("llama"))
    cut_graph(model)
    with graphs(model) as kept:
        assert_same(gradients(model, batch("llama")), expected)
    assert {depth for depth, _ in kept} == {3}


def test_checkpoint_wrappers_are_cut_too() -> None:
    model = frozen_below("bert", 3)
    model.enable_input_require_grads()  # type: ignore[operator]
    inputs = batch("bert")
    layer = type(model.get_submodule(layer_map(model).blocks[0][0]))
    other = copy.deepcopy(model)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, layer))
    expected = gradients(model, inputs)
    cut_graph(model)
    with graphs(model) as kept:
        assert_same(gradients(model, inputs), expected)
    assert {depth for depth, _ in kept} == {3}

    def reentrant(module: nn.Module) -> nn.Module:
        return checkpoint_wrapper(module, checkpoint_impl=CheckpointImpl.REENTRANT)

    apply_activation_checkpointing(other, reentrant, check_fn=lambda module: isinstance(module, layer))
    assert hooks(other) == hooks(cut(other)), "what might need the hooks keeps them"


def hooks(model: nn.Module) -> list[str]:
    return [hook.__name__ for module in model.modules() for hook in module._forward_hooks.values()]


def cut(model: nn.Module) -> nn.Module:
    cut_graph(model)
    return model


class _Own(nn.Module):
    """Checkpoints by itself, as some models do: reentrantly, where nothing else is said."""

    gradient_checkpointing = True

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self._gradient_checkpointing_func = print

    def forward(self, x: Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=True)


def test_a_module_that_checkpoints_by_itself_keeps_the_hooks() -> None:
    model = checkpointing(frozen_below("bert", 3))
    model.add_module("own", _Own(nn.Linear(2, 2)))
    assert hooks(cut(model)) == hooks(checkpointing(frozen_below("bert", 3))) != []


def test_without_checkpointing_nothing_is_touched() -> None:
    model = frozen_below("bert", 3)
    model.enable_input_require_grads()  # type: ignore[operator]
    assert hooks(cut(model)) == ["make_inputs_require_grads"]


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_everything_is_put_back(reentrant: bool) -> None:
    model = checkpointing(frozen_below("bert", 3), reentrant=reentrant)
    model.enable_input_require_grads()  # type: ignore[operator]
    before = [(dict(m._forward_hooks), vars(m).get("_gradient_checkpointing_func")) for m in model.modules()]
    cut_graph(model)()
    assert [(dict(m._forward_hooks), vars(m).get("_gradient_checkpointing_func")) for m in model.modules()] == before
    restore = cut_graph(model)
    model.disable_input_require_grads()  # type: ignore[operator]
    restore()
    assert len(hooks(model)) == 1, "one of two hooks was taken away during the run"


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_a_copy_made_meanwhile_runs_its_own_blocks(reentrant: bool) -> None:
    model = cut(checkpointing(frozen_below("bert", 3), reentrant=reentrant))
    twin = copy.deepcopy(model)
    expected = gradients(model, batch("bert"))
    for parameter in model.parameters():
        parameter.data.zero_()
    assert_same(gradients(twin, batch("bert")), expected)


def test_a_perturbation_still_gets_its_gradient() -> None:
    """As SMART's ascent asks for it, through frozen blocks."""
    found = []
    for is_cut in (False, True):
        model = checkpointing(frozen_below("bert", 3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
        if is_cut:
            cut_graph(model)
        inputs = batch("bert")
        noise = torch.full((*inputs["input_ids"].shape, 32), 1e-3, requires_grad=True)
        output = second_pass(model, inputs, {"embeddings": noise})
        found.append(torch.autograd.grad(output.logits.square().sum(), noise)[0])
    assert torch.equal(*found)
    assert found[0].abs().sum() > 0


# ---- in runs -------------------------------------------------------------------------------------------------------


def trained(model: nn.Module, name: str, folder: Any, **settings: Any) -> dict[str, Tensor]:
    inputs = batch(name, task_of(name), rows=8)
    rows = [{key: value[i] for key, value in inputs.items()} for i in range(8)]
    args = quiet(folder, per_device_train_batch_size=2, learning_rate=1e-2, activation_checkpointing=True, **settings)
    peft_plus.Trainer(model, args, train_dataset=rows).train()  # type: ignore[arg-type]
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("tuner", ["full", "lora"])
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "bart"])
def test_a_run_that_thaws_from_the_top_trains_the_same_bits(
    name: str, tuner: str, reentrant: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends, grown = [], []
    for is_cut in (True, False):
        if not is_cut:
            monkeypatch.setattr(engine, "cut_graph", lambda model: lambda: None)
        base = tiny(name, task_of(name), **{**DROPOUT[name], "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0})
        torch.manual_seed(0)
        model = peft_plus.get_model(
            base,
            task=task_of(name),
            method={tuner: {"r": 2} if tuner == "lora" else {}, "gradual_unfreeze": {"every": 2}},
        )
        settings = {"activation_checkpointing_kwargs": {"use_reentrant": reentrant}, "max_steps": 10}
        with graphs(model) as kept:
            ends.append(trained(model, name, tmp_path, **settings))
        assert {depth for depth, _ in kept} == {1, 2, 3}, "in the end everything was in the graph"
        grown.append(kept.total())
    assert [n for n in ends[0] if not torch.equal(ends[0][n], ends[1][n])] == []
    assert grown[0] < grown[1]


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_peft_alone_with_layers_to_transform_is_cut_in_every_loop(reentrant: bool, tmp_path: Any) -> None:
    def model() -> nn.Module:
        lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], layers_to_transform=[2])
        return peft_plus.attach(get_peft_model(tiny("bert"), lora), [])

    settings = {"use_reentrant": reentrant}
    one = model()
    with graphs(one) as kept:
        trained(one, "bert", tmp_path, max_steps=2, activation_checkpointing_kwargs=settings)
    assert {depth for depth, _ in kept} == {3}
    assert "_rest" not in hooks(one)

    two = checkpointing(model(), reentrant=reentrant)
    session = Session(two, Accelerator(cpu=True), max_steps=2)
    optimizer = session.optimizer(torch.optim.AdamW, lr=1e-2)
    inputs = batch("bert", rows=8)
    loader = session.loader([{key: value[i] for key, value in inputs.items()} for i in range(8)], batch_size=2)
    with graphs(two) as kept:
        for rows in session.batches(loader):
            session.accelerator.backward(session.loss(rows))
            optimizer.step()
            optimizer.zero_grad()
    assert {depth for depth, _ in kept} == {3}
    assert "_rest" not in hooks(two)
