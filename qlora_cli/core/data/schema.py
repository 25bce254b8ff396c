"""Dataset formats: text, prompt, chat or tokens, recognised by the first records or stated by flags, as a Formatting."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_cli.config import DataSettings
from qlora_cli.core.prompts.chat_template import FALLBACK_TEMPLATE
from qlora_cli.core.prompts.encoder import TextEncoder
from qlora_cli.core.prompts.formatting import Formatting, chat_formatting, own_template
from qlora_cli.core.prompts.prompt_template import PromptTemplate
from qlora_cli.core.records.conversation import ConversationColumns
from qlora_cli.core.records.record import Record
from qlora_cli.errors import DataError, UsageError

# (prompt, columns that may be empty, completion), in the order they are looked for; names compare without case.
PAIRS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("instruction", ("input", "context"), ("output", "response", "answer", "completion")),
    ("question", ("context",), ("answer", "response", "output", "completion")),
    ("prompt", (), ("completion", "response", "answer", "output")),
    ("query", ("context",), ("response", "answer", "output")),
    ("problem", (), ("solution", "answer")),
    ("input", (), ("output", "target", "response")),
    ("source", (), ("target",)),
    ("user", (), ("assistant",)),
    ("human", (), ("assistant", "bot")),
    ("q", (), ("a",)),
)
TEXTS = ("text", "content", "quote", "document", "body", "passage", "story", "article", "sentence", "code")
CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
SETTINGS = "chat_template_kwargs"  # as vLLM and others call a row's own variables of the template
CLEARLY_LONGER = 2  # the text column holds this many times the letters of the next one, or the user has to choose


@dataclass(frozen=True)
class Recognised:
    """What the data is: its Formatting, which tokens are trained, and that in one sentence."""

    formatting: Formatting
    train_on: str
    sentence: str
    remarks: tuple[str, ...] = ()


def recognise(records: Sequence[Record], settings: DataSettings, encoder: TextEncoder) -> Recognised:
    """Recognises the format of the data by its first records, or takes it from the flags.

    Raises:
        UsageError: Flags contradict each other, name a column that is not there, or a template is faulty.
        DataError: The format cannot be recognised.
    """
    columns = _Columns(records)
    found = _format_from_flags(settings) or _format_of(columns)
    recognised = {
        "text": _recognise_text,
        "prompt": _recognise_prompt,
        "chat": _recognise_chat,
        "tokens": _recognise_tokens,
    }[found](columns, settings, encoder)
    if found == "text" and settings.train_on not in (None, "all"):
        raise UsageError(
            f"--train-on {settings.train_on} needs a completion, but these rows are plain text.",
            "Leave --train-on out, or name the columns with --prompt-column and --completion-column.",
        )
    return recognised


class _Columns:
    """Names and sample values of the columns."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self.names = list(dict.fromkeys(name for record in records for name in record))
        self._by_lower = {name.lower(): name for name in reversed(self.names)}

    def find(self, wanted: Iterable[str]) -> str | None:
        """The first of these names that is there, in any case of letters."""
        return next((self._by_lower[name] for name in wanted if name in self._by_lower), None)

    def require(self, name: str, flag: str) -> str:
        """The name itself, if it is a column."""
        if name in self.names:
            return name
        close = difflib.get_close_matches(name, self.names, n=1, cutoff=0.4)
        raise UsageError(
            f"There is no column {name!r}; the data has {self.listed}.",
            f"Did you mean {flag} {close[0]}?" if close else f"Choose one of them with {flag}.",
        )

    @property
    def listed(self) -> str:
        return ", ".join(map(repr, self.names))

    def values(self, name: str) -> list[Any]:
        return [record[name] for record in self.records if record.get(name) is not None]

    def is_text(self, name: str) -> bool:
        values = self.values(name)
        return bool(values) and isinstance(values[0], str)

    def is_conversation(self, name: str) -> bool:
        values = self.values(name)
        first = values[0][0] if values and isinstance(values[0], list) and values[0] else None
        return isinstance(first, dict) and ({"role", "content"} <= first.keys() or {"from", "value"} <= first.keys())


