"""KV cache of fixed size whose rows are independent: each is filled from its own beginning, so that none is padded."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class StaticKVCache(Cache):
    """A transformers cache of fixed size whose rows are independent.

    Row r holds its token i at position i, whatever the other rows hold; a row is refilled without touching them. The
    caller says before each forward what is written where, with `start_prefill` or `start_step`.

    Args:
        rows: Answers decoded at once.
        capacity: Tokens in a row.
    """

    def __init__(self, rows: int, capacity: int) -> None:
        super().__init__(layer_class_to_replicate=lambda: _StaticKVLayer(self))  # type: ignore[arg-type]
        self.rows = rows
        self.capacity = capacity
        self.prefilled: Tensor | None = None  # (prompts,) int64, rows being prefilled; None during a step
        self.start = 0  # prefilling: position of the first token being written
        self.positions = torch.empty(0)  # stepping: (rows,) int64, position of each row's new token
        self.length = 0  # positions that attention reads
        self.fused = False  # stepping: the attention kernel itself stores the new keys and values
        self.attention: Any = None  # the FusedAttention of a step
        self._row_numbers: Tensor | None = None

    def start_prefill(self, rows: Tensor, count: int) -> None:
        """The next forward brings the first `count` tokens of each of `rows`, (prompts,) int64."""
        self.prefilled, self.start, self.length = rows, 0, count

    def start_step(self, positions: Tensor, length: int, *, fused: bool = False) -> None:
        """The next forward brings one token for every row, at `positions`; attention reads positions below `length`.

        With `fused`, the attention function gets keys whose `layer` attribute leads to the new ones, and stores them.
        """
        self.prefilled, self.start, self.length = None, length - 1, length
        self.positions, self.fused = positions, fused

    def row_numbers(self, device: torch.device) -> Tensor:
        """(rows, 1) int64, made once."""
        if self._row_numbers is None:
            self._row_numbers = torch.arange(self.rows, device=device)[:, None]
        return self._row_numbers


class _StaticKVLayer(CacheLayerMixin):
    """One layer's keys and values: (rows, heads, capacity, head size), zero where nothing was written."""

    is_sliding = False

    def __init__(self, cache: StaticKVCache) -> None:
        super().__init__()
        self.cache = cache
        self.new: tuple[Tensor, Tensor] | None = None  # key and value of the step, (rows, heads, 1, head size)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def allocate(states: Tensor) -> Tensor:  # zeros: a masked position still multiplies its value
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
        if not cache.fused:
            at = (cache.row_numbers(keys.device), self._head_numbers, cache.positions[:, None])
            keys.index_put_(at, key_states.squeeze(2))
            values.index_put_(at, value_states.squeeze(2))
        seen_keys, seen_values = keys[:, :, : cache.length], values[:, :, : cache.length]
        seen_keys.layer = self  # type: ignore[attr-defined]
        return seen_keys, seen_values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.length, 0

    def get_seq_length(self) -> int:
        return self.cache.start

    def get_max_length(self) -> int:
        return self.cache.capacity
