"""Recognition of plain text: its column, and whether it was formatted beforehand with control tokens."""

import shlex
from collections.abc import Sequence

from qlora_cli.core.prompts.encoder import TextEncoder
from qlora_cli.core.prompts.formatting import Formatting
from qlora_cli.core.recognition.columns import CONVERSATIONS, NAMES_SHOWN, Columns, list_names, named_like_answers
from qlora_cli.core.recognition.letters import remark_letters
from qlora_cli.core.recognition.recognised import Recognised
from qlora_cli.core.records.dialogues import are_keys, headings_of
from qlora_cli.core.records.record import describe_type
from qlora_cli.errors import DataError, UsageError
from qlora_cli.settings.groups import COLUMN_FLAGS, DataSettings

TEXTS = ("text", "content", "quote", "document", "body", "passage", "story", "article", "sentence", "code")
# What names and describes a row; never what it is about.
IDENTIFIERS = {
    "",
    "id",
    "uuid",
    "guid",
    "url",
    "uri",
    "hash",
    "sha",
    "sha256",
    "md5",
    "date",
    "timestamp",
    "split",
    "index",
}
# What asks for an answer: the text of a row that has one, under whatever name, is not the question alone.
QUESTIONS = {"instruction", "question", "prompt", "query", "problem"}
SUMMARIES = ("summary", "highlights")  # of a text, which is then rather what is to be summarised
REPLIES = ("answer", "answers", "response", "completion")  # to a text whose name does not say that it asks
CLEARLY_LONGER = 2  # the text column holds this many times the letters of the next one, or the user has to choose


def recognise_text(columns: Columns, settings: DataSettings, encoder: TextEncoder) -> Recognised:
    """Text in one column, every token of it trained.

    Raises:
        UsageError: --train-on asks for a completion, or --text-column names no column.
        DataError: No column is clearly the text.
    """
    if settings.text_column:
        column = columns.require(settings.text_column, "--text-column")
    else:
        column = _preferred(columns) or _find_text(columns, is_stated=settings.format == "text")
    texts = [text for text in columns.values(column) if isinstance(text, str) and text.strip()]
    headings = _shared_headings(columns, column)
    answers_alone = f"--messages-column {shlex.quote(column)}"
    if settings.train_on not in (None, "all"):
        raise UsageError(
            f"--train-on {settings.train_on} needs a completion, but these rows are plain text.",
            f"Leave --train-on out, or have the conversations in them read: {answers_alone}"
            if headings
            else "Leave --train-on out, or name the columns with --prompt-column and --completion-column.",
        )
    markup = shows_markup(texts, encoder)
    chosen, rejected = columns.preference()
    remarks = []
    framed = sum(encoder.unframe(text) != text for text in texts)
    typed = sum(encoder.holds_control(encoder.unframe(text)) for text in texts)
    if markup:
        remarks.append(
            f"Every text is {markup}: the texts were formatted beforehand, so control tokens written in them are taken "
            "as such."
        )
    elif framed:
        remarks.append(
            f"{framed} of the first {len(texts)} texts stand between the tokens of beginning and end that every row gets; "
            "they have them once."
        )
    if typed and not markup:
        remarks.append(
            f"Control tokens typed in column {column!r} are kept as plain text ({typed} of the first {len(texts)} rows "
            "hold some; they would be taken as such if every row began or ended with one)."
        )
    remarks += remark_letters(texts, encoder, "texts")
    if headings:
        way = "" if markup else f" The answers alone, under the chat template: {answers_alone}"
        remarks.append(
            f"The texts look like conversations ({list_names(headings)}), of which the questions are trained, too.{way}"
        )
    return Recognised(
        Formatting(format="text", column=column, markup=bool(markup)),
        "all",
        f"plain text in column {column!r}, every token trained",
        tuple(remarks),
        (column,),
        rejected=rejected if column == chosen else None,
    )


def _shared_headings(columns: Columns, column: str) -> tuple[str, str] | None:
    """The headings of question and answer in the first text of a column that holds dialogues."""
    if not columns.holds(column, lambda v: isinstance(v, str) and headings_of(v) is not None and not are_keys(v)):
        return None
    texts = (value for value in columns.values(column) if isinstance(value, str))
    return next(filter(None, map(headings_of, texts)))


def shows_markup(texts: Sequence[str], encoder: TextEncoder) -> str | None:
    """How texts show, every one of them, that they were formatted beforehand; None if they do not.

    All of them begin with a control token, or all end in one, or all hold one of the model's own chat template.
    """
    if not texts:
        return None
    parts = [encoder.split_markup(text.strip()) for text in texts]
    names = {number: token for token, number in encoder.control_ids.items()}
    for at, place in ((0, "begun"), (-1, "ended")):
        ends = [part[at] if part else "" for part in parts]
        if all(isinstance(end, int) for end in ends):
            return f"{place} by a control token (such as {names[int(ends[0])]})"
    template = encoder.spec.chat_template or ""
    known = [token for token in encoder.control_ids if token in template]
    common = next((token for token in known if all(token in text for text in texts)), None)
    return f"written with the chat template's {common}" if common else None


