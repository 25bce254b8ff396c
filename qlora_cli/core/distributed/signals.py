"""Stop request: a signal sets a flag that the trainer reads between batches, so that the step is finished and saved.

Every signal that would end the process and can be caught is one: schedulers announce the end of a job by SIGTERM, SIGUSR1
or SIGXCPU, a terminal that closes by SIGHUP. What was ignored when training began stays so, as under nohup.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from qlora_cli.interrupts import end_at_once

AGAIN_SECONDS = 0.5  # between two Ctrl-C that are typed; what reaches the group and is passed on too comes sooner
FAULTS = ("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGSYS", "SIGABRT", "SIGTRAP", "SIGSTKFLT")  # of the process itself
HARMLESS = (
    *("SIGKILL", "SIGSTOP"),  # cannot be caught
    *("SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGCHLD", "SIGCONT", "SIGURG", "SIGWINCH", "SIGINFO"),  # end no process
)


class StopRequest:
    """Which signal asked the run to stop, if any; None until then."""

    signal_number: int | None = None


def ending_signals() -> list[int]:
    """Signals that would end this process, that can be caught, and that nobody handles or ignores."""
    spared = {getattr(signal, name, None) for name in (*FAULTS, *HARMLESS)}
    ours = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # for which a program has handlers of its own

    def ends(number: int) -> bool:
        handler = signal.getsignal(number)
        return handler == signal.SIG_DFL or (number in ours and callable(handler))

    return [number for number in sorted(signal.valid_signals() - spared) if ends(number)]


@contextmanager
def stopping_on_signals(*, again_seconds: float = AGAIN_SECONDS) -> Iterator[StopRequest]:
    """The first signal inside the block is noted; a second Ctrl-C ends the process at once with 130.

    Any other repetition is the same request: a scheduler may signal a process, its group and its launcher, which passes
    it on.

    Args:
        again_seconds: A SIGINT counts as typed again when it comes so long after the first one.
    """
    request = StopRequest()
    typed: float | None = None

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal typed
        if number == signal.SIGINT:
            now = time.monotonic()
            if typed is not None and now - typed >= again_seconds:
                end_at_once(128 + number)  # the last good checkpoint is on the disk already
            typed = now if typed is None else typed
        request.signal_number = request.signal_number or number

    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may set handlers; whoever runs the loop elsewhere stops it elsewhere
        return
    previous = {number: signal.signal(number, note) for number in ending_signals()}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
