"""How a training step keeps within memory: the measures there are, what each costs and saves, and which to take.

The one rule book. Planning asks it before anything is downloaded, with predicted bytes; the engine on the device, with
measured ones. `StepSettings` is what is asked for, `MemoryPlan` what comes of it.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from qlora_cli.core.device import LayerSeconds, read_free_bytes
from qlora_cli.core.streaming.streamed_base import evenly
from qlora_cli.errors import UsageError
from qlora_cli.kernels.cross_entropy import CHUNK_BYTES, WIDE_CHUNK_BYTES
from qlora_cli.settings.groups import StepSettings

# For what is not measured: libraries' workspaces, fragmentation, the optimizer's temporary values, a compiled layer's
# other order of allocation. With 96 MiB each of three models near their limit ran out of memory.
MARGIN_BYTES = 320 * 2**20
SLICE_BYTES = 64 * 2**20  # of a weight, where memory is too short for whole dequantised ones
CPU_RESIDENT_SHARE = 0.5  # of the host's free memory, which dequantised weights may take unasked

# Cost of each measure as a share of a step, or of one layer's forward pass: recomputing a layer, whose last linear is
# left out; hidden states on their way to the host and back; embeddings looked up by the host; weights dequantised in
# slices; dequantising. Copies hide behind so much of the time that layers compute, those to the host behind
# less: beside kernels they run at 0.7 of the rate that they have alone (39 of 55 GB/s on an H200).
RECOMPUTE_COST, OFFLOAD_COST, HOST_EMBEDDING_COST, SLICE_COST, DEQUANTISE_COST = 0.7, 0.03, 0.01, 0.05, 0.08
HIDDEN_SHARE, LEAVING_SHARE = 0.8, 0.5
# Of a layer's forward pass, to write what it saves into memory of gradients, read it back and set that to zero.
LENT_COST, LENT_ROOM = 0.25, 1.03  # and what it takes there, for tensors do not fill it to the last byte
# Of a layer's forward pass, to recompute one whose attention is kept, in rows so long that attention is half of it.
KEPT_ATTENTION_COST = 0.3
# Beside the measures a micro-batch takes a fixed time, that of about so many tokens: it launches every kernel and
# dequantises every weight twice.
FIXED_TOKENS = 500
TOP_LAYERS = 2  # that keep everything, if any layer does
# What is on its way to the host or back may take, as a multiple of what the largest layer sends: such a layer, and the
# hidden states of recomputed ones beside it, which take more time to compute than to copy.
ROOM = 1.25
# Of what a layer saves, in tensors too small to travel: with rank 16, 0.12 % of a 70B layer's, 0.24 of a 7B's.
SMALL_SHARE = 0.0025
# Of memory that nothing else needs, for unpacked experts: the rest is for captured steps of other shapes.
UNPACKED_SHARE = 0.75


@dataclass(frozen=True)
class StepNeeds:
    """Bytes a training step asks for beside the loaded model, and how long its parts take, at the largest micro-batch."""

    layers: int  # of the decoder
    kept_bytes: int = 0  # that one layer saves
    peak_bytes: int = 0  # the most one layer holds at once in its forward and backward pass, `kept_bytes` included
    beyond_bytes: int = 0  # of which the largest experts take, more than those measured, at any number of tokens
    hidden_bytes: int = 0  # of hidden states
    by_token_bytes: int = 0  # of what the decoder is given for each token beside its embedding
    attended_bytes: int = 0  # of the results of one layer's attention; none where they cannot be kept
    optimizer_bytes: int = 0  # gradients of the adapter and the optimizer's state
    gradient_bytes: int = 0  # of one layer's adapters, where they may be lent before its backward pass
    dense_bytes: int = 0  # of all linear weights dequantised
    largest_dense_bytes: int = 0  # of the largest linear weight dequantised, of which `peak_bytes` contains one
    embedding_bytes: int = 0  # of input embeddings, where they can leave the device
    seconds: LayerSeconds | None = None  # of one layer; None where it was not measured
    fixed_seconds: LayerSeconds | None = None  # which do not grow with tokens: reading weights, dequantising them
    link_bytes_per_second: float = 0.0  # of copies between the device and pinned host memory; 0 where not measured
    host_bytes: int = 0  # that activations may take
    streamed_bytes: int = 0  # of weights that come from the host or the disk in each pass
    source_bytes_per_second: float = math.inf  # that come from there, the link apart
    streaming_share: float = 1.0  # of a pass, in which weights come: its first and last hide behind nothing
    repeated_share: float = RECOMPUTE_COST  # of a layer's forward pass, that a repetition takes
    repeated_launching: float = 0.0  # seconds of the host, that a repetition takes
    head_layers: float = 0.0  # time of the output head and its loss, as a multiple of one layer's forward pass
    head_seconds: float | None = None  # that time, where it was measured
    expert_layers: int = 0  # with experts that may stay unpacked
    unpacked_bytes: int = 0  # of those of one of these layers

    def for_share(self, share: float) -> "StepNeeds":
        """The same for a micro-batch with that share of the largest one's tokens."""
        of_weights = self.largest_dense_bytes + self.beyond_bytes
        seconds, fixed = self.seconds, self.fixed_seconds
        if seconds is not None and fixed is not None:
            own = zip(fixed[:2], seconds[:2], strict=True)
            seconds = LayerSeconds(*(still + share * (whole - still) for still, whole in own))
        return replace(
            self,
            kept_bytes=int(self.kept_bytes * share),
            peak_bytes=int((self.peak_bytes - of_weights) * share) + of_weights,
            hidden_bytes=int(self.hidden_bytes * share),
            by_token_bytes=int(self.by_token_bytes * share),
            attended_bytes=int(self.attended_bytes * share),
            seconds=seconds,
        )


