"""Page-locked host memory for what waits there: layers of a base, in few large pieces, activations, an optimizer's state."""

import mmap
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress

import torch
from torch import Tensor

from qlora_cli.core.device import read_free_bytes
from qlora_cli.errors import first_line
from qlora_cli.events import Caution, Report
from qlora_cli.sizes import format_bytes

MOST_BYTES = 2**32  # of one piece: a system that gives no large ones may give several smaller ones
RESERVE_BYTES = 2**32  # of free host memory, beside layers that wait there: weights on their way, the run itself
TOUCHED_BYTES = 2**26  # from so many on, pages are touched by several threads


def why_on_disk(waiting_bytes: int) -> str | None:
    """Where layers of so many bytes have to wait, if the host has no memory for them, and why; None where it has."""
    free_bytes = read_free_bytes(torch.device("cpu"))
    if waiting_bytes + RESERVE_BYTES <= free_bytes:
        return None
    return f"on the disk, for the host has {format_bytes(free_bytes)} free and they take {format_bytes(waiting_bytes)},"


def piece_sizes(layer_bytes: int, layers: int) -> list[tuple[int, int]]:
    """(bytes, layers held) of each piece, at the most. PyTorch rounds what it locks itself (`lock_pages`) up to a power of
    two, so that pieces are of such sizes, and less than a layer is lost in each."""
    pieces = []
    while layers:
        whole = 2 ** min((layer_bytes * layers).bit_length() - 1, MOST_BYTES.bit_length() - 1)
        held = max(1, whole // layer_bytes)
        pieces.append((max(whole, layer_bytes), held))
        layers -= held
    return pieces


def locked_bytes(layer_bytes: int, layers: int) -> int:
    """What so many layers take at the most, with what is lost to rounding."""
    return sum(2 ** (bytes_ - 1).bit_length() for bytes_, _ in piece_sizes(layer_bytes, layers))


def layer_buffers(layer_bytes: int, layers: int, device: torch.device, report: Report) -> Iterator[Tensor]:
    """A uint8 buffer of host memory for each layer, page-locked where the device is a CUDA one.

    Where the system gives no more of that, as in containers whose locked memory is limited, the rest is ordinary memory,
    from which copies are slower and hold up the host; `report` is told.
    """
    lock = device.type == "cuda"
    for _, held in piece_sizes(layer_bytes, layers):
        bytes_ = held * layer_bytes
        piece, lock = allocate_locked(bytes_, "layers", report) if lock else (_ordinary(bytes_), False)
        for number in range(held):
            yield piece[number * layer_bytes : (number + 1) * layer_bytes]


def allocate_locked(bytes_: int, what: str, report: Report) -> tuple[Tensor, bool]:
    """A uint8 buffer of page-locked memory, or, as `report` is told, of ordinary memory where the system gives no more.

    Args:
        what: Waits there, for the report.

    Returns:
        (bytes_,) uint8, and whether it is page-locked.
    """
    try:
        return lock_pages(bytes_), True
    except RuntimeError as error:  # AcceleratorError and OutOfMemoryError are such
        reason = first_line(error)
    _forget_error()
    report(
        Caution(
            f"The system gives no {format_bytes(bytes_)} of page-locked memory for {what} that wait on the host "
            f"({reason}): ordinary memory is used, from which copies are slower. Try a larger `ulimit -l`, or a "
            "container without a limit on locked memory."
        )
    )
    return _ordinary(bytes_), False


def lock_pages(bytes_: int) -> Tensor:
    """Page-locked memory, (bytes_,) uint8.

    CUDA's own allocation has one thread ask the system for every page of 4 KiB, 0.4 to 0.7 s a GiB. Here all threads
    touch the pages, large ones where there are any, which are then locked as they lie: 0.08 s a GiB (benchmarks/streaming.md).
    Nor is the request rounded up.

    Raises:
        RuntimeError: The system gives no more.
    """
    # Who touches more than there is is killed; CUDA's own allocation fails instead.
    if TOUCHED_BYTES <= bytes_ < read_free_bytes(torch.device("cpu")):
        with suppress(OSError, RuntimeError):
            return _lock_touched(bytes_)
        _forget_error()
    return torch.empty(bytes_, dtype=torch.uint8, pin_memory=True)


class _Pages(mmap.mmap):
    """Pages of this process alone, which CUDA lets go, if it locked them, before they are given back."""

    locked_at: int | None = None

    def __del__(self, at_exit: Callable[[], bool] = sys.is_finalizing) -> None:
        if self.locked_at is not None and not at_exit():
            with suppress(RuntimeError):  # of earlier work
                torch.cuda.synchronize()  # copies may be under way
            torch.cuda.cudart().cudaHostUnregister(self.locked_at)


def _lock_touched(bytes_: int) -> Tensor:
    pages = _Pages(-1, bytes_, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_DONTFORK)  # a child process would get a copy of what is locked
    with suppress(OSError):  # a system without large pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    buffer = torch.frombuffer(pages, dtype=torch.uint8).zero_()
    cudart = torch.cuda.cudart()
    if (error := cudart.cudaHostRegister(buffer.data_ptr(), bytes_, 0)) != cudart.cudaError.success:
        raise RuntimeError(f"{bytes_} bytes cannot be page-locked: {error}")
    pages.locked_at = buffer.data_ptr()
    return buffer


def _forget_error() -> None:
    """CUDA keeps an error, and reports it of the next kernel, which has nothing to do with it: this one is that."""
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda")


def _ordinary(bytes_: int) -> Tensor:
    return torch.empty(bytes_, dtype=torch.uint8)
