"""Summary of a run directory or adapter: what it is, what produced it, how far its training came; without torch."""

import math
import re
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from qlora_cli import artifacts
from qlora_cli.core.adapters.adapter_facts import AdapterFacts, base_name, read_adapter, require_unchanged
from qlora_cli.core.storage.lock import find_holder
from qlora_cli.errors import QloraError, RunError, first_line
from qlora_cli.events import report_nothing


def describe_run(directory: Path, model: str | None, *, whole: bool = True) -> dict[str, Any]:
    """What an adapter is, what produced it, and how far its training came. Of a damaged run what can be read is told, and
    under `damaged` what cannot.

    Args:
        directory: Run directory or PEFT adapter.
        whole: Whether its weights are read too, for the norms of its updates.
        model: Base to count the parameters of, which imports torch; by default what the run recorded is told.

    Raises:
        RunError, AdapterError: There is neither a run nor an adapter, or nothing of it can be read.
    """
    counted = _count_base(model) if model else None
    damages: list[QloraError] = []
    record: dict[str, Any] = {}
    with _noted(damages):
        record = artifacts.find_run_record(directory)
    in_checkpoint = artifacts.run_of(directory) != directory
    kind, facts = "run" if record else "adapter", dict[str, Any]()
    tables: list[dict[str, Any]] = []
    if not (directory / artifacts.ADAPTER_CONFIG).is_file() and artifacts.is_run(directory):
        kind, facts["adapter"] = "run", "none yet: training has not ended"
        facts |= {"process": holder} if (holder := find_holder(directory)) is not None else {}
    else:
        with _noted(damages):
            adapter = read_adapter(directory)
            base = model or (record.get("base") or {}).get("model") or adapter.base_model
            facts |= _describe_adapter(adapter, directory)
            facts |= _count_parameters(adapter, base, counted if model else _recorded_total(directory))
            tables = [_tabulate_adapter(adapter)]
            require_unchanged(directory, report_nothing)
            if whole:
                from qlora_cli.core.inspection.weight_stats import measure_updates, tabulate_layers  # numpy

                title = "Norm of the update" + (", but of experts" if adapter.config.get("target_parameters") else "")
                tables.append(tabulate_layers(title, measure_updates(directory, adapter)))
    merging, versions = ("merging_refused", "merges_original"), ("versions", "qlora_version")
    told = ("base", "data", "start", "rope_scaling", *merging, "training", *versions)
    facts |= {name: record[name] for name in told if name in record}
    if (artifacts.run_of(directory) / artifacts.RUN_YAML).is_file():
        with _noted(damages):
            facts["settings"] = _read_settings(artifacts.run_of(directory) / artifacts.RUN_YAML)
    if in_checkpoint or (directory / artifacts.TRAINER_STATE).is_file():
        kind = "checkpoint"
        with _noted(damages):
            facts["progress"] = _progress_of(directory)
    elif (directory / artifacts.METRICS).is_file():
        facts["progress"] = summarise_metrics(artifacts.read_metrics(directory))
    if damages and not facts.keys() & {"rank", "base", "settings", "progress"}:
        raise damages[0]
    checkpoints = directory / artifacts.CHECKPOINTS
    if checkpoints.is_dir():
        facts["checkpoints"] = sorted(path.name for path in checkpoints.iterdir() if path.name[0] != ".")
    said = {"damaged": [f"{error.message} {error.hint or ''}".strip() for error in damages]} if damages else {}
    more = {"next": [] if damages else _commands(directory, facts), "tables": tables}
    return {"kind": kind, "directory": str(directory), **said, **facts, **more}


@contextmanager
def _noted(damages: list[QloraError]) -> Iterator[None]:
    """Keeps why something cannot be read, once: the rest is told all the same."""
    try:
        yield
    except QloraError as error:
        if error.message not in (known.message for known in damages):
            damages.append(error)


def _read_settings(path: Path) -> Any:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it was built
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), loader)  # a safe one
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        raise RunError(f"{path} cannot be read: {first_line(error)}.") from error
    if not isinstance(found, dict):
        raise RunError(f"{path} holds no settings.")
    return found


def _progress_of(checkpoint: Path) -> dict[str, Any]:
    from qlora_cli.core.training.progress import read_trainer_state

    state = read_trainer_state(checkpoint)
    return {  # in the words of `summarise_metrics`
        "steps": state.step,
        "last_loss": state.last_loss,
        "best_eval_loss": state.best_loss,
        "best_eval_step": state.best_step,
        "last_eval_loss": state.last_eval_loss,
        "tokens": state.tokens,
    }


