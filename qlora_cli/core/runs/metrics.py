"""Metrics of a run: `metrics.jsonl`, one JSON object a line, and the picture of the loss."""

import io
import json
import math
import os
from pathlib import Path
from typing import Any

from qlora_cli.artifacts import LOSS_CURVE, METRICS, read_metrics, write_bytes
from qlora_cli.core.runs.report_page import centred_mean
from qlora_cli.core.storage.disk_space import reporting_disk_full
from qlora_cli.errors import RunError
from qlora_cli.events import EvaluationLogged, StepLogged

LINE_BYTES = 300
STEP_FIELDS = ("step", "loss", "learning_rate", "grad_norm", "tokens", "step_seconds", "tokens_per_second")


class MetricsFile:
    """Appends to the metrics of a run directory, each line at once.

    Lines of steps after `last_step`, and a last line cut short, are removed: a resumed run writes them anew.
    """

    def __init__(self, directory: Path, *, last_step: int) -> None:
        self.path = directory / METRICS
        kept = [line for line in read_metrics(directory) if line["step"] <= last_step]
        write_bytes(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self.directory = directory.stat()
        self.stream = self.path.open("a+b", buffering=0)  # nothing is held back, to fail again when it is closed

    def write(self, event: StepLogged | EvaluationLogged) -> None:
        """Appends one event.

        Raises:
            RunError: The run directory was removed, and is here again with the metrics alone; or it cannot be written.
            DiskFull: The line did not fit.
        """
        line = (json.dumps(as_metrics(event), allow_nan=False) + "\n").encode()
        try:
            with reporting_disk_full(self.path.parent, LINE_BYTES):
                removed = self._mend()
                while line:  # a disk with little room takes a part first
                    line = line[self.stream.write(line) :]
        except OSError as error:
            raise RunError(
                f"{self.path} cannot be written: {error.strerror or error}.", "Go on with --resume once it can."
            ) from error
        if removed:
            raise RunError(
                f"{self.path.parent} was removed or replaced while the run wrote to it.",
                "To go on from what is saved there now, type the same command with --resume.",
            )

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
        """Closes the file."""
        self.stream.close()


def _is_same(path: Path, facts: os.stat_result) -> bool:
    """Whether a path still leads to that file or directory."""
    try:
        return os.path.samestat(path.stat(), facts)
    except (FileNotFoundError, NotADirectoryError):
        return False


def as_metrics(event: StepLogged | EvaluationLogged) -> dict[str, Any]:
    """The fields that a line of metrics holds; a number that is not finite is null."""
    names = STEP_FIELDS if isinstance(event, StepLogged) else ("step", "eval_loss", "perplexity")
    values = {name: getattr(event, name) for name in names}
    if isinstance(event, StepLogged):
        values["peak_vram_bytes"] = event.vram.peak_bytes if event.vram else None
        values |= {f"peak_vram_bytes_{rank}": card.peak_bytes for rank, card in enumerate(event.cards) if rank}
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }


def draw_loss_curve(directory: Path) -> None:
    """Draws `loss.png` from the run's metrics: loss of each step, the mean around it, evaluations."""
    from matplotlib.figure import Figure  # takes a second to import, at the end of a run

    lines = read_metrics(directory)
    steps = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    evaluations = [(line["step"], line["eval_loss"]) for line in lines if line.get("eval_loss") is not None]
    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    if steps:
        axes.plot(*zip(*steps, strict=True), color="#9ecae1", linewidth=1, label="step")
        axes.plot(*zip(*centred_mean(steps), strict=True), color="#08519c", linewidth=1.8, label="mean")
    if evaluations:
        axes.plot(*zip(*evaluations, strict=True), "o-", color="#d94801", markersize=4, label="held-out rows")
    axes.set(title="Loss", xlabel="optimizer step", ylabel="nats per token")
    axes.grid(alpha=0.3)
    if steps or evaluations:
        axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_bytes(directory / LOSS_CURVE, picture.getvalue())
