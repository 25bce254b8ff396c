"""Live view of events on a terminal: bars for tasks, and a panel for the run with its loss curve."""

import contextlib
import math
import sys
import termios

from rich.console import Console, ConsoleOptions, ConsoleRenderable, Group, RenderableType, RenderResult
from rich.control import Control
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as ProgressBars
from rich.segment import ControlType, Segment
from rich.table import Column
from rich.text import Text

from qlora_cli.cli.line_view import describe_sample, describe_start
from qlora_cli.cli.screens.curve import chart
from qlora_cli.cli.units import format_amount, format_duration, format_seconds
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
)
from qlora_cli.sizes import format_bytes

CURVE_LINES = 5  # of the loss


def echo_control_keys(shown: bool) -> None:
    """Whether the terminal of stdin shows a Ctrl-C as ^C."""
    _switch_terminal(termios.ECHOCTL, shown)


def echo_typing(shown: bool) -> None:
    """Whether the terminal of stdin shows what is typed: not while an answer is written, of which it would seem a part.

    What was typed meanwhile is kept, and is the next line that is read.
    """
    _switch_terminal(termios.ECHO, shown)


def _switch_terminal(flag: int, on: bool) -> None:
    if not sys.stdin.isatty():
        return
    with contextlib.suppress(termios.error, OSError):  # the terminal has closed
        settings = termios.tcgetattr(sys.stdin)
        settings[3] = settings[3] | flag if on else settings[3] & ~flag
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, settings)


class Figures(ProgressColumn):
    """Percent, amount, rate and time left of a task; of a run, which has no unit, percent, time taken and time left."""

    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        figures = [f"{task.percentage:3.0f} %"] if task.total else []
        figures.append(format_amount(task.completed, unit) if unit else format_duration(task.elapsed or 0))
        if unit and task.speed and task.speed >= 1:  # below it, the time left says more
            figures.append(f"{format_amount(task.speed, unit)}/s")
        if task.time_remaining is not None:
            figures.append(f"ETA {format_duration(task.time_remaining)}")
        return Text("  ".join(figures))


def make_bars(*columns: ProgressColumn) -> ProgressBars:
    """Bars with figures behind them; the rate is the mean of the last thousand events, however slow they are."""
    bar = BarColumn(None, table_column=Column(ratio=1))
    figures = Figures(Column(no_wrap=True, justify="right"))
    return ProgressBars(*columns, bar, figures, expand=True, speed_estimate_period=math.inf)


def live_view() -> "LiveView":
    """One on standard error."""
    return LiveView(Console(stderr=True))


class Frame(Live):
    """rich's live display that takes back the whole of its last frame where the terminal has become narrower since.

    The terminal has broken lines that are longer than it is wide by then, and the frame takes more than were drawn.

    Args:
        view: What is drawn.
        console: Where to.
    """

    def __init__(self, view: "LiveView", console: Console) -> None:
        super().__init__(view, console=console, refresh_per_second=4)
        self._view = view

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """What is drawn next, behind what takes the last frame back."""
        width = self.console.width
        broken = sum((columns - 1) // width for columns in self._view.drawn_columns if columns)
        back = Control(*[(ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)] * broken)
        return [back, *super().process_renderables(renderables)]


class LiveView:
    """Draws the state that the events leave behind, four times a second; notices scroll by above it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live: Live | None = None
        self._tasks = make_bars(TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)))
        self._run = make_bars()
        self._step: StepLogged | None = None
        self._losses: list[float] = []
        self._evaluation: EvaluationLogged | None = None
        self._checkpoint: CheckpointSaved | None = None
        self.drawn_columns: list[int] = []  # of each line of the last frame

    def show(self, event: Event) -> None:
        """Takes one event into the view."""
        match event:
            case Notice(text):
                self.console.print(Text("• ", "cyan") + Text(text))
            case Caution(text):
                self.console.print(Text("! ", "bold yellow") + Text(text, "yellow"))
            case RunStarted():
                self.console.print(Text("• ", "cyan") + Text(describe_start(event)))
            case SampleAnswered():
                self.console.print(Text("? ", "magenta") + Text(describe_sample(event)))
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
        for task_id in self._tasks.task_ids:
            self._tasks.remove_task(task_id)
        if self._live is not None:
            self._live.stop()
            self._live = None
            echo_control_keys(True)
        self._step = None

    def _open(self) -> None:
        if self._live is None:
            self.drawn_columns = []
            self._live = Frame(self, self.console)
            self._live.start()
            echo_control_keys(False)  # a ^C at the end of a full line would break the frame

    def _follow_task(self, event: Progress) -> None:
        task = next((task for task in self._tasks.tasks if task.description == event.task), None)
        if task is None:
            self._tasks.add_task(event.task, total=event.total, unit=event.unit)
            task = self._tasks.tasks[-1]
        self._tasks.update(task.id, completed=event.done, total=event.total)
        self._open()
        if event.done != event.total:
            return
        self._tasks.remove_task(task.id)
        seconds = task.elapsed or 0.0
        if seconds >= 1:
            amount = format_amount(event.done, event.unit)
            self.console.print(Text("✓ ", "green") + Text(f"{event.task}: {amount} in {format_seconds(seconds)}"))
        if not self._tasks.tasks and self._step is None:
            self.close()

    def _follow_step(self, event: StepLogged) -> None:
        if not self._run.tasks:
            self._run.add_task("", total=event.total_steps, completed=event.step - 1, unit=None)
        self._run.update(self._run.task_ids[0], completed=event.step)
        self._step = event
        self._losses.append(event.loss)
        self._open()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        parts: list[RenderableType] = [self._tasks] if self._tasks.tasks else []
        if self._step is not None:
            parts.append(self._draw_run(self._step, options.max_width))
        lines = console.render_lines(Group(*parts), options, pad=False)
        self.drawn_columns = [Segment.get_line_length(line) for line in lines[: options.size.height]]
        for line in lines:
            yield from (*line, Segment.line())

    def _draw_run(self, step: StepLogged, width: int) -> RenderableType:
        lines: list[RenderableType] = [
            self._run,
            _facts(
                ("loss", f"{step.loss:.4f}"),
                ("tokens/s", f"{step.tokens_per_second:,.0f}"),
                ("learning rate", f"{step.learning_rate:.2e}"),
                ("gradient norm", f"{step.grad_norm:.3g}"),
            ),
        ]
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
            lines += [Text(line, "cyan") for line in chart(self._losses, width - 4, CURVE_LINES)]
        title = f"step {step.step} of {step.total_steps} · epoch {step.epoch:.2f}"
        return Panel(Group(*lines), title=title, title_align="left", border_style="dim")


def _facts(*pairs: tuple[str, str]) -> Text:
    """Names dim, values bold, on one line."""
    line = Text()
    for name, value in pairs:
        line.append("   " if line else "").append(f"{name} ", "dim").append(value, "bold")
    return line
