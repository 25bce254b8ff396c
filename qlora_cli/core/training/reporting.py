"""Reports of a training run, in order: steps, evaluations, checkpoints and notices."""

from qlora_cli.events import Event, Report, StepLogged


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
