"""The documentation is true: its code runs, it names everything there is, and every technique has its card."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from peft_plus import LossTerm, Param, Pass, Plugin, Run, registry
from peft_plus.cards import Card, card_of
from peft_plus.plugin import HOOKS, NEEDS

ROOT = Path(__file__).resolve().parent.parent
READMES = sorted(ROOT.glob("plugins/*/README.md"))
CARDS = sorted(ROOT.glob("plugins/*/*/cards/*.md"))
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *READMES, *CARDS]
CONTRACT = (ROOT / "docs" / "contract.md").read_text(encoding="utf-8")
PLUGINS = {name: registry.load(registry.entries("plugin")[name]) for name in registry.FIRST_PARTY}
TOOLS = {name: registry.load(registry.entries("tool")[name]) for name in registry.FIRST_PARTY_TOOLS}
HEADINGS = [
    "Claim",
    "Source",
    "What it does here",
    "Settings",
    "Needs / composes with",
    "Cost",
    "Oracle",
    "Measured verdict",
]
MAX_NOT_RUN = 3
"""Blocks of all pages together that are only compiled: each is one that may rot."""

BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>[\w-]+): (?P<note>[^\n]*?) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, text, line in the page, and the comment before it (`no-run` or `file`)."""

    language: str
    code: str
    line: int
    mark: str | None
    note: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(m["language"], m["code"], text[: m.start("code")].count("\n"), m["mark"], m["note"] or "")
        for m in BLOCK.finditer(text)
    ]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def python_blocks(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python"]


# ---- code ----------------------------------------------------------------------------------------------------------


def runnable(page: Path) -> Any:
    """A page as a test parameter, marked where its code works on the real models and sentences."""
    real = any("examples.inputs" in block.code for block in python_blocks(page))
    return pytest.param(page, marks=[pytest.mark.real] if real else [], id=named(page))


@pytest.mark.parametrize("page", [runnable(page) for page in PAGES if python_blocks(page)])
def test_python_blocks_run_as_printed(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace, in an empty folder. A traceback shows the line of the page."""
    monkeypatch.chdir(tmp_path)
    module = ModuleType(f"page_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    for block in python_blocks(page):
        # A part of a file stands under that file's `from __future__ import annotations`, as all of ours do.
        flags = annotations.compiler_flag if block.mark == "file" else 0
        code = compile("\n" * block.line + block.code, str(page), "exec", flags, dont_inherit=True)
        if block.mark != "no-run":
            exec(code, vars(module))


def test_few_blocks_are_not_run_and_each_says_why() -> None:
    skipped = [(named(page), block) for page in PAGES for block in python_blocks(page) if block.mark == "no-run"]
    assert all(block.note.strip() for _, block in skipped)
    assert len(skipped) <= MAX_NOT_RUN, skipped


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_blocks_of_a_file_are_that_files_text(page: Path) -> None:
    for block in blocks(page):
        assert block.mark in (None, "no-run", "file"), f"{named(page)}:{block.line}"
        if block.mark == "file":
            assert block.code in (ROOT / block.note).read_text(encoding="utf-8"), f"{named(page)}:{block.line}"


def test_the_tutorial_shows_the_whole_example() -> None:
    shown = {block.note: block.code for block in blocks(ROOT / "docs" / "writing_a_plugin.md") if block.mark == "file"}
    example = ROOT / "examples" / "third_party_plugin"
    for path in (example / "pyproject.toml", example / "peft_plus_confidence_penalty" / "__init__.py"):
        assert shown[named(path)] == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


# ---- the contract --------------------------------------------------------------------------------------------------


def part(heading: str) -> str:
    """One `## section` of the contract."""
    return CONTRACT.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


def first_cells(section: str) -> set[str]:
    """Every name in the first column of a section's tables."""
    return {name for row in re.findall(r"^\|([^|]*)\|", section, re.MULTILINE) for name in re.findall(r"`(\w+)", row)}


def test_every_hook_is_documented_with_its_parameters() -> None:
    documented = re.findall(r"^### `(.*)`$", part("Hooks"), re.MULTILINE)
    expected = []
    for hook in HOOKS:
        parameters = [name for name in inspect.signature(getattr(Plugin, hook)).parameters if name != "self"]
        expected.append(f"{hook}({', '.join(parameters)})")
    assert sorted(documented) == sorted(expected)


def uses(cls: type[Plugin], hook: str) -> bool:
    """Whether a plugin overrides the hook, or has state, which the default of the two state hooks saves and loads."""
    state = any(not field.init for field in dataclasses.fields(cls))
    return hook in cls.hooks() or (state and hook in ("state_dict", "load_state_dict"))


def test_every_hook_ships_with_a_plugin_that_uses_it() -> None:
    used = {hook: [name for name, cls in PLUGINS.items() if uses(cls, hook)] for hook in HOOKS}
    assert [hook for hook, names in used.items() if not names] == []
    sections = {text.split("`", 1)[1].split("(")[0]: text for text in part("Hooks").split("\n### ")[1:]}
    for hook, text in sections.items():
        (example,) = re.findall(r"\*\*Example\*\*: `(\w+)`", text)
        assert example in used[hook]


def test_every_class_variable_and_its_default_is_documented() -> None:
    tree = ast.parse(inspect.getsource(Plugin))
    (body,) = [node.body for node in tree.body if isinstance(node, ast.ClassDef)]
    declared = {n.target.id for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", part("Class variables"), re.MULTILINE))
    assert set(rows) == declared
    for name, default in rows.items():
        assert default == ("none" if name == "name" else f"`{getattr(Plugin, name)!r}`".replace("'", '"'))


def test_every_word_of_needs_is_documented() -> None:
    assert first_cells(part("Words of `needs`")) == set(NEEDS)


@pytest.mark.parametrize("cls", [Run, Param, LossTerm, Pass], ids=lambda cls: cls.__name__)
def test_everything_a_hook_is_given_is_documented(cls: type) -> None:
    public = {name for name, value in vars(cls).items() if not name.startswith("_") and callable(value)}
    public |= {name for name, value in vars(cls).items() if isinstance(value, property)}
    public |= {field.name for field in dataclasses.fields(cls)}
    documented = first_cells(part(cls.__name__))
    if cls is Run:  # the section ends with what a plugin asks of `run.task`
        documented -= first_cells(part("Run").split("run.task`:", 1)[1]) - public
    assert documented == public


# ---- cards ---------------------------------------------------------------------------------------------------------


def found(name: str) -> Card:
    return card_of(registry.find(name, ("plugin", "tool")))


def card(name: str) -> dict[str, str]:
    return found(name).texts


def test_every_plugin_of_this_repository_is_known() -> None:
    """The list that errors name distributions from, and by which these tests find the cards."""
    mine = {n: e.distribution for n, e in registry.entries("plugin").items() if e.target.startswith("peft_plus_")}
    here = {f"peft-plus-{folder.name}" for folder in ROOT.glob("plugins/*") if (folder / "pyproject.toml").is_file()}
    assert {n: home for n, home in mine.items() if home in here} == dict(registry.FIRST_PARTY)
    tools = {n: e.distribution for n, e in registry.entries("tool").items() if e.distribution in here}
    assert tools == dict(registry.FIRST_PARTY_TOOLS)


def test_every_card_is_found_under_its_title_and_linked_from_the_readme() -> None:
    assert sorted(CARDS) == sorted(Path(found(name).place) for name in [*PLUGINS, *TOOLS])
    for path in CARDS:
        package = path.parent.parent
        readme = (package.parent / "README.md").read_text(encoding="utf-8")
        assert path.read_text(encoding="utf-8").startswith(f"# {path.stem}\n\n## Claim\n")
        assert f"| [`{path.stem}`]({package.name}/cards/{path.name}) |" in readme


@pytest.mark.parametrize("name", [*PLUGINS, *TOOLS])
def test_card_has_every_heading_and_text_below_it(name: str) -> None:
    assert list(card(name)) == HEADINGS
    assert all(card(name).values())
    assert card(name)["Measured verdict"].startswith("Measured: ")


@pytest.mark.parametrize("name", PLUGINS)
def test_settings_of_a_card_are_those_of_the_class(name: str) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (?:`(.*?)`|required) \| (.+?) \|$", card(name)["Settings"], re.MULTILINE)
    fields = [field for field in dataclasses.fields(PLUGINS[name]) if field.init]
    defaults = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    assert {setting for setting, _, _ in rows} == {field.name for field in fields}
    assert {setting: ast.literal_eval(default) for setting, default, _ in rows if default} == defaults


@pytest.mark.parametrize("name", TOOLS)
def test_settings_of_a_tools_card_are_its_parameters(name: str) -> None:
    rows = re.findall(r"^\| `(\w+)` \|", card(name)["Settings"], re.MULTILINE)
    assert set(rows) == set(inspect.signature(TOOLS[name]).parameters)


@pytest.mark.parametrize("name", PLUGINS)
def test_card_cites_what_the_class_cites(name: str) -> None:
    papers = re.findall(r"arXiv:[\d.]*\d|doi:[\w./-]*\w", PLUGINS[name].source)
    assert papers or card(name)["Source"].startswith("No paper.")
    assert [paper for paper in papers if paper not in card(name)["Source"]] == []


@pytest.mark.parametrize("name", [*PLUGINS, *TOOLS])
def test_oracle_of_a_card_is_a_test_that_exists(name: str) -> None:
    path = re.search(r"`(plugins/[\w/]+\.py)`", card(name)["Oracle"])
    assert path is not None
    assert (ROOT / path[1]).is_file()
