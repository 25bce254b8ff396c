"""Chunks of raw lines in, records out, each with its line; what cannot be read comes out as a bad row with its cause.

Runs in every process that tokenises; `files` cuts data into the chunks, in one.
"""

import json
from dataclasses import dataclass, field
from typing import Any

Record = dict[str, Any]

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


class Batch:
    """Collects checked records of one file into chunks."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.chunk = Chunk(name)

    def add(self, record: Any, line: int) -> None:
        if problem := problem_of_record(record):
            self.chunk.bad_rows.append(BadRow(self._name, line, problem))
        else:
            self.chunk.records.append(record)
            self.chunk.lines.append(line)

    def fail(self, line: int | None, cause: str) -> None:
        self.chunk.bad_rows.append(BadRow(self._name, line, cause))

    @property
    def is_full(self) -> bool:
        return len(self.chunk.records) + len(self.chunk.bad_rows) >= RECORDS_A_CHUNK

    def take(self) -> Chunk:
        full, self.chunk = self.chunk, Chunk(self._name)
        return full


def too_long(name: str, line: int, max_line_bytes: int) -> BadRow:
    return BadRow(name, line, f"longer than --max-line-bytes {max_line_bytes}")


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
    raise NotANumber(name)


DECODER = json.JSONDecoder(parse_constant=refuse_constant)


def json_cause(line: str, error: Exception) -> str:
    if isinstance(error, NotANumber):
        return f"holds {error}, which is no JSON value"
    if isinstance(error, RecursionError):
        return "JSON nested too deeply"
    if not isinstance(error, json.JSONDecodeError):
        return f"invalid JSON ({error})"
    if "\0" in line:
        return f"holds a NUL character at column {line.index(chr(0)) + 1}"
    if is_cut_short(error, len(line.rstrip())):
        return f"truncated JSON: the line ends at column {len(line.rstrip())} inside a value"
    return f"invalid JSON at column {error.colno}: {error.msg}"


def is_cut_short(error: json.JSONDecodeError, length: int) -> bool:
    return error.pos >= length or error.msg.startswith("Unterminated string")


def problem_of_record(record: Any) -> str | None:
    """What the JSON parser lets through: rows that are no object, NUL, and halves of surrogate pairs."""
    if not isinstance(record, dict):
        return f"a row must be an object with named fields, but this is {describe_type(record)}"
    stack: list[tuple[Any, str]] = [(value, f"field {name!r}") for name, value in record.items()]
    while stack:
        value, where = stack.pop()
        if isinstance(value, str):
            if "\0" in value:
                return f"{where} holds a NUL character"
            if not value.isascii():
                try:
                    value.encode("utf-8")
                except UnicodeEncodeError as error:
                    code = ord(value[error.start])
                    if 0xDC80 <= code <= 0xDCFF:  # how the CSV reader keeps a byte that is not UTF-8
                        return f"not UTF-8: byte 0x{code - 0xDC00:02X} in {where}"
                    return f"{where} holds half a surrogate pair (\\u{code:04x})"
        elif isinstance(value, dict):
            stack += [(item, where) for item in value.values()]
        elif isinstance(value, list):
            stack += [(item, where) for item in value]
    return None


def describe_type(value: Any) -> str:
    """A JSON type in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