def _format_from_flags(settings: DataSettings) -> str | None:
    given = {
        "text": settings.text_column and "--text-column",
        "chat": settings.messages_column and "--messages-column",
        "prompt": (settings.prompt_column and "--prompt-column")
        or (settings.completion_column and "--completion-column")
        or (settings.template and "--template"),
    }
    flags = {name: flag for name, flag in given.items() if flag}
    if settings.format != "auto":
        flags = {settings.format: "--format"} | {n: f for n, f in flags.items() if n != settings.format}
    if len(flags) > 1:
        raise UsageError(f"{' and '.join(flags.values())} contradict each other.", "Give the flags of one format only.")
    return next(iter(flags), None)


def _format_of(columns: _Columns) -> str:
    if "input_ids" in columns.names:
        return "tokens"
    if any(columns.is_conversation(name) for name in columns.names):
        return "chat"
    if _find_pair(columns):
        return "prompt"
    return "text"


def _find_pair(columns: _Columns) -> tuple[str, str | None, str] | None:
    for prompt, optionals, completions in PAIRS:
        found, answer = columns.find([prompt]), columns.find(completions)
        if found and answer and columns.is_text(found) and columns.is_text(answer):
            return found, columns.find(optionals), answer
    return None


def _recognise_text(columns: _Columns, settings: DataSettings, encoder: TextEncoder) -> Recognised:
    if settings.text_column:
        column = columns.require(settings.text_column, "--text-column")
    else:
        column = _find_text(columns)
    texts = [text for text in columns.values(column) if isinstance(text, str)]
    markup = bool(texts) and all(map(encoder.is_markup, texts))
    remarks = []
    if markup:
        remarks.append(
            f"Every text starts and ends with a control token (such as {texts[0].strip()[:10]!r}): the texts were "
            "formatted beforehand, so control tokens written in them are taken as such."
        )
    elif any(map(encoder.holds_control, texts)):
        remarks.append(f"Control tokens typed in column {column!r} are kept as plain text.")
    return Recognised(
        Formatting(format="text", column=column, markup=markup),
        "all",
        f"plain text in column {column!r}, every token trained",
        tuple(remarks),
    )


def _find_text(columns: _Columns) -> str:
    if (known := columns.find(TEXTS)) and columns.is_text(known):
        return known
    letters = {
        name: sum(len(text) for text in columns.values(name) if isinstance(text, str))
        for name in columns.names
        if columns.is_text(name)
    }
    ranked = sorted(letters, key=lambda name: -letters[name])
    if not ranked:
        raise DataError(
            f"No column holds text; the data has {columns.listed}.",
            "Name the columns: --text-column, --prompt-column with --completion-column, or --messages-column.",
        )
    if len(ranked) > 1 and letters[ranked[0]] < CLEARLY_LONGER * letters[ranked[1]]:
        raise DataError(
            f"Several columns could be the text: {', '.join(map(repr, ranked))}.",
            f"Choose: --text-column {ranked[0]}, or --prompt-column {ranked[1]} --completion-column {ranked[0]}.",
        )
    return ranked[0]


def _recognise_prompt(columns: _Columns, settings: DataSettings, encoder: TextEncoder) -> Recognised:
    train_on = settings.train_on or "completion"
    pair = _find_pair(columns) or (None, None, None)
    prompt = columns.require(settings.prompt_column, "--prompt-column") if settings.prompt_column else pair[0]
    answer = (
        columns.require(settings.completion_column, "--completion-column") if settings.completion_column else pair[2]
    )
    if settings.template:
        return _recognise_template(columns, read_template(settings.template), prompt, answer, train_on, encoder)
    if prompt is None or answer is None or prompt == answer:
        raise UsageError(
            f"Prompt and completion are not recognised among the columns {columns.listed}.",
            "Name both: --prompt-column and --completion-column.",
        )
    optional = pair[1] if prompt == pair[0] and pair[1] not in (prompt, answer) else None
    heading = "Response" if prompt.lower() == "instruction" else _heading(answer)
    opening, ending = f"### {_heading(prompt)}:\n{{{prompt}}}\n\n", f"### {heading}:\n{{{answer}}}"
    middle = f"### {_heading(optional)}:\n{{{optional}}}\n\n" if optional else ""
    formatting = Formatting(
        format="prompt",
        prompt_column=prompt,
        completion_column=answer,
        optional_column=optional,
        template=opening + middle + ending,
        template_without_optional=opening + ending if optional else None,
    )
    also = f" (and {optional!r} where it is not empty)" if optional else ""
    sentence = f"prompt in column {prompt!r}{also}, completion in {answer!r}, {_trained(train_on)}"
    return Recognised(formatting, train_on, sentence)


