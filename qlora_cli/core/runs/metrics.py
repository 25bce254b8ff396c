"""Metrics of a run: `metrics.jsonl`, one JSON object a line, and the picture of the loss."""

import io
import json
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_cli.artifacts import LOSS_CURVE, METRICS, read_metrics, write_bytes
from qlora_cli.core.runs.report_page import Point, centred_mean, column
from qlora_cli.core.storage.disk_space import reporting_disk_full
from qlora_cli.errors import RunError
from qlora_cli.events import EvaluationLogged, SampleAnswered, StepLogged

LINE_BYTES = 300
FIELDS: dict[type, tuple[str, ...]] = {
    StepLogged: ("step", "loss", "learning_rate", "grad_norm", "tokens", "step_seconds", "tokens_per_second"),
    EvaluationLogged: ("step", "eval_loss", "perplexity"),
    SampleAnswered: ("step", "prompt", "answer"),
}


class MetricsFile:
    """Appends to the metrics of a run directory, each line at once.

    Lines of steps after `last_step`, and a last line cut short, are removed: a resumed run writes them anew. What could
    not be written is written by the next call that can, at the latest when the file is closed: the state after its step
    may be saved meanwhile, and then no resumed run takes that step again.
    """

    def __init__(self, directory: Path, *, last_step: int) -> None:
        self.path = directory / METRICS
        kept = [line for line in read_metrics(directory) if line["step"] <= last_step]
        write_bytes(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self.directory = directory.stat()
        self.stream = self.path.open("a+b", buffering=0)
        self.unwritten = b""

    def write(self, event: StepLogged | EvaluationLogged | SampleAnswered) -> None:
        """Appends one event.

        Raises:
            RunError: The run directory was removed, and is here again with the metrics alone; or it cannot be written.
            DiskFull: The line did not fit.
        """
        self.unwritten += (json.dumps(as_metrics(event), allow_nan=False) + "\n").encode()
        try:
            with reporting_disk_full(self.path.parent, LINE_BYTES):
                removed = self._write()
        except OSError as error:
            raise RunError(
                f"{self.path} cannot be written: {error.strerror or error}.", "Go on with --resume once it can."
            ) from error
        if removed:
            raise RunError(
                f"{self.path.parent} was removed or replaced while the run wrote to it.",
                "To go on from what is saved there now, type the same command with --resume.",
            )

    def _write(self) -> bool:
        """Writes what is unwritten; whether the directory was removed or replaced."""
        removed = self._mend()
        while self.unwritten:  # a disk with little room takes a part first
            self.unwritten = self.unwritten[self.stream.write(self.unwritten) :]
        return removed

    def _mend(self) -> bool:
        """Opens the file anew where it was removed or replaced; whether the directory was, in which case the run ends.

        The open file still holds the lines written so far.
        """
        if _is_same(self.path, os.fstat(self.stream.fileno())):
            return False
        removed = not _is_same(self.path.parent, self.directory)
        content = b""
        if not self.path.parent.exists() or (not removed and not self.path.exists()):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.stream.seek(0)
            content = self.stream.readall()
        if content or not removed:
            self.stream.close()
            self.stream = self.path.open("a+b", buffering=0)
            self.stream.write(content)
        return removed

    def close(self) -> None:
        """Closes the file. What still cannot be written was said when it failed first."""
        with suppress(OSError):
            self._write()
        self.stream.close()


def _is_same(path: Path, facts: os.stat_result) -> bool:
    """Whether a path still leads to that file or directory."""
    try:
        return os.path.samestat(path.stat(), facts)
    except (FileNotFoundError, NotADirectoryError):
        return False


def as_metrics(event: StepLogged | EvaluationLogged | SampleAnswered) -> dict[str, Any]:
    """The fields that a line of metrics holds; a number that is not finite is null."""
    names = FIELDS[type(event)]
    values = {name: getattr(event, name) for name in names}
    if isinstance(event, StepLogged):
        values["peak_vram_bytes"] = event.vram.peak_bytes if event.vram else None
        values |= {f"peak_vram_bytes_{rank}": card.peak_bytes for rank, card in enumerate(event.cards) if rank}
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }


@dataclass(frozen=True)
class Losses:
    """Losses of one run, in nats a trained token, each as (step, loss) in order."""

    steps: list[Point]
    mean: list[Point]  # centred, over a twentieth of the steps on either side
    held_out: list[Point]


def read_losses(lines: Sequence[Mapping[str, Any]]) -> Losses:
    """The losses in the lines of a run's metrics."""
    steps = column(lines, "loss")
    return Losses(steps, centred_mean(steps), column(lines, "eval_loss"))


def draw_losses(runs: Mapping[str, Losses], *, title: str, kind: str = "png") -> bytes:
    """A picture of losses over steps: the centred mean of each run, its held-out rows, and of a single one every step.

    Args:
        runs: By name, which is not shown where there is one.
        title: Stands above.
        kind: png, svg or pdf.
    """
    import matplotlib  # takes a second to import, at the end of a run
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    title = textwrap.fill(title, 90)
    # A layout found by trying, and `savefig`, which draws everything twice, take three times as long.
    figure = Figure(figsize=(8, 4.5), dpi=110)
    axes = figure.add_axes((0.12, 0.12, 0.86, 0.83 - 0.04 * title.count("\n")))
    alone = len(runs) == 1
    for name, losses in runs.items():
        colour: Any = "#08519c" if alone else None
        if losses.steps and alone:
            axes.plot(*zip(*losses.steps, strict=True), color="#9ecae1", linewidth=1, label="step")
        if losses.mean:
            (line,) = axes.plot(
                *zip(*losses.mean, strict=True), color=colour, linewidth=1.8, label="mean" if alone else name
            )
            colour = line.get_color()
        if losses.held_out:
            axes.plot(
                *zip(*losses.held_out, strict=True),
                "o-" if alone else "o--",
                color="#d94801" if alone else colour,
                markersize=4,
                label="held-out rows" if alone else f"{name}, held-out rows",
            )
    axes.set(xlabel="optimizer step", ylabel="nats per token")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False)
    picture = io.BytesIO()
    with matplotlib.rc_context({"text.parse_math": False}):  # a dollar in a name is none of TeX's
        if kind == "png":
            FigureCanvasAgg(figure).print_png(picture)
        else:
            figure.savefig(picture, format=kind)
    return picture.getvalue()


def draw_loss_curve(directory: Path, *, title: str) -> None:
    """Draws `loss.png` from the run's metrics: loss of each step, the mean around it, evaluations."""
    losses = read_losses(read_metrics(directory))
    write_bytes(directory / LOSS_CURVE, draw_losses({"": losses}, title=title))
