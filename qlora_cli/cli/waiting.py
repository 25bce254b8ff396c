"""Sign of life while libraries are imported: the first thing on the screen, before anything heavy is loaded.

On a terminal one line that turns and counts seconds, gone when the libraries are there; in a log a plain line. Neither
needs rich, whose import alone takes half of the time that a first line may take.
"""

import contextlib
import gc
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import TextIO

from qlora_cli.launch import is_silent_rank

FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
TURN_SECONDS = 0.12
ERASE_LINE = "\r\x1b[2K"
LIBRARIES = {  # of each command; what is first is what tells whether they are here already
    "prepare": ("transformers", "pyarrow"),
    "train": ("torch", "transformers", "peft"),
    "merge": ("torch", "transformers", "peft"),
    "generate": ("torch", "transformers", "peft"),
    "inspect": ("torch", "transformers"),
}


def draws_on(stream: object) -> bool:
    """Whether a stream is a terminal on which lines may be redrawn."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return bool(getattr(stream, "isatty", bool)()) and not plain


class FirstSign:
    """The program's name on a terminal, at once: what reads the command line takes a quarter of a second to import."""

    def __init__(self) -> None:
        self._shown = False

    def show(self) -> None:
        """Shows it, unless another rank does."""
        if draws_on(sys.stderr) and not is_silent_rank():
            self._shown = True
            show(sys.stderr, f"\r{FRAMES[0]} qlora")

    def clear(self) -> None:
        """Takes it off the screen; again, or where it was not shown, is nothing."""
        if self._shown:
            self._shown = False
            show(sys.stderr, ERASE_LINE)


FIRST_SIGN = FirstSign()


def show(stream: TextIO, text: str) -> None:
    """Writes a part of a line at once; a stream that takes none is no failure."""
    with contextlib.suppress(OSError, ValueError):
        stream.write(text)
        stream.flush()


class LoadingSign:
    """Says that libraries are being loaded, until it is stopped.

    Args:
        libraries: Their names; nothing is said where the first has been imported before.
        silent: Whether nothing is said at all: another rank does, or --quiet was asked for.
    """

    def __init__(self, libraries: tuple[str, ...], *, silent: bool) -> None:
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._stream = sys.stderr
        if silent or sys.modules.get(libraries[0]) is not None:
            return
        text = f"Loading {' and '.join(filter(None, [', '.join(libraries[:-1]), libraries[-1]]))}"
        if draws_on(self._stream):
            self._thread = threading.Thread(target=self._turn, args=(text,), name="loading", daemon=True)
            self._thread.start()
        else:
            print(f"{text}.", file=self._stream, flush=True)

    def _turn(self, text: str) -> None:
        started, turn = time.monotonic(), 0
        while True:
            seconds = int(time.monotonic() - started)
            show(self._stream, f"\r{FRAMES[turn % len(FRAMES)]} {text} …{f' {seconds} s' if seconds else ''}")
            if self._stopped.wait(TURN_SECONDS):
                return
            turn += 1

    def stop(self) -> None:
        """Takes the sign off the screen; again is nothing."""
        if self._thread is not None:
            self._stopped.set()
            self._thread.join()
            self._thread = None
            show(self._stream, ERASE_LINE)


@contextlib.contextmanager
def loading_sign(libraries: tuple[str, ...] | None, *, silent: bool) -> Iterator[LoadingSign]:
    """A sign that is stopped at the end at the latest; without libraries it says nothing."""
    sign = LoadingSign(libraries or ("sys",), silent=silent or not libraries)
    try:
        yield sign
    finally:
        sign.stop()


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Inside the block, which imports, no garbage is looked for: a tenth of the time, as what libraries define stays."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
