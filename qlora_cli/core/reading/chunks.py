"""Chunks of data files: rows still to be parsed, or records with their lines; bad rows with their cause.

`readers` cuts files into chunks in one process; every process that tokenises parses them.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from qlora_cli.core.records.messages import holds_messages
from qlora_cli.core.records.record import Record, problem_of_record
from qlora_cli.errors import DataError
from qlora_cli.settings.groups import COLUMN_FLAGS

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BYTE_ORDER_MARKS = re.compile(b"^" + BYTE_ORDER_MARK, re.MULTILINE)  # also of files that were joined to others
TEXT_COLUMN = "text"  # of a .txt file
MESSAGES_COLUMN = "messages"  # of rows that are lists of messages
RECORDS_A_CHUNK = 1024
LETTERS_A_CHUNK = 2**22  # of records that were parsed where they were read
LONG_BYTES = 2**20  # of a chunk that only a long row makes so long: JSON may take 26 times as much memory once parsed
PARSED = 8  # times as much memory as the text of it, for most rows


@dataclass(frozen=True)
class BadRow:
    """A row, or a whole file (line None), that cannot be read or trained on; `way`: see `BadField`."""

    file: str
    line: int | None
    cause: str
    way: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.cause}" if self.line is not None else f"{self.file}: {self.cause}"

    def to_dict(self) -> dict[str, Any]:
        """As it is listed."""
        return {"file": self.file, "line": self.line, "cause": self.cause}

    def error(self, of_rows: int = 0) -> DataError:
        """What ends a preparation that stops at it, where `of_rows` rows were read and none was good, if there were any."""
        if self.line is None:
            hint = "Mend the file, or take it out of --data; beside others --on-bad-row skip leaves it out."
        elif of_rows > 1:
            hint = self.way or f"Mend what they have in common, or name other columns: {COLUMN_FLAGS}."
            return DataError(f"{self}. None of the first {of_rows:,} rows is good.", hint)
        else:
            hint = "Mend it, or leave such rows out and have them listed: --on-bad-row skip"
            hint = f"{self.way} Or leave such rows out and have them listed: --on-bad-row skip" if self.way else hint
        return DataError(f"{self}.", hint)


@dataclass
class Chunk:
    """Some rows of one file: raw lines still to be parsed, or records with their lines.

    Attributes:
        file: Name shown to the user.
        first_line: Line of the first raw line, from 1.
        kind: How to parse `raw`: jsonl, txt, or element (one JSON value, which may go over several lines).
        source_bytes: Bytes of this file read since the chunk before, for the progress bar.
        letters: About how many the records were written with.
        doubled: Key → objects in which it stands twice, with different values; the last counts.
    """

    file: str
    first_line: int = 1
    kind: str = "jsonl"
    raw: bytes = b""
    records: list[Record] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    bad_rows: list[BadRow] = field(default_factory=list)
    source_bytes: int = 0
    letters: int = 0
    doubled: Counter[str] = field(default_factory=Counter)

    def add(self, record: Any, line: int, letters: int = 0) -> None:
        """Adds a record, as a bad row if it cannot be used; a list of messages is a record that holds them."""
        self.letters += letters
        if isinstance(record, list) and holds_messages(record):
            record = {MESSAGES_COLUMN: record}
        if problem := problem_of_record(record):
            self.fail(line, problem)
        else:
            self.records.append(record)
            self.lines.append(line)

    def fail(self, line: int | None, cause: str, way: str = "") -> "Chunk":
        """Adds a bad row, or a bad file (line None); returns this chunk."""
        self.bad_rows.append(BadRow(self.file, line, cause, way))
        return self

    @property
    def held_bytes(self) -> int:
        """About how much memory it takes until it is tokenised; parsed rows take several times what they were written with."""
        return len(self.raw) or PARSED * self.letters

    @property
    def is_long(self) -> bool:
        """Whether it holds a row so long that only one like it should be in work at a time."""
        return len(self.raw) > LONG_BYTES or self.letters > 2 * LETTERS_A_CHUNK

    @property
    def is_full(self) -> bool:
        """Whether there are enough rows for a chunk, or long ones."""
        return len(self.records) + len(self.bad_rows) >= RECORDS_A_CHUNK or self.letters >= LETTERS_A_CHUNK


def too_long(max_line_bytes: int) -> str:
    """What is wrong with a line past the limit."""
    return f"longer than --max-line-bytes {max_line_bytes}"


def count_rows(chunk: Chunk, max_line_bytes: int) -> int:
    """Rows of a chunk that can be read; a long one stays unparsed, so that it travels as it was written."""
    if not chunk.is_long:
        parse_chunk(chunk, max_line_bytes)
        return len(chunk.records)
    copy = replace(chunk, records=[*chunk.records], lines=[*chunk.lines], bad_rows=[*chunk.bad_rows], doubled=Counter())
    parse_chunk(copy, max_line_bytes)
    return len(copy.records)


def parse_chunk(chunk: Chunk, max_line_bytes: int) -> None:
    """Parses a chunk's raw lines into its records and bad rows."""
    if not chunk.raw:
        return
    raw = BYTE_ORDER_MARKS.sub(b"", chunk.raw) if BYTE_ORDER_MARK in chunk.raw else chunk.raw
    rows: list[str | bytes] = [raw]
    if chunk.kind != "element":
        try:
            rows = [*raw.decode("utf-8").split("\n")]
        except UnicodeDecodeError:
            rows = [*raw.split(b"\n")]
    is_suspect = b"\\u" in raw or b"\0" in raw
    check_length = len(raw) > max_line_bytes
    decoder = RowDecoder()
    decode = decoder.decode
    for number, row in enumerate(rows, chunk.first_line):
        try:
            line = row if isinstance(row, str) else row.decode("utf-8")
        except UnicodeDecodeError as error:
            byte = f"byte 0x{error.object[error.start]:02X} at byte {error.start + 1} of the line"
            chunk.fail(number, f"not UTF-8: {byte}")
            continue
        if not line or line.isspace():
            continue
        if check_length and len(line.encode()) > max_line_bytes:
            chunk.fail(number, too_long(max_line_bytes))
            continue
        if chunk.kind == "txt":
            record = {TEXT_COLUMN: line.rstrip("\r")}
        else:
            try:
                record = decode(line)
            except (ValueError, RecursionError) as error:
                chunk.fail(number, json_cause(line, error))
                decoder.doubled.clear()
                continue
            if decoder.doubled:
                chunk.doubled += decoder.take_doubled()
        if is_suspect or type(record) is not dict:
            chunk.add(record, number)
        else:
            chunk.records.append(record)
            chunk.lines.append(number)
    chunk.letters += len(raw)
    chunk.raw = b""


