"""File read by position that has to stay as it is: held in memory where it is small, else watched for changes.

No memory map: of a file that somebody truncates, a map ends the process with SIGBUS, and of one that somebody rewrites
it gives other bytes than were verified.
"""

import mmap
import os
from io import FileIO
from pathlib import Path

from qlora_cli.errors import RunError


class StableFile:
    """A file opened once.

    Args:
        path: Where it is; what happens to its name later is no matter.
        most_bytes: Up to which it is held in memory, so that nothing done to it changes what is read.

    Raises:
        OSError: It cannot be opened or read.
    """

    def __init__(self, path: Path, most_bytes: float) -> None:
        self._path = path
        self._stream = FileIO(path)
        self._facts = self._look()
        self.size_bytes = self._facts[0]
        self._content: bytes | None = None
        if self.size_bytes <= most_bytes:
            with self._stream:
                self._content = self._stream.readall()

    def _look(self) -> tuple[int, int]:
        facts = os.fstat(self._stream.fileno())
        return facts.st_size, facts.st_mtime_ns

    def view(self) -> memoryview:
        """All of it, to find what lies where; mapped where it is not in memory, for as long as the view is held."""
        if self._content is not None or not self.size_bytes:
            return memoryview(self._content or b"")
        return memoryview(mmap.mmap(self._stream.fileno(), 0, access=mmap.ACCESS_READ))

    def read(self, start: int, count: int) -> bytes | memoryview:
        """`count` bytes from position `start`; from several threads at once if need be.

        Raises:
            RunError: It was changed since it was opened, or cannot be read.
        """
        if self._content is not None:
            return memoryview(self._content)[start : start + count]
        content = bytearray()
        try:
            while len(content) < count:
                part = os.pread(self._stream.fileno(), count - len(content), start + len(content))
                if not part:
                    break
                content += part
            unchanged = self._look() == self._facts
        except OSError as error:
            raise RunError(f"{self._path} cannot be read: {error.strerror}.", "Look after the disk.") from error
        if len(content) < count or not unchanged:
            raise RunError(
                f"{self._path} was changed while it was in use.",
                "Leave it as it is, and go on with the former content.",
            )
        return bytes(content)
