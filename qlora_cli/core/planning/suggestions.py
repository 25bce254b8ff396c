"""Settings that do not fit in; the nearest that do, and the command to type for them, out."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from qlora_cli.config import TrainConfig, flag_of
from qlora_cli.core.planning.model_profile import ModelProfile
from qlora_cli.core.planning.planner import MemoryDecision, StepRequest, plan_training
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
    facts: ModelProfile,
    request: StepRequest,
    *,
    vram_bytes: int,
    rank: int,
    regather: Callable[[int], ModelProfile],
    longest_row_tokens: int | None = None,
    largest_batch_tokens: int | None = None,
) -> Suggestion | None:
    """The nearest settings that fit: memory measures first, then shorter rows, then a lower rank.

    Args:
        facts: On the model and its adapter.
        wishes: What does not fit.
        vram_bytes: The limit.
        rank: Of the adapter.
        regather: Facts for another rank.
        longest_row_tokens: As for `plan_training`, like the next.
        largest_batch_tokens: Of the data.

    Returns:
        None where nothing fits.
    """
    free = replace(
        request,
        gradient_checkpointing="auto",
        offload_activations=None,
        offload_embeddings=None,
        resident_weights=None,
    )
    smallest = replace(free, batch_size=1)
    data: Any = {"longest_row_tokens": longest_row_tokens, "largest_batch_tokens": largest_batch_tokens}
    lengths = []
    length = min(request.max_length, longest_row_tokens or request.max_length) // 2
    while length >= SHORTEST_ROW_TOKENS:
        lengths.append(length)
        length //= 2
    for tried in (free, smallest, *(replace(smallest, max_length=length) for length in lengths)):
        plan = plan_training(facts, tried, vram_bytes=vram_bytes, **data)
        if plan.fits:
            return Suggestion(_changes(request, tried, plan), plan)
    while rank > 1 and lengths:
        rank //= 2
        tried = replace(smallest, max_length=lengths[-1])
        plan = plan_training(regather(rank), tried, vram_bytes=vram_bytes, **data)
        if plan.fits:
            return Suggestion({**_changes(request, tried, plan), "rank": rank}, plan)
    return None


def _changes(request: StepRequest, tried: StepRequest, plan: MemoryDecision) -> dict[str, Any]:
    """Settings of a plan that differ from the wishes; what was left open counts as off."""
    changes: dict[str, Any] = {
        name: getattr(tried, name)
        for name in ("batch_size", "max_length")
        if getattr(tried, name) != getattr(request, name)
    }
    if plan.gradient_checkpointing != request.gradient_checkpointing:
        changes["gradient_checkpointing"] = plan.gradient_checkpointing
    for name in ("offload_activations", "offload_embeddings"):
        if getattr(plan, name) != bool(getattr(request, name)):
            changes[name] = getattr(plan, name)
    if request.resident_weights and not plan.resident_weights:
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
