"""File mapped into memory, tensors of which are read where they lie, and in large pieces ahead of their use."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_cli.errors import RunError


class MappedFile:
    """A file, open for as long as this is; what becomes of its name does not matter.

    Args:
        path: Of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = path.stat().st_size
        # Private pages: nothing that happens to a tensor reaches the file.
        self.memory = torch.from_file(str(path), shared=False, size=self.bytes, dtype=torch.uint8)
        self.stream = path.open("rb", buffering=0)

    def tensor(self, start: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """A tensor whose first byte is there in the file; it is aligned as the file is."""
        count = dtype.itemsize * torch.Size(shape).numel()
        return self.memory[start : start + count].view(dtype).view(shape)

    def start_of(self, tensor: Tensor) -> int | None:
        """Where in the file a tensor begins; None for one that is not of it."""
        start = tensor.data_ptr() - self.memory.data_ptr()
        return start if tensor.device.type == "cpu" and 0 <= start < self.bytes else None

    def read(self, start: int, into: Tensor) -> None:
        """Fills a uint8 tensor of the host from there on, past the mapping: page faults would read in small pieces.

        Raises:
            RunError: The file cannot be read.
        """
        buffer: Any = into.numpy()
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self.stream.fileno(), [buffer[done:]], start + done)
            except OSError as error:
                raise RunError(
                    f"The copy of the base in {self.path.parent} cannot be read any more: {error.strerror}.",
                    "Go on with --resume once the disk answers.",
                ) from error
            if not count:
                raise RunError(f"The copy of the base in {self.path.parent} became shorter.", "Go on with --resume.")
            done += count
