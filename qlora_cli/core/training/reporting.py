"""Reports of a training run, in order: steps, evaluations, checkpoints and notices."""

import re
import sys

from qlora_cli.core.adapters.adapter_facts import base_name
from qlora_cli.core.training.flat_parameters import TrainableParameters
from qlora_cli.events import Event, Report, StepLogged
from qlora_cli.sizes import format_count

LOOKS = 3  # steps: of many experts that are layers of their own the rows of one may not meet each
LISTED = 6  # names in a sentence


def left_uncompiled() -> str | None:
    """Why the compiler left parts of what it was to compile as they were, in a word; None where it took all, or nothing
    was compiled. It says nothing of it by itself."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    reason = next(iter(dynamo.counters["graph_break"]), None) if dynamo else None
    return reason.strip().splitlines()[0][:200] if reason else None


class UntrainedAdapters:
    """Adapters that no gradient reaches: what they are on is not run, or only chooses (an indexer's attended tokens)."""

    def __init__(self, parameters: TrainableParameters) -> None:
        self._parameters = parameters
        self._found = {base_name(name) for names in parameters.layout() for name in names}  # those without one so far
        self._steps = 0  # looked at

    def look(self, *, last: bool) -> str | None:
        """What there is to say of them after the backward pass of one more step, of a run's `last` one at the latest.

        Waits for the device in the first step, and where some have no gradient then in `LOOKS`; said once.
        """
        if not self._found:
            return None
        silent = set(self._parameters.without_gradient())
        reached = {base_name(name) for names in self._parameters.layout() for name in names if name not in silent}
        self._found -= reached
        self._steps += 1
        if not self._found or (self._steps < LOOKS and not last):
            return None
        kinds = sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in self._found})
        named = ", ".join(kinds[:LISTED]) + (", …" if len(kinds) > LISTED else "")
        count, self._found = len(self._found), set()
        they_are, them = ("it is", "it") if count == 1 else ("they are", "them")
        text = f"{format_count(count, 'adapter')} ({named}) got no gradient in {format_count(self._steps, 'step')}"
        return f"{text}: {they_are} not trained. --exclude-modules leaves {them} out."


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
