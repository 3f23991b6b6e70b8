"""A tiny fast tokenizer built in code: no download, no training, equal on every run."""

from __future__ import annotations

import string
from typing import Literal

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("[PAD]", "<s>", "</s>", "[MASK]", "[UNK]", "[CLS]", "[SEP]")
WORDS = ("the", "a", "is", "in", "on", "and", "cat", "dog", "good", "bad", "york", "paris", "what", "where", "works")


def vocabulary() -> dict[str, int]:
    """Piece → id: specials, whole words, letters that start a word, letters that go on in one, digits, punctuation."""
    letters = string.ascii_lowercase
    pieces = [*SPECIAL, *WORDS, *(c for c in letters if c != "a"), *(f"##{c}" for c in letters), *string.digits]
    return {piece: i for i, piece in enumerate([*pieces, *".,?!'-:"])}


def tiny_tokenizer(kind: Literal["encoder", "decoder", "seq2seq"] = "encoder", max_length: int = 64):
    """Word pieces over 90 entries, special ids as in `tests.models`; words not in `WORDS` fall into letters.

    Args:
        kind: `encoder` adds [CLS] … [SEP] … [SEP], `seq2seq` a closing </s>, `decoder` nothing.
        max_length: the model's limit in tokens.
    """
    vocab = vocabulary()
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    split = [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Digits(individual_digits=True)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)  # pyright: ignore[reportAttributeAccessIssue]
    template = {
        "encoder": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ["[CLS]", "[SEP]"]),
        "seq2seq": ("$A </s>", "$A </s> $B </s>", ["</s>"]),
    }.get(kind)
    if template is not None:
        single, pair, special = template
        tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single=single, pair=pair, special_tokens=[(s, vocab[s]) for s in special]
        )
    names = ["input_ids", "token_type_ids", "attention_mask"] if kind == "encoder" else ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=max_length,
        model_input_names=names,
    )
