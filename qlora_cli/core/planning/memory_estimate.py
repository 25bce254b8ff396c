"""Memory estimate of training, generation and merging: bytes at the highest moment, part by part.

A training step is highest at one of these moments: in the loss, when every layer has kept what it keeps; in the backward
pass of a layer, when those below still hold theirs; in the forward pass of a layer. `activation_trace` has the peak of
each by itself.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from math import gcd, inf
from typing import Any, NamedTuple

from qlora_cli.core.decoding.decoder import PREFILL_TOKENS
from qlora_cli.core.device import CONTEXT_BYTES
from qlora_cli.core.engine.memory_plan import MemoryPlan
from qlora_cli.core.matmul.expert_stacks import has_many_rows
from qlora_cli.core.planning.activation_trace import LayerTrace, ModelTrace, Pass
from qlora_cli.core.planning.meta_ops import Growth, Peak
from qlora_cli.core.planning.model_profile import ModelProfile
from qlora_cli.core.streaming.host_memory import locked_bytes
from qlora_cli.core.streaming.ring import SLOTS
from qlora_cli.core.streaming.streamed_base import evenly
from qlora_cli.core.training.flat_parameters import ALIGNMENT_ELEMENTS
from qlora_cli.core.training.optimizer import allocated_state_bytes, state_bytes, waiting_bytes
from qlora_cli.kernels.cross_entropy import chunk_tokens

# What PyTorch's allocator counts beyond what was asked for: it cuts blocks in steps of 512 bytes and leaves up to 1 MiB
# of a large one unused (c10/cuda/CUDACachingAllocator.cpp, should_split). Measured: 0.3 % on models of 4 to 39 GB.
ALLOCATOR_SHARE = 0.003
# Two cuBLAS workspaces of 32 MiB (of the forward pass and of autograd's thread) and the like, from the same allocator;
# measured as what is left on a model of 0.6 GB.
CUBLAS_BYTES = 90 * 2**20
PROCESS_BYTES = 3 * 2**30  # host memory of Python with PyTorch, transformers and CUDA's libraries
GATHERED_LAYERS = 4  # of a sharded base: the one that computes and the next, each as it arrives and as it is used
SHARD_BYTES = 5 * 10**9  # of a checkpoint on the hub, at most
MERGED_AT_ONCE = 16  # weights that `qlora merge` holds, one a core
# Rows that `qlora merge` works on at a time, in float32 with their intermediate results.
MERGE_DEVICE_BYTES = 2**24 * 32


@dataclass(frozen=True)
class ResolvedStep:
    """What decides the memory of a training step, all resolved."""

    tokens: int  # most in a micro-batch
    row_tokens: int  # in the longest row
    optimizer: str
    measures: MemoryPlan = field(default_factory=MemoryPlan)
    engine: str = "fast"
    in_8_bits: bool = False  # whether frozen linears and experts are multiplied so
    compiled: bool = False
    on_cuda: bool = True
    shards: int = 1  # cards that the base is sharded over
    shard_offload: bool = False  # their shards of it wait on the host
    context: int = 1  # cards that share the tokens of each micro-batch

    @property
    def part_tokens(self) -> int:
        """Tokens of a micro-batch that one card holds."""
        return -(-self.tokens // self.context)

    def runs_of(self, layers: int) -> "list[LayerRun]":
        """How each of so many layers runs, as the engine chooses them; all that they save leaves where none is recomputed."""
        recomputed, sent = self.measures.numbers(layers)
        away = self.measures.offload_activations
        attended = evenly(sorted(recomputed), self.measures.attention_kept)
        return [
            LayerRun(i in recomputed, i in sent or (away and (i in recomputed or not recomputed)), i in attended)
            for i in range(layers)
        ]


class LayerRun(NamedTuple):
    """How a layer of a planned step runs."""

    recomputed: bool
    away: bool  # whether what it holds waits on the host
    attended: bool  # whether its results of attention wait there too


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes at the highest moment of training."""

    moment: str  # which it is
    base_bytes: int  # 4-bit weights, norms, embeddings, head
    resident_bytes: int  # dequantised weights and unpacked experts kept beside them
    adapter_bytes: int  # parameters, and their copy in the compute dtype
    gradient_bytes: int
    optimizer_bytes: int  # states in plain memory
    activation_bytes: int  # held by other layers at that moment
    working_bytes: int  # taken by the pass or loss of that moment, dequantised weights included
    allocator_bytes: int
    paged_bytes: int  # states in managed memory: on the card while it has room, and in no peak that PyTorch reports
    context_bytes: int
    host_bytes: int  # memory of the host beside all that, for each card
    gathered_bytes: int = 0  # of a base sharded over several cards: what is there whole at once

    @property
    def peak_bytes(self) -> int:
        """As `torch.cuda.max_memory_allocated` reports it."""
        held_bytes = self.base_bytes + self.gathered_bytes + self.resident_bytes + self.adapter_bytes
        trained_bytes = self.gradient_bytes + self.optimizer_bytes
        return held_bytes + trained_bytes + self.activation_bytes + self.working_bytes + self.allocator_bytes

    @property
    def device_bytes(self) -> int:
        """As the card sees it."""
        return self.peak_bytes + self.paged_bytes + self.context_bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields, the sums first."""
        return {"peak_bytes": self.peak_bytes, "device_bytes": self.device_bytes, **asdict(self)}


def estimate_training(profile: ModelProfile, step: ResolvedStep) -> TrainingMemory:
    """Memory of training a traced model at its highest moment, by the largest micro-batch."""
    at_once = min(step.part_tokens, step.measures.tile_tokens or step.part_tokens)
    of_experts = step.in_8_bits and has_many_rows(at_once, profile.met_experts)
    trace = profile.traced(step.measures.tile_tokens, in_8_bits=of_experts)
    assert trace is not None
    runs = step.runs_of(len(trace.layers))
    moment, activation_bytes, working_bytes = max(
        _moments(trace, runs, profile.itemsize, step), key=lambda found: found[1] + found[2]
    )
    trained = _buffered(profile.footprint.trainable_numels)
    copied = trained - profile.footprint.expert_adapter_parameters
    copies_bytes = copied * profile.itemsize if step.engine == "fast" and profile.itemsize < 4 else 0
    states_bytes = state_bytes(step.optimizer, trained)
    paged = step.on_cuda and step.optimizer.startswith("paged")
    waiting = step.measures.waiting_states
    base_bytes, gathered_bytes, shard_bytes = _sharded_base(profile, step)
    streamed_bytes, locked = streamed_base_bytes(profile, step.measures)
    parts = {
        "base_bytes": base_bytes - streamed_bytes - profile.embedding_bytes * step.measures.offload_embeddings,
        "gathered_bytes": gathered_bytes,
        "resident_bytes": profile.dense_bytes * step.measures.resident_weights
        + step.measures.unpacked_experts * profile.unpacked_bytes,
        "adapter_bytes": 4 * trained + copies_bytes,
        "gradient_bytes": 4 * trained,
        "optimizer_bytes": allocated_state_bytes(step.optimizer, trained, waiting) if step.on_cuda else states_bytes,
        "activation_bytes": int(activation_bytes),
        "working_bytes": int(working_bytes) + _code_bytes(profile, step) + CUBLAS_BYTES * step.on_cuda,
    }
    offloaded_bytes = sum(
        _held(layer, profile.itemsize, run, step) for layer, run in zip(trace.layers, runs, strict=True) if run.away
    )
    return TrainingMemory(
        moment=moment,
        **parts,
        allocator_bytes=int(ALLOCATOR_SHARE * sum(parts.values())) if step.on_cuda else 0,
        paged_bytes=states_bytes if paged and not waiting else 0,
        context_bytes=CONTEXT_BYTES if step.on_cuda else 0,
        host_bytes=PROCESS_BYTES
        + profile.embedding_bytes * step.measures.offload_embeddings
        + int(offloaded_bytes)
        + locked
        + waiting_bytes(step.optimizer, trained) * (waiting > 0)
        + shard_bytes * step.shard_offload,
    )


@cache
def _buffered(numels: tuple[int, ...]) -> int:
    """Elements of the buffers that parameters of so many lie in."""
    return sum(-(-numel // ALIGNMENT_ELEMENTS) * ALIGNMENT_ELEMENTS for numel in numels)


def _sharded_base(profile: ModelProfile, step: ResolvedStep) -> tuple[int, int, int]:
    """Bytes of the base that a card holds, of what it gathers from the others at once, and of its share of what is sharded.

    Sharded are the 4-bit weights, and embeddings and head where these are two plain tables (core/engine/fsdp.py).
    """
    whole_bytes, weights_bytes = profile.footprint.base_bytes, profile.footprint.quantized_bytes
    if step.shards == 1:
        return whole_bytes, 0, 0
    table_bytes = profile.embedding_bytes
    sharded_bytes = weights_bytes + 2 * table_bytes
    share_bytes = -(-sharded_bytes // step.shards)
    gathered_bytes = max(GATHERED_LAYERS * weights_bytes // max(1, profile.layers), 2 * table_bytes)
    held_bytes = whole_bytes - sharded_bytes + (0 if step.shard_offload else share_bytes)
    return held_bytes, gathered_bytes, share_bytes


def streamed_base_bytes(profile: ModelProfile, measures: MemoryPlan) -> tuple[int, int]:
    """Bytes of the layers that wait on the host beside those that a ring holds at a time, and of the host's memory."""
    waiting = evenly(profile.layer_bytes, measures.streamed)
    if not waiting:
        return 0, 0
    largest = max(waiting)
    return max(0, sum(waiting) - min(SLOTS, len(waiting)) * largest), locked_bytes(largest, len(waiting))


