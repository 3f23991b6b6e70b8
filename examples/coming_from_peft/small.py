"""Random models of some thousand weights and a handful of texts, where your script has a hub id and a data set."""

from __future__ import annotations

import tempfile
from functools import cache
from typing import Literal

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "<s>", "</s>"]
WORDS = "the a film plot cast thing end was is were very not good fine dull bad by in anna paris rome"
VOCABULARY = {word: i for i, word in enumerate([*SPECIAL, *WORDS.split()])}
SUBJECTS = ("the film", "a plot", "the very dull end", "the cast in rome")
NAMES = {"anna": 1, "paris": 2, "rome": 2}

SHAPE = {"vocab_size": len(VOCABULARY), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
MODELS = {
    "bert": ("BertModel", "BertConfig", SHAPE | IDS | {"intermediate_size": 32}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", SHAPE | IDS | {"intermediate_size": 32}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": len(VOCABULARY), "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        | {"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0},
    ),
}


@cache
def base(name: Literal["bert", "llama", "t5"]) -> str:
    """A folder with the model and its tokenizer, for `from_pretrained`."""
    folder = tempfile.mkdtemp(prefix=f"{name}-")
    model_class, config_class, settings = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings))
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def reviews() -> Dataset:
    """16 rows: `text`, `label`."""
    verdicts = (("was good", 1), ("was not bad", 1), ("was dull", 0), ("is very bad", 0))
    return Dataset.from_list(
        [{"text": f"{subject} {verdict}", "label": label} for subject in SUBJECTS for verdict, label in verdicts]
    )


def texts() -> Dataset:
    """16 rows: `text`."""
    return reviews().remove_columns("label")


def pairs() -> Dataset:
    """16 rows: `source`, `target`: the words in reverse."""
    return Dataset.from_list(
        [{"source": text, "target": " ".join(reversed(text.split()))} for text in reviews()["text"]]
    )


def names() -> Dataset:
    """12 rows: `words`, `tags` (0 none, 1 person, 2 place)."""
    sentences = [
        f"the {thing} by anna was {how} in {place}"
        for thing in ("film", "plot")
        for how in ("good", "bad")
        for place in ("rome", "paris", "the end")
    ]
    rows = [sentence.split() for sentence in sentences]
    return Dataset.from_list([{"words": words, "tags": [NAMES.get(word, 0) for word in words]} for words in rows])


def preferences() -> Dataset:
    """8 rows: `prompt`, `chosen`, `rejected`."""
    answers = ((" was good", " was bad"), (" is fine", " is dull"))
    return Dataset.from_list(
        [{"prompt": prompt, "chosen": good, "rejected": bad} for prompt in SUBJECTS for good, bad in answers]
    )