def _recognise_template(
    columns: _Columns, template: str, prompt: str | None, answer: str | None, train_on: str, encoder: TextEncoder
) -> Recognised:
    fields = PromptTemplate.fields_of(template)
    for name in fields:
        columns.require(name, "--template with")
    if not fields:
        raise UsageError(f"The template {template!r} has no {{column}} field.", f"The data has {columns.listed}.")
    answer = answer if answer in fields else fields[-1]
    prompts = [name for name in fields if name != answer]
    formatting = Formatting(
        format="prompt",
        prompt_column=prompt if prompt in prompts else next(iter(prompts), None),
        completion_column=answer,
        template=template,
    )
    PromptTemplate(template, answer, encoder)  # complains of what is wrong with it
    return Recognised(
        formatting, train_on, f"rows under the template {template!r}, completion in {answer!r}, {_trained(train_on)}"
    )


def read_template(given: str) -> str:
    r"""A --template: the content of a file of that name, or the text itself with \n and \t for line ends and tabs."""
    path = Path(given)
    if "\n" not in given and len(given) < 256 and path.is_file():
        return path.read_text(encoding="utf-8").removesuffix("\n")
    return given.replace("\\n", "\n").replace("\\t", "\t")


def _heading(column: str) -> str:
    return column.replace("_", " ").strip().capitalize()


def _recognise_chat(columns: _Columns, settings: DataSettings, encoder: TextEncoder) -> Recognised:
    train_on = settings.train_on or "completion"
    if settings.messages_column:
        column = columns.require(settings.messages_column, "--messages-column")
    else:
        named = [name for name in columns.names if name.lower() in CONVERSATIONS]
        found = next(filter(columns.is_conversation, [*named, *columns.names]), None) or next(iter(named), None)
        if found is None:
            raise UsageError(f"No column holds chat messages; the data has {columns.listed}.", "Use --messages-column.")
        column = found
    tool_template = None
    if settings.chat_template:
        try:
            template = Path(settings.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"The chat template {settings.chat_template} cannot be read: {error}.",
                "Give --chat-template a Jinja file.",
            ) from None
        whose = f"the template in {settings.chat_template}"
    elif own := own_template(encoder.spec):
        template, whose = own, "the model's own template"
        tool_template = encoder.spec.tool_template
        whose += " (for conversations with tools, its own for these)" if tool_template else ""
    else:
        template, whose = FALLBACK_TEMPLATE, "a plain template (the model has none)"
    return Recognised(
        chat_formatting(
            template,
            ConversationColumns(messages=column, tools=columns.find(["tools"]), settings=columns.find([SETTINGS])),
            tool_template=tool_template,
            settings=settings.template_setting,
            thoughts=settings.thoughts,
        ),
        train_on,
        f"chat messages in column {column!r}, {whose}, {_trained(train_on)}",
    )


def _recognise_tokens(columns: _Columns, settings: DataSettings, encoder: TextEncoder) -> Recognised:
    column = columns.require("input_ids", "--format tokens with")
    if settings.train_on == "last":
        raise UsageError("--train-on last is for chats.", "Rows of tokens are trained by their labels, or all.")
    by_labels = "labels" in columns.names and settings.train_on != "all"
    trained = "trained where labels are not -100" if by_labels else "every token trained"
    return Recognised(
        Formatting(format="tokens", column=column),
        settings.train_on or "completion",
        f"rows tokenised beforehand in column {column!r}, {trained}",
    )


def _trained(train_on: str) -> str:
    return {"all": "every token trained", "completion": "answers trained", "last": "the last answer trained"}[train_on]
