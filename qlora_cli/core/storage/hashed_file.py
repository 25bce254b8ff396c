"""Safetensors file with a SHA-256 of each of its pieces, written once and read in parallel, every byte verified.

Reading is what a start waits for: each worker thread reads a piece into a buffer of its own, hashes it there and copies
its bytes to the tensors they belong to, from page-locked memory where they go to a CUDA device.
"""

import bisect
import hashlib
import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qlora_cli.core.storage.safetensors_file import bytes_of, make_header, staging_memory
from qlora_cli.core.storage.safetensors_header import LENGTH_BYTES, Header, header_bytes, parse_header
from qlora_cli.errors import RunError

PIECE_BYTES = 8 * 2**20  # covered by one digest: what a reading thread has in memory, page-locked for CUDA
ALIGNMENT_BYTES = 256
THREADS = min(16, os.cpu_count() or 1)


# ---------------------------------------------------------------- writing


def write_hashed_file(
    stream: BinaryIO, shapes: Mapping[str, Tensor], values: Iterable[Tensor], *, piece_bytes: int
) -> list[str]:
    """Writes a safetensors file, each tensor aligned, one in memory at a time.

    Args:
        shapes: Of every tensor, in order; these themselves, or ones on the meta device.
        values: The tensors in the same order.
        piece_bytes: Covered by one digest.

    Returns:
        The SHA-256 of every piece, in hexadecimal, and of what is left, which may be nothing.
    """
    header = make_header(
        ((name, tensor.dtype, tensor.shape) for name, tensor in shapes.items()), alignment_bytes=ALIGNMENT_BYTES
    )
    hashing = _HashingStream(stream, piece_bytes)
    hashing.write(header.content)
    for entry, tensor in zip(header.entries.values(), values, strict=True):
        hashing.write(bytes(entry.start - hashing.written_bytes))
        hashing.write(bytes_of(tensor.detach().cpu()))
    return hashing.finish()


class _HashingStream:
    """A stream that keeps a digest of every `piece_bytes`."""

    def __init__(self, stream: BinaryIO, piece_bytes: int) -> None:
        self.written_bytes = 0
        self._stream, self._piece_bytes = stream, piece_bytes
        self._digest, self._left = hashlib.sha256(), piece_bytes
        self._digests: list[str] = []

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        self._stream.write(view)
        self.written_bytes += len(view)
        while len(view):
            part, view = view[: self._left], view[self._left :]
            self._digest.update(part)
            self._left -= len(part)
            if not self._left:
                self._digests.append(self._digest.hexdigest())
                self._digest, self._left = hashlib.sha256(), self._piece_bytes

    def finish(self) -> list[str]:
        return [*self._digests, self._digest.hexdigest()]


# ---------------------------------------------------------------- reading