def copied_bytes(profile: ModelProfile, measures: MemoryPlan) -> int:
    """What streaming copies in a micro-batch, there and back: all that wait, but those the ring holds at the turn."""
    waiting = evenly(profile.layer_bytes, measures.streamed)
    return 2 * (sum(waiting) - sum(waiting[:SLOTS]))


def _moments(
    trace: ModelTrace, runs: list[LayerRun], itemsize: int, step: ResolvedStep
) -> Iterator[tuple[str, float, float]]:
    """(name, bytes that other layers hold, bytes of the moment itself) of every moment that can be the highest."""
    size = step.part_tokens, step.row_tokens
    most_scratch = inf if step.measures.workspace_bytes is None else step.measures.workspace_bytes
    below = 0.0  # held on the device by the layers below
    in_transit = 0.0  # on its way to or from the host: of the layer just below of those that wait there
    # Whoever calls the decoder holds what the first layer is given, also when it is on its way no more; the loss counts it.
    given = 0.0
    known: dict[tuple, tuple[float, float, float]] = {}  # a model has many layers of few kinds
    for index, (layer, run) in enumerate(zip(trace.layers, runs, strict=True)):
        kind = id(layer), run
        if kind not in known:
            repeated = layer.compiled if step.compiled else layer.recomputed
            passes = repeated if run.recomputed else _whole(layer, itemsize, step)
            exchanged = _exchanged(layer, itemsize, step)
            hidden_bytes = layer.recomputed.held.bytes(*size)
            known[kind] = (
                passes.forward.bytes(*size, most_scratch) + hidden_bytes + exchanged,
                passes.backward.bytes(*size, most_scratch) + exchanged,
                _held(layer, itemsize, run, step),
            )
        forward, backward, held = known[kind]
        present = below + in_transit
        yield f"forward pass of layer {index}", present + given, forward
        yield f"backward pass of layer {index}", present, backward
        if run.away:
            in_transit = held
            given = trace.layers[0].hidden * itemsize * step.part_tokens if index else 0.0
        else:
            below += held
    logits_bytes = step.part_tokens * trace.vocabulary * itemsize  # of which the loss holds a chunk at a time
    tail = trace.tail.bytes(*size, logits_bytes)
    if step.on_cuda and step.measures.resident_weights:
        narrow, wide = (chunk_tokens(trace.vocabulary, itemsize, wide=way) for way in (False, True))
        tail += (min(step.part_tokens, wide) - min(step.part_tokens, narrow)) * trace.vocabulary * itemsize
    yield "loss", below + in_transit, tail


