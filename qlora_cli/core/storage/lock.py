"""Locks of a directory or a file, held by one process and released when that ends, however it ends.

The system's lock is asked first. Some file systems know none, and some grant every one: the holder therefore writes into
the lock who it is, and touches it while it lives. Of a process of this machine the table of processes says whether it
lives, of any other the time of the last touch.
"""

import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qlora_cli.artifacts import LOCK, process_name, shortened
from qlora_cli.core.storage.disk_space import is_disk_full
from qlora_cli.core.storage.temporaries import lives, locks_hold
from qlora_cli.errors import DiskFull, RunError
from qlora_cli.events import Notice, Report, report_nothing

_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF}
TOUCH_SECONDS = 30.0
LOST_SECONDS = 120.0  # without a touch, a holder on another machine has ended


@contextmanager
def locked(directory: Path, *, output: Path | None = None, report: Report = report_nothing) -> Iterator[None]:
    """Holds a directory, which is made where it is missing, inside the block.

    Args:
        directory: Keeps the lock in a file of its own, with the number of the process that holds it.
        output: What the user called it, where that is another path.
        report: Is told where the file system has no locks.

    Raises:
        RunError: Another process holds it, or it cannot be written.
        DiskFull: There is no room for the lock.
    """
    named = output or directory
    with _naming(named):
        directory.mkdir(parents=True, exist_ok=True)
    descriptor = _hold(directory / LOCK, named, report)
    with _touching(descriptor):
        yield


@contextmanager
def locked_file(path: Path, *, report: Report = report_nothing) -> Iterator[None]:
    """Holds a file, which need not exist yet, inside the block, by a hidden one beside it that is removed at the end.

    Raises:
        RunError: As `locked`.
        DiskFull: As `locked`.
    """
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{shortened(path.name)}.lock")
    while True:
        descriptor = _hold(lock, path, report)
        with suppress(FileNotFoundError):
            if lock.stat().st_ino == os.fstat(descriptor).st_ino:
                break
        os.close(descriptor)  # the former holder removed it meanwhile
    with _touching(descriptor):
        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink()


def find_holder(directory: Path) -> int | None:
    """The other process of this machine that holds a directory; None where none does, or that cannot be told."""
    try:
        # Whatever a directory of somebody else's holds: no link is followed, and no pipe waited for.
        descriptor = os.open(directory / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            owner = _written_owner(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        return None
    here = _process_here(owner[-1]) if owner else None
    return here[0] if here is not None and here != _process_here(process_name()) and lives(*here) else None


def require_unheld(directory: Path) -> None:
    """Raises RunError where another process of this machine holds a directory: said before the work, and before it is held."""
    if (holder := find_holder(directory)) is not None:
        raise _held([str(holder)], directory)


def _hold(path: Path, named: Path, report: Report) -> int:
    """The descriptor of a lock that this process holds."""
    with _naming(named):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with _naming(named):
            certain = _lock(descriptor, path, named, report)
            owner = _written_owner(descriptor)
            if owner and not certain and _owner_lives(descriptor, owner[-1]):
                raise _held(owner, named)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} {process_name()}\n".encode(), 0)
            if not certain and (found := _written_owner(descriptor)) != [str(os.getpid()), process_name()]:
                raise _held(found, named)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _lock(descriptor: int, path: Path, named: Path, report: Report) -> bool:
    """Takes the system's lock; whether that excludes others for certain."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _held(_written_owner(descriptor), named) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        report(Notice(f"The file system of {named} has no locks: start nothing else that writes there."))
        return False
    owner = _written_owner(descriptor)
    same_machine = not owner or owner[-1].split("-")[0] == process_name().split("-")[0]
    return same_machine and locks_hold(path)


def _written_owner(descriptor: int) -> list[str]:
    """What stands in a lock: number and name of the process that holds it; nothing where none does."""
    return os.pread(descriptor, 200, 0).decode(errors="replace").split()


def _owner_lives(descriptor: int, name: str) -> bool:
    """Whether the process that wrote its name into a lock, and did not take it out again, is alive."""
    if (here := _process_here(name)) is not None:
        return here != _process_here(process_name()) and lives(*here)
    touched = os.fstat(descriptor).st_mtime
    os.utime(descriptor)  # by the clock of whoever keeps the file, as all touches are
    return name.count("-") >= 3 and os.fstat(descriptor).st_mtime - touched < LOST_SECONDS


def _process_here(name: str) -> tuple[int, str] | None:
    """Number and start of the process that a name is of, if the table of processes here is the one that knows it."""
    place, *process = name.rsplit("-", 2)
    if place != process_name().rsplit("-", 2)[0] or not process[0].isdecimal():
        return None
    return int(process[0]), process[1]


def _held(owner: list[str], named: Path) -> RunError:
    return RunError(
        f"Another process{f' ({owner[0]})' if owner else ''} is writing to {named}.",
        "Wait for it to end, or choose another --output.",
    )


@contextmanager
def _touching(descriptor: int) -> Iterator[None]:
    """Touches a lock while the block runs; then the holder's name is taken out and the lock released."""
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(TOUCH_SECONDS):
            with suppress(OSError):
                os.utime(descriptor)

    toucher = threading.Thread(target=touch, name="lock", daemon=True)
    toucher.start()
    try:
        yield
    finally:
        ended.set()
        toucher.join()
        with suppress(OSError):
            os.ftruncate(descriptor, 0)
        os.close(descriptor)  # and with it the lock, as when the process is killed


@contextmanager
def _naming(named: Path) -> Iterator[None]:
    """Errors of the system as sentences about what the user named."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise DiskFull(
                f"The disk is full: {named} cannot be written.", "Free some space, and try again."
            ) from error
        raise RunError(f"{named} cannot be written: {error.strerror}.", "Choose another --output.") from error
