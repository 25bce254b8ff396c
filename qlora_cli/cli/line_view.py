"""Plain view of events, a line each: for logs, pipes and NO_COLOR."""

import time
from typing import TextIO

from qlora_cli.cli.units import Pace, format_amount, format_duration, format_seconds, format_share
from qlora_cli.events import (
    Caution,
    CheckpointSaved,
    EvaluationLogged,
    Event,
    Notice,
    Progress,
    RunStarted,
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


class LineView:
    """Writes each event as at most one line; of a long run's steps about fifty."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._tasks: dict[str, Pace] = {}
        self._task_line_seconds: dict[str, float] = {}
        self._steps: Pace | None = None
        self._step_line_seconds = 0.0
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
            case CheckpointSaved(step, path, total_bytes, seconds):
                return f"step {step}: checkpoint {path} ({format_bytes(total_bytes)}, {format_seconds(seconds)})"
        return None

    def _progress(self, event: Progress) -> str | None:
        now_seconds = time.monotonic()
        pace = self._tasks.setdefault(event.task, Pace(0, now_seconds))
        pace.mark(event.done, now_seconds)
        elapsed_seconds = now_seconds - pace.started_seconds
        if event.done == event.total:
            del self._tasks[event.task]
            self._task_line_seconds.pop(event.task, None)
            if elapsed_seconds < 1:
                return None
            return f"{event.task}: {format_amount(event.done, event.unit)} in {format_seconds(elapsed_seconds)}"
        if now_seconds - self._task_line_seconds.get(event.task, pace.started_seconds) < TASK_SECONDS:
            return None
        self._task_line_seconds[event.task] = now_seconds
        line = f"{event.task}: {format_share(event.done, event.total, event.unit)}"
        line += f", {format_amount(pace.per_second, event.unit)}/s"
        left_seconds = pace.left_seconds(event.total)
        return line if left_seconds is None else f"{line}, ETA {format_duration(left_seconds)}"

    def _step(self, event: StepLogged) -> str | None:
        now_seconds = time.monotonic()
        if self._steps is None:
            self._steps = Pace(event.step, now_seconds)
        self._steps.mark(event.step, now_seconds)
        stride = max(1, event.total_steps // STEP_LINES)
        wanted = event.step in (self._first_step, event.total_steps) or event.step % stride == 0
        if not wanted and now_seconds - self._step_line_seconds < QUIET_SECONDS:
            return None
        self._step_line_seconds = now_seconds
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
        left_seconds = self._steps.left_seconds(event.total_steps)
        if left_seconds:
            parts.append(f"ETA {format_duration(left_seconds)}")
        return " · ".join(parts)
