"""Recognition of a data set's format: text, prompt, chat or tokens, by its first rows or by flags, as a Formatting.

A format is taken only if it explains (almost) every row; columns that it does not use are named.
"""

import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from itertools import accumulate

from qlora_cli.core.prompts.encoder import TextEncoder
from qlora_cli.core.prompts.formatting import Formatting
from qlora_cli.core.prompts.prompt_template import PromptTemplate
from qlora_cli.core.recognition.chats import chat_columns, read_roles, recognise_chat
from qlora_cli.core.recognition.columns import CONVERSATIONS, Columns, list_names
from qlora_cli.core.recognition.layouts import (
    refuse_exports,
    refuse_logged_calls,
    refuse_messages_as_rows,
    refuse_null_turns,
    refuse_trees,
    refuse_unnamed_turns,
)
from qlora_cli.core.recognition.pairs import (
    Pair,
    find_pair,
    named_like_pair,
    read_template,
    recognise_pair,
    recognise_template,
)
from qlora_cli.core.recognition.recognised import Recognised, are_named, name_columns
from qlora_cli.core.recognition.selection import with_selection
from qlora_cli.core.recognition.texts import TEXTS, recognise_text
from qlora_cli.core.records.media import holds_some, kind_of, named_like
from qlora_cli.core.records.record import NOTHING, NULLS, Record, describe_type, field_at, fields_in, why_unread
from qlora_cli.core.records.rules import BESIDE_IDS, GIVEN_MASKS
from qlora_cli.errors import DataError, UsageError
from qlora_cli.settings.groups import DataSettings
from qlora_cli.settings.setting import describe_idle, is_given
from qlora_cli.sizes import format_count

PRINTED_NOTHING = (*NULLS, "nan", "NaN", "NULL", "<NA>")  # by JSON, Python, pandas and databases
THOUGHTS = ("reasoning", "reasoning_content", "thinking", "thought", "thoughts", "rationale", "cot", "chain_of_thought")


def recognise(records: Sequence[Record], settings: DataSettings, encoder: TextEncoder) -> Recognised:
    """Recognises the format of the data by its first rows, or takes it from the flags.

    Raises:
        UsageError: Flags contradict each other, name a column that is not there, or a template is faulty.
        DataError: No format explains the rows, or they hold images, videos or sounds beside their text.
    """
    inner = _inner_fields(records, settings)
    columns = Columns(records, inner, read_roles(settings.role or ()))
    format_ = _format_from_flags(settings) or ("tokens" if columns.find(["input_ids"]) else None)
    if not are_named(settings):
        refuse_trees(columns)
    pair = find_pair(columns, settings)
    chats = None if format_ in ("text", "tokens") else chat_columns(columns, settings, pair, wanted=format_)
    if format_ is None:
        format_ = _format_of(columns, pair, chats is not None)
    if format_ == "tokens":
        recognised = _recognise_tokens(columns, settings)
    elif format_ == "chat" or (format_ == "prompt" and pair and pair.is_conversational and not settings.template):
        if chats is None:
            raise UsageError(f"No column holds chat messages; the data has {columns.listed}.", "Use --messages-column.")
        recognised = recognise_chat(columns, settings, encoder, chats)
    elif format_ == "prompt" and settings.template:
        recognised = recognise_template(columns, settings, encoder, pair)
    elif format_ == "prompt":
        recognised = recognise_pair(columns, settings, encoder, pair)
    else:
        recognised = recognise_text(columns, settings, encoder)
    is_restated = settings.format == format_ == _format_without_flag(columns, settings, pair)
    recognised = with_selection(columns, recognised, settings, is_restated=is_restated)
    recognised = _with_unused(columns, recognised)
    held = {name for record in records for name, value in record.items() if value not in NOTHING}
    held.update(recognised.used, filter(None, [recognised.rejected]))  # which may be empty at first
    recognised = replace(_without_media(columns, recognised, settings), columns=frozenset(held))
    return replace(recognised, rules=replace(recognised.rules, fields=inner)) if inner else recognised


