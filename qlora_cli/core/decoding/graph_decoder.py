"""Decoder over fused kernels whose steps and prefills are one CUDA graph each.

A step of a 7B model is some 600 launches of a few microseconds each: launched one by one from Python they take ten
times as long as the weights take to read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qlora_cli.core.adapters.lora import adapted_modules
from qlora_cli.core.decoding.attention import FusedAttention
from qlora_cli.core.decoding.decoder import Decoder, PaddedPrompts
from qlora_cli.core.decoding.fused_layers import FastLayers
from qlora_cli.core.decoding.prefill import PrefillGraphs, bucket_length, capture, leaves
from qlora_cli.core.decoding.stacked_linears import FastLinears
from qlora_cli.core.experts.fused_experts import fuse_experts
from qlora_cli.core.models.structure import underlying_model
from qlora_cli.errors import QloraError, first_line
from qlora_cli.settings.generation import SamplingSettings

SHORTEST = 256  # positions of the cache that a step reads at least, where its attention reads a fixed number


class FastModel:
    """One model instance whose linears, norms, rotary embeddings and decode attention are fused kernels.

    Args:
        model: A transformers causal language model, maybe wrapped by PEFT, in eval mode.
    """

    def __init__(self, model: Any) -> None:
        self.model = underlying_model(model)
        device = self.model.get_input_embeddings().weight.device
        self.put_experts_back = fuse_experts(self.model) if device.type == "cuda" else lambda: None
        with torch.no_grad():
            ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
            self.linears = FastLinears(self.model, lambda: self.model(input_ids=ids, use_cache=False))
        self.layers = FastLayers(self.model)
        self.attention = FusedAttention(self.model)

    @property
    def adapters_elsewhere(self) -> bool:
        """Whether an adapted module keeps PEFT's forward, whose choice of an adapter a captured graph holds for good."""
        taken = {site.module for stack in self.linears.stacks for site in stack.sites}
        return any(module not in taken for module in adapted_modules(self.model))

    def refresh(self) -> None:
        """Takes over which adapter is in effect; captured graphs go on with it, but for `adapters_elsewhere`."""
        self.linears.refresh()

    @contextmanager
    def prefilling(self, padded: PaddedPrompts) -> Iterator[None]:
        """While it lasts, a forward reads prompts: in few launches, and the head gets the last token of each alone."""

        def narrow(head: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (given[0].flatten(0, 1).index_select(0, padded.last)[:, None], *given[1:])  # (prompts, 1, size)

        hook = self.model.get_output_embeddings().register_forward_pre_hook(narrow)
        try:
            with self.layers.used_for("prefill"):
                yield
        finally:
            hook.remove()
            self.linears.forget()

    def close(self) -> None:
        """Gives the model instance back as it was."""
        self.linears.close()
        self.layers.close()
        self.put_experts_back()

    def describe(self) -> str:
        """What is fused."""
        parts = [self.linears.describe(), self.layers.describe()]
        parts += ["fused attention"] if self.attention.usable else []
        return ", ".join(part for part in parts if part)


class GraphDecoder(Decoder):
    """A `Decoder` whose steps are captured once and replayed.

    Attributes:
        graphs: Captured steps, by the positions that attention reads.
        reason: Why steps are not captured but launched one by one; None while they are captured.
        prefill_graphs: Those of the prompts, with a reason of their own.
    """

    def __init__(self, fast: FastModel, *, rows: int, capacity: int, sampling: SamplingSettings) -> None:
        super().__init__(fast.model, rows=rows, capacity=capacity, sampling=sampling)
        self.fast = fast
        self.reason = None if self.device.type == "cuda" else "only a GPU has graphs"
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None
        self.prefill_graphs = PrefillGraphs(self.read_padded, self.reason)
        # Four dimensions: every model takes that for a finished mask and hands it on, and the kernel ignores it.
        nothing = torch.zeros(1, 1, 1, 1, device=self.device)
        self._no_mask: Any = self._masks(dict.fromkeys(self._kinds, nothing))

    def _padded_length(self, longest: int) -> int:
        return longest if self._stateful else bucket_length(longest, self.cache.capacity)

    def describe(self) -> str:
        how = "CUDA graphs" if self.reason is None else f"steps launched one by one (not captured: {self.reason})"
        uncaptured = self.prefill_graphs.reason
        if self.reason is None and uncaptured is not None:
            how += f" (prompts launched one by one, not captured: {uncaptured})"
        return f"{how} over fused kernels: {self.fast.describe()}"

    def _read(self, padded: PaddedPrompts, lengths: list[int]) -> Tensor:
        return self.prefill_graphs.read(padded)

    def read_padded(self, padded: PaddedPrompts) -> Tensor:
        """Prompts into their rows, on the device alone; the logits after each of them."""
        self.cache.start_prefill(padded.rows, padded.ids.shape[1])
        with self.fast.prefilling(padded):
            logits = self.model(input_ids=padded.ids, past_key_values=self.cache, use_cache=True).logits
        if logits.shape[1] != 1:  # something else than the head gives the logits
            logits = logits.flatten(0, 1).index_select(0, padded.last)[:, None]
        return logits[:, 0]

    def _advance(self) -> None:
        length = self._attended_length()
        # In the first step of this model fused attention is compared with the model's own.
        if self.fast.attention.usable is None or self.reason is not None:
            self._fused_step(length)
        else:
            graph = self.graphs.get(length) or self._capture(length)
            if graph is not None:
                graph.replay()

    def _attended_length(self) -> int:
        """Positions of the cache that attention reads: all of them where the kernel stops at each row's end by itself."""
        if self.fast.attention.usable:
            return self.cache.capacity
        return min(max(SHORTEST, 1 << (max(self.filled) - 1).bit_length()), self.cache.capacity)

    def _fused_step(self, length: int) -> None:
        fused = bool(self.fast.attention.usable)
        self.cache.start_step(self.positions, length, fused=fused)
        with self.fast.layers.used_for("step"):
            if self.fast.attention.usable is False:
                self._forward_step(self._mask(length))
            else:
                with self.fast.attention.step(self.cache):
                    self._forward_step(self._no_mask if fused else self._mask(length))

    def _state(self) -> list[Tensor]:
        """What a step changes, apart from positions of the cache that the next step writes again."""
        tensors = [self.tokens, self.positions, self.chosen, self.seen]
        return [*(tensor for tensor in tensors if tensor is not None), *self.cache.states()]

    def _restore(self, before: list[Tensor]) -> None:
        for tensor, old in zip(self._state(), before, strict=True):
            tensor.copy_(old)

    def _capture(self, length: int) -> torch.cuda.CUDAGraph | None:
        """The graph of a step, which is not yet taken; None when it cannot be captured, and then the step is taken."""
        before = [tensor.clone() for tensor in self._state()]
        current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):  # once outside the graph: libraries make their workspaces, kernels are loaded
            self._fused_step(length)
        current.wait_stream(aside)
        states = [tensor.clone() for tensor in self.cache.states()]
        self._restore(before)
        try:
            graph, _ = capture(lambda: self._fused_step(length), self._pool)
        except (torch.OutOfMemoryError, QloraError):
            raise
        except RuntimeError as error:  # something in this architecture waits for the device
            torch.cuda.synchronize()
            self.reason = first_line(error)
            self._fused_step(length)
            return None
        if states:  # a model's own code updates them, and may have done so where a graph does not reach
            right = leaves(graph, self.cache.states(), states)
            self._restore(before)
            if not right:
                self.reason = "a captured step left other states"
                self._fused_step(length)
                return None
        self._pool = graph.pool()
        self.graphs[length] = graph
        return graph
