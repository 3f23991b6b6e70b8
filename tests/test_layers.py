"""Depths against an oracle that knows nothing of the rule: cut the graph above block k and see who still gets gradient.

The places of the blocks are written down here by hand; `layer_map` must find them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from peft import (
    IA3Config,
    LoraConfig,
    PeftMixedModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VBLoRAConfig,
    get_peft_model,
)
from torch import Tensor, nn

from peft_plus.layers import Layers, depth_label, find_heads, is_tied_head, layer_map, transformers_model

from .models import AUTO, CONFIGS, IMAGE_MODELS, batch, config, has_task, tiny

# PEFT 0.21.2 reads an attribute that transformers 5.23 renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

STACKS: dict[str, tuple[list[str], ...]] = {
    **{name: ([f"encoder.layer.{i}" for i in range(3)],) for name in ("bert", "roberta", "electra", "deberta-v2")},
    **{
        name: ([f"layers.{i}" for i in range(3)],)
        for name in ("modernbert", "llama", "mistral", "qwen2", "gemma3", "vit")
    },
    "distilbert": ([f"transformer.layer.{i}" for i in range(3)],),
    "xlnet": ([f"layer.{i}" for i in range(3)],),
    "gpt2": ([f"h.{i}" for i in range(3)],),
    "opt": ([f"decoder.layers.{i}" for i in range(3)],),
    "t5": tuple([f"{side}.block.{i}" for i in range(3)] for side in ("encoder", "decoder")),
    "bart": tuple([f"{side}.layers.{i}" for i in range(3)] for side in ("encoder", "decoder")),
    **{
        name: (["encoder.stages.0.layers.0", "encoder.stages.0.layers.1", "encoder.stages.1.layers.0"],)
        for name in ("resnet", "convnext")
    },
}
"""Architecture → the blocks of each stack, within the base model, in the order of the forward pass."""

CASES = [
    (name, task)
    for name in STACKS
    for task in AUTO
    if has_task(name, task) and (name in IMAGE_MODELS or task != "IMAGE_CLS")
]


# --- The oracle ---


def stacks_of(name: str, model: nn.Module, stacks: tuple[list[str], ...] | None = None) -> list[list[str]]:
    """The hand-written blocks as they are called in `model`, without the stack that the task does not have."""
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    modules = dict(model.named_modules())
    named = [[prefix + block for block in stack] for stack in stacks or STACKS[name]]
    return [stack for stack in named if stack[0] in modules]


def detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    return type(value)(detached(x) for x in value) if isinstance(value, tuple) else value


def cut_output(module: nn.Module, inputs: Any, output: Any) -> Any:
    return detached(output)


def cut_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args:
        return (detached(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": detached(kwargs["hidden_states"])}


def cut_relative_positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, "rel_embeddings": detached(kwargs["rel_embeddings"])}


@contextmanager
def cut(model: nn.Module, stacks: list[list[str]], k: int) -> Iterator[None]:
    """No gradient flows from above depth k to below. Stacks of unequal length end together, as T5's authors unfreeze.

    Two things reach the blocks of DeBERTa by another way than the output of the block below, so they are cut where they
    enter: the relative-position embeddings, handed to every block, and the convolution, which runs on the input and the
    output of block 1 and counts as a part of it.
    """
    top = max(map(len, stacks))
    handles = []
    for stack in stacks:
        below = k - (top - len(stack))  # blocks of this stack under the cut
        if below <= 0:
            first = model.get_submodule(stack[0])
            handles.append(first.register_forward_pre_hook(cut_input, with_kwargs=True))
        else:
            handles.append(model.get_submodule(stack[below - 1]).register_forward_hook(cut_output))
        for block in stack[max(below, 0) :]:
            if type(model).__name__.startswith("DebertaV2"):
                module = model.get_submodule(block)
                handles.append(module.register_forward_pre_hook(cut_relative_positions, with_kwargs=True))
    for module in model.modules():
        if type(module).__name__ == "ConvLayer" and k == 0:
            handles.append(module.register_forward_pre_hook(cut_input, with_kwargs=True))
        elif type(module).__name__ == "ConvLayer" and k == 1:
            handles.append(module.register_forward_hook(cut_output))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def reached(model: nn.Module, inputs: Mapping[str, Tensor]) -> set[str]:
    """The parameters that a backward pass reaches at all."""
    model.zero_grad(set_to_none=True)
    output = model(**inputs)
    loss = output.get("loss")
    if loss is None:
        pooled = output.get("pooler_output")
        loss = output.last_hidden_state.sum() + (0 if pooled is None else pooled.sum())
    if loss.requires_grad:
        loss.backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def check_depths(model: nn.Module, stacks: list[list[str]], inputs: Mapping[str, Tensor]) -> Layers:
    layers = layer_map(model)
    top = max(map(len, stacks))
    assert layers.num_blocks == top
    assert list(layers.depth) == [name for name, _ in model.named_parameters()]
    expected: list[list[str]] = [[] for _ in range(top)]
    for stack in stacks:
        for row, block in zip(expected[top - len(stack) :], stack, strict=True):
            row.append(block)
    assert layers.blocks == tuple(map(tuple, expected))

    everything = reached(model, inputs)
    # A tied head reaches the embeddings from above, past every cut; their depth is that of the lower place.
    tied = tied_names(model)
    assert all(layers.depth[name] == 0 for name in tied)
    for k in range(top + 1):
        with cut(model, stacks, k):
            above = reached(model, inputs)
        assert above - tied == {name for name in everything if layers.depth[name] > k} - tied, f"cut above depth {k}"
    return layers


def tied_names(model: nn.Module) -> set[str]:
    """Names of the parameters that are both input and output embeddings."""
    output = model.get_output_embeddings()
    if output is None or output.weight is not model.get_input_embeddings().weight:
        return set()
    return {name for name, parameter in model.named_parameters() if parameter is output.weight}


# --- Every architecture ---


@pytest.mark.parametrize(("name", "task"), CASES, ids=[f"{name}-{task}" for name, task in CASES])
def test_gradient_cut_agrees(name: str, task: str) -> None:
    model = tiny(name, task)
    check_depths(model, stacks_of(name, model), batch(name, task))


def test_every_architecture_is_covered() -> None:
    assert set(STACKS) == set(CONFIGS) - {"albert"}


VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "deberta-convolution": ("deberta-v2", "SEQ_CLS", {"conv_kernel_size": 3}),
    "deberta-absolute-positions": ("deberta-v2", "SEQ_CLS", {"position_biased_input": True, "type_vocab_size": 2}),
    "opt-post-norm": ("opt", "SEQ_CLS", {"do_layer_norm_before": False}),
    "resnet-bottleneck": ("resnet", "IMAGE_CLS", {"layer_type": "bottleneck", "depths": [1, 2]}),
    "convnext-equal-stages": ("convnext", "IMAGE_CLS", {"depths": [2, 2]}),
    "convnext-one-stage": ("convnext", "IMAGE_CLS", {"num_stages": 1, "depths": [3], "hidden_sizes": [8]}),
    "llama-tied": ("llama", "CAUSAL_LM", {"tie_word_embeddings": True}),
    "bert-one-block": ("bert", "SEQ_CLS", {"num_hidden_layers": 1}),
    "bert-two-blocks": ("bert", "MASKED_LM", {"num_hidden_layers": 2}),
    "gpt2-five-blocks": ("gpt2", "CAUSAL_LM", {"n_layer": 5}),
}
VARIANT_STACKS = {
    "resnet-bottleneck": ["encoder.stages.0.layers.0", "encoder.stages.1.layers.0", "encoder.stages.1.layers.1"],
    "convnext-equal-stages": [f"encoder.stages.{i}.layers.{j}" for i in range(2) for j in range(2)],
    "convnext-one-stage": [f"encoder.stages.0.layers.{j}" for j in range(3)],
    "bert-one-block": ["encoder.layer.0"],
    "bert-two-blocks": ["encoder.layer.0", "encoder.layer.1"],
    "gpt2-five-blocks": [f"h.{i}" for i in range(5)],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_cut_agrees_on_variants(variant: str) -> None:
    name, task, overrides = VARIANTS[variant]
    model = tiny(name, task, **overrides)
    stacks = (VARIANT_STACKS[variant],) if variant in VARIANT_STACKS else None
    check_depths(model, stacks_of(name, model, stacks), batch(name, task))


@pytest.mark.parametrize(("encoder", "decoder"), [(2, 4), (4, 2), (1, 3)])
@pytest.mark.parametrize("task", ["SEQ_2_SEQ_LM", "SEQ_CLS", "FEATURE_EXTRACTION"])
def test_t5_stacks_of_unequal_length_end_together(task: str, encoder: int, decoder: int) -> None:
    model = tiny("t5", task, num_layers=encoder, num_decoder_layers=decoder)
    stacks = ([f"encoder.block.{i}" for i in range(encoder)], [f"decoder.block.{i}" for i in range(decoder)])
    layers = check_depths(model, stacks_of("t5", model, stacks), batch("t5", task))
    top = max(encoder, decoder)
    ends = {
        name.split(".")[-3]: depth for name, depth in layers.depth.items() if "stack" not in name and "final_" in name
    }
    assert ends == {"encoder": top, "decoder": top + 1}


@pytest.mark.parametrize(
    ("name", "overrides", "place", "depth"),
    [
        ("deberta-v2", {"conv_kernel_size": 3}, "deberta.encoder.rel_embeddings", 0),
        ("deberta-v2", {"conv_kernel_size": 3}, "deberta.encoder.LayerNorm", 0),
        ("deberta-v2", {"conv_kernel_size": 3}, "deberta.encoder.conv", 1),
        ("deberta-v2", {}, "pooler", 4),
        ("electra", {}, "electra.embeddings_project", 0),
        ("opt", {}, "model.decoder.project_in", 0),
        ("opt", {}, "model.decoder.project_out", 4),
        ("opt", {}, "model.decoder.final_layer_norm", 4),
        ("bart", {}, "model.decoder.layernorm_embedding", 0),
        ("modernbert", {}, "model.final_norm", 4),
        ("xlnet", {}, "transformer.mask_emb", 0),  # used in pretraining only, so no gradient tells
        ("vit", {}, "vit.embeddings.cls_token", 0),
        ("vit", {}, "vit.layernorm", 4),
        ("convnext", {}, "convnext.encoder.stages.1.downsampling_layer", 3),
        ("resnet", {}, "resnet.encoder.stages.1.layers.0.shortcut", 3),
        ("bert", {}, "bert.pooler", 4),
    ],
)
def test_what_lies_beside_the_blocks(name: str, overrides: dict[str, Any], place: str, depth: int) -> None:
    found = layer_map(tiny(name, **overrides)).depth
    inside = {at for parameter, at in found.items() if f"{parameter}.".startswith(f"{place}.")}
    assert inside == {depth}


@pytest.mark.parametrize("name", STACKS)
def test_meta_device(name: str) -> None:
    on_cpu = tiny(name)
    with torch.device("meta"):
        model = tiny(name)
    assert "meta" in {p.device.type for p in model.parameters()}  # XLNet makes some of its own by torch.FloatTensor
    assert layer_map(model) == layer_map(on_cpu)
    assert find_heads(model) == find_heads(on_cpu)
    assert is_tied_head(model) is False


# --- Other shapes of model ---


@pytest.mark.parametrize("overrides", [{}, {"num_hidden_layers": 8, "num_hidden_groups": 4}], ids=["one", "four"])
def test_albert_is_refused(overrides: dict[str, Any]) -> None:
    count = overrides.get("num_hidden_layers", 3)
    with pytest.raises(ValueError, match=rf"AlbertForSequenceClassification has no list of blocks.*{count} modules"):
        layer_map(tiny("albert", **overrides))
    assert find_heads(tiny("albert", **overrides)) == ("classifier",)
    assert is_tied_head(tiny("albert", "MASKED_LM"))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class ByHand(nn.Module):
    """Registered in another order than it runs, with a list of norms beside the blocks and a module they all share."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.final_norm = nn.LayerNorm(4)
        self.blocks = nn.ModuleList(Block() for _ in range(5))
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(5))
        self.shared = nn.Linear(4, 4)
        self.embed = nn.Embedding(10, 4)
        self.position = nn.Parameter(torch.zeros(4))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.add_position(self.embed(ids))
        if self.final_norm is None or len(self.blocks) == 0:
            return x
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = self.shared(block(norm(x)))
        return self.head(self.final_norm(x))

    def add_position(self, x: Tensor) -> Tensor:
        return x + self.position


