"""Run identity: all that a run's numbers depend on, so that two runs with equal ones go through the same numbers."""

from dataclasses import asdict
from typing import Any

from qlora_cli.config import TrainConfig
from qlora_cli.core.models.identity import BaseIdentity

# Settings that change the numbers. Where the base and the data lie, how often the run saves, what it fits into memory
# by, and how many cards share a step, do not.
SETTINGS = (
    "rank",
    "alpha",
    "dropout",
    "target_modules",
    "rslora",
    "dora",
    "modules_to_save",
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
)


def run_identity(
    config: TrainConfig,
    base: BaseIdentity,
    data_digest: str,
    *,
    optimizer: str,
    total_steps: int,
    warmup_steps: int,
) -> dict[str, Any]:
    """The identity kept in every checkpoint.

    Args:
        config: Settings of the run.
        base: Of the base model; its name and place are left out.
        data_digest: Of the prepared rows.
        optimizer: Its name, resolved.
        total_steps: Of the whole run.
        warmup_steps: Of the schedule.
    """
    settings = {name: value for name, value in asdict(config).items() if name in SETTINGS}
    settings["batches_per_step"] = config.gradient_accumulation_steps
    settings |= {"optimizer": optimizer, "total_steps": total_steps, "warmup_steps": warmup_steps}
    located = {"model", "revision"}
    return {
        "base": {name: value for name, value in asdict(base).items() if name not in located},
        "data": data_digest,
        "settings": settings,
    }