def common_ending(texts: Sequence[str], encoder: TextEncoder) -> str | None:
    """The control token that every one of these texts ends in."""
    stripped = [text.rstrip() for text in texts if text.strip()]
    longest_first = sorted(encoder.control_ids, key=len, reverse=True)
    return next((t for t in longest_first if stripped and all(text.endswith(t) for text in stripped)), None)


def _preferred(columns: Columns) -> str | None:
    """The texts that are preferred to others."""
    chosen, rejected = columns.preference()
    return chosen if chosen and rejected and columns.is_text(chosen) and columns.is_text(rejected) else None


def _find_text(columns: Columns, *, is_stated: bool) -> str:
    summary = columns.find(SUMMARIES)
    if (known := columns.find(TEXTS)) and columns.is_text(known):
        return known if is_stated else _without_summary(columns, known, summary)
    letters = {name: columns.letters(name) for name in columns.names}
    texts = [name for name in columns.names if columns.is_text(name) and not _is_identifier(name)]
    ranked = sorted(texts, key=lambda name: -letters[name])
    nested = [
        name
        for name in columns.names
        if any(isinstance(value, list | dict) for value in columns.values(name))
        and (not ranked or letters[name] > letters[ranked[0]])
    ]
    if not ranked or nested:
        raise DataError(
            f"Column {nested[0]!r} holds most of the rows, but as no conversation; the data has {columns.listed}."
            if nested
            else f"No column holds text; the data has {_with_types(columns)}.",
            _name_fields(columns.fields_of(nested[0]) if nested else []),
        )
    question = next((name for name in ranked if name.strip().lower() in QUESTIONS), None)
    others = [name for name in ranked if name != question]
    likely = named_like_answers(others)
    others = [*likely, *(name for name in others if name not in likely)]
    if question and others and not is_stated:
        raise DataError(
            f"Column {question!r} is named like a question, and no other like its answer: {', '.join(map(repr, others))}.",
            f"Choose: --prompt-column {shlex.quote(question)} --completion-column {shlex.quote(others[0])}, or to train on "
            f"one alone: --text-column {shlex.quote(ranked[0])}",
        )
    first, second = (shlex.quote(name) for name in (ranked * 2)[:2])
    if len(ranked) > 1 and ranked[1] in named_like_answers(ranked) and ranked[0] not in named_like_answers(ranked):
        first, second = second, first
    if len(ranked) > 1 and letters[ranked[0]] < CLEARLY_LONGER * letters[ranked[1]]:
        raise DataError(
            f"Several columns could be the text: {', '.join(map(repr, ranked))}.",
            f"Choose: --text-column {first}, or --prompt-column {second} --completion-column {first}",
        )
    return ranked[0] if is_stated else _without_summary(columns, ranked[0], summary or columns.find(REPLIES))


def _with_types(columns: Columns) -> str:
    values = ((name, next(iter(columns.values(name)), None)) for name in columns.names[:NAMES_SHOWN])
    return ", ".join(f"{name!r} ({describe_type(value)})" for name, value in values)


def _name_fields(inside: Sequence[str]) -> str:
    """How to name the columns, or the fields of a column's objects."""
    if not inside:
        return f"Name the columns: {COLUMN_FLAGS}."
    first, second = (shlex.quote(name) for name in (*inside, *inside)[:2])
    chat = next((shlex.quote(name) for name in inside if name.rpartition(".")[2].lower() in CONVERSATIONS), None)
    example = f"--messages-column {chat}" if chat else f"--prompt-column {first} --completion-column {second}"
    return f"Name fields of its objects, which are {list_names(inside)}, as in {example}"


def _without_summary(columns: Columns, text: str, summary: str | None) -> str:
    """The text column, if no column beside it summarises or answers it."""
    if summary in (None, text) or not columns.is_text(str(summary)):
        return text
    raise DataError(
        f"Column {text!r} holds text, and {summary!r} beside it what may be its "
        f"{'answer' if str(summary).lower() in REPLIES else 'summary'}.",
        f"Choose: --prompt-column {shlex.quote(text)} --completion-column {shlex.quote(str(summary))}, or to train on the "
        f"text alone: --text-column {shlex.quote(text)}",
    )


def _is_identifier(name: str) -> bool:
    return name.lower() in IDENTIFIERS or name.lower().endswith(("_id", "_url", "_hash", "id_"))