def _inner_fields(records: Sequence[Record], settings: DataSettings) -> tuple[str, ...]:
    """The fields of the objects that flags name one of by a dotted name (see `field_at`), which count like columns."""
    named = (settings.text_column, settings.messages_column, settings.prompt_column, settings.completion_column)
    template = PromptTemplate.fields_of(read_template(settings.template)) if settings.template else ()
    dotted = (name for name in (*named, *template) if name and not any(name in record for record in records))
    opened = {parent for name in dotted for parent in accumulate(name.split(".")[:-1], "{}.{}".format)}
    found = ((parent, fields_in(field_at(record, parent))) for parent in sorted(opened) for record in records)
    inner = dict.fromkeys(f"{parent}.{name}" for parent, inside in found for name in inside or ())
    return tuple(name for name in inner if name not in opened)


def idle_settings(settings: DataSettings, formats: Iterable[str]) -> list[str]:
    """The settings that were given and do nothing for rows of these formats, as sentences."""
    given = [option for option in fields(DataSettings) if is_given(option, settings)]
    each = [[describe_idle(option, replace(settings, format=name)) for option in given] for name in formats]
    return [sentences[0] for sentences in zip(*each, strict=True) if sentences[0] and all(sentences)]


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


def _format_without_flag(columns: Columns, settings: DataSettings, pair: Pair | None) -> str | None:
    """The format that other flags than --format, or the rows alone, say; None where they say none."""
    settings = replace(settings, format="auto")
    try:
        named = _format_from_flags(settings)
        return named or _format_of(columns, pair, chat_columns(columns, settings, pair, wanted=None) is not None)
    except DataError:
        return None


def _format_of(columns: Columns, pair: Pair | None, is_chat: bool) -> str:
    """The format that explains the rows.

    Raises:
        DataError: The rows hold conversations, but not as whole ones or not all of them.
    """
    if is_chat:
        return "chat"
    if pair:
        return "prompt"
    refuse_messages_as_rows(columns)
    refuse_exports(columns)
    refuse_logged_calls(columns)
    refuse_null_turns(columns)
    known = columns.find(TEXTS)
    if known and columns.is_text(known):
        return "text"
    for name in columns.names:
        if found := columns.count_conversations(name):
            raise DataError(
                f"Column {name!r} holds conversations in {found} of the first {len(columns.records)} rows only.",
                f"Mend the others, or have them listed and left out: --messages-column {shlex.quote(name)} --on-bad-row skip; "
                "or where files of several formats lie in one folder, name each of them: --data A --data B",
            )
    _refuse_halves(columns)
    refuse_unnamed_turns(columns)
    named = columns.find(CONVERSATIONS[:-1])
    nested = [v for v in columns.values(named) if isinstance(v, str) and v.lstrip()[:1] in ("[", "{")] if named else []
    if named and nested:
        reason = next(filter(None, map(why_unread, nested)), "is a list or an object of something else")
        raise DataError(
            f"Column {named!r} seems to hold messages as text, which {reason}.",
            f"Write it as JSON, or train it as it is: --text-column {shlex.quote(named)}",
        )
    return "text"


def _refuse_halves(columns: Columns) -> None:
    """Refuses columns that are named like question and answer, and are not text.

    Raises:
        DataError: There are such.
    """
    if (halves := named_like_pair(columns)) is None:
        return
    question, answer, text_rows = halves
    flags = f"--prompt-column {shlex.quote(question)} --completion-column"
    if inside := columns.fields_of(answer):
        texts = (name for name in inside if any(isinstance(field_at(row, name), str) for row in columns.records))
        raise DataError(
            f"Column {answer!r} is named like an answer, but holds objects.",
            f"Where the answer is to be JSON, write it there as text; or name one of its fields, {list_names(inside)}, "
            f"as in {flags} {shlex.quote(next(texts, inside[0]))}",
        )
    held = ((at, name, row.get(name)) for at, row in enumerate(columns.records, start=1) for name in (question, answer))
    wrong = next(
        (f"; in row {at} {name!r} is {describe_type(v)}" for at, name, v in held if not isinstance(v, str)), ""
    )
    raise DataError(
        f"Columns {question!r} and {answer!r} are named like question and answer, but both are text in {text_rows} "
        f"of the first {len(columns.records)} rows only{wrong}.",
        f"Mend the others, or have them listed and left out: {flags} {shlex.quote(answer)} --on-bad-row skip"
        if text_rows
        else "Write both as text in every row.",
    )


