"""Results of `train`: what a run came to, or would do, as the caller and `--json` get it."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qlora_cli.artifacts import ADAPTER_CONFIG, ADAPTER_WEIGHTS, find_run_record


@dataclass(frozen=True)
class TrainResult:
    """What a run came to. Losses are in nats a trained token; None where there was no such thing."""

    output: str
    steps: int
    total_steps: int
    tokens: int
    seconds: float  # of this process's training
    final_loss: float | None
    eval_loss: float | None  # of the adapter that is kept
    best_eval_loss: float | None
    best_step: int | None
    stopped_early: bool
    trainable_parameters: int
    total_parameters: int
    base_vram_bytes: int | None  # of the card that holds most, once the base is loaded
    loading_vram_bytes: int | None  # the most until then
    peak_vram_bytes: int | None  # of training
    # On rows held out: losses `sixteen_bits` and `four_bits` of the base, `adapter` with it, and their `tokens`.
    gap: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return asdict(self)


def read_result(output: Path) -> TrainResult | None:
    """The result of a run that ended, as its record has it; None of one that has not, or whose adapter is gone.

    Raises:
        RunError: The record cannot be read.
    """
    training = find_run_record(output).get("training") or {}
    whole = all((output / name).is_file() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
    if not whole or not (training.get("stopped_early") or training.get("steps") == training.get("total_steps", ...)):
        return None
    known = {field.name: training.get(field.name) for field in fields(TrainResult)}
    return TrainResult(**{**known, "output": str(output)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class TrainPlan:
    """What a run would do, found out without loading the base, nor downloading its weights."""

    output: str
    device: str  # what is planned for: this machine's, or with `--vram` and no card here, one of that size
    compute_dtype: str
    rows: int
    held_out_rows: int
    first_step: int
    total_steps: int
    warmup_steps: int
    trainable_parameters: int
    total_parameters: int
    checkpoint_bytes: int
    disk: dict[str, Any]  # bytes downloaded and written
    vram_bytes: int | None  # the limit; None without a card
    fits: bool | None  # None where there is no limit or no prediction
    settings: dict[str, Any]  # what was left open, decided
    memory: dict[str, Any] | str  # predicted bytes, or why there are none
    configuration: dict[str, Any]  # every setting that `run.yaml` keeps, those decided included
    next: tuple[str, ...] = ()  # commands to type where it does not fit
    missing_weights: str | None = None  # why weights cannot be read, of a directory that lacks them

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        content = {"kind": "plan", **asdict(self)}
        return {name: content[name] for name in content if content[name] or name not in ("next", "missing_weights")}
