"""A technique's card is found in its package or in its distribution's README, and nothing is imported for it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from peft_plus.cards import Card, card_of, readme_cards
from peft_plus.registry import Entry

CARD = "# paced\n\n## Claim\n\nFaster.\n\n## Measured verdict\n\nMeasured: {}.\n"


def entry(target: str) -> Entry:
    return Entry("paced", "plugin", "no-such-distribution", "1.5", target)


def package(root: Path, name: str, code: str = "raise RuntimeError('imported')") -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(code)
    return folder


def write_card(folder: Path, verdict: str) -> str:
    (folder / "cards").mkdir()
    (folder / "cards" / "paced.md").write_text(CARD.format(verdict), encoding="utf-8")
    return str(folder / "cards" / "paced.md")


@pytest.mark.parametrize("module", ["pace_card", "pace_card.paced", "pace_card.inner.paced"])
def test_a_card_lies_in_the_package_and_nothing_is_imported(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    folder = package(tmp_path, "pace_card")
    package(folder, "inner")
    place = write_card(folder, "not yet")
    assert card_of(entry(f"{module}:Paced")) == Card(
        {"Claim": "Faster.", "Measured verdict": "Measured: not yet."}, place
    )
    assert "pace_card" not in sys.modules


def test_the_card_nearest_to_the_code_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    folder = package(tmp_path, "pace_both")
    write_card(folder, "outer")
    near = write_card(package(folder, "inner"), "inner")
    assert card_of(entry("pace_both.inner.paced:Paced")).place == near


@pytest.mark.parametrize("target", ["no_such_package.paced:Paced", "json:JSONEncoder", "abc:ABC", ""])
def test_without_a_card_there_is_none(target: str) -> None:
    assert card_of(entry(target)) == Card()


def test_a_card_in_a_readme_is_a_section_with_headings_below_it() -> None:
    readme = "# T\n\n## use\n\nPlain.\n\n## `a_b`\n\n### Claim\n\nOne.\n\nTwo.\n\n### Cost\n\nNone.\n\n## end\n"
    assert readme_cards(readme) == {"a_b": {"Claim": "One.\n\nTwo.", "Cost": "None."}}
