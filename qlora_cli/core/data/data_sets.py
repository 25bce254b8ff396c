"""Data sets: what --data names, once or several times, and the share of each that is taken."""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

from qlora_cli.core.reading.chunks import Chunk, count_rows, parse_chunk
from qlora_cli.errors import DataError, UsageError
from qlora_cli.settings.groups import DataSettings
from qlora_cli.sizes import format_count

SHARES = "Give a share above 0 and up to 1."


@dataclass(frozen=True)
class DataSet:
    """One --data: what it names, and the share of its rows that is taken, above 0 and up to 1."""

    name: str
    share: float = 1.0

    def take(self, chunks: Iterable[Chunk], max_line_bytes: int) -> Iterator[Chunk]:
        """The share of the rows, evenly from the beginning to the end: of 0.3 the 4th, 7th, 10th of each ten.

        Raises:
            DataError: It is none of them.
        """
        if self.share == 1:
            yield from chunks
            return
        first = 0
        for chunk in chunks:
            numbers = range(first, first + count_rows(chunk, max_line_bytes))
            is_taken = [int((number + 1) * self.share) > int(number * self.share) for number in numbers]
            first += len(numbers)
            if all(is_taken):
                yield chunk
                continue
            parse_chunk(chunk, max_line_bytes)
            chunk.records = list(compress(chunk.records, is_taken))
            chunk.lines = list(compress(chunk.lines, is_taken))
            yield chunk
        if first and not int(first * self.share):
            least = math.ceil(10**6 / first) / 10**6
            rows = format_count(first, "row")
            raise DataError(f"--data {self.name}:{self.share:g} takes none of {rows}.", f"Take {least:g} or more.")


def read_data_sets(data: str | Sequence[str] | None) -> list[DataSet]:
    """What --data says, once or several times: names, each with `:0.3` behind it if only a part is taken.

    Raises:
        UsageError: There is none, a share is not above 0 and up to 1, or a name comes twice.
    """
    given = [data] if isinstance(data, str) else list(data or ())
    if not given:
        raise UsageError("No data was given.", "Add: --data FILE (or a folder, a glob, or a hub dataset).")
    sets = [_read_data_set(text) for text in given]
    names = [data_set.name for data_set in sets]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"--data {twice} is given twice.", "Give each data set once; --epochs repeats all of them.")
    return sets


def read_paths(settings: DataSettings) -> list[Path]:
    """Local files and folders that settings name for reading; of a pattern, the folder before its first wildcard."""
    data = [data_set.name for data_set in read_data_sets(settings.data)] if settings.data else []
    names = (*data, settings.template, settings.chat_template)
    return [Path(re.split(r"[^/]*[*?\[]", name)[0] or ".").expanduser() for name in names if name]


def _read_data_set(text: str) -> DataSet:
    name, colon, share = text.rpartition(":")
    if not colon or not re.fullmatch(r"[0-9]*\.?[0-9]+", share) or Path(text).expanduser().exists():
        if colon and Path(name).expanduser().is_file() and not Path(text).expanduser().exists():
            raise UsageError(f"--data {text}: {name} is a file, and {share!r} is no share of its rows.", SHARES)
        return DataSet(text)
    if not 0 < float(share) <= 1:
        raise UsageError(f"--data {text} takes the share {share} of the rows.", SHARES)
    return DataSet(name, float(share))


def join_identities(sets: Sequence[DataSet], identities: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One identity for several data sets, or for a share of one; that of a whole one is its own."""
    if len(sets) == 1 and sets[0].share == 1:
        return identities[0]
    facts = [(data_set.share, identity["sha256"]) for data_set, identity in zip(sets, identities, strict=True)]
    return {
        "source": " + ".join(f"{s.name}:{s.share:g}" if s.share != 1 else s.name for s in sets),
        "files": [file for identity in identities for file in identity["files"]],
        "sources": list(identities),
        "sha256": hashlib.sha256(repr(facts).encode()).hexdigest(),
    }
