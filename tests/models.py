"""Tiny random models of many architectures, made from configs, and batches for them: `tiny("bert")`, `batch("bert")`.

Everything is seeded and nothing is downloaded. Width 32, 3 blocks (stages of 2 and 1 in convolutional nets), 2 heads,
vocabulary 100, no dropout. Two copies of the same call have equal weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCAB = 100
PAD, BOS, EOS, MASK = 0, 1, 2, 3
LENGTH = 8
IMAGE_SIZE = 32
NUM_LABELS = 3
NUM_CHOICES = 2

_IDS = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_WIDTH = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
_POSITIONS = {"max_position_embeddings": 64}
_BERT = {**_IDS, **_WIDTH, **_POSITIONS, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_LLAMA = {**_IDS, **_WIDTH, **_POSITIONS, "num_key_value_heads": 1, "head_dim": 16, "attention_dropout": 0.0}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", _BERT),
    "roberta": ("RobertaConfig", _BERT),
    "electra": ("ElectraConfig", {**_BERT, "embedding_size": 16, "summary_last_dropout": 0.0}),
    "distilbert": (
        "DistilBertConfig",
        {**_IDS, "dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 64}
        | {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "qa_dropout": 0.0},
    ),
    "deberta-v2": (
        "DebertaV2Config",
        {**_BERT, "relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm"}
        | {"pos_att_type": ["p2c", "c2p"], "share_att_key": True, "position_biased_input": False}
        | {"type_vocab_size": 0, "pooler_hidden_size": 32, "pooler_dropout": 0.0, "cls_dropout": 0.0},
    ),
    "modernbert": (
        "ModernBertConfig",
        {**_IDS, **_WIDTH, **_POSITIONS, "cls_token_id": BOS, "sep_token_id": EOS, "local_attention": 4}
        | {"attention_dropout": 0.0, "mlp_dropout": 0.0, "embedding_dropout": 0.0, "classifier_dropout": 0.0}
        | {"reference_compile": False},
    ),
    "albert": ("AlbertConfig", {**_BERT, "embedding_size": 16, "classifier_dropout_prob": 0.0}),
    "xlnet": (
        "XLNetConfig",
        {**_IDS, "d_model": 32, "n_layer": 3, "n_head": 2, "d_inner": 64, "dropout": 0.0, "summary_last_dropout": 0.0},
    ),
    "gpt2": (
        "GPT2Config",
        {**_IDS, "n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 64}
        | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.0},
    ),
    "llama": ("LlamaConfig", _LLAMA),
    "mistral": ("MistralConfig", {**_LLAMA, "sliding_window": 4}),
    "qwen2": ("Qwen2Config", {k: v for k, v in _LLAMA.items() if k != "head_dim"}),
    "gemma3": ("Gemma3TextConfig", {**_LLAMA, "sliding_window": 4, "query_pre_attn_scalar": 16}),
    "opt": (
        "OPTConfig",
        {**_IDS, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "ffn_dim": 64}
        | {"word_embed_proj_dim": 16, "max_position_embeddings": 64, "dropout": 0.0, "attention_dropout": 0.0},
    ),
    "t5": (
        "T5Config",
        {"vocab_size": VOCAB, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 3, "num_heads": 2}
        | {"dropout_rate": 0.0, "classifier_dropout": 0.0, "pad_token_id": PAD, "eos_token_id": EOS}
        | {"decoder_start_token_id": PAD},
    ),
    "bart": (
        "BartConfig",
        {**_IDS, "d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "max_position_embeddings": 64}
        | {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
        | {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "classifier_dropout": 0.0}
        | {"decoder_start_token_id": EOS, "forced_eos_token_id": None},
    ),
    "vit": (
        "ViTConfig",
        {**_WIDTH, "image_size": IMAGE_SIZE, "patch_size": 8}
        | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    ),
    "resnet": (
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 1], "layer_type": "basic"},
    ),
    "convnext": ("ConvNextConfig", {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [2, 1], "drop_path_rate": 0.0}),
}
"""Name → the transformers config class and its settings."""

AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "MASKED_LM": "AutoModelForMaskedLM",
    "MULTIPLE_CHOICE": "AutoModelForMultipleChoice",
    "FEATURE_EXTRACTION": "AutoModel",
    "IMAGE_CLS": "AutoModelForImageClassification",
}
"""Task → the Auto class that builds its model."""

IMAGE_MODELS = ("vit", "resnet", "convnext")
TEXT_MODELS = tuple(name for name in CONFIGS if name not in IMAGE_MODELS)


def config(name: str, **overrides: Any) -> Any:
    """A fresh config of `CONFIGS[name]`; `overrides` replace its settings, also the dropout ones."""
    class_name, settings = CONFIGS[name]
    return getattr(transformers, class_name)(**{**settings, **overrides})


def tiny(name: str, task: str | None = None, *, seed: int = 0, **overrides: Any) -> nn.Module:
    """A tiny model in eval mode, with weights drawn from `seed`.

    Args:
        name: a key of `CONFIGS`.
        task: a key of `AUTO`; by default `IMAGE_CLS` for image models, else `SEQ_CLS`.
        seed: of the weights; the global random state is left as it was.
        overrides: settings of the config, e.g. `num_hidden_layers=2` or `hidden_dropout_prob=0.1`.
    Raises:
        ValueError: transformers has no such model for the task.
    """
    task = task or default_task(name)
    if task in ("SEQ_CLS", "TOKEN_CLS", "IMAGE_CLS"):
        overrides.setdefault("num_labels", NUM_LABELS)
    auto = getattr(transformers, AUTO[task])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto.from_config(config(name, **overrides)).eval()


def default_task(name: str) -> str:
    return "IMAGE_CLS" if name in IMAGE_MODELS else "SEQ_CLS"


def has_task(name: str, task: str) -> bool:
    """Whether transformers can build the model for the task."""
    return type(config(name)) in getattr(transformers, AUTO[task])._model_mapping


def batch(
    name: str, task: str | None = None, *, rows: int = 4, length: int = LENGTH, seed: int = 0
) -> dict[str, Tensor]:
    """A random batch with labels; row i ends with i % 3 padding tokens.

    Shapes: `input_ids` and `attention_mask` (rows, length), for MULTIPLE_CHOICE (rows, choices, length);
    `pixel_values` (rows, 3, 32, 32). Labels: (rows,) for classes, choices and `start_positions`/`end_positions`,
    (rows, length) for tokens, with -100 at padding; FEATURE_EXTRACTION has none.
    """
    task = task or default_task(name)
    draw = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=draw)

    if name in IMAGE_MODELS:
        pixels = {"pixel_values": torch.randn(rows, 3, IMAGE_SIZE, IMAGE_SIZE, generator=draw)}
        return pixels if task == "FEATURE_EXTRACTION" else pixels | {"labels": integers(0, NUM_LABELS, rows)}
    ids = integers(MASK + 1, VOCAB, rows, length)
    kept = length - torch.arange(rows) % 3
    mask = (torch.arange(length) < kept[:, None]).long()
    if name in ("t5", "bart"):  # their classifiers pool at the end-of-sequence token, which each row has once
        ids.scatter_(1, kept[:, None] - 1, EOS)
    ids = ids.masked_fill(mask == 0, PAD)
    if task == "MULTIPLE_CHOICE":
        ids, mask = (x[:, None].repeat(1, NUM_CHOICES, 1) for x in (ids, mask))
        ids[:, 1, 0] = MASK
    inputs = {"input_ids": ids, "attention_mask": mask}
    match task:
        case "SEQ_CLS":
            return inputs | {"labels": integers(0, NUM_LABELS, rows)}
        case "MULTIPLE_CHOICE":
            return inputs | {"labels": integers(0, NUM_CHOICES, rows)}
        case "TOKEN_CLS":
            return inputs | {"labels": integers(0, NUM_LABELS, rows, length).masked_fill(mask == 0, -100)}
        case "QUESTION_ANS":
            start = integers(0, length // 2, rows)
            return inputs | {"start_positions": start, "end_positions": start + 1}
        case "MASKED_LM":
            hidden = (torch.arange(length) % 3 == 1) & (mask == 1)
            labels = ids.masked_fill(~hidden, -100)
            return {"input_ids": ids.masked_fill(hidden, MASK), "attention_mask": mask, "labels": labels}
        case "CAUSAL_LM" | "SEQ_2_SEQ_LM":
            return inputs | {"labels": ids.masked_fill(mask == 0, -100)}
        case "FEATURE_EXTRACTION":
            return inputs | ({"decoder_input_ids": ids} if name in ("t5", "bart") else {})
    raise ValueError(f"unknown task {task!r}; known: {', '.join(AUTO)}")


def rows_of(data: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The rows of a batch, as a dataset."""
    return [{key: value[i] for key, value in data.items()} for i in range(len(next(iter(data.values()))))]
