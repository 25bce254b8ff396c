"""Trackers of a run: TensorBoard, Weights & Biases, MLflow or trackio, by way of accelerate.

Standard output is for results: while a tracker runs, whatever it or a process of its own writes there goes to standard
error.
"""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import asdict

from accelerate import Accelerator

from qlora_cli.artifacts import METRICS
from qlora_cli.config import TrainConfig
from qlora_cli.core.runs.metrics import MetricsFile, as_metrics
from qlora_cli.errors import Interrupted, UsageError, first_line
from qlora_cli.events import Caution, EvaluationLogged, Event, Report, SampleAnswered, StepLogged

PROJECT = "qlora"
SOURCE = {"mlflow.source.name": "qlora"}  # else it would be a path
FINISH_SECONDS = 20.0  # that a tracker has to send what it still holds
HINTS = {
    "wandb": "Type: wandb login. Or set WANDB_MODE=offline, or leave --report-to out.",
    "mlflow": "Set MLFLOW_TRACKING_URI to a server that answers, or a folder; or leave --report-to out.",
}


@contextmanager
def output_to_stderr() -> Iterator[None]:
    """Inside the block what is written to standard output, also by its descriptor, goes to standard error."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    kept = None
    with suppress(OSError):  # one of them is closed
        kept = os.dup(1)
        os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if kept is not None:
            os.dup2(kept, 1)
            os.close(kept)


@contextmanager
def closing_tracker(accelerator: Accelerator, report: Report) -> Iterator[None]:
    """Closes the tracker at the end, and the process group unless others may be waiting in it."""
    with output_to_stderr() if accelerator.log_with else nullcontext():
        try:
            yield
        except Interrupted:
            _finish(accelerator, report)
            accelerator.end_training()
            raise
        except BaseException:
            _finish(accelerator, report)
            raise
        _finish(accelerator, report)
        accelerator.end_training()


def _finish(accelerator: Accelerator, report: Report) -> None:
    """Closes the tracker; one that fails, or takes longer than the time it has, is left to itself."""
    failures: list[Exception] = []

    def finish() -> None:
        try:
            for tracker in accelerator.trackers:
                tracker.finish()
        except Exception as error:
            failures.append(error)

    if accelerator.trackers:
        thread = threading.Thread(target=finish, name="tracker", daemon=True)
        thread.start()
        thread.join(FINISH_SECONDS)
        if failures or thread.is_alive():
            why = first_line(failures[0]) if failures else f"it takes longer than {FINISH_SECONDS:.0f} s"
            report(Caution(f"The tracker could not be closed: {why}. All numbers are in {METRICS}."))
        accelerator.trackers.clear()


def start_tracker(config: TrainConfig, accelerator: Accelerator) -> None:
    """Starts the tracker that was asked for.

    Raises:
        UsageError: It cannot start, as where nobody is logged in.
    """
    # Numbers and choices only: no path of this machine leaves it.
    shared = {name: value for name, value in asdict(config).items() if isinstance(value, int | float)}
    try:
        accelerator.init_trackers(PROJECT, config=shared, init_kwargs={"mlflow": {"tags": SOURCE}})
    except Exception as error:
        accelerator.trackers.clear()  # what never started has nothing to finish, and would fail again
        name = config.report_to or ""
        raise UsageError(
            f"The tracker {name} cannot start: {first_line(error)}",
            HINTS.get(name, "Set it up, or leave --report-to out."),
        ) from error


def logging_report(report: Report, metrics: MetricsFile, accelerator: Accelerator) -> Report:
    """`report`, but steps and evaluations are written to the metrics first, and to the tracker that was started, if any.

    A tracker that fails is left out from then on: it must not end the run.
    """

    def log(event: Event) -> None:
        if isinstance(event, StepLogged | EvaluationLogged | SampleAnswered):
            metrics.write(event)
            if accelerator.trackers and not isinstance(event, SampleAnswered):
                line = as_metrics(event)
                step = line.pop("step")
                try:
                    accelerator.log({name: value for name, value in line.items() if value is not None}, step=step)
                except Exception as error:
                    accelerator.trackers.clear()
                    text = f"The tracker failed at step {step} and is left out from here on: {first_line(error)}."
                    report(Caution(f"{text} All numbers are in {METRICS}."))
        report(event)

    return log
