"""Reports of a training run, in order: steps, evaluations, checkpoints and notices."""

from collections.abc import Callable

from qlora_cli.events import EvaluationLogged, Event, Report, StepLogged


class RunReporter:
    """Reports events and logs steps and evaluations; a step may wait for the next one to be launched.

    Args:
        report: Receives every event.
        log: Receives each step and evaluation before `report` does.
        deferred: Whether a step waits for `flush`, or for the event after it: where the device computes by itself,
            reporting is done while it does.
    """

    def __init__(
        self, report: Report, log: Callable[[StepLogged | EvaluationLogged], None], *, deferred: bool = False
    ) -> None:
        self.log = log
        self._report = report
        self._deferred = deferred
        self._waiting: StepLogged | None = None

    def report(self, event: Event) -> None:
        """Reports an event, after the step that waits."""
        self.flush()
        if isinstance(event, StepLogged) and self._deferred:
            self._waiting = event
        else:
            self._send(event)

    def flush(self) -> None:
        """Reports the step that waits, if one does."""
        event, self._waiting = self._waiting, None
        if event is not None:
            self._send(event)

    def _send(self, event: Event) -> None:
        if isinstance(event, StepLogged | EvaluationLogged):
            self.log(event)
        self._report(event)
