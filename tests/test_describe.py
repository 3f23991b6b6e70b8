"""Docstrings and annotations, as `peft-plus info` reads them."""

from __future__ import annotations

import ast
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


def test_code_in_a_docstring_keeps_its_lines_the_empty_ones_too() -> None:
    class Shown:
        """Do it
        so:
        ```python
        first(
            1,  # indented
        )


        second()
        ```
        Then go
        on.

        ```
        third()
        ```

        Args:
            none: of the description.
        """

    assert describe.paragraphs_of(Shown) == (
        "Do it so:",
        "```python\nfirst(\n    1,  # indented\n)\n\n\nsecond()\n```",
        "Then go on.",
        "```\nthird()\n```",
    )


def test_the_example_of_a_tool_is_python_that_fits_a_terminal() -> None:
    code = [part for part in describe.describe("search").paragraphs if part.startswith("```python")]
    assert len(code) == 1
    ast.parse(code[0].removeprefix("```python").removesuffix("```"))
    assert max(map(len, code[0].splitlines())) <= 80
