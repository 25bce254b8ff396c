"""Tensors of a checkpoint on their way to a card: threads read a piece ahead of the one in use, which goes there as one copy.

Thousands of experts read and copied one by one keep the card waiting for each: 57 GiB took minutes, beside other work more.
"""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_cli.core.storage.safetensors_file import staging_memory
from qlora_cli.core.weights.checkpoint import Checkpoint, WeightFile

PIECE_BYTES = 2**27  # of tensors that go together
PART_BYTES = 2**24  # of a tensor, that one thread reads
THREADS = min(8, os.cpu_count() or 1)
ALIGNMENT_BYTES = 256  # as the card reads a tensor best

Request = tuple[str, slice | None]  # a weight's name in the checkpoint; which of its rows, None for all


def pays(device: torch.device) -> bool:
    """Whether weights are read ahead, and small ones worked on together: on a device that works while the host reads."""
    return device.type == "cuda"


class _Place(NamedTuple):
    """Where in a piece a tensor lies, and where it comes from."""

    file: WeightFile
    source: int  # in the file
    start: int  # in the piece
    bytes_: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class _Piece:
    """Tensors that are read into one buffer and copied together."""

    def __init__(self) -> None:
        self.places: dict[tuple, _Place] = {}
        self.bytes_ = 0
        self.reads: list[Future] = []
        self.buffer: Tensor

    def add(self, key: tuple, place: _Place) -> None:
        self.places[key] = place._replace(start=self.bytes_)
        self.bytes_ += -(-place.bytes_ // ALIGNMENT_BYTES) * ALIGNMENT_BYTES

    def begin(self, pool: ThreadPoolExecutor, buffer: Tensor) -> None:
        self.buffer = buffer
        for place in self.places.values():
            for first in range(0, place.bytes_, PART_BYTES):
                end = min(first + PART_BYTES, place.bytes_)
                part = buffer[place.start + first : place.start + end]
                self.reads.append(pool.submit(place.file.read_into, part, place.source + first))


class ReadAhead:
    """Gives a checkpoint's weights on a card, those that lie in it as they are read ahead in the order they are asked for."""

    def __init__(self, checkpoint: Checkpoint, order: Iterable[Request], device: torch.device) -> None:
        """What is asked for in another order than this comes all the same, by itself."""
        self.checkpoint, self.device = checkpoint, device
        self.pieces = self._cut(order)
        self.pool = ThreadPoolExecutor(THREADS, "read-ahead")
        self.buffers: list[Tensor] = [torch.empty(0, dtype=torch.uint8)] * 2
        self.copied: list[torch.cuda.Event | None] = [None, None]
        self.turn = 0
        self.here: dict[tuple, Tensor] = {}
        self.next = self._begin()

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=True)
        self.here, self.next, self.buffers = {}, None, []

    def __call__(self, name: str, rows: slice | None = None) -> Tensor:
        """As `Checkpoint.read`, on the device; valid as long as it is held.

        Raises:
            ModelError: As `Checkpoint.read`.
        """
        key = _key(name, rows)
        if key not in self.here and self.next is not None and key in self.next.places:
            self._advance(self.next)
        found = self.here.pop(key, None)
        return self.checkpoint.read(name, rows).to(self.device) if found is None else found

    def _advance(self, piece: _Piece) -> None:
        self.here = {}  # before there is another
        for read in piece.reads:
            read.result()
        whole = piece.buffer[: piece.bytes_].to(self.device, non_blocking=True, copy=True)
        if whole.is_cuda:
            self.copied[self.turn] = torch.cuda.current_stream(self.device).record_event()
        self.here = {
            key: whole[place.start : place.start + place.bytes_].view(place.dtype).view(place.shape)
            for key, place in piece.places.items()
        }
        self.turn = 1 - self.turn
        self.next = self._begin()

    def _begin(self) -> _Piece | None:
        """Begins to read the next piece, into the buffer that the one before the last was copied from."""
        piece = next(self.pieces, None)
        if piece is not None:
            if (event := self.copied[self.turn]) is not None:
                event.synchronize()
            if self.buffers[self.turn].numel() < piece.bytes_:
                self.buffers[self.turn] = staging_memory(max(piece.bytes_, PIECE_BYTES), self.device)
            piece.begin(self.pool, self.buffers[self.turn])
        return piece

    def _cut(self, order: Iterable[Request]) -> Iterator[_Piece]:
        piece = _Piece()
        for name, rows in order:
            if (file := self.checkpoint.plain_file(name)) is None:
                continue
            dtype = file.entries[name].dtype
            shape, source = file.place_of(file.entries[name], rows)
            place = _Place(file, source, 0, torch.Size(shape).numel() * dtype.itemsize, dtype, shape)
            if piece.places and piece.bytes_ + place.bytes_ > PIECE_BYTES:
                yield piece
                piece = _Piece()
            piece.add(_key(name, rows), place)
        if piece.places:
            yield piece


def _key(name: str, rows: slice | None) -> tuple:
    return (name, None) if rows is None else (name, rows.start, rows.stop)
