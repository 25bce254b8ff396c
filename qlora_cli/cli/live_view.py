"""Live view of events on a terminal: bars for tasks, and a panel for the run with its loss curve."""

import itertools
import sys
import termios
import time

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qlora_cli.cli.line_view import describe_start
from qlora_cli.cli.units import Pace, format_amount, format_duration, format_seconds
from qlora_cli.events import (
    Caution,
    CheckpointSaved,
    EvaluationLogged,
    Event,
    Notice,
    Progress,
    RunStarted,
    StepLogged,
)
from qlora_cli.sizes import format_bytes

BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: list[float], width: int) -> str:
    """A curve of at most `width` block characters; each is the mean of its share of the values."""
    width = min(width, len(values))
    if width == 0:
        return ""
    bounds = [len(values) * i // width for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(bounds)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)


def echo_control_keys(shown: bool) -> None:
    """Whether the terminal of stdin shows a Ctrl-C as ^C."""
    if not sys.stdin.isatty():
        return
    settings = termios.tcgetattr(sys.stdin)
    settings[3] = settings[3] | termios.ECHOCTL if shown else settings[3] & ~termios.ECHOCTL
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, settings)


class LiveView:
    """Draws the state that the events leave behind, four times a second; notices scroll by above it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live: Live | None = None
        self._tasks: dict[str, tuple[Progress, Pace]] = {}
        self._steps: Pace | None = None
        self._step: StepLogged | None = None
        self._losses: list[float] = []
        self._evaluation: EvaluationLogged | None = None
        self._checkpoint: CheckpointSaved | None = None

    def show(self, event: Event) -> None:
        """Takes one event into the view."""
        match event:
            case Notice(text):
                self.console.print(Text("• ", "cyan") + Text(text))
            case Caution(text):
                self.console.print(Text("! ", "bold yellow") + Text(text, "yellow"))
            case RunStarted():
                self.console.print(Text("• ", "cyan") + Text(describe_start(event)))
            case Progress():
                self._follow_task(event)
            case StepLogged():
                self._follow_step(event)
            case EvaluationLogged():
                self._evaluation = event
            case CheckpointSaved():
                self._checkpoint = event

    def close(self) -> None:
        """Draws the last state and leaves it on the screen."""
        self._tasks.clear()
        if self._live is not None:
            self._live.stop()
            self._live = None
            echo_control_keys(True)
        self._step = None

    def _open(self) -> None:
        if self._live is None:
            self._live = Live(self, console=self.console, refresh_per_second=4)
            self._live.start()
            echo_control_keys(False)  # a ^C at the end of a full line would break the frame

    def _follow_task(self, event: Progress) -> None:
        now_seconds = time.monotonic()
        pace = self._tasks[event.task][1] if event.task in self._tasks else Pace(0, now_seconds)
        pace.mark(event.done, now_seconds)
        self._tasks[event.task] = event, pace
        self._open()
        if event.done != event.total:
            return
        del self._tasks[event.task]
        elapsed_seconds = now_seconds - pace.started_seconds
        if elapsed_seconds >= 1:
            amount = format_amount(event.done, event.unit)
            self.console.print(
                Text("✓ ", "green") + Text(f"{event.task}: {amount} in {format_seconds(elapsed_seconds)}")
            )
        if not self._tasks and self._step is None:
            self.close()

    def _follow_step(self, event: StepLogged) -> None:
        if self._steps is None:
            self._steps = Pace(event.step)
        self._steps.mark(event.step)
        self._step = event
        self._losses.append(event.loss)
        self._open()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        tasks = list(self._tasks.values())
        if tasks:
            yield self._draw_tasks(tasks)
        if self._step is not None:
            yield self._draw_run(self._step, options.max_width)

    def _draw_tasks(self, tasks: list[tuple[Progress, Pace]]) -> RenderableType:
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True, justify="right")
        for event, pace in tasks:
            facts = format_amount(event.done, event.unit)
            if event.total:
                facts = f"{100 * event.done / event.total:3.0f} %  {facts}"
            if pace.per_second > 0:
                facts += f"  {format_amount(pace.per_second, event.unit)}/s"
            left_seconds = pace.left_seconds(event.total)
            if left_seconds is not None:
                facts += f"  ETA {format_duration(left_seconds)}"
            bar = ProgressBar(total=event.total, completed=event.done, pulse=event.total is None)
            grid.add_row(event.task, bar, facts)
        return grid

    def _draw_run(self, step: StepLogged, width: int) -> RenderableType:
        elapsed_seconds = time.monotonic() - self._steps.started_seconds if self._steps else 0.0
        left_seconds = self._steps.left_seconds(step.total_steps) if self._steps else None
        clock = f"{100 * step.step / step.total_steps:3.0f} %  {format_duration(elapsed_seconds)}"
        clock += f"  ETA {format_duration(left_seconds)}" if left_seconds is not None else ""
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        bar.add_row(ProgressBar(total=step.total_steps, completed=step.step), clock)

        lines: list[RenderableType] = [bar]
        lines.append(
            _facts(
                ("loss", f"{step.loss:.4f}"),
                ("tokens/s", f"{step.tokens_per_second:,.0f}"),
                ("learning rate", f"{step.learning_rate:.2e}"),
                ("gradient norm", f"{step.grad_norm:.3g}"),
            )
        )
        for rank, card in enumerate(step.cards or filter(None, [step.vram])):
            lines.append(
                _facts(
                    (f"VRAM {rank} now" if len(step.cards) > 1 else "VRAM now", format_bytes(card.now_bytes)),
                    ("peak", format_bytes(card.peak_bytes)),
                    ("total", format_bytes(card.total_bytes)),
                )
            )
        if self._evaluation is not None:
            lines.append(
                _facts(
                    ("evaluation loss", f"{self._evaluation.eval_loss:.4f}"),
                    ("perplexity", f"{self._evaluation.perplexity:.2f}"),
                    ("at step", str(self._evaluation.step)),
                )
            )
        if self._checkpoint is not None:
            lines.append(_facts(("checkpoint at step", str(self._checkpoint.step)), ("in", self._checkpoint.path)))
        if len(self._losses) > 1:
            lines.append(Text(sparkline(self._losses, width - 4), "cyan"))
        title = f"step {step.step} of {step.total_steps} · epoch {step.epoch:.2f}"
        return Panel(Group(*lines), title=title, title_align="left", border_style="dim")


def _facts(*pairs: tuple[str, str]) -> Text:
    """Names dim, values bold, on one line."""
    line = Text()
    for name, value in pairs:
        line.append("   " if line else "").append(f"{name} ", "dim").append(value, "bold")
    return line
