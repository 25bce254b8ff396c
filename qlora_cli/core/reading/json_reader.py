"""Readers of JSON files that are one value: an array piece by piece, an object as a row or as a table of rows."""

import codecs
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from qlora_cli.core.reading.chunks import LONG_BYTES, Chunk, RowDecoder, is_cut_short, json_cause
from qlora_cli.core.records.messages import ROLE_KEYS, holds_messages

# What the splits of a data set are called, in names of files, folders and keys.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# Fields of an object that say something of the rows beside them, and are no row's text.
ABOUT_THE_SET = {"version", "name", "title", "description", "license", "source", "split", "date", "author", "language"}


# In an object that is held as a whole: [] is 2 letters in the file and 56 bytes in memory.
MOST_CONTAINERS = 2**21


def read_array(stream: io.BufferedReader, name: str, max_line_bytes: int, chunk_bytes: int) -> Iterator[Chunk]:
    """The elements of one JSON array, without holding the array; numbered by the line an element starts on."""
    chunk = Chunk(name)
    text = _ArrayText(stream, max_line_bytes, chunk_bytes)
    try:
        for element, line, letters in text.elements():
            if isinstance(element, LongElement):
                yield chunk
                yield Chunk(name, line, "element", element.text.encode())
                chunk = Chunk(name)
                continue
            chunk.add(element, line, letters)
            if text.json.doubled:
                chunk.doubled += text.json.take_doubled()
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


@dataclass(frozen=True)
class LongElement:
    """An element of an array that is not parsed where it is read."""

    text: str


class _BrokenArray(Exception):
    """What ends the reading of an array, and the line it is on."""

    def __init__(self, line: int, cause: str) -> None:
        super().__init__(cause)
        self.line = line


class _ArrayText:
    """The text of a JSON array, decoded piece by piece.

    Attributes:
        line: Where it has been read up to, from 1.
        json: What decodes elements.
    """

    def __init__(self, stream: io.BufferedReader, max_line_bytes: int, piece_bytes: int) -> None:
        self.line = 1
        self.json = RowDecoder()
        self._stream, self._max_line_bytes, self._piece_bytes = stream, max_line_bytes, piece_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._buffer, self._at = "", 0
        self._problem: str | None = None  # what is not UTF-8, once it is met

    def elements(self) -> Iterator[tuple[Any, int, int]]:
        """Every element with the line it starts on, and of how many letters it is; a long one unparsed.

        Raises:
            _BrokenArray: It is no array, or is cut short.
        """
        self.next_sign()
        self._at += 1  # the opening bracket
        is_separated = True  # whether a comma, or the bracket, has come since the element before
        while (sign := self.next_sign()) != "]":
            if is_separated:
                line = self.line
                element, letters = self._next_element()
                yield element, line, letters
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

    def _next_element(self) -> tuple[Any, int]:
        while True:
            is_long = len(self._buffer) - self._at > max(LONG_BYTES, 2 * self._piece_bytes)
            if is_long and self._buffer[self._at] in "[{":
                return self._long_element()
            try:
                element, end = self.json.raw_decode(self._buffer, self._at)
            except (ValueError, RecursionError) as error:
                self.json.doubled.clear()  # what was read of it is read again
                self._repair(error)
            else:
                letters = end - self._at
                self._move(end)
                return element, letters

    def _long_element(self) -> tuple[LongElement, int]:
        """The text of an element up to where its brackets and quotes close; nothing is built of what it holds."""
        place, depth = self._at, 0
        while True:
            match = _SKIPPED.match(self._buffer, place)
            assert match is not None
            place = match.end()
            sign = self._buffer[place : place + 1]
            if sign in ("[", "{"):
                depth += 1
            elif sign in ("]", "}"):
                depth -= 1
            elif not sign or sign == '"':  # it ends here, or in a text
                self._check_length()
                place -= self._at
                if not self._read_on():
                    raise self._ended()
                continue
            place += 1
            if depth <= 0:
                element = LongElement(self._buffer[self._at : place])
                self._move(place)
                return element, len(element.text)

    def _repair(self, error: Exception) -> None:
        """Reads on if an element has not come to its end; raises _BrokenArray if that is not what is wrong."""
        if not isinstance(error, json.JSONDecodeError):
            raise _BrokenArray(self.line, json_cause("", error))
        # An escape, a name such as true, or a number may be cut in two by the end of what was read.
        if error.msg.startswith("Unterminated string") or error.pos >= len(self._buffer) - 16:
            self._check_length()
            if self._read_on():
                return
            if self._problem or is_cut_short(error, self._buffer):
                raise self._ended()
        self._move(error.pos)
        raise _BrokenArray(self.line, f"invalid JSON: {error.msg}")

    def _check_length(self) -> None:
        if len(self._buffer) - self._at > self._max_line_bytes:
            cause = f"an element of the array is longer than --max-line-bytes {self._max_line_bytes}"
            raise _BrokenArray(self.line, cause)

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
_SKIPPED = re.compile(
    r'(?:[^"\[\]{}]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+', re.DOTALL
)  # up to a bracket, or a text that goes on


