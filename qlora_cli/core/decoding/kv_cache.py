"""Keys and values of running answers: one slot a row, each filled from its own beginning, so that none is padded."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class StaticKVCache(Cache):
    """A transformers cache of fixed size whose rows are independent.

    Row r holds its token i at place i, whatever the other rows hold; a row is refilled without touching them. The
    caller says before each forward what is written where, with `start_prefill` or `start_step`.

    Args:
        slots: Rows.
        capacity: Tokens in a row.
    """

    def __init__(self, slots: int, capacity: int) -> None:
        super().__init__(layer_class_to_replicate=lambda: _StaticKVLayer(self))  # type: ignore[arg-type]
        self.slots = slots
        self.capacity = capacity
        self.rows: Tensor | None = None  # (rows,) slots being filled; None during a step
        self.start = 0  # place of the first token being written, when filling
        self.positions = torch.empty(0)  # (slots,) int64, place of each row's new token, when stepping
        self.length = 0  # places that attention reads
        self.joined = False  # stepping: attention itself stores the new keys and values, and finds the rest here
        self.attention: Any = None  # whose turn it is then
        self._row_numbers: Tensor | None = None

    def start_prefill(self, rows: Tensor, start: int, count: int) -> None:
        """The next forward brings `count` tokens for each of `rows`, after the `start` that are there."""
        self.rows, self.start, self.length = rows, start, start + count

    def start_step(self, positions: Tensor, length: int, *, joined: bool = False) -> None:
        """The next forward brings one token for every slot, at `positions`; attention reads places below `length`.

        With `joined`, the attention function gets whole rows whose `slot` attribute leads to what is new, and stores it.
        """
        self.rows, self.start, self.positions, self.length, self.joined = None, length - 1, positions, length, joined

    def row_numbers(self, device: torch.device) -> Tensor:
        """(slots, 1), made once."""
        if self._row_numbers is None:
            self._row_numbers = torch.arange(self.slots, device=device)[:, None]
        return self._row_numbers


class _StaticKVLayer(CacheLayerMixin):
    """One layer's keys and values: (slots, heads, capacity, head size), zero where nothing was written."""

    is_sliding = False

    def __init__(self, cache: StaticKVCache) -> None:
        super().__init__()
        self.cache = cache
        self.fresh: tuple[Tensor, Tensor] | None = (
            None  # key and value of the tokens of the step, (slots, heads, 1, size)
        )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def room(states: Tensor) -> Tensor:  # zeros: a masked place still multiplies its value
            return states.new_zeros(self.cache.slots, states.shape[1], self.cache.capacity, states.shape[3])

        self.keys, self.values = room(key_states), room(value_states)
        self._head_numbers = torch.arange(self.keys.shape[1], device=self.keys.device)[None, :]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes (rows, heads, tokens, head size) where the cache says, and returns what attention reads."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache, keys, values = self.cache, self.keys, self.values
        assert keys is not None and values is not None
        if cache.rows is not None:
            keys[cache.rows, :, cache.start : cache.length] = key_states
            values[cache.rows, :, cache.start : cache.length] = value_states
            if cache.start == 0:
                return key_states, value_states
            return keys[cache.rows, :, : cache.length], values[cache.rows, :, : cache.length]
        self.fresh = key_states, value_states
        if not cache.joined:
            places = (cache.row_numbers(keys.device), self._head_numbers, cache.positions[:, None])
            keys.index_put_(places, key_states.squeeze(2))
            values.index_put_(places, value_states.squeeze(2))
        seen_keys, seen_values = keys[:, :, : cache.length], values[:, :, : cache.length]
        seen_keys.slot = self  # type: ignore[attr-defined]
        return seen_keys, seen_values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.length, 0

    def get_seq_length(self) -> int:
        return self.cache.start

    def get_max_length(self) -> int:
        return self.cache.capacity