def _code_bytes(profile: ModelProfile, step: ResolvedStep) -> int:
    """Of what products in 8 bits hold beside the dequantised weight that a trace counts: the codes of the largest linear's
    rows, and one byte a value less for its weight, where that is not resident."""
    assert profile.trace is not None
    values = profile.largest_weight_bytes // profile.itemsize
    if not step.in_8_bits or not values:
        return 0
    hidden = max(1, max(layer.hidden for layer in profile.trace.layers))
    codes, widest = step.part_tokens, values // hidden
    if step.measures.tile_tokens:  # an MLP's are of a tile, those around attention of all rows
        codes = max(codes * hidden, min(codes, step.measures.tile_tokens) * widest)
    else:
        codes *= widest
    return max(0, codes - (0 if step.measures.resident_weights else values))


def _whole(layer: LayerTrace, itemsize: int, step: ResolvedStep) -> Pass:
    """A layer that keeps what it saves. Compiled, it keeps less wherever not all layers do, as the engine compiles it."""
    if not step.compiled:
        return layer.kept
    saved = layer.compiled.held.per_token - itemsize * layer.lean
    if not (step.measures.frees_activations and layer.lean and saved > 0):
        return layer.compiled

    def less(peak: Peak) -> Peak:
        moments = ((scratch, replace(g, per_token=max(0.0, g.per_token - saved))) for scratch, g in peak.moments)
        return Peak(tuple(moments))

    compiled = layer.compiled
    return Pass(Growth(itemsize * layer.lean), less(compiled.forward), less(compiled.backward))


