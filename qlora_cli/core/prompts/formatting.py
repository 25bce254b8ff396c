"""Formatting: records and prompts to runs of text and control tokens, each trained on or not."""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from qlora_cli.core.prompts.chat_renderer import RenderedRow, RenderedSpan
from qlora_cli.core.prompts.chat_template import chat_process
from qlora_cli.core.prompts.encoder import Run, TextEncoder, encoder_of
from qlora_cli.core.prompts.prompt_template import PromptTemplate, listed, move_spaces, text_of
from qlora_cli.core.records.conversation import Conversation, ConversationColumns, read_conversation
from qlora_cli.core.records.messages import KNOWN_ROLES
from qlora_cli.core.records.record import BadField, Blank, Record, problem_of_record
from qlora_cli.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Formatting:
    """All that is needed to format a prompt at generation exactly as in training; kept beside the adapter.

    Attributes:
        format: text, prompt, chat or tokens.
        column: The text, messages or input_ids column.
        prompt_column: Where a prompt given as plain text goes (format prompt).
        completion_column: What is answered (format prompt).
        optional_column: A column that may be empty (format prompt).
        template: Text with {column} fields (format prompt), or a Jinja chat template (format chat).
        template_without_optional: Used where the optional column is empty.
        date: ISO date that a chat template sees as today.
        conversation: Where a record holds its conversation (format chat); None: `column` and `tools`.
        markup: Texts were formatted beforehand: control tokens written in them are control tokens (format text).
    """

    format: str
    column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    optional_column: str | None = None
    template: str | None = None
    template_without_optional: str | None = None
    date: str | None = None
    conversation: ConversationColumns | None = None
    markup: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields, without those that say nothing."""
        content = {name: value for name, value in asdict(self).items() if value not in (None, False)}
        if self.conversation is not None:
            content["conversation"] = {name: value for name, value in content["conversation"].items() if value}
        return content

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Formatting":
        """Reads what `to_dict` wrote, also when `format` was called `shape`; unknown keys are ignored."""
        known = {name: content[name] for name in cls.__dataclass_fields__ if name in content}
        if conversation := known.get("conversation"):
            names = ConversationColumns.__dataclass_fields__
            known["conversation"] = ConversationColumns(**{k: v for k, v in conversation.items() if k in names})
        return cls(**{"format": content.get("shape"), **known})


Formatted = list[list[Run]] | BadField | Blank


class RowFormatter:
    """Formats records, and prompts, under one Formatting for one tokenizer.

    Attributes:
        formatting: As given.
        unanswered: Conversations so far whose last messages had no answer and were left out.
        unfolded: Conversations so far that became a row for each answer.

    Raises:
        UsageError: The template has no place for the completion, or other faults.
        DataError: The chat template cannot be used.
    """

    def __init__(self, formatting: Formatting, encoder: TextEncoder) -> None:
        self.formatting = formatting
        self.unanswered = self.unfolded = 0
        self._encoder = encoder
        if formatting.format == "prompt":
            assert formatting.template is not None and formatting.completion_column is not None
            self._long = PromptTemplate(formatting.template, formatting.completion_column, encoder)
            self._short = (
                PromptTemplate(formatting.template_without_optional, formatting.completion_column, encoder)
                if formatting.template_without_optional is not None
                else self._long
            )
        elif formatting.format == "chat":
            assert formatting.template is not None
            names = tuple(sorted(encoder.spec.names.items()))
            self._chat = chat_process(formatting.template, names, tuple(encoder.control_ids), formatting.date)
            self._columns = formatting.conversation or ConversationColumns(messages=formatting.column, tools="tools")
            self._roles = KNOWN_ROLES | set(re.findall(r"""["']([\w -]+)["']""", formatting.template))

    def format_records(self, records: Sequence[Record], train_on: str) -> list[Formatted]:
        """The rows of each record (one, but for some chats) as runs, BOS and EOS included; or why there are none.

        Args:
            records: One object a row.
            train_on: all, completion or last.
        """
        if self.formatting.format == "chat":
            return self._format_chats(records, train_on)
        make = self._format_text if self.formatting.format == "text" else self._format_pair
        rows: list[Formatted] = []
        for record in records:
            try:
                rows.append([self._close(make(record, train_on))])
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
        if self.formatting.format == "chat":
            return self._chat_prompt(prompt)
        if isinstance(prompt, list):
            raise BadField(
                f"it is a conversation, but the model was trained on rows of the format {self.formatting.format!r}"
            )
        if self.formatting.format == "prompt":
            return self._pair_prompt(prompt)
        column = str(self.formatting.column)
        if isinstance(prompt, dict):
            if self.formatting.format == "tokens" and column in prompt:
                return [(token, False) for token in prompt[column]]
            prompt = text_of(prompt, column if column in prompt else "prompt")
        return self._text_runs(prompt, trained=False)

    def _text_runs(self, text: str, *, trained: bool) -> list[Run]:
        parts = self._encoder.split_markup(text) if self.formatting.markup else [text] if text else []
        return [(part, trained) for part in parts]

    def _format_text(self, record: Record, train_on: str) -> list[Run]:
        text = text_of(record, str(self.formatting.column))
        if not text.strip():
            raise Blank("empty text")
        return self._text_runs(text.strip() if self.formatting.markup else text, trained=True)

    def _format_pair(self, record: Record, train_on: str) -> list[Run]:
        if not text_of(record, str(self.formatting.completion_column)).strip():
            raise Blank("empty completion")
        return self._template_for(record).fill(record, train_prompt=train_on == "all")

    def _pair_prompt(self, prompt: str | Record) -> list[Run]:
        column = str(self.formatting.prompt_column)
        if isinstance(prompt, str):
            needed = dict.fromkeys(name for name in self._short.fields if name != self.formatting.completion_column)
            if len(needed) > 1:
                raise BadField(f"the template has several fields; give an object with {listed(needed)}")
            prompt = {column: prompt}
        elif column not in prompt and "prompt" in prompt:
            prompt = {**prompt, column: prompt["prompt"]}
        return self._template_for(prompt).fill_prompt(prompt, trained=False)[0]

    def _template_for(self, record: Record) -> PromptTemplate:
        if self._short is self._long:
            return self._long
        optional = record.get(str(self.formatting.optional_column))
        return self._short if optional is None or (isinstance(optional, str) and not optional.strip()) else self._long

    def _chat_prompt(self, prompt: "str | Record | list[Record]") -> list[Run]:
        column = str(self._columns.messages or self._columns.prompt)
        if isinstance(prompt, dict) and column not in prompt:
            given = next((name for name in ("messages", "prompt") if name in prompt), None)
            if given is None:
                raise BadField(f"it has no {column!r} (it has {listed(prompt)})")
            prompt = {**prompt, column: prompt[given]}
        elif not isinstance(prompt, dict):
            prompt = {column: prompt}
        if column == self._columns.messages and isinstance(prompt[column], str):
            prompt = {**prompt, column: [{"role": "user", "content": prompt[column]}]}
        rendered, _ = self._render([prompt], train_on="all", prompt_only=True)[0]
        if isinstance(rendered, BadField | Blank):
            raise BadField(str(rendered))
        ((spans, _),) = rendered
        return self._runs_of(spans, lambda turn: False)

    def _format_chats(self, records: Sequence[Record], train_on: str) -> list[Formatted]:
        rows: list[Formatted] = []
        for rendered, flags in self._render(records, train_on=train_on, prompt_only=False):
            if isinstance(rendered, BadField | Blank):
                rows.append(rendered)
                continue
            self.unfolded += len(rendered) > 1
            made = [self._chat_row(spans, "last" if only_last else train_on, flags) for spans, only_last in rendered]
            trained = [row for row in made if any(is_trained for _, is_trained in row)]
            rows.append(trained or Blank("no answer that the data lets be trained"))
        return rows

    def _chat_row(self, spans: list[RenderedSpan], train_on: str, flags: list[bool]) -> list[Run]:
        last = max(turn for _, _, turn in spans)
        while spans[-1][2] != last:  # what a template prints after the last answer
            spans.pop()

        def is_trained(turn: int) -> bool:
            wanted = train_on == "all" or turn == last or (train_on == "completion" and turn >= 0)
            return wanted and (turn < 0 or flags[turn])

        return self._close(self._runs_of(spans, is_trained), trained=flags[last])

    def _render(
        self, records: Sequence[Record], *, train_on: str, prompt_only: bool
    ) -> list[tuple[list[RenderedRow] | BadField | Blank, list[bool]]]:
        """Each record's rows, or why there are none, and of each of the assistant's turns whether it may be trained."""
        reasons: list[BadField | Blank | None] = []  # why a record is not sent
        sent: list[Conversation] = []
        for record in records:
            try:
                conversation = self._conversation(record, is_prompt=prompt_only)
                sent.append(conversation if prompt_only else self._up_to_answer(conversation, train_on))
                reasons.append(None)
            except (BadField, Blank) as reason:
                reasons.append(reason)
        required = {"completion": "all", "last": "last", "all": "none"}[train_on]
        answers = iter(
            self._chat.render(
                [(conversation.messages, conversation.tools) for conversation in sent],
                required=required,
                prompt_only=prompt_only,
            )
        )
        flags = (
            [may for may, message in zip(c.trained, c.messages, strict=True) if message["role"] == "assistant"]
            for c in sent
        )
        return [(reason, []) if reason else (next(answers), next(flags)) for reason in reasons]

    def _conversation(self, record: Record, *, is_prompt: bool) -> Conversation:
        """A record's conversation; a role that neither chat templates in general nor this one know stops it."""
        conversation = read_conversation(record, self._columns, is_prompt=is_prompt)
        for number, message in enumerate(conversation.messages, start=1):
            if (role := message["role"]) not in self._roles:
                raise BadField(
                    f"message {number} has the role {role!r}, which the chat template does not know; "
                    f"say whose it is, such as --role {role}=assistant"
                )
        return conversation

    def _up_to_answer(self, conversation: Conversation, train_on: str) -> Conversation:
        """The conversation without messages that nobody answers."""
        messages = conversation.messages
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        wanted = answers[-1:] if train_on == "last" else answers
        if not any(messages[i]["content"].strip() or messages[i].get("tool_calls") for i in wanted):
            raise Blank("no answer")
        self.unanswered += answers[-1] + 1 < len(messages)
        end = answers[-1] + 1
        return replace(conversation, messages=messages[:end], trained=conversation.trained[:end])

    def _runs_of(self, spans: Sequence[RenderedSpan], trained: Callable[[int], bool]) -> list[Run]:
        """A rendered chat's spans as runs, one for each stretch of text of the same turn.

        Spaces right before an answer go to the answer, as in PromptTemplate.
        """
        runs: list[Run] = []
        previous = -1
        for text, is_control, turn in spans:
            spaces = move_spaces(runs) if turn >= 0 and turn != previous else ""
            if not is_control:
                runs.append((spaces + text, trained(turn)))
            else:
                if spaces:
                    runs.append((spaces, trained(turn)))
                runs.append((self._encoder.control_ids[text], trained(turn)))
            previous = turn
        if previous < 0:
            move_spaces(runs)  # a prompt that ends here
        return runs

    def _close(self, runs: list[Run], *, trained: bool = True) -> list[Run]:
        """The row with BOS and EOS; `trained` says whether its last answer, which EOS belongs to, is."""
        runs = self._encoder.with_prefix(runs)
        eos = self._encoder.spec.eos_id
        if runs and runs[-1][0] == eos:
            runs[-1] = (eos, trained)
            return runs
        return [*runs, (eos, trained)]


def chat_formatting(template: str, columns: ConversationColumns | None = None) -> Formatting:
    """Chats under a Jinja template; if it prints the date, it will print today's from now on."""
    date = datetime.now(UTC).date().isoformat() if "strftime_now" in template else None
    column = (columns.messages or columns.prompt) if columns else "messages"
    return Formatting(format="chat", column=column, template=template, date=date, conversation=columns)


def default_formatting(tokenizer: "PreTrainedTokenizerBase") -> Formatting:
    """For generation without a run record: the model's chat template if it has one, else raw text."""
    template = encoder_of(tokenizer).spec.chat_template
    return Formatting(format="text", column="text") if template is None else chat_formatting(template)


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
    if problem := problem_of_record({"prompt": prompt}):
        raise DataError(f"This prompt cannot be used: {problem}.", "Give it as UTF-8 text.")
    encoder = encoder_of(tokenizer)
    runs = RowFormatter(formatting, encoder).format_prompt(prompt)
    return [token for run in encoder.encode_rows([runs])[0] for token in run]
