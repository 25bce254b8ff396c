"""The five commands as functions, for scripts and notebooks: `from qlora_cli import TrainConfig, train`.

Each takes its settings and a function that receives events (`qlora_cli.events`); without one, progress is written to
standard error, a line at a time. Libraries are as silent meanwhile as on the command line. Errors are
`qlora_cli.errors.QloraError` with `message` and `hint`. Nothing heavy is imported before a function is called.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from qlora_cli.cli.quiet import quiet_call
from qlora_cli.config import GenerateConfig, InspectConfig, MergeConfig, PrepareConfig, TrainConfig
from qlora_cli.events import Report, TextGenerated
from qlora_cli.home import settle_home

if TYPE_CHECKING:
    from qlora_cli.commands.generate import GenerateResult
    from qlora_cli.commands.merge import MergeResult
    from qlora_cli.core.data.prepare import PreparedSummary
    from qlora_cli.core.runs.results import TrainPlan, TrainResult


def prepare(config: PrepareConfig, report: Report | None = None) -> "PreparedSummary":
    """Records to a prepared directory, as `qlora prepare`."""
    return _run("prepare", report, config)


def train(config: TrainConfig, report: Report | None = None) -> "TrainResult | TrainPlan":
    """A base model and rows to a run directory, as `qlora train`; a plan with `dry_run`.

    One process trains on one card: start several with torchrun, as for any script.
    """
    return _run("train", report, config)


def merge(config: MergeConfig, report: Report | None = None) -> "MergeResult":
    """A run to a plain transformers checkpoint, as `qlora merge`."""
    return _run("merge", report, config)


def generate(config: GenerateConfig, prompts: Sequence[str] = (), report: Report | None = None) -> "GenerateResult":
    """Prompts to answers, as `qlora generate`; the texts are in `answers` of what comes back."""
    return _run("generate", report, config, prompts)


def inspect(config: InspectConfig | None = None, report: Report | None = None) -> dict[str, Any]:
    """Facts on a model, an adapter, a run, prepared rows or this machine, as `qlora inspect --json` prints them."""
    return _run("inspect", report, config or InspectConfig())


def _run(command: str, report: Report | None, *settings: Any) -> Any:
    settle_home()
    with quiet_call():
        work = getattr(import_module(f"qlora_cli.commands.{command}"), command)
    with quiet_call():  # again, of libraries that have been imported by now
        return work(*settings, report or _progress())


def _progress() -> Report:
    """Writes events to standard error but for answers, which the caller gets."""
    from qlora_cli.cli.line_view import LineView

    view = LineView(sys.stderr)
    return lambda event: None if isinstance(event, TextGenerated) else view.show(event)
