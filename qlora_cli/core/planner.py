"""Facts on a model, wishes and a limit in; the fastest settings of a training step that stay within it out."""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import psutil
import torch

from qlora_cli.core.engine import count_recomputed_layers
from qlora_cli.core.engine_graphs import bucket
from qlora_cli.core.engine_memory import SLICE_BYTES, MemoryPlan, StepNeeds
from qlora_cli.core.memory import parse_memory, read_free_bytes
from qlora_cli.core.model_facts import ModelFacts
from qlora_cli.core.optimizer import choose_optimizer
from qlora_cli.core.prediction import CONTEXT_BYTES, StepSettings, TrainingMemory, count_flops, predict_training
from qlora_cli.errors import DoesNotFit

# Beside the measures, whose cost the engine knows, a micro-batch takes a fixed time, that of about so many tokens: it
# launches every kernel and dequantises every weight twice.
FIXED_TOKENS = 500
CERTAINTY = 1.05  # past so much of the limit a prediction is never wrong (benchmarks/memory.md)
SHORTEST_ROW_TOKENS = 128  # below this a suggestion helps nobody


@dataclass(frozen=True)
class Wishes:
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
class TrainingPlan:
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


@dataclass(frozen=True)
class Suggestion:
    """Other settings that fit."""

    changes: dict[str, Any]  # setting → value, in the words of the configuration
    plan: TrainingPlan


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
    return free_bytes + CONTEXT_BYTES  # asking has made this process's CUDA context, so what is free is beside it


