"""A record, or a prompt, and a Formatting in; runs of text and control tokens out, each trained on or not."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from string import Formatter
from typing import TYPE_CHECKING, Any

from qlora_cli.core.chat import (
    BadConversation,
    chat_process,
    check_messages,
    describe_type,
)
from qlora_cli.core.encoding import Run, TextEncoder, encoder_of
from qlora_cli.core.rendering import Piece
from qlora_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Record = dict[str, Any]
_Part = str | int | tuple[str]


@dataclass(frozen=True, kw_only=True)
class Formatting:
    """All that is needed to format a prompt at generation exactly as in training; kept beside the adapter.

    Attributes:
        shape: text, prompt, chat or tokens.
        column: The text, messages or input_ids column.
        prompt_column: Where a prompt given as plain text goes (shape prompt).
        completion_column: What is answered (shape prompt).
        optional_column: A column that may be empty (shape prompt).
        template: Text with {column} fields (shape prompt), or a Jinja chat template (shape chat).
        template_without_optional: Used where the optional column is empty.
        date: ISO date that a chat template sees as today.
        markup: Texts were formatted beforehand: control tokens written in them are control tokens (shape text).
    """

    shape: str
    column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    optional_column: str | None = None
    template: str | None = None
    template_without_optional: str | None = None
    date: str | None = None
    markup: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields, without those that say nothing."""
        return {name: value for name, value in asdict(self).items() if value not in (None, False)}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Formatting":
        """Reads what `to_dict` wrote; unknown keys are ignored."""
        return cls(**{name: content[name] for name in cls.__dataclass_fields__ if name in content})


class BadField(Exception):
    """Why a record cannot be formatted, as a sentence without its full stop."""


class Blank(Exception):
    """A record with nothing to train on; says which part is empty."""


