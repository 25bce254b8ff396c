"""Answers on a terminal are broken between words, whatever pieces they come in, and lose nothing but blanks at a line's end."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.cli.screens.drawing import columns_of
from qlora_cli.cli.wrapping import MarkdownBlocks, WordWrap


def wrap(pieces, width):
    wrapping = WordWrap(lambda: width)
    return "".join(map(wrapping.feed, pieces)) + wrapping.end()


@pytest.mark.parametrize(
    ("text", "width", "shown"),
    [
        ("a bird in the hand", 7, "a bird\nin the\nhand"),
        ("  indented\n    more", 20, "  indented\n    more"),
        ("exactly ten", 11, "exactly ten"),
        ("one\n\ntwo three", 8, "one\n\ntwo\nthree"),
        ("東京東京", 4, "東京\n東京"),
        ("a" * 25 + " b", 10, "a" * 25 + " b"),
    ],
)
def test_lines_end_between_words(text, width, shown):
    assert wrap([text], width) == shown == wrap(text, width)


@given(pieces=st.lists(st.text("ab é東\n ", max_size=9), max_size=12), width=st.integers(2, 12))
def test_no_word_is_lost_or_broken(pieces, width):
    text, shown = "".join(pieces), wrap(pieces, width)
    assert shown == wrap(text, width)
    assert "".join(shown.split()) == "".join(text.split())
    for line in shown.split("\n"):
        assert columns_of(line.rstrip()) <= width or any(columns_of(word) > width for word in line.split())


def test_markdown_is_drawn_block_by_block_and_code_is_not_torn_apart():
    drawing = MarkdownBlocks(lambda: 40)
    pieces = ["A **bold", "** word.\n", "\n```python\na = 1\n", "\nb = 2\n", "```\n\n- one\n- t", "wo"]
    shown = [drawing.feed(piece) for piece in pieces] + [drawing.end()]
    assert shown[:2] == ["", ""] and "A \x1b[1mbold\x1b[0m word." in shown[2]
    assert shown[3] == ""  # its fence is open
    plain = re.sub(r"\x1b\[[0-9;]*m", "", "".join(shown))
    lines = [line.strip() for line in plain.split("\n") if line.strip()]
    assert lines == ["A bold word.", "a = 1", "b = 2", "• one", "• two"]
    assert drawing.feed("next") == "" and drawing.end() == "next"