def _held(layer: LayerTrace, itemsize: int, run: LayerRun, step: ResolvedStep) -> float:
    """Bytes a layer holds between its forward and its backward pass."""
    passes = layer.recomputed if run.recomputed else _whole(layer, itemsize, step)
    held = passes.held.bytes(step.part_tokens, step.row_tokens)
    if run.attended:
        held += step.part_tokens * itemsize * layer.queries
    return held + _exchanged(layer, itemsize, step) * (not run.recomputed)


def attended_bytes(profile: ModelProfile, step: ResolvedStep) -> int:
    """Of the results of one layer's attention, of the largest."""
    trace = profile.traced(step.measures.tile_tokens)
    assert trace is not None
    return step.part_tokens * profile.itemsize * max(layer.queries for layer in trace.layers)


def _exchanged(layer: LayerTrace, itemsize: int, step: ResolvedStep) -> float:
    """Bytes that a layer holds more where cards share tokens: attention's output by heads beside that by tokens, and
    copies of keys and values of which there are fewer than cards."""
    if step.context == 1:
        return 0.0
    copies = step.context // gcd(max(1, layer.key_heads), step.context) - 1
    return step.part_tokens * itemsize * (layer.queries + copies * layer.keys_and_values)


def count_flops(profile: ModelProfile, step: ResolvedStep) -> float:
    """Arithmetic of training on one token, in floating-point operations.

    A weight takes 2 in the forward pass and 2 in the backward pass to its input, and 2 more where its layer is
    recomputed; a frozen one has no gradient of its own, an adapter's takes 2 (https://arxiv.org/abs/2001.08361, 2.1).
    Causal attention takes 2 * row_tokens * width a layer forward and 2.5 times that backward.
    """
    assert profile.trace is not None
    passes = 2 + step.measures.recomputed / max(1, profile.layers)
    head = profile.trace.vocabulary * profile.trace.layers[-1].hidden
    attention = sum(2 * step.row_tokens * layer.hidden for layer in profile.trace.layers)
    frozen = 2 * passes * profile.met_numel + 4 * head
    attended = passes - step.measures.attention_kept / max(1, profile.layers)
    of_experts = profile.footprint.expert_adapter_parameters
    trained = profile.footprint.trainable_parameters - (1 - profile.met_experts) * of_experts
    return frozen + 2 * (passes + 1) * trained + (attended + 1.5) * attention


def estimate_generation(profile: ModelProfile, *, rows: int, row_tokens: int) -> dict[str, int]:
    """Memory of answering `rows` prompts at once, prompt and answer `row_tokens` long together."""
    assert profile.trace is not None
    layers = profile.trace.layers
    keys_and_values = sum(layer.keys_and_values or 2 * layer.hidden for layer in layers)
    prompts = min(PREFILL_TOKENS, rows * row_tokens), row_tokens
    forward_bytes = max(layer.recomputed.forward.bytes(*prompts) for layer in layers)
    logits_bytes = 3 * 4 * rows * profile.trace.vocabulary  # in float32, scaled and as probabilities
    parts = {
        "base_bytes": profile.footprint.base_bytes,
        "adapter_bytes": profile.footprint.adapter_bytes,
        "cache_bytes": rows * row_tokens * keys_and_values * profile.itemsize,
        "working_bytes": int(forward_bytes) + logits_bytes + CUBLAS_BYTES,
    }
    peak_bytes = sum(parts.values())
    device_bytes = peak_bytes + CONTEXT_BYTES
    return {"peak_bytes": peak_bytes, "device_bytes": device_bytes, **parts, "context_bytes": CONTEXT_BYTES}


def estimate_merging(profile: ModelProfile) -> dict[str, int]:
    """Memory and disk of `qlora merge`, which works tensor by tensor and shard by shard."""
    largest_bytes = max(profile.footprint.quantized_numels, default=0) * 2
    shard_bytes = min(profile.merged_bytes, SHARD_BYTES)
    return {
        "device_bytes": MERGE_DEVICE_BYTES + CONTEXT_BYTES,
        "host_bytes": PROCESS_BYTES // 3 + min(shard_bytes, MERGED_AT_ONCE * largest_bytes),
        "disk_bytes": profile.merged_bytes,
    }


def estimate_disk(profile: ModelProfile, *, is_local: bool, optimizer: str, kept_checkpoints: int) -> dict[str, int]:
    """What training reads, downloads and writes; of a model whose weights are on this machine nothing is downloaded."""
    trained = profile.footprint.trainable_parameters
    checkpoint_bytes = 4 * trained + state_bytes(optimizer, trained)
    return {
        "weights_bytes": profile.stored_bytes,
        "download_bytes": 0 if is_local else profile.stored_bytes,
        "base_cache_bytes": profile.footprint.base_bytes,
        "run_bytes": 4 * trained + checkpoint_bytes * (kept_checkpoints + 1),  # one more while it is written
    }