def test_hand_written_module() -> None:
    model = ByHand()
    layers = layer_map(model)
    assert layers.num_blocks == 5
    assert layers.blocks == tuple((f"blocks.{i}",) for i in range(5))
    for name, depth in layers.depth.items():
        number = re.search(r"(?:blocks|norms)\.(\d)", name)
        if number:
            assert depth == int(number[1]) + 1
        else:
            assert depth == {"embed": 0, "position": 0, "shared": 1, "final_norm": 6, "head": 6}[name.split(".")[0]]
    assert find_heads(model) == ("head",)
    assert not is_tied_head(model)
    model.head = nn.Linear(4, 10, bias=False)
    model.head.weight = model.embed.weight
    assert is_tied_head(model)
    assert layer_map(model).depth["head.weight"] == 0  # its first name, its lowest place


def test_sequential() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Sequential(*(Block() for _ in range(3))), nn.Linear(4, 2))
    layers = layer_map(model)
    assert layers.blocks == (("1.0",), ("1.1",), ("1.2",))
    assert layers.depth["0.weight"] == 0
    assert layers.depth["2.weight"] == 4
    assert find_heads(model) == ("2",)


def test_registration_order_decides_without_source() -> None:
    scope: dict[str, Any] = {"nn": nn, "Block": Block, "__name__": "nowhere"}
    exec(
        "class Bare(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.stem, self.blocks = nn.Linear(4, 4), nn.ModuleList([Block(), Block()])\n"
        "        self.top = nn.Linear(4, 4)\n"
        "    def forward(self, x): return self.top(self.blocks[0](x))\n",
        scope,
    )
    layers = layer_map(scope["Bare"]())
    assert layers.depth["stem.weight"] == 0
    assert layers.depth["top.weight"] == 3


