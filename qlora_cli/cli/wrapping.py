"""Answers on a terminal, broken between words or drawn as Markdown while they stream in."""

import io
import unicodedata
from collections.abc import Callable

from qlora_cli.cli.screens.drawing import columns_of


class WordWrap:
    """Text in pieces to text in which no word is broken where the terminal's line ends.

    The last word is held back until it is whole. Wide letters, between which a line may end anywhere, are not; a word longer
    than a line is left to the terminal.

    Args:
        width: Tells the terminal's columns, which may change.
    """

    def __init__(self, width: Callable[[], int]) -> None:
        self._width = width
        self._column = 0  # where the next letter goes
        self._blanks = ""  # since the last word; dropped where a line ends instead
        self._word = ""  # that has not ended
        self._goes_on = False  # whether a part of it is shown already

    def feed(self, text: str) -> str:
        """What may be shown after a further piece."""
        return "".join(map(self._take, text))

    def end(self) -> str:
        """What is left at the end of an answer; the next one begins on a line of its own."""
        shown = self._place_word()
        self._column, self._blanks = 0, ""
        return shown

    def _take(self, letter: str) -> str:
        if letter == "\n":
            shown = self._place_word() + letter
            self._column, self._blanks = 0, ""
            return shown
        if letter.isspace():
            shown = self._place_word()
            self._blanks += letter
            return shown
        if unicodedata.east_asian_width(letter) in "WF":
            return self._place_word() + self._place(letter)
        self._word += letter
        if len(self._word) < self._width():
            return ""
        shown, self._goes_on = self._place_word(), True
        return shown

    def _place_word(self) -> str:
        word, self._word = self._word, ""
        shown = self._place(word) if word else ""
        self._goes_on = False
        return shown

    def _place(self, word: str) -> str:
        width, columns = max(1, self._width()), columns_of(word)
        blanks, self._blanks = self._blanks, ""
        before = self._column + columns_of(blanks.expandtabs())
        if (self._column or blanks) and before + columns > width and not self._goes_on:
            shown = f"\n{word}" if self._column else word
            self._column = (columns - 1) % width + 1
            return shown
        self._column = (before + columns - 1) % width + 1  # a word longer than a line goes on in the next
        return blanks + word


class MarkdownBlocks:
    """Text in pieces to Markdown drawn block by block: a paragraph, list or piece of code is shown once it is whole.

    Args:
        width: Tells the terminal's columns, which may change.
    """

    def __init__(self, width: Callable[[], int]) -> None:
        self._width = width
        self._text = ""  # of the block that has not ended
        self._shown = False  # whether another block of this answer stands above

    def feed(self, text: str) -> str:
        """What may be shown after a further piece."""
        self._text += text
        shown = ""
        while (end := self._end_of_block()) is not None:
            block, self._text = self._text[:end], self._text[end:].lstrip("\n")
            shown += f"{self._draw(block)}\n"
        return shown

    def end(self) -> str:
        """What is left at the end of an answer."""
        shown = self._draw(self._text) if self._text.strip() else ""
        self._text, self._shown = "", False
        return shown

    def _end_of_block(self) -> int | None:
        """Where an empty line ends the block, outside of code between fences."""
        end = self._text.find("\n\n")
        while end >= 0 and self._text.count("```", 0, end) % 2:
            end = self._text.find("\n\n", end + 1)
        return end if end >= 0 else None

    def _draw(self, block: str) -> str:
        from rich.console import Console
        from rich.markdown import Markdown

        stream = io.StringIO()
        Console(file=stream, width=self._width(), force_terminal=True).print(Markdown(block))
        lines = [line.rstrip() for line in stream.getvalue().strip("\n").split("\n")]
        gap, self._shown = "\n" if self._shown else "", True
        return gap + "\n".join(lines)
