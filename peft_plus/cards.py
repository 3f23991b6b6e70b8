"""Cards: what a technique claims, what its code does here, and what was measured."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from .registry import Entry


@dataclass(frozen=True)
class Card:
    """The card of one technique.

    Attributes:
        texts: heading → text, in order; empty where there is no card.
        place: where it is, as a user can find it.
    """

    texts: dict[str, str] = field(default_factory=dict)
    place: str = ""


def card_of(entry: Entry) -> Card:
    """The card of an installed technique; imports nothing.

    It is the file `cards/<name>.md` beside its code, or in a package around it: `# name`, then `## headings`.
    A distribution of one technique may write it into its README: `## name`, then `### headings`.
    """
    for folder in _folders(entry.target):
        file = folder / "cards" / f"{entry.name}.md"
        if file.is_file():
            return Card(_below(file.read_text(encoding="utf-8"), "## "), str(file))
    texts = readme_cards(_readme(entry.distribution)).get(entry.name, {})
    place = f"README of {entry.distribution} {entry.version}, section {entry.name!r}"
    return Card(texts, place) if texts else Card()


def readme_cards(readme: str) -> dict[str, dict[str, str]]:
    """The cards in a README: technique → heading → text."""
    found = {title.strip("`"): _below(body, "### ") for title, body in _below(readme, "## ").items()}
    return {name: texts for name, texts in found.items() if texts}


def _below(text: str, mark: str) -> dict[str, str]:
    """Heading → what stands below it, for the headings that begin with `mark`."""
    parts = [part.partition("\n") for part in re.split(f"^{mark}", text, flags=re.MULTILINE)[1:]]
    return {heading.strip(): body.strip() for heading, _, body in parts}


def _folders(target: str) -> list[Path]:
    """The folders of the packages that hold `module:Class`, innermost first."""
    top, *inner = target.partition(":")[0].split(".")
    spec = find_spec(top) if top else None
    roots = [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
    return [root.joinpath(*inner[:n]) for n in range(len(inner), -1, -1) for root in roots]


def _readme(name: str) -> str:
    """The long description of an installed distribution; of an editable one the file, which may be newer."""
    try:
        installed = distribution(name)
    except PackageNotFoundError:
        return ""
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        file = Path(url2pathname(urlsplit(origin["url"]).path)) / "README.md"
        if file.is_file():
            return file.read_text(encoding="utf-8")
    return str(installed.metadata.json.get("description", ""))