def _recognise_tokens(columns: Columns, settings: DataSettings) -> Recognised:
    column = columns.require(columns.find(["input_ids"]) or "input_ids", "--format tokens with")
    if settings.train_on == "last":
        raise UsageError("--train-on last is for chats.", "Rows of tokens are trained by their labels, or all.")
    masks = [name for name in BESIDE_IDS if name in columns.names]
    deciding = [name for name in masks if name == "labels" or name in GIVEN_MASKS]
    if settings.train_on == "all" or not deciding:
        trained = "every token trained"
    elif deciding == ["labels"]:
        trained = "trained where labels are not -100"
    else:
        trained = f"trained where {' and '.join(map(repr, deciding))} say so"
    remarks: tuple[str, ...] = ()
    if "position_ids" in masks:
        remarks = ("Rows are cut where 'position_ids' begin anew, so that rows packed beforehand stay apart.",)
    return Recognised(
        Formatting(format="tokens", column=column),
        settings.train_on or "completion",
        f"rows tokenised beforehand in column {column!r}, {trained}",
        remarks,
        used=(column, *masks),
    )


def _with_unused(columns: Columns, recognised: Recognised) -> Recognised:
    """Names the columns that a format does not use, and those whose texts are how others print that there is none."""
    remarks, rejected = (*recognised.remarks, *_printed_nothing(columns, recognised)), recognised.rejected
    remarks = (*remarks, *_named_by_rows(recognised))
    left_out = tuple(name for name in columns.names if name not in recognised.used)
    unused = [name for name in left_out if name != rejected]
    if rejected:
        remarks = (
            f"Preference rows: the answers in {columns.preference()[0]!r} are trained, {rejected!r} is left out.",
            *remarks,
        )
    if not unused:
        return replace(recognised, remarks=remarks, unused=left_out)
    remark = f"Columns that are not used: {list_names(unused)}."
    thoughts = next((name for name in unused if name.lower() in THOUGHTS), None)
    if thoughts and recognised.formatting.format == "prompt":
        answer = recognised.formatting.completion_column
        remark += f' A template of your own could use {thoughts!r}: --template "... {{{thoughts}}} ... {{{answer}}}"'
    return replace(recognised, remarks=(*remarks, remark), unused=left_out)


def _named_by_rows(recognised: Recognised) -> Iterator[str]:
    """That columns used have a name that is rather a row, as where a CSV file has no header."""
    named = [name for name in recognised.used if " " in name.strip() and name.rstrip().endswith((".", "!", "。"))]
    if named:
        yield f"Named like rows are {list_names(named)}: where the file has no header, its first line has to be one."


def _printed_nothing(columns: Columns, recognised: Recognised) -> Iterator[str]:
    talk = recognised.formatting.conversation
    for name in filter(
        columns.is_text, filter(None, (talk.prompt, talk.addition, talk.answer) if talk else recognised.used)
    ):
        words = [value.strip() for value in columns.values(name) if isinstance(value, str)]
        if found := [word for word in words if word in PRINTED_NOTHING]:
            yield (
                f"Column {name!r} holds {found[0]} in {len(found)} of the first {format_count(len(columns.records), 'row')}, "
                "which is taken for its text."
            )


def _without_media(columns: Columns, recognised: Recognised, settings: DataSettings) -> Recognised:
    """Refuses rows that hold an image, a video or a sound beside their text, where the columns to read are not named.

    Raises:
        DataError: A row of the first ones holds one, and bad rows are not skipped.
    """
    formatting = recognised.formatting
    if are_named(settings):
        return recognised
    found = [(name, kind) for name in recognised.unused if (kind := _media_in(columns, name))]
    if not found:
        return recognised
    rows = replace(recognised, rules=replace(recognised.rules, media=tuple(found)))
    name, kind = next(((n, k) for n, k in found if any(map(holds_some, columns.values(n)))), (None, None))
    if name is None or settings.on_bad_row == "skip":
        return rows
    raise DataError(
        f"Column {name!r} holds {kind} beside the text, and only text is read.",
        f"Train on the text alone by naming its columns, {name_columns(formatting)}, or leave such rows out: "
        "--on-bad-row skip",
    )


def _media_in(columns: Columns, name: str) -> str | None:
    """What a column that no format uses holds: an image, a video or a sound, by its name or by (almost) all rows."""
    if kind := named_like(name):
        return kind
    values = columns.values(name)
    kind = next(filter(None, map(kind_of, values)), None)
    return kind if kind and columns.holds(name, lambda value: kind_of(value) == kind) else None
