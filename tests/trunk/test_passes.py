"""Passes that stop behind the trunk or skip it, against the model's own whole pass: the same bits, and no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_plus.graph_cut import cut_graph
from peft_plus.layers import layer_map
from peft_plus.trunk import Trunk, hidden
from tests.models import CONFIGS, NUM_CHOICES, batch, tiny

from .architectures import BLOCKS, DROPOUT, MORE, NAMES, batch_of, frozen_below, model_of

CASES = [(name, k) for name in NAMES for k in range(1, BLOCKS + 1) if (name, k) != ("bart", 3)]
"""Its head is tied to the embeddings, so that with all blocks frozen nothing of BART is left to train."""


def step(model: nn.Module, inputs: dict[str, Any], *, seed: int = 0, precision: Any = None) -> dict[str, Tensor]:
    """The loss and the gradients of one pass, with the random draws of `seed`."""
    torch.manual_seed(seed)
    with torch.autocast("cpu", precision) if precision else nullcontext():
        loss = model(**inputs).loss
    loss.backward()
    found = {"": loss.detach().clone()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad.clone()
            parameter.grad = None
    return found


def skipped(model: nn.Module, depth: int, inputs: dict[str, Any], **how: Any) -> dict[str, Tensor]:
    """The same, with the trunk's output computed by itself and put in."""
    trunk = Trunk(model, layer_map(model), depth)
    with torch.autocast("cpu", how["precision"]) if how.get("precision") else nullcontext():
        features = trunk.features(model.forward, inputs)
    assert not features.requires_grad
    trunk.rest()
    with trunk.skipping(features):
        return step(model, inputs, **how)


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert any(value.abs().max() > 0 for name, value in one.items() if name)


def in_front_of(model: nn.Module, depth: int, run: Callable[[], Any]) -> list[nn.Module]:
    """The modules that are done when block `depth` is, in a pass of its own: seen from outside."""
    last = model.get_submodule(layer_map(model).blocks[depth - 1][0])
    begun: set[nn.Module] = set()
    ended: set[nn.Module] = set()
    reached: list[set[nn.Module]] = []
    hooks = []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(lambda module, args: begun.add(module)))
        hooks.append(module.register_forward_hook(lambda module, args, output: ended.add(module)))
    hooks.append(last.register_forward_hook(lambda module, args, output: reached.append(set(ended))))
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return [module for module in model.modules() if module in reached[0]]


# ---- a pass that skips ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuner", ["lora", "full"])
@pytest.mark.parametrize(("name", "depth"), CASES)
def test_loss_and_gradients_are_those_of_the_whole_pass_bit_for_bit(name: str, depth: int, tuner: str) -> None:
    model = frozen_below(model_of(name), depth, tuner).train()
    inputs = batch_of(name)
    assert_same_bits(skipped(model, depth, inputs), step(model, inputs))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", list(DROPOUT))
def test_dropout_above_the_trunk_draws_what_it_would_have_drawn(name: str, depth: int) -> None:
    model = frozen_below(model_of(name, **DROPOUT[name]), depth).train()
    inputs = batch_of(name)
    by_hand = copy.deepcopy(model)
    for module in in_front_of(by_hand, depth, lambda: by_hand(**inputs)):
        module.training = False
    if name == "bart":  # it drops out its embeddings itself
        by_hand.get_encoder().training = False  # type: ignore[operator]
    whole, again = step(by_hand, inputs), skipped(model, depth, inputs)
    assert_same_bits(again, whole)
    assert not torch.equal(step(by_hand, inputs, seed=1)[""], whole[""])  # something is dropped above


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "opt", "bloom", "falcon", "gemma3", "bart", "modernbert"])
def test_padding_on_the_left_is_the_models_own_affair(name: str, depth: int) -> None:
    if (name, depth) not in CASES:
        depth = 2
    model = frozen_below(model_of(name), depth).train()
    inputs = batch_of(name, left=True)
    assert bool((inputs["attention_mask"][:, 0] == 0).any())
    assert_same_bits(skipped(model, depth, inputs), step(model, inputs))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "gpt-neox", "phi", "mistral", "qwen2"])
