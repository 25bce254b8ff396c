"""Trainer state: how far a run has come, and all that its next step depends on as the files of a checkpoint."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from qlora_cli.artifacts import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TRAINER_STATE, write_json
from qlora_cli.core.storage.checkpoint import (
    Checkpoint,
    prune,
    read_tensors,
    write_checkpoint,
    write_tensors,
)
from qlora_cli.core.training.flat_parameters import TrainableParameters
from qlora_cli.core.training.optimizer import load_optimizer_state, optimizer_state
from qlora_cli.core.training.progress import TrainerState, read_state
from qlora_cli.core.training.rng_state import RandomState
from qlora_cli.errors import CheckpointError
from qlora_cli.events import CheckpointSaved, Report, report_nothing

OPTIMIZER_TENSORS = "optimizer.safetensors"
RANDOM_TENSORS = "random.safetensors"
REQUIRED_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, OPTIMIZER_TENSORS, RANDOM_TENSORS, TRAINER_STATE)


@dataclass(frozen=True)
class Checkpointing:
    """Where and how a run's checkpoints are written, and which are kept. Each is a PEFT adapter too."""

    root: Path
    identity: dict[str, Any]  # of the run
    save_adapter: Callable[[Path], None]  # into a directory
    needed_bytes: int  # of one checkpoint, named where the disk is full
    every: int  # steps
    keep: int
    keep_best: bool
    run_id: str = ""
    report: Report = report_nothing  # of what could not be removed

    def write(
        self,
        state: TrainerState,
        parameters: TrainableParameters,
        optimizer: Optimizer,
        random_states: list[RandomState],
    ) -> CheckpointSaved:
        """Writes a checkpoint, with the random states of all ranks, and removes those it makes superfluous.

        Raises:
            DiskFull: It did not fit.
        """
        started = time.perf_counter()

        def fill(directory: Path) -> None:
            self.save_adapter(directory)
            tensors, numbers = optimizer_state(optimizer)
            write_tensors(directory / OPTIMIZER_TENSORS, tensors)
            drawn = {f"{rank}.{name}": state for rank, of in enumerate(random_states) for name, state in of.items()}
            write_tensors(directory / RANDOM_TENSORS, drawn)
            saved = {"kind": type(optimizer).__name__, "layout": parameters.layout(), "numbers": numbers}
            write_json(directory / TRAINER_STATE, {"progress": asdict(state), "optimizer": saved})

        checkpoint = write_checkpoint(
            self.root,
            state.step,
            identity=self.identity,
            fill=fill,
            needed_bytes=self.needed_bytes,
            run=self.run_id,
        )
        best = [state.best_step] if self.keep_best and state.best_step else []
        prune(self.root, checkpoint, keep=self.keep, protect=best, report=self.report)
        seconds = time.perf_counter() - started
        return CheckpointSaved(checkpoint.step, str(checkpoint.path), sum(checkpoint.files.values()), seconds)


def load_optimizer(source: Checkpoint | Path, optimizer: Optimizer, parameters: TrainableParameters) -> None:
    """Puts the optimizer's state back.

    Raises:
        CheckpointError: It is of another optimizer or of other parameters.
    """
    saved = read_state(source)["optimizer"]
    if saved["kind"] != type(optimizer).__name__:
        raise CheckpointError(f"The saved optimizer is {saved['kind']}, not {type(optimizer).__name__}.")
    if saved["layout"] != parameters.layout():
        raise CheckpointError("The saved optimizer is of other trained parameters.")
    load_optimizer_state(optimizer, read_tensors(source, OPTIMIZER_TENSORS), saved["numbers"])


def read_random_state(source: Checkpoint | Path, rank: int) -> RandomState | None:
    """The random state of one rank; None when the checkpoint was written by fewer."""
    prefix, tensors = f"{rank}.", read_tensors(source, RANDOM_TENSORS)
    return {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)} or None
