"""Writer of planned files: several threads, a digest of each file in a journal, resumed after an interruption.

A file counts as finished when its bytes are flushed and its digest stands in the journal; a later call with the same
key keeps every finished file whose digest still holds.
"""

import hashlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from qlora_cli.artifacts import fsync_path, read_json, write_json
from qlora_cli.core.merge.plan import MergeTask, OutputFile
from qlora_cli.core.storage.safetensors_file import TensorFile, bytes_of
from qlora_cli.errors import ModelError, RunError
from qlora_cli.events import Progress, Report

JOURNAL = ".journal.json"
READ_BYTES = 8 * 2**20
REPORT_SECONDS = 0.1
MOST_WORKERS = 16
MOST_GPU_WORKERS = 4


def choose_workers(files: tuple[OutputFile, ...], allowed_bytes: int, device: torch.device) -> int:
    """Threads that may work at once: as many as there are cores, and as hold at most `allowed_bytes` together.

    On a GPU four keep it busy, and each holds a weight there.
    """
    largest = max((task.held_bytes for file in files for task in file.tasks), default=1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = MOST_WORKERS if device.type == "cpu" else MOST_GPU_WORKERS
    return max(1, min(cores, most, allowed_bytes // max(1, largest)))


def write_files(files: tuple[OutputFile, ...], directory: Path, *, key: str, workers: int, report: Report) -> list[str]:
    """Writes every planned file, flushed to the disk.

    A directory with a journal of the same `key`, a digest of everything the contents depend on, is continued.

    Returns:
        Names of the files that were finished before and are kept.

    Raises:
        QloraError: From the work itself.
        OSError: The disk is full, or fails.
    """
    journal_path = directory / JOURNAL
    journal = _read_journal(journal_path, key)
    progress = _Progress(sum(file.header.total_bytes for file in files), report)
    threads = torch.get_num_threads()
    kept = []
    flushing: list[Future[None]] = []

    def finish(name: str, descriptor: int, digest: str) -> None:
        """Flushes and closes one file, through the descriptor that reports every error, and journals it."""
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        fsync_path(directory)
        journal["files"][name] = digest
        write_json(journal_path, journal)

    # One thread a tensor beats one tensor over all threads: blocks fit a core's cache, and reading, hashing and
    # writing overlap with arithmetic.
    torch.set_num_threads(1)
    try:
        with (
            ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
            ThreadPoolExecutor(1) as flusher,
        ):
            for file in files:
                path = directory / file.name
                recorded = journal["files"].get(file.name)
                if recorded and path.is_file() and digest_file(path, pool) == recorded:
                    kept.append(file.name)
                    progress.add(file.header.total_bytes)
                else:
                    # The next file is begun while the disk takes this one.
                    flushing.append(flusher.submit(finish, file.name, *_write_file(file, path, pool, progress)))
                progress.report()
                for future in flushing[:-1]:
                    future.result()
            for future in flushing:
                future.result()
    finally:
        torch.set_num_threads(threads)
    return kept


def _read_journal(path: Path, key: str) -> dict[str, Any]:
    with suppress(RunError):  # none, or torn by a crash: nothing in it can be trusted, so all is made anew
        content = read_json(path)
        if isinstance(content, dict) and isinstance(content.get("files"), dict) and content.get("key") == key:
            return content
    return {"key": key, "files": {}}


def _write_file(file: OutputFile, path: Path, pool: ThreadPoolExecutor, progress: "_Progress") -> tuple[int, str]:
    """The descriptor of the file, all of it written but not flushed, and its digest."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    digests: dict[str, bytes] = {}
    stop = threading.Event()
    futures: list[Future[None]] = []
    try:
        _write_all(descriptor, memoryview(file.header.content), 0)
        progress.add(len(file.header.content))
        futures += [pool.submit(_run_task, t, file, descriptor, digests, progress, stop) for t in file.tasks]
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=REPORT_SECONDS, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            progress.report()
    except BaseException:
        stop.set()
        for future in futures:
            future.cancel()
        wait(futures)
        os.close(descriptor)
        raise
    return descriptor, _combine(file.header.content, (digests[name] for name in file.header.entries))


def _run_task(
    task: MergeTask,
    file: OutputFile,
    descriptor: int,
    digests: dict[str, bytes],
    progress: "_Progress",
    stop: threading.Event,
) -> None:
    hashes, positions = {}, {}
    for name, chunk in task.run():
        if stop.is_set():
            return
        content = bytes_of(chunk)
        if name not in hashes:
            hashes[name], positions[name] = hashlib.sha256(), file.header.entries[name].start
        hashes[name].update(content)
        _write_all(descriptor, content, positions[name])
        positions[name] += len(content)
        progress.add(len(content))
    for name, position in positions.items():
        entry = file.header.entries[name]
        if hasattr(os, "posix_fadvise"):  # the disk writes from now on, not only once much has gathered
            os.posix_fadvise(descriptor, entry.start, entry.total_bytes, os.POSIX_FADV_DONTNEED)
        if position != entry.start + entry.total_bytes:
            raise AssertionError(f"{name}: {position - entry.start} bytes made, {entry.total_bytes} planned")
        digests[name] = hashes[name].digest()


def _write_all(descriptor: int, content: memoryview, start: int) -> None:
    done = 0
    while done < len(content):
        done += os.pwrite(descriptor, content[done:], start + done)


def _combine(header: bytes, digests: Iterator[bytes]) -> str:
    """One digest of a file from those of its parts, which are hashed side by side."""
    whole = hashlib.sha256(header)
    for digest in digests:
        whole.update(digest)
    return whole.hexdigest()


def digest_file(path: Path, pool: ThreadPoolExecutor) -> str | None:
    """The digest `write_files` records for a file, read back from the disk; None where it is not even safetensors."""
    try:
        file = TensorFile(path)
    except ModelError:
        return None
    with file:

        def digest(name: str) -> bytes:
            entry, whole = file.entries[name], hashlib.sha256()
            for start in range(0, entry.total_bytes, READ_BYTES):
                buffer = torch.empty(min(READ_BYTES, entry.total_bytes - start), dtype=torch.uint8)
                file.read_into(buffer, entry.start + start)
                whole.update(bytes_of(buffer))
            return whole.digest()

        return _combine(file.header.content, pool.map(digest, file.entries))


class _Progress:
    """Bytes done, added to by any thread and reported by one."""

    def __init__(self, total_bytes: int, report: Report) -> None:
        self._total, self._report = total_bytes, report
        self._done, self._reported, self._lock = 0, -1, threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count

    def report(self) -> None:
        if self._done != self._reported:
            self._reported = self._done
            self._report(Progress("Merging", self._reported, self._total, unit="bytes"))
