"""Reader of CSV and TSV files: rows under a header line, each bounded before it is held as a whole."""

import csv
import io
import re
from collections.abc import Iterator

from qlora_cli.core.reading.chunks import Chunk
from qlora_cli.core.records.record import problem_of_record

UNNAMED = ""  # the column without a name in which pandas writes its index
NAMES_SHOWN = 20
BYTE_ORDER_MARK = "\ufeff"
EXCELS = re.compile(rb"(?:\xef\xbb\xbf)?sep=([,;|\t])\s*")  # what may stand before the header, for Excel
AS_LETTERS = """Where quotes are letters, this writes them so: python -c 'import csv; csv.writer(open("clean.tsv","w",newline=""),\
delimiter="\\t").writerows(csv.reader(open("DATA.tsv",newline=""),delimiter="\\t",quoting=csv.QUOTE_NONE))'"""
MOST_COLUMNS = 2**14  # each row is held as an object with all of their names


def read_csv(stream: io.BufferedReader, name: str, max_line_bytes: int, *, tabs: bool) -> Iterator[Chunk]:
    """Rows of a file, numbered by the line that each ends on.

    Args:
        stream: The file.
        name: How messages call it.
        max_line_bytes: Longest row accepted.
        tabs: Whether it is separated by tabs; else by commas, or by what its first line has or says ("sep=;").
    """
    chunk = Chunk(name)
    head = next(filter(bytes.strip, stream.peek(1).splitlines()), b"")  # blank lines may stand before the header
    stated = EXCELS.fullmatch(head)
    delimiter = "\t" if tabs else next((sign for sign in ",;\t|" if sign.encode() in head), ",")
    delimiter = stated[1].decode() if stated else delimiter
    way = AS_LETTERS if delimiter == "\t" else ""
    # Bytes that are not UTF-8 pass as lone surrogates, so that the row which holds them can be named.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    previous_limit = csv.field_size_limit(max_line_bytes)
    lines = _RowLines(text, max_line_bytes)
    try:
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        if stated:
            next(filter(None, rows))
        header = next(filter(None, rows), [])
        if problem := _problem_of_header(header):
            chunk.fail(rows.line_num, problem)
            yield chunk
            return
        lines.take()
        for row in rows:
            letters = lines.take()
            if not row:
                continue
            row[0] = row[0].removeprefix(BYTE_ORDER_MARK)
            if row == header and len(header) > 1:
                chunk.fail(rows.line_num, "the row repeats the header, as where files were joined")
            elif delimiter == "\t" and _holds_rows(row, len(header)):
                chunk.fail(rows.line_num, "a field begins with a quote and holds whole rows up to the next one", way)
            elif len(row) != len(header):
                chunk.fail(rows.line_num, f"the row has {len(row)} fields, the header {len(header)}")
            else:
                chunk.add(dict(zip(header, row, strict=True)), rows.line_num, letters)
            if chunk.is_full:
                yield chunk
                chunk = Chunk(name)
    except csv.Error as error:
        chunk.fail(rows.line_num, f"invalid CSV: {error}; what follows cannot be told apart", way)
    finally:
        csv.field_size_limit(previous_limit)
        if not stream.closed:
            text.detach()
    yield chunk


def _holds_rows(row: list[str], width: int) -> bool:
    """Whether a field has as many tabs in each of its lines as if the quotes around it were letters."""
    for index, lines in enumerate(field.split("\n") for field in row[:-1]):
        tabs = [line.count("\t") for line in lines]
        if len(lines) > 1 and tabs == [width - 1 - index, *[width - 1] * (len(lines) - 2), index]:
            return True
    return False


def _problem_of_header(header: list[str]) -> str | None:
    """What is wrong with the names of the columns; the first one, and only that, may be empty."""
    named = header[1:] if len(header) > 1 and header[0] == UNNAMED else header
    if len(header) > MOST_COLUMNS:
        return f"the header names {len(header):,} columns, more than {MOST_COLUMNS:,}"
    if problem := problem_of_record({"header": header}):
        return problem
    if len(set(header)) == len(header) and all(named):
        return None
    shown = ", ".join(map(repr, header[:NAMES_SHOWN])) + ", ..." * (len(header) > NAMES_SHOWN)
    return f"the header names a column twice or not at all ({shown})"


class _RowLines:
    """The lines of a CSV file, of which those of one row may not be longer than a limit; quotes may hold line ends."""

    def __init__(self, text: io.TextIOWrapper, limit: int) -> None:
        self._text, self._limit, self._letters = text, limit, 0

    def take(self) -> int:
        """Letters since the call before: those of the row that was just read."""
        letters, self._letters = self._letters, 0
        return letters

    def __iter__(self) -> "_RowLines":
        return self

    def __next__(self) -> str:
        line = self._text.readline(self._limit + 1)
        if not line:
            raise StopIteration
        self._letters += len(line)
        if self._letters > self._limit:
            raise csv.Error(f"a row is longer than --max-line-bytes {self._limit}")
        return line
