"""Plain view of events, a line each: for logs, pipes and NO_COLOR."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from qlora_cli.cli.units import format_amount, format_duration, format_seconds, format_share
from qlora_cli.events import (
    Caution,
    CheckpointSaved,
    EvaluationLogged,
    Event,
    Notice,
    Progress,
    RunStarted,
    SampleAnswered,
    StepLogged,
    Vram,
)
from qlora_cli.sizes import format_bytes

STEP_LINES = 50  # of a long run; a short one prints every step
QUIET_SECONDS = 30.0  # a step line comes at least this often
TASK_SECONDS = 10.0  # between two lines of one task


def describe_vram(vram: Vram) -> str:
    """Now, peak and total of a card."""
    return (
        f"{format_bytes(vram.now_bytes)} now, {format_bytes(vram.peak_bytes)} peak of {format_bytes(vram.total_bytes)}"
    )


def describe_start(event: RunStarted) -> str:
    """What is trained, where, by which engine."""
    if event.first_step > event.total_steps:
        return f"All {event.total_steps} steps are done already."
    percent = 100 * event.trainable_parameters / event.total_parameters
    return (
        f"Training {event.trainable_parameters:,} of {event.total_parameters:,} parameters ({percent:.3g} %) "
        f"on {event.device}, steps {event.first_step} to {event.total_steps}; engine: {event.engine}."
    )


def describe_sample(event: SampleAnswered) -> str:
    """A sample prompt and its answer, on a line."""
    when = f"step {event.step}" if event.step else "before training"
    return f"{when}: {' '.join(event.prompt.split())} → {' '.join(event.answer.split()) or '(nothing)'}"


@dataclass
class Pace:
    """Where a task stood when its first event came (which holds the warm-up), and when it last had a line."""

    first_seconds: float
    first_done: int
    line_seconds: float

    def per_second(self, done: int, now_seconds: float) -> float:
        """Units a second since the first event."""
        elapsed_seconds = now_seconds - self.first_seconds
        return (done - self.first_done) / elapsed_seconds if elapsed_seconds > 0 else 0.0

    def eta(self, done: int, total: int | None, now_seconds: float) -> list[str]:
        """The time left as the last part of a line; none while it cannot be known, and at the end."""
        per_second = self.per_second(done, now_seconds)
        if total is None or done >= total or per_second <= 0:
            return []
        return [f"ETA {format_duration((total - done) / per_second)}"]


class LineView:
    """Writes each event as at most one line; of a long run's steps about fifty.

    Args:
        stream: Where lines go.
        clock: Seconds that never run backwards.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream = stream
        self.clock = clock
        self._tasks: dict[str, Pace] = {}
        self._steps: Pace | None = None
        self._first_step = 1

    def show(self, event: Event) -> None:
        """Writes what the event has to say, if anything."""
        line = self._line(event)
        if line is not None:
            print(line, file=self.stream, flush=True)

    def close(self) -> None:
        """Nothing is left to draw."""

    def _line(self, event: Event) -> str | None:
        match event:
            case Notice(text):
                return text
            case Caution(text):
                return f"warning: {text}"
            case Progress():
                return self._progress(event)
            case RunStarted():
                self._first_step = event.first_step
                return describe_start(event)
            case StepLogged():
                return self._step(event)
            case EvaluationLogged(step, eval_loss, perplexity):
                return f"step {step}: evaluation loss {eval_loss:.4f}, perplexity {perplexity:.2f}"
            case SampleAnswered():
                return describe_sample(event)
            case CheckpointSaved(step, path, total_bytes, seconds):
                return f"step {step}: checkpoint {path} ({format_bytes(total_bytes)}, {format_seconds(seconds)})"
        return None

    def _progress(self, event: Progress) -> str | None:
        now_seconds = self.clock()
        pace = self._tasks.setdefault(event.task, Pace(now_seconds, 0, now_seconds))
        if event.done == event.total:
            del self._tasks[event.task]
            elapsed_seconds = now_seconds - pace.first_seconds
            if elapsed_seconds < 1:
                return None
            return f"{event.task}: {format_amount(event.done, event.unit)} in {format_seconds(elapsed_seconds)}"
        if now_seconds - pace.line_seconds < TASK_SECONDS:
            return None
        pace.line_seconds = now_seconds
        share = format_share(event.done, event.total, event.unit)
        per_second = pace.per_second(event.done, now_seconds)  # below one the time left says more
        rate = [f"{format_amount(per_second, event.unit)}/s"] if per_second >= 1 else []
        return ", ".join([f"{event.task}: {share}", *rate, *pace.eta(event.done, event.total, now_seconds)])

    def _step(self, event: StepLogged) -> str | None:
        now_seconds = self.clock()
        if self._steps is None:
            self._steps = Pace(now_seconds, event.step, now_seconds)
        stride = max(1, event.total_steps // STEP_LINES)
        wanted = event.step in (self._first_step, event.total_steps) or event.step % stride == 0
        if not wanted and now_seconds - self._steps.line_seconds < QUIET_SECONDS:
            return None
        self._steps.line_seconds = now_seconds
        parts = [
            f"step {event.step}/{event.total_steps}",
            f"loss {event.loss:.4f}",
            f"{event.tokens_per_second:,.0f} tokens/s",
            f"learning rate {event.learning_rate:.2e}",
            f"gradient norm {event.grad_norm:.3g}",
        ]
        if len(event.cards) > 1:
            parts += [f"VRAM {rank}: {describe_vram(card)}" for rank, card in enumerate(event.cards)]
        elif event.vram is not None:
            parts.append(f"VRAM {describe_vram(event.vram)}")
        return " · ".join([*parts, *self._steps.eta(event.step, event.total_steps, now_seconds)])