class HashedFile:
    """A file of `write_hashed_file`, open; its header is verified, and with `fill` every other byte."""

    def __init__(self, path: Path, digests: Sequence[str], piece_bytes: int) -> None:
        """Opens a file that was written in pieces of `piece_bytes` with these digests.

        Raises:
            RunError: It has another length, or its header is damaged.
        """
        self._path, self._digests = path, digests
        self._stream = path.open("rb", buffering=0)
        try:
            self._file_bytes = os.fstat(self._stream.fileno()).st_size
            if piece_bytes < 1:
                raise RunError(f"{path.name} cannot be read in pieces of {piece_bytes} bytes.")
            self._piece_bytes = piece_bytes
            self._pieces = self._file_bytes // piece_bytes + 1  # the last one is shorter, or empty
            if len(digests) != self._pieces:
                raise RunError(f"{path.name} has another length than was written.")
            try:
                self.entries = self._read_header().entries
            except ValueError as error:
                raise RunError(f"{path.name} is damaged: {error}.") from error
        except BaseException:
            self._stream.close()
            raise

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()

    def _read_header(self) -> Header:
        """The header, from verified pieces."""
        buffer = torch.empty(min(self._piece_bytes, self._file_bytes), dtype=torch.uint8).numpy()
        content, needed = b"", LENGTH_BYTES
        for number in range(self._pieces):
            content += buffer[: self._read_piece(number, buffer)].tobytes()
            if len(content) >= LENGTH_BYTES:
                needed = header_bytes(content, self._file_bytes)
            if len(content) >= needed:
                return parse_header(content[:needed], self._file_bytes)
        raise ValueError("it ends before its header does")

    def _read_piece(self, number: int, buffer: Any) -> int:
        """Fills a buffer, (piece_bytes,) uint8 of numpy, with a piece and verifies it; returns its bytes.

        Raises:
            RunError: They are not what was written.
        """
        start = number * self._piece_bytes
        count = min(self._piece_bytes, self._file_bytes - start)
        done = 0
        while done < count:
            read = os.preadv(self._stream.fileno(), [buffer[done:count]], start + done)
            if not read:
                raise RunError(f"{self._path.name} became shorter while it was read.")
            done += read
        # Of more than 2 KiB, hashing lets other threads run.
        if hashlib.sha256(buffer[:count]).hexdigest() != self._digests[number]:
            raise RunError(f"{self._path.name} is damaged after byte {start:,}.")
        return count

    def fill(self, parts: Iterable[tuple[int, Tensor]], device: torch.device, *, threads: int = THREADS) -> None:
        """Verifies the whole file and fills tensors with what is in it.

        Args:
            parts: Contiguous tensors that share no byte of the file, each with the place there of its first one; on the
                host or on `device`. They hold nothing of use unless this returns; then, on a CUDA device, for what its
                current stream does next.
            device: Where those that are not on the host are.
            threads: Most that read at once.

        Raises:
            RunError: A byte is not what was written.
        """
        targets = sorted(((start, _bytes_of(tensor)) for start, tensor in parts), key=lambda target: target[0])
        copies = _CudaCopies(device) if device.type == "cuda" else None
        waiting = deque(range(self._pieces))
        threads = min(threads, self._pieces)
        try:
            with ThreadPoolExecutor(threads) as pool:
                try:
                    futures = [pool.submit(self._work, waiting, targets, copies) for _ in range(threads)]
                    for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                        future.result()
                finally:  # after a failure or Ctrl-C the other threads end with the piece they have in hand
                    waiting.clear()
        finally:
            if copies:  # also after a failure: the memory of the tensors may be given to others next
                copies.join()

    def _work(self, waiting: deque[int], targets: list[tuple[int, Any]], copies: "_CudaCopies | None") -> None:
        """Takes numbers of pieces from `waiting`, shared by the threads, until none is left: reads and verifies each,
        and copies it to the targets, which are places in the file, in order, and the bytes to be filled from there.
        """
        starts = [start for start, _ in targets]
        with copies.selected() if copies else nullcontext():
            room = min(self._piece_bytes, self._file_bytes)
            staging = staging_memory(room, torch.device("cpu") if copies is None else copies.device)
            buffer = staging.numpy()
            copied = torch.cuda.Event() if copies else None
            while waiting:
                try:
                    number = waiting.popleft()
                except IndexError:  # another thread was faster
                    return
                if copied is not None:
                    copied.synchronize()  # what was copied out of the buffer has left it
                first = number * self._piece_bytes
                last = first + self._read_piece(number, buffer)
                for index in range(max(0, bisect.bisect_right(starts, first) - 1), bisect.bisect_left(starts, last)):
                    start, target = targets[index]
                    low, high = max(first, start), min(last, start + len(target))
                    if low >= high:
                        continue
                    if isinstance(target, Tensor):
                        target[low - start : high - start].copy_(staging[low - first : high - first], non_blocking=True)
                    else:
                        target[low - start : high - start] = buffer[low - first : high - first]
                if copied is not None:
                    copied.record()


def _bytes_of(tensor: Tensor) -> Any:
    """A contiguous tensor as (bytes,) uint8; of numpy on the host, where torch would start threads for each of ours."""
    flat = tensor.view(-1).view(torch.uint8)
    return flat if tensor.is_cuda else flat.numpy()


class _CudaCopies:
    """A stream for copies to a CUDA device: behind what is queued there when it is made, ahead of what follows `join`."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._stream = device, torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def selected(self) -> torch.cuda.StreamContext:
        """The stream as the current one of this thread, which is to be one of our own."""
        # A thread begins on device 0: leaving the context would go back there, which takes memory on that card.
        torch.cuda.set_device(self._stream.device)
        return torch.cuda.stream(self._stream)

    def join(self) -> None:
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
