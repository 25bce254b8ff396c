"""Summary of a run directory or adapter: what it is, what produced it, how far its training came; without torch."""

import math
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from qlora_cli import artifacts
from qlora_cli.core.adapters.adapter_facts import AdapterFacts, base_name, read_adapter, require_unchanged
from qlora_cli.events import report_nothing


def describe_run(directory: Path, model: str | None, *, whole: bool = True) -> dict[str, Any]:
    """What an adapter is, what produced it, and how far its training came.

    Args:
        directory: Run directory or PEFT adapter.
        whole: Whether its weights are read too, for the norms of its updates.
        model: Base to count the parameters of, which imports torch; by default what the run recorded is told.

    Raises:
        RunError, AdapterError: There is neither a run nor an adapter, or it cannot be read.
    """
    record = artifacts.find_run_record(directory)
    in_checkpoint = artifacts.run_of(directory) != directory
    facts: dict[str, Any] = {"kind": "run" if record else "adapter", "directory": str(directory)}
    tables: list[dict[str, Any]] = []
    if not (directory / artifacts.ADAPTER_CONFIG).is_file() and artifacts.is_run(directory):
        facts |= {"kind": "run", "adapter": "none yet: training has not ended"}
    else:
        adapter = read_adapter(directory)
        require_unchanged(directory, report_nothing)
        base = model or (record.get("base") or {}).get("model") or adapter.base_model
        facts |= _describe_adapter(adapter, directory)
        facts |= _count_parameters(adapter, base, _count_base(model) if model else _recorded_total(directory))
        tables = [_tabulate_adapter(adapter)]
        if whole:
            from qlora_cli.core.inspection.weight_stats import measure_updates, tabulate_layers  # numpy

            title = "Norm of the update" + (", but of experts" if adapter.config.get("target_parameters") else "")
            tables.append(tabulate_layers(title, measure_updates(directory, adapter)))
    facts |= {
        name: record[name]
        for name in ("base", "data", "start", "rope_scaling", "training", "versions", "qlora_version")
        if name in record
    }
    settings = artifacts.run_of(directory) / artifacts.RUN_YAML
    if settings.is_file():
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it was built
        facts["settings"] = yaml.load(settings.read_text(encoding="utf-8"), loader)  # a safe one
    if in_checkpoint or (directory / artifacts.TRAINER_STATE).is_file():
        from qlora_cli.core.training.progress import read_trainer_state

        state = read_trainer_state(directory)
        facts["kind"] = "checkpoint"
        facts["progress"] = {  # in the words of `summarise_metrics`
            "steps": state.step,
            "last_loss": state.last_loss,
            "best_eval_loss": state.best_loss,
            "best_eval_step": state.best_step,
            "last_eval_loss": state.last_eval_loss,
            "tokens": state.tokens,
        }
    elif (directory / artifacts.METRICS).is_file():
        facts["progress"] = summarise_metrics(artifacts.read_metrics(directory))
    checkpoints = directory / artifacts.CHECKPOINTS
    if checkpoints.is_dir():
        facts["checkpoints"] = sorted(path.name for path in checkpoints.iterdir() if path.name[0] != ".")
    return {**facts, "next": _commands(directory, facts), "tables": tables}


def _commands(directory: Path, facts: dict[str, Any]) -> list[str]:
    """What to type next: go on with a run that has not ended, and use its adapter or that of its newest checkpoint."""
    going_on = []
    if "adapter" in facts:
        settings = artifacts.run_of(directory) / artifacts.RUN_YAML
        going_on = [f"qlora train --config {shlex.quote(str(settings))} --resume"] if settings.is_file() else []
        if not facts.get("checkpoints"):
            return going_on
    place = shlex.quote(str(directory))
    using = [f'qlora generate --adapter {place} "Your question"', f"qlora merge --adapter {place} --output merged"]
    return [*going_on, *using]


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
