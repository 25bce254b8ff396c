"""Suggestions where a run does not fit: the nearest settings that do, and the command to type for them."""

import shlex
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from itertools import chain, count, takewhile
from typing import Any

from qlora_cli.config import TrainConfig
from qlora_cli.core.planning.model_profile import ModelProfile
from qlora_cli.core.planning.planner import MemoryDecision, RowLengths, plan_training
from qlora_cli.settings.groups import StepSettings
from qlora_cli.settings.setting import flag_of

CERTAINTY = 1.05  # past so much of the limit a prediction is never wrong (benchmarks/memory.md)
SHORTEST_ROW_TOKENS = 128  # below this a suggestion helps nobody


def certainly_too_large(plan: MemoryDecision) -> bool:
    """Whether the leanest plan is past its limit, the prediction's own error allowed for."""
    return (
        plan.memory is not None
        and plan.vram_bytes is not None
        and plan.memory.device_bytes > plan.vram_bytes * CERTAINTY
    )


def suggest_fit(
    profile: ModelProfile,
    settings: StepSettings,
    lengths: RowLengths,
    *,
    vram_bytes: int,
    rank: int,
    profile_with_rank: Callable[[int], ModelProfile],
) -> tuple[dict[str, Any], MemoryDecision] | None:
    """The nearest settings that fit: memory measures first, then shorter rows, then an adapter of lower rank.

    Returns:
        Settings to change, as fields of the configuration, and the decision for them; None where nothing fits.
    """
    free = replace(
        settings,
        gradient_checkpointing="auto",
        offload_activations=None,
        offload_embeddings=None,
        resident_weights=None,
    )
    smallest = replace(free, batch_size=1)
    halves = takewhile(lambda tokens: tokens >= SHORTEST_ROW_TOKENS, (lengths.row_tokens >> n for n in count(1)))
    rows = [lengths, *(replace(lengths, max_length=tokens) for tokens in halves)]

    def lower_ranks() -> Iterator[int]:
        # Each takes a trace of the model, so that none is tried where the lowest is too high.
        if rank > 1:
            lowest = plan_training(profile_with_rank(1), smallest, rows[-1], vram_bytes=vram_bytes)
            yield from takewhile(bool, (rank >> n for n in count(1))) if lowest.fits else ()

    tried: Iterator[tuple[ModelProfile, StepSettings, RowLengths, dict[str, int]]] = chain(
        [(profile, free, lengths, {})],
        ((profile, smallest, each, {}) for each in rows),
        ((profile_with_rank(lower), smallest, rows[-1], {"rank": lower}) for lower in lower_ranks()),
    )
    for each_profile, asked, each_lengths, lower_rank in tried:
        decision = plan_training(each_profile, asked, each_lengths, vram_bytes=vram_bytes)
        if decision.fits:
            before: dict[str, Any] = {
                "batch_size": settings.batch_size,
                "max_length": lengths.max_length,
                "gradient_checkpointing": settings.gradient_checkpointing,
                "offload_activations": bool(settings.offload_activations),
                "offload_embeddings": bool(settings.offload_embeddings),
                "resident_weights": bool(settings.resident_weights),
            }
            after = {"batch_size": asked.batch_size, "max_length": each_lengths.max_length, **decision.settings}
            after["resident_weights"] &= before["resident_weights"]  # which cost memory: none are suggested
            return {name: after[name] for name in before if after[name] != before[name]} | lower_rank, decision
    return None


def write_train_command(config: Any, changes: dict[str, Any]) -> str:
    """The `qlora train` command with those settings of `config` that are not the default, some of them changed.

    `config` may be another command's, with some of the settings of `TrainConfig`.
    """
    given = {name: getattr(config, name, None) or () for name in ("data", "prepared")}
    names = {name: (value,) if isinstance(value, str) else value for name, value in given.items()}
    rows = [f"--{name} {shlex.quote(each)}" for name, values in names.items() for each in values]
    words = ["qlora train", f"--model {shlex.quote(config.model)}", *(rows or ["--data DATA"])]
    for part in fields(TrainConfig):
        value = changes.get(part.name, getattr(config, part.name, None))
        if part.name in ("model", "dry_run", "data", "prepared") or value is None or value == part.default:
            continue
        flag, _, opposite = flag_of(part).partition("/")
        if isinstance(value, bool):
            words.append(flag if value else opposite)
        else:
            several = isinstance(value, tuple) and part.metadata["repeated"]
            texts = value if several else (",".join(value) if isinstance(value, tuple) else str(value),)
            words += [f"{flag} {shlex.quote(text)}" for text in texts]
    return " ".join(words)
