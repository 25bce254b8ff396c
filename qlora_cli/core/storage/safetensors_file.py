"""Safetensors files: written with the headers made here, and tensors read whole or by rows.

Bytes are read with `preadv` into fresh buffers and never mapped: mapped pages count as resident, and the memory of a
merge is bounded.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import torch

from qlora_cli.core.storage import safetensors_header
from qlora_cli.core.storage.safetensors_header import LENGTH_BYTES, Header, TensorEntry, parse_header, read_header
from qlora_cli.errors import ModelError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
COMPARED_ROWS = 1024
AHEAD_BYTES = 64 * 2**20  # the disk reads on while what came is worked on; of itself the system asks for 128 KiB
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, own) for name, own in safetensors_header.DTYPES.items()}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

TensorSpec = tuple[str, torch.dtype, Sequence[int]]  # name, dtype and shape of a tensor to be written


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


class TensorFile:
    """A safetensors file open for reading; safe to read from several threads."""

    def __init__(self, path: Path) -> None:
        """Reads and checks the header.

        Raises:
            ModelError: The file cannot be read, is truncated or is not safetensors.
        """
        self.path = path
        self._descriptor, self.header = read_header(path)
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
        shape, start = self.place_of(entry, rows)
        buffer = torch.empty(prod(shape) * entry.dtype.itemsize, dtype=torch.uint8)
        self.read_into(buffer, start)
        return buffer.view(entry.dtype).view(shape)

    def place_of(self, entry: TensorEntry, rows: slice | None) -> tuple[tuple[int, ...], int]:
        """The shape of a tensor, or of rows of it, and where it begins in the file."""
        if rows is None:
            return entry.shape, entry.start
        row_bytes = prod(entry.shape[1:]) * entry.dtype.itemsize
        return (rows.stop - rows.start, *entry.shape[1:]), entry.start + rows.start * row_bytes

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


class HeldTensor(TensorFile):
    """A tensor in memory that is read as the only one of a file."""

    def __init__(self, name: str, values: torch.Tensor) -> None:
        """Holds the values, without a copy."""
        self.values = values
        self.entries = {name: TensorEntry(name, DTYPE_NAMES[values.dtype], tuple(values.shape), 0)}

    def __exit__(self, *error: object) -> None:
        """Nothing is open."""

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """As `TensorFile.read`."""
        return self.values.clone() if rows is None else self.values[rows].clone()

    def read_into(self, buffer: torch.Tensor, start: int) -> None:
        """As `TensorFile.read_into`."""
        buffer.copy_(self.values.contiguous().flatten().view(torch.uint8)[start : start + len(buffer)])


def staging_memory(bytes_: int, device: torch.device) -> torch.Tensor:
    """A uint8 buffer, page-locked for a card where the system gives that: from other memory copies take longer."""
    if device.type == "cuda":
        with suppress(RuntimeError):
            return torch.empty(bytes_, dtype=torch.uint8, pin_memory=True)
        with suppress(RuntimeError, AssertionError):  # CUDA keeps the error for whatever it is asked next
            torch.zeros(1, device=device)
    return torch.empty(bytes_, dtype=torch.uint8)


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
        missing = [name for name in names if Path(name).name != name or not (directory / name).is_file()]
    except FileNotFoundError:
        raise ModelError(
            f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}.",
            "Download or copy the whole model again: transformers gives its weights one of these names.",
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} cannot be read: {error}.", "Download or copy the model again.") from error
    if missing:
        raise ModelError(
            f"{directory} lacks {len(missing)} of the {len(names)} weight files of its index, first {missing[0]}.",
            "Download or copy the model again.",
        )
    return names


def are_equal(first: tuple[TensorFile, str], second: tuple[TensorFile, str]) -> bool:
    """Whether two tensors, each in its file, are the same in shape, dtype and values."""
    one, two = (file.entries[name] for file, name in (first, second))
    if (one.shape, one.dtype) != (two.shape, two.dtype):
        return False
    starts = range(0, one.shape[0], COMPARED_ROWS)
    blocks = (slice(start, min(start + COMPARED_ROWS, one.shape[0])) for start in starts)
    return all(torch.equal(first[0].read(one.name, rows), second[0].read(two.name, rows)) for rows in blocks)
