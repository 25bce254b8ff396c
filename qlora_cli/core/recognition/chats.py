"""Recognition of conversations: which columns hold their turns, system text, tools and settings, under which template."""

import re
import shlex
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora_cli.core.prompts.chat_template import FALLBACK_TEMPLATE
from qlora_cli.core.prompts.encoder import TextEncoder
from qlora_cli.core.prompts.formatting import chat_formatting, own_template
from qlora_cli.core.recognition.columns import ANSWERS, CONVERSATIONS, Columns, list_names, named_like_answers
from qlora_cli.core.recognition.layouts import refuse_logged_calls, refuse_without_answers
from qlora_cli.core.recognition.letters import name_marks_of_template, remark_letters
from qlora_cli.core.recognition.pairs import Pair, is_nested
from qlora_cli.core.recognition.recognised import Recognised, describe_trained
from qlora_cli.core.recognition.texts import QUESTIONS, TEXTS, common_ending
from qlora_cli.core.records.conversation import ConversationColumns, read_conversation
from qlora_cli.core.records.messages import (
    KNOWN_ROLES,
    holds_messages,
    is_transcript,
    turns_of,
)
from qlora_cli.core.records.parts import system_text
from qlora_cli.core.records.record import BadField
from qlora_cli.core.records.rules import RowRules
from qlora_cli.core.records.tools import read_tools
from qlora_cli.errors import DataError, UsageError, first_line
from qlora_cli.settings.groups import DataSettings

SYSTEMS = ("system", "system_prompt", "system_message", "systeminstruction", "system_instruction")
HISTORY = re.compile(r".*(chat|conversations?|dialog(ue)?s?|messages?|turns?|talk)[\W_]*history")
ABOUT = {*QUESTIONS, *TEXTS, "context"}  # what a list of questions and answers beside it may belong to
TOOLS = ("tools", "tool_defs", "functions", "available_tools")


def chat_columns(
    columns: Columns, settings: DataSettings, pair: Pair | None, *, wanted: str | None
) -> ConversationColumns | None:
    """Where the conversations are: in one column, in one and the answer beside it, or in question and answer.

    Question and answer that are plain text are a conversation if a system text, a history or tools stand beside them.

    Args:
        columns: Of the data.
        settings: What the flags say.
        pair: Question and answer, if there are any.
        wanted: The format that the flags ask for: chat, prompt or none.

    Raises:
        UsageError: --messages-column names no column, or --role is no `name=role`.
        DataError: Answers have no question, or questions no answer.
    """
    system, history = columns.find(SYSTEMS), _history_column(columns)
    messages = None if wanted == "prompt" else _messages_column(columns, settings, pair, wanted)
    found = None
    if messages:
        found = ConversationColumns(messages=messages, answer=_answer_to(columns, settings, messages))
    elif pair and (pair.is_conversational or wanted != "prompt"):
        extra = history if columns.has_some(history) else None
        system = system if _is_system(columns, system, None) else None
        beside = extra or system or _tools_column(columns)
        if pair.is_conversational or wanted == "chat" or (not pair.is_nested and beside):
            joins = pair.optional and (_is_plain(columns, pair.prompt) or columns.holds(pair.optional, holds_messages))
            addition = pair.optional if joins else None  # text beside messages has no place in them
            found = ConversationColumns(prompt=pair.prompt, addition=addition, answer=pair.completion, history=extra)
    if found is None:
        return None
    documents, variables = columns.find(["documents"]), columns.find(["chat_template_kwargs"])
    return replace(
        found,
        system=system if _is_system(columns, system, found.messages) else None,
        tools=columns.find(TOOLS),
        documents=documents if documents and columns.holds(documents, lambda v: isinstance(v, list)) else None,
        settings=variables,
        roles=columns.roles,
    )


def _is_plain(columns: Columns, name: str) -> bool:
    return columns.is_text(name) and not columns.holds(name, holds_messages)


def _history_column(columns: Columns) -> str | None:
    """Earlier questions and answers: `history`, or what is called one of a conversation and holds one. A medical history,
    or one of purchases, is neither."""
    plain = columns.find(["history"])
    named = (name for name in columns.names if HISTORY.fullmatch(name.lower()) and _holds_turns(columns, name))
    return plain or next(named, None)


def _holds_turns(columns: Columns, name: str) -> bool:
    return columns.holds(name, lambda value: turns_of(value) is not None)


def _tools_column(columns: Columns) -> str | None:
    """The column that describes tools, and not something else under its name."""
    name = columns.find(TOOLS)
    return name if name and columns.holds(name, _describes_tools) else None


def _describes_tools(value: Any) -> bool:
    try:
        return bool(read_tools(value, "tools"))
    except BadField:
        return False


