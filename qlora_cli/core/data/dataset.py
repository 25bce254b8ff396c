"""Batches of tokenised rows in, a prepared directory out; and back: its rows, mapped from the disk one at a time."""

from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from qlora_cli.artifacts import FORMAT, PREPARED_MANIFEST, PREPARED_ROWS, disk_full, is_prepared, read_json
from qlora_cli.errors import RunError

SCHEMA = pa.schema(
    [
        pa.field("input_ids", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        pa.field("trained", pa.list_(pa.field("item", pa.bool_(), nullable=False)), nullable=False),
    ]
)


class RowWriter:
    """Writes rows in record batches to an Arrow IPC file; holds one batch in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, SCHEMA)

    def write(self, input_ids: np.ndarray, trained: np.ndarray, offsets: np.ndarray) -> None:
        """Appends rows.

        Args:
            input_ids: (tokens,) int32, rows end to end.
            trained: (tokens,) bool.
            offsets: (rows + 1,) int32, where each row starts, and the end.

        Raises:
            DiskFull: The disk has no room.
        """
        if len(offsets) < 2:
            return
        borders = pa.array(offsets, pa.int32())
        columns = [
            pa.ListArray.from_arrays(borders, pa.array(values, kind), type=field.type)
            for field, values, kind in zip(SCHEMA, (input_ids, trained), (pa.int32(), pa.bool_()), strict=True)
        ]
        try:
            self._writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
        except OSError as error:
            raise disk_full(self._path, error) if error.errno == 28 else error from error

    def close(self) -> None:
        """Writes the footer."""
        try:
            self._writer.close()
            self._sink.close()
        except OSError as error:
            raise disk_full(self._path, error) if error.errno == 28 else error from error


class PreparedRows:
    """The rows of a prepared directory, read through a memory map: nothing is held but what is asked for.

    Attributes:
        directory: Where they lie.
        manifest: Content of the manifest: rows, tokens, lengths, formatting, identities of data and tokenizer.
        lengths: (rows,) int32, tokens of each row.
    """

    def __init__(self, directory: Path | str) -> None:
        """Opens a directory.

        Raises:
            RunError: It was not written by `qlora prepare`, or is damaged, or was written by a newer version.
        """
        self.directory = Path(directory)
        if not is_prepared(self.directory):
            raise RunError(
                f"{self.directory} holds no prepared rows.",
                f"Make them with: qlora prepare --model ... --data ... --output {self.directory}",
            )
        self.manifest: dict[str, Any] = read_json(self.directory / PREPARED_MANIFEST)
        if self.manifest.get("format", FORMAT + 1) > FORMAT:
            raise RunError(f"{self.directory} was prepared by a newer qlora.", "Update with: pip install -U qlora-cli")
        path = self.directory / PREPARED_ROWS
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            if reader.schema != SCHEMA:
                raise pa.ArrowInvalid(f"unexpected columns {reader.schema.names}")
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except (OSError, pa.ArrowInvalid) as error:
            raise RunError(f"{path} is damaged: {error}.", "Prepare the data again.") from error
        # Flat, zero-copy views of each batch: (values, bits of `trained`, row borders).
        columns = [(batch.column(0), batch.column(1)) for batch in self._batches]
        self._ids = [ids.values.to_numpy() for ids, _ in columns]
        self._trained = [trained.values for _, trained in columns]
        self._borders = [ids.offsets.to_numpy() for ids, _ in columns]
        lengths = [np.diff(borders) for borders in self._borders]
        self.lengths: np.ndarray = np.concatenate([*lengths, np.empty(0, np.int32)]).astype(np.int32)
        self._first_row = np.cumsum([0, *map(len, lengths)]).tolist()
        if len(self) != self.manifest.get("rows"):
            raise RunError(
                f"{path} holds {len(self)} rows, but its manifest says {self.manifest.get('rows')}.",
                "Prepare the data again.",
            )

    def __len__(self) -> int:
        return self._first_row[-1]

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """One row: input_ids (n,) int32 and trained (n,) bool."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        batch = bisect_right(self._first_row, index) - 1
        start, stop = self._borders[batch][index - self._first_row[batch] :][:2].tolist()
        trained = self._trained[batch][start:stop].to_numpy(zero_copy_only=False)
        return self._ids[batch][start:stop], trained
