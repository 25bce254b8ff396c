"""Readers of data files: JSON Lines, JSON, CSV, TSV, Parquet and text, compressed or not, as chunks of rows in order.

JSON Lines and text are only cut at line ends here; CSV, JSON and Parquet are parsed here, where order matters. No
file is held as a whole but a JSON object that holds its rows in some field.
"""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from qlora_cli.core.data.chunks import (
    DECODER,
    RECORDS_A_CHUNK,
    Chunk,
    is_cut_short,
    json_cause,
    refuse_constant,
    too_long,
)
from qlora_cli.core.records.messages import holds_messages
from qlora_cli.core.records.record import Record, problem_of_record
from qlora_cli.errors import first_line

CHUNK_BYTES = 2**19
HEAD_BYTES = 2**20  # looked at to see what a file is
KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "txt",
}
# Not pyarrow for gzip: it refuses members that are padded with zeros, as files read back from tapes are.
DECOMPRESS: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".zst": lambda file: pa.input_stream(file, compression="zstd"),
}


def kind_of(path: Path) -> str | None:
    """jsonl, json, csv, tsv, parquet or txt by a file's name, compressed or not; None for anything else."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in DECOMPRESS:
        suffixes.pop()
    return KINDS.get(suffixes[-1]) if suffixes else None


def read_chunks(path: Path, name: str, max_line_bytes: int, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """One file, cut into chunks in order; what is wrong with it comes as bad rows.

    Args:
        path: The file.
        name: How messages call it.
        max_line_bytes: Longest line (JSON element, CSV row) accepted.
        chunk_bytes: Bytes of lines in a chunk, and of a JSON array read at once.
    """
    kind = kind_of(path)
    try:
        with io.BufferedReader(io.FileIO(path), HEAD_BYTES) as file:
            if kind == "parquet":
                yield from _read_parquet(path, name, file)
                return
            stream: Any = file
            if decompress := DECOMPRESS.get(path.suffix.lower()):
                stream = io.BufferedReader(decompress(file), HEAD_BYTES)
            head = stream.peek(HEAD_BYTES).removeprefix(b"\xef\xbb\xbf")
            if problem := _problem_of(head):
                yield Chunk(name).fail(None, problem)
                return
            if kind in ("csv", "tsv"):
                chunks = _read_csv(stream, name, max_line_bytes, tabs=kind == "tsv")
            elif kind in ("json", "jsonl") and head.lstrip()[:1] == b"[" and not _begins_with_messages(head):
                chunks = _read_array(stream, name, max_line_bytes, chunk_bytes)
            elif kind == "json" and not _is_whole_json(head):  # a first line that is whole: JSON Lines by another name
                chunks = _read_object(stream, name)
            else:
                chunks = _read_lines(stream, name, max_line_bytes, chunk_bytes, "txt" if kind == "txt" else "jsonl")
            seen = 0
            for chunk in chunks:
                position = file.tell()
                chunk.source_bytes, seen = position - seen, position
                yield chunk
    except (EOFError, zlib.error, OSError) as error:
        # What is wrong with compressed data has no error number; what the system refuses has one.
        is_broken = getattr(error, "errno", None) is None and path.suffix.lower() in DECOMPRESS
        cause = "the compressed data is broken or cut short" if is_broken else "cannot be read"
        yield Chunk(name).fail(None, f"{cause} ({getattr(error, 'strerror', None) or first_line(error)})")


def _problem_of(head: bytes) -> str | None:
    """What is wrong with a whole file, seen from its beginning."""
    if not head.strip():
        return "the file is empty"
    if re.match(rb"\s*<(!doctype\s+html|html|head|body)", head, re.IGNORECASE):
        return "this is an HTML page, not data (a download that went wrong?)"
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "not UTF-8: the file is in UTF-16"
    if head.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the data itself"
    return None


def _is_whole_json(head: bytes) -> bool:
    """Whether a file's first line is JSON by itself and another follows, as in JSON Lines under the name .json."""
    first, newline, rest = head.lstrip().partition(b"\n")
    if not newline:
        return False
    try:
        json.loads(first)
    except ValueError:
        return False
    return bool(rest.strip())


def _begins_with_messages(head: bytes) -> bool:
    """Whether a file's first line is a list of messages by itself and another follows: a conversation a line."""
    return _is_whole_json(head) and holds_messages(json.loads(head.lstrip().partition(b"\n")[0]))


