"""Publication of a directory: at every instant the old one or the new one stands under its name, whole.

Two names are exchanged in one step where kernel and file system can (renameat2 of Linux). Elsewhere the old one steps
aside and the new one takes its place; who dies between the two renames is healed by the next that reads or writes there.
"""

import ctypes
import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from qlora_cli.artifacts import MARK, SWAP, fsync_path, temporary_beside
from qlora_cli.core.storage.ownership import LAST_FILE, Place, read_mark, write_mark
from qlora_cli.core.storage.temporaries import holding, remove, sweep
from qlora_cli.errors import RunError

_AT_FDCWD = -100
_NO_REPLACE, _EXCHANGE = 1, 2  # of renameat2(2)
_UNABLE = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV, errno.ENOTTY}


@contextmanager
def atomic_directory(target: Place | Path) -> Iterator[Path]:
    """Yields a temporary directory beside `target` that takes its place when the block succeeds.

    Every file is flushed before the exchange and the parent after it. On any failure nothing is left behind and what
    stood there is untouched; only finished work that may not be published any more is kept beside it.

    Args:
        target: As `may_replace` found it; or a path of our own below a directory of our own, replaced unasked.

    Raises:
        RunError: Something came to stand there meanwhile that may not be replaced.
    """
    path, home = (target.path, target.home) if isinstance(target, Place) else (target, target.parent)
    home.mkdir(parents=True, exist_ok=True)
    sweep(home, path.name)
    temporary = temporary_beside(home / path.name)
    temporary.mkdir()
    try:
        with holding(temporary):
            yield temporary
            publish(temporary, target)
    except BaseException:
        with suppress(OSError):
            remove(temporary)
        raise


def publish(directory: Path, target: Place | Path) -> None:
    """Flushes a finished directory to the disk, marks it as ours, and puts it in the place of what stands at `target`.

    Raises:
        RunError: What stands there now may not be replaced: the directory is kept under another name.
    """
    if isinstance(target, Place):
        write_mark(directory, target.kind)
        flush_tree(directory)
        try:
            target.confirm()
            if target.moved_into:
                _move_into(directory, target)
            else:
                _swap(directory, target.path)
        except (RunError, FileExistsError) as error:
            kept = target.home / f"{target.path.name[:200]}.new-{secrets.token_hex(4)}"
            directory.rename(kept)
            reason = error.message if isinstance(error, RunError) else f"{target.path} was made meanwhile."
            raise RunError(f"{reason} What was made is in {kept}.", "Move it where you want it.") from error
        return
    flush_tree(directory)
    while True:  # another process may be publishing the same: whichever comes last stays
        with suppress(FileExistsError, FileNotFoundError):
            _swap(directory, target)
            return
        if not directory.exists():
            raise RunError(f"{target.parent} was removed while {target.name} was being written.")


def flush_tree(directory: Path) -> None:
    """Flushes every file and folder to the disk, each with the rights that the user's umask leaves.

    Libraries make some of theirs for the owner alone, whatever the umask.
    """
    mask = _umask()
    for folder, _, names in os.walk(directory):
        for name in names:
            path = Path(folder) / name
            if not path.is_symlink():
                _set_mode(path, mask)
                fsync_path(path)
        fsync_path(Path(folder))


def _set_mode(path: Path, mask: int) -> None:
    """Gives a file that we made the rights that a umask leaves."""
    wanted = 0o666 & ~mask
    if path.stat().st_mode & 0o777 != wanted:
        path.chmod(wanted)


def exchange(first: Path, second: Path) -> bool:
    """Swaps two names in one step; False, with nothing done, where kernel or file system cannot."""
    return _rename_with(first, second, _EXCHANGE)


def _swap(directory: Path, target: Path) -> None:
    """Puts a directory where `target` is; what was there lies under the temporary's name after it, and is removed."""
    if not os.path.lexists(target):
        if not _rename_with(directory, target, _NO_REPLACE):
            directory.rename(target)  # which fails where a directory with files was made meanwhile
        fsync_path(target.parent)
        return
    if exchange(directory, target):
        fsync_path(target.parent)
        superfluous = directory
    else:
        superfluous = temporary_beside(target, SWAP)
        target.rename(superfluous)
        try:
            directory.rename(target)
        except BaseException:
            superfluous.rename(target)
            raise
        fsync_path(target.parent)
    with suppress(OSError):  # the next writer sweeps what could not be removed
        remove(superfluous)


def _move_into(directory: Path, place: Place) -> None:
    """Moves files one by one into an empty directory: the mark first, by which all are ours, what makes it whole last."""
    if (mark := read_mark(place.path)) is not None:  # an earlier attempt that was killed
        for path in (place.path / name for name in mark.files or ()):
            # No path outside, nor one behind a link, whoever wrote it.
            if path.parent.resolve().is_relative_to(place.path):
                path.unlink(missing_ok=True)
    last = (LAST_FILE[place.kind], "config.json")
    for path in sorted(directory.iterdir(), key=lambda path: (path.name != MARK, path.name in last, path.name)):
        path.rename(place.path / path.name)
    fsync_path(place.path)
    directory.rmdir()


def _rename_with(source: Path, target: Path, flag: int) -> bool:
    call = _renameat2()
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNABLE:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


@cache
def _renameat2() -> Any | None:
    """The C library's function, which Python does not offer; None where there is none."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
        function.restype = ctypes.c_int
    return function


def _umask() -> int:
    """The process's umask, read without setting it where the system tells, as other threads may be making files."""
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
