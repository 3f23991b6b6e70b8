"""Outcomes test by test: what plain PEFT passes, peft_plus must pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


class Difference(NamedTuple):
    test: str
    plain: str
    ours: str


class Row(NamedTuple):
    """One test file, or all of them."""

    name: str
    tests: int
    plain_passed: int
    ours_passed: int
    broken: int
    differing: int


@dataclass(frozen=True)
class Comparison:
    """Two runs of the same tests: id → outcome, under plain PEFT and with peft_plus in its place."""

    plain: Mapping[str, str]
    ours: Mapping[str, str]

    def differences(self) -> list[Difference]:
        """Every test whose outcome is not the same, also where it is missing in one of the runs."""
        tests = sorted({*self.plain, *self.ours})
        pairs = (Difference(test, self.plain.get(test, "missing"), self.ours.get(test, "missing")) for test in tests)
        return [pair for pair in pairs if pair.plain != pair.ours]

    def broken(self) -> list[Difference]:
        """Those that pass with plain PEFT, and do not with peft_plus."""
        return [pair for pair in self.differences() if pair.plain == "passed"]

    def rows(self) -> list[Row]:
        """A row for each file, and one for all."""
        files = sorted({_file(test) for test in (*self.plain, *self.ours)})
        return [*(self._row(name, name) for name in files), self._row("all", "")]

    def _row(self, name: str, file: str) -> Row:
        def count(outcomes: Mapping[str, str]) -> Counter[str]:
            return Counter(outcome for test, outcome in outcomes.items() if not file or _file(test) == file)

        def within(pairs: list[Difference]) -> int:
            return sum(not file or _file(pair.test) == file for pair in pairs)

        plain, ours = count(self.plain), count(self.ours)
        return Row(
            name, plain.total(), plain["passed"], ours["passed"], within(self.broken()), within(self.differences())
        )


def table(rows: list[Row], mode: str) -> str:
    """The rows as a Markdown table."""
    head = f"| {mode} | tests | passed by plain PEFT | passed by peft_plus | broken | differing |"
    lines = [head, "|---|--:|--:|--:|--:|--:|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def _file(test: str) -> str:
    return test.partition("::")[0].removeprefix("tests/").removesuffix(".py")
