"""Readers of data files: JSON Lines, JSON, CSV, TSV, Parquet and text, compressed or not, as chunks of rows in order.

JSON Lines and text are only cut at line ends here; CSV, JSON and Parquet are parsed here, where order matters. No
file is held as a whole but a JSON object that holds its rows in some field.
"""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_cli.core.reading.arrow_reader import read_parquet
from qlora_cli.core.reading.chunks import Chunk, too_long
from qlora_cli.core.reading.compressed import DECOMPRESS, ERRORS, problem_of_name
from qlora_cli.core.reading.csv_reader import read_csv
from qlora_cli.core.reading.json_reader import read_array, read_object
from qlora_cli.core.records.messages import holds_messages
from qlora_cli.errors import first_line

CHUNK_BYTES = 2**19
HEAD_BYTES = 2**20  # looked at to see what a file is
OBJECT_LINES = 4  # times --max-line-bytes: the longest JSON object, which is held at once
KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "txt",
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
            if problem := problem_of_name(path, file.peek(1)):
                yield Chunk(name).fail(None, problem)
                return
            if kind == "parquet":
                if problem := _problem_of(file.peek(1)):
                    yield Chunk(name).fail(None, problem)
                    return
                yield from read_parquet(file, name, path.stat().st_size, max_line_bytes)
                return
            stream: Any = file
            if decompress := DECOMPRESS.get(path.suffix.lower()):
                stream = io.BufferedReader(decompress(file), HEAD_BYTES)
            head = stream.peek(HEAD_BYTES).removeprefix(b"\xef\xbb\xbf")
            if problem := _problem_of(head):
                yield Chunk(name).fail(None, problem)
                return
            if kind in ("csv", "tsv"):
                chunks = read_csv(stream, name, max_line_bytes, tabs=kind == "tsv")
            elif kind in ("json", "jsonl") and head.lstrip()[:1] == b"[" and not _begins_with_messages(head):
                chunks = read_array(stream, name, max_line_bytes, chunk_bytes)
            elif kind == "json" and not _is_whole_json(head):  # a first line that is whole: JSON Lines by another name
                chunks = read_object(stream, name, OBJECT_LINES * max_line_bytes)
            else:
                chunks = _read_lines(stream, name, max_line_bytes, chunk_bytes, "txt" if kind == "txt" else "jsonl")
            seen = 0
            for chunk in chunks:
                position = file.tell()
                chunk.source_bytes, seen = position - seen, position
                yield chunk
    except ERRORS as error:
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
        return "not UTF-8: the file is in UTF-16 (iconv -f UTF-16 -t UTF-8 converts it)"
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