def test_nothing_to_number() -> None:
    with pytest.raises(ValueError, match="Linear has no list of blocks"):
        layer_map(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="one set of weights"):
        layer_map(nn.Sequential(nn.Linear(4, 4), nn.Sequential(*[Block()] * 3)))


def on_meta(class_name: str, settings: Any) -> nn.Module:
    with torch.device("meta"):
        return getattr(transformers, class_name)(settings)


def test_parallel_lists_go_item_by_item() -> None:
    """XLM keeps attention, norms and feed-forwards in four lists that its loop indexes together."""
    settings = transformers.XLMConfig(vocab_size=100, emb_dim=32, n_layers=3, n_heads=2)
    layers = layer_map(on_meta("XLMForSequenceClassification", settings))
    assert layers.num_blocks == 3
    for name, depth in layers.depth.items():
        number = re.search(r"(?:attentions|layer_norm1|ffns|layer_norm2)\.(\d)", name)
        assert depth == (int(number[1]) + 1 if number else 0 if "emb" in name else 4)


def test_vision_tower_feeds_the_language_model() -> None:
    settings = transformers.LlavaConfig(
        text_config=config("llama"),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=256
        ),
    )
    model = on_meta("LlavaForConditionalGeneration", settings)
    layers = layer_map(model)
    assert layers.blocks == tuple((f"model.language_model.layers.{i}",) for i in range(3))
    for name, depth in layers.depth.items():
        assert depth == 0 or "language_model" in name or name.startswith("lm_head")
    assert find_heads(model) == ("lm_head",)


