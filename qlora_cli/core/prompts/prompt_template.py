"""Prompt templates with {column} fields: a record to the runs of its prompt and of its answer."""

from collections.abc import Iterable, Iterator
from string import Formatter

from qlora_cli.core.prompts.encoder import Run, TextEncoder
from qlora_cli.core.records.record import BadField, Record, describe_type
from qlora_cli.errors import UsageError

_Part = str | int | tuple[str]


class PromptTemplate:
    """Text with {column} fields, parsed: what is before the completion is the prompt, the rest is the answer.

    Control tokens in the template's own words are control tokens; what a field holds is text. Spaces right before
    the completion are tokenised with it (" Paris" is one token, " " and "Paris" are not what models have seen).
    """

    def __init__(self, template: str, completion_column: str, encoder: TextEncoder, *, markup: bool = False) -> None:
        """Parses a template; with `markup`, control tokens written in fields are control tokens too.

        Raises:
            UsageError: It is malformed, or does not hold the completion exactly once.
        """
        self.fields = self.fields_of(template)
        if self.fields.count(completion_column) != 1:
            raise UsageError(
                f"The template {template!r} must hold the completion {{{completion_column}}} once.",
                _template_hint(completion_column),
            )
        # Each part is text of the template (str), a control token (int) or the name of a field (tuple of one).
        sides: tuple[list[_Part], list[_Part]] = ([], [])
        side = 0
        for literal, name, _, _ in Formatter().parse(template):
            sides[side].extend(encoder.split_markup(literal))
            if name is not None:
                side = 1 if name == completion_column else side
                sides[side].append((name,))
        answer = sides[1]
        if len(answer) > 1 and isinstance(answer[-1], str) and isinstance(answer[-2], int) and not answer[-1].strip():
            answer.pop()  # a line end after </s> is no part of the answer
        self._sides = sides
        self._split = encoder.split_markup if markup else None

    @staticmethod
    def fields_of(template: str) -> list[str]:
        """The columns that a template names.

        Raises:
            UsageError: It is malformed.
        """
        try:
            parsed = list(Formatter().parse(template))
        except ValueError as error:
            raise UsageError(f"The template {template!r} is malformed: {error}.", _template_hint("answer")) from None
        fields = [name for _, name, _, _ in parsed if name is not None]
        if any(spec or conversion for _, _, spec, conversion in parsed) or not all(fields):
            raise UsageError(
                f"The template {template!r} has a field that is no plain column name.", _template_hint("answer")
            )
        return fields

    def fill_prompt(self, record: Record, *, trained: bool) -> tuple[list[Run], str]:
        """The prompt of a record, and the spaces at its end, which go to the answer.

        Raises:
            BadField: A field is missing, or is no text.
        """
        prompt = list(self._fill(self._sides[0], record, trained))
        return prompt, move_spaces(prompt)

    def fill(self, record: Record, *, train_prompt: bool) -> list[Run]:
        """Prompt and answer of a record.

        Raises:
            BadField: A field is missing, or is no text.
        """
        prompt, spaces = self.fill_prompt(record, trained=train_prompt)
        answer = list(self._fill(self._sides[1], record, True, spaces))
        return prompt + answer

    def _fill(self, side: list[_Part], record: Record, trained: bool, text: str = "") -> Iterator[Run]:
        for part in side:
            pieces: list[str | int] = [part] if isinstance(part, str | int) else [text_of(record, part[0])]
            if self._split and isinstance(part, tuple):
                pieces = self._split(str(pieces[0]))
            for piece in pieces:
                if isinstance(piece, str):
                    text += piece
                    continue
                if text:
                    yield text, trained
                text = ""
                yield piece, trained
        if text:
            yield text, trained


def _template_hint(completion_column: str) -> str:
    return f'Write it like: --template "Question: {{question}}\\nAnswer: {{{completion_column}}}" ({{{{ for a brace).'


def move_spaces(runs: list[Run]) -> str:
    """Takes the spaces at the end of the last text off it, and returns them."""
    if not runs or not isinstance(runs[-1][0], str):
        return ""
    text, trained = runs.pop()
    assert isinstance(text, str)
    kept = text.rstrip(" ")
    if kept:
        runs.append((kept, trained))
    return text[len(kept) :]


def text_of(record: Record, column: str) -> str:
    """The text in a column.

    Raises:
        BadField: It is missing, or is no text.
    """
    try:
        value = record[column]
    except KeyError:
        raise BadField(f"field {column!r} is missing (it has {listed(record)})") from None
    if not isinstance(value, str):
        raise BadField(f"field {column!r} is {describe_type(value)}, not text")
    return value


def listed(names: Iterable[str]) -> str:
    """Names in quotes, for a message."""
    return ", ".join(map(repr, names)) or "nothing"
