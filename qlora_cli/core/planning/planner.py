"""Settings of a training step that stay within a memory limit, chosen by prediction before anything is downloaded.

The measures, their order and their costs are those of `core/engine/memory_plan.py`, which the engine asks once more
with what it measures on the device. Here the number of rows in a micro-batch is open too.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from qlora_cli.core.device import CONTEXT_BYTES, read_capacity_bytes, waiting_room_bytes
from qlora_cli.core.engine.cuda_graphs import bucket
from qlora_cli.core.engine.memory_plan import (
    MARGIN_BYTES,
    MemoryPlan,
    count_recomputed_layers,
    least_recomputed,
    offer_measures,
    plan_as_asked,
    settle,
)
from qlora_cli.core.matmul.arithmetic import ASSUMED_FLOPS_PER_SECOND
from qlora_cli.core.matmul.choice import is_tried
from qlora_cli.core.planning.memory_estimate import (
    ResolvedStep,
    TrainingMemory,
    attended_bytes,
    copied_bytes,
    count_flops,
    estimate_training,
)
from qlora_cli.core.planning.model_profile import ModelProfile
from qlora_cli.core.tiling.token_tiles import LEAST_TILES, TILE_TOKENS
from qlora_cli.core.training.optimizer import choose_optimizer, state_bytes
from qlora_cli.settings.groups import StepSettings
from qlora_cli.settings.ranges import parse_memory

# In rows of so many tokens attention is two thirds of a layer's time: tiles, beside which it need not be repeated, are
# considered wherever memory is limited.
CERTAINLY_TILED_TOKENS = 65_536
WAITING_SHARES = 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125  # of an optimizer's state that may wait on the host
ASSUMED_LINK_BYTES_PER_SECOND = 2e10  # between host and card: PCIe 4 with 16 lanes


@dataclass(frozen=True)
class RowLengths:
    """How long rows may be, in tokens; and how long they are, where the data is known."""

    max_length: int
    longest_row_tokens: int | None = None
    largest_batch_tokens: int | None = None
    largest_step_tokens: int | None = None

    @property
    def row_tokens(self) -> int:
        """Tokens of the longest row."""
        return min(self.max_length, self.longest_row_tokens or self.max_length)

    def batch_tokens(self, batch_size: int) -> int:
        """Tokens of the largest micro-batch of so many rows."""
        most_tokens = batch_size * self.max_length
        return max(self.row_tokens, min(most_tokens, self.largest_batch_tokens or most_tokens))

    def step_tokens(self, settings: StepSettings) -> int:
        """Tokens of the largest step."""
        most_tokens = settings.gradient_accumulation_steps * self.batch_tokens(settings.batch_size)
        return min(most_tokens, self.largest_step_tokens or most_tokens)


@dataclass(frozen=True)
class MemoryDecision:
    """Settings of a step, none left open, and the memory they take."""

    gradient_checkpointing: str  # in the words of the configuration: on, off, or a number of layers
    measures: MemoryPlan
    token_budget: int  # most tokens in a micro-batch
    optimizer: str
    memory: TrainingMemory | None  # None where the model's forward pass cannot be followed
    flops_per_token: float | None  # likewise
    vram_bytes: int | None  # the limit; None for none

    @property
    def fits(self) -> bool | None:
        """Whether it stays within the limit; None where either is not known."""
        if self.vram_bytes is None or self.memory is None:
            return None
        return self.memory.device_bytes <= self.vram_bytes

    @property
    def allocator_bytes(self) -> int | None:
        """What of the limit is PyTorch's, for `limit_memory`."""
        if self.vram_bytes is None:
            return None
        paged_bytes = 0 if self.memory is None else self.memory.paged_bytes
        return max(0, self.vram_bytes - CONTEXT_BYTES - paged_bytes)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that could be left open, as fields of the configuration; but `stream`, which says no number."""
        return {
            "optimizer": self.optimizer,
            "gradient_checkpointing": self.gradient_checkpointing,
            "offload_activations": self.measures.offload_activations,
            "offload_embeddings": self.measures.offload_embeddings,
            "resident_weights": self.measures.resident_weights,
            **self.tiling,
        }

    @property
    def tiling(self) -> dict[str, int]:
        """The setting of tiles, where layers run in such; nothing where they run whole."""
        return {"tile_tokens": self.measures.tile_tokens} if self.measures.tile_tokens else {}

    @property
    def streaming(self) -> dict[str, int]:
        """How many layers' weights wait on the host; nothing where none does."""
        return {"streamed_layers": self.measures.streamed} if self.measures.streamed else {}

    @property
    def elsewhere(self) -> dict[str, int | float]:
        """What waits on the host from before a base is loaded: layers' weights, and the optimizer's state."""
        return {**self.streaming, **({"waiting_states": share} if (share := self.measures.waiting_states) else {})}


