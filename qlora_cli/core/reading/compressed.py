"""Compressed files: gzip, Zstandard, bzip2 and xz, opened as streams that never give more at once than was asked for.

A few bytes may open up to gigabytes. So nothing is opened as a whole, and what a format's own dictionary takes is limited.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

BLOCK_BYTES = 2**16  # of compressed data read at once
DICTIONARY_BYTES = 2**28  # most that xz may take; its strongest preset needs 65 MiB (Zstandard's own limit is 128 MiB)
ERRORS = (EOFError, zlib.error, lzma.LZMAError, OSError)


class _Decompressed(io.RawIOBase):
    """One stream after another, as `cat` joins compressed files; zeros behind them are padding."""

    def __init__(self, file: Any, start: Callable[[], Any]) -> None:
        """`start` makes a decompressor of the standard library's kind."""
        self._file, self._start = file, start
        self._decompressor: Any = None

    def readable(self) -> bool:
        """It can be read and nothing else."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer; less only at the end, or where what follows is broken."""
        filled = 0
        while filled < len(buffer):
            try:
                data = self._next(len(buffer) - filled)
            except EOFError:
                if filled:
                    break
                raise
            if not data:
                break
            buffer[filled : filled + len(data)] = data
            filled += len(data)
        return filled

    def _next(self, most_bytes: int) -> bytes:
        """The next bytes; none at the end."""
        while True:
            block = b""
            if self._decompressor is None or self._decompressor.eof:
                block = (self._decompressor.unused_data if self._decompressor else b"").lstrip(b"\0")
                while not block:
                    if not (block := self._file.read(BLOCK_BYTES)):
                        return b""
                    block = block.lstrip(b"\0")
                self._decompressor = self._start()
            elif self._decompressor.needs_input and not (block := self._file.read(BLOCK_BYTES)):
                raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            if data := self._decompressor.decompress(block, most_bytes):
                return bytes(data)


def _open_xz(file: Any) -> Any:
    return _Decompressed(file, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=DICTIONARY_BYTES))


# Not pyarrow for gzip: it refuses members that are padded with zeros, as files read back from tapes are.
DECOMPRESS: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".zst": lambda file: pa.input_stream(file, compression="zstd"),
    ".bz2": lambda file: _Decompressed(file, bz2.BZ2Decompressor),
    ".xz": _open_xz,
}
_BEGINS = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\0"}
_SKIPPED_FRAME = b"*M\x18"  # bytes 2 to 4 of a frame that holds something else than data and may stand before it


def problem_of_name(path: Path, head: bytes) -> str | None:
    """What is wrong where a file's name and its first bytes disagree on how it is compressed; None if they agree.

    Args:
        path: The file.
        head: Its first bytes, as they lie on disk.
    """
    suffix = path.suffix.lower()
    found = next((name for name, begins in _BEGINS.items() if head.startswith(begins)), None)
    if suffix in DECOMPRESS:
        if not head or suffix == found or (suffix == ".zst" and head[1:4] == _SKIPPED_FRAME):
            return None
        right = path.with_suffix("").name + (found or "")
        return f"the file is named {suffix} but is {f'of the kind {found}' if found else 'not compressed'}; rename it {right}"
    return f"the file is compressed; rename it {path.name}{found}" if found else None
