"""Facts on a model, wishes and a limit in; the fastest settings of a training step that stay within it out."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import psutil
import torch

from qlora_cli.core.device import parse_memory, read_free_bytes
from qlora_cli.core.engine.cuda_graphs import bucket
from qlora_cli.core.engine.engine import count_recomputed_layers
from qlora_cli.core.engine.memory_plan import MARGIN_BYTES, SLICE_BYTES, MemoryPlan, StepNeeds
from qlora_cli.core.planning.memory_estimate import (
    CONTEXT_BYTES,
    ResolvedStep,
    TrainingMemory,
    count_flops,
    estimate_training,
)
from qlora_cli.core.planning.model_profile import ModelProfile
from qlora_cli.core.training.optimizer import choose_optimizer

# Beside the measures, whose cost the engine knows, a micro-batch takes a fixed time, that of about so many tokens: it
# launches every kernel and dequantises every weight twice.
FIXED_TOKENS = 500


@dataclass(frozen=True)
class StepRequest:
    """What the user asked for; None, or "auto", leaves it to the planner."""

    batch_size: int = 1
    max_length: int = 2048
    engine: str = "fast"
    optimizer: str | None = None
    gradient_checkpointing: str = "auto"
    offload_activations: bool | None = None
    offload_embeddings: bool | None = None
    resident_weights: bool | None = None
    compile: bool | None = None


@dataclass(frozen=True)
class MemoryDecision:
    """Settings resolved, in the words of the configuration, and what they take."""

    gradient_checkpointing: str  # on, off, or a number of layers
    recomputed_layers: int
    layers: int
    offload_activations: bool
    offload_embeddings: bool
    resident_weights: bool
    workspace_bytes: int | None  # most of a weight dequantised at once, where whole ones are too much
    token_budget: int  # most tokens in a micro-batch
    optimizer: str
    memory: TrainingMemory | None  # None where the model's forward pass cannot be followed
    flops_per_token: float | None  # likewise
    vram_bytes: int | None  # the limit; None for none
    fits: bool | None  # None where either is not known

    @property
    def allocator_bytes(self) -> int | None:
        """What of the limit is PyTorch's, for `torch.cuda.set_per_process_memory_fraction`."""
        return None if self.vram_bytes is None else max(0, self.vram_bytes - CONTEXT_BYTES)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        content = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return content | {"memory": self.memory.to_dict() if self.memory else None}


def read_limit_bytes(vram: str | None, device: torch.device) -> int:
    """Memory to keep within: as asked for, or what the CUDA device has free, or on the CPU the host.

    Args:
        vram: Such as 12GiB, the CUDA context included.
        device: Where training would run.

    Raises:
        UsageError: `vram` is no amount of memory.
    """
    if vram is not None:
        return parse_memory(vram)
    free_bytes = read_free_bytes(device)
    if free_bytes is None:
        return psutil.virtual_memory().available
    # Asking has made this process's CUDA context, so what is free is beside it; its other half comes with the kernels.
    return free_bytes + CONTEXT_BYTES // 2


