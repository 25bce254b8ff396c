"""KV cache of fixed size whose rows are independent: each is filled from its own beginning, so that none is padded.

Layers that keep a state instead of keys and values (short convolutions, linear attention, state-space mixers) find it
here too, one of a fixed size for each row.
"""

from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin


class StaticKVCache(Cache):
    """A transformers cache of fixed size whose rows are independent.

    Row r holds its token i at position i, whatever the other rows hold; a row is refilled without touching them. The
    caller says before each forward what is written where, with `start_prefill` or `start_step`.

    Args:
        rows: Answers decoded at once.
        capacity: Tokens in a row.
        layers: Of the model; those that have keys and values may come later.
    """

    layers: list["_StaticLayer"]  # type: ignore[assignment]

    def __init__(self, rows: int, capacity: int, layers: int = 0) -> None:
        super().__init__(layer_class_to_replicate=lambda: _StaticLayer(self))  # type: ignore[arg-type]
        self.layers = [_StaticLayer(self) for _ in range(layers)]
        self.rows = rows
        self.capacity = capacity
        self.prefilled: Tensor | None = None  # (prompts,) int64, rows being prefilled; None during a step
        self.start = 0  # prefilling: position of the first token being written
        self.positions = torch.empty(0)  # stepping: (rows,) int64, position of each row's new token
        self.length = 0  # positions that attention reads
        self.fused = False  # stepping: the attention kernel itself stores the new keys and values
        self.shared = False  # stepping: all new tokens belong to the only row
        self.attention: Any = None  # the FusedAttention of a step
        self._row_numbers: Tensor | None = None

    def start_prefill(self, rows: Tensor, count: int) -> None:
        """The next forward brings the first `count` tokens of each of `rows`, (prompts,) int64."""
        self.prefilled, self.start, self.length = rows, 0, count

    def start_step(self, positions: Tensor, length: int, *, fused: bool = False, shared: bool = False) -> None:
        """The next forward brings one token for every row, at `positions`; attention reads positions below `length`.

        With `fused`, the attention function gets keys whose `layer` attribute leads to the new ones, and stores them. With
        `shared`, it brings several for the only row, as if each had a row of its own that holds the same.
        """
        self.prefilled, self.start, self.length = None, length - 1, length
        self.positions, self.fused, self.shared = positions, fused, shared

    def row_numbers(self, device: torch.device) -> Tensor:
        """(rows, 1) int64, made once."""
        if self._row_numbers is None:
            self._row_numbers = torch.arange(self.rows, device=device)[:, None]
        return self._row_numbers

    def states(self) -> list[Tensor]:
        """What a step of every row changes for good: conv and recurrent states, but no keys and values."""
        return [state for layer in self.layers for state in layer.states()]


class _StaticLayer(LinearAttentionCacheLayerMixin, CacheLayerMixin):
    """One layer's keys and values, (rows, heads, capacity, head size), and its conv and recurrent states, (rows, ...).

    Each is made when the layer first brings it, of zeros: a masked position still multiplies its value. A model may read
    attributes as well as call methods, so that all have the names of transformers' own layers.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    record_past = False

    def __init__(self, cache: StaticKVCache) -> None:
        CacheLayerMixin.__init__(self)
        self.cache = cache
        self.new: tuple[Tensor, Tensor] | None = None  # key and value of the step, (rows, heads, 1, head size)
        self._conv: dict[int, Tensor] = {}  # by number: (rows, channels, kernel size), the last inputs
        self._recurrent: dict[int, Tensor] = {}

    # ------------------------------------------------------------ keys and values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:  # type: ignore[override]
        def allocate(states: Tensor) -> Tensor:
            return states.new_zeros(self.cache.rows, states.shape[1], self.cache.capacity, states.shape[3])

        self.keys, self.values = allocate(key_states), allocate(value_states)
        self._head_numbers = torch.arange(self.keys.shape[1], device=self.keys.device)[None, :]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes (rows, heads, tokens, head size) where the cache says, and returns what attention reads."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache, keys, values = self.cache, self.keys, self.values
        assert keys is not None and values is not None
        if cache.prefilled is not None:
            keys[cache.prefilled, :, : cache.length] = key_states
            values[cache.prefilled, :, : cache.length] = value_states
            return key_states, value_states
        self.new = key_states, value_states
        if cache.shared or not cache.fused:
            rows = cache.row_numbers(keys.device)
            rows = rows.expand(len(key_states), 1) if cache.shared else rows
            at = (rows, self._head_numbers, cache.positions[:, None])
            keys.index_put_(at, key_states.squeeze(2))
            values.index_put_(at, value_states.squeeze(2))
        seen_keys, seen_values = keys[:, :, : cache.length], values[:, :, : cache.length]
        if cache.shared:
            seen_keys = seen_keys.expand(len(key_states), -1, -1, -1)
            seen_values = seen_values.expand(len(key_states), -1, -1, -1)
        seen_keys.layer = self  # type: ignore[attr-defined]
        return seen_keys, seen_values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.length, 0

    def get_seq_length(self) -> int:
        return self.cache.start

    def get_max_length(self) -> int:
        return self.cache.capacity

    # ------------------------------------------------------------ states

    def states(self) -> list[Tensor]:
        """The states that are there."""
        return [*self._conv.values(), *self._recurrent.values()]

    @property
    def has_previous_state(self) -> dict[int, bool]:  # type: ignore[override]
        """By number, whether the forward goes on from a state: a prompt starts from none."""
        goes_on = self.cache.prefilled is None
        return defaultdict(lambda: goes_on, {0: goes_on})

    @property
    def conv_states(self) -> dict[int, Tensor | None]:  # type: ignore[override]
        """By number, the state that a step reads and writes in place; None for a prompt, which starts from none."""
        return self._visible(self._conv)

    @property
    def recurrent_states(self) -> dict[int, Tensor | None]:  # type: ignore[override]
        """The same for recurrent states."""
        return self._visible(self._recurrent)

    def _visible(self, states: dict[int, Tensor]) -> dict[int, Tensor | None]:
        return defaultdict(lambda: None, {0: None} if self.cache.prefilled is not None else states)

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        """Takes over the end of (rows, channels, tokens) as the new state, and returns what the convolution reads."""
        cache, kept = self.cache, conv_kernel_size or conv_states.shape[-1]
        if state_idx not in self._conv:
            self._conv[state_idx] = conv_states.new_zeros(cache.rows, *conv_states.shape[1:-1], kept)
        state = self._conv[state_idx]
        if cache.prefilled is not None:
            seen = F.pad(conv_states, (max(0, kept - conv_states.shape[-1]), 0))
            state[cache.prefilled] = seen[..., -kept:]
            return seen
        seen = torch.cat([state, conv_states], dim=-1)
        state.copy_(seen[..., -kept:])
        return seen

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Takes over (rows, ...) as the new state, and returns it."""
        cache = self.cache
        if state_idx not in self._recurrent:
            self._recurrent[state_idx] = recurrent_states.new_zeros(cache.rows, *recurrent_states.shape[1:])
        state = self._recurrent[state_idx]
        if cache.prefilled is not None:
            state[cache.prefilled] = recurrent_states
            return recurrent_states
        return state.copy_(recurrent_states)
