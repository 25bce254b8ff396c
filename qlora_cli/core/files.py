"""Data files in, chunks of rows out, in order: raw lines for others to parse, or records where order matters.

JSON Lines and text are only cut at line ends here; CSV, JSON arrays and Parquet are parsed here.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from qlora_cli.core.records import (
    DECODER,
    BadRow,
    Chunk,
    NotANumber,
    is_cut_short,
    json_cause,
    problem_of_record,
    refuse_constant,
    too_long,
)

CHUNK_BYTES = 2**19
RECORDS_A_CHUNK = 1024
FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "txt",
}
COMPRESSIONS = (".gz", ".zst")


def format_of(path: Path) -> str | None:
    """jsonl, json, csv, tsv, parquet or txt by a file's name, compressed or not; None for anything else."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None


def read_chunks(path: Path, name: str, max_line_bytes: int) -> Iterator[Chunk]:
    """One file, cut into chunks in order.

    Args:
        path: The file.
        name: How messages call it.
        max_line_bytes: Longest line (JSON element, CSV row) accepted.
    """
    kind = format_of(path)
    try:
        with path.open("rb") as file:
            if kind == "parquet":
                yield from _read_parquet(path, name, file)
                return
            stream = _decompress(path, file)
            head = _peek(stream)
            if problem := _problem_of(head):
                yield Chunk(name, bad_rows=[BadRow(name, None, problem)])
                return
            if kind in ("csv", "tsv"):
                chunks = _read_csv(stream, name, max_line_bytes, tabs=kind == "tsv")
            elif kind in ("json", "jsonl") and head.lstrip()[:1] == b"[":
                chunks = _read_array(stream, name, max_line_bytes)
            elif kind == "json" and not _is_whole_json(head):
                chunks = _read_object(stream, name)
            else:
                chunks = _read_lines(stream, name, max_line_bytes, "txt" if kind == "txt" else "jsonl")
            seen = 0
            for chunk in chunks:
                position = file.tell()
                chunk.source_bytes, seen = position - seen, position
                yield chunk
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        yield Chunk(name, bad_rows=[BadRow(name, None, f"the compressed data is broken or cut short ({error})")])
    except OSError as error:
        yield Chunk(name, bad_rows=[BadRow(name, None, f"cannot be read ({error.strerror or error})")])


def _decompress(path: Path, file: IO[bytes]) -> io.BufferedReader:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=file))
    if suffix == ".zst":
        return io.BufferedReader(_ZstdStream(file))
    assert isinstance(file, io.BufferedReader)
    return file


class _ZstdStream(io.RawIOBase):
    """A zstd stream that notices when it was cut short (zstandard's own reader takes that for the end)."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decoder = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj(read_across_frames=True)
        self._ready = b""
        self._fed = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            compressed = self._file.read(2**17)
            if not compressed:
                if self._fed and not self._decoder.eof:
                    raise EOFError("the last frame does not end")
                return 0
            self._fed = True
            self._ready = self._decoder.decompress(compressed)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _peek(stream: io.BufferedReader) -> bytes:
    return stream.peek(2**16)[: 2**16]


def _problem_of(head: bytes) -> str | None:
    """What is wrong with a whole file, seen from its beginning."""
    if not head.strip():
        return "the file is empty"
    if re.match(rb"\s*<(!doctype\s+html|html|head|body)", head.removeprefix(b"\xef\xbb\xbf"), re.IGNORECASE):
        return "this is an HTML page, not data (a download that went wrong?)"
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "not UTF-8: the file is in UTF-16"
    if head.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the data itself"
    return None


def _is_whole_json(head: bytes) -> bool:
    """Whether a file's first line is JSON by itself and another follows, as in JSON Lines under the name .json."""
    first, newline, rest = head.lstrip(b"\xef\xbb\xbf \t\r\n").partition(b"\n")
    if not newline:
        return False
    try:
        json.loads(first)
    except ValueError:
        return False
    return bool(rest.strip())


def _read_lines(stream: io.BufferedReader, name: str, max_line_bytes: int, kind: str) -> Iterator[Chunk]:
    """Whole lines, about CHUNK_BYTES at a time; a line past the limit is left out without being held."""
    line, rest, skipping = 1, b"", False
    while block := stream.read(CHUNK_BYTES):
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
            yield Chunk(name, bad_rows=[too_long(name, line, max_line_bytes)])
            rest, skipping = b"", True
    if rest:
        yield Chunk(name, line, kind, rest)


class _Batch:
    """Collects records into chunks."""

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


