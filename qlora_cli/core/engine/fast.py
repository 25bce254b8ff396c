"""Fast engine: fused linears, packed rows, a loss over trained positions only, layers that keep within memory."""

from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qlora_cli.core.device import read_free_bytes
from qlora_cli.core.distributed.context_group import context_of, share_packs
from qlora_cli.core.engine.calibration import Calibration, StepPlanner, install_products
from qlora_cli.core.engine.cuda_graphs import StepGraphs, StepInputs, bucket_tokens, bucketed, step_inputs
from qlora_cli.core.engine.decoder_layers import (
    LayerPlan,
    can_compile,
    capture_calls,
    draws_random,
    find_layers,
    run_as_planned,
    runs_better_plainly,
    set_layers,
    skip_unused_outputs,
)
from qlora_cli.core.engine.fsdp import is_sharded
from qlora_cli.core.engine.gated_mlp import fuse_gates, share_projections
from qlora_cli.core.engine.lm_head import find_head, trained_positions
from qlora_cli.core.engine.lora_linear import AdapterValues, FusedLinears, replace_forward
from qlora_cli.core.engine.memory_plan import SLICE_BYTES, MemoryPlan, StepNeeds, plan_as_asked, settle
from qlora_cli.core.engine.offload import ActivationOffload, InputEmbeddings, storages_of, trained_bytes
from qlora_cli.core.engine.packed_attention import install_attention, pack_mask, takes_equal_rows
from qlora_cli.core.experts.fused_experts import fuse_experts
from qlora_cli.core.matmul.arithmetic import compiling_pays
from qlora_cli.core.matmul.choice import ProductRecord, ProductTrial
from qlora_cli.core.matmul.expert_stacks import ExpertStacks
from qlora_cli.core.models.structure import find_decoder, inputs_by_token, underlying_model
from qlora_cli.core.streaming.streamed_base import streamed_base_of
from qlora_cli.core.tiling.token_tiles import TokenTiles
from qlora_cli.errors import UsageError
from qlora_cli.events import Notice, Report
from qlora_cli.kernels.embedding_noise import add_noise
from qlora_cli.kernels.weights import reserve_values
from qlora_cli.settings.groups import StepSettings

if TYPE_CHECKING:
    from qlora_cli.core.data.packing import MicroBatch

EQUAL_ROWS_TOKENS = 256  # cuDNN's attention is the faster one from about here
GRAPHS_PAY_STEPS = 8
HEAD_TRIAL_TOKENS = 8
TRIAL_ROOM_BYTES = 2**29  # for running a layer on a few tokens