def _commands(directory: Path, facts: dict[str, Any]) -> list[str]:
    """What to type next: go on with a run that has not ended, and use its adapter or that of its newest checkpoint."""
    going_on = []
    if "adapter" in facts:
        run = artifacts.run_of(directory)
        settings, named = run / artifacts.RUN_YAML, (facts.get("settings") or {}).get("output")
        moved = (
            isinstance(named, str) and Path(named).expanduser().resolve() != run.resolve()
        )  # or named from elsewhere
        if settings.is_file() and "process" not in facts:
            line = f"qlora train --config {shlex.quote(str(settings))} --resume"
            going_on = [f"{line} --output {shlex.quote(str(run))}" if moved else line]
        if not facts.get("checkpoints"):
            return going_on
    return [*going_on, *artifacts.ways_to_use(directory)]


def summarise_metrics(lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Steps, losses and speed of a run's metrics."""
    steps: dict[int, dict[str, Any]] = {}
    evaluations: dict[int, float] = {}
    for entry in lines:
        if "eval_loss" in entry:
            evaluations[entry["step"]] = entry["eval_loss"]
        elif "loss" in entry:
            steps[entry["step"]] = entry
    losses = {step: entry["loss"] for step, entry in steps.items() if entry["loss"] is not None}
    facts: dict[str, Any] = {"steps": max(steps, default=0)}
    if losses:
        best = min(losses, key=losses.__getitem__)
        facts |= {"best_loss": losses[best], "best_step": best, "last_loss": losses[max(losses)]}
    if evaluations:
        best = min(evaluations, key=evaluations.__getitem__)
        facts |= {
            "best_eval_loss": evaluations[best],
            "best_eval_step": best,
            "last_eval_loss": evaluations[max(evaluations)],
        }
    if steps:
        tokens, seconds = (sum(entry.get(key) or 0 for entry in steps.values()) for key in ("tokens", "step_seconds"))
        facts |= {"tokens": tokens, "training_seconds": seconds}
        facts["tokens_per_second"] = tokens / seconds if seconds else None
        facts["peak_vram_bytes"] = max(entry.get("peak_vram_bytes") or 0 for entry in steps.values()) or None
    return facts


def _describe_adapter(adapter: AdapterFacts, directory: Path) -> dict[str, Any]:
    return {
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "scaling": adapter.scaling,
        "dropout": adapter.dropout,
        "target_modules": list(adapter.target_modules),
        **{
            name: adapter.config[name]
            for name in ("target_parameters", "exclude_modules", "rank_pattern", "alpha_pattern")
            if adapter.config.get(name)
        },
        "dora": adapter.dora,
        "rslora": adapter.rslora,
        "modules_to_save": list(adapter.modules_to_save),
        "adapter_bytes": (directory / artifacts.ADAPTER_WEIGHTS).stat().st_size,
    }


def _count_parameters(adapter: AdapterFacts, base: str | None, base_parameters: int | None) -> dict[str, Any]:
    """Counts of parameters; where those of the base are not known, the adapter's own."""
    trainable = sum(math.prod(shape) for shape, _ in adapter.tensors.values())
    total = None if base_parameters is None else trainable + base_parameters
    return {
        "base_model": base,
        "total_parameters": total,
        "trainable_parameters": trainable,
        "trainable_percent": 100 * trainable / total if total else None,
    }


def _recorded_total(directory: Path) -> int | None:
    """Parameters of the base, as the run counted them; None in records of older versions that did not end."""
    for place in (directory, artifacts.run_of(directory)):
        record = artifacts.find_run_record(place)
        for section, total, trainable in (
            ("parameters", "total", "trainable"),
            ("training", "total_parameters", "trainable_parameters"),
        ):
            counts = record.get(section) or {}
            if isinstance(counts.get(total), int) and isinstance(counts.get(trainable), int):
                return counts[total] - counts[trainable]
    return None


def _count_base(model: str) -> int:
    from qlora_cli.core.models.files import resolve_model
    from qlora_cli.core.models.quantization import count_parameters
    from qlora_cli.core.models.structure import build_empty

    return count_parameters(build_empty(resolve_model(model).config))[1]


def _tabulate_adapter(adapter: AdapterFacts) -> dict[str, Any]:
    groups: dict[tuple[str, str, str], list[int]] = {}
    for name, (shape, dtype) in adapter.tensors.items():
        part = re.search(r"\.(lora_\w+)", name)
        module = base_name(name) if part else base_name(name).rpartition(".")[0]
        key = (module.rsplit(".", 1)[-1], part[1] if part else "in full", dtype)
        group = groups.setdefault(key, [0, 0])
        group[0] += 1
        group[1] += math.prod(shape)
    rows = [[*key, *amounts] for key, amounts in sorted(groups.items())]
    return {"title": "Adapter", "columns": ["module", "part", "dtype", "tensors", "parameters"], "rows": rows}
