"""Progress of a run, as its checkpoints keep it: plain numbers, read without torch."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_cli.artifacts import TRAINER_STATE
from qlora_cli.core.storage.checkpoint import Checkpoint, read_file
from qlora_cli.errors import CheckpointError, first_line

GROWTH_INTERVAL_STEPS = 2000


@dataclass
class LossScale:
    """Dynamic loss scaling (https://arxiv.org/abs/1710.03740, section 3.2): as large as float16 bears.

    Only float16 arithmetic needs it. The fields are its whole state.
    """

    scale: float = 65536.0
    good_steps: int = 0

    def accept(self) -> None:
        """A step had finite gradients: after many in a row the scale doubles."""
        self.good_steps += 1
        if self.good_steps == GROWTH_INTERVAL_STEPS:
            self.scale, self.good_steps = min(2 * self.scale, 2.0**24), 0

    def lower(self) -> bool:
        """A step overflowed: halves the scale, and says whether it could; at 1 the fault lies elsewhere."""
        self.good_steps = 0
        if self.scale <= 1:
            return False
        self.scale /= 2
        return True


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

    def runs_out_of(self, patience: int | None) -> bool:
        """Whether so many evaluations, None for any number, have found no lower loss."""
        return patience is not None and self.evaluations_since_best >= patience


def read_trainer_state(source: Checkpoint | Path) -> TrainerState:
    """How far the run had come, by a checkpoint that verified or a directory.

    Raises:
        CheckpointError: The file was written by another version.
    """
    try:
        progress = read_state(source)["progress"]
        return TrainerState(**{**progress, "loss_scale": LossScale(**progress["loss_scale"])})
    except (LookupError, TypeError) as error:
        raise CheckpointError(f"{TRAINER_STATE} was written by another version of qlora ({error}).") from error


def read_state(source: Checkpoint | Path) -> dict[str, Any]:
    """What a checkpoint keeps as JSON: `progress` and `optimizer`.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        content = json.loads(read_file(source, TRAINER_STATE))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{TRAINER_STATE} cannot be read ({first_line(error)}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{TRAINER_STATE} was written by another version of qlora.")
    return content
