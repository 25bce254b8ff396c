"""Formatting: records and prompts to runs of text and control tokens, each trained on or not."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from qlora_cli.artifacts import read_fields
from qlora_cli.core.prompts.chat_rows import ChatFormatter
from qlora_cli.core.prompts.encoder import Run, TextEncoder, TokenizerSpec, encoder_of
from qlora_cli.core.prompts.prompt_template import PromptTemplate, listed, text_of
from qlora_cli.core.records.conversation import ConversationColumns
from qlora_cli.core.records.record import BadField, Blank, Record, problem_of_record, with_fields
from qlora_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Format → fields without which nothing can be formatted.
NEEDED = {
    "text": ("column",),
    "prompt": ("template", "completion_column"),
    "chat": ("template",),
    "tokens": ("column",),
}
FORMATS = tuple(NEEDED)


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
        markup: Texts were formatted beforehand: control tokens written in them are control tokens.
        tool_template: Jinja chat template for conversations with tools; None for the same (format chat).
        template_settings: Variables of the chat template, such as enable_thinking (format chat).
        thoughts: Thoughts of answers that are trained: keep, last or drop (format chat).
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
    tool_template: str | None = None
    template_settings: dict[str, Any] | None = None
    thoughts: str = "keep"

    def unread_settings(self) -> list[str]:
        """Of each variable that the chat template does not read, that it does nothing. By the word alone: a template of a
        stranger is parsed in a process of its own."""
        words = self.template_words()
        unread = [name for name in self.template_settings or () if name not in words]
        return [f"The chat template reads no {name!r}: that --template-setting does nothing." for name in unread]

    def dotted_columns(self) -> list[str]:
        """Columns with a dot in their name, which may be fields of objects; see `with_fields`."""
        fields = PromptTemplate.fields_of(str(self.template)) if self.format == "prompt" else []
        own = vars(self.conversation).values() if self.conversation else []
        named = (self.column, self.prompt_column, self.optional_column, *fields, *own)
        return [name for name in dict.fromkeys(n for n in named if isinstance(n, str)) if "." in name]

    def template_words(self) -> set[str]:
        """All words that stand in the chat template, and so the names of all that it reads."""
        return set(re.findall(r"\w+", (self.template or "") + (self.tool_template or "")))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields, without those that say nothing."""
        content = {name: value for name, value in asdict(self).items() if value not in (None, False, "keep")}
        if self.conversation is not None:
            content["conversation"] = {name: value for name, value in content["conversation"].items() if value}
        return content

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Formatting":
        """Reads what `to_dict` wrote, also when `format` was called `shape`; unknown keys are ignored.

        Raises:
            ValueError: A field is missing, or no such value.
        """
        if not isinstance(content, dict):
            raise ValueError(f"the formatting is {str(content)[:80]!r}")
        conversation = content.get("conversation")
        if conversation is not None:
            conversation = read_fields(ConversationColumns, conversation)
        found = read_fields(cls, {"format": content.get("shape"), **content, "conversation": conversation})
        if found.format not in FORMATS:
            raise ValueError(f"its format is {found.format!r}")
        if lacking := next((name for name in NEEDED[found.format] if getattr(found, name) is None), None):
            raise ValueError(f"{lacking} is missing")
        return found


def describe_origins(formatting: Formatting) -> str:
    """Which column each part of a row comes from, in words."""

    def named(what: str, *columns: str | None) -> list[str]:
        given = [repr(column) for column in columns if column]
        return [f"{what} from {' and '.join(given)}"] if given else []

    columns = formatting.conversation or ConversationColumns(messages=formatting.column)
    if formatting.format == "chat":
        parts = named("system", columns.system) + named("turns", columns.history, columns.messages)
        parts += named("user", columns.prompt, columns.addition) + named("assistant", columns.answer)
        parts += named("tools", columns.tools) + named("documents", columns.documents)
    elif formatting.format == "prompt":
        fields = PromptTemplate.fields_of(str(formatting.template))
        prompts = [name for name in dict.fromkeys(fields) if name != formatting.completion_column]
        parts = named("prompt", *prompts) + named("answer", formatting.completion_column)
    else:
        parts = named("tokens" if formatting.format == "tokens" else "text", formatting.column)
    return ", ".join(parts)


Formatted = list[list[Run]] | BadField | Blank


class RowFormatter:
    """Formats records, and prompts, under one Formatting for one tokenizer.

    Attributes:
        formatting: As given.
        counts: What became of conversations so far, under the names of `TokenisedChunk.counts`.

    Raises:
        UsageError: The template has no place for the completion, or other faults.
        DataError: The chat template cannot be used.
    """

    def __init__(self, formatting: Formatting, encoder: TextEncoder, on_lost_content: str = "stop") -> None:
        self.formatting = formatting
        self.counts: Counter[str] = Counter()
        self._encoder = encoder
        self._dotted = formatting.dotted_columns()
        if formatting.format == "prompt":
            assert formatting.template is not None and formatting.completion_column is not None
            self._long = PromptTemplate(
                formatting.template, formatting.completion_column, encoder, markup=formatting.markup
            )
            self._short = (
                PromptTemplate(formatting.template_without_optional, formatting.completion_column, encoder)
                if formatting.template_without_optional is not None
                else self._long
            )
        elif formatting.format == "chat":
            assert formatting.template is not None
            self._chat = ChatFormatter(formatting, encoder, on_lost_content, self.counts)

    def format_records(self, records: Sequence[Record], train_on: str) -> list[Formatted]:
        """The rows of each record (one, but for some chats) as runs, BOS and EOS included; or why there are none.

        Args:
            records: One object a row.
            train_on: all, completion or last.
        """
        if self.formatting.format == "chat":
            return self._chat.format_records(records, train_on)
        make = self._format_text if self.formatting.format == "text" else self._format_pair
        rows: list[Formatted] = []
        for record in records:
            try:
                rows.append([self._encoder.close(make(record, train_on))])
            except (BadField, Blank) as reason:
                rows.append(reason)
        return rows

    def faults_of(self, record: Record, train_on: str) -> list[str]:
        """What the chat template leaves out of a record, as sentences without their subject."""
        return self._chat.faults_of(record, train_on) if self.formatting.format == "chat" else []

    def find_call_ends(self) -> set[int]:
        """Control tokens that end an answer which calls a tool, where the chat template knows calls."""
        return self._chat.find_call_ends() if self.formatting.format == "chat" else set()

    def find_marks(self) -> tuple[set[int], list[Run]]:
        """Control tokens that mark thoughts and calls in answers, and with what others begin; see `ChatFormatter`."""
        return self._chat.find_marks() if self.formatting.format == "chat" else (set(), [])

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
        prompt = with_fields(prompt, self._dotted) if isinstance(prompt, dict) else prompt
        if self.formatting.format == "chat":
            return self._chat.prompt_runs(prompt)
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
        return self._text_runs(text.strip() if self.formatting.markup else self._encoder.unframe(text), trained=True)

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