class NotANumber(ValueError):
    """NaN or Infinity, which some writers put into JSON."""


def refuse_constant(name: str) -> None:
    """For json's `parse_constant`."""
    raise NotANumber(name)


class RowDecoder(json.JSONDecoder):
    """Decoder of JSON that refuses NaN and counts keys that stand twice in an object.

    Looking at every object takes 0.3 to 2.7 µs a row, of the 30 and more in which a row is tokenised.

    Attributes:
        doubled: Key → objects decoded so far in which it has different values.
    """

    def __init__(self) -> None:
        super().__init__(parse_constant=refuse_constant, object_pairs_hook=self._object)
        self.doubled: Counter[str] = Counter()

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        last = dict(pairs)
        if len(last) < len(pairs):
            self.doubled.update({name for name, value in pairs if value != last[name]})
        return last

    def take_doubled(self) -> Counter[str]:
        """What was counted, to be counted anew."""
        taken, self.doubled = self.doubled, Counter()
        return taken


def json_cause(text: str, error: Exception) -> str:
    """Why a line, or an element of an array, is no JSON."""
    if isinstance(error, NotANumber):
        return f"holds {error}, which is no JSON value"
    if isinstance(error, RecursionError):
        return "JSON nested too deeply"
    if not isinstance(error, json.JSONDecodeError):
        return f"invalid JSON ({error})"
    if "\0" in text:
        return f"holds a NUL character at column {text.index(chr(0)) + 1}"
    if is_cut_short(error, text):
        return f"truncated JSON: the line ends at column {len(text.rstrip())} inside a value"
    return f"invalid JSON at column {error.colno}: {error.msg}"


def is_cut_short(error: json.JSONDecodeError, text: str) -> bool:
    """Whether a JSON error comes from the end of the text."""
    return error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
