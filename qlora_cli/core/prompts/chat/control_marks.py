"""Control tokens that somebody typed: kept apart from those of the template while a conversation is rendered."""

import json
import re
from typing import Any

from qlora_cli.core.prompts.chat.printer import RenderError

# Unicode noncharacters, set aside for use inside a program: they stand for control tokens that somebody typed.
MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


class ControlMarks:
    """Replaces typed control tokens by marks before rendering, and puts them back as plain text afterwards.

    Args:
        control_tokens: Every control token of the tokenizer.
        control: Finds them.
    """

    def __init__(self, control_tokens: list[str], control: re.Pattern[str]) -> None:
        self._tokens = control_tokens
        self._control = control
        self._numbers = {token: number for number, token in enumerate(control_tokens)}

    def mark_all(self, values: list[Any]) -> tuple[str, list[Any]]:
        """A mark that these values do not hold, and the values with every control token that they hold marked.

        The mark is empty where they hold no control token.

        Raises:
            RenderError: They hold every mark there is.
        """
        if not self._holds(values):
            return "", values
        everything = json.dumps(values, ensure_ascii=False, default=str)
        mark = next((mark for mark in MARKS if mark not in everything), None)
        if mark is None:
            raise RenderError("a message holds every one of the noncharacters U+FDD0 to U+FDEF")
        return mark, self.mark(values, mark)

    def _holds(self, value: Any) -> bool:
        # Every conversation passes through here, so without generators: they double the time.
        if isinstance(value, str):
            return self._control.search(value) is not None
        if isinstance(value, dict):
            for key, item in value.items():
                if self._holds(key) or self._holds(item):
                    return True
        elif isinstance(value, list):
            for item in value:
                if self._holds(item):
                    return True
        return False

    def mark(self, value: Any, mark: str) -> Any:
        """The same value with every control token that it holds, in keys too, replaced by a mark and its number."""
        if isinstance(value, str):
            return self._control.sub(lambda match: f"{mark}{self._numbers[match[0]]}{mark}", value)
        if isinstance(value, list):
            return [self.mark(item, mark) for item in value]
        if isinstance(value, dict):
            return {self.mark(key, mark): self.mark(item, mark) for key, item in value.items()}
        return value

    def split(self, text: str, turn: int, mark: str) -> list[tuple[str, bool, int]]:
        """A rendered text as spans of letters and of control tokens; what was marked is letters again."""
        spans: list[tuple[str, bool, int]] = []
        at = 0
        for match in self._control.finditer(text):
            if at < match.start():
                spans.append((self.unmark(text[at : match.start()], mark), False, turn))
            spans.append((match[0], True, turn))
            at = match.end()
        if at < len(text):
            spans.append((self.unmark(text[at:], mark), False, turn))
        return spans

    def unmark(self, text: str, mark: str) -> str:
        """The text with the tokens that somebody typed in place of their marks."""
        if not mark:
            return text
        escaped = f"\\u{ord(mark):04x}"  # how ASCII JSON writes a mark
        if mark not in text and escaped not in text:
            return text
        either = f"(?:{mark}|{re.escape(escaped)})"
        return re.sub(f"{either}([0-9]+){either}", lambda match: self._tokens[int(match[1])], text)
