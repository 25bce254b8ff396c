"""Layers that wait on the disk: read ahead into page-locked memory by threads, in the order in which they will be used."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_cli.core.weights.mapped_file import MappedFile

STAGED = 3  # layers in host memory: one that is copied to the card, one that is there, one that is read
PIECE_BYTES = 2**24  # that a thread reads at once
THREADS = 4


@dataclass(frozen=True)
class Extent:
    """Bytes of a layer.

    Attributes:
        start: Where they are in the file.
        bytes: How many.
        place: Where they go in a buffer.
    """

    start: int
    bytes: int
    place: int


class DiskSource:
    """Layers in a file.

    Args:
        file: In which they lie.
        layers: What each consists of.
        buffers: uint8 of the host, page-locked for a CUDA device, each with room for any layer.
        slots: Of the ring that asks: at the turn of a pass the last so many are still there.
    """

    def __init__(
        self, file: MappedFile, layers: Sequence[Sequence[Extent]], buffers: Sequence[Tensor], slots: int
    ) -> None:
        self.file, self.layers, self.buffers, self.slots = file, layers, buffers, slots
        self.reading: dict[int, tuple[int, list[Future]]] = {}  # layer → its buffer, and what fills it
        self.free = list(range(len(buffers)))
        self.left: list[Any] = [None] * len(buffers)  # when the last copy out of a buffer is done
        self.pool = ThreadPoolExecutor(THREADS, thread_name_prefix="streamed layer")
        self.last = -1
        self.step = 1

    def copy(self, number: int, into: Tensor) -> None:
        """See `LayerSource`.

        Raises:
            RunError: The file cannot be read.
        """
        self.step = 1 if number > self.last else -1
        self.last = number
        self._start(number)
        buffer, parts = self.reading.pop(number)
        try:
            for part in parts:
                part.result()
            size = max(extent.place + extent.bytes for extent in self.layers[number])
            into[:size].copy_(self.buffers[buffer][:size], non_blocking=True)
        finally:
            if into.is_cuda:
                self.left[buffer] = torch.cuda.current_stream(into.device).record_event()
            self.free.append(buffer)
        ahead, step = number, self.step
        for _ in range(len(self.buffers) - 1):
            ahead, step = self._following(ahead, step)
            if ahead != number:
                self._start(ahead)

    def _following(self, number: int, step: int) -> tuple[int, int]:
        """What a ring asks for after a layer, where passes go up and down."""
        if 0 <= number + step < len(self.layers):
            return number + step, step
        turned = number - self.slots * step
        return (turned, -step) if 0 <= turned < len(self.layers) else (number, step)

    def _start(self, number: int) -> None:
        """Begins to read a layer, unless that was begun; what is read of a layer that nobody asked for makes room."""
        if number in self.reading:
            return
        if not self.free:
            oldest = next(iter(self.reading))
            buffer, parts = self.reading.pop(oldest)
            for part in parts:
                part.cancel()
            for part in parts:
                if not part.cancelled():
                    part.exception()  # waits; another use of the layer says what was wrong
            self.free.append(buffer)
        buffer = self.free.pop(0)
        left, room = self.left[buffer], self.buffers[buffer]
        pieces = [
            (extent.start + first, room[extent.place + first : extent.place + min(extent.bytes, first + PIECE_BYTES)])
            for extent in self.layers[number]
            for first in range(0, extent.bytes, PIECE_BYTES)
        ]
        self.reading[number] = buffer, [self.pool.submit(self._read, left, *piece) for piece in pieces]

    def _read(self, left: Any, start: int, into: Tensor) -> None:
        if left is not None:
            left.synchronize()
        self.file.read(start, into)
