"""Calibration of an engine: layers are tried out on random tokens, and steps are planned by what that measured."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qlora_cli.core.data.packing import MicroBatch
from qlora_cli.core.device import LayerSeconds, read_free_bytes, waiting_room_bytes
from qlora_cli.core.distributed.context_group import ContextGroup
from qlora_cli.core.engine.cuda_graphs import bucket_tokens
from qlora_cli.core.engine.decoder_layers import (
    LayerBytes,
    LayerCall,
    LayerPlan,
    capture_first_call,
    find_layers,
    measure_layer,
    time_layer,
)
from qlora_cli.core.engine.lm_head import Head, time_head
from qlora_cli.core.engine.lora_linear import ATTRIBUTE, AdapterValues, FusedLinears
from qlora_cli.core.engine.memory_plan import SLICE_BYTES, MemoryPlan, StepNeeds, plan_memory
from qlora_cli.core.engine.offload import link_bytes_per_second
from qlora_cli.core.engine.packed_attention import HeldLayers, attended_share, is_like, pack_mask
from qlora_cli.core.experts.held_routing import HeldRouting
from qlora_cli.core.matmul.arithmetic import met_elements
from qlora_cli.core.matmul.choice import (
    TRIAL_TOKENS,
    ProductRecord,
    ProductTrial,
    choose_products,
    is_wanted,
    trial_batch,
)
from qlora_cli.core.matmul.expert_stacks import ExpertStacks
from qlora_cli.core.models.files import context_length
from qlora_cli.core.models.structure import bytes_by_token, inputs_by_token, underlying_model
from qlora_cli.core.streaming.streamed_base import describe_speed
from qlora_cli.core.tiling.kept_attention import can_keep_attention
from qlora_cli.errors import first_line
from qlora_cli.events import Report
from qlora_cli.kernels.attention import LONG_ROW_TOKENS
from qlora_cli.settings.groups import StepSettings

REDUCTION_BYTES, MOST_REDUCTIONS = 2**28, 16  # how much less memory is planned with each time it runs out
# Rows of the pack that the engine is tried on. Their sum is no size of a weight, so that activations are known by it.
TRIAL_LENGTHS = (24, 43)
# By which a token that sees one of another row differs at the least, in deviations of hidden states. Experts multiply tokens
# in groups, whose sizes change with those of another row: in fp32 that alone is 1.4e-6 after 4 layers.
LEAST_LEAK = 1e-4
LONG_ROW = 1024  # of so many tokens attention has other kernels
LEAST_TRIAL_TOKENS = 32
LONGEST_TRIAL_SECONDS = 5  # of a layer that is timed once more, for what is said alone


class Calibration:
    """Runs of one model instance before its first step."""

    def __init__(
        self, model: nn.Module, decoder: Any, embedding: Any, values: AdapterValues, device: torch.device
    ) -> None:
        self.model, self.decoder, self.embedding, self.values, self.device = model, decoder, embedding, values, device
        self.routing, self.held = HeldRouting(decoder), HeldLayers(find_layers(decoder))
        self.packed = self.equal_rows = False  # whether attention takes packs by now; rows of one length as such
        self.hidden_bytes = self.state_bytes = 0  # of a token before the layer that was measured; of one of its states

    @contextmanager
    def _evaluated(self) -> Iterator[None]:
        """The model in evaluation mode for the time being, with today's adapters."""
        was_training = self.model.training
        self.model.eval()
        try:
            self.values.refresh()
            yield
        finally:
            self.model.train(was_training)

    def ids(self, tokens: int) -> np.ndarray:
        """Random token ids, the same each time: int64 (tokens,)."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.embedding.weight.shape[0], (tokens,), generator=generator).numpy()

    def _ids(self, tokens: int) -> Tensor:
        return torch.from_numpy(self.ids(tokens))[None].to(self.device)

    def inputs(self, tokens: int) -> dict[str, Tensor]:
        """A row of random tokens, embedded where the embeddings are not on the device."""
        return self._whole(self._ids(tokens))

    def _whole(self, ids: Tensor) -> dict[str, Tensor]:
        weight = self.embedding.weight
        # Sharded embeddings are gathered on the device, and FSDP2 asks for the whole model to be called first.
        away = weight.device.type != self.device.type and not isinstance(weight, DTensor)
        return self._embedded(ids) if away else {"input_ids": ids}

    def _embedded(self, ids: Tensor) -> dict[str, Tensor]:
        """What a step gives the decoder for those tokens, ids of which it is not given."""
        embedded = self.embedding(ids.to(self.embedding.weight.device)).to(self.device)
        return {"inputs_embeds": embedded, **inputs_by_token(self.decoder, ids.to(self.device))}

    def _pack_states(
        self, ids: Tensor, lengths: tuple[int, ...], longest: int = 0, context: ContextGroup | None = None
    ) -> Tensor:
        """Hidden states (T, size) of rows of those lengths, or of this rank's part; attention may expect a `longest` row."""
        positions = torch.cat([torch.arange(n) for n in lengths])[None].to(self.device)
        ends = torch.tensor(lengths).cumsum(0).tolist()
        if context is not None:
            ids, positions, context.longest = context.part(ids), context.part(positions), max(lengths)
            ends.append(ids.numel() * context.size)
        boundaries = torch.tensor([0, *ends], dtype=torch.int32)
        equal = len(lengths) if self.equal_rows and len(set(lengths)) == 1 else 0
        mask = pack_mask(boundaries.to(self.device), max(longest, *lengths), equal)
        inputs = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
        return self.decoder(**self._embedded(ids), **inputs).last_hidden_state[0]

    def run(self, lengths: tuple[int, ...] = TRIAL_LENGTHS) -> None:
        """One forward pass of rows of those lengths."""
        self.values.refresh()
        with torch.no_grad():
            ids = self._ids(sum(lengths))
            if self.packed:
                self._pack_states(ids, lengths)
            else:
                rows = len(lengths) if len(set(lengths)) == 1 else 1
                self.decoder(**self._embedded(ids.view(rows, -1)), use_cache=False)

    def rows_of(self, tokens: int) -> tuple[int, ...]:
        """Lengths of rows with so many tokens together, or a few more, for each of which the model has positions."""
        context = context_length(self.decoder.config) or tokens
        rows = -(-tokens // context)
        return (-(-tokens // rows),) * rows

    def states(self, *, padded: bool = False, embedded: bool = False) -> Tensor:
        """Hidden states of the second of the trial's rows, alone; or, beside the first in padded rows, of both. Trials of
        other attention, and of the row `embedded` as a step gives it, send tokens to the experts that they go to here."""
        with self.routing.replayed() if embedded else self.routing.recorded():
            return self._states(padded=padded, embedded=embedded)

    @torch.no_grad()
    def _states(self, *, padded: bool, embedded: bool = False) -> Tensor:
        ids = self._ids(sum(TRIAL_LENGTHS))
        with self._evaluated():
            if not padded:
                row = ids[:, TRIAL_LENGTHS[0] :]
                given = self._embedded(row) if embedded else self._whole(row)
                return self.decoder(**given, use_cache=False).last_hidden_state[0]
            rows = ids[0].split(TRIAL_LENGTHS)
            mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
            hidden = self.decoder(**self._embedded(ids), attention_mask=mask, use_cache=False)
            return hidden.last_hidden_state[mask.bool()]

    def why_padded_differs(self, own: Tensor) -> str | None:
        """Tries padded rows, which must come out like `own`, their `states` by the model's own attention."""
        try:
            with self.routing.replayed():
                found = self._states(padded=True)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            return f"{type(error).__name__}: {first_line(error)}"
        return None if is_like(found, own) else "padded rows came out otherwise in a trial"

    @torch.no_grad()
    def why_pack_differs(self, alone: Tensor) -> str | None:
        """Tries a pack of two rows: neither the other row nor a later token may change anything, not by one bit more
        than rounding, and each row must come out as it does `alone`, by the model's own attention (`states`)."""
        short = TRIAL_LENGTHS[0]
        ids = self._ids(sum(TRIAL_LENGTHS))
        others = (ids + 1) % self.embedding.weight.shape[0]
        try:
            with self._evaluated(), self.routing.replayed():
                pack = self._pack_states(ids, TRIAL_LENGTHS)
                other_row = self._pack_states(torch.cat([others[:, :short], ids[:, short:]], 1), TRIAL_LENGTHS)[short:]
                earlier = self._pack_states(torch.cat([ids[:, :-1], others[:, -1:]], 1), TRIAL_LENGTHS)[:-1]
                as_long = self._pack_states(ids, TRIAL_LENGTHS, LONG_ROW)
                like = all(is_like(found[short:], alone) for found in (pack, as_long)) or self._like_by_layer(ids)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            return f"this architecture refused a pack ({type(error).__name__}: {first_line(error)})"
        rounding = max(torch.finfo(pack.dtype).eps * 8, LEAST_LEAK) * pack.float().std()
        if not (other_row - pack[short:]).float().abs().max() <= rounding:  # nor where it is NaN
            return "rows of a pack saw one another in a trial"
        if not (earlier - pack[:-1]).float().abs().max() <= rounding:
            return "tokens saw later ones in a trial"
        return None if like else "a packed row came out unlike the same row alone in a trial"

    def _like_by_layer(self, ids: Tensor) -> bool:
        """Whether each layer gives in a pack what it gave alone, of what it was given there, for short and for long rows."""
        with self.held.replayed() as alike:
            for longest in (0, LONG_ROW):
                self._pack_states(ids, TRIAL_LENGTHS, longest)
        return all(alike) and len(alike) == 2 * (len(self.held.layers) + 1)

    def differentiate(self, batch: MicroBatch) -> None:
        """Forward and backward pass of rows and of their loss, in evaluation mode; no gradient is added to."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        with self._evaluated():
            if self.packed:
                ids, labels = batch.input_ids, batch.labels
                mask = pack_mask(batch.cu_seqlens.to(self.device), batch.max_seqlen)
                inputs = {"attention_mask": mask, "position_ids": batch.position_ids.to(self.device)}
            else:
                ids, attention_mask, labels = batch.padded()
                inputs = {"attention_mask": attention_mask.to(self.device)}
            with torch.enable_grad():
                logits = self.model(**self._embedded(ids), use_cache=False, **inputs).logits
                targets = labels[:, 1:].flatten().to(self.device)
                loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="sum")
                torch.autograd.grad(loss, parameters, allow_unused=True)

    def head_layers(self, needs: StepNeeds) -> float:
        """`StepNeeds.head_layers` by arithmetic: logits and their gradient take 4 operations a token and element, a
        layer's forward pass 2."""
        base = underlying_model(self.model)
        layer_elements = met_elements(base, needs.dense_bytes // self.values.dtype.itemsize) / max(1, needs.layers)
        head = getattr(base.get_output_embeddings(), "weight", None)
        return 2 * head.numel() / layer_elements if head is not None and layer_elements else 0.0

    @torch.no_grad()
    def parts_are_alike(self, context: ContextGroup) -> bool:
        """Tries a pack whose tokens the ranks of a group share: whether this part comes out as it does in a whole one."""
        ids = self._ids(sum(TRIAL_LENGTHS))
        with self._evaluated():
            with context.aside():
                whole = self._pack_states(ids, TRIAL_LENGTHS)
            part = self._pack_states(ids, TRIAL_LENGTHS, context=context)
        whole = whole[len(part) * context.place :][: len(part)]
        return is_like(part[: len(whole)], whole)

    def measure(self, layer: nn.Module, tokens: int) -> tuple[LayerBytes, LayerSeconds] | None:
        """Memory and time that the first layer takes at so many tokens; None where there is not the memory.

        Raises:
            torch.OutOfMemoryError: There is not even the memory for a few tokens.
        """
        try:
            call, first = self._calls(layer, tokens)
            hidden = call.args[0]  # some models have several of each token
            self.hidden_bytes = hidden.nbytes // sum(self.rows_of(tokens))
            self.state_bytes = hidden.shape[-1] * hidden.element_size()
            return measure_layer(layer, call, first)
        except torch.OutOfMemoryError:
            if tokens < 2 * LEAST_TRIAL_TOKENS:
                raise
        torch.cuda.empty_cache()
        return None

    def _calls(self, layer: nn.Module, tokens: int) -> tuple[LayerCall, LayerCall]:
        """What a layer is called with for so many tokens, and for few, which take the kernels of long rows, but no seconds."""
        few = min(tokens, LONG_ROW_TOKENS)
        call = capture_first_call(layer, lambda: self.run(self.rows_of(tokens)))
        return call, call if few == tokens else capture_first_call(layer, lambda: self.run(self.rows_of(few)))

    def time(self, layer: nn.Module, tokens: int) -> LayerSeconds | None:
        """Time that a layer takes at so many tokens, run as planned; None where there is not the memory."""
        with suppress(torch.OutOfMemoryError):
            return time_layer(layer, *self._calls(layer, tokens))
        torch.cuda.empty_cache()
        return None


class StepPlanner:
    """Plans the steps of one engine on a CUDA device."""

    def __init__(self, settings: StepSettings, max_tokens: int) -> None:
        self.settings = settings
        self.largest_tokens = max_tokens if settings.tile_tokens else bucket_tokens(max_tokens)  # as one runs
        # Where recomputation was left open, smaller micro-batches keep what larger ones recompute.
        self.adapts = settings.gradient_checkpointing == "auto"
        self.workspaces: tuple[int | None, ...] = (None, SLICE_BYTES)  # `workspace_bytes` that may be planned
        self.needs: StepNeeds  # of the largest micro-batch, once measured
        self.available_bytes = 0  # what the device had left then, less a reduction each time memory ran out since

    def measure(self, trials: Calibration, layer: nn.Module, static: StepNeeds, workspace_bytes: int | None) -> None:
        """Runs the first layer as it stands, on weights dequantised in slices of `workspace_bytes`, and completes what
        is known without running it."""
        share = 1
        while (measured := trials.measure(layer, self.largest_tokens // share)) is None:
            share *= 2  # not even a layer fits, but a smaller micro-batch may
        layer_bytes, seconds = measured
        dense_bytes = MemoryPlan(workspace_bytes=workspace_bytes).values_bytes(static.largest_dense_bytes)
        few = trials.measure(layer, max(LEAST_TRIAL_TOKENS, self.largest_tokens // share // 4))
        kept = attended_share(trials.decoder) if self.settings.tile_tokens and can_keep_attention(trials.device) else 0
        self.needs = replace(
            static,
            kept_bytes=layer_bytes.kept * share,
            peak_bytes=(layer_bytes.peak - dense_bytes) * share + static.beyond_bytes + static.largest_dense_bytes,
            hidden_bytes=self.largest_tokens * trials.hidden_bytes,
            by_token_bytes=2 * self.largest_tokens * bytes_by_token(trials.decoder),  # mixed with embeddings, too
            attended_bytes=int(self.largest_tokens * trials.state_bytes * kept),
            seconds=LayerSeconds(share * seconds.forward, share * seconds.backward, seconds.launching),
            fixed_seconds=None if few is None else seconds.fixed(few[1]),
            link_bytes_per_second=link_bytes_per_second(trials.device),
            host_bytes=waiting_room_bytes(),
            head_layers=trials.head_layers(static),
        )
        self.available_bytes = read_free_bytes(trials.device)

    def plan(self) -> MemoryPlan:
        """For the largest micro-batch."""
        return plan_memory(self.needs, self.available_bytes, self.settings, workspaces=self.workspaces)

    def time_step(self, trials: Calibration, layers: Sequence[Any], head: Head | None, plan: MemoryPlan) -> str:
        """Times the head, and a layer as steps will run it, the second, as the first may run otherwise; how long the largest
        micro-batch will take, in words, where weights stream."""
        assert self.needs.seconds is not None
        layer, tokens = layers[:2][-1], self.largest_tokens
        layer_plan: LayerPlan = getattr(layer, ATTRIBUTE)
        layer_plan.offload, layer_plan.recompute = None, False
        whole = trials.time(layer, tokens) if self.needs.seconds.device < LONGEST_TRIAL_SECONDS else self.needs.seconds
        while whole is None and tokens > LEAST_TRIAL_TOKENS:
            tokens //= 2  # not even a layer fits that repeats nothing, but a smaller micro-batch may
            whole = trials.time(layer, tokens)
        seconds = whole or self.needs.seconds
        if whole is not None and tokens < self.largest_tokens:
            few = trials.time(layer, max(LEAST_TRIAL_TOKENS, tokens // 4)) or whole
            seconds = whole.at_share(self.largest_tokens / tokens, few)
        self.needs = replace(self.needs, seconds=seconds, head_seconds=time_head(head, self.largest_tokens))
        layer_plan.recompute = (
            plan.recomputed > 0 and not plan.attention_kept and seconds.device < LONGEST_TRIAL_SECONDS
        )
        if layer_plan.recompute and whole is not None and (again := trials.time(layer, tokens)) is not None:
            # More than a forward pass is what the host took to launch it, as it does for a layer by itself.
            repeated = min(1.0, max(0.0, again.device - whole.device) / whole.forward)
            launching = max(0.0, again.launching - whole.launching)
            self.needs = replace(self.needs, repeated_share=repeated, repeated_launching=launching)
        needs, predicted = self.needs, plan.micro_batch_seconds(self.needs)
        rates = needs.link_bytes_per_second, needs.source_bytes_per_second
        return describe_speed(self.largest_tokens, predicted, 2 * needs.streamed_bytes, *rates)

    def reduce_memory(self, current: MemoryPlan) -> MemoryPlan | None:
        """A leaner plan than the one with which memory ran out; None where there is none."""
        self.needs = replace(self.needs, expert_layers=current.unpacked_experts // 2)
        for _ in range(MOST_REDUCTIONS):
            self.available_bytes -= REDUCTION_BYTES
            plan = self.plan()
            if plan != current:
                return plan
        return None

    def for_tokens(self, plan: MemoryPlan, tokens: int) -> MemoryPlan:
        """The plan of a micro-batch: smaller ones than the largest leave room for whole layers."""
        if not (self.adapts and plan.frees_activations):
            return plan
        needs, attended = self.needs.for_share(tokens / self.largest_tokens), plan.attention_kept
        plans = [
            replace(plan, recomputed=recomputed, sent=sent, lent=lent, attention_kept=min(attended, recomputed))
            for recomputed in range(plan.recomputed + 1)
            for sent in range(plan.sent + plan.recomputed - recomputed + 1 if plan.sent else 1)
            for lent in sorted({0, plan.lent})
        ]
        host_bytes = max(needs.host_bytes, plan.sent_bytes(needs))  # what was asked for may be more
        room = self.available_bytes
        fitting = [p for p in plans if p.step_bytes(needs) <= room and p.sent_bytes(needs) <= host_bytes]
        return min(fitting, key=lambda other: other.cost(needs), default=plan)


def install_products(
    linears: FusedLinears,
    stacks: ExpertStacks,
    layer_plans: list[LayerPlan],
    trials: Calibration,
    settings: StepSettings,
    trial: ProductTrial,
    largest_tokens: int,
    sharded: bool,
    report: Report,
) -> ProductRecord | None:
    """Has stacks of experts multiplied in 8 bits, and marks linears, which the next `fuse` has so; layers are recomputed in the
    trial, so that its rows fit where a step does. What comes of it is reported, and returned where any are wanted."""
    if not is_wanted(settings, trial, trials.device, trials.values.dtype, largest_tokens, sharded, report):
        return None

    def run() -> None:
        tokens = TRIAL_TOKENS
        batch = trial.batch or trial_batch([(trials.ids(tokens), np.ones(tokens, dtype=bool))])
        for layer in layer_plans:
            layer.recompute = True
        try:
            trials.differentiate(batch)
        finally:
            for layer in layer_plans:
                layer.recompute = False

    layers, tokens = linears.packed(), min(largest_tokens, settings.tile_tokens or largest_tokens)  # in a tile
    chosen, record = choose_products(settings, trial, layers, stacks, tokens, run, report)
    linears.in_8_bits = frozenset(module for name, (module, _) in layers.items() if name in chosen)
    stacks.multiply_in_8_bits(name for name in stacks.found if name in chosen)
    return record
