"""Chunks of data files: rows still to be parsed, or records with their lines; bad rows with their cause.

`readers` cuts files into chunks in one process; every process that tokenises parses them.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from qlora_cli.core.prompts.records import Record, problem_of_record

TEXT_COLUMN = "text"  # of a .txt file
RECORDS_A_CHUNK = 1024


@dataclass(frozen=True)
class BadRow:
    """A row, or a whole file (line None), that cannot be read or trained on."""

    file: str
    line: int | None
    cause: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.cause}" if self.line is not None else f"{self.file}: {self.cause}"


@dataclass
class Chunk:
    """Some rows of one file: raw lines still to be parsed, or records with their lines.

    Attributes:
        file: Name shown to the user.
        first_line: Line of the first raw line, from 1.
        kind: How to parse `raw`: jsonl or txt.
        source_bytes: Bytes of this file read since the chunk before, for the progress bar.
    """

    file: str
    first_line: int = 1
    kind: str = "records"
    raw: bytes = b""
    records: list[Record] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    bad_rows: list[BadRow] = field(default_factory=list)
    source_bytes: int = 0


class ChunkBuilder:
    """Collects the records of one file, checked, into chunks."""

    def __init__(self, file: str) -> None:
        self._chunk = Chunk(file)

    def add(self, record: Any, line: int) -> None:
        """Adds a record, as a bad row if it cannot be used."""
        if problem := problem_of_record(record):
            self.fail(line, problem)
        else:
            self._chunk.records.append(record)
            self._chunk.lines.append(line)

    def fail(self, line: int | None, cause: str) -> None:
        """Adds a bad row, or a bad file."""
        self._chunk.bad_rows.append(BadRow(self._chunk.file, line, cause))

    @property
    def is_full(self) -> bool:
        """Whether there are enough rows for a chunk."""
        return len(self._chunk.records) + len(self._chunk.bad_rows) >= RECORDS_A_CHUNK

    def take(self) -> Chunk:
        """What was collected since the last call."""
        full, self._chunk = self._chunk, Chunk(self._chunk.file)
        return full


def too_long(file: str, line: int, max_line_bytes: int) -> BadRow:
    """The bad row that a line past the limit makes."""
    return BadRow(file, line, f"longer than --max-line-bytes {max_line_bytes}")


def parse_chunk(chunk: Chunk, max_line_bytes: int) -> None:
    """Parses a chunk's raw lines into its records and bad rows."""
    if chunk.kind == "records":
        return
    raw = chunk.raw.removeprefix(b"\xef\xbb\xbf") if chunk.first_line == 1 else chunk.raw
    try:
        lines: list[str | BadRow] = list(raw.decode("utf-8").split("\n"))
    except UnicodeDecodeError:
        lines = [_decode(line, chunk, number) for number, line in enumerate(raw.split(b"\n"), chunk.first_line)]
    is_suspect = "\\u" in raw.decode("utf-8", "replace") or b"\0" in raw
    check_length = len(raw) > max_line_bytes
    decode = DECODER.decode
    for number, line in enumerate(lines, chunk.first_line):
        if isinstance(line, BadRow):
            chunk.bad_rows.append(line)
            continue
        if not line or line.isspace():
            continue
        if check_length and len(line.encode()) > max_line_bytes:
            chunk.bad_rows.append(too_long(chunk.file, number, max_line_bytes))
            continue
        if chunk.kind == "txt":
            record = {TEXT_COLUMN: line.rstrip("\r")}
        else:
            try:
                record = decode(line)
            except (ValueError, RecursionError) as error:
                chunk.bad_rows.append(BadRow(chunk.file, number, json_cause(line, error)))
                continue
        if problem := (problem_of_record(record) if is_suspect or type(record) is not dict else None):
            chunk.bad_rows.append(BadRow(chunk.file, number, problem))
            continue
        chunk.records.append(record)
        chunk.lines.append(number)
    chunk.raw = b""


def _decode(line: bytes, chunk: Chunk, number: int) -> str | BadRow:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadRow(
            chunk.file, number, f"not UTF-8: byte 0x{line[error.start]:02X} at byte {error.start + 1} of the line"
        )


class NotANumber(ValueError):
    """NaN or Infinity, which some writers put into JSON."""


def refuse_constant(name: str) -> None:
    """For json's `parse_constant`."""
    raise NotANumber(name)


DECODER = json.JSONDecoder(parse_constant=refuse_constant)


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
