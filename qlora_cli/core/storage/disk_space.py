"""Disk space, checked before a write; and what a disk refuses, in one sentence whichever library met it."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_cli.core.storage.temporaries import intended
from qlora_cli.errors import DiskFull, QloraError, RunError
from qlora_cli.sizes import format_bytes

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_OF_FILES = {
    getattr(errno, name)
    for name in (
        *("ENOENT", "ENOTDIR", "EISDIR", "EEXIST", "ELOOP", "ENAMETOOLONG"),  # of the path
        *("EACCES", "EPERM", "EROFS", "EBUSY", "ETXTBSY", "ENOTEMPTY", "EXDEV", "EMLINK"),  # of what is allowed there
        *("EIO", "EREMOTEIO", "ESTALE", "ENODEV", "ENXIO", "EINTR"),  # of the disk
        *("EINVAL", "ENOLCK", "EOPNOTSUPP", "ENOSYS", "EMFILE", "ENFILE"),  # of what the system can do
    )
    if hasattr(errno, name)
}
_OS_ERROR = re.compile(r"os error (\d+)|unable to [^\n]*\((\d+)\)")


def free_disk_bytes(path: Path) -> int:
    """Bytes free on the disk of `path`, which may not exist yet."""
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free


ANOTHER_OUTPUT = "Free some space, or choose an --output on another disk."


def require_space(path: Path, needed_bytes: int, way: str = ANOTHER_OUTPUT) -> None:
    """Checks that the disk of `path` (which may not exist yet) has room; `way` is what to do where it has none.

    Raises:
        DiskFull: It has less than `needed_bytes` free.
    """
    free_bytes = free_disk_bytes(path)
    if free_bytes < needed_bytes:
        raise DiskFull(
            f"{format_bytes(needed_bytes)} are needed for {path}, and its disk has {format_bytes(free_bytes)} free.",
            way,
        )


def error_number(error: BaseException) -> int | None:
    """The system's number of an error.

    safetensors, tokenizers and torch hide it in the text of exceptions of their own.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    hidden = _OS_ERROR.search(str(error))
    return int(hidden[1] or hidden[2]) if hidden else None


def name_limit(error: BaseException) -> str:
    """What a write met that `is_disk_full`: a limit may be met on a disk with much room."""
    limits = {errno.EFBIG: "The limit on the size of files is met (ulimit -f)", errno.EDQUOT: "The quota is used up"}
    return limits.get(error_number(error) or 0, "The disk is full")


def is_disk_full(error: BaseException) -> bool:
    """Whether a write met a full disk, a quota or a limit on the size of files."""
    return error_number(error) in _DISK_FULL


def is_closed_or_full(error: BaseException) -> bool:
    """Whether a write met a place that takes nothing now and in a moment: `is_disk_full`, read-only, or not this user's."""
    return isinstance(error, OSError) and error.errno in _DISK_FULL | _CLOSED


def describe_place_refused(error: BaseException, path: Path, way: str) -> QloraError:
    """What a write to `path` met that `is_closed_or_full`, with what is free there, and the way on."""
    if not is_disk_full(error):
        return RunError(f"{path} cannot be written: {os.strerror(error_number(error) or 0)}.", way)
    return DiskFull(f"{name_limit(error)}: {path} could not be written, with {_free(path)}.", way)


def _free(path: Path) -> str:
    try:
        return f"{format_bytes(free_disk_bytes(path))} free"
    except OSError:  # quotas and dying disks refuse this too
        return "an unknown number of bytes free"


def describe_refusal(error: BaseException) -> QloraError | None:
    """What the system refused, as one sentence; None for an error that is not the system's."""
    number = error_number(error)
    if number not in _OF_FILES | _DISK_FULL or isinstance(error, QloraError):
        return None
    assert number is not None
    name = getattr(error, "filename", None)
    named = f" at {intended(Path(os.fsdecode(name)))}" if isinstance(name, str | bytes) else ""
    if number in _DISK_FULL:
        return DiskFull(f"{name_limit(error)}{named}.", "Free some space and run the command again.")
    return RunError(
        f"The system refused a file operation{named}: {os.strerror(number)}.",
        "Check the disk and the rights there, and run the command again.",
    )


@contextmanager
def reporting_disk_full(path: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turns a full disk inside the block into `DiskFull`, which names what is free, and other refusals into `RunError`.

    Args:
        path: What is written, or where.
        needed_bytes: Of a run's file, after whose failure --resume goes on; None for any other file.
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            if (refusal := describe_refusal(error)) is not None:
                raise refusal from error
            raise
        if needed_bytes is None:
            way = "Free some space, or choose an --output on another disk, and run the command again."
            raise describe_place_refused(error, intended(path), way) from error
        raise DiskFull(
            f"{name_limit(error)}: {format_bytes(needed_bytes)} are needed in {path}, with {_free(path)}; "
            "the checkpoints already written are intact.",
            "Free some space and run the command again with --resume, or choose an --output on another disk.",
        ) from error
