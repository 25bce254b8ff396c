"""Ctrl-C, SIGTERM and SIGHUP at any moment: one line, 128 + the signal's number, and no traceback.

While modules are imported, a signal ends the process at once: nothing is being written then, and a KeyboardInterrupt in an
import is swallowed, ends the process by abort(), or comes out of a library as a RecursionError or ModuleNotFoundError. While
a command works, it is raised, so that what is half written is removed; where a module happens to be imported then, it is
raised after that. Training has handlers of its own, which save.
"""

import atexit
import contextlib
import os
import signal
import termios
import threading
import time
from collections.abc import Iterator
from types import FrameType

from qlora_cli.launch import is_silent_rank

SHOW_CURSOR = b"\x1b[?25h\n"  # a live view hides it, and leaving at once skips what would bring it back
IMPORT_SECONDS = 0.05  # after which a signal that came in an import is tried again
AGAIN_SECONDS = 0.3  # a second Ctrl-C counts as typed when it comes so long after the first
SENTENCE = "Interrupted."
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Terminated(BaseException):
    """SIGTERM or SIGHUP came; unlike KeyboardInterrupt it ends a conversation too."""


class _State:
    """What this process does, and what came."""

    loading = True
    number: int | None = None  # of the signal that came
    seconds = 0.0  # when it did
    sent_again = False  # by ourselves, as it came in an import


def install() -> None:
    """Sets the handlers; what is ignored, as SIGHUP under nohup, stays so. Forked children have the defaults."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _note)
    os.register_at_fork(after_in_child=_forget)
    atexit.register(_ignore)


def _ignore() -> None:
    """A Ctrl-C while the interpreter takes itself down changes nothing: all is said, and the exit code stands."""
    if signal.getsignal(signal.SIGINT) is _note:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _forget() -> None:
    for number in SIGNALS:
        if signal.getsignal(number) is _note:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _note(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    sent_again, _State.sent_again = _State.sent_again, False
    again = _State.number is not None and not sent_again
    if _State.loading or (again and number == signal.SIGINT and now - _State.seconds >= AGAIN_SECONDS):
        end_at_once(128 + number, "" if is_silent_rank() else f"error: {SENTENCE}\n")
    if again:
        return
    _State.number, _State.seconds = number, _State.seconds if sent_again else now
    if _imports(frame):
        timer = threading.Timer(IMPORT_SECONDS, _send_again, (number,))
        timer.daemon = True
        timer.start()
        return
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def _imports(frame: FrameType | None) -> bool:
    """Whether a module is being imported where the signal came."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _send_again(number: int) -> None:
    _State.sent_again = True
    os.kill(os.getpid(), number)


@contextlib.contextmanager
def working() -> Iterator[None]:
    """Inside the block a signal is raised: what is half written has to be removed."""
    before, _State.loading = _State.loading, False
    try:
        yield
    finally:
        _State.loading = before


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Inside the block, which imports, a signal ends the process at once."""
    before, _State.loading = _State.loading, True
    try:
        yield
    finally:
        _State.loading = before


def take_signal() -> int | None:
    """The number of the signal that came, if one did; from here on it counts as dealt with."""
    number, _State.number = _State.number, None
    return number


def end_at_once(code: int, words: str = "") -> None:
    """Ends the process with an exit code; no buffer is flushed, no handler runs, other threads stop where they are.

    `words` go to standard error, where it can be written.
    """
    if os.isatty(0):
        with contextlib.suppress(termios.error, OSError):
            settings = termios.tcgetattr(0)
            settings[3] |= termios.ECHO | termios.ECHOCTL  # which a conversation and a live view turn off
            termios.tcsetattr(0, termios.TCSADRAIN, settings)
    with contextlib.suppress(OSError):
        os.write(2, (SHOW_CURSOR if os.isatty(2) else b"") + words.encode(errors="replace"))
    os._exit(code)