def _read_lines(
    stream: io.BufferedReader, name: str, max_line_bytes: int, chunk_bytes: int, kind: str
) -> Iterator[Chunk]:
    """Whole lines, about `chunk_bytes` at a time; a line past the limit is left out without being held."""
    line, rest, skipping = 1, b"", False
    while block := stream.read(chunk_bytes):
        if skipping:
            _, newline, block = block.partition(b"\n")
            if not newline:
                continue
            skipping, line = False, line + 1
        cut = block.rfind(b"\n") + 1
        if cut:
            raw = rest + block[:cut]
            yield Chunk(name, line, kind, raw)
            line += raw.count(b"\n")
            rest = block[cut:]
        else:
            rest += block
        if len(rest) > max_line_bytes:
            yield Chunk(name).fail(line, too_long(max_line_bytes))
            rest, skipping = b"", True
    if rest:
        yield Chunk(name, line, kind, rest)


def _read_array(stream: io.BufferedReader, name: str, max_line_bytes: int, chunk_bytes: int) -> Iterator[Chunk]:
    """The elements of one JSON array, without holding the array; numbered by the line an element starts on."""
    chunk = Chunk(name)
    text = _ArrayText(stream, max_line_bytes, chunk_bytes)
    try:
        for element, line in text.elements():
            chunk.add(element, line)
            if chunk.is_full:
                yield chunk
                chunk = Chunk(name)
    except _BrokenArray as error:
        chunk.fail(error.line, f"{error}; what follows cannot be told apart")
    else:
        line = text.line
        if text.next_sign():
            chunk.fail(line, "the file goes on after the end of its array")
    yield chunk


class _BrokenArray(Exception):
    """What ends the reading of an array, and the line it is on."""

    def __init__(self, line: int, cause: str) -> None:
        super().__init__(cause)
        self.line = line


class _ArrayText:
    """The text of a JSON array, decoded piece by piece.

    Attributes:
        line: Where it has been read up to, from 1.
    """

    def __init__(self, stream: io.BufferedReader, max_line_bytes: int, piece_bytes: int) -> None:
        self.line = 1
        self._stream, self._max_line_bytes, self._piece_bytes = stream, max_line_bytes, piece_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._buffer, self._at = "", 0
        self._problem: str | None = None  # what is not UTF-8, once it is met

    def elements(self) -> Iterator[tuple[Any, int]]:
        """Every element with the line it starts on.

        Raises:
            _BrokenArray: It is no array, or is cut short.
        """
        self.next_sign()
        self._at += 1  # the opening bracket
        is_separated = True  # whether a comma, or the bracket, has come since the element before
        while (sign := self.next_sign()) != "]":
            if is_separated:
                line = self.line
                yield self._next_element(), line
            elif not sign:
                raise self._ended()
            elif sign != ",":
                raise _BrokenArray(self.line, "invalid JSON: Expecting ',' delimiter")
            else:
                self._at += 1
            is_separated = not is_separated
        self._at += 1

    def next_sign(self) -> str:
        """The next letter that is no space; empty at the end."""
        while True:
            end = _SPACE.match(self._buffer, self._at).end()  # type: ignore[union-attr]
            self._move(end)
            if end < len(self._buffer) or not self._read_on():
                return self._buffer[self._at : self._at + 1]

    def _next_element(self) -> Any:
        while True:
            try:
                element, end = DECODER.raw_decode(self._buffer, self._at)
            except (ValueError, RecursionError) as error:
                self._repair(error)
            else:
                self._move(end)
                return element

    def _repair(self, error: Exception) -> None:
        """Reads on if an element has not come to its end; raises _BrokenArray if that is not what is wrong."""
        if not isinstance(error, json.JSONDecodeError):
            raise _BrokenArray(self.line, json_cause("", error))
        # An escape, a name such as true, or a number may be cut in two by the end of what was read.
        if error.msg.startswith("Unterminated string") or error.pos >= len(self._buffer) - 16:
            if len(self._buffer) - self._at > self._max_line_bytes:
                cause = f"an element of the array is longer than --max-line-bytes {self._max_line_bytes}"
                raise _BrokenArray(self.line, cause)
            if self._read_on():
                return
            if self._problem or is_cut_short(error, self._buffer):
                raise self._ended()
        self._move(error.pos)
        raise _BrokenArray(self.line, f"invalid JSON: {error.msg}")

    def _move(self, position: int) -> None:
        self.line += self._buffer.count("\n", self._at, position)
        self._at = position

    def _read_on(self) -> bool:
        """Reads the next piece, no shorter than what is held, so that a long element is parsed anew a few times only."""
        if self._problem:
            return False
        raw = self._stream.read(max(self._piece_bytes, len(self._buffer) - self._at))
        try:
            text = self._decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            text = error.object[: error.start].decode("utf-8")
            self._problem = f"not UTF-8: byte 0x{error.object[error.start]:02X}"
        if raw:
            self._buffer, self._at = self._buffer[self._at :] + text, 0
        return bool(raw)

    def _ended(self) -> _BrokenArray:
        if self._problem:
            self._move(len(self._buffer))
        return _BrokenArray(self.line, self._problem or "truncated JSON: the file ends before its array does")


