"""Standard streams that never end the work: what cannot be written is dropped, and the exit code says so afterwards.

A reader of standard error may go away, its terminal close, the disk of its log fill up or its pipe stay full. None of this
is a reason to lose a run of many hours, nor is it for a library that prints.
"""

import contextlib
import errno
import io
import os
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO, cast

from qlora_cli.errors import QloraError, UsageError

FULL_PIPE_SECONDS = 0.2  # that one write waits for the reader of a pipe that does not block
RETRY_SECONDS = 5.0  # between attempts once several have failed: a disk that has room again is written to again
FAILURES_IN_A_ROW = 3
BUFFERED_BYTES = 2**13


class UnwrittenOutput(QloraError):
    """Results could not be written to standard output: exit code 74, or 141 without a word where nobody reads them."""

    exit_code = 74  # EX_IOERR of sysexits.h

    def __init__(self, failure: OSError) -> None:
        super().__init__(
            f"Standard output cannot be written: {failure.strerror or failure}.",
            "What the command wrote to its --output stands.",
        )
        if failure.errno == errno.EPIPE:
            self.exit_code = 128 + signal.SIGPIPE  # as a shell has it of a program whose reader has gone
            self.reported = True


class TolerantStream(io.TextIOBase):
    """Text to a file descriptor; a write that fails is dropped and never raises.

    Args:
        stream: The stream that it takes the place of.
        by_line: Whether a line is written as soon as it is whole; else when `flush` is called or a buffer is full.
    """

    def __init__(self, stream: TextIO, *, by_line: bool) -> None:
        super().__init__()
        with contextlib.suppress(OSError):
            stream.flush()
        self._descriptor = stream.fileno()
        self._terminal = stream.isatty()
        self._encoding = stream.encoding or "utf-8"
        self._by_line = by_line or self._terminal
        self._waiting = b""
        self._failures = 0  # in a row
        self._retry_at = 0.0
        self.failure: OSError | None = None  # the first one

    encoding = property(lambda self: self._encoding)
    errors = property(lambda self: "backslashreplace")

    def fileno(self) -> int:
        """The descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self._terminal

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, text: str) -> int:
        """Writes text, now or with the line it belongs to."""
        self._waiting += text.encode(self._encoding, "backslashreplace")
        if (self._by_line and "\n" in text) or len(self._waiting) > BUFFERED_BYTES:
            self.flush()
        return len(text)

    def flush(self) -> None:
        """Writes what waits, or drops it."""
        waiting, self._waiting = self._waiting, b""
        if not waiting or (self._failures >= FAILURES_IN_A_ROW and time.monotonic() < self._retry_at):
            return
        try:
            _write(self._descriptor, waiting)
            self._failures = 0
        except OSError as error:
            self.failure = self.failure or error
            self._failures += 1
            self._retry_at = time.monotonic() + RETRY_SECONDS


def _write(descriptor: int, content: bytes) -> None:
    deadline = time.monotonic() + FULL_PIPE_SECONDS
    while content:
        try:
            content = content[os.write(descriptor, content) :]
        except BlockingIOError:
            left = deadline - time.monotonic()
            if left <= 0:
                raise
            with contextlib.suppress(OSError, ValueError):
                select.select([], [descriptor], [], left)


def open_standard_descriptors() -> None:
    """Opens those of the descriptors 0, 1 and 2 that are closed as /dev/null.

    Else the next file opened, such as a checkpoint, gets the number, and whatever a library prints is written into it.
    What is read and is no UTF-8 comes as in arguments, and is named where it is used.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError as error:
            if error.errno != errno.EBADF:
                continue
            os.open(os.devnull, os.O_RDONLY if descriptor == 0 else os.O_WRONLY)  # gets the lowest number that is free
            opened = open(descriptor, "r" if descriptor == 0 else "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, opened)
    if isinstance(sys.stdin, io.TextIOWrapper):
        with contextlib.suppress(io.UnsupportedOperation):  # something has been read from it
            sys.stdin.reconfigure(errors="surrogateescape")


@contextlib.contextmanager
def tolerant_streams() -> Iterator[TolerantStream | None]:
    """Inside the block standard output and error never raise. Yields the one for results, which remembers a failure.

    A stream without a descriptor, as a test puts in place, stays as it is. One that failed is not put back: what ends the
    interpreter writes to it too.
    """
    output, error = sys.stdout, sys.stderr
    results = _tolerant(output, by_line=False)
    messages = _tolerant(error, by_line=True)
    sys.stdout, sys.stderr = results or output, messages or error
    try:
        yield results
    finally:
        for stream in (results, messages):
            if stream is not None:
                stream.flush()
        if results is None or results.failure is None:
            sys.stdout = output
        if messages is None or messages.failure is None:
            sys.stderr = error


def _tolerant(stream: TextIO, *, by_line: bool) -> TolerantStream | None:
    try:
        return TolerantStream(stream, by_line=by_line)
    except (OSError, ValueError, AttributeError):
        return None


class TimedLog(io.TextIOBase):
    """Lines appended to a file, each with the time; a full disk ends no work.

    Args:
        path: Of the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        if path.is_file() and not _is_log(path):
            raise UsageError(
                f"{path} holds something else than a log, and is left as it is.", "Give --log-file another name."
            )
        self._stream = path.open("a", encoding="utf-8", errors="backslashreplace")

    def write(self, text: str) -> int:
        """Writes a line, or a part of one."""
        with contextlib.suppress(OSError):
            self._stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}" if text.strip() else text)
            self._stream.flush()
        return len(text)

    def close(self) -> None:
        """Closes the file."""
        with contextlib.suppress(OSError):
            self._stream.close()
        super().close()


def _is_log(path: Path) -> bool:
    """Whether a file is empty or begins as a `TimedLog` writes, and not the data or a model's settings, say."""
    with path.open("rb") as stream:
        begun = stream.read(64).lstrip()
    return not begun or re.match(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", begun) is not None


@contextlib.contextmanager
def open_log(path: Path | None) -> Iterator[TextIO | None]:
    """The file of --log-file, open for appending; None without one.

    Raises:
        UsageError: It cannot be opened, or holds something else than a log.
    """
    if path is None:
        yield None
        return
    try:
        log = TimedLog(path.expanduser())
    except OSError as error:
        raise UsageError(
            f"The log file {path} cannot be opened: {error.strerror}.",
            "Give --log-file a file in a directory that is there.",
        ) from error
    with contextlib.closing(log):
        yield cast(TextIO, log)
