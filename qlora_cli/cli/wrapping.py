"""Answers on a terminal, broken between words while they stream in."""

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
