"""Files of a directory that are opened once: what was verified is what is read, whatever happens to their names."""

import hashlib
import os
import stat
from pathlib import Path

from qlora_cli.errors import CheckpointError

_READ_BYTES = 8 * 2**20


class VerifiedFolder:
    """Regular files below one directory, each open from the first look at it until this object is gone.

    Args:
        path: The directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptors: dict[str, int] = {}
        self._expected: dict[str, tuple[int, str]] = {}

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files; what is read later is opened, and compared, again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def check(self, name: str, size_bytes: int, sha256: str) -> None:
        """Compares a file with its size and SHA-256 (hexadecimal); `read` compares it again.

        Raises:
            CheckpointError: It is missing, a link, of another size, changed, or cannot be read, as a clause.
        """
        try:
            descriptor = self._open(name)
            found_bytes = os.fstat(descriptor).st_size
            if found_bytes != size_bytes:
                raise CheckpointError(f"{name} has {found_bytes:,} bytes instead of {size_bytes:,}")
            hashed, done = hashlib.sha256(), 0
            while part := os.pread(descriptor, _READ_BYTES, done):
                hashed.update(part)
                done += len(part)
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read ({error.strerror})") from error
        if hashed.hexdigest() != sha256:
            raise CheckpointError(f"{name} was changed: its SHA-256 is not the recorded one")
        self._expected[name] = size_bytes, sha256

    def read(self, name: str) -> bytes:
        """The content of a file, as `check` saw it if that was called.

        Raises:
            CheckpointError: As `check`.
        """
        try:
            descriptor = self._open(name)
            content = bytearray()
            while part := os.pread(descriptor, _READ_BYTES, len(content)):
                content += part
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read ({error.strerror})") from error
        if name in self._expected and (len(content), hashlib.sha256(content).hexdigest()) != self._expected[name]:
            raise CheckpointError(f"{name} was changed while it was read")
        return bytes(content)

    def _open(self, name: str) -> int:
        """The descriptor of a file; links are not followed, and a pipe is not waited for."""
        if name in self._descriptors:
            return self._descriptors[name]
        path = self.path / name
        if path.is_symlink():
            raise CheckpointError(f"{name} is a link, not a regular file")
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            raise CheckpointError(f"{name} is missing") from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise CheckpointError(f"{name} is not a regular file")
        self._descriptors[name] = descriptor
        return descriptor