def test_joined_models() -> None:
    settings = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(config("bert"), config("gpt2"))
    model = on_meta("EncoderDecoderModel", settings)
    layers = layer_map(model)
    assert layers.blocks[0] == ("encoder.encoder.layer.0", "decoder.transformer.h.0")
    assert layers.depth["encoder.pooler.dense.weight"] == 3
    assert layers.depth["decoder.transformer.ln_f.weight"] == 4
    assert find_heads(model) == ("decoder.lm_head",)
    assert is_tied_head(model)


def test_500_layers_take_milliseconds() -> None:
    settings = config("llama", num_hidden_layers=500)
    model = on_meta("LlamaForCausalLM", settings)
    layer_map(model)
    start = time.perf_counter()
    layers = layer_map(model)
    seconds = time.perf_counter() - start
    assert layers.num_blocks == 500
    assert layers.depth["model.layers.499.mlp.up_proj.weight"] == 500
    assert seconds < 1.0


# --- Models that PEFT wrapped ---


def place_depth(name: str) -> int:
    """Depth in a 3-block BERT classifier, read off the name."""
    number = re.search(r"\.layer\.(\d+)\.", name)
    return int(number[1]) + 1 if number else 0 if "embeddings" in name or "prompt_encoder" in name else 4


PEFT_CONFIGS = {
    "lora": LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value", "word_embeddings"]),
    "lora-all-linear": LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"),
    "modules_to_save": LoraConfig(
        task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["pooler", "position_embeddings"]
    ),
    "head-only": LoraConfig(target_modules="dummy-target-modules", modules_to_save=["classifier"]),
    "ia3": IA3Config(task_type="SEQ_CLS"),
    "prompt": PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4),
    "p-tuning": PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=4, encoder_hidden_size=16),
    "prefix": PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4),
    "prefix-projected": PrefixTuningConfig(
        task_type="SEQ_CLS", num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=16
    ),
}


