"""A model with an adapter in, the fast engine out: fused linears, packed rows, a head over trained positions only."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qlora_cli.core.engine_attention import install_packed_attention, pack_mask, why_not_packed
from qlora_cli.core.engine_layers import (
    LayerPlan,
    capture_calls,
    find_layers,
    saved_bytes,
    skip_unused_outputs,
    swap_layers,
)
from qlora_cli.core.engine_linear import AdapterValues, StepState, linear_candidates, swap_linears
from qlora_cli.core.engine_loss import find_decoder, find_head, trained_positions
from qlora_cli.core.engine_memory import MemoryPlan, StepNeeds, free_bytes, plan_memory
from qlora_cli.core.engine_offload import ActivationOffload
from qlora_cli.events import Notice, Report

if TYPE_CHECKING:
    from qlora_cli.core.packing import MicroBatch

TRIAL_LENGTHS = (24, 40)  # rows of the pack that the engine is tried on
# A compiled layer saves about a fifth of a step and takes about a minute to compile: it pays after five minutes.
COMPILE_PAYS_SECONDS = 300
ASSUMED_FLOPS_PER_SECOND = 4e14


class FastEngine:
    """Steps of one model instance through the fused path. See `Engine` and `install_engine` for the contract."""

    def __init__(
        self,
        model: Any,
        *,
        device: torch.device,
        compute_dtype: torch.dtype,
        recomputed: Callable[[int], int | None],
        offload_activations: bool | None,
        offload_embeddings: bool | None,
        resident_weights: bool | None,
        compile: bool | None,
        max_tokens: int,
        total_steps: int,
        report: Report,
    ) -> None:
        self.model, self.device, self.report = model, device, report
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.decoder = find_decoder(self.base)
        self.embedding = self.base.get_input_embeddings()
        self.undo: list[Callable[[], None]] = []
        self.step = StepState(device)
        self.values = AdapterValues(compute_dtype)
        self.packed = False
        self.notes: list[str] = []
        try:
            self._install(
                compute_dtype,
                recomputed,
                offload_activations,
                offload_embeddings,
                resident_weights,
                compile,
                max_tokens,
                total_steps,
            )
        except BaseException:
            self.close()
            raise

    def _install(
        self,
        dtype: torch.dtype,
        recomputed: Callable[[int], int | None],
        offload_activations: bool | None,
        offload_embeddings: bool | None,
        resident_weights: bool | None,
        compile: bool | None,
        max_tokens: int,
        total_steps: int,
    ) -> None:
        on_cuda = self.device.type == "cuda"
        self.head = find_head(self.base, self.decoder, self.device)
        if self.head is None:
            self.report(Notice("The output head is not a plain one; logits are held in full."))
        head_module = self.base.get_output_embeddings()
        candidates = list(linear_candidates(self.base, head_module))
        dense_bytes = sum(_logical_elements(m) for _, m in candidates) * dtype.itemsize
        resident = resident_weights
        if not on_cuda and resident is None:
            resident = dense_bytes < _host_free_bytes() // 2

        def swap(resident_now: bool) -> None:
            fast, kept, put_back = swap_linears(
                candidates, dtype, self.step, self.values, resident=resident_now, workspace_bytes=None
            )
            self.undo.append(put_back)
            self.fast_linears, self.kept_linears = fast, kept

        swap(bool(resident) and not on_cuda)
        if self.kept_linears:
            self.report(Notice(f"{len(self.kept_linears)} linear layers keep PEFT's own forward, which is slower."))
        self._install_attention(dtype)

        layers = find_layers(self.decoder)
        count = len(layers)
        wish = recomputed(count)
        persistent = self._persistent_storages()
        calls = capture_calls(layers, self._trial_run)
        if len(calls) != count:  # layers that are called other than once each are left as they are
            layers, calls, count = [], [], 0
        plan = MemoryPlan(wish or 0, bool(offload_activations), bool(offload_embeddings), bool(resident))
        if on_cuda and count:
            scale = max_tokens / sum(TRIAL_LENGTHS)
            needs = StepNeeds(
                layers=count,
                saved_bytes=int(max(saved_bytes(layers[i], calls[i], persistent) for i in {0, count - 1}) * scale),
                hidden_bytes=max_tokens * calls[0].args[0].shape[-1] * dtype.itemsize,
                trainable_parameters=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
                dense_bytes=dense_bytes,
                largest_dense_bytes=max(_logical_elements(m) for _, m in candidates) * dtype.itemsize,
                embedding_bytes=self._movable_embedding_bytes(),
            )
            plan = plan_memory(
                needs,
                free_bytes(self.device),
                recomputed=wish,
                offload_activations=offload_activations,
                offload_embeddings=offload_embeddings,
                resident_weights=resident_weights,
            )
        self.plan = plan
        if plan.resident_weights and on_cuda:
            self.undo.pop(-2 if self.packed else -1)()
            self.values.linears.clear()
            self.values.addresses = ()
            swap(True)
            persistent = self._persistent_storages()
        self.host_embedding = plan.offload_embeddings and self._movable_embedding_bytes() > 0
        if self.host_embedding:
            self.embedding.to("cpu")
            self.undo.append(lambda: self.embedding.to(self.device))
        if compile is None:
            elements = sum(_logical_elements(m) for _, m in candidates)
            seconds = total_steps * 6 * elements * max_tokens / ASSUMED_FLOPS_PER_SECOND
            compile = seconds > COMPILE_PAYS_SECONDS
        self.compiled = compile and on_cuda and self.packed
        offload = ActivationOffload(self.device, persistent) if plan.offload_activations and on_cuda else None
        self.offload = offload
        drops = any(isinstance(m, nn.Dropout) and m.p > 0 for layer in layers for m in _outside_adapters(layer))
        plans = [
            LayerPlan(i, i < plan.recomputed, offload, self.compiled, drops, self.step) for i in range(len(layers))
        ]
        if plan.recomputed and calls:
            self.skipped = skip_unused_outputs(layers[: plan.recomputed], calls[: plan.recomputed])
        self.undo.append(swap_layers(layers, plans))
        self.layers = layers

    def _install_attention(self, dtype: torch.dtype) -> None:
        """Packs rows where that is exact, which is tried out; otherwise rows stay padded."""
        reason = why_not_packed(self.base, self.decoder, self.device, dtype)
        if reason is None:
            put_back = install_packed_attention(self.base, self.decoder)
            self.packed = True
            reason = self._why_pack_differs()
            if reason is None:
                self.undo.append(put_back)
            else:
                self.packed = False
                put_back()
        if reason is not None:
            self.report(Notice(f"Rows are padded instead of packed, because {reason}."))

    @torch.no_grad()
    def _why_pack_differs(self) -> str | None:
        """Tries a pack of two rows: neither the other row nor a later token may change anything, not by one bit more
        than rounding, and each row must come out as it does alone."""
        was_training = self.model.training
        self.model.eval()
        try:
            self.values.refresh()
            short, long = TRIAL_LENGTHS
            ids = self._trial_ids(short + long)
            pack = self._pack_states(ids, TRIAL_LENGTHS)
            changed = ids.clone()
            changed[0, :short] = (changed[0, :short] + 1) % self._vocabulary
            other_row = self._pack_states(changed, TRIAL_LENGTHS)[short:]
            changed = ids.clone()
            changed[0, -1] = (changed[0, -1] + 1) % self._vocabulary
            earlier = self._pack_states(changed, TRIAL_LENGTHS)[:-1]
            alone = self.decoder(input_ids=ids[:, short:], use_cache=False).last_hidden_state[0]
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            return f"this architecture refused a pack ({type(error).__name__}: {str(error).splitlines()[0]})"
        finally:
            self.model.train(was_training)
        spread = pack.float().std()
        rounding = torch.finfo(pack.dtype).eps * 8 * spread
        if not bool(((other_row - pack[short:]).float().abs().max() <= rounding).item()):
            return "rows of a pack saw one another in a trial"
        if not bool(((earlier - pack[:-1]).float().abs().max() <= rounding).item()):
            return "tokens saw later ones in a trial"
        error_ = (alone - pack[short:]).float().norm() / alone.float().norm()
        if not bool((error_ <= 0.1).item()):
            return "a packed row came out unlike the same row alone in a trial"
        return None

    @property
    def _vocabulary(self) -> int:
        return self.embedding.weight.shape[0]

    def _trial_ids(self, tokens: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self._vocabulary, (1, tokens), generator=generator).to(self.device)

    def _pack_states(self, ids: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Hidden states (T, size) of rows of those lengths, end to end."""
        positions = torch.cat([torch.arange(n) for n in lengths])[None].to(self.device)
        boundaries = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
        mask = pack_mask(boundaries.to(self.device), max(lengths))
        return self._hidden(self.embedding(ids), attention_mask=mask, position_ids=positions)[0]

    def _trial_run(self) -> None:
        self.values.refresh()
        with torch.no_grad():
            ids = self._trial_ids(sum(TRIAL_LENGTHS))
            if self.packed:
                self._pack_states(ids, TRIAL_LENGTHS)
            else:
                self.decoder(inputs_embeds=self.embedding(ids), use_cache=False)

    def _hidden(self, embedded: Tensor, **inputs: Any) -> Tensor:
        return self.decoder(inputs_embeds=embedded, use_cache=False, **inputs).last_hidden_state

    def _persistent_storages(self) -> frozenset[int]:
        tensors = [*self.base.parameters(), *self.base.buffers()]
        for linear in self.fast_linears:
            tensors += [t for t in linear.weight if isinstance(t, Tensor)]
        return frozenset(t.untyped_storage().data_ptr() for t in tensors)

    def _movable_embedding_bytes(self) -> int:
        """Bytes of the input embeddings, 0 where they must stay: tied to the head, adapted or trained."""
        head = self.base.get_output_embeddings()
        weight = getattr(self.embedding, "weight", None)
        if type(self.embedding) is not nn.Embedding or weight is None or weight.requires_grad:
            return 0
        if head is not None and getattr(head, "weight", None) is weight:
            return 0
        return weight.numel() * weight.element_size()

    def _embed(self, ids: Tensor) -> Tensor:
        """Token ids (rows, length) to embeddings (rows, length, size) on the device."""
        if not self.host_embedding:
            embedded = self.embedding(ids.to(self.device, non_blocking=True))
        else:
            weight = self.embedding.weight
            rows = torch.empty(ids.numel(), weight.shape[1], dtype=weight.dtype, pin_memory=True)
            torch.index_select(weight.detach(), 0, ids.flatten().cpu(), out=rows)
            embedded = rows.to(self.device, non_blocking=True).view(*ids.shape, -1)
        if self.compiled and torch.is_grad_enabled() and not embedded.requires_grad:
            embedded.requires_grad_()  # so that the first layer is compiled like the others
        return embedded

    def loss(self, batch: "MicroBatch") -> Tensor:
        """See `Engine.loss`. A batch still on the host saves a wait where embeddings are on the host."""
        self.values.refresh()
        if self.offload is not None:
            self.offload.start()
        if any(linear.rate > 0 for linear in self.fast_linears) and self.model.training:
            self.step.draw_seed()
        if self.packed:
            embedded = self._embed(batch.input_ids)
            batch = batch.to(self.device, non_blocking=True)
            labels = batch.labels
            mask = pack_mask(batch.cu_seqlens, batch.max_seqlen)
            inputs = {"attention_mask": mask, "position_ids": batch.position_ids}
        else:
            ids, attention_mask, labels = (t.to(self.device, non_blocking=True) for t in batch.padded())
            embedded = self._embed(ids)
            # Without padding the mask is the plain causal one, which has kernels of its own.
            inputs = {} if batch.tokens == ids.numel() else {"attention_mask": attention_mask}
        positions, targets = trained_positions(labels, batch.trained_tokens)
        if self.head is None:
            logits = self.base(inputs_embeds=embedded, use_cache=False, **inputs).logits.flatten(0, 1)[positions]
            return nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        hidden = self._hidden(embedded, **inputs).flatten(0, 1)  # (tokens, size)
        return self.head.loss(hidden[positions], targets)

    def describe(self) -> str:
        """See `Engine.describe`."""
        parts = [f"fast: {len(self.fast_linears)} fused linears"]
        parts.append("packed rows" if self.packed else "padded rows")
        if self.head is not None:
            parts.append("chunked loss")
        if self.plan.recomputed:
            parts.append(f"{self.plan.recomputed} of {len(self.layers)} layers recomputed")
        if self.offload is not None:
            parts.append("activations on the host")
        if self.host_embedding:
            parts.append("embeddings on the host")
        if self.plan.resident_weights:
            parts.append("dequantised weights resident")
        if self.compiled:
            parts.append("layers compiled")
        return ", ".join(parts)

    def close(self) -> None:
        """See `Engine.close`."""
        while self.undo:
            self.undo.pop()()


def _logical_elements(module: Any) -> int:
    weight = (module.base_layer if hasattr(module, "base_layer") else module).weight
    state = getattr(weight, "quant_state", None)
    return weight.numel() if state is None else math.prod(state.shape)


def _outside_adapters(layer: nn.Module) -> list[nn.Module]:
    """Modules of a layer but those of adapters, whose dropout has its own seed."""
    return [m for name, m in layer.named_modules() if "lora_dropout" not in name]


def _host_free_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    except (OSError, StopIteration):  # no /proc: another system, whose memory is not asked for
        return 0
