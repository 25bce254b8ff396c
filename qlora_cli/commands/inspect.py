"""`qlora inspect`: facts on a model, an adapter or run, several runs, a prepared set, or this machine.

Every view returns one JSON-ready dictionary. `kind` names the view; the other entries are facts: scalars, lists of
scalars, or a dictionary of more facts under one heading. `tables` is a list of `{"title", "columns", "rows"}`, `next` a
list of commands to type. A name's ending says the unit, for facts and columns alike: `_bytes`, `_percent`, `_seconds`.
Where memory was predicted against a limit, `fits` says whether it is enough.
"""

import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora_cli.artifacts import ADAPTER_CONFIG, find_near, is_model, is_prepared, is_run
from qlora_cli.config import InspectConfig, TrainConfig
from qlora_cli.core.inspection.run_summary import describe_run
from qlora_cli.core.runs.validate import list_given, report_idle
from qlora_cli.errors import RunError, UsageError
from qlora_cli.events import Caution, Report
from qlora_cli.interrupts import loading
from qlora_cli.settings.setting import flag_of

WITHOUT_MODEL = ("adapter", "prepared", "model", "picture")  # what other views take
OF_A_MODEL = ("vram", "max_length", "quantization_error", "data")


def inspect(config: InspectConfig, report: Report, runs: Sequence[str] = (), *, whole: bool = True) -> dict[str, Any]:
    """Facts on what the configuration names; on the default run directory, or else this machine, when it names nothing.

    Args:
        config: The settings.
        runs: Directories of runs to compare; a single one is described, which may be a prepared set or a model too.
        report: Receives what is reported meanwhile.
        whole: Whether everything is found out; else what takes long and stands in no short answer is left out.

    Raises:
        UsageError: It names more than one thing, or asks of one what only another has.
        ModelError, AdapterError, RunError: What it names cannot be read.
    """
    if len(runs) == 1 and is_model(Path(runs[0])):
        config, runs = replace(config, model=runs[0]), ()
    named = [name for name in ("adapter", "prepared") if getattr(config, name)]
    asked = [name for name in OF_A_MODEL if getattr(config, name) != getattr(InspectConfig, name)]
    if not runs and asked and (named or not config.model):
        flag = f"--{asked[0].replace('_', '-')}"
        raise UsageError(f"{flag} is about a model, and none is looked at.", f"Add --model ID to {flag}.")
    default = Path(TrainConfig.output)
    stands = not (runs or named or config.model) and is_run(default)
    looked_at = [*runs, *filter(None, (config.adapter, config.prepared)), *([str(default)] if stands else [])]
    idle = [flag_of(option).split("/")[0] for option in list_given(config) if option.name not in WITHOUT_MODEL]
    if looked_at and idle:
        verb = "does" if len(idle) == 1 else "do"
        report(Caution(f"{', '.join(idle)} {verb} nothing: {looked_at[0]} is looked at as it is."))
    if len(runs) > 1:
        return inspect_runs([Path(run) for run in runs], config.picture)
    if runs:
        one = Path(runs[0]).expanduser()
        _require_directory(one)
        return inspect_prepared(one) if is_prepared(one) else describe_run(one, None, whole=whole)
    if len(named) == 2 or (config.model and config.prepared):
        raise UsageError("inspect looks at one thing at a time.", "Give one of --model, --adapter and --prepared.")
    report_idle(config, report)
    if config.prepared:
        return inspect_prepared(Path(config.prepared))
    if config.adapter:
        return describe_run(Path(config.adapter), config.model, whole=whole)
    if config.model:
        with loading():
            from qlora_cli.core.inspection.model_summary import describe_model  # torch, which no other view needs

        return describe_model(config, report)
    if stands:
        return describe_run(default, None, whole=whole)
    from qlora_cli.core.inspection.doctor import describe_environment

    return describe_environment(config.compute_dtype)


def _require_directory(place: Path) -> None:
    """Raises RunError where there is no directory to look at, or one of another kind."""
    if is_run(place) or is_prepared(place):
        return
    shown = shlex.quote(str(place))
    inside = []
    for each in sorted(place.iterdir()) if place.is_dir() else ():
        with suppress(PermissionError):  # a closed folder
            inside += [shlex.quote(str(each))] if is_run(each) else []
    if inside:
        hint = f"Type: qlora inspect {' '.join(inside)}"
    elif near := next(filter(None, (find_near(place, name) for name in (ADAPTER_CONFIG, "config.json"))), None):
        hint = f"Type: qlora inspect {shlex.quote(str(near))}"
    elif place.exists():
        hint = f"Of rows type: qlora prepare --model MODEL --data {shown}"
    else:
        hint = f"Of a model of the hub type: qlora inspect --model {shown}"
    found = "is none" if place.is_dir() else "is a file" if place.exists() else "is not there"
    raise RunError(
        f"inspect looks at the directory of a run, of prepared rows or of a model, and {place} {found}.", hint
    )


def inspect_runs(directories: list[Path], picture: str | None) -> dict[str, Any]:
    """Runs beside each other.

    Raises:
        RunError, AdapterError: One of them is no run, or cannot be read.
    """
    from qlora_cli.core.runs.comparison import compare_runs

    for directory in directories:
        if is_run(directory):
            continue
        what = "a model" if is_model(directory) else "prepared rows" if is_prepared(directory) else None
        if what is None:
            raise RunError(f"There is no run in {directory}.", "Give directories that qlora train has written.")
        raise RunError(
            f"{directory} holds {what}, and only runs are shown beside each other.",
            f"Type: qlora inspect {shlex.quote(str(directory))}",
        )
    summaries = [describe_run(directory, None, whole=False) for directory in directories]
    return compare_runs(directories, summaries, Path(picture).expanduser() if picture else None)


def inspect_prepared(directory: Path) -> dict[str, Any]:
    """What `prepare` printed, from the manifest."""
    from qlora_cli.core.data.dataset import PreparedRows

    rows = PreparedRows(directory)
    facts = {name: value for name, value in rows.manifest.items() if name not in ("kind", "tables")}
    model = (facts.get("tokenizer") or {}).get("name") or "MODEL"
    train = f"qlora train --model {shlex.quote(model)} --prepared {shlex.quote(str(directory))}"
    return {"kind": "prepared rows", "directory": str(directory), **facts, "next": [train], "tables": []}