def _messages_column(columns: Columns, settings: DataSettings, pair: Pair | None, wanted: str | None) -> str | None:
    """The column that holds conversations, or all of them but their answers.

    Raises:
        UsageError: --messages-column names no column.
        DataError: It holds nothing but answers, or is one of several, or more belongs to it.
    """
    if settings.messages_column:
        return columns.require(settings.messages_column, "--messages-column")
    if settings.prompt_column or settings.completion_column:
        return None
    chosen, _ = columns.preference()
    apart = {chosen, *columns.rejected(), columns.find(SYSTEMS), columns.find(TOOLS), pair and _history_column(columns)}
    named = [name for known in CONVERSATIONS for name in columns.names if name.lower() == known]
    others = [name for name in columns.names if name not in (*named, *apart)]
    is_beside = pair or any(name.lower() in TEXTS and columns.is_text(name) for name in others)
    talks = (name for name in named if columns.is_conversation(name))
    if whole := next((name for name in talks if not (is_beside and _is_of_others(columns, name))), None):
        return whole
    if pair and pair.is_conversational:  # what is named like question and answer is both, and not one of them alone
        return None
    if chosen and _holds_wholes(columns, chosen):
        return chosen
    found = [name for name in (chosen, *others) if name and columns.is_conversation(name)]
    answers = [name for name in found if columns.holds(name, columns.is_answer_alone)]
    if answers and answers == found:
        inside = (field for name in columns.names for field in columns.fields_of(name) if field.endswith(".messages"))
        question = shlex.quote(next(inside, "COLUMN"))
        raise DataError(
            f"The answers in {found[0]!r} stand alone: no column holds the question before them as messages or under a "
            f"name that says so; the data has {columns.listed}.",
            f"Name both: --prompt-column {question} --completion-column {shlex.quote(found[0])}, or to train on the answers "
            f"alone: --messages-column {shlex.quote(found[0])}",
        )
    asking = [name for name in found if name not in answers]
    wholes = [name for name in asking if not columns.holds(name, columns.is_open)]
    if len(wholes) > 1:
        raise DataError(
            f"Several columns hold conversations: {list_names(wholes)}.",
            f"Choose one: --messages-column {shlex.quote(wholes[0])}",
        )
    first = next(iter([*wholes, *asking]), None)
    about = next((name for name in columns.names if name.lower() in ABOUT and columns.is_text(name)), None)
    if first and about and not columns.holds(first, holds_messages):
        if pair:
            return None
        raise DataError(
            f"Column {first!r} holds questions with their answers, and {about!r} what they may be about.",
            f"Train on them alone: --messages-column {shlex.quote(first)}. Or write both into a column 'messages'.",
        )
    return first or (next(iter(named), None) if wanted == "chat" else None)


def _is_of_others(columns: Columns, name: str) -> bool:
    """Whether a column holds what people said, who are not the assistant: beside a question and its answer, or a text, it is
    what these are about."""
    return columns.holds(name, is_transcript) and not any(
        "assistant" in columns.roles_of(value) for value in columns.values(name)
    )


def _answer_to(columns: Columns, settings: DataSettings, messages: str) -> str | None:
    """The column of answers to conversations: the preferred ones, or what answers those that all end in a question.

    Raises:
        DataError: They do, and a column may be the answer but has no name that says so.
    """
    chosen, _ = columns.preference()
    if (
        chosen
        and chosen != messages
        and (_holds_wholes(columns, chosen) or not columns.holds(messages, columns.is_whole))
    ):
        return chosen
    if settings.messages_column or not columns.holds(messages, columns.is_open):
        return None
    others = [name for name in columns.names if name not in (messages, *columns.rejected())]
    alone = [name for name in others if columns.holds(name, columns.is_answer_alone)]
    texts = alone or [name for name in others if columns.is_text(name) or is_nested(columns, name)]
    if named := next((name for known in ANSWERS for name in texts if name.lower() == known), None):
        return named
    likely = alone or [name for name in named_like_answers(others) if not columns.is_yes_or_no(name)]
    likely = [name for name in likely if name in texts or name.lower() in ANSWERS]
    if len(alone) == 1 or not likely:
        return next(iter(likely), None)
    refuse_logged_calls(columns)
    raise DataError(
        f"The conversations in {messages!r} all end without an answer, and {list_names(likely)} may hold it.",
        f"Choose: --prompt-column {shlex.quote(messages)} --completion-column {shlex.quote(likely[0])}, or to train on the "
        f"answers within the conversations: --messages-column {shlex.quote(messages)}",
    )


def _holds_wholes(columns: Columns, name: str) -> bool:
    """Whether a column of preferred answers holds the conversations that they are the ends of."""
    return columns.holds(name, holds_messages) and not columns.holds(name, columns.is_answer_alone)


