"""Safetensors files in, single tensors and blocks of rows out; and whole files laid out ahead of their contents.

Bytes are read with `preadv` into fresh buffers and never mapped: mapped pages count as resident, and the memory of a
merge is bounded. Format: https://huggingface.co/docs/safetensors (8 bytes of header length, JSON header, data).
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

import torch

from qlora_cli.errors import ModelError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
HEADER_LIMIT_BYTES = 100 * 2**20  # safetensors refuses longer ones
AHEAD_BYTES = 64 * 2**20  # the disk reads on while what came is worked on; of itself the system asks for 128 KiB
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: where its bytes lie, counted from the start of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def total_bytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """A safetensors file open for reading; safe to read from several threads."""

    def __init__(self, path: Path) -> None:
        """Reads the header.

        Raises:
            ModelError: The file is truncated or is not safetensors.
        """
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        try:
            self.entries, self.metadata = self._read_header()
        except (ValueError, KeyError, TypeError) as error:
            os.close(self._descriptor)
            raise ModelError(f"{path} is damaged: {error}.", "Download or copy the file again.") from error

    def _read_header(self) -> tuple[dict[str, Entry], dict[str, str]]:
        size = os.fstat(self._descriptor).st_size
        header_bytes = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        if header_bytes > min(size - 8, HEADER_LIMIT_BYTES):
            raise ValueError("its header is longer than the file")
        header = json.loads(os.pread(self._descriptor, header_bytes, 8))
        metadata = header.pop("__metadata__", {})
        entries = {}
        for name, fields in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if fields["dtype"] not in DTYPES:
                raise ValueError(f"{name} has the unknown dtype {fields['dtype']}")
            start, end = fields["data_offsets"]
            entry = Entry(name, DTYPES[fields["dtype"]], tuple(fields["shape"]), 8 + header_bytes + start)
            if end - start != entry.total_bytes or 8 + header_bytes + end > size:
                raise ValueError(f"{name} has {end - start} bytes where its shape needs {entry.total_bytes}")
            entries[name] = entry
        self.data_start = 8 + header_bytes
        return entries, metadata

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """A tensor, or rows `rows.start` to `rows.stop` of it, in memory of its own.

        Raises:
            ModelError: The file ends too early.
        """
        entry = self.entries[name]
        shape, start = entry.shape, entry.start
        if rows is not None:
            row_bytes = prod(shape[1:]) * entry.dtype.itemsize
            shape, start = (rows.stop - rows.start, *shape[1:]), start + rows.start * row_bytes
        buffer = torch.empty(prod(shape) * entry.dtype.itemsize, dtype=torch.uint8)
        self.read_into(buffer, start)
        return buffer.view(entry.dtype).view(shape)

    def read_into(self, buffer: torch.Tensor, start: int) -> None:
        """Fills a uint8 buffer with the file's bytes from `start` on.

        Raises:
            ModelError: The file ends too early.
        """
        view, done = buffer.numpy().data, 0
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, start + len(view), AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
        while done < len(view):
            count = os.preadv(self._descriptor, [view[done:]], start + done)
            if count == 0:
                raise ModelError(f"{self.path} ends before its header says.", "Download or copy the file again.")
            done += count


@dataclass(frozen=True)
class Layout:
    """A safetensors file before it is written: its header's bytes and where each tensor will lie."""

    header: bytes
    entries: Mapping[str, Entry]

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(entry.total_bytes for entry in self.entries.values())


def lay_out(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> Layout:
    """Lays tensors end to end, in the order given. The header is padded to 8 bytes, as safetensors does.

    Args:
        tensors: Name, dtype and shape of each.
        metadata: The file's; `format: pt` is added, without which transformers refuses the file.
    """
    tensors = list(tensors)
    fields: dict[str, object] = {"__metadata__": {**(metadata or {}), "format": "pt"}}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + prod(shape) * dtype.itemsize
        fields[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    entries, start = {}, len(header)
    for name, dtype, shape in tensors:
        entries[name] = Entry(name, dtype, tuple(shape), start)
        start += entries[name].total_bytes
    return Layout(header, entries)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, without a copy where it is contiguous."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def checkpoint_files(directory: Path) -> list[str]:
    """Names of the safetensors files a transformers checkpoint consists of, in order.

    The single file goes before the index, as in transformers; other files lying about do not count.

    Raises:
        ModelError: There is neither, or the index is broken or names files that are missing.
    """
    if (directory / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    index = directory / INDEX_FILE
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except FileNotFoundError:
        raise ModelError(
            f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}.",
            "Only transformers checkpoints in safetensors can be merged into.",
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} cannot be read: {error}.", "Download or copy the model again.") from error
    missing = [name for name in names if Path(name).name != name or not (directory / name).is_file()]
    if missing:
        raise ModelError(
            f"{directory} lacks {len(missing)} of the {len(names)} weight files of its index, first {missing[0]}.",
            "Download or copy the model again.",
        )
    return names
