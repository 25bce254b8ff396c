"""Validation of a run's settings, before any file is read."""

import os

from qlora_cli.config import TrainConfig
from qlora_cli.core.distributed.process_group import ProcessGroup
from qlora_cli.core.planning.run_plan import may_be_sharded
from qlora_cli.core.runs.tracking import IS_AVAILABLE
from qlora_cli.errors import UsageError


def check_settings(config: TrainConfig) -> None:
    """Checks what needs no file.

    Raises:
        UsageError: A setting is missing, needs another one, or a package that is not installed.
    """
    if config.model is None:
        raise UsageError("No base model was named.", "Add --model with a hub id or a directory.")
    if (config.data is None) == (config.prepared is None):
        raise UsageError(
            "Training takes rows from one place.", "Give either --data or --prepared (written by qlora prepare)."
        )
    for name in ("keep_best", "patience", "eval_every"):
        if getattr(config, name) and not (config.eval_rows or config.eval_fraction):
            raise UsageError(
                f"--{name.replace('_', '-')} needs rows to evaluate on.", "Add --eval-fraction 0.1 or --eval-rows 100."
            )
    tracker = config.report_to
    if tracker and not IS_AVAILABLE[tracker]():
        raise UsageError(
            f"--report-to {tracker} needs a package that is not installed.", f"Type: pip install {tracker}"
        )


def check_ranks(config: TrainConfig, ranks: ProcessGroup) -> None:
    """Checks that the processes started are those asked for.

    Raises:
        UsageError: They are not.
    """
    sharded = config.shard or config.shard_offload
    if sharded and ranks.world_size == 1:
        raise UsageError(
            "--shard shards the base over several cards, and one process runs.", "Add --gpus 2, or leave --shard out."
        )
    if sharded and not may_be_sharded(config):
        raise UsageError(
            "--shard takes the fast engine and plain LoRA adapters only.",
            "Leave out --engine, --dora and --modules-to-save.",
        )
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size))
    if config.gpus is not None and config.gpus != here:
        raise UsageError(
            f"--gpus {config.gpus} was asked for, and {here} process{'es run' if here > 1 else ' runs'} on this machine.",
            "Leave --gpus out where torchrun or accelerate starts the processes.",
        )
