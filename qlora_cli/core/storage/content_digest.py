"""Digests of large files: SHA-256 of all their bytes, taken again only where the system says that a file was written to.

What was found is kept below the cache with the file's inode, size and times. An edit in place changes the last of them,
the change of the inode, which no program sets at will.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from os import stat_result
from pathlib import Path
from threading import Event, Lock
from typing import Any

from qlora_cli.artifacts import cache_root, write_json
from qlora_cli.core.storage.temporaries import sweep
from qlora_cli.core.untrusted import is_ours
from qlora_cli.errors import RunError
from qlora_cli.events import Progress, Report

PIECE_BYTES = 2**22  # hashed at once, so that a thread can be stopped and progress be told
THREADS = 8  # a core takes 0.75 GB/s, so that four would hold up a disk of 7 GB/s
SAID_BYTES = 2**30  # of which reading takes a second or more
SETTLED_NS = 2 * 10**9  # that file systems count times in, at most: a change within them may not show


def content_digests(paths: Sequence[Path], report: Report) -> list[str]:
    """SHA-256 of each file in hexadecimal; those that are not known are read, several at once.

    Raises:
        RunError: A file was written to while it was read.
    """
    sweep(_directory())
    found = [_known_digest(path) for path in paths]
    unknown = [path for path, digest in zip(paths, found, strict=True) if digest is None]
    if unknown:
        read = iter(_read_all(unknown, report))
        found = [digest or next(read) for digest in found]
    return [digest for digest in found if digest is not None]


def _known_digest(path: Path) -> str | None:
    """What was found of a file that has surely not been written to since; None where that is not known."""
    kept = _kept(path)
    is_same = kept is not None and kept["stamp"] == _stamp(path.stat()) and kept["settled"] is True
    return kept["sha256"] if kept is not None and is_same else None


def was_written_since(path: Path) -> bool:
    """Whether a digest of the file was kept and the file has been written to since."""
    kept = _kept(path)
    return kept is not None and kept["stamp"] != _stamp(path.stat())


def _keep(path: Path, digest: str, status: stat_result, begun_ns: int) -> None:
    """Keeps what was found of a file that was as `status` says before it was read, from `begun_ns` on, and after.

    A cache that takes no files costs time only.
    """
    record = _record(path)
    settled = begun_ns - max(status.st_mtime_ns, status.st_ctime_ns) > SETTLED_NS
    facts = {"file": str(path.resolve()), "stamp": _stamp(status), "settled": settled, "sha256": digest}
    with suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, facts)


def _directory() -> Path:
    return cache_root() / "digests"


def _record(path: Path) -> Path:
    name = hashlib.sha256(str(path.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return _directory() / f"{name}.json"


def _stamp(status: stat_result) -> list[int]:
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _kept(path: Path) -> dict[str, Any] | None:
    """What is kept of a file; nothing that another user may have written."""
    record = _record(path)
    try:
        kept = json.loads(record.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    is_whole = (
        isinstance(kept, dict) and {"stamp", "settled", "sha256"} <= kept.keys() and isinstance(kept["sha256"], str)
    )
    return kept if is_whole and is_ours(record) and is_ours(record.parent) else None


def _read_all(paths: Sequence[Path], report: Report) -> list[str]:
    total_bytes = sum(path.stat().st_size for path in paths)
    done_bytes, lock, stopped = 0, Lock(), Event()

    def count(read_bytes: int) -> None:
        nonlocal done_bytes
        with lock:
            done_bytes += read_bytes
            if total_bytes >= SAID_BYTES:
                report(Progress("Checking the weights", min(done_bytes, total_bytes - 1), total_bytes, "bytes"))

    def read(path: Path) -> str:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(PIECE_BYTES))
        begun_ns, before = time.time_ns(), path.stat()
        with path.open("rb", buffering=0) as stream:
            while not stopped.is_set() and (length := stream.readinto(buffer)):
                digest.update(buffer[:length])
                count(length)
        if _stamp(path.stat()) != _stamp(before):
            raise RunError(f"{path} was written to while it was read.", "Run the command again once it is finished.")
        if not stopped.is_set():
            _keep(path, digest.hexdigest(), before, begun_ns)
        return digest.hexdigest()

    with ThreadPoolExecutor(min(THREADS, len(paths))) as pool:
        try:
            found = list(pool.map(read, paths))
        finally:
            stopped.set()  # after an error or Ctrl-C the others end with the piece they have in hand
    if total_bytes >= SAID_BYTES:
        report(Progress("Checking the weights", total_bytes, total_bytes, "bytes"))
    return found
