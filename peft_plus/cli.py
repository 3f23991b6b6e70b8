"""The command line: arguments in, tables out. What it shows comes from `registry` and `describe`.

Heavy modules are imported inside the commands that need them, so that `peft-plus list` costs no torch.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import logging
import sys
import warnings
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from . import __version__, registry
from .errors import MethodError, PluginError
from .names import nearest

if TYPE_CHECKING:
    from .describe import Description, Setting

KINDS: dict[str, registry.Kind] = {"tuners": "tuner", "plugins": "plugin", "tasks": "task", "tools": "tool"}
"""What the user writes → the registry's word; also the order in which they are listed."""

PROSE = 34
"""Columns that an explanation needs beside a table's other columns."""

READABLE = 120
"""Columns that `info` uses at most: longer lines are hard to read."""

app = typer.Typer(
    name="peft-plus",
    help="Training practice for PEFT, as plugins that compose with any tuner.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

JSON = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def main() -> None:
    """Entry point of `peft-plus`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a pipe in an old encoding gets `?` for Σ, not a traceback
    app()


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"peft-plus {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command("list")
def list_names(
    kind: Annotated[str | None, typer.Argument(help="Tuners, plugins, tasks or tools.", show_default=False)] = None,
    as_json: JSON = False,
) -> None:
    """List the tuners, plugins, tasks and tools that are installed."""
    found: dict[str, list[registry.Entry]] = {}
    errors: list[str] = []
    for title in _titles(kind):
        try:
            found[title] = list(registry.entries(KINDS[title]).values())
        except PluginError as error:
            errors.append(str(error))
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(e) for entries in found.values() for e in entries], indent=2))
    else:
        _print_tables(found)
    for error in errors:
        _complain(error)
    if errors:
        raise typer.Exit(1)


@app.command()
def info(
    name: Annotated[str, typer.Argument(help="Name of a tuner, plugin, task or tool.", show_default=False)],
    as_json: JSON = False,
) -> None:
    """Explain one tuner, plugin, task or tool: what it does, its settings, and what was measured."""
    # Importing PEFT imports bitsandbytes, which reports kernels that it could not find; nothing here uses them.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from .describe import describe

    try:
        described = describe(name)
    except MethodError as error:
        _complain(str(error))
        raise typer.Exit(2) from None
    except PluginError as error:
        _complain(str(error))
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(described), indent=2, default=repr))
    else:
        console = _console()
        width = min(console.width, READABLE)
        _print(console, _page(described, width), width)


@app.command()
def schedule(
    method: Annotated[
        list[str],
        typer.Argument(help="Plugins, each followed by its settings: gradual_unfreeze every=100", show_default=False),
    ],
    model: Annotated[str, typer.Option(help="Hub id or folder of the base model; its weights are not loaded.")],
    task: Annotated[str, typer.Option(help="Name of the task, e.g. SEQ_CLS.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps of the run.")],
    steps_per_epoch: Annotated[int, typer.Option(help="Optimizer steps of one pass over the data.")] = 0,
    tuner: Annotated[str | None, typer.Option(help="Name of the tuner; full where none is named.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the run, for plugins that draw.")] = 42,
    stage: Annotated[str | None, typer.Option(help="Which stage, where the method has several.")] = None,
    as_json: JSON = False,
) -> None:
    """Write the schedule that plugins would follow as phases for freeze_plan, to be edited."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # of PEFT and transformers to each other
    from .build import outline
    from .schedule import as_yaml, freezing_schedule

    try:
        made = outline(model, _method(method, tuner), task=task)
        phases = freezing_schedule(made, max_steps=steps, steps_per_epoch=steps_per_epoch, seed=seed, stage=stage)
    except (MethodError, OSError) as error:
        _complain(str(error))
        raise typer.Exit(2) from None
    except PluginError as error:
        _complain(str(error))
        raise typer.Exit(1) from None
    typer.echo(json.dumps({"freeze_plan": {"phases": phases}}, indent=2) if as_json else as_yaml(phases))


def _method(words: Sequence[str], tuner: str | None) -> dict[str, dict[str, Any]]:
    """`["gradual_unfreeze", "every=100"]` as a mapping; values are JSON where they can be, else text."""
    method: dict[str, dict[str, Any]] = {tuner: {}} if tuner else {}
    name = ""
    for word in words:
        key, sign, text = word.partition("=")
        if not sign:
            if word in method:
                raise MethodError(f"{word!r} is named twice; give it once, with its settings.")
            name, method[word] = word, {}
        elif not name:
            raise MethodError(f"{word!r} is a setting, but of what? Write the plugin's name before it.")
        elif key in method[name]:
            raise MethodError(f"The setting {key!r} of {name!r} is given twice.")
        else:
            try:
                method[name][key] = json.loads(text)
            except ValueError:
                method[name][key] = text
    return method


def _titles(kind: str | None) -> Sequence[str]:
    if kind is None:
        return list(KINDS)
    title = kind.lower().removesuffix("s") + "s"
    if title not in KINDS:
        _complain(f"There is no kind {kind!r}.{nearest(kind, KINDS)} Kinds: {', '.join(KINDS)}.")
        raise typer.Exit(2)
    return [title]


# ---- list ----------------------------------------------------------------------------------------------------------


def _print_tables(found: dict[str, list[registry.Entry]]) -> None:
    console = _console()
    for title, entries in found.items():
        rows = [(entry.name, entry.origin, entry.summary) for entry in entries]
        # In a pipe every name has one line, for grep; on a terminal the text folds.
        width = console.width if console.is_terminal else sum(map(len, itertools.chain(*rows))) + 100
        body = _explained(("name", "from", "what it does"), rows, ("  ",), width)
        if not entries:
            body = Text("none; `pip install 'peft-plus[all]'` brings this project's own", style="dim")
        _print(console, Group(_title(f"{title} ({len(entries)})"), body, Text()), width)
    if console.is_terminal:
        hint = Text("`peft-plus info NAME` shows settings, source and what was measured.", style="dim")
        _print(console, hint, console.width)


def _explained(
    headers: Sequence[str], rows: Sequence[Sequence[str]], marks: Sequence[str], width: int
) -> RenderableType:
    """Rows whose last cell is prose: a table where that has room beside the others, else a list with it below.

    Args:
        marks: what stands before the cells between name and prose where they share a line.
    """
    others = sum(max((len(row[column]) for row in rows), default=0) + 2 for column in range(len(headers) - 1))
    if width - others >= PROSE:
        table = Table(box=None, show_header=any(headers), header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
        for header in headers[:-1]:
            table.add_column(header, no_wrap=True)
        table.add_column(headers[-1])
        for name, *middle, prose in rows:
            table.add_row(Text(name, style="bold"), *map(Text, middle), _prose(prose))
        return table
    lines: list[RenderableType] = []
    for name, *middle, prose in rows:
        rest = "".join(mark + cell for mark, cell in zip(marks, middle, strict=True))
        lines.append(Text.assemble((name, "bold"), rest, overflow="fold"))
        if prose:
            lines.append(Padding(_prose(prose), (0, 0, 0, 4)))
    return Group(*lines)


# ---- info ----------------------------------------------------------------------------------------------------------


def _page(it: Description, width: int) -> RenderableType:
    head = Text.assemble((it.name, "bold"), ("  ", ""), (f"{it.kind} · {it.distribution} {it.version}", "dim"))
    parts: list[RenderableType] = [head, Text()]
    for paragraph in it.paragraphs:
        parts += [_prose(paragraph), Text()]
    parts += [_title("settings"), _settings(it.settings, width), Text()]
    facts = list(_facts(it))
    if facts:
        parts.append(_explained(("", ""), facts, (), width))
    return Group(*parts)


def _facts(it: Description) -> Iterable[tuple[str, str]]:
    if it.kind == "plugin":
        yield "hooks", ", ".join(it.hooks) or "none"
        yield "needs", "; ".join(f"{word}: {meaning}" for word, meaning in it.needs.items()) or "nothing special"
        yield "conflicts", ", ".join(it.conflicts) or "none declared"
        if it.after:
            yield "after", ", ".join(it.after)
    if it.kind in ("plugin", "tool"):
        yield "source", it.source or "none given"
        yield "measured", it.verdict.removeprefix("Measured: ") or "its distribution has no card for it"
        if it.card:
            yield "card", it.card
    if it.target:
        yield "function" if it.kind == "tool" else "class", it.target


def _settings(settings: Sequence[Setting], width: int) -> RenderableType:
    if not settings:
        return Text("none", style="dim")
    rows = [(s.name, s.type, "required" if s.required else _value(s.default), s.meaning) for s in settings]
    return _explained(("name", "type", "default", "meaning"), rows, (": ", " = "), width)


def _value(default: Any) -> str:
    """A default as it would be written in Python; an enum as the word that stands for it."""
    return repr(default.value if isinstance(default, Enum) else default)


# ---- terminal ------------------------------------------------------------------------------------------------------


def _console(*, stderr: bool = False) -> Console:
    return Console(stderr=stderr, highlight=False, soft_wrap=False)


def _title(text: str) -> Text:
    return Text(text.capitalize(), style="bold cyan")


def _prose(text: str) -> Text:
    """Folded between words, and inside a word only where it alone is wider than the line."""
    return Text(text, overflow="fold")


def _print(console: Console, shown: RenderableType, width: int) -> None:
    """Print without the spaces with which rich fills its lines."""
    for line in console.render_lines(shown, console.options.update(width=width), pad=False):
        text = Text.assemble(*((segment.text, segment.style or "") for segment in line))
        text.rstrip()
        console.print(text, soft_wrap=True)


def _complain(message: str) -> None:
    console = _console(stderr=True)
    _print(console, Text.assemble(("error: ", "bold red"), message), console.width)
