"""Reports of a training run, in order: steps, evaluations, checkpoints and notices."""

import sys

from qlora_cli.events import Event, Report, StepLogged


def left_uncompiled() -> str | None:
    """Why the compiler left parts of what it was to compile as they were, in a word; None where it took all, or nothing
    was compiled. It says nothing of it by itself."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    reason = next(iter(dynamo.counters["graph_break"]), None) if dynamo else None
    return reason.strip().splitlines()[0][:200] if reason else None


class RunReporter:
    """Reports events; where `deferred`, a step waits for `flush` or for the event after it.

    Where the device computes by itself, reporting a step is done while it computes the next one.
    """

    def __init__(self, report: Report, *, deferred: bool = False) -> None:
        self._report = report
        self._deferred = deferred
        self._waiting: StepLogged | None = None

    def report(self, event: Event) -> None:
        """Reports an event, after the step that waits."""
        self.flush()
        if isinstance(event, StepLogged) and self._deferred:
            self._waiting = event
        else:
            self._report(event)

    def flush(self) -> None:
        """Reports the step that waits, if one does."""
        event, self._waiting = self._waiting, None
        if event is not None:
            self._report(event)