@pytest.mark.parametrize("method", PEFT_CONFIGS)
def test_peft_model(method: str) -> None:
    inner = tiny("bert")
    model = get_peft_model(inner, PEFT_CONFIGS[method])
    layers = layer_map(model)
    assert layers.depth == {name: place_depth(name) for name, _ in model.named_parameters()}
    blocks = [model.get_submodule(row[0]) for row in layers.blocks]
    assert blocks == list(inner.bert.encoder.layer)
    assert transformers_model(model) is inner
    assert find_heads(model) == ("classifier",)
    assert is_tied_head(model) is False


def test_peft_moves_no_depth() -> None:
    """Under the same name as before, wrapped parameters have the depth that they had."""
    before = layer_map(tiny("t5", "SEQ_2_SEQ_LM", num_decoder_layers=2)).depth
    model = get_peft_model(tiny("t5", "SEQ_2_SEQ_LM", num_decoder_layers=2), LoraConfig(target_modules=["q", "wo"]))
    after = layer_map(model).depth
    shift = len("base_model.model.")
    assert {name[shift:].replace(".base_layer", ""): at for name, at in after.items() if "lora_" not in name} == before
    for name, depth in after.items():
        if "lora_A" in name:
            assert depth == after[name.replace("lora_A.default", "base_layer")]


def test_vector_bank_counts_from_its_first_use() -> None:
    model = get_peft_model(tiny("bert"), VBLoRAConfig(target_modules=["query"], vector_length=16, num_vectors=8))
    bank = [depth for name, depth in layer_map(model).depth.items() if "vector_bank" in name]
    assert bank == [1]


def test_mixed_model() -> None:
    inner = tiny("bert")
    model = PeftMixedModel(inner, LoraConfig(target_modules=["query"]))
    assert transformers_model(model) is inner
    assert layer_map(model).depth == {name: place_depth(name) for name, _ in model.named_parameters()}
    assert find_heads(model) == ("classifier",)


# --- Heads ---

