"""Origins of a row's parts: which message of its record, or which column, each stretch of its text shows."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

from qlora_cli.core.data.data_sets import read_data_sets
from qlora_cli.core.data.prepare import limited, recognise_source
from qlora_cli.core.data.sources import resolve_source
from qlora_cli.core.prompts.encoder import encoder_of
from qlora_cli.core.prompts.formatting import Formatting, RowFormatter
from qlora_cli.core.prompts.prompt_template import PromptTemplate
from qlora_cli.core.reading.chunks import parse_chunk
from qlora_cli.core.records.conversation import ConversationColumns, read_conversation
from qlora_cli.core.records.record import BadField, Blank, Record
from qlora_cli.core.records.rules import RowRules
from qlora_cli.events import report_nothing
from qlora_cli.settings.groups import DataSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNKS_READ = 2  # of a data set, for the records of the rows that are shown
END_LETTERS = 32  # of a text that is changed somewhere: its last and its first ones are looked for
Part = tuple[str, list[str]]  # a message's number and role, or a column; and texts of it, any of which may be printed


def first_records(settings: DataSettings, tokenizer: "PreTrainedTokenizerBase") -> dict[int, Record]:
    """Records from the beginning of the first data set, by the numbers that prepared rows know them by.

    Raises:
        QloraError: It cannot be read, or is not recognised.
    """
    data_set = read_data_sets(settings.data)[0]
    source = resolve_source(data_set.name, settings, report_nothing)
    rules = recognise_source(source, settings, encoder_of(tokenizer)).rules or RowRules()
    chunks = limited(data_set.take(source.chunks(settings.max_line_bytes), settings.max_line_bytes), settings)
    found: dict[int, Record] = {}
    before = 0
    for chunk in islice(chunks, CHUNKS_READ):
        parse_chunk(chunk, settings.max_line_bytes)
        for number, record in enumerate(chunk.records, before):
            try:
                found[number] = rules.apply(record)
            except (BadField, Blank):
                continue  # no row came of it
        before += len(chunk.records) + len(chunk.bad_rows)
    return found


def parts_of(record: Record, formatting: Formatting) -> list[Part]:
    """What of a record a row may show, in order: its messages, numbered from 1, or the columns of its template."""
    if formatting.format == "prompt":
        fields = dict.fromkeys(PromptTemplate.fields_of(str(formatting.template)))
        return [(name, [str(record[name])]) for name in fields if record.get(name)]
    if formatting.format != "chat":
        return []
    columns = formatting.conversation or ConversationColumns(messages=formatting.column, tools="tools")
    try:
        messages = read_conversation(record, columns).messages
    except BadField:
        return []
    return [(f"{number} {message['role']}", list(_texts_of(message))) for number, message in enumerate(messages, 1)]


def _texts_of(message: dict[str, Any]) -> Iterator[str]:
    for key in ("reasoning_content", "reasoning", "thinking", "content"):
        if isinstance(text := message.get(key), str) and text.strip():
            yield text.strip()
    for call in message.get("tool_calls") or ():
        if isinstance(call, dict) and isinstance(function := call.get("function"), dict):
            yield str(function.get("name"))


def name_pieces(pieces: Sequence[str], parts: Sequence[Part], spell: Callable[[str], str]) -> list[str]:
    """For each piece of a row's text the parts that begin in it, such as "1 system, 2 user"; empty where none does.

    Args:
        pieces: The text, cut.
        parts: In order; one that is printed before those that precede it is found too.
        spell: A text as the tokenizer gives it back.
    """
    whole = "".join(pieces)
    names: list[list[str]] = [[] for _ in pieces]
    ends = [0]
    for piece in pieces:
        ends.append(ends[-1] + len(piece))
    at = 0
    for name, texts in parts:
        found = [place for text in texts if (place := _find(whole, text, at, spell)) is not None]
        if not found:
            continue
        start = min(first for first, _ in found)
        at = max(at, *(end for _, end in found))
        names[next(i for i, (first, last) in enumerate(pairwise(ends)) if first <= start < last)].append(name)
    return [", ".join(given) for given in names]


def _find(whole: str, text: str, at: int, spell: Callable[[str], str]) -> tuple[int, int] | None:
    """First and last place of a text from `at` on, or anywhere; of one that is not there as it is, of its end or beginning."""
    for wanted in (text, spell(text).strip(), text[-END_LETTERS:].strip(), text[:END_LETTERS].strip()):
        for start in (at, 0):
            if wanted and (place := whole.find(wanted, start)) >= 0:
                return place, place + len(wanted)
    return None


def left_out_of(
    records: Sequence[Record], formatting: Formatting, tokenizer: "PreTrainedTokenizerBase", train_on: str
) -> list[list[str]]:
    """What the chat template leaves out of each record, as sentences without their subject.

    Raises:
        DataError: The chat template cannot be used.
    """
    formatter = RowFormatter(formatting, encoder_of(tokenizer), "warn")
    return [formatter.faults_of(record, train_on) for record in records]
