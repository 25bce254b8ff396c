"""Reader of Arrow tables: Parquet files page by page, and batches as records without what Arrow pads them with."""

import json
from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from qlora_cli.core.data.chunks import RECORDS_A_CHUNK, Chunk
from qlora_cli.core.records.record import Record
from qlora_cli.errors import first_line


def read_parquet(file: IO[bytes], name: str, total_bytes: int, max_page_bytes: int) -> Iterator[Chunk]:
    """Rows of a Parquet file, numbered from 1."""
    chunk = Chunk(name)
    line = 0
    try:
        # In parts rather than whole column chunks, of which one may hold a gigabyte.
        parquet = pq.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
        rows = max(1, parquet.metadata.num_rows)
        for table in parquet.iter_batches(batch_size=RECORDS_A_CHUNK):
            for record in records_of(table):
                line += 1
                if isinstance(record, UnicodeDecodeError):
                    chunk.fail(line, f"not UTF-8: byte 0x{record.object[record.start]:02X}")
                else:
                    chunk.add(record, line)
            chunk.source_bytes = total_bytes * table.num_rows // rows
            yield chunk
            chunk = Chunk(name)
        if not line:
            chunk.fail(None, "the file holds no rows")
    except (pa.ArrowException, OSError) as error:
        chunk.fail(line + 1 if line else None, f"broken Parquet: {first_line(error)}")
    yield chunk


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