class RowFormatter:
    """Formats records, and prompts, under one Formatting for one tokenizer.

    Raises:
        UsageError: The template has no place for the completion, or other faults.
        DataError: The chat template cannot be used.
    """

    def __init__(self, formatting: Formatting, encoder: TextEncoder) -> None:
        self.formatting = formatting
        self._encoder = encoder
        if formatting.shape == "prompt":
            assert formatting.template is not None and formatting.completion_column is not None
            self._long = PlainTemplate(formatting.template, formatting.completion_column, encoder)
            self._short = (
                PlainTemplate(formatting.template_without_optional, formatting.completion_column, encoder)
                if formatting.template_without_optional is not None
                else self._long
            )
        elif formatting.shape == "chat":
            assert formatting.template is not None
            self._chat = chat_process(formatting.template, encoder.spec, tuple(encoder.control_ids), formatting.date)

    def format_records(self, records: Sequence[Record], train_on: str) -> list[list[Run] | BadField | Blank]:
        """The runs of each record, BOS and EOS included; or why there are none.

        Args:
            records: One object a row.
            train_on: all, completion or last.
        """
        if self.formatting.shape == "chat":
            return self._format_chats(records, train_on)
        make = {"text": self._format_text, "prompt": self._format_pair}[self.formatting.shape]
        rows: list[list[Run] | BadField | Blank] = []
        for record in records:
            try:
                rows.append(self._close(make(record, train_on)))
            except (BadField, Blank) as reason:
                rows.append(reason)
        return rows

    def format_prompt(self, prompt: "str | Record | list[Record]") -> list[Run]:
        """The runs up to where the answer starts, BOS included.

        Raises:
            DataError: The prompt does not have the form that the formatting needs.
        """
        try:
            return self._encoder.with_prefix(self._prompt_runs(prompt))
        except BadField as reason:
            raise DataError(f"This prompt cannot be formatted: {reason}.") from reason

    def _prompt_runs(self, prompt: "str | Record | list[Record]") -> list[Run]:
        formatting = self.formatting
        if formatting.shape == "chat":
            if isinstance(prompt, str):
                prompt = [{"role": "user", "content": prompt}]
            if isinstance(prompt, dict) and formatting.column not in prompt:
                given = next((prompt[key] for key in ("prompt", "messages") if key in prompt), None)
                if given is None:
                    raise BadField(f"it has no {formatting.column!r} (it has {_listed(prompt)})")
                return self._prompt_runs(given)
            record = prompt if isinstance(prompt, dict) else {formatting.column or "messages": prompt}
            pieces = self._render([record], required="none", prompt_only=True)[0]
            if isinstance(pieces, BadField | Blank):
                raise BadField(str(pieces))
            return self._runs_of(pieces, lambda turn: False)
        if isinstance(prompt, list):
            raise BadField(f"a conversation was given, but the model was trained on the shape {formatting.shape!r}")
        if formatting.shape == "prompt":
            if isinstance(prompt, str):
                needed = list(
                    dict.fromkeys(name for name in self._short.fields if name != formatting.completion_column)
                )
                if len(needed) > 1:
                    raise BadField(f"the template has several fields; give an object with {_listed(needed)}")
                prompt = {needed[0] if needed else str(formatting.prompt_column): prompt}
            record = {**prompt, formatting.completion_column: "-"}
            if formatting.prompt_column not in record and "prompt" in record:
                record[formatting.prompt_column] = record["prompt"]
            return self._template_for(record).fill(record, trained=(False, True))[0]
        if isinstance(prompt, dict):
            if formatting.shape == "tokens":
                return [(token, False) for token in prompt[formatting.column or "input_ids"]]
            key = formatting.column if formatting.column in prompt else "prompt"
            prompt = _text(prompt, str(key))
        return self._text_runs(prompt, trained=False)

    def _text_runs(self, text: str, *, trained: bool) -> list[Run]:
        if not self.formatting.markup:
            return [(text, trained)] if text else []
        return [(part, trained) for part in self._encoder.split_markup(text.strip())]

    def _format_text(self, record: Record, train_on: str) -> list[Run]:
        text = _text(record, str(self.formatting.column))
        if not text.strip():
            raise Blank("empty text")
        return self._text_runs(text, trained=True)

    def _format_pair(self, record: Record, train_on: str) -> list[Run]:
        completion = _text(record, str(self.formatting.completion_column))
        if not completion.strip():
            raise Blank("empty completion")
        prompt, answer = self._template_for(record).fill(record, trained=(train_on == "all", True))
        return prompt + answer

    def _template_for(self, record: Record) -> "PlainTemplate":
        if self._short is self._long:
            return self._long
        optional = record.get(str(self.formatting.optional_column))
        return self._short if optional is None or (isinstance(optional, str) and not optional.strip()) else self._long

    def _format_chats(self, records: Sequence[Record], train_on: str) -> list[list[Run] | BadField | Blank]:
        required = {"completion": "all", "last": "last", "all": "none"}[train_on]
        rows: list[list[Run] | BadField | Blank] = []
        for pieces in self._render(records, required=required, prompt_only=False):
            if isinstance(pieces, BadField | Blank):
                rows.append(pieces)
                continue
            last = max(turn for _, _, turn in pieces)
            while pieces[-1][2] != last:  # what a template prints after the last answer
                pieces.pop()

            def trained(turn: int, last: int = last) -> bool:
                return train_on == "all" or (turn >= 0 and train_on == "completion") or turn == last

            rows.append(self._close(self._runs_of(pieces, trained)))
        return rows

    def _render(
        self, records: Sequence[Record], *, required: str, prompt_only: bool
    ) -> "list[list[Piece] | BadField | Blank]":
        checked: list[BadField | Blank | None] = []
        sent = []
        for record in records:
            try:
                messages = self._messages(record)
                if not prompt_only:
                    while messages and messages[-1]["role"] != "assistant":
                        messages.pop()
                    answers = [m for m in messages if m["role"] == "assistant"]
                    if not any(m["content"].strip() or m.get("tool_calls") for m in answers):
                        raise Blank("no answer")
            except (BadField, Blank) as reason:
                checked.append(reason)
                continue
            checked.append(None)
            sent.append((messages, record.get("tools")))
        answers = iter(self._chat.render(sent, required=required, prompt_only=prompt_only))
        return [reason or _pieces(next(answers)) for reason in checked]

    def _messages(self, record: Record) -> list[dict[str, Any]]:
        column = str(self.formatting.column or "messages")
        if column not in record:
            raise BadField(f"field {column!r} is missing (it has {_listed(record)})")
        try:
            return check_messages(record[column])
        except BadConversation as reason:
            raise BadField(f"field {column!r}: {reason}") from None

    def _runs_of(self, pieces: Sequence[Piece], trained: Callable[[int], bool]) -> list[Run]:
        """Pieces of a rendered chat to runs: one for each stretch of text of the same turn."""
        runs: list[Run] = []
        previous = -1
        for text, is_control, turn in pieces:
            if is_control:
                runs.append((self._encoder.control_ids[text], trained(turn)))
            else:
                if turn != previous:
                    text = _move_spaces(runs) + text if turn >= 0 else text
                runs.append((text, trained(turn)))
            previous = turn
        if previous < 0:
            _move_spaces(runs)  # a prompt: its last spaces go to the answer, as in training
        return runs

    def _close(self, runs: list[Run]) -> list[Run]:
        runs = self._encoder.with_prefix(runs)
        eos = self._encoder.spec.eos_id
        if runs and runs[-1][0] == eos:
            runs[-1] = (eos, True)
            return runs
        return [*runs, (eos, True)]


