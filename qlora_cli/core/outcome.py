"""What a run of training came to, or would do, as the caller and `--json` get it."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TrainResult:
    """What a run came to. Losses are in nats a trained token; None where there was no such thing."""

    output: str
    steps: int
    total_steps: int
    tokens: int
    seconds: float  # of this process's training
    final_loss: float | None
    eval_loss: float | None
    best_eval_loss: float | None
    best_step: int | None
    stopped_early: bool
    trainable_parameters: int
    total_parameters: int
    peak_vram_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return asdict(self)


@dataclass(frozen=True)
class TrainPlan:
    """What a run would do, found out without loading the base."""

    output: str
    device: str
    compute_dtype: str
    optimizer: str
    rows: int
    held_out_rows: int
    first_step: int
    total_steps: int
    warmup_steps: int
    largest_micro_batch_tokens: int
    trainable_parameters: int
    total_parameters: int
    checkpoint_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return {"kind": "plan", **asdict(self)}