_SPACE = re.compile(r"\s*")


def _read_object(stream: io.BufferedReader, name: str) -> Iterator[Chunk]:
    """A JSON object that holds rows: a list of objects in some field, or a list for each column."""
    chunk = Chunk(name)
    try:
        content = json.loads(stream.read().decode("utf-8-sig"), parse_constant=refuse_constant)
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        chunk.fail(line, f"not UTF-8: byte 0x{error.object[error.start]:02X}")
    except json.JSONDecodeError as error:
        cause = f"invalid JSON at column {error.colno}: {error.msg}"
        chunk.fail(error.lineno, "truncated JSON" if is_cut_short(error, error.doc) else cause)
    except (ValueError, RecursionError) as error:
        chunk.fail(None, json_cause("", error))
    else:
        for number, record in enumerate(_rows_of(content), start=1):
            chunk.add(record, number)
    yield chunk


def _rows_of(content: Any) -> list[Any]:
    if not isinstance(content, dict) or {"messages", "conversations", "input_ids"} & content.keys():
        return [content]
    lists_of_objects = [
        value for value in content.values() if isinstance(value, list) and value and isinstance(value[0], dict)
    ]
    if len(lists_of_objects) == 1:
        return lists_of_objects[0]
    columns = list(content.values())
    if columns and all(isinstance(value, list) and len(value) == len(columns[0]) for value in columns):
        return [dict(zip(content, row, strict=True)) for row in zip(*columns, strict=True)]
    return [content]


def _read_csv(stream: io.BufferedReader, name: str, max_line_bytes: int, *, tabs: bool) -> Iterator[Chunk]:
    """Rows under a header line; numbered by the line a row ends on."""
    chunk = Chunk(name)
    head = stream.peek(HEAD_BYTES).partition(b"\n")[0]
    delimiter = "\t" if tabs else ";" if b";" in head and b"," not in head else ","
    # Bytes that are not UTF-8 pass as lone surrogates, so that the row which holds them can be named.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    previous_limit = csv.field_size_limit(max_line_bytes)
    try:
        rows = csv.reader(_limited(text, max_line_bytes), delimiter=delimiter, strict=True)
        header = next(rows)
        problem = problem_of_record({"header": header})
        if len(set(header)) < len(header) or not all(header):
            problem = f"the header names a column twice or not at all ({', '.join(map(repr, header))})"
        if problem:
            chunk.fail(1, problem)
            yield chunk
            return
        for row in rows:
            if not row:
                continue
            if len(row) != len(header):
                chunk.fail(rows.line_num, f"the row has {len(row)} fields, the header {len(header)}")
            else:
                chunk.add(dict(zip(header, row, strict=True)), rows.line_num)
            if chunk.is_full:
                yield chunk
                chunk = Chunk(name)
    except csv.Error as error:
        chunk.fail(rows.line_num, f"invalid CSV: {error}; what follows cannot be told apart")
    finally:
        csv.field_size_limit(previous_limit)
        text.detach()
    yield chunk


def _limited(text: io.TextIOWrapper, max_line_bytes: int) -> Iterator[str]:
    while line := text.readline(max_line_bytes + 1):
        if len(line) > max_line_bytes:
            raise csv.Error(f"a line is longer than --max-line-bytes {max_line_bytes}")
        yield line


def _read_parquet(path: Path, name: str, file: IO[bytes]) -> Iterator[Chunk]:
    """Rows of a Parquet file, numbered from 1."""
    head = file.read(2**10)
    if problem := _problem_of(head):
        yield Chunk(name).fail(None, problem)
        return
    file.seek(0)
    chunk = Chunk(name)
    line = 0
    total_bytes = path.stat().st_size
    try:
        # In parts rather than whole column chunks, of which one may hold a gigabyte.
        parquet = pq.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
        rows = max(1, parquet.metadata.num_rows)
        for table in parquet.iter_batches(batch_size=RECORDS_A_CHUNK):
            for record in _records_of(table):
                line += 1
                if isinstance(record, UnicodeDecodeError):
                    chunk.fail(line, f"not UTF-8: byte 0x{record.object[record.start]:02X}")
                else:
                    chunk.add(record, line)
            chunk.source_bytes = total_bytes * table.num_rows // rows
            yield chunk
            chunk = Chunk(name)
        if not line:
            chunk.fail(None, "the file holds no rows")
    except (pa.ArrowException, OSError) as error:
        chunk.fail(line + 1 if line else None, f"broken Parquet: {first_line(error)}")
    yield chunk


def _records_of(table: pa.RecordBatch) -> list[Record | UnicodeDecodeError]:
    try:
        return table.to_pylist()
    except UnicodeDecodeError as error:
        if table.num_rows == 1:
            return [error]
        return [record for row in range(table.num_rows) for record in _records_of(table.slice(row, 1))]