def test_packed_rows_look_at_their_own_text_alone(name: str) -> None:
    model = frozen_below(model_of(name, "CAUSAL_LM"), 2).train()
    inputs = batch_of(name, "CAUSAL_LM", rows=2)
    del inputs["attention_mask"]
    inputs["position_ids"] = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 0, 1, 0, 1]])
    whole = step(model, inputs)
    assert_same_bits(skipped(model, 2, inputs), whole)
    del inputs["position_ids"]
    assert not torch.equal(step(model, inputs)[""], whole[""])


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "deberta-v2", "vit", "mixtral"])
def test_under_autocast_the_bits_are_the_same_too(name: str) -> None:
    model = frozen_below(model_of(name), 2).train()
    inputs = batch_of(name)
    whole = step(model, inputs, precision=torch.bfloat16)
    assert_same_bits(skipped(model, 2, inputs, precision=torch.bfloat16), whole)
    assert not torch.equal(step(model, inputs)[""], whole[""])


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_checkpointed_blocks_above_the_trunk_are_computed_again_from_its_output(name: str, reentrant: bool) -> None:
    model: Any = frozen_below(model_of(name, use_cache=False), 2).train()
    inputs = batch_of(name)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    cut_graph(model)
    assert_same_bits(skipped(model, 2, inputs), step(model, inputs))


def test_several_texts_of_an_example_and_spans_are_skipped_alike() -> None:
    for task in ("MULTIPLE_CHOICE", "QUESTION_ANS", "TOKEN_CLS", "MASKED_LM"):
        model = frozen_below(tiny("bert", task), 2).train()
        inputs = batch("bert", task)
        assert_same_bits(skipped(model, 2, inputs), step(model, inputs))
        if task == "MULTIPLE_CHOICE":
            features = Trunk(model, layer_map(model), 2).features(model.forward, inputs)
            assert features.shape[0] == NUM_CHOICES * len(inputs["labels"])


def test_a_frozen_block_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even under another name: the attention of the lower blocks runs in no pass but the trunk's own."""
    model = frozen_below(model_of("llama"), 2).train()
    inputs = batch_of("llama")
    ran: list[int] = []
    for at, name in enumerate(row[0] for row in layer_map(model).blocks):
        model.get_submodule(f"{name}.self_attn").register_forward_hook(lambda *_, at=at: ran.append(at))
    trunk = Trunk(model, layer_map(model), 2)
    features = trunk.features(model.forward, inputs)
    assert ran == [0, 1]
    with trunk.skipping(features):
        model(**inputs)
    assert ran == [0, 1, 2]


def test_a_pass_that_drops_the_last_block_by_chance_is_an_error() -> None:
    """LayerDrop leaves blocks out while training: the features would never be put in, and the rest would go wrong."""
    model = frozen_below(model_of("bart", encoder_layerdrop=1.0), 1).train()
    inputs = batch_of("bart")
    trunk = Trunk(model, layer_map(model), 1)
    features = trunk.features(model.forward, inputs)
    with pytest.raises(ValueError, match=r"block 1 never ran .*layerdrop to 0"), trunk.skipping(features):
        model(**inputs)


# ---- nothing stays behind ------------------------------------------------------------------------------------------


