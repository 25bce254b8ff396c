"""Screen drawn as text: the answer first, then facts in two columns, wrapped where the terminal ends.

Without rich, whose import takes longer than all that `inspect` of an adapter does; what it draws are tables, and all facts.
"""

import os
import sys
import textwrap
import unicodedata
from typing import Any, TextIO

from qlora_cli.cli.screens import screen_of
from qlora_cli.cli.waiting import draws_on

NARROW = 60  # columns below which a fact stands under its name
GAP = 2  # columns between a name and its fact
BOLD, DIM, PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[0m"


def draw_screen(stream: TextIO, result: dict[str, Any], *, verbose: bool, width: int | None = None) -> None:
    """The answer and a short table; with `verbose`, or where a result has no screen, all its facts.

    Args:
        stream: Where to; a terminal gets bold and dim letters, and sentences that are wrapped.
        result: As for `cli/results.py`.
        verbose: Whether all facts follow.
        width: In columns; by default that of the terminal, or 80.
    """
    width = width or columns_of_terminal()
    screen, styled = screen_of(result), draws_on(stream)
    lines: list[str] = []
    for position, sentence in enumerate(screen.sentences if screen else ()):
        for line in wrap(sentence, width) if stream.isatty() else [sentence]:
            lines.append(f"{BOLD}{line}{PLAIN}" if styled and position == 0 else line)
    if screen is None or verbose:
        from qlora_cli.cli.results import draw_result, make_console

        stream.write("".join(f"{line}\n" for line in [*lines, ""] if screen))
        draw_result(make_console(stream, width), result)
        return
    lines.append("")
    column = max((columns_of(label) for label, _ in screen.facts), default=0) + GAP
    for label, value in screen.facts:
        shown = f"{DIM}{label}{PLAIN}" if styled else label
        if width < NARROW:
            lines += [shown, *(f"  {line}" for line in wrap(value, width - 2))]
        else:
            first, *others = wrap(value, max(1, width - column))
            lines.append(shown + " " * (column - columns_of(label)) + first)
            lines += [" " * column + line for line in others]
    while lines and not lines[-1]:
        lines.pop()
    stream.write("\n".join(line.rstrip() for line in lines) + "\n")
    if screen.tables:
        from qlora_cli.cli.results import draw_tables, make_console

        stream.write("\n")
        draw_tables(make_console(stream, width), screen.tables)
    stream.flush()


def columns_of_terminal() -> int:
    """Columns of the terminal, as `shutil.get_terminal_size` finds them, which takes longer to import than to draw."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns):
        return int(columns)
    try:
        return os.get_terminal_size(sys.__stdout__.fileno()).columns or 80  # type: ignore[union-attr]
    except (AttributeError, ValueError, OSError):
        return 80


def columns_of(text: str) -> int:
    """Columns of a terminal that a text takes: two for wide letters, none for what joins the letter before."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
    )


def wrap(text: str, width: int) -> list[str]:
    """A text in lines of at most so many columns, broken at blanks; a word that is longer is broken too."""
    lines = []
    for line in text.split("\n") if text else [""]:
        wide = columns_of(line) / max(1, len(line))  # columns a letter
        lines += textwrap.wrap(line, max(1, int(width / max(1.0, wide))), break_on_hyphens=False) or [""]
    return lines