def _read_array(stream: io.BufferedReader, name: str, max_line_bytes: int) -> Iterator[Chunk]:
    """The elements of one JSON array, without holding the array."""
    batch = _Batch(name)
    text = _Text(stream)
    space = re.compile(r"[\s,]*")
    buffer = text.more().lstrip("\ufeff")
    start = buffer.index("[")
    line, at = 1 + buffer.count("\n", 0, start), start + 1
    while True:
        end = space.match(buffer, at).end()  # type: ignore[union-attr]
        line, at = line + buffer.count("\n", at, end), end
        if at < len(buffer) and buffer[at] == "]":
            break
        try:
            if at >= len(buffer) or text.problem:
                raise json.JSONDecodeError("end of the text read so far", buffer, len(buffer))
            record, end = DECODER.raw_decode(buffer, at)
        except (ValueError, RecursionError) as error:
            unfinished = isinstance(error, json.JSONDecodeError) and (
                error.msg.startswith("Unterminated string") or error.pos >= len(buffer) - 16
            )
            if unfinished and len(buffer) - at <= max_line_bytes and (more := text.more()):
                buffer, at = buffer[at:] + more, 0
                continue
            if text.problem:
                batch.fail(line + buffer.count("\n", at), text.problem)
            elif unfinished and len(buffer) - at > max_line_bytes:
                batch.fail(line, f"an element of the array is longer than --max-line-bytes {max_line_bytes}")
            elif unfinished:
                batch.fail(line, "truncated JSON: the file ends before its array does")
            elif isinstance(error, json.JSONDecodeError):
                batch.fail(error.lineno + line - 1 - buffer.count("\n", 0, at), f"invalid JSON: {error.msg}")
            else:
                batch.fail(line, json_cause("", error))
            break  # what follows a broken element cannot be told apart
        batch.add(record, line)
        line, at = line + buffer.count("\n", at, end), end
        if batch.is_full:
            yield batch.take()
            buffer, at = buffer[at:], 0
    yield batch.take()


class _Text:
    """Decodes a stream piece by piece; `problem` tells what is not UTF-8 once it is met."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream
        self._rest = b""
        self._size = CHUNK_BYTES
        self.problem: str | None = None

    def more(self) -> str:
        """The next piece, each twice as long as the one before; empty at the end."""
        raw = self._rest + self._stream.read(self._size)
        self._size = min(2 * self._size, 2**24)
        if self.problem:
            return ""
        try:
            self._rest = b""
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            if error.end == len(raw) and error.reason == "unexpected end of data" and len(raw) > 3:
                self._rest = raw[error.start :]
            else:
                self.problem = f"not UTF-8: byte 0x{raw[error.start]:02X}"
            return raw[: error.start].decode("utf-8")


def _read_object(stream: io.BufferedReader, name: str) -> Iterator[Chunk]:
    """A JSON object that holds rows: a list of objects under some key, or a list for each column."""
    batch = _Batch(name)
    try:
        content = json.loads(stream.read().decode("utf-8-sig"), parse_constant=refuse_constant)
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        batch.fail(line, f"not UTF-8: byte 0x{error.object[error.start]:02X}")
    except NotANumber as error:
        batch.fail(None, f"holds {error}, which is no JSON value")
    except json.JSONDecodeError as error:
        cut_short = is_cut_short(error, len(error.doc.rstrip()))
        batch.fail(
            error.lineno, "truncated JSON" if cut_short else f"invalid JSON at column {error.colno}: {error.msg}"
        )
    except RecursionError:
        batch.fail(None, "JSON nested too deeply")
    else:
        for number, record in enumerate(_rows_of(content), start=1):
            batch.add(record, number)
    yield batch.take()


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
    batch = _Batch(name)
    head = _peek(stream).partition(b"\n")[0]
    delimiter = "\t" if tabs else ";" if b";" in head and b"," not in head else ","
    # Bytes that are not UTF-8 pass as lone surrogates, so that the row which holds them can be named.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    previous_limit = csv.field_size_limit(max_line_bytes)
    try:
        rows = csv.reader(_limited(text, max_line_bytes), delimiter=delimiter, strict=True)
        header = next(rows)
        if len(set(header)) < len(header) or not all(header):
            batch.fail(1, f"the header names a column twice or not at all ({', '.join(map(repr, header))})")
            yield batch.take()
            return
        for row in rows:
            if not row:
                continue
            if len(row) != len(header):
                batch.fail(rows.line_num, f"the row has {len(row)} fields, the header {len(header)}")
            else:
                batch.add(dict(zip(header, row, strict=True)), rows.line_num)
            if batch.is_full:
                yield batch.take()
    except csv.Error as error:
        batch.fail(rows.line_num, f"invalid CSV: {error}; what follows cannot be told apart")
    finally:
        csv.field_size_limit(previous_limit)
        text.detach()
    yield batch.take()


def _limited(text: io.TextIOWrapper, max_line_bytes: int) -> Iterator[str]:
    while line := text.readline(max_line_bytes + 1):
        if len(line) > max_line_bytes:
            raise csv.Error(f"a line is longer than --max-line-bytes {max_line_bytes}")
        yield line


def _read_parquet(path: Path, name: str, file: IO[bytes]) -> Iterator[Chunk]:
    """Rows of a Parquet file, numbered from 1."""
    head = file.read(2**10)
    if problem := _problem_of(head):
        yield Chunk(name, bad_rows=[BadRow(name, None, problem)])
        return
    file.seek(0)
    batch = _Batch(name)
    line = 0
    total_bytes = path.stat().st_size
    try:
        parquet = pq.ParquetFile(file)
        rows = max(1, parquet.metadata.num_rows)
        for table in parquet.iter_batches(batch_size=RECORDS_A_CHUNK):
            for record in table.to_pylist():
                line += 1
                batch.add(record, line)
            chunk = batch.take()
            chunk.source_bytes = total_bytes * table.num_rows // rows
            yield chunk
        if not line:
            batch.fail(None, "the file holds no rows")
    except (pa.ArrowException, OSError) as error:
        batch.fail(line + 1 if line else None, f"broken Parquet: {str(error).splitlines()[0]}")
    yield batch.take()
