"""Results drawn on stdout as facts and tables, and prepared rows in colour or in brackets."""

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_cli.cli.units import format_value, split_unit
from qlora_cli.cli.waiting import draws_on
from qlora_cli.events import RowShown


def make_console(stream: TextIO, width: int | None = None) -> Console:
    """rich's console on a stream, as wide as the terminal unless it is said, and without styles where nothing is drawn."""
    return Console(file=stream, highlight=False, width=width, force_terminal=None if draws_on(stream) else False)


def _write_trimmed(console: Console, text: str) -> None:
    """Text without the blanks that fill a column or follow a table."""
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    console.file.write(re.sub(r"\n{3,}", "\n\n", lines).strip("\n") + "\n")
    console.file.flush()


def draw_result(console: Console, result: dict[str, Any]) -> None:
    """Facts in two columns, then each table; a key's ending says the unit.

    Args:
        console: Where to.
        result: Facts by name, nested ones too; `kind` is the heading, `tables` a list of
            `{"title", "columns", "rows"}`; `next`, commands to type, are the caller's to show.
    """
    if result.get("kind"):
        console.print(Text(str(result["kind"]).replace("_", " "), "bold"))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in _rows({key: value for key, value in result.items() if key not in ("kind", "tables", "next")}):
        grid.add_row(Text(label, "dim"), Text(value))
    with console.capture() as captured:
        console.print(grid)
    tables = result.get("tables", ())
    _write_trimmed(console, captured.get())
    if tables:
        console.file.write("\n")
        draw_tables(console, tables)


def draw_tables(console: Console, tables: Iterable[dict[str, Any]]) -> None:
    """Each `{"title", "columns", "rows"}` as a table, an empty line between two."""
    with console.capture() as captured:
        for position, table in enumerate(tables):
            if position:
                console.print()
            console.print(_table(table), crop=False)
    _write_trimmed(console, captured.get())


def _rows(facts: dict[str, Any], depth: int = 0) -> Iterator[tuple[str, str]]:
    for key, value in facts.items():
        label = "  " * depth + split_unit(key)[0]
        if value is None:
            continue  # JSON has it; for the eye it says nothing
        if isinstance(value, dict) and value:
            yield label, ""
            yield from _rows(value, depth + 1)
        elif isinstance(value, list | tuple) and len(value) > 1 and any(" " in str(item) for item in value):
            for position, item in enumerate(value):  # sentences: one a line
                yield (label if position == 0 else ""), format_value(key, item)
        else:
            yield label, format_value(key, value)


def _table(content: dict[str, Any]) -> Table:
    columns, rows = content["columns"], content["rows"]
    table = Table(
        title=content.get("title"), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for position, column in enumerate(columns):
        numeric = all(isinstance(row[position], int | float | None) for row in rows)
        shown = [format_value(column, row[position]) for row in rows]
        whole = max(map(len, shown), default=0) if numeric else None  # a broken number is another one
        justify: Literal["left", "right"] = "right" if numeric else "left"
        table.add_column(split_unit(column)[0], justify=justify, overflow="fold", no_wrap=numeric, min_width=whole)
    for row in rows:
        table.add_row(*(Text(format_value(column, value)) for column, value in zip(columns, row, strict=True)))
    return table


def draw_row(console: Console, event: RowShown) -> None:
    """One prepared row: what is trained on green and bold, or in ⟦brackets⟧ where there is no colour; before each part
    ‹the messages or columns› that it shows.

    Where it takes more than its lines, the middle of its longest pieces is left out, and then pieces in the middle.
    """
    head = Text(f"Row {event.index}: {event.tokens:,} tokens, {event.trained_tokens:,} trained", "bold")
    head += Text(f"; {event.origin}" if event.origin else "", "dim")
    console.print(head, soft_wrap=not console.is_terminal)
    if event.left_out:
        said = Text(f"left out by the chat template: {'; '.join(event.left_out)}", "yellow")
        console.print(
            said, soft_wrap=event.most_lines is None, no_wrap=event.most_lines is not None, overflow="ellipsis"
        )
    in_colour = console.is_terminal and not console.no_color
    sources = event.sources or ("",) * len(event.pieces)
    named = [
        (f"‹{source}› {text}" if source else text, trained)
        for source, (text, trained) in zip(sources, event.pieces, strict=True)
    ]
    groups = itertools.groupby(named, key=lambda piece: piece[1])
    parts = [("".join(piece[0] for piece in pieces), trained) for trained, pieces in groups]
    if event.most_lines is not None:
        parts = _shorten(parts, event.most_lines, console.width)
    line = Text()
    for text, trained in parts:
        if in_colour:
            line.append(text.replace("\n", "↵\n"), "bold green" if trained else "dim")
        else:
            line.append(f"⟦{text}⟧" if trained else text)
    console.print(line, soft_wrap=not in_colour)
    console.print()


def _shorten(parts: list[tuple[str, bool]], most_lines: int, width: int) -> list[tuple[str, bool]]:
    """The parts within so many lines, as far as that goes: shorter ones first, then fewer."""
    whole = parts
    for letters in (800, 400, 240, 160, 100, 60, 30):
        if _count_lines(parts, width) <= most_lines:
            return parts
        parts = [(_cut(text, letters), trained) for text, trained in whole]
    while len(parts) > 3 and _count_lines(parts, width) > most_lines:
        middle = len(parts) // 2
        parts = [*parts[: middle - 1], (" … ", False), *parts[middle + 1 :]]
        if parts[middle - 2][0] == " … ":
            del parts[middle - 2]
    return parts


def _cut(text: str, letters: int) -> str:
    """A text without its middle, if it is longer than this."""
    if len(text) <= letters + 40:
        return text
    head = letters // 2
    return f"{text[:head]} … {len(text) - letters:,} letters … {text[head - letters :]}"


def _count_lines(parts: list[tuple[str, bool]], width: int) -> int:
    text = "".join(f"⟦{text}⟧" if trained else text for text, trained in parts)
    return sum(1 + max(0, len(line) - 1) // width for line in text.split("\n"))
