"""Suggestions where a run does not fit: the nearest settings that do, and the command to type for them."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from qlora_cli.config import StepSettings, TrainConfig, flag_of
from qlora_cli.core.planning.model_profile import ModelProfile
from qlora_cli.core.planning.planner import MemoryDecision, RowLengths, plan_training
from qlora_cli.errors import DoesNotFit
from qlora_cli.sizes import format_bytes

CERTAINTY = 1.05  # past so much of the limit a prediction is never wrong (benchmarks/memory.md)
SHORTEST_ROW_TOKENS = 128  # below this a suggestion helps nobody


@dataclass(frozen=True)
class Suggestion:
    """Other settings that fit."""

    changes: dict[str, Any]  # setting → value, in the words of the configuration
    plan: MemoryDecision


def certainly_too_large(plan: MemoryDecision) -> bool:
    """Whether the leanest plan is past its limit, the prediction's own error allowed for."""
    return (
        plan.memory is not None
        and plan.vram_bytes is not None
        and plan.memory.device_bytes > plan.vram_bytes * CERTAINTY
    )


def refuse(plan: MemoryDecision, commands: Sequence[str]) -> DoesNotFit:
    """The error for a plan that does not fit, with what to type instead.

    Args:
        plan: With its memory predicted, and a limit.
        commands: That do fit; none where nothing does.
    """
    assert plan.memory is not None and plan.vram_bytes is not None
    return DoesNotFit(
        f"Training needs {format_bytes(plan.memory.device_bytes)} at the least, "
        f"and {format_bytes(plan.vram_bytes)} may be taken.",
        f"Type: {' && '.join(commands)}" if commands else "Nothing fits: take a smaller model or a larger card.",
    )


def suggest_fit(
    profile: ModelProfile,
    settings: StepSettings,
    lengths: RowLengths,
    *,
    vram_bytes: int,
    rank: int,
    profile_with_rank: Callable[[int], ModelProfile],
) -> Suggestion | None:
    """The nearest settings that fit: memory measures first, then shorter rows, then a lower rank.

    Args:
        profile: Of the model with its adapter.
        settings: What does not fit.
        lengths: Of the rows.
        vram_bytes: The limit.
        rank: Of the adapter.
        profile_with_rank: The same for another rank.

    Returns:
        None where nothing fits.
    """
    free = replace(
        settings,
        gradient_checkpointing="auto",
        offload_activations=None,
        offload_embeddings=None,
        resident_weights=None,
    )
    smallest = replace(free, batch_size=1)
    shorter = []
    max_length = lengths.row_tokens // 2
    while max_length >= SHORTEST_ROW_TOKENS:
        shorter.append(replace(lengths, max_length=max_length))
        max_length //= 2
    tried = [(free, lengths), *((smallest, each) for each in (lengths, *shorter))]
    for asked, rows in tried:
        plan = plan_training(profile, asked, rows, vram_bytes=vram_bytes)
        if plan.fits:
            return Suggestion(_changes(settings, lengths, asked, rows, plan), plan)
    while rank > 1 and shorter:
        rank //= 2
        plan = plan_training(profile_with_rank(rank), smallest, shorter[-1], vram_bytes=vram_bytes)
        if plan.fits:
            return Suggestion({**_changes(settings, lengths, smallest, shorter[-1], plan), "rank": rank}, plan)
    return None


def _changes(
    settings: StepSettings, lengths: RowLengths, tried: StepSettings, tried_lengths: RowLengths, plan: MemoryDecision
) -> dict[str, Any]:
    """Settings of a plan that differ from those asked for; what was left open counts as off."""
    changes: dict[str, Any] = {}
    if tried.batch_size != settings.batch_size:
        changes["batch_size"] = tried.batch_size
    if tried_lengths.max_length != lengths.max_length:
        changes["max_length"] = tried_lengths.max_length
    if plan.gradient_checkpointing != settings.gradient_checkpointing:
        changes["gradient_checkpointing"] = plan.gradient_checkpointing
    for name in ("offload_activations", "offload_embeddings"):
        if getattr(plan.measures, name) != bool(getattr(settings, name)):
            changes[name] = getattr(plan.measures, name)
    if settings.resident_weights and not plan.measures.resident_weights:
        changes["resident_weights"] = False
    return changes


def write_train_command(config: Any, changes: dict[str, Any]) -> str:
    """The `qlora train` command with the settings of `config` that are not the default, but for `changes`.

    Args:
        config: A `TrainConfig`, or another configuration with some of its settings.
        changes: Setting → value, instead of those of `config`.
    """
    left_out = ("dry_run", "data", "prepared")
    given = {part.name: getattr(config, part.name) for part in fields(TrainConfig) if hasattr(config, part.name)}
    rows = [f"--{name} {shlex.quote(given[name])}" for name in left_out[1:] if given.get(name)]
    words = ["qlora train", f"--model {shlex.quote(given.pop('model'))}", *(rows or ["--data DATA"])]
    for part in fields(TrainConfig):
        value = changes.get(part.name, given.get(part.name))
        if part.name in left_out or value is None or value == part.default:
            continue
        flag, _, opposite = flag_of(part).partition("/")
        if isinstance(value, bool):
            words.append(flag if value else opposite)
        else:
            text = ",".join(value) if isinstance(value, tuple) else str(value)
            words.append(f"{flag} {shlex.quote(text)}")
    return " ".join(words)
