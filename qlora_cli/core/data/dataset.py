"""A prepared directory: its rows written as Arrow batches, verified when they are opened, split into trained and held out."""

import hashlib
import json
import shlex
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from qlora_cli.artifacts import FORMAT, PREPARED_MANIFEST, PREPARED_ROWS, describe_place, is_prepared, read_json
from qlora_cli.core.storage.disk_space import reporting_disk_full
from qlora_cli.core.storage.stable_file import StableFile
from qlora_cli.core.storage.temporaries import heal
from qlora_cli.errors import DataError, RunError
from qlora_cli.sizes import format_count

SCHEMA = pa.schema(
    [
        pa.field("input_ids", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        pa.field("trained", pa.list_(pa.field("item", pa.bool_(), nullable=False)), nullable=False),
        pa.field("record", pa.int64(), nullable=False),  # number of the conversation or document it is of
    ]
)
MEMORY_SHARE = 1 / 8  # of the memory that is free: so much may rows take that are trained on
FORMER_SCHEMA = SCHEMA.remove(2)  # every row a record of its own
SKETCHED = 16  # tokens of a row by which rows that may be the same are found; all of them take 40 ns each
SPLIT_STREAM = 0x5E7  # apart from the stream that orders the epochs


class RowWriter:
    """Writes rows in record batches to an Arrow IPC file; holds one batch in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, SCHEMA)

    def write(self, input_ids: np.ndarray, trained: np.ndarray, offsets: np.ndarray, records: np.ndarray) -> None:
        """Appends rows.

        Args:
            input_ids: (tokens,) int32, rows end to end.
            trained: (tokens,) bool.
            offsets: (rows + 1,) int32, where each row starts, and the end.
            records: (rows,) int64, the number of the record that each row comes from.

        Raises:
            DiskFull: The disk has no room.
        """
        if len(offsets) < 2:
            return
        borders = pa.array(offsets, pa.int32())
        columns = [
            pa.ListArray.from_arrays(borders, pa.array(values, kind), type=field.type)
            for field, values, kind in zip(SCHEMA, (input_ids, trained), (pa.int32(), pa.bool_()), strict=False)
        ]
        columns.append(pa.array(records, pa.int64()))
        with reporting_disk_full(self._path):
            self._writer.write_batch(pa.record_batch(columns, schema=SCHEMA))

    def close(self) -> None:
        """Writes the footer."""
        with reporting_disk_full(self._path):
            self._writer.close()
            self._sink.close()


def manifest_sha256(manifest: dict[str, Any]) -> str:
    """Digest of a manifest, which it holds itself beside the rest; those of older versions hold none."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _Batch:
    """Where the columns of one record batch lie in the file, in bytes from its start; buffers of their own each."""

    rows: int
    tokens: int
    borders: int  # (rows + 1,) int32
    ids: int  # (tokens,) int32
    trained: int  # (tokens,) bits
    records: int | None  # (rows,) int64


def _find_batches(content: memoryview) -> list[_Batch]:
    """The batches of an Arrow file.

    Raises:
        ValueError: It is no file of rows (pyarrow's ArrowInvalid is one).
    """
    whole = pa.py_buffer(content)
    reader = pa.ipc.open_file(whole)
    if reader.schema not in (SCHEMA, FORMER_SCHEMA):
        raise ValueError(f"unexpected columns {reader.schema.names}")

    def position(buffer: pa.Buffer | None, size_bytes: int) -> int:
        start = buffer.address - whole.address if buffer is not None and size_bytes else 0
        if not 0 <= start <= whole.size - size_bytes or (buffer is not None and buffer.size < size_bytes):
            raise ValueError("a column lies outside of it")
        return start

    batches = []
    for number in range(reader.num_record_batches):
        batch = reader.get_batch(number)
        ids, trained = batch.column(0), batch.column(1)
        rows, tokens = batch.num_rows, len(ids.values)
        if len(trained.values) != tokens:
            raise ValueError("its columns have different lengths")
        records = batch.column(2).buffers()[1] if batch.num_columns > 2 else None
        batches.append(
            _Batch(
                rows,
                tokens,
                position(ids.buffers()[1], (rows + 1) * 4 if rows else 0),
                position(ids.values.buffers()[1], tokens * 4),
                position(trained.values.buffers()[1], (tokens + 7) // 8),
                None if records is None else position(records, rows * 8),
            )
        )
    return batches


class PreparedRows:
    """The rows of a prepared directory, compared with the digest of what was written before any is used.

    Rows that take less than a share of the memory that is free are held there, so that nothing done to the file changes
    them any more; of others nothing is held but what is asked for, and a file that changes is an error from then on.

    Attributes:
        directory: Where they are.
        manifest: Content of the manifest: rows, tokens, lengths, formatting, identities of data and tokenizer.
        lengths: (rows,) int32, tokens of each row.
        records: (rows,) int64, the number of the conversation or document that each row is of.
    """

    def __init__(self, directory: Path | str, memory_share: float = 0.0) -> None:
        """Opens a directory; `memory_share` of the memory that is free may its rows take.

        Raises:
            RunError: It was not written by `qlora prepare`, or is damaged, or was written by a newer version.
        """
        self.directory = Path(directory)
        heal(self.directory)
        if not is_prepared(self.directory):
            place = shlex.quote(str(self.directory))
            end = f"--data {place}" if self.directory.is_file() else f"--data ... --output {place}"
            found, way = describe_place(self.directory) or ("", f"Make them with: qlora prepare --model ... {end}")
            raise RunError(f"{self.directory} holds no prepared rows{found and ': '}{found}.", way)
        self.manifest: dict[str, Any] = read_json(self.directory / PREPARED_MANIFEST)
        if self.manifest.get("format", FORMAT + 1) > FORMAT:
            raise RunError(f"{self.directory} was prepared by a newer qlora.", "Update with: pip install -U qlora-cli")
        path = self.directory / PREPARED_ROWS
        try:
            self._file = StableFile(path, psutil.virtual_memory().available * memory_share)
            self._batches = _find_batches(self._file.view())
        except (OSError, ValueError) as error:  # of Arrow too
            raise RunError(f"{path} is damaged: {error}.", "Prepare the data again.") from error
        self._borders = [self._read(batch.borders, 0, batch.rows + 1, np.int32) for batch in self._batches]
        lengths = [np.diff(values) for values in self._borders]
        self.lengths: np.ndarray = np.concatenate([*lengths, np.empty(0, np.int32)]).astype(np.int32)
        records = [self._read(b.records, 0, b.rows, np.int64) for b in self._batches if b.records is not None]
        self.records = np.concatenate([*records, np.empty(0, np.int64)]) if records else np.arange(self.lengths.size)
        self._first_row = np.cumsum([0, *map(len, lengths)]).tolist()
        if len(self) != self.manifest.get("rows"):
            raise RunError(
                f"{path} holds {len(self)} rows, but its manifest says {self.manifest.get('rows')}.",
                "Prepare the data again.",
            )
        wanted, of_records = self.manifest.get("rows_sha256"), self.manifest.get("records_sha256")
        if (
            self.manifest.pop("sha256", None) not in (None, manifest_sha256(self.manifest))
            or (isinstance(wanted, str) and wanted != self._sha256())
            or (isinstance(of_records, str) and of_records != hashlib.sha256(self.records.tobytes()).hexdigest())
        ):
            raise RunError(
                f"{self.directory} is damaged: it holds other rows than were written there.", "Prepare the data again."
            )

    def _sha256(self) -> str:
        """Digest of the rows as `PreparationStatistics` forms it while they are written, by three threads."""

        def digest(parts: Iterable[np.ndarray]) -> bytes:
            hashed = hashlib.sha256()
            for part in parts:
                hashed.update(np.ascontiguousarray(part).view(np.uint8).data)
            return hashed.digest()

        ids = (self._read(batch.ids, 0, batch.tokens, np.int32) for batch in self._batches)
        trained = (self._read_bits(batch.trained, 0, batch.tokens) for batch in self._batches)
        with ThreadPoolExecutor(3) as pool:
            return hashlib.sha256(b"".join(pool.map(digest, (ids, trained, [self.lengths])))).hexdigest()

    def _read(self, start: int, first: int, count: int, dtype: type) -> np.ndarray:
        """(count,) numbers of a column that begins at `start`, from its `first` on."""
        size = np.dtype(dtype).itemsize
        return np.frombuffer(self._file.read(start + first * size, count * size), dtype=dtype)

    def _read_bits(self, start: int, first: int, count: int) -> np.ndarray:
        """(count,) bool of a column of bits."""
        skipped = first % 8
        content = self._file.read(start + first // 8, (skipped + count + 7) // 8)
        bits = np.unpackbits(np.frombuffer(content, np.uint8), bitorder="little")
        return bits[skipped : skipped + count].view(bool)

    def __len__(self) -> int:
        return self._first_row[-1]

    def largest_id(self) -> int:
        """The largest token id in any row; -1 where there is no token."""
        filled = (batch for batch in self._batches if batch.tokens)
        return max((int(self._read(batch.ids, 0, batch.tokens, np.int32).max()) for batch in filled), default=-1)

    def sketches(self) -> np.ndarray:
        """(rows,) uint64, the same for rows of the same tokens, and rarely for others: of the length and of tokens at
        `SKETCHED` places, each times a random number."""
        weights = np.random.default_rng(0).integers(1, 2**64, SKETCHED + 1, dtype=np.uint64)
        found = [np.empty(0, np.uint64)]
        for batch, borders in zip(self._batches, self._borders, strict=True):
            ids = np.append(self._read(batch.ids, 0, batch.tokens, np.int32), np.int32(0))  # of a row without tokens
            lengths = np.diff(borders).astype(np.int64)
            places = borders[:-1, None] + lengths[:, None] * np.arange(SKETCHED) // SKETCHED  # (rows, SKETCHED)
            values = np.column_stack([lengths, ids[places]]).astype(np.uint64)
            found.append((values * weights).sum(axis=1, dtype=np.uint64))
        return np.concatenate(found)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """One row: input_ids (n,) int32 and trained (n,) bool."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._first_row, index) - 1
        batch = self._batches[number]
        start, stop = self._borders[number][index - self._first_row[number] :][:2].tolist()
        ids = self._read(batch.ids, start, stop - start, np.int32)
        return ids, self._read_bits(batch.trained, start, stop - start)


class RowSubset:
    """Some rows of a set, numbered from 0; `indices` are their numbers in the set."""

    def __init__(self, rows: PreparedRows, indices: Sequence[int] | np.ndarray) -> None:
        self.rows = rows
        self.indices = np.asarray(indices, dtype=np.int64)
        self.lengths = rows.lengths[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.rows[int(self.indices[index])]


def split_rows(rows: PreparedRows, *, fraction: float, count: int | None, seed: int) -> tuple[RowSubset, RowSubset]:
    """Splits rows into those trained on and those evaluated on, each in the set's order.

    Rows of one conversation or document stay together: what was unfolded into a row for each answer, or cut at
    --max-length, would else be evaluated on what was trained. So a few rows more may be held out than asked for.

    Args:
        rows: All rows.
        fraction: Share held out, from 0 to below 1, rounded to whole rows, at least one where it is above 0.
        count: Number held out, instead of a share.
        seed: Chooses which.

    Raises:
        DataError: Nothing would be left to train on.
    """
    wanted = count if count is not None else max(1, round(fraction * len(rows))) if fraction else 0
    _, group_of_row, group_sizes = np.unique(rows.records, return_inverse=True, return_counts=True)
    order = np.random.default_rng([seed, SPLIT_STREAM]).permutation(len(group_sizes))
    # As many whole groups as it takes; with a row each, these are the first rows of the order.
    held_groups = int(np.searchsorted(np.cumsum(group_sizes[order]), wanted)) + 1 if wanted else 0
    if held_groups >= len(group_sizes):
        several = "" if len(group_sizes) == len(rows) else f" (of {format_count(len(group_sizes), 'document')})"
        raise DataError(
            f"Holding out {wanted} of {len(rows)} rows{several} leaves nothing to train on.",
            "Lower --eval-rows or --eval-fraction, or use more rows.",
        )
    is_held = np.isin(group_of_row, order[:held_groups])
    return RowSubset(rows, np.flatnonzero(~is_held)), RowSubset(rows, np.flatnonzero(is_held))


def count_shared(train_rows: RowSubset, eval_rows: RowSubset) -> int:
    """Rows held out that stand, token by token, among those trained on as well.

    Each row that may be is read once: long prompts that differ in one number have the same sketch by the thousand.
    """
    rows, sketches = eval_rows.rows, eval_rows.rows.sketches()

    def contents(one: RowSubset, other: RowSubset) -> Iterator[bytes]:
        alike = np.isin(sketches[one.indices], sketches[other.indices])
        return (hashlib.sha256(rows[index][0].tobytes()).digest() for index in one.indices[alike].tolist())

    held = Counter(contents(eval_rows, train_rows))
    return sum(held[content] for content in held.keys() & set(contents(train_rows, eval_rows)))
