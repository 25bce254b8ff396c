"""Runs beside each other: what they came to, the settings in which they differ, and their losses in one picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_cli.artifacts import read_metrics, write_bytes
from qlora_cli.core.runs.metrics import Losses, draw_losses, read_losses
from qlora_cli.errors import UsageError

CURVE_POINTS = 60  # of a loss in the result; the picture has them all
PICTURES = (".png", ".svg", ".pdf")
# What runs came to: name here → in a run's summary, or in its progress.
FIGURES = {
    "steps": "steps",
    "loss": "last_loss",
    "held_out_loss": "last_eval_loss",
    "best_held_out_loss": "best_eval_loss",
    "tokens": "tokens",
    "training_seconds": "training_seconds",
    "tokens_per_second": "tokens_per_second",
    "peak_vram_bytes": "peak_vram_bytes",
}
NOT_COMPARED = ("output", "report_to", "verbose", "gpus")  # settings on which no number depends


def name_runs(directories: Sequence[Path]) -> list[str]:
    """What each run is called: its directory's name, or as much of its path as tells it from the others."""
    parts = [directory.absolute().parts for directory in directories]
    for count in range(1, max(map(len, parts)) + 1):
        names = [str(Path(*path[-count:])) for path in parts]
        if len(set(names)) == len(names):
            break
    return names


def compare_runs(
    directories: Sequence[Path], summaries: Sequence[Mapping[str, Any]], picture: Path | None
) -> dict[str, Any]:
    """Figures of each run, and the settings and data in which they differ.

    Args:
        directories: Of the runs.
        summaries: What is known of each, as `inspection.run_summary.describe_run` has it.
        picture: Where their losses are drawn, as its ending says; None for nowhere.

    Raises:
        UsageError: The picture's ending is not one that can be drawn.
    """
    names = name_runs(directories)
    losses = [read_losses(read_metrics(directory)) for directory in directories]
    if picture is not None:
        if picture.suffix.lower() not in PICTURES:
            raise UsageError(
                f"{picture} cannot be drawn: its name ends in none of {', '.join(PICTURES)}.",
                "Write: --picture runs.png",
            )
        labelled = dict(zip(names, losses, strict=True))
        write_bytes(
            picture, draw_losses(labelled, title="Loss of " + ", ".join(names), kind=picture.suffix[1:].lower())
        )
    runs = [_figures(*facts) for facts in zip(names, directories, summaries, losses, strict=True)]
    settings = [{**_plain(facts.get("settings") or {}), **_data(facts)} for facts in summaries]
    keys = dict.fromkeys(key for each in settings for key in each if key not in NOT_COMPARED)
    differing = {key: values for key in keys if len(set(values := [str(each.get(key)) for each in settings])) > 1}
    return {
        "kind": "runs",
        "runs": runs,
        "differing": differing,
        "picture": str(picture) if picture else None,
        "tables": [],
    }


def _figures(name: str, directory: Path, facts: Mapping[str, Any], losses: Losses) -> dict[str, Any]:
    progress = facts.get("progress") or {}
    found = {shown: progress.get(known) for shown, known in FIGURES.items()}
    curve = [value for _, value in losses.mean]
    stride = max(1, -(-len(curve) // CURVE_POINTS))
    return {
        "name": name,
        "directory": str(directory),
        "ended": "adapter" not in facts,
        **{name: facts[name] for name in ("damaged",) if name in facts},
        "trainable_parameters": facts.get("trainable_parameters"),
        **found,
        "curve": curve[::stride],
    }


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they are shown; 32 and 32.0 are one."""
    plain: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, list):
            value = ", ".join(map(str, value))
        plain[name] = int(value) if isinstance(value, float) and value.is_integer() else value
    return plain


def _data(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What tells the rows of one run from those of another, whatever their files are called."""
    data = facts.get("data") or {}
    return {"rows": str(data["rows_sha256"])[:12]} if data.get("rows_sha256") else {}