class FastEngine:
    """Steps of one model instance through the fused path. See `Engine` and `install_engine` for the contract."""

    def __init__(
        self,
        model: Any,
        settings: StepSettings,
        *,
        device: torch.device,
        compute_dtype: torch.dtype,
        max_tokens: int,
        total_steps: int,
        optimizer_bytes: int,
        trial: ProductTrial,
        report: Report,
    ) -> None:
        self.model, self.device, self.on_cuda, self.report = model, device, device.type == "cuda", report
        self.products: ProductRecord | None = None
        self.base = underlying_model(model)
        self.decoder = find_decoder(self.base)
        self.embeddings = InputEmbeddings(self.base, device, report)
        self.values = AdapterValues(compute_dtype)
        self.linears, self.stacks = FusedLinears(self.base, self.values, device), ExpertStacks(self.base)
        self.trials = Calibration(model, self.decoder, self.embeddings.module, self.values, device)
        self.sharded, self.streamed = is_sharded(self.base), streamed_base_of(self.base)
        self.context = context_of(self.base)
        self.planner: StepPlanner | None = None
        self.graphs: StepGraphs | None = None
        self.tiles: TokenTiles | None = None
        self.ahead: tuple[MicroBatch, StepInputs] | None = None  # the next micro-batch, on the device already
        self.largest_tokens, self.noise_alpha, self.lends = max_tokens, settings.neftune_noise_alpha, False
        self.buffer: Tensor | None = None
        self.put_gates_back: Callable[[], None] = lambda: None
        self.undo: list[Callable[[], None]] = [lambda: self.linears.put_back(), lambda: self.put_gates_back()]
        self.undo += [self.stacks.put_back, self.embeddings.move_back, self._release_values]
        try:
            self._install(settings, total_steps, optimizer_bytes, trial)
        except BaseException:
            self.close()
            raise

    def _install(self, settings: StepSettings, total_steps: int, optimizer_bytes: int, trial: ProductTrial) -> None:
        """Puts parts in place in the order in which the next is tried out on what is there: linears, on which trials find
        the head and whether attention packs exactly; decoder layers, through which products in 8 bits are tried, and of
        which one is measured; the plan; graphs by that plan."""
        if (self.sharded or self.context) and settings.compile:
            self.report(Notice("Layers are not compiled where cards share the base or the tokens."))
        held = {"sharded": self.sharded, "streamed": bool(self.streamed), "shared": bool(self.context)}
        settings = settle(settings, self.linears.dense_bytes, on_cuda=self.on_cuda, **held)
        embeddings_may_move = self.on_cuda and settings.offload_embeddings is not False
        if embeddings_may_move and read_free_bytes(self.device) < TRIAL_ROOM_BYTES:
            self.embeddings.move_to_host()
        self._fuse_linears(bool(settings.resident_weights))
        if self.on_cuda:
            self.undo.append(fuse_experts(self.base, self.linears.step))
        self.head = find_head(self.base, self.decoder, self.trials.inputs(HEAD_TRIAL_TOKENS))
        if self.head is None:
            self.report(Notice("The output head is not a plain one; logits are held in full."))
        self.packed, undo = install_attention(self.base, self.decoder, self.trials, self.report)
        self.undo.append(undo)
        self.equal_rows = self.packed and takes_equal_rows(self.decoder, self.device)
        self._swap_layers()
        given = self.linears, self.stacks, self.layer_plans, self.trials, settings, trial
        self.products = install_products(*given, self.largest_tokens, self.sharded, self.report)
        if self.products is not None:
            self.linears.fuse(resident=self.linears.resident, workspace_bytes=SLICE_BYTES if self.on_cuda else None)
        elements = self.linears.dense_bytes // self.values.dtype.itemsize
        pays = compiling_pays(settings.compile, self.base, elements, total_steps * self.largest_tokens)
        self.compiled = self.on_cuda and self.packed and pays and can_compile(self.calls)
        if settings.tile_tokens and not self._tile(settings.tile_tokens):
            settings = replace(settings, tile_tokens=0)
        self._share_projections()
        plan = plan_as_asked(settings, len(self.layers), resident_weights=bool(settings.resident_weights))
        # Where all ranks gather a layer, or attend together, none is measured by itself.
        if self.on_cuda and self.layers and not (self.sharded or self.context):
            self.planner = StepPlanner(settings, self.largest_tokens)
            plan = self._plan(self.planner, optimizer_bytes)
        for layer_plan in self.layer_plans:
            layer_plan.compiled = self.compiled
        if self.compiled and self.planner is not None and self.embeddings.frozen:
            bytes_a_token = self.planner.needs.kept_bytes / self.largest_tokens
            self.layer_plans[0].compiled = not runs_better_plainly(self.layers[0], self.calls[0], bytes_a_token)
        self._apply(plan)
        if self.streamed is not None and self.planner is not None:
            self.report(Notice(self.planner.time_step(self.trials, self.layers, self.head, plan)))
        if self.context is not None:
            self.undo.append(share_packs(self.context, self.trials.parts_are_alike if self.packed else None))
        if total_steps >= GRAPHS_PAY_STEPS:
            self._use_graphs()

    def _fuse_linears(self, resident: bool) -> None:
        """Trials on a card run on weights in slices: there may be no room for a whole one."""
        self.linears.fuse(resident=resident and not self.on_cuda, workspace_bytes=SLICE_BYTES if self.on_cuda else None)
        kept = self.linears.kept
        if kept and self.sharded:
            raise UsageError(
                f"{kept[0]} needs its whole weight at all times, which --shard shards.",
                "Leave out --shard, or --dora and what else gives this layer a forward pass of its own.",
            )
        if kept:
            self.report(Notice(f"{len(kept)} linear layers keep PEFT's own forward, which is slower."))

    def _swap_layers(self) -> None:
        """Finds the decoder's layers and what they are called with, and has each run as its plan says."""
        layers = find_layers(self.decoder)
        self.calls = capture_calls(layers, self.trials.run)
        if len(self.calls) != len(layers):  # layers that are called other than once each are left as they are
            layers, self.calls = [], []
        self.layers, self.draws_random = layers, draws_random(layers, self.calls)
        step = self.linears.step
        self.layer_plans = [LayerPlan(i, False, None, False, self.draws_random, step) for i in range(len(layers))]
        self.undo.append(replace_forward(dict(zip(layers, self.layer_plans, strict=True)), run_as_planned))

    def _tile(self, tokens: int) -> bool:
        """Has what treats every token by itself run over tiles of so many, without graphs and compiled layers: what they
        spare the host is nothing in rows so long. Returns whether it can: numbers drawn in a tile would be those of another."""
        if self.sharded or self.context or self.draws_random or not self.layers:
            self.report(Notice("Layers run whole: --tile-tokens takes an unsharded base that draws no numbers."))
            return False
        self.compiled = False
        self.tiles = TokenTiles(self.decoder, self.layers, self.trials.run, self.linears.step)
        self.undo.append(self.tiles.remove)
        self.tiles.install(tokens)
        self.trials.equal_rows = self.equal_rows  # other attention takes a long row twice the time
        return True

    def _use_graphs(self) -> None:
        """Has steps replayed as graphs, which read no trained embeddings or head, as these lie outside of them, and
        repeat no random numbers."""
        still = self.head is not None and self.head.frozen and self.embeddings.frozen and not self.draws_random
        away = self.sharded or self.streamed or self.context or self.tiles
        if not (self.on_cuda and self.packed and self.layers and still) or away:
            return
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.graphs = StepGraphs(
            self._packed_loss, trained, self._join, self._layout, lambda: not self.plan.frees_activations, self.report
        )
        self.undo.append(self.graphs.clear)

    def _apply(self, plan: MemoryPlan) -> None:
        """Runs steps from now on as planned."""
        self.plan = plan
        self._release_values()
        if plan.resident_weights != self.linears.resident:
            self.linears.fuse(resident=plan.resident_weights, workspace_bytes=plan.workspace_bytes)
            self._share_projections()
        self.stacks.unpacked.keep(plan.unpacked_experts)
        self.linears.set_workspace(plan.workspace_bytes)
        if plan.offload_embeddings:
            self.embeddings.move_to_host()
        offloads = self.on_cuda and (plan.offload_activations or plan.sent or plan.lent)
        staying = [*self.base.parameters(), *self.base.buffers(), *self.linears.tensors()]
        self.offload = ActivationOffload(self.device, storages_of(staying)) if offloads else None
        if plan.recomputed and self.calls:
            plainly = replace(plan, recomputed=0, sent=0, lent=0, offload_activations=False)  # as trials run layers
            set_layers(self.layer_plans, plainly, None)
            self.skipped = skip_unused_outputs(self.layers, self.calls)
        as_planned = (lambda plan, _: plan) if (planner := self.planner) is None else planner.for_tokens
        self.plan_by_tokens = cache(lambda tokens, lends: as_planned(plan if lends else plan.without_loan(), tokens))
        set_layers(self.layer_plans, plan, self.offload)
        torch.cuda.empty_cache()
        if planner is not None and planner.adapts and plan.frees_activations:
            with suppress(torch.OutOfMemoryError):  # then each weight has a tensor of its own
                self.buffer = reserve_values(self.device, plan.values_bytes(planner.needs.largest_dense_bytes))

    def _share_projections(self) -> None:
        """In compiled layers, linears with the same input have one projection; not in layers that are recomputed,
        whose repetition is traced as a function without side effects."""
        self.put_gates_back()
        if self.compiled and self.layers:
            modules = [m for layer in self.layers for m in layer.modules()]
            share_projections(modules, self.trials.run)
            self.put_gates_back = fuse_gates(modules)
        for layer_plan, layer in zip(self.layer_plans, self.layers, strict=True):
            layer_plan.note_shared(layer)

    def _release_values(self) -> None:
        self.buffer = reserve_values(self.device, 0)

    def reduce_memory(self) -> bool:
        """See `Engine.reduce_memory`."""
        if self.graphs is not None and self.graphs.make_room():
            torch.cuda.empty_cache()
            return True
        while True:
            leaner = None if self.planner is None else self.planner.reduce_memory(self.plan)
            if self.graphs is not None:
                self.graphs.clear()
                self.graphs.releases = 0
            if leaner is None:
                return False
            try:
                self._apply(leaner)
                break
            except torch.OutOfMemoryError:  # layers are tried out before they are recomputed
                torch.cuda.empty_cache()
        self.report(Notice(f"Memory ran out; the engine is now: {self.describe()}."))
        return True

    def _plan(self, planner: StepPlanner, optimizer_bytes: int) -> MemoryPlan:
        """Measures a layer at the largest micro-batch and plans for it; once more compiled, where that decides."""
        static = StepNeeds(
            layers=len(self.layers),
            beyond_bytes=self.stacks.bytes_beyond(self.layers[0], self.values.dtype.itemsize),
            optimizer_bytes=optimizer_bytes + trained_bytes([self.model]),
            gradient_bytes=trained_bytes(self.layers) // max(1, len(self.layers)),
            dense_bytes=self.linears.dense_bytes,
            largest_dense_bytes=self.linears.largest_dense_bytes,
            embedding_bytes=self.embeddings.movable_bytes(),
            **self.stacks.unpacked.needs(),
            **(self.streamed.needs() if self.streamed else {}),
        )
        planner.measure(self.trials, self.layers[0], static, SLICE_BYTES)
        plan = planner.plan()
        if self.compiled and plan.frees_activations:  # compiled, a layer saves less
            self.linears.set_workspace(plan.workspace_bytes)
            for layer_plan in self.layer_plans:
                layer_plan.run_leanly()
            self.layer_plans[0].compiled = True
            planner.measure(self.trials, self.layers[0], static, plan.workspace_bytes)
            planner.workspaces = (None, plan.workspace_bytes)  # there may be room for whole weights after all
            plan = planner.plan()
            planner.workspaces = (plan.workspace_bytes,)  # no other slices from now on: compiled code holds them
        return plan

    def _layout(self, tokens: int) -> tuple[bool, ...]:
        """Whether any layer is recomputed, sent, lent memory or kept whole at so many tokens."""
        plan = self.plan_by_tokens(tokens, self.lends)
        return plan.recomputed > 0, plan.sent > 0, plan.lent > 0, plan.freed < len(self.layers)

    def _join(self) -> None:
        if self.offload is not None:
            self.offload.join()

    def prepare(self, batch: "MicroBatch") -> "MicroBatch":
        """See `Engine.prepare`."""
        if not self.packed:
            return batch
        if self.embeddings.on_host:
            return replace(batch, embedded=self.embeddings.look_up(batch.input_ids))
        if self.graphs is not None and not self.plan.frees_activations:  # there is room for two steps' inputs
            with suppress(torch.OutOfMemoryError):  # `loss` makes them, which handles running out of memory
                self.ahead = batch, self._bucketed_inputs(batch)
        return batch

    def loss(self, batch: "MicroBatch") -> Tensor:
        """See `Engine.loss`. A batch still on the host saves a wait where embeddings are on the host."""
        self.values.refresh()
        training = self.model.training
        lenders = self.plan.lenders(self.layers) if batch.opens_step else []
        self.lends = self.offload is not None and self.offload.borrow_from(lenders)
        if training and any(linear.rate > 0 for linear in self.linears.fused):
            self.linears.step.draw_seeds()
        if self.packed:
            if self.graphs is None:
                return self._packed_loss(self._with_noise(self._inputs(batch)))
            if training and torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
                return self.graphs.loss(self._with_noise(self._bucketed_inputs(batch)))
            return self.graphs.loss_beside(self._inputs(batch))
        embedded, labels, mask = self._padded_inputs(batch)
        if training and self.noise_alpha:
            lengths = batch.cu_seqlens.diff().long().to(self.device)[:, None]
            embedded = add_noise(embedded, lengths, self.noise_alpha)
        return self._loss(embedded, trained_positions(labels, batch.trained_tokens), labels.numel(), **mask)

    def next_logits(self, batch: "MicroBatch") -> Tensor:
        """See `Engine.next_logits`."""
        self.values.refresh()
        if self.packed:
            given = self._inputs(batch)
            embedded, inputs = given.embedded, self._packed_inputs(given)
        else:
            embedded, _, inputs = self._padded_inputs(batch)
        last = batch.last_positions(padded=not self.packed).to(self.device)
        with self.context.aside() if self.context else nullcontext():  # one rank is asked, for whole rows
            return self.base(inputs_embeds=embedded, use_cache=False, **inputs).logits.flatten(0, 1)[last]

    def _padded_inputs(self, batch: "MicroBatch") -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Embeddings (rows, longest, size), labels, and a mask: the causal one of no padding has kernels of its own."""
        ids, attention_mask, labels = (t.to(self.device, non_blocking=True) for t in batch.padded())
        mask = {} if batch.tokens == ids.numel() else {"attention_mask": attention_mask}
        return self.embeddings.embed(ids), labels, mask | inputs_by_token(self.decoder, ids)

    def _with_noise(self, inputs: StepInputs) -> StepInputs:
        """Drawn when the step runs, not when its inputs are made ahead, so that a resumed run draws the same."""
        return inputs.noisy(self.noise_alpha) if self.noise_alpha and self.model.training else inputs

    def _bucketed_inputs(self, batch: "MicroBatch") -> StepInputs:
        """On the grid with or without a graph, so that a resumed run computes the same; from before, where prepared."""
        if self.ahead is None or self.ahead[0] is not batch:
            return bucketed(self._inputs(batch))
        (_, inputs), self.ahead = self.ahead, None
        return inputs

    def _inputs(self, batch: "MicroBatch") -> StepInputs:
        embedded = self.embeddings.embed(batch.input_ids, batch.embedded)
        batch = batch.to(self.device, non_blocking=True)
        equal = self.equal_rows and batch.max_seqlen >= EQUAL_ROWS_TOKENS
        if self.graphs is not None and batch.cu_seqlens.numel() == 2:  # any row is as long as itself: not a shape each
            equal = equal and (batch.tokens == self.largest_tokens or bucket_tokens(batch.tokens) == batch.tokens)
        return step_inputs(batch, embedded, inputs_by_token(self.decoder, batch.input_ids), equal_rows=equal)

    def _packed_loss(self, inputs: StepInputs) -> Tensor:
        next_label = inputs.part.next_label if inputs.part else None
        trained = trained_positions(inputs.labels, inputs.trained_tokens, next_label)
        return self._loss(inputs.embedded, trained, inputs.labels.numel(), **self._packed_inputs(inputs))

    def _packed_inputs(self, inputs: StepInputs) -> dict[str, Tensor]:
        if self.context is not None:
            self.context.longest = inputs.longest
        mask = pack_mask(inputs.boundaries, inputs.longest, inputs.equal_rows)
        return {"attention_mask": mask, "position_ids": inputs.position_ids, **inputs.by_token}

    def _loss(self, embedded: Tensor, trained: tuple[Tensor, Tensor], tokens: int, **inputs: Tensor) -> Tensor:
        """Sum over trained tokens, fp32; which those are is from `trained_positions`."""
        if torch.is_grad_enabled() and not embedded.requires_grad and self.layers and self.layer_plans[0].compiled:
            embedded = embedded.detach().requires_grad_()  # so that the first layer is compiled like the others
        set_layers(self.layer_plans, self.plan_by_tokens(tokens, self.lends), self.offload)
        if self.head is None:
            logits = self.base(inputs_embeds=embedded, use_cache=False, **inputs).logits.flatten(0, 1)[trained[0]]
            return nn.functional.cross_entropy(logits.float(), trained[1], reduction="sum")
        hidden = self.decoder(inputs_embeds=embedded, use_cache=False, **inputs).last_hidden_state.flatten(0, 1)
        # Not indexing: its backward pass sorts. No place comes twice but those that count nothing.
        return self.head.loss(hidden.index_select(0, trained[0]), trained[1], self.plan.resident_weights)

    def describe(self) -> str:
        """See `Engine.describe`."""
        parts = [f"fast: {len(self.linears.fused)} fused linears", "packed rows" if self.packed else "padded rows"]
        parts += ["chunked loss"] if self.head is not None else []
        parts += [*self.plan.describe(len(self.layers)), *([self.streamed.describe()] if self.streamed else [])]
        more = {
            f"{len(self.linears.in_8_bits)} linears multiplied in fp8": bool(self.linears.in_8_bits),
            f"{len(self.stacks.in_8_bits)} stacks of experts in fp8": bool(self.stacks.in_8_bits),
            "embeddings on the host": self.embeddings.on_host,
            "base sharded over the cards": self.sharded,
            f"packs shared by {self.context.size if self.context else 1} ranks": self.context is not None,
            "layers compiled": self.compiled,
            "CUDA graphs": self.graphs is not None,
        }
        return ", ".join([*parts, *(text for text, is_so in more.items() if is_so)])

    def close(self) -> None:
        """See `Engine.close`."""
        while self.undo:
            self.undo.pop()()
