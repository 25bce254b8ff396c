"""Run identity: all that a run's numbers depend on, so that two runs with equal ones go through the same numbers."""

import hashlib
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from qlora_cli.core.device import list_versions
from qlora_cli.core.runs.decisions import Decisions
from qlora_cli.core.runs.inputs import Run, RunInputs
from qlora_cli.settings.setting import ROUNDING, SAME

COMPUTING = ("torch", "transformers", "bitsandbytes", "triton")  # libraries whose arithmetic is a step's


def run_identity(run: Run, inputs: RunInputs, decisions: Decisions) -> dict[str, Any]:
    """The identity kept in every checkpoint; where the base lies is left out.

    Each setting says in `config.py` what it means for it. `batches` is what the order of the rows came to, so that it
    changes with whatever that depends on; `rounding` may differ, and is said.
    """
    values, versions = asdict(run.config), list_versions()

    def settings(kind: str) -> dict[str, Any]:
        return {option.name: values[option.name] for option in fields(run.config) if option.metadata["resume"] == kind}

    base = asdict(inputs.files.identity(run.config, decisions.compute_dtype))
    content = inputs.files.content_sha256 if run.ranks.is_main else None  # of whose checkpoints it is compared and kept
    code = code_digest(Path(run.config.model or "")) if run.config.trust_remote_code else None
    return {
        "base": {name: value for name, value in base.items() if name not in ("model", "revision")}
        | {"content_sha256": content, "code_sha256": code},
        "data": inputs.rows.manifest["rows_sha256"],
        "batches": inputs.data.sampler.digest(),
        "settings": {
            **settings(SAME),
            "max_length": inputs.max_length,
            "rope_scaling": inputs.files.scaled_positions,
            "batches_per_step": run.config.gradient_accumulation_steps,
            "optimizer": decisions.optimizer,
            "total_steps": inputs.data.sampler.total_steps,
            "warmup_steps": decisions.warmup_steps,
        },
        "rounding": {
            **settings(ROUNDING),
            "ranks": run.ranks.world_size,
            "context_parallel": run.ranks.context,
            **{library: versions[library] for library in COMPUTING},
        },
    }


def code_digest(directory: Path) -> str | None:
    """SHA-256 of the code beside a local model, in hexadecimal; None for one on the hub, whose commit is pinned."""
    if not directory.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()
