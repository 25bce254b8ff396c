"""Resume: finds the checkpoint from which a run goes on, and puts adapter, optimizer and random state back."""

from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from qlora_cli.artifacts import ADAPTER_WEIGHTS
from qlora_cli.core.models.lora import PeftModel, load_adapter_state
from qlora_cli.core.storage.checkpoint import Checkpoint, differences, newest_valid, read_tensors
from qlora_cli.core.training.flat_parameters import TrainableParameters
from qlora_cli.core.training.rng_state import restore_random_state
from qlora_cli.core.training.state import REQUIRED_FILES, load_optimizer, read_random_state
from qlora_cli.errors import CheckpointError
from qlora_cli.events import Caution, Notice, Report

RANK_STRIDE = 1_000_003  # between the seeds of two ranks


def find_checkpoint(root: Path, identity: dict[str, Any], *, allow_changes: bool, report: Report) -> Checkpoint | None:
    """The newest checkpoint that verifies, of this very run; None where none was written yet.

    Args:
        root: Directory of the run's checkpoints.
        identity: Of the run that is to go on.
        allow_changes: Go on although the identity differs.
        report: Receives what was skipped and why, and what differs.

    Raises:
        CheckpointError: None of those there verifies, or it is of another run.
    """
    checkpoint, skipped = newest_valid(root, REQUIRED_FILES)
    for bad in skipped:
        report(Caution(f"Skipped the checkpoint {bad.path}: {bad.reason}."))
    if checkpoint is None:
        if skipped:
            raise CheckpointError(
                f"None of the {len(skipped)} checkpoints in {root} verifies; of the newest, {skipped[0].reason}.",
                "Start anew with --overwrite.",
            )
        report(Notice(f"There is no checkpoint in {root} yet: training starts at step 1."))
        return None
    if differing := "; ".join(differences(checkpoint.identity, identity)):
        if not allow_changes:
            raise CheckpointError(
                f"The run saved in {checkpoint.path} was another one: {differing}.",
                "Restore these settings, add --allow-changes to go on all the same, or --overwrite to start anew.",
            )
        report(Caution(f"Going on with changes: {differing}."))
    report(Notice(f"Going on after step {checkpoint.step}, from {checkpoint.path}."))
    return checkpoint


def restore_adapter(checkpoint: Checkpoint, model: PeftModel) -> None:
    """Puts the trained tensors back, in place.

    Raises:
        AdapterError: They are of another adapter.
    """
    load_adapter_state(model, read_tensors(checkpoint.path / ADAPTER_WEIGHTS))


def restore_optimizer(
    checkpoint: Checkpoint,
    optimizer: Optimizer,
    parameters: TrainableParameters,
    *,
    allow_changes: bool,
    report: Report,
) -> None:
    """Puts the optimizer's state back; where that cannot be and changes are allowed, it starts fresh.

    Raises:
        CheckpointError: The state does not fit, and changes were not allowed.
    """
    try:
        load_optimizer(checkpoint.path, optimizer, parameters)
    except CheckpointError as error:
        if not allow_changes:
            raise
        optimizer.state.clear()
        report(Caution(f"The optimizer starts without its state: {error.message}"))


def restore_or_seed(checkpoint: Checkpoint | None, parameters: TrainableParameters, *, seed: int, rank: int) -> None:
    """Puts the random state of this rank back, or seeds it where none was saved, every rank differently."""
    saved = read_random_state(checkpoint.path, rank) if checkpoint else None
    if saved is not None:
        restore_random_state(saved, parameters.device)
    else:
        torch.manual_seed(seed + RANK_STRIDE * rank + (checkpoint.step if checkpoint else 0))
