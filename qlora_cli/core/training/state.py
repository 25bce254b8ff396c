"""Everything a run's next step depends on in, the files of a checkpoint out; and back, bit for bit."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from qlora_cli.artifacts import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json, write_json
from qlora_cli.core.storage.checkpoint import read_tensors, write_tensors
from qlora_cli.core.training.flat_parameters import TrainableParameters
from qlora_cli.core.training.loss_scale import LossScale
from qlora_cli.core.training.optimizer import load_optimizer_state, optimizer_state
from qlora_cli.core.training.rng_state import RandomState
from qlora_cli.errors import CheckpointError

OPTIMIZER_TENSORS = "optimizer.safetensors"
RANDOM_TENSORS = "random.safetensors"
STATE = "state.json"
REQUIRED_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, OPTIMIZER_TENSORS, RANDOM_TENSORS, STATE)


@dataclass
class TrainerState:
    """How far a run has come: plain numbers, saved as JSON."""

    step: int = 0  # optimizer steps taken, which is also the position in the data
    tokens: int = 0  # real tokens seen
    evaluated_step: int = 0  # of the last evaluation
    best_loss: float | None = None  # lowest evaluation loss, nats a token
    best_step: int | None = None
    evaluations_since_best: int = 0
    stopped_early: bool = False
    last_loss: float | None = None  # of the last step with finite numbers
    last_eval_loss: float | None = None
    micro_batch_limit_tokens: int | None = None  # set when memory ran out
    loss_scale: LossScale = field(default_factory=LossScale)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "TrainerState":
        """Reads what `dataclasses.asdict` gave."""
        return cls(**{**content, "loss_scale": LossScale(**content["loss_scale"])})


def write_state(
    directory: Path,
    *,
    save_adapter: Callable[[Path], None],
    parameters: TrainableParameters,
    optimizer: Optimizer,
    progress: TrainerState,
    random_states: list[RandomState],
) -> None:
    """Writes the files of a checkpoint, which is a PEFT adapter too.

    Args:
        directory: Existing directory.
        save_adapter: Writes the adapter into a directory.
        parameters: What is trained.
        optimizer: With its state.
        progress: Of the run.
        random_states: Of every rank.
    """
    save_adapter(directory)
    tensors, numbers = optimizer_state(optimizer)
    write_tensors(directory / OPTIMIZER_TENSORS, tensors)
    write_tensors(
        directory / RANDOM_TENSORS,
        {f"{rank}.{name}": tensor for rank, state in enumerate(random_states) for name, tensor in state.items()},
    )
    content = {
        "progress": asdict(progress),
        "optimizer": {"kind": type(optimizer).__name__, "layout": parameters.layout(), "numbers": numbers},
    }
    write_json(directory / STATE, content)


def read_trainer_state(directory: Path) -> TrainerState:
    """How far the run had come.

    Raises:
        CheckpointError: The file was written by another version.
    """
    try:
        return TrainerState.from_dict(read_json(directory / STATE)["progress"])
    except (LookupError, TypeError) as error:
        raise CheckpointError(f"{directory / STATE} was written by another version of qlora ({error}).") from error


def load_optimizer(directory: Path, optimizer: Optimizer, parameters: TrainableParameters) -> None:
    """Puts the optimizer's state back.

    Raises:
        CheckpointError: It is of another optimizer or of other parameters.
    """
    saved = read_json(directory / STATE)["optimizer"]
    if saved["kind"] != type(optimizer).__name__:
        raise CheckpointError(f"The saved optimizer is {saved['kind']}, not {type(optimizer).__name__}.")
    if saved["layout"] != parameters.layout():
        raise CheckpointError("The saved optimizer is of other trained parameters.")
    load_optimizer_state(optimizer, read_tensors(directory / OPTIMIZER_TENSORS), saved["numbers"])


def read_random_state(directory: Path, rank: int) -> RandomState | None:
    """The random state of one rank; None when the checkpoint was written by fewer."""
    state: dict[str, Tensor] = {}
    for name, tensor in read_tensors(directory / RANDOM_TENSORS).items():
        owner, _, key = name.partition(".")
        if owner == str(rank):
            state[key] = tensor
    return state or None
