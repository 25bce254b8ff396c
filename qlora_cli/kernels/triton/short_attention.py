"""Packed attention for rows of at most 128 tokens, forward and backward (Triton).

A program has one block of one row and head. Flash attention's backward pass is three kernels over an fp32 gradient of
the queries, with 128 tokens more for each row: 55 MB for 64 heads of 15 rows. The same formulas: arXiv:2205.14135.
Graphs of 1,024 tokens or more count with longer rows (`cuda_graphs.bucketed`), which `block_attention` takes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LONGEST = 128
LARGEST_HEAD = 128
BLOCK = 64
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _scores(query, key, at_query, at_key, length, scale):
    """Scaled scores times log2(e), for exp2; (BLOCK, BLOCK) fp32, -inf where a query must not look."""
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * (scale * LOG2_E)
    seen = (at_key[None, :] <= at_query[:, None]) & (at_key[None, :] < length) & (at_query[:, None] < length)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _places(tensor, start, at, length, head, heads, size, SIZE: tl.constexpr):
    """Where rows `at` of one head are, (BLOCK, SIZE), and which of these places lie within the row and the head."""
    column = tl.arange(0, SIZE)
    row = tensor + (start.to(tl.int64) * heads + head) * size
    place = at[:, None] * (heads * size) + column[None, :]
    return row + place, (at[:, None] < length) & (column[None, :] < size)


@triton.jit
def _load(tensor, start, at, length, head, heads, size, SIZE: tl.constexpr):
    """Rows `at` of one head: (BLOCK, SIZE), zeros beyond the row's length and the head's size."""
    places, inside = _places(tensor, start, at, length, head, heads, size, SIZE)
    return tl.load(places, mask=inside, other=0.0)


@triton.jit
def _store(tensor, value, start, at, length, head, heads, size, SIZE: tl.constexpr):
    places, inside = _places(tensor, start, at, length, head, heads, size, SIZE)
    tl.store(places, value.to(tensor.dtype.element_ty), mask=inside)


@triton.jit
def _attend(
    query, key, value, boundaries, out, lse, tokens, heads, size, scale, BLOCK: tl.constexpr, SIZE: tl.constexpr
):
    head = tl.program_id(1)
    first = tl.program_id(2) * BLOCK
    start = tl.load(boundaries + tl.program_id(0))
    length = tl.load(boundaries + tl.program_id(0) + 1) - start
    if first < length:
        at = first + tl.arange(0, BLOCK)
        q = _load(query, start, at, length, head, heads, size, SIZE)
        highest = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        mixed = tl.zeros((BLOCK, SIZE), tl.float32)
        for begin in range(0, first + BLOCK, BLOCK):
            other = begin + tl.arange(0, BLOCK)
            k = _load(key, start, other, length, head, heads, size, SIZE)
            v = _load(value, start, other, length, head, heads, size, SIZE)
            scores = _scores(q, k, at, other, length, scale)
            new_highest = tl.maximum(highest, tl.max(scores, 1))
            shown = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # beyond the row's end nothing is seen
            weights = tl.exp2(scores - shown[:, None])
            shrink = tl.exp2(highest - shown)
            total = total * shrink + tl.sum(weights, 1)
            mixed = mixed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            highest = new_highest
        total = tl.where(at < length, total, 1.0)
        _store(out, mixed / total[:, None], start, at, length, head, heads, size, SIZE)
        place = head.to(tl.int64) * tokens + start + at
        tl.store(lse + place, (highest + tl.log2(total)) / LOG2_E, mask=at < length)


@triton.jit
def _weights(query, key, value, grad, delta, log_sum, at_query, at_key, length, scale):
    """Attention's weights, and the gradient of the scaled scores: (BLOCK, BLOCK) fp32 each."""
    scores = _scores(query, key, at_query, at_key, length, scale)
    weights = tl.exp2(scores - log_sum[:, None] * LOG2_E)
    slope = tl.dot(grad, tl.trans(value), input_precision="ieee")
    return weights, weights * (slope - delta[:, None])


