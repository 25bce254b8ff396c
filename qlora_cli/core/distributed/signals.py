"""Stop request: SIGINT and SIGTERM set a flag that the trainer reads between batches, so that the step is finished and saved."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SHOW_CURSOR = b"\x1b[?25h\n"  # a live view hides it, and leaving at once skips what would bring it back


class StopRequest:
    """Which signal asked the run to stop, if any; None until then."""

    signal_number: int | None = None


@contextmanager
def stopping_on_signals() -> Iterator[StopRequest]:
    """The first signal inside the block is noted; a second ends the process at once with 128 + its number."""
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        if request.signal_number is not None:
            if sys.stderr.isatty():
                os.write(sys.stderr.fileno(), SHOW_CURSOR)
            os._exit(128 + number)  # nothing is flushed: the last good checkpoint is on the disk already
        request.signal_number = number

    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may set handlers; whoever runs the loop elsewhere stops it elsewhere
        return
    previous = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
