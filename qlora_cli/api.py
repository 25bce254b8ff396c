"""The five commands as functions, for scripts and notebooks: `from qlora_cli import TrainConfig, train`.

Each takes its settings and a function that receives events (`qlora_cli.events`); without one, progress is written to
standard error, a line at a time. Errors are `qlora_cli.errors.QloraError` with `message` and `hint`. Nothing heavy is
imported before a function is called.
"""

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from qlora_cli.config import GenerateConfig, InspectConfig, MergeConfig, PrepareConfig, TrainConfig
from qlora_cli.events import Event, Report, TextGenerated

if TYPE_CHECKING:
    from qlora_cli.commands.generate import GenerateResult
    from qlora_cli.commands.merge import MergeResult
    from qlora_cli.core.data.prepare import PreparedSummary
    from qlora_cli.core.runs.results import TrainPlan, TrainResult

Result = TypeVar("Result")


def prepare(config: PrepareConfig, report: Report | None = None) -> "PreparedSummary":
    """Records to a prepared directory, as `qlora prepare`."""
    from qlora_cli.commands.prepare import prepare as run

    return _reporting(report, lambda given: run(config, given))


def train(config: TrainConfig, report: Report | None = None) -> "TrainResult | TrainPlan":
    """A base model and rows to a run directory, as `qlora train`; a plan with `dry_run`.

    One process trains on one card: start several with torchrun, as for any script.
    """
    from qlora_cli.commands.train import train as run

    return _reporting(report, lambda given: run(config, given))


def merge(config: MergeConfig, report: Report | None = None) -> "MergeResult":
    """A run to a plain transformers checkpoint, as `qlora merge`."""
    from qlora_cli.commands.merge import merge as run

    return _reporting(report, lambda given: run(config, given))


def generate(config: GenerateConfig, prompts: Sequence[str] = (), report: Report | None = None) -> "GenerateResult":
    """Prompts to answers, as `qlora generate`; the texts are in `answers` of what comes back."""
    from qlora_cli.commands.generate import generate as run

    return _reporting(report, lambda given: run(config, prompts, given))


def inspect(config: InspectConfig | None = None, report: Report | None = None) -> dict[str, Any]:
    """Facts on a model, an adapter, a run, prepared rows or this machine, as `qlora inspect --json` prints them."""
    from qlora_cli.commands.inspect import inspect as run

    return _reporting(report, lambda given: run(config or InspectConfig(), given))


def _reporting(report: Report | None, work: Callable[[Report], Result]) -> Result:
    if report is not None:
        return work(report)
    from qlora_cli.cli.line_view import LineView

    view = LineView(sys.stderr)

    def show(event: Event) -> None:
        if not isinstance(event, TextGenerated):  # the caller gets the answer
            view.show(event)

    try:
        return work(show)
    finally:
        view.close()