@triton.jit
def _attend_backward(
    grad,
    query,
    key,
    value,
    boundaries,
    out,
    lse,
    grad_query,
    grad_key,
    grad_value,
    tokens,
    heads,
    size,
    scale,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Gradients of one block of queries, by all keys up to it, and of the same keys and values, by all queries from it."""
    head = tl.program_id(1)
    first = tl.program_id(2) * BLOCK
    start = tl.load(boundaries + tl.program_id(0))
    length = tl.load(boundaries + tl.program_id(0) + 1) - start
    if first < length:
        at = first + tl.arange(0, BLOCK)
        log_sums = lse + head.to(tl.int64) * tokens + start
        q = _load(query, start, at, length, head, heads, size, SIZE)
        k = _load(key, start, at, length, head, heads, size, SIZE)
        v = _load(value, start, at, length, head, heads, size, SIZE)
        g = _load(grad, start, at, length, head, heads, size, SIZE)
        o = _load(out, start, at, length, head, heads, size, SIZE)
        delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
        log_sum = tl.load(log_sums + at, mask=at < length, other=0.0)
        weights, slope = _weights(q, k, v, g, delta, log_sum, at, at, length, scale)
        own_weights, own_slope = weights.to(g.dtype), slope.to(q.dtype)
        query_sum = tl.dot(own_slope, k, input_precision="ieee")
        for begin in range(0, first, BLOCK):
            other = begin + tl.arange(0, BLOCK)
            other_k = _load(key, start, other, length, head, heads, size, SIZE)
            other_v = _load(value, start, other, length, head, heads, size, SIZE)
            _, slope = _weights(q, other_k, other_v, g, delta, log_sum, at, other, length, scale)
            query_sum += tl.dot(slope.to(other_k.dtype), other_k, input_precision="ieee")
        _store(grad_query, query_sum * scale, start, at, length, head, heads, size, SIZE)
        value_sum = tl.dot(tl.trans(own_weights), g, input_precision="ieee")
        key_sum = tl.dot(tl.trans(own_slope), q, input_precision="ieee")
        for begin in range(first + BLOCK, length, BLOCK):
            other = begin + tl.arange(0, BLOCK)
            q = _load(query, start, other, length, head, heads, size, SIZE)
            g = _load(grad, start, other, length, head, heads, size, SIZE)
            o = _load(out, start, other, length, head, heads, size, SIZE)
            delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
            log_sum = tl.load(log_sums + other, mask=other < length, other=0.0)
            weights, slope = _weights(q, k, v, g, delta, log_sum, other, at, length, scale)
            value_sum += tl.dot(tl.trans(weights.to(g.dtype)), g, input_precision="ieee")
            key_sum += tl.dot(tl.trans(slope.to(q.dtype)), q, input_precision="ieee")
        _store(grad_value, value_sum, start, at, length, head, heads, size, SIZE)
        _store(grad_key, key_sum * scale, start, at, length, head, heads, size, SIZE)


def covers(query: Tensor, key: Tensor, value: Tensor, longest: int, window: int | None) -> bool:
    """Whether rows are short enough, every head has a key of its own, and no window ends inside a row."""
    alike = query.shape == key.shape == value.shape and query.shape[2] <= LARGEST_HEAD
    contiguous = all(t.is_contiguous() for t in (query, key, value))
    return alike and contiguous and longest <= LONGEST and (window is None or window >= longest)


def _grid(query: Tensor, boundaries: Tensor, longest: int) -> tuple[int, int, int]:
    return boundaries.numel() - 1, query.shape[1], triton.cdiv(longest, BLOCK)


def _size(query: Tensor) -> int:
    return max(16, triton.next_power_of_2(query.shape[2]))


def attend(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention within each row.

    Args:
        query: (tokens, heads, size), contiguous.
        key: Like `query`.
        value: Like `query`.
        boundaries: (rows + 1,) int32 on the same device: where rows start, and the total. Rows may be empty.
        longest: Tokens of the longest row, or more; at most `LONGEST`.
        scale: Factor on the scores.

    Returns:
        (tokens, heads, size); the natural logarithm of the sum of exponentiated scores, (heads, tokens) fp32.
    """
    tokens, heads, size = query.shape
    out, lse = torch.empty_like(query), query.new_empty(heads, tokens, dtype=torch.float32)
    with torch.cuda.device_of(query):
        _attend[_grid(query, boundaries, longest)](
            query,
            key,
            value,
            boundaries,
            out,
            lse,
            tokens,
            heads,
            size,
            scale,
            BLOCK=BLOCK,
            SIZE=_size(query),
            num_stages=1,  # one round or two: nothing to fetch ahead, and two programs fit a processor
        )
    return out, lse


def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    boundaries: Tensor,
    longest: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend`'s first result with respect to query, key and value.

    `grad`, contiguous, is the gradient of `out`; all that follows is as `attend` took and returned it.
    """
    tokens, heads, size = query.shape
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    with torch.cuda.device_of(query):
        _attend_backward[_grid(query, boundaries, longest)](
            grad,
            query,
            key,
            value,
            boundaries,
            out,
            lse,
            *grads,
            tokens,
            heads,
            size,
            scale,
            BLOCK=BLOCK,
            SIZE=_size(query),
            num_stages=1,
        )
    return grads