def _is_system(columns: Columns, name: str | None, messages: str | None) -> bool:
    """Whether a column holds system texts, and not something else than the system turns that conversations have."""
    if name is None or not columns.has_some(name) or not all(_is_text(value) for value in columns.values(name)):
        return False
    for record in columns.records:
        turns = turns_of(record.get(messages)) if messages else None
        first = turns[0] if turns and isinstance(turns[0], dict) else {}
        text, own = system_text(record.get(name), ""), first.get("content", first.get("value"))
        if "system" in (first.get("role"), first.get("from")) and isinstance(own, str) and text:
            return own.strip() == text.strip()
    return True


def _is_text(value: Any) -> bool:
    try:
        return isinstance(system_text(value, ""), str)
    except BadField:
        return False


def read_roles(given: tuple[str, ...]) -> dict[str, str]:
    """What --role says: names of roles in the data → names that chat templates know.

    Raises:
        UsageError: It is no `name=role`.
    """
    roles = {}
    for item in given:
        name, equals, role = item.partition("=")
        if not equals or not name.strip() or not role.strip():
            raise UsageError(
                f"--role {item} is no NAME=ROLE.",
                f"Such as --role bard=assistant; known are {', '.join(sorted(KNOWN_ROLES))}.",
            )
        roles[name.strip().lower()] = role.strip()
    return roles


def recognise_chat(
    columns: Columns, settings: DataSettings, encoder: TextEncoder, found: ConversationColumns
) -> Recognised:
    """Conversations in these columns under the template that the flags or the model give.

    Raises:
        UsageError: The template cannot be read.
    """
    train_on = settings.train_on or "completion"
    template, tool_template, whose = _template_of(settings, encoder)
    turns = [repr(name) for name in (found.messages, found.history, found.prompt, found.addition, found.answer) if name]
    where = f"chat messages in column{'s' * (len(turns) > 1)} {' and '.join(turns)}"
    where += "".join(
        f", {what} in {name!r}"
        for what, name in (
            ("system text", found.system),
            ("tools", found.tools),
            ("documents", found.documents),
            ("template settings", found.settings),
        )
        if name
    )
    chosen, rejected = columns.preference()
    if found.messages and not found.answer:
        refuse_without_answers(columns, found.messages)
    used = tuple(v for v in vars(found).values() if isinstance(v, str))
    answers, others = _said_in(columns, found)
    remarks = []
    ending = common_ending(answers, encoder)
    if ending and (ending in template or ending in encoder.spec.names.values()):
        found = replace(found, ending=ending)
        remarks.append(f"Every answer ends in {ending}, which is taken for the end that the chat template writes.")
    elif any(map(encoder.holds_control, answers)):
        remarks.append("Control tokens typed in answers are kept as plain text.")
    elif any(map(encoder.holds_control, others)):
        remarks.append("Control tokens typed in messages are kept as plain text.")
    remarks += name_marks_of_template(template, encoder) if settings.chat_template else []
    remarks += remark_letters([*answers, *others], encoder, "messages")
    is_asking = found.messages and not (found.answer or settings.messages_column)
    texts = [name for name in columns.names if name not in used and columns.is_text(name)]
    if is_asking and texts and columns.holds(str(found.messages), columns.is_open):
        way = f"--prompt-column {shlex.quote(str(found.messages))} --completion-column COLUMN"
        remarks.append(f"The conversations all end without an answer. Where another column holds it: {way}.")
    formatting = chat_formatting(
        template,
        found,
        tool_template=tool_template,
        settings=settings.template_setting,
        thoughts=settings.thoughts,
    )
    return Recognised(
        formatting,
        train_on,
        f"{where}, {whose}, {describe_trained(train_on)}",
        (*remarks, *formatting.unread_settings()),
        used=used,
        rules=RowRules(answers=found.answer if found.answer and is_nested(columns, found.answer) else None),
        rejected=rejected if (found.answer or found.messages) == chosen else None,
    )


def _said_in(columns: Columns, found: ConversationColumns) -> tuple[list[str], list[str]]:
    """What the assistant says in the first rows, but for what is of their prompts and those that are bad; and the rest."""
    answers: list[str] = []
    others: list[str] = []
    for record in columns.records:
        with suppress(BadField):
            read = read_conversation(record, found)
            for message, asked in zip(read.messages, read.asked, strict=True):
                (answers if message["role"] == "assistant" and not asked else others).append(message["content"])
    return answers, others


def _template_of(settings: DataSettings, encoder: TextEncoder) -> tuple[str, str | None, str]:
    """The chat template, the one for conversations with tools if it is another, and in words whose they are."""
    if settings.chat_template:
        try:
            template = Path(settings.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"The chat template {settings.chat_template} cannot be read: {first_line(error)}.",
                "Give --chat-template a Jinja file.",
            ) from None
        return template, None, f"the template in {settings.chat_template}"
    if own := own_template(encoder.spec):
        with_tools = " (for conversations with tools, its own for these)" if encoder.spec.tool_template else ""
        return own, encoder.spec.tool_template, f"the model's own template{with_tools}"
    return FALLBACK_TEMPLATE, None, "a plain template (the model has none)"
