"""Tiny models for the trunk, frozen up to a block: those of `tests.models`, and some that are tested here alone."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from peft_plus.layers import layer_map
from tests.models import BOS, EOS, PAD, VOCAB, batch, has_task, tiny
from tests.models import default_task as default_task_of

BLOCKS = 3

_IDS = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_WIDTH = {"hidden_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 2, "intermediate_size": 64}
_POSITIONS = {"max_position_embeddings": 64}

MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt-neox": ("GPTNeoXConfig", {**_IDS, **_WIDTH, **_POSITIONS, "hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "bloom": (
        "BloomConfig",
        {**_IDS, "hidden_size": 32, "n_layer": BLOCKS, "n_head": 2, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    ),
    "falcon": (
        "FalconConfig",
        {**_IDS, **_WIDTH, "alibi": True, "new_decoder_architecture": False, "multi_query": True}
        | {"hidden_dropout": 0.0, "attention_dropout": 0.0},
    ),
    "phi": ("PhiConfig", {**_IDS, **_WIDTH, **_POSITIONS, "resid_pdrop": 0.0, "attention_dropout": 0.0}),
    "mixtral": (
        "MixtralConfig",
        {**_IDS, **_WIDTH, **_POSITIONS, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}
"""Name → the transformers config class and its settings, as in `tests.models.CONFIGS`. No dropout."""

NAMES = (
    *("bert", "llama", "gpt2", "t5", "gemma3", "mistral", "qwen2", "opt", "distilbert", "deberta-v2", "modernbert"),
    *("electra", "bart", "vit", "roberta", "convnext", *MORE),
)

DROPOUT: dict[str, dict[str, Any]] = {
    "bert": {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2},
    "electra": {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2},
    "deberta-v2": {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2},
    "distilbert": {"dropout": 0.2, "attention_dropout": 0.2},
    "modernbert": {"attention_dropout": 0.2, "mlp_dropout": 0.2, "embedding_dropout": 0.2},
    "gpt2": {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2},
    "gpt-neox": {"hidden_dropout": 0.2, "attention_dropout": 0.2},
    "bloom": {"hidden_dropout": 0.2, "attention_dropout": 0.2},
    "falcon": {"hidden_dropout": 0.2, "attention_dropout": 0.2},
    "phi": {"resid_pdrop": 0.2, "attention_dropout": 0.2, "embd_pdrop": 0.2},
    "opt": {"dropout": 0.2, "attention_dropout": 0.2},
    "llama": {"attention_dropout": 0.2},
    "t5": {"dropout_rate": 0.2},
    "bart": {"dropout": 0.2, "attention_dropout": 0.2, "activation_dropout": 0.2},
    "vit": {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2},
}
"""Settings that switch dropout on everywhere."""


def task_of(name: str) -> str:
    if name in MORE:
        return "CAUSAL_LM"
    return "SEQ_2_SEQ_LM" if has_task(name, "SEQ_2_SEQ_LM") else default_task_of(name)


def model_of(name: str, task: str | None = None, **overrides: Any) -> nn.Module:
    """As `tests.models.tiny`, for all of `NAMES`."""
    if name not in MORE:
        return tiny(name, task or task_of(name), **overrides)
    kind, settings = MORE[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, kind)(**{**settings, **overrides})
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def batch_of(name: str, task: str | None = None, *, left: bool = False, **settings: Any) -> dict[str, Tensor]:
    """As `tests.models.batch`, for all of `NAMES`; `left` moves the padding to the left."""
    made = batch("llama" if name in MORE else name, task or task_of(name), **settings)
    return padded_left(made) if left else made


def padded_left(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same rows with their padding on the left."""
    mask = given["attention_mask"]
    shift = (mask == 0).sum(1)
    places = (torch.arange(mask.shape[1]) - shift[:, None]) % mask.shape[1]
    return {n: v.gather(1, places) if v.shape == mask.shape else v for n, v in given.items()}


def frozen_below(model: nn.Module, depth: int, tuner: str = "lora", *, blocks: int = BLOCKS) -> nn.Module:
    """Of `model`, what lies above block `depth` trains: all of it (`full`), or LoRA in the blocks, and the head."""
    if tuner == "lora":
        transposed = type(model).__name__.startswith("GPT2")
        own = {"GPT2": ["c_attn"], "Mixtral": ["q_proj", "o_proj"]}
        targets = next((names for start, names in own.items() if type(model).__name__.startswith(start)), "all-linear")
        torch.manual_seed(0)
        settings = {"r": 2, "init_lora_weights": False, "fan_in_fan_out": transposed, "target_modules": targets}
        model = get_peft_model(model, LoraConfig(**settings))
    depths = layer_map(model).depth
    for name, parameter in model.named_parameters():
        tuned = tuner == "full" or parameter.requires_grad or depths[name] > blocks
        parameter.requires_grad_(tuned and depths[name] > depth)
    return model
