"""Decoder over fused kernels whose steps and prefills are one CUDA graph each.

A step of a 7B model is some 600 launches of a few microseconds each: launched one by one from Python they take ten
times as long as the weights take to read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from qlora_cli.core.adapters.lora import adapted_modules
from qlora_cli.core.decoding.attention import FusedAttention
from qlora_cli.core.decoding.decoder import Decoder, PaddedPrompts
from qlora_cli.core.decoding.fused_layers import FastLayers, is_same
from qlora_cli.core.decoding.prefill import PrefillGraphs, bucket_length, capture, leaves
from qlora_cli.core.decoding.prompt_lookup import WIDTH, PromptLookUp
from qlora_cli.core.decoding.stacked_linears import FastLinears
from qlora_cli.core.experts.fused_experts import fuse_experts
from qlora_cli.core.models.structure import underlying_model
from qlora_cli.errors import QloraError, first_line
from qlora_cli.settings.generation import SamplingSettings

HITS_BEFORE_TRIAL = 2  # right guesses one after another, before any is taken along
SHORTEST = 256  # positions of the cache that a step reads at least, where its attention reads a fixed number


class Guesses(Enum):
    """What a step with guesses gives beside steps of one token: the value ends a sentence that begins with its name."""

    UNTRIED = "not tried yet"
    EQUAL = "the same logits, bit for bit"
    NEAR = "logits that are rounded otherwise"
    WRONG = "other logits"


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
        self.guesses = Guesses.UNTRIED

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

    Args:
        fast: The model.
        near: Whether guesses are also taken where a step of several tokens rounds otherwise than steps of one.

    Attributes:
        graphs: Captured steps, by the positions that attention reads and the tokens of a row.
        reason: Why steps are not captured but launched one by one; None while they are captured.
        prefill_graphs: Those of the prompts, with a reason of their own.
    """

    def __init__(
        self,
        fast: FastModel,
        *,
        rows: int,
        capacity: int,
        sampling: SamplingSettings,
        look_up: bool = False,
        near: bool = False,
    ) -> None:
        super().__init__(fast.model, rows=rows, capacity=capacity, sampling=sampling, look_up=look_up)
        if self.look_up is not None:
            self.look_up = PromptLookUp(capacity, self.device, fused=True)
        self.fast = fast
        self.allowed = {Guesses.EQUAL, Guesses.NEAR} if near else {Guesses.EQUAL}
        self.reason = None if self.device.type == "cuda" else "only a GPU has graphs"
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
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
        how += f" over fused kernels: {self.fast.describe()}{self._describe_guesses()}"
        if self.look_up is not None and self.fast.guesses in {Guesses.NEAR, Guesses.WRONG} - self.allowed:
            how += f" (no prompt look-up: steps of several tokens give {self.fast.guesses.value} here)"
        return how

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

    def _takes_guesses(self) -> bool:
        if (
            self.fast.guesses is Guesses.UNTRIED
        ):  # the trial, and capturing a step with guesses, take as long as a hundred
            return self._hits >= HITS_BEFORE_TRIAL
        return self._hits > 0 and self.fast.guesses in self.allowed

    def _advance(self, width: int) -> None:
        length = self._attended_length()
        if width > 1 and self.fast.guesses is Guesses.UNTRIED:
            try:
                self.fast.guesses = self._try_guesses(length)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError):  # this architecture's own code has it that a row has one new token
                self.fast.guesses = Guesses.WRONG
        if self.fast.guesses not in self.allowed:
            width = 1
        # In the first step of this model fused attention is compared with the model's own.
        if self.fast.attention.usable is None or self.reason is not None:
            self._fused_step(length, width)
        else:
            graph = self.graphs.get((length, width)) or self._capture(length, width)
            if graph is not None:
                graph.replay()

    def _attended_length(self) -> int:
        """Positions of the cache that attention reads: all of them where the kernel stops at each row's end by itself."""
        if self.fast.attention.usable:
            return self.cache.capacity
        return min(max(SHORTEST, 1 << (max(self.filled) - 1).bit_length()), self.cache.capacity)

    def _fused_step(self, length: int, width: int) -> None:
        tokens, positions = self._inputs(width)
        with self._stepping(length, positions) as mask:
            self._take_step(tokens, positions, mask)

    @contextmanager
    def _stepping(self, length: int, positions: Tensor) -> Iterator[Any]:
        """While it lasts, a forward is a step whose new tokens stand at these positions, by the mask that is given."""
        fused = bool(self.fast.attention.usable)
        self.cache.start_step(positions, length, fused=fused, shared=len(positions) > self.cache.rows)
        with self.fast.layers.used_for("step"):
            if self.fast.attention.usable is False:
                yield self._mask(length, positions)
            else:
                with self.fast.attention.step(self.cache):
                    yield self._no_mask if fused else self._mask(length, positions)

    def _try_guesses(self, length: int) -> Guesses:
        """How the logits after several tokens of one step differ from those of steps of their own; nothing is chosen."""
        tokens = (self.tokens + torch.arange(WIDTH, device=self.device)[:, None]) % self.model.config.vocab_size
        places = self.positions + torch.arange(WIDTH, device=self.device)
        with self._stepping(length, places) as mask:
            together = self._forward(tokens, places, mask)
        found = Guesses.EQUAL
        for number in (0, WIDTH - 1):  # the keys and values of those before the last one are of the step of several
            one = slice(number, number + 1)
            with self._stepping(length, places[one]) as mask:
                alone = self._forward(tokens[one], places[one], mask)
            if not is_same(together[one], alone):
                return Guesses.WRONG
            found = found if torch.equal(together[one], alone) else Guesses.NEAR
        return found

    def _state(self) -> list[Tensor]:
        """What a step changes, apart from positions of the cache that the next step writes again."""
        tensors = [self.tokens, self.positions, self.chosen, self.seen]
        kept = [tensor for tensor in tensors if tensor is not None]
        kept += self.look_up.state() if self.look_up is not None else []
        return [*kept, *self.cache.states()]

    def _restore(self, before: list[Tensor]) -> None:
        for tensor, old in zip(self._state(), before, strict=True):
            tensor.copy_(old)

    def _capture(self, length: int, width: int) -> torch.cuda.CUDAGraph | None:
        """The graph of a step, which is not yet taken; None when it cannot be captured, and then the step is taken."""
        before = [tensor.clone() for tensor in self._state()]
        current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):  # once outside the graph: libraries make their workspaces, kernels are loaded
            self._fused_step(length, width)
        current.wait_stream(aside)
        states = [tensor.clone() for tensor in self.cache.states()]
        self._restore(before)
        try:
            graph, _ = capture(lambda: self._fused_step(length, width), self._pool)
        except (torch.OutOfMemoryError, QloraError):
            raise
        except RuntimeError as error:  # something in this architecture waits for the device
            torch.cuda.synchronize()
            if width > 1:  # steps of one may well be captured
                self.fast.guesses = Guesses.WRONG
                self._advance(1)
                return None
            self.reason = first_line(error)
            self._fused_step(length, width)
            return None
        if states:  # a model's own code updates them, and may have done so where a graph does not reach
            right = leaves(graph, self.cache.states(), states)
            self._restore(before)
            if not right:
                self.reason = "a captured step left other states"
                self._fused_step(length, width)
                return None
        self._pool = graph.pool()
        self.graphs[length, width] = graph
        return graph
