"""A .json file in, chunks of records out: an array, streamed, or an object that holds rows."""

import io
import json
import re
from collections.abc import Iterator
from typing import Any

from qlora_cli.core.prompts.records import (
    DECODER,
    Batch,
    Chunk,
    NotANumber,
    is_cut_short,
    json_cause,
    refuse_constant,
)


def read_array(stream: io.BufferedReader, name: str, max_line_bytes: int, chunk_bytes: int) -> Iterator[Chunk]:
    """The elements of one JSON array, without holding the array."""
    batch = Batch(name)
    text = _Text(stream, chunk_bytes)
    buffer = text.more().lstrip("\ufeff")
    at = buffer.index("[") + 1
    line = 1 + buffer.count("\n", 0, at)
    separated = True  # whether a comma, or the opening bracket, has come since the element before
    while True:
        end = _SPACE.match(buffer, at).end()  # type: ignore[union-attr]
        line, at = line + buffer.count("\n", at, end), end
        sign = buffer[at : at + 1]
        if sign == "]" or (sign == "," and not separated):
            separated, at = True, at + 1
            if sign == "]":
                break
            continue
        try:
            if not sign:
                raise json.JSONDecodeError("the text ends", buffer, len(buffer))
            if not separated:
                raise json.JSONDecodeError("Expecting ',' delimiter", buffer, at)
            record, end = DECODER.raw_decode(buffer, at)
        except (ValueError, RecursionError) as error:
            unfinished = isinstance(error, json.JSONDecodeError) and (
                error.msg.startswith("Unterminated string") or error.pos >= len(buffer) - 16
            )
            is_long = len(buffer) - at > max_line_bytes
            if unfinished and not is_long and not text.problem and (more := text.more()):
                buffer, at = buffer[at:] + more, 0
                continue
            if unfinished and text.problem:
                line, cause = line + buffer.count("\n", at), text.problem
            elif unfinished and is_long:
                cause = f"an element of the array is longer than --max-line-bytes {max_line_bytes}"
            elif isinstance(error, json.JSONDecodeError) and not is_cut_short(error, len(buffer.rstrip())):
                line += error.lineno - 1 - buffer.count("\n", 0, at)
                cause = f"invalid JSON: {error.msg}"
            elif isinstance(error, json.JSONDecodeError):
                cause = "truncated JSON: the file ends before its array does"
            else:
                cause = json_cause("", error)
            batch.fail(line, f"{cause}; what follows cannot be told apart")
            break
        batch.add(record, line)
        line, at, separated = line + buffer.count("\n", at, end), end, False
        if batch.is_full:
            yield batch.take()
            buffer, at = buffer[at:], 0
    if sign == "]" and (buffer[at:] + text.more()).strip():
        batch.fail(line, "the file goes on after the end of its array")
    yield batch.take()


_SPACE = re.compile(r"\s*")


class _Text:
    """Decodes a stream piece by piece; `problem` tells what is not UTF-8 once it is met."""

    def __init__(self, stream: io.BufferedReader, chunk_bytes: int) -> None:
        self._stream = stream
        self._rest = b""
        self._size = chunk_bytes
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


def read_object(stream: io.BufferedReader, name: str) -> Iterator[Chunk]:
    """A JSON object that holds rows: a list of objects under some key, or a list for each column."""
    batch = Batch(name)
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
