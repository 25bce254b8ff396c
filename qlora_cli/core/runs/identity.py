"""Run identity: all that a run's numbers depend on, so that two runs with equal ones go through the same numbers."""

from dataclasses import asdict, fields
from typing import Any

from qlora_cli.config import LoraSettings
from qlora_cli.core.runs.decisions import Decisions
from qlora_cli.core.runs.inputs import Run, RunInputs

# Settings that change the numbers. Where the base and the data lie, how often the run saves, what it fits into memory
# by, and how many cards share a step, do not.
SETTINGS = {option.name for option in fields(LoraSettings)} | {
    "batch_size",
    "packing",
    "engine",
    "learning_rate",
    "scheduler",
    "weight_decay",
    "max_grad_norm",
    "eval_fraction",
    "eval_rows",
    "seed",
}


def run_identity(run: Run, inputs: RunInputs, decisions: Decisions) -> dict[str, Any]:
    """The identity kept in every checkpoint; where the base lies is left out."""
    base = asdict(inputs.files.identity(run.config, decisions.compute_dtype))
    return {
        "base": {name: value for name, value in base.items() if name not in ("model", "revision")},
        "data": inputs.rows.manifest["rows_sha256"],
        "settings": {
            **{name: value for name, value in asdict(run.config).items() if name in SETTINGS},
            "batches_per_step": run.config.gradient_accumulation_steps,
            "optimizer": decisions.optimizer,
            "total_steps": inputs.data.sampler.total_steps,
            "warmup_steps": decisions.warmup_steps,
        },
    }