def read_object(stream: io.BufferedReader, name: str, max_bytes: int) -> Iterator[Chunk]:
    """A JSON object that is a row, or holds rows: see `rows_of`. It is held as a whole, so it is bounded."""
    chunk, decoder = Chunk(name), RowDecoder()
    try:
        raw = stream.read(max_bytes + 1)
        if len(raw) > max_bytes:
            yield chunk.fail(None, f"holds one JSON object of more than {max_bytes} bytes (4 times --max-line-bytes)")
            return
        if raw.count(b"[") + raw.count(b"{") > MOST_CONTAINERS:
            yield chunk.fail(None, f"holds one JSON object of more than {MOST_CONTAINERS} lists and objects")
            return
        content = decoder.decode(raw.decode("utf-8-sig"))
        chunk.doubled = decoder.take_doubled()
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        chunk.fail(line, f"not UTF-8: byte 0x{error.object[error.start]:02X}")
    except json.JSONDecodeError as error:
        cause = f"invalid JSON at column {error.colno}: {error.msg}"
        chunk.fail(error.lineno, "truncated JSON" if is_cut_short(error, error.doc) else cause)
    except (ValueError, RecursionError) as error:
        chunk.fail(None, json_cause("", error))
    else:
        if splits := _splits_of(content):
            names = " and ".join(map(repr, splits))
            yield chunk.fail(None, f"holds one JSON object with the lists {names}; write each to a file of its own")
            return
        rows = rows_of(content)
        letters = len(raw) // max(1, len(rows))
        for number, record in enumerate(rows, start=1):
            chunk.add(record, number, letters)
            if chunk.is_full:
                yield chunk
                chunk = Chunk(name)
    yield chunk


def rows_of(content: Any) -> list[Any]:
    """The rows that one JSON object holds.

    It is a row itself if it holds text or a conversation. Otherwise its rows are a list of objects in one of its fields
    (with SQuAD's paragraphs and questions unfolded), or it is a table as pandas writes it: a list for each column
    ("list"), columns, index and data ("split", the default of none), an object for each column by index ("columns",
    pandas' default), or an object for each row ("index").
    """
    if not isinstance(content, dict) or not content:
        return [content]
    if {"columns", "data"} <= content.keys() and _is_split(content):
        return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]
    if any(key in content for key in ROLE_KEYS) or any(map(holds_messages, content.values())) or "input_ids" in content:
        return [content]
    values = list(content.values())
    lists = [v for v in values if isinstance(v, list) and v and all(isinstance(item, dict) for item in v)]
    texts = [key for key, v in content.items() if isinstance(v, str) and key.lower() not in ABOUT_THE_SET]
    if len(lists) == 1 and not texts:
        return [row for item in lists[0] for row in _unfold(item)]
    if all(isinstance(v, list) and len(v) == len(values[0]) for v in values) and values[0]:
        return [dict(zip(content, row, strict=True)) for row in zip(*values, strict=True)]
    if all(isinstance(v, dict) and v for v in values) and len({tuple(v) for v in values}) == 1:
        keys = list(values[0])
        if _are_index(content) and not _are_index(keys):
            return values  # a row for each index
        if _are_index(keys):
            return [{name: column[key] for name, column in content.items()} for key in keys]
    return [content]


def _splits_of(content: Any) -> list[str]:
    """Names of a data set's splits, where one object holds several; which of them is meant is not for a reader to tell."""
    known = {name for names in SPLITS.values() for name in names}
    if not isinstance(content, dict) or len(content) < 2 or not known.issuperset(key.lower() for key in content):
        return []
    return list(content) if all(isinstance(rows, list) for rows in content.values()) else []


def _is_split(content: dict[str, Any]) -> bool:
    """Whether this is a table as pandas' orient "split" writes it."""
    names, rows = content["columns"], content["data"]
    return (
        isinstance(names, list)
        and isinstance(rows, list)
        and all(isinstance(name, str) for name in names)
        and all(isinstance(row, list) and len(row) == len(names) for row in rows)
    )


def _are_index(keys: Iterable[str]) -> bool:
    """Whether names count rows: 0, 1, 2."""
    return all(key.lstrip("-").isdigit() for key in keys)


def _unfold(item: dict[str, Any]) -> list[dict[str, Any]]:
    """One row, or those of SQuAD's form: a question a row, with the paragraph it is about."""
    paragraphs = item.get("paragraphs")
    if not isinstance(paragraphs, list) or not all(
        isinstance(p, dict) and isinstance(p.get("qas"), list) for p in paragraphs
    ):
        return [item]
    about = {key: value for key, value in item.items() if key != "paragraphs"}
    return [
        {**about, **{key: value for key, value in paragraph.items() if key != "qas"}, **question}
        for paragraph in paragraphs
        for question in paragraph["qas"]
        if isinstance(question, dict)
    ]