def traces(model: nn.Module) -> dict[str, Any]:
    """What a pass could leave on a model: forwards, hooks, modes, attributes, parameters and flags."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks = (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
        found[name] = (type(module), module.training, sorted(vars(module)), vars(module).get("forward"), hooks)
    return found | {f"{n}.": (id(p), p._version, p.requires_grad) for n, p in model.named_parameters()}


class Broken(Exception):
    """Raised in the middle of a pass."""


@pytest.mark.parametrize("where", ["nowhere", "in the trunk", "above it", "in the head"])
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "distilbert"])
def test_nothing_stays_on_the_model_also_after_an_error(name: str, where: str) -> None:
    model = frozen_below(model_of(name), 2).train()
    layers = layer_map(model)
    for block in layers.blocks[0]:
        model.get_submodule(block).eval()  # whoever froze it by hand finds it so afterwards
    inputs = batch_of(name)
    step(model, inputs)  # transformers installs hooks of its own in the first pass
    trunk = Trunk(model, layers, 2)
    places = {"in the trunk": layers.blocks[0][0], "above it": layers.blocks[2][0]}
    before = traces(model)
    features = trunk.features(model.forward, inputs)
    assert traces(model) == before
    if where == "nowhere":
        with trunk.skipping(features):
            model(**inputs)
        assert traces(model) == before
        return

    def fail(*_: Any) -> None:
        raise Broken

    if where == "in the head":
        head = {"llama": "score", "t5": "lm_head"}.get(name, "classifier")
        target = model.get_submodule(f"base_model.model.{head}")
    else:
        target = model.get_submodule(places[where])
    hook = target.register_forward_pre_hook(fail)
    with_hook = traces(model)
    with pytest.raises(Broken), trunk.skipping(features):
        model(**inputs)
    assert traces(model) == with_hook
    if where == "in the trunk":
        with pytest.raises(Broken):
            trunk.features(model.forward, inputs)
        assert traces(model) == with_hook
    hook.remove()
    assert traces(model) == before
    assert torch.equal(trunk.features(model.forward, inputs), features)


def test_a_forward_that_somebody_else_put_there_is_put_back() -> None:
    model = frozen_below(model_of("bert"), 2)
    inputs = batch_of("bert")
    block: Any = model.get_submodule(layer_map(model).blocks[0][0])
    calls: list[int] = []
    native = block.forward

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return native(*args, **kwargs)

    block.forward = own
    trunk = Trunk(model, layer_map(model), 2)
    features = trunk.features(model.forward, inputs)
    with trunk.skipping(features):
        model(**inputs)
    assert (block.forward, calls) == (own, [1])


def test_stopping_leaves_no_output_collector_of_transformers_open() -> None:
    """Its context variable would make all later passes collect hidden states into a list that nobody reads."""
    from transformers.utils import output_capturing

    for name in ("llama", "bert", "modernbert"):
        model = tiny(name, "CAUSAL_LM" if name == "llama" else None)
        Trunk(model, layer_map(model), 1).features(model.forward, batch_of(name))
        assert output_capturing._active_collector.get() is None


# ---- the output of one block ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES])
def test_hidden_is_what_the_model_calls_the_hidden_states_of_that_block(name: str) -> None:
    model = model_of(name).train()
    inputs = batch_of(name)
    layers = layer_map(model)
    model.eval()
    with torch.no_grad():
        told = model(**inputs, output_hidden_states=True)
    wanted = told.encoder_hidden_states if name in ("t5", "bart") else told.hidden_states
    model.train()
    top = BLOCKS if name == "bert" else BLOCKS - 1  # where the last ones are told after the final norm
    if name == "convnext":  # which tells them stage by stage
        return assert_close(hidden(model, layers, inputs, 2), wanted[1])
    for depth in range(1, top + 1):
        assert_close(hidden(model, layers, inputs, depth), wanted[depth])
    assert model.training


def assert_close(got: Tensor, wanted: Tensor) -> None:
    assert torch.equal(got, wanted)
    assert not got.requires_grad


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_hidden_with_weights_is_that_of_a_model_that_has_them(name: str) -> None:
    model = model_of(name)
    layers, inputs = layer_map(model), batch_of(name)
    other = copy.deepcopy(model)
    weights = {}
    for parameter_name, parameter in other.named_parameters():
        if layers.depth[parameter_name] == 2:
            nn.init.normal_(parameter, std=0.3)
            weights[parameter_name] = parameter.detach()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    got = hidden(model, layers, inputs, 2, weights)
    assert torch.equal(got, hidden(other, layers, inputs, 2))
    assert not torch.equal(got, hidden(model, layers, inputs, 2))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("depth", [0, BLOCKS + 1, -1])
def test_a_depth_without_blocks_is_refused(depth: int) -> None:
    model = tiny("bert")
    with pytest.raises(ValueError, match=f"depth={depth}: .*depths 1 to 3"):
        hidden(model, layer_map(model), batch("bert"), depth)


def test_a_stack_whose_blocks_are_all_above_the_depth_has_no_trunk() -> None:
    """A short encoder beside a long decoder is aligned with its top."""
    model = model_of("bart", encoder_layers=1)
    with pytest.raises(ValueError, match="no block at depth 1 to 2 that reads the input"):
        Trunk(model, layer_map(model), 2)
    assert len(Trunk(model, layer_map(model), 3).blocks) == 1


def test_every_architecture_of_the_list_is_here() -> None:
    listed = {"bert", "llama", "gpt2", "t5", "gemma3", "mistral", "qwen2", "gpt-neox", "opt", "distilbert", "phi"}
    listed |= {"deberta-v2", "bloom", "falcon", "mixtral", "modernbert", "electra", "bart", "vit"}
    assert listed <= set(NAMES)
    assert set(NAMES) <= set(CONFIGS) | set(MORE)
