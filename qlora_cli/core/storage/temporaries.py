"""Temporaries of writers that died: told from those of the living, and removed by whoever writes there next.

A temporary's name holds machine, process-id namespace, process and its start, and its writer holds a lock on it. Of a
process of this machine and namespace the table of processes says whether it lives; of another container the lock does;
of another machine, where locks may not reach, only a day without a change counts.
"""

import fcntl
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qlora_cli.artifacts import SWAP, fsync_path, process_name, shortened, temporary_beside

_NAME = re.compile(
    r"\.(?P<name>.+)\.(?P<machine>[0-9a-f]{8})-(?P<space>\d+)-(?P<pid>\d+)-(?P<start>\d+)-[0-9a-f]{8}"
    r"\.(?P<ending>tmp|swap)",
    re.DOTALL,
)
_FORMER_NAME = re.compile(r"\.(?P<name>.+)\.\d+\.(tmp|old)", re.DOTALL)  # of versions that named them by number alone
FORMER_SECONDS = 24 * 3600.0  # untouched for so long, a temporary of a writer that cannot be asked is dead
FRESH_SECONDS = 2.0  # in which a temporary is made and locked
HEAL_SECONDS = 2.0


def is_temporary(name: str) -> bool:
    """Whether a name is one that this program gives to its temporaries."""
    return bool(_NAME.fullmatch(name) or _FORMER_NAME.fullmatch(name))


def intended(path: Path) -> Path:
    """The path with the names of temporaries replaced by those of what they are to become."""
    return Path(*(match["name"] if (match := _NAME.fullmatch(part)) else part for part in path.parts))


@contextmanager
def holding(path: Path) -> Iterator[None]:
    """Locks a temporary for this process, so that others see that its writer lives."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks: age decides there
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def sweep(folder: Path, name: str | None = None) -> None:
    """Removes what dead writers left in a folder, of the target `name` or of all, and ends a swap that one began."""
    with suppress(OSError):
        for path in sorted(folder.iterdir()):
            match = _NAME.fullmatch(path.name) or _FORMER_NAME.fullmatch(path.name)
            if match is None or (name is not None and match["name"] != shortened(name)) or not _is_dead(path, match):
                continue
            with suppress(OSError):
                if not _heal_one(path, match):
                    remove(path)


def sweep_beside(target: Path) -> None:
    """Removes what dead writers of a directory left, beside it or in it: asked also where nothing is to be written."""
    path = Path(os.path.realpath(target))
    sweep(path.parent, path.name)
    sweep(path, path.name)


def heal(target: Path) -> None:
    """Puts back a directory that stood aside when the process that was replacing it died; waits for one that lives."""
    deadline = time.monotonic() + HEAL_SECONDS
    while not os.path.lexists(target) and (aside := _asides(target)):
        for path, match in aside:
            if _is_dead(path, match):
                with suppress(OSError):
                    _heal_one(path, match)
        if time.monotonic() > deadline:
            return
        time.sleep(0.01)


def _asides(target: Path) -> list[tuple[Path, re.Match[str]]]:
    try:
        names = [path.name for path in target.parent.iterdir()]
    except OSError:
        return []
    matches = ((name, _NAME.fullmatch(name)) for name in names if name.endswith(f".{SWAP}"))
    return [(target.with_name(name), m) for name, m in matches if m and m["name"] == shortened(target.name)]


def _heal_one(path: Path, match: re.Match[str]) -> bool:
    """Renames what stood aside to its name if that is free; whether it did."""
    if "ending" not in match.groupdict() or match["ending"] != SWAP:
        return False
    target = path.with_name(match["name"])  # a name that was shortened is healed by none: it is kept all the same
    if os.path.lexists(target):
        return False
    path.rename(target)
    fsync_path(target.parent)
    return True


def remove(path: Path) -> None:
    """Removes a file, a link or a directory."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard(path: Path) -> OSError | None:
    """Removes something so that a kill in between leaves nothing half there under its name.

    Returns:
        Why it could not be removed, or not wholly; what is left of it lies under a temporary's name, and is swept later.
    """
    trash = temporary_beside(path)
    try:
        path.rename(trash)
        fsync_path(path.parent)
        remove(trash)
    except FileNotFoundError:
        return None
    except OSError as error:
        return error
    return None


def _is_dead(path: Path, match: re.Match[str]) -> bool:
    """Whether the writer of a temporary has ended."""
    try:
        facts = path.lstat()
    except OSError:
        return False
    age_seconds = time.time() - facts.st_mtime
    if "pid" not in match.groupdict():
        return age_seconds > FORMER_SECONDS
    own_machine, own_space, own_pid, own_start = process_name().split("-")
    if match["machine"] == own_machine and match["space"] == own_space:
        if (match["pid"], match["start"]) == (own_pid, own_start):
            return False
        return not lives(int(match["pid"]), match["start"])
    if match["machine"] != own_machine:  # or this one before it was started anew
        return age_seconds > FORMER_SECONDS
    return age_seconds > FRESH_SECONDS and (_is_unlocked(path, facts) or age_seconds > FORMER_SECONDS)


def lives(pid: int, start: str) -> bool:
    """Whether a process of this namespace is alive: its number, and the time at which it began."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return fields[19] == start and fields[0] != "Z"
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return False
    except (OSError, IndexError):
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _is_unlocked(path: Path, facts: os.stat_result) -> bool:
    """Whether nobody holds a lock; False too where locks mean nothing."""
    if stat.S_ISLNK(facts.st_mode):
        return True
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return locks_hold(path)
    except OSError:
        return False
    finally:
        os.close(descriptor)


def locks_hold(path: Path) -> bool:
    """Whether a second lock on what this process has locked is refused: some file systems grant every one."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False
