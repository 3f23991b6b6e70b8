"""The real sentences and models are what the demo and the benchmarks believe them to be."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from examples import inputs

pytestmark = pytest.mark.real


@pytest.mark.parametrize(
    ("domain", "labelled", "positive"),
    [("movies", 10_043, 4_982), ("amazon", 2_943, 1_725), ("news", 2_788, 1_100), ("tweets", 3_362, 2_300)],
)
def test_counts(domain: inputs.Domain, labelled: int, positive: int) -> None:
    data = inputs.sentences(domain)
    assert data.column_names == ["text", "valence", "label"]
    assert len(data) == labelled
    assert sum(data["label"]) == positive
    assert all(0.5 < abs(valence) <= 4 for valence in data["valence"])
    assert all(label == (valence > 0) for label, valence in zip(data["label"], data["valence"], strict=True))


def test_accents_survive() -> None:
    texts = inputs.sentences("movies")["text"]
    assert sum("Château" in text for text in texts) == 4
    assert not any("Ã" in text or "\ufffd" in text for text in texts)


def test_unknown_domain_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'films'.*movies, amazon, news, tweets"):
        inputs.sentences("films")  # type: ignore[arg-type]


def test_split_is_disjoint_and_balanced() -> None:
    split = inputs.movie_split()
    assert {name: len(part) for name, part in split.items()} == {"train": 1_500, "dev": 500, "test": 1_000}
    texts = [" ".join(text.casefold().split()) for part in split.values() for text in part["text"]]
    assert len(set(texts)) == len(texts)
    for part in split.values():
        assert 0.45 < sum(part["label"]) / len(part) < 0.55


def test_split_is_the_same_everywhere() -> None:
    split = inputs.movie_split()
    written = "\n".join(text for part in split.values() for text in part["text"])
    assert hashlib.sha256(written.encode()).hexdigest()[:16] == "132e47428237756f"
    assert inputs.movie_split(seed=1)["train"]["text"] != split["train"]["text"]


def test_missing_inputs_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_PLUS_INPUTS", str(tmp_path))
    for read in (inputs.minilm, inputs.smollm2, inputs.movie_split):
        with pytest.raises(FileNotFoundError, match="make inputs"):
            read()


def test_minilm_loads() -> None:
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(inputs.minilm())
    ids = AutoTokenizer.from_pretrained(inputs.minilm())("a fine film", return_tensors="pt")
    assert model(**ids).last_hidden_state.shape == (1, 5, 384)


@pytest.mark.slow
def test_smollm2_is_unpacked_once_and_speaks() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = inputs.smollm2()
    written = (path / "model.safetensors").stat().st_mtime_ns
    assert inputs.smollm2() == path
    assert (path / "model.safetensors").stat().st_mtime_ns == written
    assert not list(path.parent.glob("smollm2.*")), "a half-unpacked model was left behind"

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    new = model.generate(**ids, max_new_tokens=3, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(new)