@dataclass(frozen=True)
class MemoryPlan:
    """How a step stays within memory."""

    recomputed: int = 0  # layers recomputed in the backward pass
    offload_activations: bool = False  # the hidden states that recomputed layers save wait on the host
    offload_embeddings: bool = False  # input embeddings stay on the host
    resident_weights: bool = False  # dequantised weights stay on the device
    workspace_bytes: int | None = None  # most of a weight dequantised at once; None for whole weights
    sent: int = 0  # other layers, of which all that they save waits on the host
    streamed: int = 0  # layers whose weights wait on the host, decided before a base is loaded
    attention_kept: int = 0  # recomputed layers whose attention's results wait there too, and are not computed again
    tile_tokens: int | None = None  # of what treats each token by itself, so many run at once; None for all
    waiting_states: float = 0.0  # share of the optimizer's state that waits there, decided before a base is loaded
    lent: int = 0  # other layers, of which all that they save waits in memory of the gradients of layers below them
    unpacked_experts: int = 0  # layers whose experts stay unpacked, as steps multiply them, beside their 4 bits

    def step_bytes(self, needs: StepNeeds) -> int:
        """Most bytes beside the loaded model that a step with these measures holds at once."""
        kept, peak = needs.kept_bytes, needs.peak_bytes - needs.largest_dense_bytes
        whole = needs.layers - self.freed
        away = min(self.recomputed, 2) if self.offload_activations else self.recomputed  # two are on their way
        attended = min(self.attention_kept, away) * needs.attended_bytes
        waiting = away * needs.hidden_bytes + attended + min(self.sent, 1) * kept
        if both := self.sent and self.offload_activations:
            waiting = max(waiting, int(min(self.sent_bytes(needs), ROOM * kept)))
        if (self.sent or self.offload_activations) and not self.tile_tokens:
            # What the decoder is given stays until the first layer's gradient; beside what is on its way lies the input of a
            # layer that is repeated, and of each that is sent what is too small to travel.
            beside = needs.hidden_bytes * (2 if both and self.recomputed else 1)
            waiting += beside + int(SMALL_SHARE * self.sent * kept)
        # Of long rows the embeddings and the norm's output count too: a card ran out at the head by one hidden state.
        head = (6 if self.tile_tokens else 4) * needs.hidden_bytes + 2 * CHUNK_BYTES
        head += WIDE_CHUNK_BYTES * self.resident_weights
        # Highest at the head or its neighbour, where all that is kept is there, in a layer that is recomputed, which keeps
        # normalised inputs that a compiled one makes again, or in one whose tensors came back, while others' travel.
        peaks = [waiting + whole * kept + max(head, peak - kept if whole else 0)]
        below = waiting + max(0, whole - TOP_LAYERS) * kept
        peaks += [below + peak + needs.hidden_bytes] if self.recomputed else []
        peaks += [below + peak] if self.sent or self.lent else []
        step = max(peaks) + needs.by_token_bytes + needs.optimizer_bytes + MARGIN_BYTES
        step += needs.dense_bytes if self.resident_weights else self.values_bytes(needs.largest_dense_bytes)
        step += self.unpacked_experts * needs.unpacked_bytes
        return step - (needs.embedding_bytes if self.offload_embeddings else 0)

    @property
    def frees_activations(self) -> bool:
        """Whether some layers do not keep all they save on the device, as where memory is short."""
        return self.freed > 0

    @property
    def freed(self) -> int:
        """How many layers do not."""
        return self.recomputed + self.sent + self.lent

    def values_bytes(self, largest_dense_bytes: int) -> int:
        """Of the buffer that one weight after another is dequantised into."""
        if self.resident_weights:
            return 0
        return largest_dense_bytes if self.workspace_bytes is None else min(largest_dense_bytes, self.workspace_bytes)

    def sent_bytes(self, needs: StepNeeds) -> int:
        """Bytes that wait on the host."""
        inputs = self.recomputed * needs.hidden_bytes * self.offload_activations
        return self.sent * needs.kept_bytes + inputs + self.attention_kept * needs.attended_bytes

    def keep_attention(self, left_bytes: int, attended_bytes: int) -> "MemoryPlan":
        """Where attention's results are kept at all, of as many more layers as what is left of the host takes, or as fewer."""
        kept = self.attention_kept and attended_bytes and self.attention_kept + left_bytes // attended_bytes
        return replace(self, attention_kept=min(max(0, kept), self.recomputed))

    def with_experts(self, layers: int, layer_bytes: int, left_bytes: int) -> "MemoryPlan":
        """Experts of as many layers unpacked as there is room for in what is left, once nothing else is short of memory."""
        if not self.resident_weights or self.frees_activations or self.offload_activations or not layer_bytes:
            return self
        room = int(UNPACKED_SHARE * max(0, left_bytes))
        return replace(self, unpacked_experts=min(layers, room // layer_bytes))

    def cost(self, needs: StepNeeds) -> float:
        """Time that the measures take, as a share of a step."""
        seconds = needs.seconds or LayerSeconds(1.0, 1.0)
        layers = max(needs.layers, 1)
        step = layers * seconds.device
        repeated = self._repeated(needs) * seconds.forward
        return (
            (repeated + LENT_COST * self.lent * seconds.forward) / step
            + self._waiting_seconds(needs, seconds, repeated) / step
            + OFFLOAD_COST * (self.offload_activations or self.sent > 0)
            + HOST_EMBEDDING_COST * self.offload_embeddings
            + SLICE_COST * (self.workspace_bytes is not None)
            + DEQUANTISE_COST * (not self.resident_weights)
        )

    def micro_batch_seconds(self, needs: StepNeeds) -> float:
        """Time that a micro-batch takes by what was measured of one layer and of the link, with what is repeated and what
        copies keep waiting, or by what the host takes to launch its layers, if that is more."""
        seconds = needs.seconds or LayerSeconds(0.0, 0.0)
        repeated = self._repeated(needs) * seconds.forward
        head = needs.head_layers * seconds.forward if needs.head_seconds is None else needs.head_seconds
        computing = needs.layers * seconds.device + head + repeated + LENT_COST * self.lent * seconds.forward
        launching = needs.layers * seconds.launching + self.recomputed * needs.repeated_launching
        return max(launching, computing + self._waiting_seconds(needs, seconds, repeated))

    def _repeated(self, needs: StepNeeds) -> float:
        """Forward passes of a layer that are repeated."""
        again = needs.repeated_share * (self.recomputed - self.attention_kept)
        return again + KEPT_ATTENTION_COST * self.attention_kept

    def token_cost(self, layers: int, tokens: int) -> float:
        """Time a token takes in micro-batches of so many, by the costs alone: 1 for arithmetic without any measure."""
        return (1 + self.cost(StepNeeds(layers))) * (1 + FIXED_TOKENS / tokens)

    def _waiting_seconds(self, needs: StepNeeds, seconds: LayerSeconds, repeated: float) -> float:
        """How long layers wait for copies to the host and back."""
        if not needs.link_bytes_per_second:  # hidden states travel in time, whole layers' tensors do not
            return 10 * OFFLOAD_COST * self.sent * seconds.device
        copying = self.sent_bytes(needs) / needs.link_bytes_per_second
        weights = needs.streamed_bytes / min(needs.link_bytes_per_second, needs.source_bytes_per_second)
        forward, backward = needs.layers * seconds.forward, needs.layers * seconds.backward + repeated
        # Activations leave while weights come, which a link does at once; backward both come. Weights, equal and equally
        # far apart, hide behind all that computes between the first and the last of them.
        hiding = needs.streaming_share
        waiting = max(0.0, copying - LEAVING_SHARE * forward, weights - hiding * forward)
        return waiting + max(0.0, copying + weights - hiding * (HIDDEN_SHARE if copying else 1.0) * backward)

    def numbers(self, layers: int) -> tuple[frozenset[int], frozenset[int]]:
        """Which layers are recomputed, and which are sent: evenly among all but the last, so that copies have the time
        of the layers between. The last ones are whole if any are: they make room before the others' tensors return."""
        away = min(self.recomputed + self.sent, layers)
        numbers = evenly(range(self.lent_numbers(layers).start), away)
        sent = frozenset(evenly(numbers, min(self.sent, away)))
        return frozenset(numbers) - sent, sent

    def lent_numbers(self, layers: int) -> range:
        """Layers whose saved tensors wait in memory of gradients: the last ones but for those that are whole."""
        end = layers - min(TOP_LAYERS, max(0, layers - self.freed))
        return range(end - self.lent, end)

    def without_loan(self) -> "MemoryPlan":
        """Of a micro-batch whose gradients do not lend their memory: layers that would have had it are recomputed."""
        return replace(self, recomputed=self.recomputed + self.lent, lent=0)

    def lenders(self, layers: list[Any]) -> list[Any]:
        """Those whose gradients lend their memory, in a micro-batch with whole layers and in one without."""
        return layers[: max(0, len(layers) - TOP_LAYERS - self.lent)] if self.lent else []

    def describe(self, layers: int) -> list[str]:
        """The measures in words, of a model of so many layers."""
        parts = [f"{self.recomputed} of {layers} layers recomputed"] if self.recomputed else []
        if self.sent:
            parts.append(f"activations of {self.sent} on the host")
        elif self.offload_activations:
            attended = f" and attention's results of {self.attention_kept}" * (self.attention_kept > 0)
            parts.append(f"hidden states{attended} on the host")
        parts += [f"activations of {self.lent} in memory of gradients"] if self.lent else []
        parts += [f"tiles of {self.tile_tokens:,} tokens"] if self.tile_tokens else []
        parts += ["dequantised weights resident"] if self.resident_weights else []
        parts += [f"experts of {self.unpacked_experts} unpacked"] if self.unpacked_experts else []
        return parts + ["weights dequantised in slices"] * (self.workspace_bytes is not None)


def count_recomputed_layers(settings: StepSettings, layers: int, *, on_cuda: bool = True) -> int | None:
    """How many of `layers` decoder layers are recomputed in the backward pass; None leaves it open.

    The plain engine recomputes all of them or none, and unasked all of them on a card.

    Raises:
        UsageError: `gradient_checkpointing` is neither a word nor a number of layers.
    """
    asked, words = settings.gradient_checkpointing, {"auto": None, "on": layers, "off": 0}
    if asked not in words and not asked.isdecimal():
        raise UsageError(f"--gradient-checkpointing is {asked!r}.", "Use auto, on, off, or a number of layers.")
    count = words[asked] if asked in words else min(int(asked), layers)
    if settings.engine == "plain":
        return layers if (on_cuda if count is None else count) else 0
    return count


def settle(
    settings: StepSettings,
    dense_bytes: int,
    *,
    on_cuda: bool,
    sharded: bool,
    streamed: bool = False,
    shared: bool = False,
) -> StepSettings:
    """Without what a base sharded over several cards rules out, whole weights and compiled layers, or packs whose tokens
    they share, compiled layers, or a base that streams, whole weights; and on the CPU with the fast engine's dequantised
    weights of `dense_bytes` resident, unasked, where the host has the memory."""
    if sharded:
        return replace(settings, offload_embeddings=False, resident_weights=False, compile=False)
    if shared:
        settings = replace(settings, compile=False)
    if streamed:
        return replace(settings, resident_weights=False)
    if on_cuda or settings.engine != "fast" or settings.resident_weights is not None:
        return settings
    free_bytes = read_free_bytes(torch.device("cpu"))
    return replace(settings, resident_weights=dense_bytes < CPU_RESIDENT_SHARE * free_bytes)


def plan_as_asked(settings: StepSettings, layers: int, *, resident_weights: bool) -> MemoryPlan:
    """The plan of steps that nothing is known of: what was asked for, and nothing else."""
    recomputed, away = count_recomputed_layers(settings, layers), bool(settings.offload_activations)
    sent = layers if away and recomputed == 0 else 0
    embeddings, tile_tokens = bool(settings.offload_embeddings), settings.tile_tokens or None
    return MemoryPlan(recomputed or 0, away, embeddings, resident_weights, sent=sent, tile_tokens=tile_tokens)


def offer_measures(
    settings: StepSettings,
    *,
    embedding_bytes: int,
    largest_dense_bytes: int,
    workspaces: tuple[int | None, ...] = (None, SLICE_BYTES),
    on_cuda: bool = True,
    limited: bool = True,
) -> Iterator[MemoryPlan]:
    """Every combination of the measures beside recomputation that `settings` leave open, the plainest first.

    Args:
        embedding_bytes: As in `StepNeeds`, and so `largest_dense_bytes`.
        workspaces: Which `workspace_bytes` may be chosen.
        on_cuda: Whether there is a device beside the host, which alone anything can be moved off.
        limited: Whether memory is; otherwise nothing is done unasked.
    """
    fast = settings.engine == "fast"
    movable = fast and on_cuda

    def choices(asked: bool | None, *, possible: bool) -> tuple[bool, ...]:
        if not possible or asked is not None:
            return (possible and bool(asked),)
        return (False, True) if limited and on_cuda else (False,)

    for activations, embeddings, resident in product(
        choices(settings.offload_activations, possible=movable),
        choices(settings.offload_embeddings, possible=movable and embedding_bytes > 0),
        choices(settings.resident_weights, possible=fast),
    ):
        sliced = movable and limited and not resident and largest_dense_bytes > SLICE_BYTES
        for workspace_bytes in workspaces if sliced else (None,):
            tiles = settings.tile_tokens or None
            plan = MemoryPlan(0, activations, embeddings, resident, workspace_bytes, tile_tokens=tiles)
            yield plan
            if plan.tile_tokens and activations:  # in rows so long that attention is what takes time
                yield replace(plan, attention_kept=1)  # or as many more as there is room for


def least_recomputed(settings: StepSettings, *, offload_activations: bool) -> int:
    """Layers to recompute at the least: what layers keep whole takes PCIe longer than the layers take the card, so that
    only hidden states leave unasked."""
    return 1 if offload_activations and not settings.offload_activations else 0


def plan_memory(
    needs: StepNeeds,
    available_bytes: int,
    settings: StepSettings,
    *,
    workspaces: tuple[int | None, ...] = (None, SLICE_BYTES),
) -> MemoryPlan:
    """The fastest way for the fast engine to stay within what the device has left, or the leanest where none does.

    What `settings` give is not decided anew: `offload_activations` sends the hidden states of recomputed layers to the
    host, or all that layers save where none is recomputed. `workspaces` are the `workspace_bytes` that may be chosen.
    """
    recomputed = count_recomputed_layers(settings, needs.layers)
    table, largest = needs.embedding_bytes, needs.largest_dense_bytes
    offered = list(offer_measures(settings, embedding_bytes=table, largest_dense_bytes=largest, workspaces=workspaces))
    plans = [
        replace(measures, recomputed=layers, sent=sent, lent=lent)
        for layers in (range(needs.layers + 1) if recomputed is None else (recomputed,))
        for measures in offered
        if layers >= least_recomputed(settings, offload_activations=measures.offload_activations)
        for sent in _sent_counts(needs, layers, settings.offload_activations)
        for lent in sorted(
            {0, 0 if recomputed is not None else min(lendable_layers(needs), needs.layers - layers - sent)}
        )
    ]
    plans = [plan.keep_attention(needs.host_bytes - plan.sent_bytes(needs), needs.attended_bytes) for plan in plans]
    fitting = [plan for plan in plans if plan.step_bytes(needs) <= available_bytes]
    # The other micro-batches of a step find gradients that lend no memory.
    fitting = [p for p in fitting if not p.lent or p.without_loan().step_bytes(needs) <= available_bytes]
    if not fitting:
        return min(plans, key=lambda plan: (plan.step_bytes(needs), plan.cost(needs)))
    best = min(fitting, key=lambda plan: plan.cost(needs))
    return best.with_experts(needs.expert_layers, needs.unpacked_bytes, available_bytes - best.step_bytes(needs))


def lendable_layers(needs: StepNeeds) -> int:
    """How many layers' saved tensors find room in memory of the gradients of those below them."""
    below = needs.layers - TOP_LAYERS
    return max(0, int(below * needs.gradient_bytes / (LENT_ROOM * needs.kept_bytes + needs.gradient_bytes or 1)))


def _sent_counts(needs: StepNeeds, recomputed: int, offload_activations: bool | None) -> Iterable[int]:
    """How many layers may have all that they save on the host."""
    left = needs.layers - recomputed
    if offload_activations is not None:
        return (left if offload_activations and not recomputed else 0,)
    room = needs.host_bytes // needs.kept_bytes if needs.kept_bytes else 0
    return range(min(left, room) + 1) if needs.link_bytes_per_second else (0,)