def plan_training(
    facts: ModelProfile,
    request: StepRequest,
    *,
    vram_bytes: int | None,
    on_cuda: bool = True,
    longest_row_tokens: int | None = None,
    largest_batch_tokens: int | None = None,
    shards: int = 1,
    shard_offload: bool = False,
) -> MemoryDecision:
    """Chooses what was left open, so that training is fastest within the limit.

    Micro-batches may be made smaller than asked for: a step's rows stay the same and so does its arithmetic. The engine
    decides by measurement on the device once more, with the same costs and the same margin.

    Args:
        facts: On the model and its adapter.
        wishes: What was asked for.
        vram_bytes: The limit; None for none: then nothing is recomputed, offloaded or kept resident unasked.
        on_cuda: Whether a CUDA device is meant; on the CPU nothing is offloaded, and memory is the host's.
        longest_row_tokens: Of the data; by default `max_length`.
        largest_batch_tokens: Tokens of the largest micro-batch of the data; by default batch_size * max_length.
        shards: Cards that the base is sharded over; the plan is of each.
        shard_offload: Whether their shares of it wait on the host.

    Returns:
        The plan. Where nothing fits it is the leanest one there is, and `fits` is False.

    Raises:
        UsageError: `gradient_checkpointing` is neither a word nor a number.
    """
    device = torch.device("cuda" if on_cuda else "cpu")
    optimizer = choose_optimizer(request.optimizer, device)
    row_tokens = min(request.max_length, longest_row_tokens or request.max_length)
    tokens = max(row_tokens, min(request.batch_size * request.max_length, largest_batch_tokens or 2**62))
    recomputed = count_recomputed_layers(request.gradient_checkpointing, facts.layers)
    if not on_cuda and request.engine == "fast" and request.resident_weights is None:  # as the engine decides it there
        dense_bytes = sum(facts.footprint.quantized_numels) * facts.itemsize
        request = replace(request, resident_weights=dense_bytes < psutil.virtual_memory().available // 2)
    if facts.trace is None:
        return MemoryDecision(
            gradient_checkpointing="on" if recomputed is None else request.gradient_checkpointing,
            recomputed_layers=recomputed or 0,
            layers=0,
            offload_activations=bool(request.offload_activations),
            offload_embeddings=bool(request.offload_embeddings),
            resident_weights=bool(request.resident_weights),
            workspace_bytes=None,
            token_budget=tokens,
            optimizer=optimizer,
            memory=None,
            flops_per_token=None,
            vram_bytes=vram_bytes,
            fits=None,
        )
    best: tuple[tuple[bool, float], ResolvedStep, TrainingMemory] | None = None
    if shards > 1:
        request = replace(request, offload_embeddings=False, resident_weights=False, compile=bool(request.compile))
    for open_step in _candidates(facts, request, tokens, row_tokens, optimizer, on_cuda, vram_bytes is not None):
        candidate = replace(open_step, shards=shards, shard_offload=shard_offload)
        taken = _recompute_least(facts, candidate, request, vram_bytes)
        if taken is None:
            continue
        step, memory = taken
        crowded = not _has_room(memory, vram_bytes)
        rank = crowded, (memory.device_bytes if crowded else _cost(step, facts.layers))
        if best is None or rank < best[0]:
            best = rank, step, memory
    assert best is not None
    _, step, memory = best
    return MemoryDecision(
        gradient_checkpointing={0: "off", facts.layers: "on"}.get(step.recomputed_layers, str(step.recomputed_layers)),
        recomputed_layers=step.recomputed_layers,
        layers=facts.layers,
        offload_activations=step.offload_activations,
        offload_embeddings=step.offload_embeddings,
        resident_weights=step.resident_weights,
        workspace_bytes=step.workspace_bytes,
        token_budget=step.tokens,
        optimizer=optimizer,
        memory=memory,
        flops_per_token=count_flops(facts, step),
        vram_bytes=vram_bytes,
        fits=None if vram_bytes is None else memory.device_bytes <= vram_bytes,
    )


def _candidates(
    facts: ModelProfile,
    request: StepRequest,
    tokens: int,
    row_tokens: int,
    optimizer: str,
    on_cuda: bool,
    limited: bool,
) -> Iterator[ResolvedStep]:
    """Every combination of what is open but for the number of recomputed layers."""
    budgets = [tokens]
    while budgets[-1] > row_tokens:
        budgets.append(max(row_tokens, budgets[-1] // 2))
    movable = request.engine == "fast" and on_cuda
    offers = (
        _options(request.offload_activations, possible=movable, limited=limited),
        _options(request.offload_embeddings, possible=movable and facts.embedding_bytes > 0, limited=limited),
        _options(request.resident_weights, possible=request.engine == "fast", limited=limited and on_cuda),
    )
    for budget, (activations, embeddings, resident) in product(budgets, product(*offers)):
        sliced = movable and limited and not resident and facts.largest_weight_bytes > SLICE_BYTES
        for workspace_bytes in (None, SLICE_BYTES) if sliced else (None,):
            yield ResolvedStep(
                tokens=budget,
                row_tokens=row_tokens,
                engine=request.engine,
                optimizer=optimizer,
                recomputed_layers=0,
                offload_activations=activations,
                offload_embeddings=embeddings,
                resident_weights=resident,
                compiled=False,
                workspace_bytes=workspace_bytes,
                on_cuda=on_cuda,
            )


def _options(request: bool | None, *, possible: bool, limited: bool) -> tuple[bool, ...]:
    if not possible:
        return (False,)
    if request is None:
        return (False, True) if limited else (False,)
    return (request,)


def _recompute_least(
    facts: ModelProfile, step: ResolvedStep, request: StepRequest, vram_bytes: int | None
) -> tuple[ResolvedStep, TrainingMemory] | None:
    """The step with as many layers recomputed as asked for, or else as few as fit, or all; None for what makes no sense."""
    wanted_layers = count_recomputed_layers(request.gradient_checkpointing, facts.layers)
    # What layers keep whole takes PCIe longer than the layers take the card: only hidden states travel unasked.
    least = 1 if step.offload_activations and not request.offload_activations else 0

    def take(layers: int) -> tuple[ResolvedStep, TrainingMemory]:
        planned = replace(step, recomputed_layers=layers)
        # Whether it will be compiled depends on the run's length: the larger of the two counts.
        open_choice = request.compile is None and step.on_cuda and step.engine == "fast"
        modes = (False, True) if open_choice else (bool(request.compile) and step.on_cuda,)
        # A micro-batch may be laid into a slightly larger shape, for which there is a graph.
        tokens = bucket(step.tokens) if step.on_cuda and step.engine == "fast" else step.tokens
        memories = [estimate_training(facts, replace(planned, compiled=mode, tokens=tokens)) for mode in modes]
        return planned, max(memories, key=lambda memory: memory.device_bytes)

    if wanted_layers is None and step.engine == "plain":  # all or none, and on a card all
        wanted_layers = facts.layers if step.on_cuda else 0
    if wanted_layers is not None:
        return take(wanted_layers) if wanted_layers >= least else None
    if vram_bytes is None:
        return take(least)
    place = bisect_left(range(facts.layers + 1), True, lo=least, key=lambda n: _has_room(take(n)[1], vram_bytes))
    return take(min(place, facts.layers))


def _has_room(memory: TrainingMemory, vram_bytes: int | None) -> bool:
    """Whether this is within the limit and leaves the engine its margin."""
    return vram_bytes is None or memory.device_bytes + MARGIN_BYTES * (memory.context_bytes > 0) <= vram_bytes


def _cost(step: ResolvedStep, layers: int) -> float:
    """Time a token of training takes, 1 for arithmetic alone."""
    measures = MemoryPlan(
        recomputed=step.recomputed_layers,
        offload_activations=step.offload_activations,
        offload_embeddings=step.offload_embeddings,
        resident_weights=step.resident_weights,
        workspace_bytes=step.workspace_bytes,
    )
    needs = StepNeeds(layers, 0, 0, 0, 0, 0, 0, 0)  # of which the cost looks at the layers alone
    return (1 + measures.cost(needs)) * (1 + FIXED_TOKENS / step.tokens)
