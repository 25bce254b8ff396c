"""Safetensors files: the one parser and writer of their headers, and tensors read whole or by rows.

Bytes are read with `preadv` into fresh buffers and never mapped: mapped pages count as resident, and the memory of a
merge is bounded. Format: https://huggingface.co/docs/safetensors (8 bytes of header length, JSON header, data).
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from qlora_cli.errors import ModelError
from qlora_cli.sizes import format_bytes

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
LENGTH_BYTES = 8  # little endian, before the JSON
HEADER_LIMIT_BYTES = 100 * 2**20  # safetensors refuses longer ones
PADDING = re.compile(r"__(padding|gap)_\d+")  # names of tensors that only fill space
AHEAD_BYTES = 64 * 2**20  # the disk reads on while what came is worked on; of itself the system asks for 128 KiB
DTYPES: dict[str, torch.dtype] = {  # read here
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
BITS = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()} | {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}

TensorSpec = tuple[str, torch.dtype, Sequence[int]]  # name, dtype and shape of a tensor to be written


# ---------------------------------------------------------------- headers


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in a safetensors file."""

    name: str
    dtype_name: str  # as safetensors calls it
    shape: tuple[int, ...]
    start: int  # its first byte, counted from the start of the file

    @property
    def dtype(self) -> torch.dtype:
        """PyTorch's dtype of the elements.

        Raises:
            ModelError: It has none whose elements stand one by one.
        """
        if self.dtype_name not in DTYPES:
            raise ModelError(f"{self.name} is stored as {self.dtype_name}, which is not read.", "Use a 16-bit model.")
        return DTYPES[self.dtype_name]

    @property
    def elements(self) -> int:
        """Elements of the tensor."""
        return prod(self.shape)

    @property
    def total_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.elements * BITS[self.dtype_name] // 8


@dataclass(frozen=True)
class Header:
    """What stands before the data of a safetensors file."""

    content: bytes  # the file's first ones: the length of the JSON, and the JSON
    entries: Mapping[str, TensorEntry]  # every tensor that is not padding by its name, in the order of their bytes
    metadata: Mapping[str, str]  # about the whole file
    total_bytes: int  # of the whole file


def header_bytes(start: bytes, file_bytes: int) -> int:
    """Bytes of a file's header with its length, from the first 8 of them.

    Raises:
        ValueError: The header is longer than the file, or than safetensors allows; the reason as a clause.
    """
    length = LENGTH_BYTES + int.from_bytes(start[:LENGTH_BYTES], "little")
    if file_bytes < length:
        raise ValueError("its header is longer than the file")
    if length > LENGTH_BYTES + HEADER_LIMIT_BYTES:
        raise ValueError(f"its header is longer than {format_bytes(HEADER_LIMIT_BYTES)}")
    return length


def parse_header(content: bytes, file_bytes: int) -> Header:
    """Reads a header and checks that its tensors fill the file: no gap, no overlap, none past the end.

    Raises:
        ValueError: The reason as a clause.
    """
    try:
        fields = json.loads(content[LENGTH_BYTES:].decode())
    except RecursionError:
        raise ValueError("its header is nested too deep") from None
    metadata = fields.pop("__metadata__", {}) if isinstance(fields, dict) else None
    if not isinstance(metadata, dict):
        raise ValueError("its header is not a JSON object, or its metadata is not one")
    found = [_parse_entry(name, value, len(content)) for name, value in fields.items()]
    found.sort(key=lambda entry: (entry.start, entry.total_bytes))
    end = len(content)
    for entry in found:
        if entry.start != end:
            raise ValueError(f"{entry.name} begins at byte {entry.start:,} and not at {end:,}, behind the one before")
        end += entry.total_bytes
    if end != file_bytes:
        raise ValueError(f"it has {file_bytes:,} bytes where its header says {end:,}")
    entries = {entry.name: entry for entry in found if not PADDING.fullmatch(entry.name)}
    return Header(content, entries, metadata, file_bytes)


def _parse_entry(name: str, fields: Any, data_start: int) -> TensorEntry:
    try:
        dtype, shape, (start, end) = str(fields["dtype"]), tuple(fields["shape"]), fields["data_offsets"]
    except (TypeError, LookupError, ValueError):
        raise ValueError(f"{name} lacks a dtype, a shape or two offsets") from None
    if dtype not in BITS:
        raise ValueError(f"{name} has the unknown dtype {dtype}")
    if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise ValueError(f"the shape or the offsets of {name} are not whole numbers")
    entry = TensorEntry(name, dtype, shape, data_start + start)
    if end - start != entry.total_bytes:
        raise ValueError(f"{name} has {end - start:,} bytes where its shape needs {entry.total_bytes:,}")
    return entry


def make_header(
    tensors: Iterable[TensorSpec], metadata: Mapping[str, str] | None = None, *, alignment_bytes: int = 1
) -> Header:
    """The header of a file of these tensors, one behind the other.

    Args:
        tensors: In order.
        metadata: The file's; `format: pt` is added, without which transformers refuses the file.
        alignment_bytes: Each tensor begins at a multiple of it in the file. The format has no gaps, so that tensors of
            padding fill them.
    """
    fields: dict[str, Any] = {"__metadata__": {**(metadata or {}), "format": "pt"}}
    end = 0
    for tensor in tensors:
        padding = -end % alignment_bytes
        before: list[TensorSpec] = [(f"__padding_{end}", torch.uint8, [padding])] if padding else []
        for name, dtype, shape in [*before, tensor]:
            start, end = end, end + prod(shape) * dtype.itemsize
            fields[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % max(8, alignment_bytes))  # to 8 bytes at least, as safetensors does
    content = len(text).to_bytes(LENGTH_BYTES, "little") + text
    return parse_header(content, len(content) + end)


# ---------------------------------------------------------------- files


class TensorFile:
    """A safetensors file open for reading; safe to read from several threads."""

    def __init__(self, path: Path) -> None:
        """Reads and checks the header.

        Raises:
            ModelError: The file cannot be read, is truncated or is not safetensors.
        """
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ModelError(
                f"{path} cannot be read: {error.strerror}.", "Check the file's name and rights."
            ) from error
        try:
            file_bytes = os.fstat(self._descriptor).st_size
            count = header_bytes(os.pread(self._descriptor, LENGTH_BYTES, 0), file_bytes)
            self.header = parse_header(os.pread(self._descriptor, count, 0), file_bytes)
        except (ValueError, OSError) as error:
            os.close(self._descriptor)
            raise ModelError(f"{path} is damaged: {error}.", "Remove it, and download or copy it again.") from error
        self.entries = self.header.entries

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._descriptor)

    def is_plain(self, name: str) -> bool:
        """Whether the bytes of a tensor in the file are those of its values."""
        return name in self.entries

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """A tensor, or rows `rows.start` to `rows.stop` of it, in memory of its own.

        Raises:
            ModelError: The file ends too early, or the dtype is none of PyTorch's.
        """
        return self.read_entry(self.entries[name], rows)

    def read_entry(self, entry: TensorEntry, rows: slice | None = None) -> torch.Tensor:
        """As `read`, of a tensor by where it lies."""
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
                raise ModelError(f"{self.path} became shorter while it was read.", "Download or copy it again.")
            done += count


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, without a copy where it is contiguous."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def list_weight_files(directory: Path) -> list[str]:
    """Names of the safetensors files a transformers checkpoint consists of, in order.

    The single file goes before the index, as in transformers; other files in the directory do not count.

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