HEADS = {
    ("bert", "SEQ_CLS"): ("classifier",),
    ("bert", "TOKEN_CLS"): ("classifier",),
    ("bert", "MULTIPLE_CHOICE"): ("classifier",),
    ("bert", "QUESTION_ANS"): ("qa_outputs",),
    ("bert", "MASKED_LM"): ("cls",),
    ("roberta", "SEQ_CLS"): ("classifier",),
    ("roberta", "MASKED_LM"): ("lm_head",),
    ("distilbert", "SEQ_CLS"): ("pre_classifier", "classifier"),
    ("deberta-v2", "SEQ_CLS"): ("pooler", "classifier"),
    ("modernbert", "SEQ_CLS"): ("head", "classifier"),
    ("electra", "SEQ_CLS"): ("classifier",),
    ("electra", "MULTIPLE_CHOICE"): ("sequence_summary", "classifier"),
    ("albert", "MASKED_LM"): ("predictions",),
    ("gpt2", "SEQ_CLS"): ("score",),
    ("gpt2", "CAUSAL_LM"): ("lm_head",),
    ("llama", "SEQ_CLS"): ("score",),
    ("llama", "TOKEN_CLS"): ("score",),
    ("llama", "QUESTION_ANS"): ("qa_outputs",),
    ("llama", "CAUSAL_LM"): ("lm_head",),
    ("qwen2", "SEQ_CLS"): ("score",),
    ("gemma3", "SEQ_CLS"): ("score",),
    ("mistral", "SEQ_CLS"): ("score",),
    ("opt", "SEQ_CLS"): ("score",),
    ("opt", "CAUSAL_LM"): ("lm_head",),
    ("t5", "SEQ_CLS"): ("classification_head",),
    ("t5", "TOKEN_CLS"): ("classifier",),
    ("t5", "QUESTION_ANS"): ("qa_outputs",),
    ("t5", "SEQ_2_SEQ_LM"): ("lm_head",),
    ("bart", "SEQ_CLS"): ("classification_head",),
    ("bart", "SEQ_2_SEQ_LM"): ("lm_head",),
    ("bart", "CAUSAL_LM"): ("lm_head",),
    ("xlnet", "SEQ_CLS"): ("sequence_summary", "logits_proj"),
    ("xlnet", "CAUSAL_LM"): ("lm_loss",),
    ("vit", "IMAGE_CLS"): ("classifier",),
    ("resnet", "IMAGE_CLS"): ("classifier",),
    ("convnext", "IMAGE_CLS"): ("classifier",),
}


@pytest.mark.parametrize(("name", "task"), HEADS)
def test_heads(name: str, task: str) -> None:
    assert find_heads(tiny(name, task)) == HEADS[name, task]


@pytest.mark.parametrize("name", CONFIGS)
def test_base_models_have_no_head(name: str) -> None:
    assert find_heads(tiny(name, "FEATURE_EXTRACTION")) == ()


@pytest.mark.parametrize(("name", "task"), [case for case in CASES if case[1] != "FEATURE_EXTRACTION"])
def test_heads_are_what_a_reseeded_head_would_be(name: str, task: str) -> None:
    """The base model alone has none of the head's parameters, and the rest of the task model has nothing but it."""
    model = tiny(name, task)
    heads = find_heads(model)
    assert heads
    bare = {name for name, _ in tiny(name, "FEATURE_EXTRACTION").named_parameters(remove_duplicate=False)}
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    for parameter, _ in model.named_parameters():
        assert parameter.startswith(tuple(f"{head}." for head in heads)) != (parameter.removeprefix(prefix) in bare)


TIED = [
    ("bert", "MASKED_LM"),
    ("gpt2", "CAUSAL_LM"),
    ("opt", "CAUSAL_LM"),
    ("t5", "SEQ_2_SEQ_LM"),
    ("bart", "CAUSAL_LM"),
]


@pytest.mark.parametrize(("name", "task"), [*TIED, ("gemma3", "CAUSAL_LM"), ("xlnet", "CAUSAL_LM")])
def test_tied_head(name: str, task: str) -> None:
    assert is_tied_head(tiny(name, task))
    assert not is_tied_head(tiny(name, "FEATURE_EXTRACTION"))
    if name != "t5":  # ties its head whatever its config says
        assert not is_tied_head(tiny(name, task, tie_word_embeddings=False))


def test_a_head_copied_to_be_trained_is_not_tied() -> None:
    settings = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = get_peft_model(tiny("opt", "CAUSAL_LM"), settings)
    assert find_heads(model) == ("lm_head",)
    assert not is_tied_head(model)
    depth = layer_map(model).depth
    assert [at for name, at in depth.items() if "modules_to_save" in name] == [4]
    assert depth["base_model.model.model.decoder.embed_tokens.weight"] == 0


def test_depth_label() -> None:
    assert [depth_label(depth, 2) for depth in range(4)] == ["embeddings", "block 1", "block 2", "head"]
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match=r"0\.\.3"):
            depth_label(wrong, 2)