def chat_formatting(
    template: str,
    columns: ConversationColumns | None = None,
    *,
    tool_template: str | None = None,
    settings: Sequence[str] | None = None,
    thoughts: str = "keep",
) -> Formatting:
    """Chats under a Jinja template; if it prints the date, it will print today's from now on.

    Args:
        template: Its source.
        columns: Where a record holds its conversation; by default in `messages` and `tools`.
        tool_template: Source of another template, for conversations with tools.
        settings: Variables of the template, each as name=value.
        thoughts: keep, last or drop.

    Raises:
        UsageError: A setting has no name or no value.
    """
    dated = "strftime_now" in template + (tool_template or "")
    return Formatting(
        format="chat",
        column=(columns.messages or columns.prompt) if columns else "messages",
        template=template,
        conversation=columns,
        date=datetime.now(UTC).date().isoformat() if dated else None,
        tool_template=tool_template,
        template_settings=parse_template_settings(settings or ()) or None,
        thoughts=thoughts,
    )


def parse_template_settings(given: Sequence[str]) -> dict[str, Any]:
    """Variables of a chat template from name=value: JSON where the value is JSON (true, 3, null), else text.

    Raises:
        UsageError: One has no name or no value.
    """
    settings: dict[str, Any] = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals or not name.strip().isidentifier():
            raise UsageError(
                f"--template-setting {item!r} is no name=value.",
                "Write it like: --template-setting enable_thinking=false",
            )
        try:
            settings[name.strip()] = json.loads(value)
        except ValueError:
            # Python's spelling means the same, and the text "False" would be true to a template.
            settings[name.strip()] = {"True": True, "False": False, "None": None}.get(value, value)
    return settings


def with_template_settings(formatting: Formatting, given: Sequence[str] | None) -> Formatting:
    """The same formatting with variables of its chat template set over those that it has.

    Raises:
        UsageError: It is not for chats, or one is no name=value.
    """
    if not given:
        return formatting
    if formatting.format != "chat":
        raise UsageError(
            f"--template-setting is for chats, but prompts have the format {formatting.format!r} here.", "Leave it out."
        )
    settings = {**(formatting.template_settings or {}), **parse_template_settings(given)}
    return replace(formatting, template_settings=settings)


def own_template(spec: TokenizerSpec) -> str | None:
    """The model's own chat template, if it has one.

    Raises:
        DataError: It has several, none of which is the default one.
    """
    if spec.chat_template is None and spec.other_templates:
        raise DataError(
            f"The model has the chat templates {listed(spec.other_templates)}, and none of them is its default.",
            "Save the one you want from its tokenizer as a file and give it with --chat-template FILE.",
        )
    return spec.chat_template


def default_formatting(tokenizer: "PreTrainedTokenizerBase") -> Formatting:
    """For generation without a run record: the model's chat template if it has one, else raw text.

    Raises:
        DataError: The model has several chat templates and no default one.
    """
    spec = encoder_of(tokenizer).spec
    template = own_template(spec)
    if template is None:
        return Formatting(format="text", column="text")
    return chat_formatting(template, tool_template=spec.tool_template)


def template_to_serve(formatting: Formatting, tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """The chat template by which others write conversations as they were trained; None where the tokenizer has that already.

    Rows begin with what a tokenizer puts before a text (BOS), whatever their template says, and have the variables of it that
    were set. Others write what it says alone.
    """
    spec = encoder_of(tokenizer).spec
    template, bos = formatting.template, spec.names.get("bos_token")
    settings = {name: value for name, value in (formatting.template_settings or {}).items() if name.isidentifier()}
    is_own = template == spec.chat_template
    if formatting.format != "chat" or template is None or (is_own and (formatting.tool_template or not settings)):
        return None
    told = bos is None or "bos_token" in formatting.template_words() or bos in template
    if not is_own and spec.prefix_ids and not told:
        begun = tokenizer("a")["input_ids"]
        behind = tokenizer(f"{bos}a", add_special_tokens=False)["input_ids"]
        # Some put a space before the first word behind their own BOS, and none behind one that is written.
        template = ("{{ bos_token }}" if behind == begun[: len(behind)] else "{{ bos_token + ' ' }}") + template
    for name, value in settings.items():
        default = "none" if value is None else json.dumps(value)
        # The line end goes with its block (trim_blocks), and the template still begins a line.
        template = f"{{%- if {name} is not defined %}}{{%- set {name} = {default} %}}{{%- endif %}}\n{template}"
    return template


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
