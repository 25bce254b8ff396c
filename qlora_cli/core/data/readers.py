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

from qlora_cli.core.data.json_files import read_array, read_object
from qlora_cli.core.prompts.records import (
    RECORDS_A_CHUNK,
    BadRow,
    Batch,
    Chunk,
    Record,
    problem_of_record,
    too_long,
)
from qlora_cli.errors import first_line

CHUNK_BYTES = 2**19
HEAD_BYTES = 2**20  # looked at to tell what a file is
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
        with path.open("rb", buffering=HEAD_BYTES) as file:
            if kind == "parquet":
                yield from _read_parquet(path, name, file)
                return
            stream = _decompress(path, file)
            head = stream.peek(HEAD_BYTES).removeprefix(b"\xef\xbb\xbf")
            if problem := _problem_of(head):
                yield Chunk(name, bad_rows=[BadRow(name, None, problem)])
                return
            if kind in ("csv", "tsv"):
                chunks = _read_csv(stream, name, max_line_bytes, tabs=kind == "tsv")
            elif kind in ("json", "jsonl") and head.lstrip()[:1] == b"[":
                chunks = read_array(stream, name, max_line_bytes, CHUNK_BYTES)
            elif kind == "json" and not _is_whole_json(head):
                chunks = read_object(stream, name)
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
        return io.BufferedReader(gzip.GzipFile(fileobj=file), HEAD_BYTES)
    if suffix == ".zst":
        return io.BufferedReader(_ZstdStream(file), HEAD_BYTES)
    assert isinstance(file, io.BufferedReader)
    return file


class _ZstdStream(io.RawIOBase):
    """A zstd stream that notices when it was cut short (zstandard's own reader takes that for the end)."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decoder: Any = None  # of the frame being read
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            compressed = self._file.read(2**10)  # a kilobyte may hold 32 MB of one letter
            if not compressed:
                if self._decoder is not None:
                    raise EOFError("the last frame does not end")
                return 0
            while compressed:
                self._decoder = self._decoder or zstandard.ZstdDecompressor().decompressobj()
                self._ready += self._decoder.decompress(compressed)
                compressed = self._decoder.unused_data
                if self._decoder.eof:
                    self._decoder = None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


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


def _read_csv(stream: io.BufferedReader, name: str, max_line_bytes: int, *, tabs: bool) -> Iterator[Chunk]:
    """Rows under a header line; numbered by the line a row ends on."""
    batch = Batch(name)
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
            batch.fail(1, problem)
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
    batch = Batch(name)
    line = 0
    total_bytes = path.stat().st_size
    try:
        # In pieces rather than whole column chunks, of which one may hold a gigabyte.
        parquet = pq.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
        rows = max(1, parquet.metadata.num_rows)
        for table in parquet.iter_batches(batch_size=RECORDS_A_CHUNK):
            for record in _records_of(table):
                line += 1
                if isinstance(record, UnicodeDecodeError):
                    batch.fail(line, f"not UTF-8: byte 0x{record.object[record.start]:02X}")
                else:
                    batch.add(record, line)
            chunk = batch.take()
            chunk.source_bytes = total_bytes * table.num_rows // rows
            yield chunk
        if not line:
            batch.fail(None, "the file holds no rows")
    except (pa.ArrowException, OSError) as error:
        batch.fail(line + 1 if line else None, f"broken Parquet: {first_line(error)}")
    yield batch.take()


def _records_of(table: pa.RecordBatch) -> list[Record | UnicodeDecodeError]:
    try:
        return table.to_pylist()
    except UnicodeDecodeError as error:
        if table.num_rows == 1:
            return [error]
        return [record for row in range(table.num_rows) for record in _records_of(table.slice(row, 1))]