def read_limit_bytes(vram: str | None, device: torch.device) -> int:
    """Memory to keep within, the CUDA context included: as asked for, or what the device has free, or the host.

    Raises:
        UsageError: `vram` is no amount of memory.
    """
    if vram is not None:
        return parse_memory(vram)
    # Asking makes this process's CUDA context, so what is free is beside it; its other half comes with the kernels.
    return read_capacity_bytes(device) + (CONTEXT_BYTES // 2 if device.type == "cuda" else 0)


def plan_training(
    profile: ModelProfile,
    settings: StepSettings,
    lengths: RowLengths,
    *,
    vram_bytes: int | None,
    on_cuda: bool = True,
    shards: int = 1,
    shard_offload: bool = False,
    may_stream: bool = True,
    context: int = 1,
) -> MemoryDecision:
    """Chooses what was left open, so that training is fastest within the limit, or where nothing fits takes the least.

    Micro-batches may be made smaller than asked for, and where copies of weights would take longer than their arithmetic,
    larger: a step's rows stay the same and so does its arithmetic.

    Args:
        vram_bytes: The limit; None for none: then nothing is recomputed, offloaded or kept resident unasked.
        on_cuda: Whether a CUDA device is meant; on the CPU nothing is offloaded, and memory is the host's.
        shards: Cards that the base is sharded over; the plan is of each.
        shard_offload: Whether their shards of it wait on the host.
        context: Cards that share the tokens of each micro-batch; the plan is of each.
        may_stream: Whether layers' weights may wait on the host, where nothing else fits or it was asked for.

    Raises:
        UsageError: `gradient_checkpointing` is neither a word nor a number.
    """
    optimizer = choose_optimizer(settings.optimizer, torch.device("cuda" if on_cuda else "cpu"))
    settings = settle(settings, profile.dense_bytes, on_cuda=on_cuda, sharded=shards > 1, shared=context > 1)
    streams = may_stream and shards == context == 1 and settings.engine == "fast" and settings.stream is not False
    if profile.trace is None:
        return _decide_without_prediction(profile, settings, lengths, optimizer, vram_bytes)
    largest = ResolvedStep(
        tokens=lengths.batch_tokens(settings.batch_size),
        row_tokens=lengths.row_tokens,
        optimizer=optimizer,
        engine=settings.engine,
        in_8_bits=shards == 1 and is_tried(settings, lengths.batch_tokens(settings.batch_size), on_cuda=on_cuda),
        on_cuda=on_cuda,
        shards=shards,
        shard_offload=shard_offload,
        context=context,
    )

    step_tokens = lengths.step_tokens(settings)

    def rank(candidate: tuple[ResolvedStep, TrainingMemory]) -> tuple[bool, float]:
        step, memory = candidate
        if _has_room(memory, vram_bytes):
            cost = step.measures.token_cost(profile.layers, step.part_tokens) * _copy_share(profile, step)
            return False, cost + _state_share(profile, step, step_tokens)
        return True, memory.device_bytes

    limited = vram_bytes is not None
    found: list[tuple[ResolvedStep, TrainingMemory]] = []

    def none_fits() -> bool:
        return not any(vram_bytes is None or memory.device_bytes <= vram_bytes for _, memory in found)

    if settings.tile_tokens and (context > 1 or profile.traced(settings.tile_tokens) is None):
        settings = replace(settings, tile_tokens=0)
    while True:
        if not (streams and settings.stream):
            steps = _open_steps(profile, settings, largest, limited=limited)
            found += [each for step in steps if (each := _recompute_least(profile, settings, step, vram_bytes))]
        long = largest.row_tokens > LEAST_TILES * TILE_TOKENS
        may_tile = settings.tile_tokens is None and on_cuda and long and shards == context == 1
        wanted = largest.row_tokens >= CERTAINLY_TILED_TOKENS or none_fits()
        if not (limited and may_tile and wanted and profile.traced(TILE_TOKENS)):
            break
        settings = replace(settings, tile_tokens=TILE_TOKENS)
    if streams and none_fits():
        packed = replace(settings, resident_weights=False)
        if limited and on_cuda:
            largest = _grow(profile, largest, step_tokens)
        for step in _open_steps(profile, packed, largest, limited=limited):
            found += _stream_layers(profile, packed, step, vram_bytes)
    host_bytes = waiting_room_bytes()

    def fits_host(step: ResolvedStep, memory: TrainingMemory) -> bool:
        waits = step.measures.attention_kept or step.measures.waiting_states
        return not waits or memory.host_bytes <= host_bytes

    found = [each for each in found if fits_host(*each)] or found
    step, memory = _unpack_experts(profile, settings, *min(found, key=rank), vram_bytes)
    recomputed = step.measures.recomputed
    return MemoryDecision(
        gradient_checkpointing={0: "off", profile.layers: "on"}.get(recomputed, str(recomputed)),
        measures=step.measures,
        token_budget=step.tokens,
        optimizer=optimizer,
        memory=memory,
        flops_per_token=count_flops(profile, step),
        vram_bytes=vram_bytes,
    )


def _decide_without_prediction(
    profile: ModelProfile, settings: StepSettings, lengths: RowLengths, optimizer: str, vram_bytes: int | None
) -> MemoryDecision:
    """What was asked for, and all layers recomputed where that was left open."""
    checkpointing = settings.gradient_checkpointing
    measures = plan_as_asked(settings, layers=0, resident_weights=bool(settings.resident_weights))
    return MemoryDecision(
        gradient_checkpointing="on" if checkpointing == "auto" else checkpointing,
        measures=replace(measures, streamed=len(profile.layer_bytes) if settings.stream else 0),
        token_budget=lengths.batch_tokens(settings.batch_size),
        optimizer=optimizer,
        memory=None,
        flops_per_token=None,
        vram_bytes=vram_bytes,
    )


def _open_steps(
    profile: ModelProfile, settings: StepSettings, largest: ResolvedStep, *, limited: bool
) -> Iterator[ResolvedStep]:
    """Every combination of what is open but for the number of recomputed layers."""
    budgets = [largest.tokens]
    while budgets[-1] > largest.row_tokens:
        budgets.append(max(largest.row_tokens, budgets[-1] // 2))
    offered = offer_measures(
        settings,
        embedding_bytes=profile.embedding_bytes,
        largest_dense_bytes=profile.largest_weight_bytes,
        on_cuda=largest.on_cuda,
        limited=limited,
    )
    state = state_bytes(largest.optimizer, profile.footprint.trainable_parameters)
    may_wait = limited and largest.on_cuda and state > MARGIN_BYTES and largest.optimizer.startswith("paged")
    for tokens, measures, waiting in product(budgets, offered, (0.0, *WAITING_SHARES) if may_wait else (0.0,)):
        yield replace(largest, tokens=tokens, measures=replace(measures, waiting_states=waiting))


def _recompute_least(
    profile: ModelProfile, settings: StepSettings, step: ResolvedStep, vram_bytes: int | None
) -> tuple[ResolvedStep, TrainingMemory] | None:
    """The step with as many layers recomputed as asked for, or else as few as fit, or all; None for what makes no sense."""
    asked_layers = count_recomputed_layers(settings, profile.layers, on_cuda=step.on_cuda)
    least = least_recomputed(settings, offload_activations=step.measures.offload_activations)
    on_fast_card = step.on_cuda and step.engine == "fast"
    # Whether layers will be compiled may depend on the run's length: the larger of the two counts.
    modes = (False, True) if settings.compile is None and on_fast_card else (bool(settings.compile) and step.on_cuda,)
    if step.measures.tile_tokens:  # neither compiled nor in graphs
        modes, on_fast_card = (False,), False
    # So may, with `auto`, whether in 8 bits, which of linears never takes less than in 16.
    either = step.in_8_bits and settings.matmul == "auto" and profile.footprint.expert_numels
    ways = (False, True) if either else (step.in_8_bits,)

    def resolve(layers: int) -> tuple[ResolvedStep, TrainingMemory]:
        resolved = replace(step, measures=replace(step.measures, recomputed=layers))
        if resolved.measures.attention_kept:
            left_bytes = waiting_room_bytes() - estimate_training(profile, resolved).host_bytes
            kept = resolved.measures.keep_attention(left_bytes, attended_bytes(profile, resolved))
            resolved = replace(resolved, measures=kept)
        # A micro-batch may be padded to a slightly larger shape, for which there is a graph.
        tokens = bucket(step.tokens) if on_fast_card and step.context == 1 else step.tokens
        memories = [
            estimate_training(profile, replace(resolved, compiled=mode, tokens=tokens, in_8_bits=way))
            for mode, way in product(modes, ways)
        ]
        return resolved, max(memories, key=lambda memory: memory.device_bytes)

    if asked_layers is not None:
        return resolve(asked_layers) if asked_layers >= least else None
    if vram_bytes is None:
        return resolve(least)
    counts = range(profile.layers + 1)
    place = bisect_left(counts, True, lo=least, key=lambda layers: _has_room(resolve(layers)[1], vram_bytes))
    return resolve(min(place, profile.layers))


def _unpack_experts(
    profile: ModelProfile, settings: StepSettings, step: ResolvedStep, memory: TrainingMemory, vram_bytes: int | None
) -> tuple[ResolvedStep, TrainingMemory]:
    """The step with experts of as many layers unpacked as there is room for in what it leaves of a card's memory."""
    if vram_bytes is None or not (step.on_cuda and step.engine == "fast" and step.shards == step.context == 1):
        return step, memory
    left_bytes = vram_bytes - memory.device_bytes - MARGIN_BYTES
    measures = step.measures.with_experts(profile.expert_layers, profile.unpacked_bytes, left_bytes)
    if not measures.unpacked_experts:
        return step, memory
    return _recompute_least(profile, settings, replace(step, measures=measures), vram_bytes) or (step, memory)


def _stream_layers(
    profile: ModelProfile, settings: StepSettings, step: ResolvedStep, vram_bytes: int | None
) -> Iterator[tuple[ResolvedStep, TrainingMemory]]:
    """The step with some layers' weights on the host: from as few as fit, where all are recomputed, to all of them,
    which leaves memory for layers that keep what they compute."""
    layers = len(profile.layer_bytes)

    def resolve(streamed: int, asked: StepSettings) -> tuple[ResolvedStep, TrainingMemory] | None:
        return _recompute_least(
            profile, asked, replace(step, measures=replace(step.measures, streamed=streamed)), vram_bytes
        )

    least = layers
    if not settings.stream and vram_bytes is not None:
        recomputing = "on" if settings.gradient_checkpointing == "auto" else settings.gradient_checkpointing
        leanest = replace(settings, gradient_checkpointing=recomputing)

        def has_room(streamed: int) -> bool:
            found = resolve(streamed, leanest)
            return found is not None and _has_room(found[1], vram_bytes)

        if not has_room(layers):
            if (found := resolve(layers, leanest)) is not None:
                yield found
            return
        least = bisect_left(range(layers), True, lo=1, key=has_room)
    for streamed in sorted({least, (least + layers) // 2, layers}):
        if (found := resolve(streamed, settings)) is not None:
            yield found


def _grow(profile: ModelProfile, largest: ResolvedStep, step_tokens: int) -> ResolvedStep:
    """The step with micro-batches of as many tokens as hide the copies of all layers behind their arithmetic, or as many
    as a step of the optimizer has."""
    step = replace(largest, measures=MemoryPlan(recomputed=profile.layers, streamed=len(profile.layer_bytes)))
    while step.tokens < step_tokens and _copy_share(profile, step) > 1:
        step = replace(step, tokens=min(2 * step.tokens, step_tokens))
    return replace(largest, tokens=step.tokens)


def _copy_share(profile: ModelProfile, step: ResolvedStep) -> float:
    """How much longer a micro-batch takes where its weights stream than its arithmetic; 1 where that hides the copies."""
    if not step.measures.streamed:
        return 1.0
    arithmetic = count_flops(profile, step) * step.tokens / ASSUMED_FLOPS_PER_SECOND
    return max(1.0, copied_bytes(profile, step.measures) / ASSUMED_LINK_BYTES_PER_SECOND / arithmetic)


def _state_share(profile: ModelProfile, step: ResolvedStep, step_tokens: int) -> float:
    """How long an optimizer's state takes to come from the host and go back, at once, as a share of the arithmetic of a
    step of so many tokens; 0 where it does not wait there."""
    if not step.measures.waiting_states:
        return 0.0
    arithmetic = count_flops(profile, step) * step_tokens / ASSUMED_FLOPS_PER_SECOND
    copied = step.measures.waiting_states * state_bytes(step.optimizer, profile.footprint.trainable_parameters)
    return copied / ASSUMED_LINK_BYTES_PER_SECOND / arithmetic


def _has_room(memory: TrainingMemory, vram_bytes: int | None) -> bool:
    """Whether this is within the limit and leaves the engine its margin."""
    return vram_bytes is None or memory.device_bytes + MARGIN_BYTES * (memory.context_bytes > 0) <= vram_bytes
