"""Steps and evaluations in; lines of metrics.jsonl, and of the tracker that was asked for, out."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator

from qlora_cli.config import TrainConfig
from qlora_cli.core.runs.metrics import MetricsFile, as_metrics
from qlora_cli.errors import Interrupted
from qlora_cli.events import EvaluationLogged, StepLogged


@contextmanager
def tracking(accelerator: Accelerator) -> Iterator[None]:
    """Closes the tracker at the end, and the process group unless others may be waiting in it."""
    try:
        yield
    except Interrupted:
        accelerator.end_training()
        raise
    except BaseException:
        for tracker in accelerator.trackers:
            tracker.finish()
        raise
    accelerator.end_training()


def open_logs(
    config: TrainConfig, accelerator: Accelerator, output: Path, last_step: int, stack: ExitStack
) -> Callable[[StepLogged | EvaluationLogged], None]:
    """Opens metrics.jsonl, and the tracker where one is asked for; returns what writes to both."""
    metrics = MetricsFile(output, last_step=last_step)
    stack.callback(metrics.close)
    if config.report_to:
        # Numbers and choices only: no path of this machine leaves it.
        shared = {name: value for name, value in asdict(config).items() if isinstance(value, int | float)}
        accelerator.init_trackers("qlora", config=shared)

    def log(event: StepLogged | EvaluationLogged) -> None:
        metrics.write(event)
        if config.report_to:
            line = as_metrics(event)
            step = line.pop("step")
            accelerator.log({name: value for name, value in line.items() if value is not None}, step=step)

    return log