def plan_training(
    facts: ModelFacts,
    wishes: Wishes,
    *,
    vram_bytes: int | None,
    on_cuda: bool = True,
    longest_row_tokens: int | None = None,
    largest_batch_tokens: int | None = None,
) -> TrainingPlan:
    """Chooses what was left open, so that training is fastest within the limit.

    Micro-batches may be made smaller than asked for: a step's rows stay the same and so does its arithmetic.

    Args:
        facts: On the model and its adapter.
        wishes: What was asked for.
        vram_bytes: The limit; None for none: then nothing is recomputed, offloaded or kept resident unasked.
        on_cuda: Whether a CUDA device is meant; on the CPU nothing is offloaded, and memory is the host's.
        longest_row_tokens: Of the data; by default `max_length`.
        largest_batch_tokens: Tokens of the largest micro-batch of the data; by default batch_size * max_length.

    Returns:
        The plan. Where nothing fits it is the leanest one there is, and `fits` is False.

    Raises:
        UsageError: `gradient_checkpointing` is neither a word nor a number.
    """
    device = torch.device("cuda" if on_cuda else "cpu")
    optimizer = choose_optimizer(wishes.optimizer, device)
    row_tokens = min(wishes.max_length, longest_row_tokens or wishes.max_length)
    tokens = max(row_tokens, min(wishes.batch_size * wishes.max_length, largest_batch_tokens or 2**62))
    recomputed = count_recomputed_layers(wishes.gradient_checkpointing, facts.layers)
    if facts.trace is None:
        return TrainingPlan(
            gradient_checkpointing="on" if recomputed is None else wishes.gradient_checkpointing,
            recomputed_layers=recomputed or 0,
            layers=0,
            offload_activations=bool(wishes.offload_activations),
            offload_embeddings=bool(wishes.offload_embeddings),
            resident_weights=bool(wishes.resident_weights),
            workspace_bytes=None,
            token_budget=tokens,
            optimizer=optimizer,
            memory=None,
            flops_per_token=None,
            vram_bytes=vram_bytes,
            fits=None,
        )
    best: tuple[tuple[bool, float], StepSettings, TrainingMemory] | None = None
    for candidate in _candidates(facts, wishes, tokens, row_tokens, optimizer, on_cuda, vram_bytes is not None):
        taken = _recompute_least(facts, candidate, wishes, vram_bytes)
        if taken is None:
            continue
        step, memory = taken
        too_much = vram_bytes is not None and memory.device_bytes > vram_bytes
        rank = too_much, (memory.device_bytes if too_much else _cost(step, facts.layers))
        if best is None or rank < best[0]:
            best = rank, step, memory
    assert best is not None
    _, step, memory = best
    return TrainingPlan(
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
    facts: ModelFacts, wishes: Wishes, tokens: int, row_tokens: int, optimizer: str, on_cuda: bool, limited: bool
) -> Iterator[StepSettings]:
    """Every combination of what is open but for the number of recomputed layers."""
    budgets = [tokens]
    while budgets[-1] // 2 >= row_tokens:
        budgets.append(budgets[-1] // 2)
    movable = wishes.engine == "fast" and on_cuda
    offers = (
        _options(wishes.offload_activations, possible=movable, limited=limited),
        _options(wishes.offload_embeddings, possible=movable and facts.embedding_bytes > 0, limited=limited),
        _options(wishes.resident_weights, possible=wishes.engine == "fast", limited=limited),
    )
    for budget, (activations, embeddings, resident) in product(budgets, product(*offers)):
        sliced = movable and limited and not resident and facts.largest_weight_bytes > SLICE_BYTES
        for workspace_bytes in (None, SLICE_BYTES) if sliced else (None,):
            yield StepSettings(
                tokens=budget,
                row_tokens=row_tokens,
                engine=wishes.engine,
                optimizer=optimizer,
                recomputed_layers=0,
                offload_activations=activations,
                offload_embeddings=embeddings,
                resident_weights=resident,
                compiled=False,
                workspace_bytes=workspace_bytes,
                on_cuda=on_cuda,
            )


def _options(wish: bool | None, *, possible: bool, limited: bool) -> tuple[bool, ...]:
    if not possible:
        return (False,)
    if wish is None:
        return (False, True) if limited else (False,)
    return (wish,)


def _recompute_least(
    facts: ModelFacts, step: StepSettings, wishes: Wishes, vram_bytes: int | None
) -> tuple[StepSettings, TrainingMemory] | None:
    """The step with as many layers recomputed as asked for, or else as few as fit, or all; None for what makes no sense."""
    wish = count_recomputed_layers(wishes.gradient_checkpointing, facts.layers)
    # What layers keep whole takes PCIe longer than the layers take the card: only hidden states travel unasked.
    least = 1 if step.offload_activations and not wishes.offload_activations else 0

    def take(layers: int) -> tuple[StepSettings, TrainingMemory]:
        planned = replace(step, recomputed_layers=layers)
        # Whether it will be compiled depends on the run's length: the larger of the two counts.
        open_choice = wishes.compile is None and step.on_cuda and step.engine == "fast"
        modes = (False, True) if open_choice else (bool(wishes.compile) and step.on_cuda,)
        # A micro-batch may be laid into a slightly larger shape, for which there is a graph.
        tokens = bucket(step.tokens) if step.on_cuda and step.engine == "fast" else step.tokens
        memories = [predict_training(facts, replace(planned, compiled=mode, tokens=tokens)) for mode in modes]
        return planned, max(memories, key=lambda memory: memory.device_bytes)

    if wish is not None:
        return take(wish) if wish >= least else None
    if vram_bytes is None:
        return take(least)
    # The plain engine recomputes all layers or none.
    numbers = [0, facts.layers] if step.engine == "plain" else list(range(least, facts.layers + 1))
    place = bisect_left(numbers, True, key=lambda layers: take(layers)[1].device_bytes <= vram_bytes)
    return take(numbers[min(place, len(numbers) - 1)])


def _cost(step: StepSettings, layers: int) -> float:
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


def require_fit(plan: TrainingPlan) -> None:
    """Refuses to begin what is certain not to end well, the prediction's own error allowed for.

    Raises:
        DoesNotFit: The leanest plan takes more than the limit.
    """
    if plan.memory is not None and plan.vram_bytes is not None:
        if plan.memory.device_bytes <= plan.vram_bytes * CERTAINTY:
            return
        raise DoesNotFit(
            f"Training needs {plan.memory.device_bytes:,} bytes at the least, and {plan.vram_bytes:,} may be taken.",
            "See which settings fit with: qlora inspect --model ... --vram ..., or lower --max-length.",
        )


def suggest_fit(
    facts: ModelFacts, wishes: Wishes, *, vram_bytes: int, rank: int, regather: Callable[[int], ModelFacts]
) -> Suggestion | None:
    """The nearest settings that fit: memory measures first, then shorter rows, then a lower rank.

    Args:
        facts: On the model and its adapter.
        wishes: What does not fit.
        vram_bytes: The limit.
        rank: Of the adapter.
        regather: Facts for another rank.

    Returns:
        None where nothing fits.
    """
    free = replace(
        wishes,
        gradient_checkpointing="auto",
        offload_activations=None,
        offload_embeddings=None,
        resident_weights=None,
    )
    smallest = replace(free, batch_size=1)
    lengths = []
    length = wishes.max_length // 2
    while length >= SHORTEST_ROW_TOKENS:
        lengths.append(length)
        length //= 2
    for tried in (free, smallest, *(replace(smallest, max_length=length) for length in lengths)):
        plan = plan_training(facts, tried, vram_bytes=vram_bytes)
        if plan.fits:
            return Suggestion(_changes(wishes, tried, plan), plan)
    while rank > 1 and lengths:
        rank //= 2
        tried = replace(smallest, max_length=lengths[-1])
        plan = plan_training(regather(rank), tried, vram_bytes=vram_bytes)
        if plan.fits:
            return Suggestion({**_changes(wishes, tried, plan), "rank": rank}, plan)
    return None


def _changes(wishes: Wishes, tried: Wishes, plan: TrainingPlan) -> dict[str, Any]:
    """Settings of a plan that differ from the wishes; what was left open counts as off."""
    changes: dict[str, Any] = {
        name: getattr(tried, name)
        for name in ("batch_size", "max_length")
        if getattr(tried, name) != getattr(wishes, name)
    }
    if plan.gradient_checkpointing != wishes.gradient_checkpointing:
        changes["gradient_checkpointing"] = plan.gradient_checkpointing
    for name in ("offload_activations", "offload_embeddings"):
        if getattr(plan, name) != bool(getattr(wishes, name)):
            changes[name] = getattr(plan, name)
    if wishes.resident_weights and not plan.resident_weights:
        changes["resident_weights"] = False
    return changes
