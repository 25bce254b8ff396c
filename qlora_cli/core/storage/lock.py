"""Lock on a directory, held by one process and released when that ends, however it ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_cli.artifacts import LOCK
from qlora_cli.errors import RunError


@contextmanager
def locked(directory: Path, *, output: Path | None = None) -> Iterator[None]:
    """Holds a directory, which is made where it is missing, inside the block.

    Args:
        directory: Keeps the lock in a file of its own, with the number of the process that holds it.
        output: What the user called it, where that is another path.

    Raises:
        RunError: Another process holds it, or it cannot be written.
    """
    named = output or directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunError(f"{named} cannot be written: {error.strerror}.", "Choose another --output.") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
            raise RunError(
                f"Another process{f' ({owner})' if owner else ''} is writing to {named}.",
                "Wait for it to end, or choose another --output.",
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)  # and with it the lock, as when the process is killed
