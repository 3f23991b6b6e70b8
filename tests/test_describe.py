"""Docstrings and annotations, as `peft-plus info` reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Optional, Union

import pytest

from peft_plus import describe


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (int, "int"),
        ("int", "int"),
        ("float | None", "float | None"),
        ('Literal["epoch"] | int', "'epoch' | int"),
        ("Optional[Union[list[str], str]]", "list[str] | str | None"),
        (Optional[int], "int | None"),  # noqa: UP045 - PEFT writes it so
        (Union[list[str], Literal["a", "b"], None], "list[str] | 'a' | 'b' | None"),  # noqa: UP007
        ("dict[str, Optional[int]]", "dict[str, int | None]"),
        ("collections.abc.Sequence[str]", "Sequence[str]"),
        ("not a type", "not a type"),
    ],
)
def test_types_read_as_people_write_them(annotation: object, text: str) -> None:
    assert describe.type_text(annotation) == text


def test_docstrings_are_read_by_section() -> None:
    found = describe.sections(
        """First.

    More:
      still more.

    Args:
        a, b: both,
            and on.
        c (`int`, *optional*): three: 3
    Raises:
        ValueError: never.
    """
    )
    assert found[""] == "First.\n\nMore:\n  still more."
    assert describe.items(found["Args"]) == {"a": "both, and on.", "b": "both, and on.", "c": "three: 3"}
    assert found["Raises"].strip() == "ValueError: never."


def test_settings_are_explained_by_the_nearest_docstring() -> None:
    class Base:
        """Base.

        Args:
            kept: from the base.
            told: from the base.
        """

    @dataclass
    class Child(Base):
        """Child.

        Attributes:
            told: from the child.
        """

        kept: int
        told: list[int] = field(default_factory=list)
        state: int = field(init=False, default=0)

    kept, told = describe.settings_of(Child)
    assert (kept.name, kept.required, kept.default, kept.meaning) == ("kept", True, None, "from the base.")
    assert (told.name, told.required, told.default, told.meaning) == ("told", False, [], "from the child.")


def test_a_tool_is_explained_by_its_docstring_its_parameters_and_its_card() -> None:
    found = describe.describe("soup")
    assert found.kind == "tool"
    assert found.paragraphs[0].startswith("Average those finished runs that help")
    rank = next(setting for setting in found.settings if setting.name == "rank")
    assert (rank.required, rank.default) == (False, None)
    assert all(setting.meaning for setting in found.settings)
    assert "arXiv:2203.05482" in found.source
    assert found.verdict.startswith("Measured: ")
    assert found.card.endswith("soup.md")
