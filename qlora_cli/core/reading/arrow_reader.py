"""Reader of Arrow tables: Parquet files batch by batch within a limit of memory, and batches as records without padding."""

import json
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from qlora_cli.core.reading.chunks import LETTERS_A_CHUNK, RECORDS_A_CHUNK, Chunk, too_long
from qlora_cli.core.records.record import Record
from qlora_cli.errors import first_line

BATCH_BYTES = 2**24  # of a batch, as far as the sizes that the file states are true
MOST_BYTES = 2**29  # that opening one batch may take: its pages, its columns, and what they are made of


def read_parquet(
    file: IO[bytes], name: str, total_bytes: int, max_row_bytes: int, most_bytes: int = MOST_BYTES
) -> Iterator[Chunk]:
    """Rows of a Parquet file, numbered from 1.

    A page of a few bytes may open up to two gigabytes, and a batch of rows that are one long text stored once to more. So
    a batch is opened within a limit of memory; where that does not do, the rows of its group are opened one by one.

    Args:
        file: The file.
        name: How messages call it.
        total_bytes: Its size.
        max_row_bytes: Longest row accepted.
        most_bytes: Limit of memory for opening one batch.
    """
    line = 0
    try:
        with _limited_memory(most_bytes):
            # In parts rather than whole column chunks, of which one may hold a gigabyte.
            parquet = pq.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
        source_bytes = total_bytes / max(1, parquet.metadata.num_rows)
        for batch in _batches(parquet, most_bytes):
            for chunk in chunks_of(batch, name, line + 1, max_row_bytes):
                rows = len(chunk.records) + len(chunk.bad_rows)
                chunk.source_bytes = int(source_bytes * rows)
                line += rows
                yield chunk
        if not line:
            yield Chunk(name).fail(None, "the file holds no rows")
    except MemoryError:
        limit = f"opening row {line + 1} takes more than {most_bytes // 2**20} MiB of memory"
        yield Chunk(name).fail(line + 1, f"{limit}; write the file with smaller pages and row groups")
    except (pa.ArrowException, OSError) as error:
        yield Chunk(name).fail(line + 1 if line else None, f"broken Parquet: {first_line(error)}")


def chunks_of(table: pa.RecordBatch | pa.Table, name: str, line: int, max_row_bytes: int) -> Iterator[Chunk]:
    """The rows of a batch, which starts with row `line`; a few at a time where they are long, as records take more memory."""
    for part in _parts_of(table, max_row_bytes):
        chunk = Chunk(name)
        if part.num_rows == 1 and part.nbytes > max_row_bytes:
            chunk.fail(line, too_long(max_row_bytes))
        else:
            letters = part.nbytes // part.num_rows
            for number, record in enumerate(records_of(part), start=line):
                if isinstance(record, UnicodeDecodeError):
                    chunk.fail(number, f"not UTF-8: byte 0x{record.object[record.start]:02X}")
                else:
                    chunk.add(record, number, letters)
        line += part.num_rows
        yield chunk


def _parts_of(table: pa.RecordBatch | pa.Table, max_row_bytes: int) -> Iterator[pa.RecordBatch | pa.Table]:
    step = max(1, table.num_rows * LETTERS_A_CHUNK // max(1, table.nbytes))
    for start in range(0, table.num_rows, step):
        part = table.slice(start, step)
        if part.nbytes > min(2 * LETTERS_A_CHUNK, max_row_bytes):  # one may be much longer than the others
            yield from (part.slice(row, 1) for row in range(part.num_rows))
        else:
            yield part


def _batches(parquet: pq.ParquetFile, most_bytes: int) -> Iterator[pa.RecordBatch]:
    """The rows in batches, each opened within the limit.

    Raises:
        MemoryError: One row alone does not open within it.
    """
    for group in range(parquet.num_row_groups):
        facts = parquet.metadata.row_group(group)
        size = min(RECORDS_A_CHUNK, max(1, facts.num_rows * BATCH_BYTES // max(1, facts.total_byte_size)))
        done = 0
        while True:
            try:
                for batch in _batches_of(parquet, group, size, done, most_bytes):
                    yield batch
                    done += batch.num_rows
                break
            except MemoryError:
                if size == 1:
                    raise
                size = 1


def _batches_of(
    parquet: pq.ParquetFile, group: int, size: int, first: int, most_bytes: int
) -> Iterator[pa.RecordBatch]:
    """The rows of one group from `first` on."""
    left_out = first
    batches = parquet.iter_batches(batch_size=size, row_groups=[group], use_threads=False)
    while True:
        with _limited_memory(most_bytes):
            batch = next(batches, None)
            if batch is None:
                return
            if any(
                _plain(field.type) != field.type for field in batch.schema
            ):  # a text stored once, and a number a row
                batch = batch.cast(pa.schema([field.with_type(_plain(field.type)) for field in batch.schema]))
        if left_out < batch.num_rows:
            yield batch.slice(left_out)
        left_out = max(0, left_out - batch.num_rows)


def _plain(type_: pa.DataType) -> pa.DataType:
    """A type with the values themselves where it has dictionaries of them."""
    if pa.types.is_dictionary(type_):
        return _plain(type_.value_type)
    if pa.types.is_struct(type_):
        return pa.struct([field.with_type(_plain(field.type)) for field in type_])
    if pa.types.is_list(type_):
        return pa.list_(type_.value_field.with_type(_plain(type_.value_type)))
    if pa.types.is_large_list(type_):
        return pa.large_list(type_.value_field.with_type(_plain(type_.value_type)))
    return type_


@contextmanager
def _limited_memory(most_bytes: int) -> Iterator[None]:
    """Within it this process may take this much more memory than it has; Linux counts what it may write to.

    Arrow's own pool takes a gigabyte ahead, of which nothing more would be counted; the system's allocator does not.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    found = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = int(found[1]) * 2**10 + most_bytes if found else resource.RLIM_INFINITY
    bounds = [value for value in (soft, hard, limit) if value != resource.RLIM_INFINITY]
    pool = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    resource.setrlimit(resource.RLIMIT_DATA, (min(bounds, default=resource.RLIM_INFINITY), hard))
    try:
        yield
    finally:
        pa.set_memory_pool(pool)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def records_of(table: pa.RecordBatch | pa.Table) -> list[Record | UnicodeDecodeError]:
    """The rows of a batch as records; what is not UTF-8 comes as the error.

    Arrow gives every object of a column every key that any of them has, with null where it had none: such nulls inside
    of columns are left out. Maps become objects, and columns of the type JSON what they hold.
    """
    try:
        records = table.to_pylist(maps_as_pydicts="lossy")
    except UnicodeDecodeError as error:
        if table.num_rows == 1:
            return [error]
        return [record for row in range(table.num_rows) for record in records_of(table.slice(row, 1))]
    for field in table.schema:
        if pa.types.is_nested(field.type) or _is_json(field.type):
            for record in records:
                record[field.name] = _as_meant(record[field.name], field.type)
    return records


def _is_json(type_: pa.DataType) -> bool:
    return getattr(type_, "extension_name", None) == "arrow.json"


def _as_meant(value: Any, type_: pa.DataType) -> Any:
    """A nested value without the keys that are null, and with what its JSON texts hold."""
    if _is_json(type_):
        return json.loads(value) if isinstance(value, str) else value
    if isinstance(value, dict) and pa.types.is_struct(type_):
        return {key: _as_meant(item, type_.field(key).type) for key, item in value.items() if item is not None}
    if isinstance(value, dict) and pa.types.is_map(type_):
        return {key: _as_meant(item, type_.item_type) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_meant(item, type_.value_type) for item in value]
    return value
