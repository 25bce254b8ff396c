"""Layers that wait on the disk: read ahead into page-locked memory by threads, in the order in which they will be used."""

import math
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_cli.core.weights.mapped_file import MappedFile
from qlora_cli.events import Notice, Report
from qlora_cli.sizes import format_bytes

STAGED = 3  # layers in host memory: one that is copied to the card, one that is there, one that is read
PIECE_BYTES = 2**24  # that a thread reads at once
THREADS = 4
PASSES_TRIED = 4  # over all layers, before it is said that steps wait
WAITING_SHARE = 0.2  # of the time, from which that is said


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
        report: Is told once where it is the disk that steps wait for.
    """

    def __init__(
        self,
        file: MappedFile,
        layers: Sequence[Sequence[Extent]],
        buffers: Sequence[Tensor],
        slots: int,
        report: Report,
    ) -> None:
        self.file, self.layers, self.buffers, self.slots, self.report = file, layers, buffers, slots, report
        self.reading: dict[int, tuple[int, list[Future]]] = {}  # layer → its buffer, and what fills it
        self.free = list(range(len(buffers)))
        self.left: list[Any] = [None] * len(buffers)  # when the last copy out of a buffer is done
        self.pool = ThreadPoolExecutor(THREADS, thread_name_prefix="streamed layer")
        self.last = -1
        self.step = 1
        self.copies, self.began, self.waited_seconds = 0, time.perf_counter(), 0.0
        self.returned = self.began  # from the last copy
        self.slow_bytes, self.slow_seconds = 0, 0.0  # of copies that waited, each with the time since the one before
        self.told = False

    @property
    def bytes_per_second(self) -> float:
        """See `LayerSource`: what the disk gave whenever it was waited for; infinite where it never was."""
        return self.slow_bytes / self.slow_seconds if self.slow_seconds else math.inf

    def copy(self, number: int, into: Tensor, *, around: bool = False) -> None:
        """See `LayerSource`.

        Raises:
            RunError: The file cannot be read.
        """
        self.step = 1 if around or number > self.last else -1
        self.last = number
        self._start(number)
        buffer, parts = self.reading.pop(number)
        size = max(extent.place + extent.bytes for extent in self.layers[number])
        try:
            if not all(part.done() for part in parts):
                self._wait(parts, size)
            for part in parts:
                part.result()
            into[:size].copy_(self.buffers[buffer][:size], non_blocking=True)
        finally:
            if into.is_cuda:
                self.left[buffer] = torch.cuda.current_stream(into.device).record_event()
            self.free.append(buffer)
        ahead, step = number, self.step
        for _ in range(len(self.buffers) - 1):
            ahead, step = ((ahead + 1) % len(self.layers), 1) if around else self._following(ahead, step)
            if ahead != number:
                self._start(ahead)
        self.copies += 1
        self.returned = time.perf_counter()
        if self.copies % (PASSES_TRIED * len(self.layers)) == 0:
            self._judge()

    def _wait(self, parts: Sequence[Future], size: int) -> None:
        """Waits for a layer and keeps count of it; an error is raised elsewhere."""
        before = time.perf_counter()
        for part in parts:
            part.exception()
        now = time.perf_counter()
        self.waited_seconds += now - before
        self.slow_bytes, self.slow_seconds = self.slow_bytes + size, self.slow_seconds + now - self.returned

    def _judge(self) -> None:
        """Says, once, that steps wait for the disk, where they did of late."""
        share = self.waited_seconds / (self.returned - self.began)
        self.began, self.waited_seconds = self.returned, 0.0
        if share > WAITING_SHARE and not self.told:
            self.told = True
            self.report(
                Notice(
                    f"Steps wait for the disk for {100 * share:.0f} % of their time: it gives {format_bytes(int(self.bytes_per_second))} of "
                    "the base a second. A larger --batch-size reads it for more rows at once; with more free host "
                    "memory it would not wait there."
                )
            )

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
