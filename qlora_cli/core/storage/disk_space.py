"""Disk space: checked before a write, and a full disk reported in one sentence whichever library met it."""

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_cli.errors import DiskFull
from qlora_cli.sizes import format_bytes

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_OS_ERROR = re.compile(r"os error (\d+)")


def free_disk_bytes(path: Path) -> int:
    """Bytes free on the disk of `path`, which may not exist yet."""
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free


def require_space(path: Path, needed_bytes: int) -> None:
    """Checks that the disk of `path` (which may not exist yet) has room.

    Raises:
        DiskFull: It has less than `needed_bytes` free.
    """
    free_bytes = free_disk_bytes(path)
    if free_bytes < needed_bytes:
        raise DiskFull(
            f"{format_bytes(needed_bytes)} are needed for {path}, and its disk has {format_bytes(free_bytes)} free.",
            "Free some space, or choose an --output on another disk.",
        )


def is_disk_full(error: BaseException) -> bool:
    """Whether a write met a full disk, a quota or a limit on the size of files.

    safetensors and tokenizers hide the system's error number in the text of exceptions of their own.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _DISK_FULL
    hidden = _OS_ERROR.search(str(error))
    return hidden is not None and int(hidden[1]) in _DISK_FULL


@contextmanager
def reporting_disk_full(path: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turns a full disk inside the block into `DiskFull`, which names what is free.

    Args:
        path: What is written, or where.
        needed_bytes: Of a run's file, after whose failure --resume goes on; None for any other file.
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        free_bytes = free_disk_bytes(path)
        if needed_bytes is None:
            raise DiskFull(
                f"The disk is full: {path} could not be written, with {format_bytes(free_bytes)} free.",
                "Free some space, or choose an --output on another disk, and run the command again.",
            ) from error
        raise DiskFull(
            f"The disk is full: {format_bytes(needed_bytes)} are needed in {path}, {format_bytes(free_bytes)} are free; "
            "the checkpoints already written are intact.",
            "Free some space and run the command again with --resume, or choose an --output on another disk.",
        ) from error