class PlainTemplate:
    """Text with {column} fields, parsed: what is before the completion is the prompt, the rest is the answer.

    Control tokens in the template's own words are control tokens; what a field holds is text. Spaces right before
    the completion are tokenised with it (" Paris" is one token, " " and "Paris" are not what models have seen).
    """

    def __init__(self, template: str, completion_column: str, encoder: TextEncoder) -> None:
        """Parses a template.

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

    def fill(self, record: Record, trained: tuple[bool, bool]) -> tuple[list[Run], list[Run]]:
        """Prompt and answer of a record.

        Raises:
            BadField: A field is missing, or is no text.
        """
        prompt, answer = (list(self._fill(side, record, flag)) for side, flag in zip(self._sides, trained, strict=True))
        spaces = _move_spaces(prompt)
        if spaces:
            first, flag = answer[0]
            answer[0:1] = [(spaces + first, flag)] if isinstance(first, str) else [(spaces, flag), answer[0]]
        return prompt, answer

    def _fill(self, side: "list[_Part]", record: Record, trained: bool) -> Iterator[Run]:
        text = ""
        for part in side:
            if isinstance(part, int):
                if text:
                    yield text, trained
                text = ""
                yield part, trained
            else:
                text += part if isinstance(part, str) else _text(record, part[0])
        if text:
            yield text, trained


def _template_hint(completion_column: str) -> str:
    return f'Write it like: --template "Question: {{question}}\\nAnswer: {{{completion_column}}}" ({{{{ for a brace).'


def _move_spaces(runs: list[Run]) -> str:
    """Takes the spaces at the end of the last text off it, and returns them."""
    if not runs or not isinstance(runs[-1][0], str):
        return ""
    text, trained = runs.pop()
    assert isinstance(text, str)
    kept = text.rstrip(" ")
    if kept:
        runs.append((kept, trained))
    return text[len(kept) :]


def _pieces(answer: "list[Piece] | BadConversation") -> "list[Piece] | BadField":
    return BadField(str(answer)) if isinstance(answer, BadConversation) else answer


def _text(record: Record, column: str) -> str:
    try:
        value = record[column]
    except KeyError:
        raise BadField(f"field {column!r} is missing (it has {_listed(record)})") from None
    if not isinstance(value, str):
        raise BadField(f"field {column!r} is {describe_type(value)}, not text")
    return value


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names) or "nothing"


def default_formatting(tokenizer: "PreTrainedTokenizerBase") -> Formatting:
    """For generation without a run record: the model's chat template if it has one, else raw text."""
    spec = encoder_of(tokenizer).spec
    if spec.chat_template is None:
        return Formatting(shape="text", column="text")
    return Formatting(shape="chat", column="messages", template=spec.chat_template, date=None)


def format_prompt(
    prompt: "str | Record | list[Record]", formatting: Formatting, tokenizer: "PreTrainedTokenizerBase"
) -> list[int]:
    """Ids of a prompt up to where its answer starts, the same that training on a row with this prompt gives.

    Args:
        prompt: Text; or an object with the trained columns (the completion is not needed); or chat messages.
        formatting: How the model was trained.
        tokenizer: The model's tokenizer.

    Raises:
        DataError: The prompt does not have the form that the formatting needs.
    """
    encoder = encoder_of(tokenizer)
    runs = RowFormatter(formatting, encoder).format_prompt(prompt)
    return [token for run in encoder.encode_rows([runs])[0] for token in run]
