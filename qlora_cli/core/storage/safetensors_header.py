"""Headers of safetensors files: the one parser of them, without torch.

Format: https://huggingface.co/docs/safetensors (8 bytes of header length, JSON header, data).
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli.core.untrusted import refuse_pointer
from qlora_cli.errors import ModelError, first_line
from qlora_cli.sizes import format_bytes

if TYPE_CHECKING:
    import torch

LENGTH_BYTES = 8  # little endian, before the JSON
HEADER_LIMIT_BYTES = 100 * 2**20  # safetensors refuses longer ones
PADDING = re.compile(r"__(padding|gap)_\d+")  # names of tensors that only fill space
# As safetensors calls a dtype → as PyTorch does, of those read here.
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
BITS |= {name: int(found[1]) for name in DTYPES if (found := re.match(r"[A-Z]+(\d+)", name))}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in a safetensors file."""

    name: str
    dtype_name: str  # as safetensors calls it
    shape: tuple[int, ...]
    start: int  # its first byte, counted from the start of the file

    @property
    def dtype(self) -> "torch.dtype":
        """PyTorch's dtype of the elements.

        Raises:
            ModelError: It has none whose elements stand one by one.
        """
        import torch

        name = DTYPES.get(self.dtype_name)
        if name is None:
            raise ModelError(f"{self.name} is stored as {self.dtype_name}, which is not read.", "Use a 16-bit model.")
        return getattr(torch, name)

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


def read_header(path: Path) -> tuple[int, Header]:
    """Opens a file, and reads and checks its header; the descriptor is the caller's to close.

    Raises:
        ModelError: The file cannot be read, is truncated or is not safetensors.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe is not waited for
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.", "Check the file's name and rights.") from error
    try:
        file_bytes = os.fstat(descriptor).st_size
        count = header_bytes(os.pread(descriptor, LENGTH_BYTES, 0), file_bytes)
        return descriptor, parse_header(os.pread(descriptor, count, 0), file_bytes)
    except (ValueError, OSError) as error:
        os.close(descriptor)
        if path.is_file():
            refuse_pointer(path)
        reason = first_line(error)
        raise ModelError(f"{path} is damaged: {reason}.", "Remove it, and download or copy it again.") from error
