"""Screens of results at 40, 80 and 120 columns: the answer first, as text that is looked at when it changes."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from qlora_cli.cli.results import draw_screen
from qlora_cli.cli.screens import screen_of

HERE = Path(__file__).parent
RESULTS = json.loads((HERE / "screens.json").read_text(encoding="utf-8"))
WIDTHS = (40, 80, 120)


def draw(result, width, *, verbose=False) -> str:
    """A screen as text, as on a terminal of so many columns without colour."""
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=True, no_color=True, color_system=None, highlight=False)
    draw_screen(console, result, verbose=verbose)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def all_screens() -> str:
    """Every screen at every width, one after another."""
    return "\n".join(
        f"======== {name}, {width} columns\n{draw(result, width)}"
        for name, result in RESULTS.items()
        for width in WIDTHS
    )


def test_screens_are_those_that_were_looked_at():
    """Write them anew, and look at them, with: python -m tests.cli.test_screens"""
    assert all_screens() == (HERE / "screens.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_screen_begins_with_a_sentence_and_fits_its_columns(name, width):
    lines = draw(RESULTS[name], width).splitlines()
    assert max(map(len, lines)) <= width
    assert " ".join(lines).startswith(screen_of(RESULTS[name]).sentences[0].split(" ")[0])
    assert len(lines) <= 30 or width < 80


def test_verbose_shows_every_fact():
    text = draw(RESULTS["model"], 120, verbose=True)
    assert "flops per token" in text and "activation" in text
    assert "flops per token" not in draw(RESULTS["model"], 120)


if __name__ == "__main__":
    (HERE / "screens.txt").write_text(all_screens(), encoding="utf-8")
